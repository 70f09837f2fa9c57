"""What the rows of quality.py's JSON file say: tables, and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from measure import figure, print_table
from texts import SEEN, UNSEEN

DOMAINS = (*SEEN, *UNSEEN)
OURS = "coadapted"
DEFAULT = "default"
PRUNED = ("static", "flap", "static, refit", "flap, refit")
ORACLE = f"{OURS}, oracle router"
Row = dict[str, Any]


def is_of(row: Row, calibration: str, healed: int = 0) -> bool:
    return (row["calibration"], row["healed"]) == (calibration, healed)


def over(domains: Iterable[str], row: Row) -> float:
    """The geometric mean of a row's ratios over these domains."""
    return statistics.geometric_mean(row["ratio"][domain] for domain in domains)


def ratios(report: dict[str, Any], method: str, active: float, calibration: str, healed: int = 0) -> list[float]:
    """Perplexity over dense on the unseen domains, one for each seed."""
    rows = [row for row in report["rows"] if (row["method"], row["active"]) == (method, active)]
    return [over(UNSEEN, row) for row in rows if is_of(row, calibration, healed)]


def draw(report: dict[str, Any], calibration: str, path: Path) -> None:
    """Perplexity over dense by the share of active neurons: every method on the unseen domains, mean and range of the
    seeds; and the default on each domain, as converted and, where that was measured, healed on the most tokens."""
    import matplotlib

    actives = sorted({row["active"] for row in report["rows"]})
    of_default = [row for row in report["rows"] if (row["method"], row["calibration"]) == (DEFAULT, calibration)]
    most = {
        active: max((row["healed"] for row in of_default if row["active"] == active), default=0) for active in actives
    }
    panels = {
        DEFAULT: [row for row in of_default if not row["healed"]],
        f"{DEFAULT}, healed": [row for row in of_default if row["healed"] and row["healed"] == most[row["active"]]],
    }
    panels = {title: rows for title, rows in panels.items() if rows}
    with figure(path, 1 + len(panels)) as (methods, *by_domain):
        for i, method in enumerate(in_order(report, calibration)):
            found = {active: ratios(report, method, active, calibration) for active in actives}
            found = {active: of for active, of in found.items() if of}
            style = "--" if method in PRUNED else ":" if method == ORACLE else "-"
            means, colour = [statistics.geometric_mean(f) for f in found.values()], matplotlib.colormaps["tab20"](i)
            colour, width = ("black", 3) if method == DEFAULT else (colour, 1.5)
            methods.plot([*found], means, f"o{style}", color=colour, label=method, linewidth=width)
            methods.vlines([*found], [min(f) for f in found.values()], [max(f) for f in found.values()], color=colour)
        methods.set(title="unseen domains", ylabel="perplexity over dense")
        for plot, (title, rows) in zip(by_domain, panels.items(), strict=True):
            draw_domains(plot, rows)
            plot.set(title=f"{title}, by domain")
        for plot in (methods, *by_domain):
            plot.set(xlabel="active neurons", yscale="log", xticks=actives)
            plot.xaxis.set_major_formatter("{x:.0%}")
            plot.yaxis.set_major_formatter("{x:g}")
            plot.yaxis.set_minor_formatter("{x:g}")


def draw_domains(plot: Any, rows: list[Row]) -> None:
    """A line for each domain over the shares of active neurons; the unseen ones are thick."""
    for domain in DOMAINS:
        means = [
            (active, statistics.geometric_mean(row["ratio"][domain] for row in rows if row["active"] == active))
            for active in sorted({row["active"] for row in rows})
        ]
        line, width, label = ("o-", 3, f"{domain} (unseen)") if domain in UNSEEN else ("s--", 1.5, domain)
        plot.plot(*zip(*means, strict=True), line, label=label, linewidth=width)


def in_order(report: dict[str, Any], calibration: str, healed: int = 0) -> list[str]:
    """The methods with this calibration, the worst at the smallest share first."""
    rows = [row for row in report["rows"] if is_of(row, calibration, healed)]
    least = min(row["active"] for row in rows)
    names = dict.fromkeys(row["method"] for row in rows)
    return sorted(names, key=lambda name: -statistics.mean(ratios(report, name, least, calibration, healed) or [0]))


def show(report: dict[str, Any], calibration: str, healed: int = 0) -> None:
    """For every share of active neurons and every method: the unseen domains' mean, then each domain."""
    mine = [row for row in report["rows"] if is_of(row, calibration, healed)]
    table = []
    for active in sorted({row["active"] for row in mine}, reverse=True):
        for name in in_order(report, calibration, healed):
            rows = [row for row in mine if (row["method"], row["active"]) == (name, active)]
            if rows:
                domains = [statistics.geometric_mean(row["ratio"][domain] for row in rows) for domain in DOMAINS]
                found = [over(UNSEEN, row) for row in rows]
                spread = f" ({min(found):.3f}-{max(found):.3f})" if len(found) > 1 else ""
                mean = f"{statistics.geometric_mean(found):.3f}{spread}"
                loads = [row["max_vio"] for row in rows if row["max_vio"] is not None]
                balance = f"{statistics.mean(loads):.2f}" if loads else "-"
                table.append([f"{active:.0%} {name}", mean, *(f"{ratio:.2f}" for ratio in domains), balance])
    dense = ", ".join(f"{domain} {value:.2f}" for domain, value in report["dense_perplexity"].items())
    title = (
        f"perplexity over dense ({dense}); {report['tokens']} held-out tokens of each domain, "
        f"{report['calibration_tokens']} calibration tokens of {calibration}"
        + (f", healed on {healed} more" if healed else "")
    )
    print_table(title, ["active, method", "unseen", *DOMAINS, "MaxVio"], table)
