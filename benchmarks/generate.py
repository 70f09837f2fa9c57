"""Run: uv run benchmarks/generate.py [--tokens N] [--repeats N] [--agreement TOKENS] [--dense DIR] [--json FILE]

Greedy decoding at batch 1 and 8 and a prompt of 1,024 tokens, side by side in one run: each round gives every
contestant a turn, and ratios are of the same round, so that a slow moment of the machine hits all alike.

- transformers' own loop with the dense model and with the stock GLM4-MoE export;
- `lamella generate` with the dense model, its conversion (as converted and with experts by chance) and a partition of
  which half is active, with weights in float32, float16 and int8;
- llama.cpp with the exported GGUF, where xllamacpp is installed.

Beside the speed: how often the likeliest next token is that of the same model in float32, on held-out text, and the
most that leaving out half of the FFNs can give (`bound`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # runs where lamella is not installed, too

from measure import median_spread, positive, print_table, provenance, write_json

from lamella.conversion import convert
from lamella.export import export
from lamella.generation import Generator
from lamella.generation.sampling import Sampling
from lamella.hf.packing import packed_bytes
from lamella.recipe.conversion import make_conversion

PROMPT = "The first rule of writing clear programs is that others will read them, so"
PARTITION = {"method": "partition", "calibration": {"num_tokens": 4096, "sequence_length": 256}}


class Clock:
    """A streamer of transformers: `put` is called with the prompt, then for each token."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def put(self, _: Any) -> None:
        self.marks.append(time.perf_counter())

    def end(self) -> None:
        pass


Kind = str
"""A model and its dtype, as "twins, int8"."""
Run = Callable[[], float]
"""Measures seconds: of a decode step, or of a prompt."""


def by_transformers(generator: Generator, tokens: int) -> float:
    """Seconds per token, the first one left out."""
    clock, inputs = Clock(), generator.tokenizer(PROMPT, return_tensors="pt").to(generator.model.device)
    sizes = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    generator.model.generate(**inputs, **sizes, do_sample=False, streamer=clock, pad_token_id=0)
    return (clock.marks[-1] - clock.marks[1]) / (len(clock.marks) - 2)


def by_lamella(generator: Generator, tokens: int, batch: int, mode: str | None) -> float:
    if mode is not None:
        generator.model.set_mode(mode)
    generator.generate([PROMPT] * batch, Sampling(tokens, ignore_eos=True))
    return 1 / generator.counts.tokens_per_s


def by_prompt(generator: Generator, length: int) -> float:
    ids = (generator.encode(Path(__file__).read_text()) * 8)[:length]
    generator.decoding.ids = []  # nothing is known from before
    began = time.perf_counter()
    with torch.inference_mode():
        generator.decoding.read([ids], 1)
    return time.perf_counter() - began


