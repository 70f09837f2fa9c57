"""Run: uv run benchmarks/ablate.py [--quick] [--only NAME ...] [--seeds N ...] [--json FILE] [--picture FILE]

What matters when a sliced SmolLM2 learns a new text: experts, routing, balancing, noise, shares, what trains. Every
variant is a run of the trainer (torchtitan, one rank) on this Python's C headers; held-out headers say what it
learned, news and the Python docs, which none trains on, what it forgot. Same text, tokens and steps for all. The
committed results have seed 0 of every variant, and of three (8 pairs with noise 0.05, 0.02 and 0) seeds 1 and 2 as
well; what is shown is the mean.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # runs where lamella is not installed, too

from adaptation import NEW, OLD, REPLAYED, Variant, measure, mixed, options, parse, picture
from measure import print_table

FLAT = {"routing": "flat"}
VARIANTS: dict[str, Variant] = {
    "dense, all": Variant("dense", None, {"trains": "all", "lr": 1e-4}),
    "twin, 8 pairs": Variant("twin"),
    "4 pairs": Variant("experts", {"slices": 4}),
    "16 pairs": Variant("experts", {"slices": 16}),
    "32 pairs": Variant("experts", {"slices": 32}),
    "noise 0": Variant("noise", {"noise": 0.0}),
    "noise 0.02": Variant("noise", {"noise": 0.02}),
    "noise 0.2": Variant("noise", {"noise": 0.2}),
    "flat, bias": Variant("flat", FLAT, {"balancing": "bias"}),
    "flat, quantile": Variant("flat", FLAT, {"balancing": "quantile"}),
    "flat, aux": Variant("flat", FLAT, {"balancing": "aux"}),
    "flat, none": Variant("flat", FLAT, {"balancing": "none"}),
    "flat, top-k 16 to 8": Variant("flat", FLAT, {"top_k_schedule": {"start": 16, "ramp_steps": "half"}}),
    "share 0.5": Variant("share", {}, {"twin_share": {"target": 0.5}}),
    "share 0 to 0.5": Variant("share", {}, {"twin_share": {"target": 0.5, "ramp_steps": "half"}}),
    "share 0.5 to 1": Variant("share", {}, {"twin_share": {"start": 0.5, "target": 1.0, "ramp_steps": "half"}}),
    "experts alone": Variant("trains", {}, {"trains": "experts"}),
    "everything": Variant("trains", {}, {"trains": "all", "rest_lr_scale": 0.3}),
    "with LoRA": Variant("trains", {}, {"lora": {"rank": 8, "alpha": 16}}),
    "distilled": Variant("objective", {}, {"objective": "distil"}),
    "replay": Variant("replay", {}, mixed(0.25)),
    "replay, routing loss": Variant(
        "replay", {}, mixed(0.25, routing_loss={"coefficient": 0.1, "to_slices": [REPLAYED], "to_twins": [NEW]})
    ),
}
NOISE = 0.05
"""On the copies of all variants that do not vary it."""
FAR_OFF = 0.1
"""Nats of the new text above the median."""
QUICK = ("twin, 8 pairs", "flat, quantile", "replay, routing loss")


def noisy(variant: Variant) -> Variant:
    return variant if variant.conversion is None else replace(variant, conversion={"noise": NOISE} | variant.conversion)


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a variant, over its seeds."""

    def of(rows: list[dict[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {
            key: None if any(row[key] is None for row in rows) else mean(row[key] for row in rows)
            for key in ("new_start", "new_end", "twin_share", "max_vio", "tokens_per_s")
        }
        old_end = {name: mean(row["old_end"][name] for row in rows) for name in rows[0]["old_end"]}
        return rows[0] | values | {"old_end": old_end}

    names = dict.fromkeys(row["variant"] for row in rows)
    return [of([row for row in rows if row["variant"] == name]) for name in names]


def show(report: dict[str, Any]) -> None:
    def text(value: float | None, digits: int = 3) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    table = [
        [
            row["variant"], f"{text(row['new_start'])} -> {text(row['new_end'])}",
            *(f"{text(report['old_start'][name])} -> {text(row['old_end'][name])}" for name in OLD),
            text(row["twin_share"], 2), text(row["max_vio"], 2), text(row["tokens_per_s"], 0),
        ]
        for row in report["rows"]
    ]  # fmt: skip
    header = ["variant", NEW, *OLD, "twin share", "MaxVio", "tokens/s"]
    tokens = report["steps"] * 2 * report["seq_len"]
    print_table(f"nats per held-out token, {report['steps']} steps, {tokens} tokens", header, table)


def draw(report: dict[str, Any], path: Path) -> None:
    """A colour for each axis. What learned far less than the rest is left out, and counted in the title."""
    axes = list(dict.fromkeys(row["axis"] for row in report["rows"]))
    highest = median(row["new_end"] for row in report["rows"]) + FAR_OFF
    rows = [row for row in report["rows"] if row["new_end"] <= highest]
    left_out = len(report["rows"]) - len(rows)
    beyond = f" ({left_out} above {highest:.1f} not shown)" if left_out else ""
    titles = [(name, f"learned, and remembered of {name}{beyond}") for name in OLD]
    with picture(path, report["old_start"], titles) as plots:
        for plot, name in zip(plots, OLD, strict=True):
            for row in rows:
                colour = f"C{axes.index(row['axis'])}"
                place = (row["old_end"][name], row["new_end"])
                plot.scatter(*place, color=colour, s=30)
                plot.annotate(row["variant"], place, (4, 3), textcoords="offset points", fontsize=8, color=colour)


def main() -> None:
    parser = options(__doc__)
    parser.set_defaults(steps=30)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=VARIANTS, default=list(VARIANTS))
    args = parse(parser, "ablate", {"only": list(QUICK)})
    named = [(name, seed) for seed in args.seeds for name in args.only]
    runs = [
        ({"variant": name, "axis": VARIANTS[name].axis, "seed": seed}, noisy(VARIANTS[name])) for name, seed in named
    ]
    measured = measure(args, runs)
    report = measured | {"rows": means(measured["rows"])}
    show(report)
    if args.picture:
        draw(report, args.picture)


if __name__ == "__main__":
    main()
