"""What every executor does: a small interface, so that the scheduler knows none of them. Imports no torch."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from lamella.jsons import Json
from lamella.service.jobs import Submission, TrainJob
from lamella.service.queue import Capacity
from lamella.service.store import Attempt, Run

Ask = Literal["stop", "kill"]
"""stop: save what can be saved, and end; kill: end."""


@dataclass(frozen=True)
class Seen:
    """What an executor sees of an attempt."""

    state: Literal["waiting", "running", "ended", "gone", "unknown"]
    """gone: nothing runs, and nothing says how it ended; unknown: whoever would know does not answer."""
    code: int | None = None
    """Of an attempt that has ended: its command's exit code, -N where signal N killed it; None: not known."""
    failure: Json | None = None
    """What the command said of its failure: {"failure", "reason"}."""
    reason: str = ""


@dataclass(frozen=True)
class Place:
    """Where the service keeps what jobs read and write."""

    home: Path
    cwd: Path
    """Paths in jobs are relative to it."""
    capacity: Capacity

    def folder(self, run_id: str) -> Path:
        """The folder of a run's own files."""
        return self.home / "jobs" / run_id

    def log(self, run_id: str) -> Path:
        """What its attempts print."""
        return self.folder(run_id) / "job.log"


class Unreachable(RuntimeError):
    """Whatever runs the jobs does not answer; it may do so later."""


class Executor(Protocol):
    """Where jobs run."""

    def render(self, run: Run, attempt: int) -> dict[str, str]:
        """Name -> content of the files that `submit` would write or hand over."""

    def submit(self, run: Run, attempt: Attempt) -> Json:
        """Start the attempt, unless it was started already; what it is known by.

        Raises:
            OSError, UserError: it cannot be started.
            Unreachable: nobody knows whether it was started.
        """

    def look(self, run: Run, attempt: Attempt) -> Seen:
        """How the attempt is."""

    def ask(self, run: Run, attempt: Attempt, what: Ask) -> None:
        """Ask it to end.

        Raises:
            UserError, Unreachable: it was not asked.
        """

    def fetch_log(self, run: Run, attempt: Attempt) -> None:
        """Add to `Place.log` what the attempt has printed since the last call, where it is not written there at once.

        Raises:
            UserError, Unreachable: nothing came.
        """


def submission_of(run: Run) -> Submission:
    """What was submitted."""
    return Submission.model_validate(run.spec)


def command_of(run: Run, place: Place, folder: Path | None = None) -> list[str]:
    """The words of the command on this machine, Python first.

    Args:
        folder: holds the job's files; None: the run's own.
    """
    submission = submission_of(run)
    words = submission.job.words(folder or place.folder(run.id), submission.ranks(place.capacity))
    if isinstance(submission.job, TrainJob) and run.cores and not run.gpus:
        words.append(f"threads_per_rank={max(1, run.cores // submission.ranks(place.capacity))}")
    return [sys.executable, "-m", "lamella.cli", *words]
