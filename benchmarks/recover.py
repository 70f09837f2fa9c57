"""Run: uv run benchmarks/recover.py [--quick] [--methods NAME ...] [--active N ...] [--json FILE] [--picture FILE]

Loss recovered by training after conversion to experts that use fewer neurons per token (`benchmarks/quality.py` has the
perplexity before), beside a dense control whose FFNs train on the same text, tokens and steps: the Python docs, with
held-out docs as the measure. Recovered: the part of the loss between start and trained control that is gone.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # runs where lamella is not installed, too

from adaptation import DENSE, Variant, measure, options, parse
from measure import figure, positive, print_table
from quality import PARTITIONED, SEQUENTIAL

PARTS = 16
DOCS = {"data": ["python-docs"], "heldout_data": ["python-docs"]}
METHODS = (*SEQUENTIAL, "residual split", "cmoe")


def variant(method: str, active: int, calibration_tokens: int) -> Variant:
    calibration = {"num_tokens": calibration_tokens}
    axes = {"method": "partition", "parts": PARTS, "active": active, "calibration": calibration}
    axes["sequential"] = method in SEQUENTIAL
    return Variant(method, axes | {"balance": None} | PARTITIONED[method], DOCS)


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds: {"method", "active", "start", "end", "recovered"}; the dense control first."""

    def values(key: str, method: str, active: float) -> float:
        return mean(row[key] for row in rows if (row["method"], row["active"]) == (method, active))

    lines = []
    control = values("new_end", "dense", 1.0)
    for method, active in dict.fromkeys((row["method"], row["active"]) for row in rows):
        start, end = values("new_start", method, active), values("new_end", method, active)
        recovered = None if method == "dense" else (start - end) / (start - control)
        lines.append({"method": method, "active": active, "start": start, "end": end, "recovered": recovered})
    return lines


def show(report: dict[str, Any]) -> None:
    lines = [
        [
            line["method"], f"{line['active']:.0%}", f"{line['start']:.3f}", f"{line['end']:.3f}",
            "-" if line["recovered"] is None else f"{line['recovered']:.0%}",
        ]
        for line in table(report["rows"])
    ]  # fmt: skip
    tokens = report["steps"] * 2 * report["seq_len"]
    title = f"nats per held-out token, {report['steps']} steps, {tokens} tokens of training"
    print_table(title, ["method", "active", "converted", "trained", "recovered"], lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """A line per method and share, from the start to the end of its training; the control is dashed."""
    with figure(path, 1) as (plot,):
        for line in table(report["rows"]):
            label = line["method"] if line["recovered"] is None else f"{line['method']}, {line['active']:.0%}"
            style = "k--o" if line["recovered"] is None else "o-"
            plot.plot([0, report["steps"]], [line["start"], line["end"]], style, label=label)
        plot.set(xlabel="steps", ylabel="held-out Python docs (nats per token)", xticks=[0, report["steps"]])


def main() -> None:
    parser = options(__doc__)
    parser.set_defaults(heal_steps=0)
    parser.add_argument("--methods", nargs="+", metavar="NAME", choices=PARTITIONED, default=list(METHODS))
    parser.add_argument("--active", nargs="+", type=int, choices=range(1, PARTS + 1), default=[8, 4], metavar="N")
    parser.add_argument("--calibration-tokens", type=positive, default=8192)
    args = parse(parser, "recover", {"methods": ["random"], "active": [8], "calibration_tokens": 1024, "heal_steps": 0})
    runs = []
    for seed in args.seeds:
        runs.append(({"method": "dense", "active": 1.0, "seed": seed}, replace(DENSE, recipe=DENSE.recipe | DOCS)))
        for active in args.active:
            for method in args.methods:
                identity = {"method": method, "active": active / PARTS, "seed": seed}
                runs.append((identity, variant(method, active, args.calibration_tokens)))
    report = measure(args, runs, old=())
    show(report)
    if args.picture:
        draw(report, args.picture)


if __name__ == "__main__":
    main()
