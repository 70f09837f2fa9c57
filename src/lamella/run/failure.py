"""Why a rank failed: classes of failures, and the one among many ranks' reports that is the cause. Imports no torch.

Each failing rank writes log/failure-rank-R.json. A rank that lost a peer or waited too long for one looks round for
the others' reports: whoever is silent hangs, or is gone.
"""

from __future__ import annotations

import errno
import json
import os
import re
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from lamella.errors import BadData, UserError
from lamella.jsons import Json
from lamella.run.folder import RunDir, write_atomic
from lamella.run.heartbeat import place_of, read_beats

FailureClass = Literal["user_config", "data", "oom", "numerics", "infra", "preempted", "timeout", "storage"]
RETRYABLE = frozenset({"infra", "preempted", "timeout", "storage"})
STORAGE_ERRNO = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE}
)
# The same input fails in the same way again: mistakes in settings or in code.
DETERMINISTIC = (ValueError, TypeError, AssertionError, LookupError, AttributeError, NotImplementedError, ImportError)
TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)
# The last words of a process that torch's watchdog of NCCL aborts.
WATCHDOG = b"Watchdog caught collective operation timeout"
LAST_BYTES = 1 << 20
PEER_LOST = re.compile(r"connection (closed|reset)|closed by peer|broken pipe|remote (process|peer)", re.IGNORECASE)
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory", re.IGNORECASE)
ATTEMPT = "LAMELLA_ATTEMPT"
# Where a command writes the class of its failure, for whoever started it.
FAILURE_FILE = "LAMELLA_FAILURE_FILE"
# How long a rank waits for the others' words: timeouts begin when each rank enters the collective, a lost connection
# shows everywhere at once.
ROLL_CALL_S = {"timeout": 5.0, "infra": 2.0}


class Fault(RuntimeError):
    """A failure whose class is known where it is found."""

    def __init__(self, kind: FailureClass, message: str, retryable: bool | None = None):
        super().__init__(message)
        self.kind: FailureClass = kind
        self.retryable = kind in RETRYABLE if retryable is None else retryable


def classify(error: BaseException) -> FailureClass:
    """Return the class of an exception: by its type where the type tells, else by its message.

    This module does not import torch, so torch's own errors are recognised by the names of their classes.
    """
    name, text = type(error).__name__, str(error)
    if isinstance(error, Fault):
        return error.kind
    if name == "CheckpointException":  # torch's, of a save or load; BaseException by rank
        return classify(next(iter(error.failures.values()))[0])  # type: ignore[attr-defined]
    if isinstance(error, BadData):
        return "data"
    if isinstance(error, UserError):
        return "user_config"
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or OUT_OF_MEMORY.search(text):
        return "oom"
    if isinstance(error, OSError) and error.errno in STORAGE_ERRNO:
        return "storage"
    if isinstance(error, DETERMINISTIC):
        return "user_config"
    if "is not finite" in text:  # torchtitan's own check of the loss
        return "numerics"
    return "timeout" if TIMED_OUT.search(text) else "infra"


def is_retryable(error: BaseException) -> bool:
    """Whether another attempt may succeed."""
    return error.retryable if isinstance(error, Fault) else classify(error) in RETRYABLE


def reason_of(error: BaseException) -> str:
    """Return what went wrong in one line; of a failed save or load it is the first rank's own error, where torch's
    message holds the tracebacks of all ranks."""
    if type(error).__name__ == "CheckpointException":
        rank, (inner, _) = next(iter(error.failures.items()))  # type: ignore[attr-defined]
        return f"saving or loading failed on rank {rank}: {reason_of(inner)}"
    said = "".join(traceback.format_exception_only(error)).strip()
    return str(error) if isinstance(error, Fault | UserError) else said


@contextmanager
def reported() -> Iterator[None]:
    """Write the failure of a command to the file that the environment names, if it names one."""
    try:
        yield
    except Exception as error:
        tell(classify(error), is_retryable(error), reason_of(error))
        raise


def tell(kind: FailureClass, retryable: bool, reason: str) -> None:
    """Write why a command fails to the file that the environment names, if it names one."""
    if file := os.environ.get(FAILURE_FILE):
        values: Json = {"failure": kind, "retryable": retryable, "reason": reason, "time": time.time()}
        with suppress(OSError):
            write_atomic(Path(file), json.dumps(values) + "\n")


def failure_file(run: RunDir, rank: int) -> Path:
    """The file in which a rank says why it failed."""
    return run.log / f"failure-rank-{rank}.json"


def forget(run: RunDir, rank: int | None = None) -> None:
    """Remove the reports (or one) of an earlier attempt."""
    for file in run.log.glob("failure-rank-*.json") if rank is None else [failure_file(run, rank)]:
        file.unlink(missing_ok=True)


def report(run: RunDir, error: BaseException, rank: int, world_size: int, step: int) -> Json:
    """Write this rank's report, and return the report of the failure that, as far as this rank can know, came first.

    A rank that lost a peer, or waited too long for one, first gives the others ROLL_CALL_S seconds to report; those
    that stay silent are then named in its own report.
    """
    kind = classify(error)
    # Such a failure follows from another rank's: somebody else's report says what really happened.
    follows = kind == "timeout" or bool(PEER_LOST.search(str(error)))
    values: Json = {
        "time": time.time(), "rank": rank, "step": step, "failure": kind, "retryable": is_retryable(error),
        "reason": reason_of(error), "follows": follows,
    }  # fmt: skip
    write_atomic(failure_file(run, rank), json.dumps(values) + "\n")
    if follows and (silent := _roll_call(run, world_size, ROLL_CALL_S.get(kind, 0.0))):
        who = f"rank {silent[0]}" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))}"
        who += place_of(run, silent[0]) if len(silent) == 1 else ""
        what = "did not arrive in time" if kind == "timeout" else "died without a word (killed, or the machine is lost)"
        values |= {"reason": f"{who} {what}; here: {values['reason'].splitlines()[0]}", "silent": silent}
        write_atomic(failure_file(run, rank), json.dumps(values) + "\n")
    return cause(run) or values


def _roll_call(run: RunDir, world_size: int, seconds: float) -> list[int]:
    """Return the ranks that have written no report within so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        silent = [rank for rank in range(world_size) if not failure_file(run, rank).is_file()]
        if not silent or time.monotonic() > deadline:
            return silent
        time.sleep(0.2)


def watchdog_spoke(run: RunDir) -> bool:
    """Whether a rank's log of this attempt says that a collective of NCCL took longer than its timeout."""
    for beat in read_beats(run):
        with suppress(OSError), run.log_file(beat.rank).open("rb") as log:
            log.seek(max(beat.log_bytes, os.fstat(log.fileno()).st_size - LAST_BYTES))
            if WATCHDOG in log.read():
                return True
    return False


def cause(run: RunDir) -> Json | None:
    """Return the report that explains the others, or None where no rank has written one.

    That is the earliest report of a failure that was a rank's own. Where every rank only waited for another or lost its
    connection to one ("follows"), it is a report that names the silent ranks, else the earliest.
    """
    reports = []
    for file in run.log.glob("failure-rank-*.json"):
        reports.append(json.loads(file.read_text()))
    return min(reports, key=lambda r: (r["follows"], "silent" not in r, r["time"]), default=None)


def attempt_number() -> int:
    """Return how often the supervisor had started this run before: 0 in the first attempt."""
    return int(os.environ.get(ATTEMPT, "0"))
