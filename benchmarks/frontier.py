"""Run: uv run benchmarks/frontier.py [--quick] [--seeds 0 1 2] [--json FILE] [--picture FILE]

Learning without forgetting: nats on new text (C headers) against nats on old text that is never trained on (news, the
Python docs), for dense continued pretraining of the FFNs over its learning rates and for twin routing over its own,
with and without a quarter of other old text (READMEs) replayed. "no old text" is shown nothing of the old: text that
the dense model wrote stands for it, in the fit of the router and where a quarter is replayed; "recall" is the share of
the new tokens that the router's threshold lets through to the twins. Same text, tokens and active FLOPs.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # runs where lamella is not installed, too

from adaptation import DENSE, GENERATED, NEW, OLD, REPLAYED, Variant, measure, mixed, options, parse, picture
from measure import print_table

RATES = (1e-4, 3e-4, 1e-3)
SIDES = {"to_slices": [REPLAYED], "to_twins": [NEW]}
ROUTING_LOSS = {"coefficient": 1.0} | SIDES
FIT = {"to_slices": [REPLAYED, *OLD], "to_twins": [NEW], "samples": 96}
# Copies without noise: the model starts at the dense one's loss. A router that learns is ten times as fast as the
# experts; a fitted one stays as it is, after one look at old text, also where none is replayed.
TWINS: dict[str, dict[str, Any]] = {
    "twin": {"router_lr_scale": 10.0},
    "twin, share 0.8": {"router_lr_scale": 10.0, "twin_share": {"target": 0.8}},
    "twin, routing loss": {"router_lr_scale": 10.0, "routing_loss": ROUTING_LOSS},
    "twin, fitted router": {"trains": "experts", "router_fit": FIT},
}
DENSE_NO_OLD, TWIN_NO_OLD = "dense, no old text", "twin, no old text"
RECALLS = {"": None} | {f", recall {share:g}": share for share in (0.9, 0.8, 0.7, 0.5)}
TWINS |= {
    TWIN_NO_OLD + name: {"trains": "experts", "router_fit": FIT | {"to_slices": [GENERATED], "recall": recall}}
    for name, recall in RECALLS.items()
}
KINDS = {"dense": DENSE, DENSE_NO_OLD: replace(DENSE, axis=DENSE_NO_OLD)}
KINDS |= {name: Variant(name, {"noise": 0.0}, recipe) for name, recipe in TWINS.items()}
QUICK = ("dense", "twin")


def variants(kinds: list[str], rates: list[float], shares: list[float]) -> dict[tuple[str, bool, float], Variant]:
    """(kind, with replay, rate) -> what runs; a routing loss needs the replayed text to tell it from the new."""
    made = {}
    for rate in rates:
        for kind in kinds:
            own = KINDS[kind].recipe | {"lr": rate}
            shown_none = kind.startswith((DENSE_NO_OLD, TWIN_NO_OLD))
            texts: dict[str, Any] = {"replay": GENERATED, "old": ()} if shown_none else {}
            needs_replay = "routing_loss" in own or kind == DENSE_NO_OLD
            for share in filter(None, shares) if needs_replay else shares:
                made[kind, share > 0, rate] = replace(KINDS[kind], recipe=mixed(share, **texts, **own))
    return made


Point = tuple[float, float]
"""(nats on the new text, nats on the old text)"""


def old_at(line: list[Point], new: float) -> float | None:
    """Lowest old-text nats on a line through its points where new-text nats are at most `new`; None: nowhere."""
    found = [old for there, old in line if there <= new]
    for (new_a, old_a), (new_b, old_b) in pairwise(line):
        if min(new_a, new_b) < new < max(new_a, new_b):
            found.append(old_a + (old_b - old_a) * (new - new_a) / (new_b - new_a))
    return min(found, default=None)


def points(rows: list[dict[str, Any]], kind: str, replayed: bool, text: str) -> list[Point]:
    """Means over the seeds, by ascending learning rate."""
    own = [row for row in rows if (row["kind"], row["replay"]) == (kind, replayed)]
    by_rate = [[row for row in own if row["lr"] == rate] for rate in sorted({row["lr"] for row in own})]
    return [(mean(r["new_end"] for r in rate), mean(r["old_end"][text] for r in rate)) for rate in by_rate]


def lower(dense: list[Point], line: list[Point]) -> list[tuple[float, float | None]]:
    """(new-text nats of a dense point, how much lower the line's old-text nats are there; None: not reached)."""
    return [(new, None if (there := old_at(line, new)) is None else old - there) for new, old in sorted(dense)]


def show(report: dict[str, Any]) -> None:
    rows = report["rows"]
    for text in OLD:
        table = []
        for kind, replayed in dict.fromkeys((row["kind"], row["replay"]) for row in rows):
            line, dense = (points(rows, k, replayed, text) for k in (kind, "dense"))
            gaps = [] if kind == "dense" else lower(dense, line)
            shown = ", ".join(f"{new:.3f}: {'not reached' if gap is None else f'{gap:+.3f}'}" for new, gap in gaps)
            pairs = "  ".join(f"{new:.3f}/{old:.3f}" for new, old in line)
            table.append([kind, "yes" if replayed else "no", pairs, shown or "-"])
        title = (
            f"nats, new/{text} by rate, {report['steps']} steps; {text} at the start {report['old_start'][text]:.3f}"
        )
        print_table(title, ["model", "replay", "new/old", "lower on the old text at dense's points"], table)


def draw(report: dict[str, Any], path: Path) -> None:
    """A line for each kind, through its learning rates."""
    panels = [(text, replayed) for text in OLD for replayed in (False, True)]
    titles = [(text, "with replay" if replayed else "without replay") for text, replayed in panels]
    with picture(path, report["old_start"], titles) as plots:
        for plot, (text, replayed) in zip(plots, panels, strict=True):
            kinds = dict.fromkeys(row["kind"] for row in report["rows"] if row["replay"] == replayed)
            for i, kind in enumerate(kinds):
                line = points(report["rows"], kind, replayed, text)
                plot.plot([old for _, old in line], [new for new, _ in line], "o-", color=f"C{i}", label=kind)


def main() -> None:
    parser = options(__doc__)
    parser.set_defaults(seeds=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", metavar="NAME", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--replay", nargs="+", type=float, choices=[0.0, 0.25], default=[0.25, 0.0], help="shares")
    args = parse(parser, "frontier", {"kinds": list(QUICK), "rates": [3e-4], "seeds": [0]})
    made = variants(args.kinds, args.rates, args.replay).items()
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
