"""Run: uv run benchmarks/frontier.py [--quick] [--seeds 0 1 2] [--json FILE] [--picture FILE]

Learning without forgetting: nats on new text (C headers) against nats on old text that is never trained on (the
Python docs), for dense continued pretraining of the FFNs over its learning rates and for twin routing over its own,
with and without a quarter of other old text (READMEs) replayed. Same text, tokens and active FLOPs.

The dense side is a partition of which every expert is always active: the FFNs' own weights, trained as they are.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # runs where lamella is not installed, too

from adaptation import NEW, REPLAYED, Variant, measure, options, parse, picture, replay
from measure import print_table

RATES = (1e-4, 3e-4, 1e-3)
DENSE = {"method": "partition", "neurons": "contiguous", "parts": 8, "active": 8, "router": "zero", "output": "plain"}
# A free router: rows of std 0.1, ten times the experts' rate, no bias that holds a share.
TWIN: dict[str, Any] = {"router_init_std": 0.1, "router_lr_scale": 10.0}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": (DENSE, {"trains": "experts"}),
    "twin": ({}, TWIN),
    "twin, share 0.8": ({}, TWIN | {"twin_share": {"target": 0.8}}),
    "twin, routing loss": (
        {},
        TWIN | {"routing_loss": {"coefficient": 0.1, "to_slices": [REPLAYED], "to_twins": [NEW]}},
    ),
}
QUICK = ("dense", "twin")


def variants(kinds: list[str], rates: list[float]) -> dict[tuple[str, bool, float], Variant]:
    """(kind, with replay, rate) -> what runs; routing losses need the replayed text to tell it from the new."""
    made = {}
    for rate in rates:
        for kind in kinds:
            conversion, recipe = KINDS[kind]
            own = recipe | {"lr": rate}
            made[kind, True, rate] = Variant(kind, conversion, replay(**own))
            if "routing_loss" not in own:
                made[kind, False, rate] = Variant(kind, conversion, own)
    return made


Point = tuple[float, float]
"""(nats on the new text, nats on the old text)"""


def old_at(frontier: list[Point], new: float) -> float | None:
    """Old-text nats of a frontier where it reaches `new`, linear between its points; None where it does not reach."""
    points = sorted(frontier)
    for (new_a, old_a), (new_b, old_b) in pairwise(points):
        if new_a <= new <= new_b:
            return old_a + (old_b - old_a) * (new - new_a) / max(new_b - new_a, 1e-12)
    return None


def gaps(rows: list[dict[str, Any]], kind: str, replayed: bool) -> list[tuple[float, float | None]]:
    """(new-text nats of a dense point, how much lower the kind's old-text nats are there), means over the seeds."""
    dense, other = (_points(rows, k, replayed) for k in ("dense", kind))
    found = []
    for new, old in sorted(dense):
        there = old_at(other, new)
        found.append((new, None if there is None else old - there))
    return found


def _points(rows: list[dict[str, Any]], kind: str, replayed: bool) -> list[Point]:
    own = [row for row in rows if (row["kind"], row["replay"]) == (kind, replayed)]
    by_rate = [[row for row in own if row["lr"] == rate] for rate in sorted({row["lr"] for row in own})]
    return [(mean(row["new_end"] for row in rate), mean(row["old_end"] for row in rate)) for rate in by_rate]


def show(report: dict[str, Any]) -> None:
    rows = report["rows"]
    table = []
    for kind, replayed in dict.fromkeys((row["kind"], row["replay"]) for row in rows):
        gap = gaps(rows, kind, replayed) if kind != "dense" else []
        text = ", ".join(f"{new:.3f}: {'not reached' if g is None else f'{g:+.3f}'}" for new, g in gap)
        points = "  ".join(f"{new:.3f}/{old:.3f}" for new, old in _points(rows, kind, replayed))
        table.append([kind, "yes" if replayed else "no", points, text or "-"])
    title = f"nats, new/old by rate, {report['steps']} steps; old text at the start {report['old_start']:.3f}"
    print_table(title, ["model", "replay", "new/old", "lower on the old text at dense's points"], table)


def draw(report: dict[str, Any], path: Path) -> None:
    """A line for each kind, through its learning rates."""
    titles = ["without replay", "with replay"]
    with picture(path, report["old_start"], titles, sharey=True) as plots:
        for plot, replayed in zip(plots, (False, True), strict=True):
            kinds = dict.fromkeys(row["kind"] for row in report["rows"] if row["replay"] == replayed)
            for i, kind in enumerate(kinds):
                points = sorted(_points(report["rows"], kind, replayed))
                plot.plot([old for _, old in points], [new for new, _ in points], "o-", color=f"C{i}", label=kind)


def main() -> None:
    parser = options(__doc__)
    parser.set_defaults(seeds=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", metavar="NAME", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    args = parse(parser, "frontier", {"kinds": list(QUICK), "rates": [3e-4], "seeds": [0]})
    made = variants(args.kinds, args.rates).items()
    runs = [
        ({"kind": kind, "replay": replayed, "lr": rate, "seed": seed}, variant)
        for seed in args.seeds
        for (kind, replayed, rate), variant in made
    ]
    report = measure(args, runs)
    show(report)
    if args.picture:
        draw(report, args.picture)


if __name__ == "__main__":
    main()
