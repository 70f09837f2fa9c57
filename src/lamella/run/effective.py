"""Effective training time: the share of a run's wall time whose optimizer steps are part of the result. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from lamella.jsons import Json
from lamella.run.folder import RunDir


def effective_time(run: RunDir) -> dict[str, float]:
    """{"wall_s", "effective_s", "share", "restarts"} of a run, from its events and metric lines.

    The wall time lasts from the first attempt's start to the latest event or line, waits between attempts included. A
    step counts with the time since the line (or the start of training) before it; of a step computed twice only the
    later time counts. Saving and evaluating between steps are counted as training.
    """
    events = run.events()
    starts = [e["time"] for e in events if e["event"] == "start"]
    lines = run.all_metrics()
    if not starts or not lines:
        return {"wall_s": 0.0, "effective_s": 0.0, "share": 0.0, "restarts": 0}
    effective = sum(_seconds_by_step(events, lines).values())
    wall = max(lines[-1]["time"], events[-1]["time"]) - starts[0]
    return {
        "wall_s": round(wall, 2),
        "effective_s": round(effective, 2),
        "share": round(effective / wall, 4),
        "restarts": len(starts) - 1,
    }


def _seconds_by_step(events: list[Json], lines: Iterable[Json]) -> dict[int, float]:
    """The seconds of each step that survived; a line stands for all steps since the line before it."""
    marks = [e | {"line": False} for e in events if e["event"] == "running"]
    marks += [line | {"line": True} for line in lines if line["step"] > 0]
    seconds: dict[int, float] = {}
    before: Json | None = None
    for mark in sorted(marks, key=lambda m: m["time"]):
        if not mark["line"]:  # a restart takes back the steps after its checkpoint
            seconds = {step: s for step, s in seconds.items() if step <= mark["step"]}
        elif before is not None:
            seconds[mark["step"]] = mark["time"] - before["time"]
        before = mark
    return seconds