class LlamaCpp:
    """llama.cpp's server within this process, one thread."""

    def __init__(self, file: Path, threads: int):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.warmup, params.n_gpu_layers, params.port = 256, 1, False, 0, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        self.server = xllamacpp.Server(params)

    def __call__(self, tokens: int) -> float:
        request = {"prompt": PROMPT, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        result = self.server.handle_completions(request | {"timings_per_token": True})
        result = json.loads(result) if isinstance(result, str) else result
        return 1 / result["timings"]["predicted_per_second"]


def contestants(args: argparse.Namespace, work: Path) -> tuple[dict[Kind, Generator], dict[str, dict[str, Run]]]:
    """(the models; what is measured -> name -> how)."""
    from lamella.checkpoint.embedded import embedded_model

    dense = str(args.dense or embedded_model())
    twins = str(convert(dense, work / "moe").out)
    partition = str(args.partition or convert(dense, work / "partition", make_conversion(PARTITION).options).out)
    folders = {"dense": dense, "twins": twins, "partition": partition}
    models = {
        f"{name}, {dtype}": Generator.open(folder, dtype, args.device)
        for dtype in ("float32", "float16", "int8")
        for name, folder in folders.items()
    }
    glm = Generator.open(str(export(Path(twins), "glm4-moe", work / "glm", check=False).out), "float32", args.device)
    runs: dict[str, dict[str, Run]] = {"batch 1": {}, "batch 8": {}, "prompt of 1,024": {}}
    one, eight, prompt = runs.values()
    one["transformers: dense"] = partial(by_transformers, models["dense, float32"], args.tokens)
    one["transformers: glm4_moe"] = partial(by_transformers, glm, args.tokens)
    for kind, generator in models.items():
        mode = None if kind.startswith("dense") else "routed"
        one[f"lamella: {kind}"] = partial(by_lamella, generator, args.tokens, 1, mode)
        if kind == "twins, float32":
            one["lamella: twins by chance, float32"] = partial(by_lamella, generator, args.tokens, 1, "random")
        if "int8" not in kind:
            eight[f"lamella: {kind}"] = partial(by_lamella, generator, max(2, args.tokens // 3), 8, mode)
        if "float32" in kind:
            prompt[f"lamella: {kind}"] = partial(by_prompt, generator, 1024)
    if importlib.util.find_spec("xllamacpp"):
        for dtype in ("F32", "Q8_0"):
            out = export(Path(twins), "gguf", work / dtype, check=False, dtype=dtype).out
            llama = LlamaCpp(next(out.glob("*.gguf")), torch.get_num_threads())
            one[f"llama.cpp: twins, {dtype}"] = partial(llama, args.tokens)
    return models, runs


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


def bound(models: dict[Kind, Generator]) -> float:
    """How much faster a partition with half of the FFNs' neurons can be than the dense model: the ratio of the weights
    that one token reads (bytes at batch 1, FLOPs where the products bound it), attention's own left out."""
    model = models["dense, float32"].model
    total = sum(p.numel() for name, p in model.named_parameters() if "norm" not in name)  # a tied head is read whole
    ffn = sum(p.numel() for name, p in model.named_parameters() if ".mlp." in name)
    return total / (total - ffn / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, help="dense folder (default: the embedded model)")
    parser.add_argument("--partition", type=Path, help="its partition with half active (default: converted here)")
    parser.add_argument("--tokens", type=positive, default=48)
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument(
        "--agreement", type=positive, default=4096, help="compare the likeliest token at so many places"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        models, runs = contestants(args, Path(temporary))
        seconds: dict[str, dict[str, list[float]]] = {what: {name: [] for name in some} for what, some in runs.items()}
        for turn in range(args.repeats + 1):
            for what, some in runs.items():
                for name, measure in some.items():
                    taken = measure()
                    if turn:  # the first is the warm-up
                        seconds[what][name].append(taken)
        report(models, seconds, args)


def rows_of(
    what: str, seconds: dict[str, list[float]], models: dict[Kind, Generator], agreement: dict[Kind, float]
) -> list[dict[str, Any]]:
    def over(baseline: str, taken: list[float]) -> float | None:
        if baseline not in seconds:
            return None
        return statistics.median(b / s for b, s in zip(seconds[baseline], taken, strict=True))

    rows = []
    for name, taken in seconds.items():
        kind = name.removeprefix("lamella: ")
        model = models.get(kind)
        middle, spread = median_spread(taken)
        rows.append({
            "what": what, "impl": name, "steps_per_s": 1 / middle, "spread": spread,
            "over_transformers": over("transformers: dense", taken),
            "over_dense": over(f"lamella: dense, {kind.rpartition(', ')[2]}", taken) if ": d" not in name else None,
            "top1_agreement": agreement.get(kind), "weights_mib": model and packed_bytes(model.model) / 2**20,
        })  # fmt: skip
    return rows


def report(models: dict[Kind, Generator], seconds: dict[str, dict[str, list[float]]], args: argparse.Namespace) -> None:
    for generator in models.values():
        if hasattr(generator.model, "set_mode"):
            generator.model.set_mode("routed")
    agreement = {}
    for kind, generator in models.items():
        name, dtype = kind.split(", ")
        if dtype != "float32":
            folder = str(generator.model.config._name_or_path)
            agreement[kind] = top1_agreement(models[f"{name}, float32"], generator, folder, args.agreement)
    header = ["", "steps/s", "spread", "over transformers' dense", "over lamella's dense, same dtype",
              "likeliest token as in float32", "weights, MiB"]  # fmt: skip
    rows = []
    for what, taken in seconds.items():
        some = rows_of(what, taken, models, agreement if what == "batch 1" else {})
        rows += some
        table = [
            [r["impl"], f"{r['steps_per_s']:.2f}", f"{r['spread']:.0%}", times(r["over_transformers"]),
             times(r["over_dense"]), "" if r["top1_agreement"] is None else f"{r['top1_agreement']:.2%}",
             "" if r["weights_mib"] is None else f"{r['weights_mib']:.0f}"]
            for r in some
        ]  # fmt: skip
        print_table(f"{what}, {args.repeats} rounds", header, table)
    print(f"\nbound for half of the FFNs: {bound(models):.2f}x")
    write_json(args.json, {**provenance(torch.device(args.device)), "tokens": args.tokens, "repeats": args.repeats,
                           "bound": bound(models), "rows": rows})  # fmt: skip


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


if __name__ == "__main__":
    main()
