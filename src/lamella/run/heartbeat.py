"""Where each rank stands: a small file per rank in log/, which outlives a process that is aborted. Imports no torch.

A collective that hangs under NCCL ends in SIGABRT, without a word from Python. The files still say which rank is
behind, in which step, and where. A thread writes them, so the training thread only sets a few fields. On a GPU the
host runs ahead of the device: a marker recorded in the device's stream at the start of each phase tells how far the
device has come, and asking it waits for nothing.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import psutil

from lamella.run.folder import RunDir

Where = Literal[
    "start", "load", "data", "forward", "backward", "optimizer", "end of step", "held-out loss", "save", "ended"
]
EVERY_S = 1.0
LINE_BYTES = 512
"""A line has always the same length: it is written over the last one in one piece."""


class Marker(Protocol):
    """An event in a device's stream."""

    def query(self) -> bool:
        """Whether the device has come to it."""


class Beat(NamedTuple):
    """What a rank last wrote."""

    rank: int
    pid: int
    host: str
    step: int
    where: Where
    phase: int
    """Phases of this step that were entered; ranks enter the same ones."""
    since: float
    """When this phase was entered."""
    log_bytes: int
    """Size of the rank's log when this attempt began: it holds those before, too."""
    time: float
    """When it was written."""

    @property
    def place(self) -> str:
        """'step 14, backward'"""
        return f"step {self.step}, {self.where}"


class Heartbeat:
    """Writes this rank's file from a thread of its own, until `end`."""

    def __init__(self, run: RunDir, rank: int, every_s: float = EVERY_S):
        self.rank, self.every_s = rank, every_s
        self.mark: Callable[[], Marker] | None = None
        """Records a marker in the stream of this rank's device; None: what the host enters has begun."""
        log = run.log_file(rank)
        log_bytes = log.stat().st_size if log.is_file() else 0
        self._now = Beat(rank, os.getpid(), socket.gethostname(), 0, "start", 0, time.time(), log_bytes, 0.0)
        self._ahead: deque[tuple[Beat, Marker]] = deque()
        self._stop = threading.Event()
        self._file = os.open(beat_file(run, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._entered = self._now
        self._write()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def enter(self, where: Where, step: int) -> None:
        """The training thread begins a phase of a step."""
        phase = self._entered.phase + 1 if step == self._entered.step else 0
        self._entered = self._now._replace(step=step, where=where, phase=phase, since=time.time())
        if self.mark is None:
            self._now = self._entered
        else:
            self._ahead.append((self._entered, self.mark()))

    def end(self) -> None:
        """This rank's end, good or bad, is known by other means from here on."""
        self._stop.set()
        self._thread.join(timeout=10 * self.every_s)
        self._ahead.clear()
        self._now = self._entered._replace(where="ended", since=time.time())
        self._write()
        os.close(self._file)

    def _beat(self) -> None:
        while not self._stop.wait(self.every_s):
            # a device that has failed cannot be asked; where it stood before is what there is to know
            with suppress(RuntimeError):
                while self._ahead and self._ahead[0][1].query():
                    self._now = self._ahead.popleft()[0]._replace(since=time.time())
            self._write()

    def _write(self) -> None:
        line = json.dumps(self._now._replace(time=time.time())._asdict())
        with suppress(OSError):  # a full disk must not end the training
            os.pwrite(self._file, f"{line:<{LINE_BYTES - 1}}\n".encode(), 0)


def beat_file(run: RunDir, rank: int) -> Path:
    """The file of one rank."""
    return run.log / f"heartbeat-rank-{rank}.json"


def read_beats(run: RunDir) -> list[Beat]:
    """What the ranks of the newest attempt last wrote, by rank."""
    beats = []
    for file in run.log.glob("heartbeat-rank-*.json"):
        with suppress(OSError, ValueError, TypeError):  # being written, or of another version
            beats.append(Beat(**json.loads(file.read_text())))
    return sorted(beats)


def forget_beats(run: RunDir) -> None:
    """Remove the files of an earlier attempt."""
    for file in run.log.glob("heartbeat-rank-*.json"):
        file.unlink(missing_ok=True)


def lost_ranks(run: RunDir) -> list[int]:
    """Ranks of this machine whose processes are gone, and that had no chance to say so."""
    here = socket.gethostname()
    mine = [beat for beat in read_beats(run) if beat.host == here and beat.where != "ended"]
    return [beat.rank for beat in mine if not _is_alive(beat.pid)]


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def place_of(run: RunDir, rank: int) -> str:
    """' (step 14, backward)' of a rank, or '' where it wrote nothing."""
    return next((f" ({beat.place})" for beat in read_beats(run) if beat.rank == rank), "")


def who_hangs(run: RunDir) -> str:
    """Who is behind the others, in which step and where; '' where nobody wrote anything."""
    beats = [beat for beat in read_beats(run) if beat.where != "ended"]
    if not beats:
        return ""
    first = min(beats, key=lambda beat: (beat.step, beat.phase))
    last = max(beats, key=lambda beat: (beat.step, beat.phase))
    behind = [str(beat.rank) for beat in beats if (beat.step, beat.phase) == (first.step, first.phase)]
    seconds = max(beat.time for beat in beats) - first.since
    if len(behind) == len(beats):
        return f"all ranks hang in {first.place}, for {seconds:.0f} s"
    ranks = f"rank {behind[0]} hangs" if len(behind) == 1 else f"ranks {', '.join(behind)} hang"
    return f"{ranks} in {first.place}, for {seconds:.0f} s; the others wait in {last.place}"
