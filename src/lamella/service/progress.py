"""How far a run is and how it ended, from the folders that it writes. Imports no torch.

Progress is named as Kubeflow names it: progressPercentage, estimatedRemainingSeconds, metrics.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lamella.errors import UserError
from lamella.jsons import Json
from lamella.run.failure import RETRYABLE
from lamella.run.folder import RunDir
from lamella.run.heartbeat import read_beats
from lamella.service.executors.executor import Seen
from lamella.service.jobs import Submission, TrainJob

TAIL_BYTES = 65_536
STALE_S = 120.0
"""Ranks beat once a second; after so long without a beat nobody knows how the run is."""
MOST_EVENTS = 500
PACE_LINES = 20
KILLED = -9


@dataclass(frozen=True)
class Ending:
    """How an attempt ended; all None: well."""

    failure: str | None = None
    retryable: bool = False
    reason: str = ""


def run_dirs(submission: Submission) -> list[RunDir]:
    """The run directories of a training job, one a stage; none of another job."""
    job = submission.job
    if not isinstance(job, TrainJob):
        return []
    with suppress(UserError):
        return [RunDir(Path(out)) for out in job.outs()]
    return []


def present(runs: list[RunDir]) -> RunDir | None:
    """The stage at work: the first that has not finished, or the last."""
    for run in runs:
        if _status(run)["state"] != "finished":
            return run
    return runs[-1] if runs else None


def progress_of(runs: list[RunDir], started: float | None) -> Json:
    """{"step", "steps", "progressPercentage", "estimatedRemainingSeconds", "metrics", "lastUpdatedTime", ...}; empty
    before there is anything to say."""
    run = present(runs)
    if run is None:
        return {}
    status, line = _status(run), last_line(run.metrics_file)
    if status["state"] == "none":
        return {}
    step, steps = int(status.get("step") or 0), int(status.get("steps") or 0)
    if line is not None and isinstance(line.get("step"), int):
        step = max(step, line["step"])
    stages = len(runs)
    done = (runs.index(run) + (step / steps if steps else 0.0)) / stages
    values: Json = {
        "step": step, "steps": steps, "state": status["state"], "progressPercentage": round(100 * done, 1),
        "estimatedRemainingSeconds": _remaining(run.metrics_file, step, steps), "metrics": _metrics(line),
        "lastUpdatedTime": (line or status).get("time", started), "saves": sum(_num_saves(stage) for stage in runs),
    }  # fmt: skip
    return values | ({"stage": run.path.name} if stages > 1 else {})


def _remaining(file: Path, step: int, steps: int) -> float | None:
    """Seconds, at the pace of the last steps in the file."""
    marks = [line for line in _objects(file) if isinstance(line.get("step"), int) and "time" in line][-PACE_LINES:]
    if not steps or len(marks) < 2 or marks[-1]["step"] <= marks[0]["step"]:
        return None
    pace = (marks[-1]["time"] - marks[0]["time"]) / (marks[-1]["step"] - marks[0]["step"])
    return round(max(0, steps - step) * pace, 1)


def _metrics(line: Json | None) -> Json:
    names = ("loss", "heldout_loss", "tokens_per_s", "mfu", "lr", "tokens", "peak_gib")
    return {name: line[name] for name in names if line is not None and isinstance(line.get(name), int | float)}


def is_stale(runs: list[RunDir], since: float) -> bool:
    """Whether ranks that did beat have been silent for long."""
    run = present(runs)
    beats = [] if run is None else read_beats(run)
    newest = max((beat.time for beat in beats), default=None)
    return newest is not None and time.time() - max(newest, since) > STALE_S


def ending_of(submission: Submission, seen: Seen) -> Ending:
    """Why an attempt ended as it did: the run directory knows best, then what the command said, then its exit code."""
    said = seen.failure or {}
    run = present(run_dirs(submission))
    if run is not None and not said:
        status = _status(run)
        if seen.code == 0 and status["state"] in ("finished", "stopped", "none"):  # none: in a bucket, not here
            return Ending()
        if status["state"] == "preempted":
            return Ending("preempted", True, status.get("reason") or "a signal asked to stop")
        if status["state"] == "failed" and status.get("failure") and seen.state == "ended":
            return Ending(status["failure"], bool(status.get("retryable")), status.get("reason", ""))
    elif seen.code == 0:
        return Ending()
    if said:
        kind = str(said.get("failure", "infra"))
        return Ending(kind, bool(said.get("retryable", kind in RETRYABLE)), str(said.get("reason", ""))[:2000])
    return _from_code(seen)


def _from_code(seen: Seen) -> Ending:
    if seen.state == "gone":
        return Ending("infra", True, seen.reason)
    if seen.code is None:
        return Ending("infra", True, seen.reason or "it ended without a word")
    if seen.code == KILLED:
        return Ending("infra", True, "the command was killed by SIGKILL; if it comes again, memory may have run out")
    if seen.code < 0 or seen.code > 128:
        number = -seen.code if seen.code < 0 else seen.code - 128
        return Ending("preempted", True, f"signal {number} ended the command")
    if seen.code == 2:
        return Ending("user_config", False, "the command refused its input; see the job's log")
    why = f" ({seen.reason.strip(': ')})" if seen.reason.strip(": ") else ""
    return Ending("infra", False, f"the command ended with exit code {seen.code}{why}; see the job's log")


def num_faults_in_a_row(runs: list[RunDir]) -> int:
    """Attempts that the run's own supervisor has seen fail since the last new checkpoint."""
    run, count = present(runs), 0
    for event in [] if run is None else run.events("save", "fault"):
        count = 0 if event["event"] == "save" else count + (event.get("failure") != "preempted")
    return count


def new_events(file: Path, offset: int) -> tuple[list[Json], int]:
    """(the whole lines after an offset, the offset after them); at most MOST_EVENTS."""
    lines: list[Json] = []
    try:
        with file.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size < offset:
                offset = 0  # another run has the folder now
            stream.seek(offset)
            for raw in stream:
                if not raw.endswith(b"\n") or len(lines) >= MOST_EVENTS:
                    break
                offset += len(raw)
                with suppress(ValueError, RecursionError):
                    line = json.loads(raw)
                    if isinstance(line, dict) and "event" in line and isinstance(line.get("time"), int | float):
                        lines.append(line)
    except OSError:
        return [], offset
    return lines, offset


def last_line(file: Path) -> Json | None:
    """The last whole JSON line of a file."""
    return next(iter(reversed(_objects(file))), None)


def _objects(file: Path) -> list[Json]:
    """The last whole JSON lines of a file, the oldest first."""
    found = []
    for line in _tail(file):
        with suppress(ValueError, RecursionError):
            values = json.loads(line)
            if isinstance(values, dict):
                found.append(values)
    return found


def is_under_way(runs: list[RunDir], since: float, shares_files: bool) -> bool:
    """Whether the ranks of the attempt that began then have begun to train; jobs of other kinds always have.

    Args:
        shares_files: the run directory must be seen from here; else one that is not is no sign of anything.
    """
    run = present(runs)
    if run is None or not (shares_files or run.path.exists()):
        return True
    status = _status(run)
    return status["state"] == "running" and float(status.get("time", 0)) >= since


def _tail(file: Path) -> Iterator[bytes]:
    with suppress(OSError), file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        stream.seek(max(0, size - TAIL_BYTES))
        yield from stream.read().splitlines()


def _status(run: RunDir) -> Json:
    try:
        return run.status()
    except (UserError, OSError):
        return {"state": "none", "step": 0}


def _num_saves(run: RunDir) -> int:
    return len(run.events("save"))
