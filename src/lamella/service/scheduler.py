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
from lamella.service.executors.executor import Executor, Place, Seen, Unreachable, submission_of
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
LONGEST_HOST = 255
AT_WORK_S = 10.0
"""A host says this often that its scheduler is at work."""
HERE = "local"
SHARE_FILES = (HERE, "slurm")
"""Executors whose run directories are seen from here."""


class Scheduler:
    """Looks after the runs of this host.

    Args:
        backoff_s: the wait before the second attempt; each further one without progress doubles it.
    """

    def __init__(self, store: Store, place: Place, backoff_s: float = FIRST_BACKOFF_S, host: str | None = None):
        self.store, self.place, self.backoff_s = store, place, backoff_s
        self.host = (host or f"{socket.gethostname()}:{place.home}")[-LONGEST_HOST:]
        """Another home on this machine counts as another host: the processes of its runs are not seen from here."""
        self.executors: dict[str, Executor] = {name: make(place) for name, make in EXECUTORS.items()}
        self.ticked = 0.0
        """When it last looked at everything."""
        self.problem = ""
        self._looked: dict[str, float] = {}
        """When the folder of a run was last read."""
        self._unheard: dict[str, float] = {}
        """Since when whatever runs a run has not answered."""
        self._said = -AT_WORK_S
        self._threads: dict[str, threading.Thread] = {}
        """Those at work on runs of the executors that may take long to answer."""
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
        """Look at every run once; at those on clusters in threads, which may still be at it when this returns."""
        if time.monotonic() - self._said >= AT_WORK_S:
            self._said = time.monotonic()
            queue.at_work(self.store, self.host)
            self._look_elsewhere()
        for run in queue.in_state(self.store, "validating"):
            self._guarded(self._validate, run)
        for run in queue.in_state(self.store, "preempted"):
            if run.not_before <= time.time():
                self.store.move(run, "queued", "queued")
        mine = queue.active(self.store, self.host)
        awaited = queue.awaited(self.store) & self.executors.keys()  # only they need a transaction that others wait for
        for name in sorted({run.executor for run, _ in mine} | awaited, key=lambda name: name == HERE):
            pairs = [pair for pair in mine if pair[0].executor == name]
            if name == HERE:
                self._look_after(name, pairs, name in awaited)
            elif name not in self._threads or not self._threads[name].is_alive():
                work = (name, pairs, name in awaited)
                self._threads[name] = threading.Thread(target=self._look_after, args=work, name=name, daemon=True)
                self._threads[name].start()
        self.ticked = time.time()

    def _look_after(self, name: str, pairs: list[tuple[Run, Attempt]], is_awaited: bool) -> None:
        try:
            for run, attempt in pairs:
                self._guarded(self._attend, run, attempt)
            while is_awaited and (taken := queue.claim(self.store, self.host, self.place.capacity, name)) is not None:
                self._guarded(self._start, *taken)
        except Unavailable as error:
            if name == HERE:
                raise
            log.warning("%s", error)

    def _look_elsewhere(self) -> None:
        """Runs of hosts that are silent: whatever runs on a cluster is looked after from here on; of what runs on the
        host itself nobody knows. And what was ended by others while this host was silent is ended here."""
        for run, attempt in queue.of_silent_hosts(self.store, self.host, progress.STALE_S):
            of_older_version = attempt.host == socket.gethostname() and self.place.folder(run.id).is_dir()
            if run.executor != HERE or of_older_version:  # which did not name the home
                if queue.adopt(self.store, attempt, self.host):
                    self.store.note(run.id, "adopted", {"by": self.host, "of": attempt.host})
                continue
            reason = f"the service on {attempt.host} is not heard of; what it had started may run there still"
            if run.state == "cancelling":
                self.store.move(run, "cancelled", "cancelled", {"reason": reason}, reason=reason, ended=time.time())
            elif run.state != "lost":
                self.store.move(run, "lost", "lost", {"reason": reason}, reason=reason)
        for run, attempt in queue.left_over(self.store, self.host):
            if attempt.handle:
                self._guarded(self._end_left_over, run, attempt)

    def _end_left_over(self, run: Run, attempt: Attempt) -> None:
        self.executors[run.executor].ask(run, attempt, "kill")
        queue.change_attempt(self.store, attempt, ended=time.time(), reason="the run was ended without it")

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
        except Unreachable as error:
            log.warning("run %s: %s", run.id, error)  # it may have come through, so this attempt is handed over again
            return
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
        if seen.state == "unknown":
            self._note_silence(run, seen)
            return
        self._unheard.pop(run.id, None)
        submission = submission_of(run)
        runs = progress.run_dirs(submission)
        over = seen.state in ("ended", "gone")
        if over or time.monotonic() - self._looked.get(run.id, 0.0) >= PROGRESS_S:
            self._looked[run.id] = time.monotonic()
            self._take_over_events(run, [stage.events_file for stage in runs])
            self._note_progress(run, progress.progress_of(runs, run.started))
            try:
                self.executors[run.executor].fetch_log(run, attempt)
            except (OSError, UserError, Unreachable) as error:
                log.warning("the log of %s: %s", run.id, error)
        if over:
            self._looked.pop(run.id, None)
            self._end(run, attempt, seen)
        elif run.state in ("pausing", "cancelling"):
            self._ask_to_end(run, attempt, seen)
        elif run.state == "lost" and not progress.is_stale(runs, attempt.started):
            to: State = "pausing" if run.desired == "paused" else "running"
            self.store.move(run, to, "found", reason="")
        elif seen.state == "waiting":
            if time.time() - float(attempt.handle["submitted"]) > START_S and run.executor == "local":
                self._start(run, attempt)
        elif run.state == "starting" and progress.is_under_way(runs, attempt.started, run.executor in SHARE_FILES):
            self.store.move(run, "running", "running")
        elif run.state == "running" and progress.is_stale(runs, attempt.started):
            reason = f"no rank was heard of for {progress.STALE_S:.0f} s"
            self.store.move(run, "lost", "lost", {"reason": reason}, reason=reason)

    def _note_silence(self, run: Run, seen: Seen) -> None:
        since = self._unheard.setdefault(run.id, time.monotonic())
        if time.monotonic() - since > progress.STALE_S and run.state in ("starting", "running", "pausing"):
            reason = f"for {progress.STALE_S:.0f} s: {seen.reason}"
            self.store.move(run, "lost", "lost", {"reason": reason}, reason=reason)

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
                stage = {"stage": file.parent.name} if len(files) > 1 else {}
                self.store.take_over(run.id, str(file), old, new, [line | stage for line in lines])

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
