"""What is desired against what is observed: starts what is next, looks after what runs, and settles what has ended.

A scheduler keeps nothing that the store and the run folders do not: killed at any point, another one goes on from
there. Several may share a store. Imports no torch.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from pathlib import Path

from lamella.errors import UserError
from lamella.jsons import Json
from lamella.run.launch import check_stages
from lamella.service import progress, queue
from lamella.service.database import Unavailable
from lamella.service.executors import EXECUTORS
from lamella.service.executors.executor import Executor, Place, Seen, submission_of
from lamella.service.jobs import RECIPE, TrainJob
from lamella.service.progress import Ending
from lamella.service.states import State
from lamella.service.store import Attempt, Run, Store

log = logging.getLogger("lamella.service")
TICK_S = 1.0
PROGRESS_S = 2.0
"""A run's folder is read this often."""
START_S = 20.0
"""An attempt that nobody has taken after so long is started again."""
STOP_S, KEEP_S = 120.0, 900.0
"""How long processes may take to end after they were asked to, where the run is cancelled, and where it is to go on."""
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 300.0
ATTEMPTS_WITHOUT_PROGRESS = 3
"""So many attempts may end without a new checkpoint, before the run counts as failed."""


class Scheduler:
    """Looks after the runs of this host.

    Args:
        backoff_s: the wait before the second attempt; each further one without progress doubles it.
    """

    def __init__(self, store: Store, place: Place, backoff_s: float = FIRST_BACKOFF_S, host: str | None = None):
        self.store, self.place, self.backoff_s = store, place, backoff_s
        self.host = host or socket.gethostname()
        self.executors: dict[str, Executor] = {name: make(place) for name, make in EXECUTORS.items()}
        self.ticked = 0.0
        """When it last looked at everything."""
        self.problem = ""
        self._looked: dict[str, float] = {}
        """When the folder of a run was last read."""
        self._wake = threading.Event()
        self._stop = threading.Event()

    def run(self) -> None:
        """Look and act until `stop`; what goes wrong with one run is logged, and nothing ends the others."""
        while not self._stop.is_set():
            try:
                self.tick()
                self.problem = ""
            except Unavailable as error:
                self.problem = str(error)
                log.warning("%s", error)
            except Exception as error:  # a scheduler that ended would leave all runs alone; /readyz tells
                self.problem = f"{type(error).__name__}: {error}"
                log.exception("the scheduler's look failed; it looks again")
            self._wake.wait(TICK_S)
            self._wake.clear()

    def wake(self) -> None:
        """Look now: something was submitted or wished."""
        self._wake.set()

    def stop(self) -> None:
        """End `run` after the present look."""
        self._stop.set()
        self._wake.set()

    def tick(self) -> None:
        """Look at every run once."""
        for run in queue.in_state(self.store, "validating"):
            self._guarded(self._validate, run)
        for run in queue.in_state(self.store, "preempted"):
            if run.not_before <= time.time():
                self.store.move(run, "queued", "queued")
        for run, attempt in queue.active(self.store, self.host):
            self._guarded(self._attend, run, attempt)
        for name in (
            queue.awaited(self.store) & self.executors.keys()
        ):  # only they need a transaction that others wait for
            while (taken := queue.claim(self.store, self.host, self.place.capacity, name)) is not None:
                self._guarded(self._start, *taken)
        self.ticked = time.time()

    def _guarded(self, act: object, run: Run, *more: Attempt) -> None:
        try:
            assert callable(act)
            act(run, *more)
        except Unavailable:
            raise
        except Exception:  # of one run: the others go on, and this one is looked at again
            log.exception("run %s", run.id)

    # -- before ------------------------------------------------------------------------------------------------------

    def _validate(self, run: Run) -> None:
        """All that can be known before an attempt, the state of the folders included."""
        submission = submission_of(run)
        try:
            submission.check()
            if run.executor == "local":
                submission.needs(self.place.capacity)
                self._check_folders(run)
        except UserError as error:
            ended = {"failure": "user_config", "reason": str(error), "ended": time.time()}
            self.store.move(run, "failed", "refused", {"reason": str(error)}, **ended)
            return
        self.store.move(run, "queued", "queued")

    def _check_folders(self, run: Run) -> None:
        submission = submission_of(run)
        if not isinstance(submission.job, TrainJob):
            return
        folder = self.place.folder(run.id)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in submission.job.files().items():
            (folder / name).write_text(content)
        check_stages([str(folder / RECIPE)], submission.ranks(self.place.capacity))

    # -- an attempt --------------------------------------------------------------------------------------------------

    def _start(self, run: Run, attempt: Attempt) -> None:
        if attempt.number == 1:
            for stage in progress.run_dirs(submission_of(run)):  # what an earlier run wrote there is not this one's
                file = stage.events_file
                if file.is_file() and not self.store.offset(run.id, str(file)):
                    self.store.take_over(run.id, str(file), 0, file.stat().st_size, [])
        try:
            handle = self.executors[run.executor].submit(run, attempt)
        except (OSError, UserError) as error:
            kind = "user_config" if isinstance(error, UserError) else "infra"
            self._end(run, attempt, Seen("ended", None, {"failure": kind, "reason": f"it cannot be started: {error}"}))
            return
        queue.change_attempt(self.store, attempt, handle=handle | {"submitted": time.time()})

    def _attend(self, run: Run, attempt: Attempt) -> None:
        if not attempt.handle:
            if time.time() - attempt.started > 2 * TICK_S:  # whoever took the run has not said that it runs
                self._start(run, attempt)
            return
        seen = self.executors[run.executor].look(run, attempt)
        submission = submission_of(run)
        runs = progress.run_dirs(submission)
        over = seen.state in ("ended", "gone")
        if over or time.monotonic() - self._looked.get(run.id, 0.0) >= PROGRESS_S:
            self._looked[run.id] = time.monotonic()
            self._take_over_events(run, [stage.events_file for stage in runs])
            self._note_progress(run, progress.progress_of(runs, run.started))
        if over:
            self._looked.pop(run.id, None)
            self._end(run, attempt, seen)
        elif run.state in ("pausing", "cancelling"):
            self._ask_to_end(run, attempt, seen)
        elif seen.state == "waiting":
            if time.time() - float(attempt.handle["submitted"]) > START_S and run.executor == "local":
                self._start(run, attempt)
        elif run.state == "starting" and progress.is_under_way(runs, attempt.started):
            self.store.move(run, "running", "running")
        elif run.state == "running" and progress.is_stale(runs, attempt.started):
            self.store.move(run, "lost", "lost", {"reason": f"no rank was heard of for {progress.STALE_S:.0f} s"})
        elif run.state == "lost" and not progress.is_stale(runs, attempt.started):
            self.store.move(run, "running", "found")

    def _ask_to_end(self, run: Run, attempt: Attempt, seen: Seen) -> None:
        executor, now = self.executors[run.executor], time.time()
        patience = STOP_S if run.state == "cancelling" else KEEP_S
        if seen.state == "waiting" and run.executor == "local":
            return  # its process comes, or `_start` sees that it does not
        if attempt.signalled is None:
            executor.ask(run, attempt, "stop")
            queue.change_attempt(self.store, attempt, signalled=now)
        elif now - attempt.signalled > patience:
            executor.ask(run, attempt, "kill")

    def _take_over_events(self, run: Run, files: list[Path]) -> None:
        for file in files:
            old = self.store.offset(run.id, str(file))
            lines, new = progress.new_events(file, old)
            if new != old:
                self.store.take_over(run.id, str(file), old, new, lines)

    def _note_progress(self, run: Run, values: Json) -> None:
        if values and run.progress != values:
            self.store.progress(run.id, values)

    # -- after -------------------------------------------------------------------------------------------------------

    def _end(self, run: Run, attempt: Attempt, seen: Seen) -> None:
        if seen.state == "gone":  # ranks may be dying still; the next attempt must be alone
            self.executors[run.executor].ask(run, attempt, "kill")
        submission = submission_of(run)
        ending = progress.ending_of(submission, seen)
        runs = progress.run_dirs(submission)
        saves = int(progress.progress_of(runs, None).get("saves", 0))
        fruitless = 0 if saves > attempt.saves else run.fruitless + 1
        fruitless = max(fruitless, progress.num_faults_in_a_row(runs)) if fruitless else 0
        queue.change_attempt(
            self.store, attempt, ended=time.time(), code=seen.code, failure=ending.failure, reason=ending.reason
        )
        to = next_state(run, ending, fruitless)
        values: dict[str, object] = {"failure": ending.failure, "reason": ending.reason, "fruitless": fruitless}
        if to in ("queued", "preempted"):
            values["not_before"] = time.time() + self._backoff(ending, fruitless)
        elif to == "paused":
            values |= {"failure": None, "reason": ""}
        else:
            values["ended"] = time.time()
        data = {"attempt": attempt.number, "code": seen.code, "failure": ending.failure, "reason": ending.reason}
        self.store.move(run, to, "retry" if to == "queued" else to, data, **values)

    def _backoff(self, ending: Ending, fruitless: int) -> float:
        if ending.failure == "preempted" and fruitless <= 1:
            return 0.0
        return min(LONGEST_BACKOFF_S, self.backoff_s * 2 ** max(0, fruitless - 1))


def next_state(run: Run, ending: Ending, fruitless: int) -> State:
    """What becomes of a run whose attempt has ended."""
    if ending.failure is None:
        return "succeeded"
    if run.desired == "cancelled":
        return "cancelled"
    if not ending.retryable:
        return "failed"
    if run.desired == "paused":
        return "paused"
    if fruitless > ATTEMPTS_WITHOUT_PROGRESS:
        return "failed"
    return "preempted" if ending.failure == "preempted" else "queued"
