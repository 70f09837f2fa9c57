"""Run: uv run benchmarks/generate.py [--moe DIR] [--dense DIR] [--json FILE]

Batch-1 greedy decoding in tokens/s, side by side in one run: the dense model, its conversion (as converted and with
experts drawn at random), and the stock GLM4-MoE export in transformers. A conversion reads as many weights per token
as the dense model, so its limit is 1.0x.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # runs where lamella is not installed, too

from measure import interleaved_seconds, median_spread, positive, print_table, provenance, write_json

from lamella.conversion import convert
from lamella.export import export
from lamella.hf.models import load

PROMPT_TOKENS = 32


def decode(model: Any, mode: str | None, tokens: int) -> None:
    if mode is not None:
        model.set_mode(mode)
    prompt = torch.arange(1, 1 + PROMPT_TOKENS, device=model.device)[None]
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip


def prefill_seconds(model: Any, mode: str | None, repeats: int, device: torch.device) -> float:
    return median_spread(interleaved_seconds({"": lambda: decode(model, mode, 1)}, repeats, device)[""])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, help="dense folder (default: the embedded model)")
    parser.add_argument("--moe", type=Path, help="its conversion (default: made in a temporary folder)")
    parser.add_argument("--tokens", type=positive, default=48)
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    with tempfile.TemporaryDirectory() as temporary:
        moe_folder = args.moe or convert(args.dense, Path(temporary) / "moe").out
        glm_folder = export(moe_folder, "glm4-moe", Path(temporary) / "glm", check=False).out
        if args.dense is None:
            from lamella.checkpoint.embedded import embedded_model

            args.dense = embedded_model()
        dense, moe, glm = (load(folder, dtype, str(device)) for folder in (args.dense, moe_folder, glm_folder))
    models = {
        "dense": (dense, None),
        "lamella, as converted": (moe, "routed"),
        "lamella, random experts": (moe, "random"),
        "transformers glm4_moe": (glm, None),
    }
    steps = {name: lambda m=model, k=mode: decode(m, k, args.tokens) for name, (model, mode) in models.items()}
    timed = interleaved_seconds(steps, args.repeats, device)
    rows = []
    for name, (model, mode) in models.items():
        seconds, spread = median_spread(timed[name])
        decoding = seconds - prefill_seconds(model, mode, args.repeats, device)
        rows.append({"impl": name, "tokens_per_s": (args.tokens - 1) / decoding, "spread": spread})
    for row in rows:
        row["over_dense"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
    table = [[r["impl"], f"{r['tokens_per_s']:.1f}", f"{r['over_dense']:.2f}x", f"{r['spread']:.0%}"] for r in rows]
    title = f"batch 1, {args.tokens} tokens, {str(dtype).removeprefix('torch.')}"
    print_table(title, ["model", "tokens/s", "over dense", "+-"], table)
    shape = {key: getattr(dense.config, key) for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    write_json(args.json, {**provenance(device), "dtype": str(dtype), "shape": shape, "rows": rows})


if __name__ == "__main__":
    main()
