"""Run: uv run benchmarks/lower_top_k.py MODEL... [--tokens N] [--data TEXT...] [--json FILE] [--picture FILE]

Perplexity of converted models over the number of experts per token (flat routing) or the share of twins (sliced), on
each text, beside what the model was made for: all of them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # runs where lamella is not installed, too

from measure import figure, positive, print_table, provenance, write_json

from lamella.architecture.converted import ffn_config
from lamella.checkpoint.source import read_config
from lamella.errors import UserError
from lamella.evaluate.checkpoints import model_path
from lamella.evaluate.perplexity import evaluate


def curve(model: str, data: str, tokens: int) -> list[dict[str, Any]]:
    """A row for each count of experts, or of pairs that may take the twin."""
    moe = ffn_config(read_config(Path(model_path(model))))
    if moe is None:
        sys.exit(f"error: {model} has no experts in its FFNs")
    is_twin, K = moe.routing == "twin", moe.num_experts_per_tok
    rows = []
    for count in range(0 if is_twin else 1, K + 1):
        how: dict[str, Any] = {"twins": count / K} if is_twin else {"top_k": count}
        result = evaluate(model, data, max_tokens=tokens, seq_len=512, **how)["model"]
        rows.append({
            "model": Path(model).name, "data": data, "kind": "twins" if is_twin else "top_k", "share": count / K, **how,
            "nats_per_token": result.nats_per_token, "perplexity": result.perplexity,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--data", nargs="+", default=["python-docs"])
    parser.add_argument("--tokens", type=positive, default=4096)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    try:
        curves = [curve(model, data, args.tokens) for model in args.models for data in args.data]
    except UserError as error:
        sys.exit(f"error: {error}")
    for rows in curves:
        first = rows[0]
        what = "share of twins" if first["kind"] == "twins" else "experts per token"
        table = [[f"{row[row['kind']]:.3g}", f"{row['perplexity']:.2f}"] for row in rows]
        print_table(f"{first['model']}, {first['data']}", [what, "perplexity"], table)
    rows = [row for rows in curves for row in rows]
    write_json(args.json, {**provenance(torch.device("cpu")), "tokens": args.tokens, "rows": rows})
    if args.picture:
        draw(args.picture, curves)


def draw(path: Path, curves: list[list[dict[str, Any]]]) -> None:
    """A plot for flat routing and one for twins, in perplexity over that of the model as it was made."""
    names = {
        "top_k": "experts per token, as a share of its own",
        "twins": "share of pairs that may take the twin",
    }
    kinds = [kind for kind in names if any(rows[0]["kind"] == kind for rows in curves)]
    with figure(path, len(kinds)) as plots:
        for kind, plot in zip(kinds, plots, strict=True):
            for rows in (rows for rows in curves if rows[0]["kind"] == kind):
                ratio = [row["perplexity"] / rows[-1]["perplexity"] for row in rows]
                plot.plot([row["share"] for row in rows], ratio, "o-", label=f"{rows[0]['model']}, {rows[0]['data']}")
            plot.set(xlabel=names[kind], ylabel="perplexity over that with all", yscale="log")


if __name__ == "__main__":
    main()
