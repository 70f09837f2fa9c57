"""Run: uv run benchmarks/lower_top_k.py MODEL [--tokens N] [--data TEXT] [--json FILE] [--picture FILE]

Perplexity of a converted model over the number of experts per token (flat routing) or the share of twins (sliced).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # runs where lamella is not installed, too

from measure import figure, positive, print_table, provenance, write_json

from lamella.architecture.converted import ffn_config
from lamella.checkpoint.source import read_config
from lamella.evaluate.perplexity import evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", default="python-docs")
    parser.add_argument("--tokens", type=positive, default=4096)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    moe = ffn_config(read_config(args.model))
    if moe is None:
        sys.exit(f"error: {args.model} has no experts in its FFNs")
    is_twin, K = moe.routing == "twin", moe.num_experts_per_tok
    rows = []
    for count in range(0 if is_twin else 1, K + 1):
        how = {"twins": count / K} if is_twin else {"top_k": count}
        result = evaluate(str(args.model), args.data, max_tokens=args.tokens, seq_len=512, **how)["model"]
        rows.append({**how, "nats_per_token": result.nats_per_token, "perplexity": result.perplexity})
    what = "share of twins" if is_twin else "experts per token"
    at = [row["twins" if is_twin else "top_k"] for row in rows]
    table = [[f"{x:.3g}", f"{row['perplexity']:.2f}"] for x, row in zip(at, rows, strict=True)]
    print_table(f"{args.model.name}, {args.data}", [what, "perplexity"], table)
    write_json(
        args.json, {**provenance(torch.device("cpu")), "model": args.model.name, "data": args.data, "rows": rows}
    )
    if args.picture:
        with figure(args.picture, 1) as (plot,):
            plot.plot(at, [row["perplexity"] for row in rows], "o-", label=args.data)
            plot.set_xlabel(what)
            plot.set_ylabel("perplexity")
            plot.set_yscale("log")


if __name__ == "__main__":
    main()
