"""Run: uv run benchmarks/generate.py [--tokens N] [--repeats N] [--agreement TOKENS] [--dense DIR] [--json FILE]

Decoding at batch 1, greedy, side by side in one run: each round gives every contestant a turn, and ratios are of the
same round, so that a slow moment of the machine hits all alike.

- transformers' own loop with the dense model and with the stock GLM4-MoE export;
- `lamella generate` with the dense model, its conversion (as converted and with experts by chance) and a partition of
  which half is active, with weights in float32, float16 and int8.

Beside the speed: how often the likeliest next token is that of the same model in float32, on held-out text.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # runs where lamella is not installed, too

from measure import positive, print_table, provenance, write_json

from lamella.conversion import convert
from lamella.export import export
from lamella.generation import Generator
from lamella.generation.sampling import Sampling
from lamella.hf.packing import packed_bytes
from lamella.recipe.conversion import make_conversion

PROMPT = "The first rule of writing clear programs is that others will read them, so"
PARTITION = {
    "method": "partition",
    "parts": 8,
    "active": 4,
    "calibration": {"num_tokens": 4096, "sequence_length": 256},
}


class Clock:
    """A streamer of transformers: `put` is called with the prompt, then for each token."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def put(self, _: Any) -> None:
        self.marks.append(time.perf_counter())

    def end(self) -> None:
        pass


def by_transformers(generator: Generator, tokens: int) -> float:
    """Seconds per token, the first one left out."""
    clock, inputs = Clock(), generator.tokenizer(PROMPT, return_tensors="pt").to(generator.model.device)
    sizes = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    generator.model.generate(**inputs, **sizes, do_sample=False, streamer=clock, pad_token_id=0)
    return (clock.marks[-1] - clock.marks[1]) / (len(clock.marks) - 2)


def by_lamella(generator: Generator, tokens: int, mode: str | None = None) -> float:
    if mode is not None:
        generator.model.set_mode(mode)
    generator.generate([PROMPT], Sampling(tokens, ignore_eos=True))
    return 1 / generator.counts.tokens_per_s


def contestants(args: argparse.Namespace, work: Path) -> dict[str, tuple[Generator, Callable[[Generator, int], float]]]:
    """name -> (what generates, how its seconds per token are taken)."""
    from lamella.checkpoint.embedded import embedded_model

    dense = str(args.dense or embedded_model())
    twins = str(convert(dense, work / "moe").out)
    glm = str(export(Path(twins), "glm4-moe", work / "glm", check=False).out)
    partition = str(convert(dense, work / "partition", make_conversion(PARTITION).options).out)

    def of(folder: str, dtype: str) -> Generator:
        return Generator.open(folder, dtype, args.device)

    def random(generator: Generator, tokens: int) -> float:
        return by_lamella(generator, tokens, "random")

    def routed(generator: Generator, tokens: int) -> float:
        return by_lamella(generator, tokens, "routed")

    whole = of(dense, "float32")
    sliced = of(twins, "float32")
    found: dict[str, tuple[Generator, Callable[[Generator, int], float]]] = {
        "transformers: dense": (whole, by_transformers),
        "transformers: glm4_moe": (of(glm, "float32"), by_transformers),
        "lamella: dense": (whole, by_lamella),
        "lamella: twins, as converted": (sliced, routed),
        "lamella: twins, by chance": (sliced, random),
        "lamella: partition, half active": (of(partition, "float32"), routed),
    }
    for dtype in ("float16", "int8"):
        found[f"lamella: dense, {dtype}"] = (of(dense, dtype), by_lamella)
        found[f"lamella: twins, {dtype}"] = (of(twins, dtype), routed)
        found[f"lamella: partition, {dtype}"] = (of(partition, dtype), routed)
    return found


@torch.inference_mode()
def top1_agreement(one: Generator, other: Generator, folder: str, tokens: int) -> float:
    """How often the likeliest next token is the same, on windows of 256 tokens of held-out text."""
    from lamella.evaluate.perplexity import text_samples

    same = []
    for data in ("python-docs", "stdlib-code"):
        samples = text_samples(data, "heldout", folder, 256, tokens)
        for n in range(max(1, tokens // 512)):
            ids = samples.sample(n)[0][None].to(one.model.device)
            best, also = (g.model(ids, use_cache=False).logits.argmax(-1) for g in (one, other))
            same.append((best == also).float().mean().item())
    return statistics.mean(same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, help="dense folder (default: the embedded model)")
    parser.add_argument("--tokens", type=positive, default=48)
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument(
        "--agreement", type=positive, default=4096, help="compare the likeliest token at so many places"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = contestants(args, Path(temporary))
        seconds: dict[str, list[float]] = {name: [] for name in found}
        for turn in range(args.repeats + 1):
            for name, (generator, measure) in found.items():
                taken = measure(generator, args.tokens)
                if turn:  # the first is the warm-up
                    seconds[name].append(taken)
        rows = [row(name, found, seconds, args) for name in found]
    report(rows, args)


def row(name: str, found: dict[str, Any], seconds: dict[str, list[float]], args: argparse.Namespace) -> dict[str, Any]:
    generator, taken = found[name][0], seconds[name]
    kind, dtype = name.removeprefix("lamella: ").partition(", ")[::2]
    agreement = None
    if dtype in ("float16", "int8"):
        original = next(g for other, (g, _) in found.items() if other.startswith(f"lamella: {kind}"))
        agreement = top1_agreement(original, generator, str(generator.model.config._name_or_path), args.agreement)

    def over(baseline: str) -> float:
        return statistics.median(b / s for b, s in zip(seconds[baseline], taken, strict=True))

    return {
        "impl": name, "tokens_per_s": 1 / statistics.median(taken), "over_transformers": over("transformers: dense"),
        "over_dense": over("lamella: dense" + (f", {dtype}" if agreement is not None else "")),
        "top1_agreement": agreement, "weights_mib": packed_bytes(generator.model) / 2**20,
    }  # fmt: skip


def report(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    table = [
        [r["impl"], f"{r['tokens_per_s']:.1f}", f"{r['over_transformers']:.2f}x", f"{r['over_dense']:.2f}x",
         "" if r["top1_agreement"] is None else f"{r['top1_agreement']:.2%}", f"{r['weights_mib']:.0f}"]
        for r in rows
    ]  # fmt: skip
    header = ["contestant", "tokens/s", "over transformers' dense", "over lamella's dense, same dtype",
              "likeliest token as in float32", "weights, MiB"]  # fmt: skip
    print_table(f"batch 1, {args.tokens} tokens, {args.repeats} rounds", header, table)
    write_json(args.json, {**provenance(torch.device(args.device)), "tokens": args.tokens, "rows": rows})


if __name__ == "__main__":
    main()
