"""Attempts of a training run on this machine: start torchrun, hand signals on, leave no orphan, start again. No torch.

torchrun itself does not restart: under gloo its second attempt dies in `connectFullMesh failed`, and its exit code (1
for a mistake, a SIGKILL and a clean save alike) does not say whether another attempt is worth anything. The ranks'
reports do.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from lamella.errors import UserError
from lamella.jsons import Json
from lamella.recipe.training import Recipe
from lamella.run.effective import effective_time
from lamella.run.failure import ATTEMPT, cause, forget, watchdog_spoke
from lamella.run.folder import RunDir
from lamella.run.heartbeat import EVERY_S, forget_beats, lost_ranks, place_of, who_hangs
from lamella.run.processes import LAUNCH_ID, die_with_parent, kill_launch

# Where rank 0 writes what is wrong with the input, instead of printing it amid torchrun's own words.
REFUSAL_FILE = "LAMELLA_REFUSAL_FILE"
# When it started the attempt, for the account of time.
LAUNCHED_AT = "LAMELLA_LAUNCHED_AT"
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 60.0
# After a rank has reported a failure the others get so long to report theirs; one that hangs never will.
AFTER_FAILURE_S = 10.0
POLL_S = 0.1


class Supervisor:
    """Runs attempts until the training has ended, was stopped, or is not worth another attempt."""

    def __init__(self, recipe: Recipe, command: Sequence[str], environment: dict[str, str], quiet: bool = False):
        self.recipe, self.command, self.environment, self.quiet = recipe, list(command), environment, quiet
        self.run = RunDir(Path(recipe.out))
        self.signals: list[int] = []
        self.process: subprocess.Popen[bytes] | None = None
        self.lost: list[int] = []
        """Ranks that died without a word, where the others had to be ended because of it."""

    def supervise(self) -> int:
        """Exit code for the command: 0, 1 after a failure, 128 + N when stopped by signal N.

        Raises:
            UserError: what the ranks found wrong with the input.
        """
        handlers = {n: signal.signal(n, self._hand_on) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
        try:
            return self._attempts()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _attempts(self) -> int:
        fruitless = 0
        while True:
            saves = self._num_saves()
            failure = self._attempt()
            if failure is None:
                self._sum_up()
                return 0
            if self.signals:
                return 128 + self.signals[0]
            fruitless = 1 if self._num_saves() > saves else fruitless + 1
            if not is_worth_another(failure, fruitless, self.recipe):
                _say(last_words(self.run, failure, fruitless))
                return 1
            self._back_off(failure, fruitless)
            if self.signals:
                return 128 + self.signals[0]

    def _num_saves(self) -> int:
        return len(self.run.events("save"))

    def _attempt(self) -> Json | None:
        """One torchrun, start to end; None after success, else the failure."""
        number = len(self.run.events("start"))
        launch_id = uuid.uuid4().hex
        forget_the_last(self.run, self.recipe)
        with tempfile.TemporaryDirectory() as folder:
            refusal, said = Path(folder) / "refusal", Path(folder) / "stderr"
            environment = self.environment | {REFUSAL_FILE: str(refusal), LAUNCH_ID: launch_id}
            environment |= {ATTEMPT: str(number), LAUNCHED_AT: str(time.time())}
            with said.open("w") as errors:
                code = self._torchrun(environment, errors, launch_id)
            if refusal.is_file():
                raise UserError(refusal.read_text())
            failure = failure_of(self.run, code, said.read_text(), self.lost)
        if self.run.exists():
            with suppress(OSError):  # a full disk must not end the supervisor
                record(self.run, self.recipe, failure, attempt=number)
        return failure

    def _torchrun(self, environment: dict[str, str], errors: IO[str], launch_id: str) -> int:
        supervisor = os.getpid()
        self.process = subprocess.Popen(
            self.command, env=environment, stdout=subprocess.DEVNULL if self.quiet else None, stderr=errors,
            start_new_session=True, preexec_fn=lambda: die_with_parent(supervisor),
        )  # fmt: skip
        deadline, lost, next_look = None, list[int](), 0.0
        self.lost = []
        while (code := self.process.poll()) is None:
            now = time.monotonic()
            if deadline is None and now >= next_look:
                next_look, lost = now + EVERY_S, lost_ranks(self.run)
            if deadline is None and (lost or cause(self.run) is not None):
                deadline = now + AFTER_FAILURE_S
            if deadline is not None and time.monotonic() > deadline:
                self.lost = lost
                self.process.kill()  # and with it its ranks, which die with their parent
            time.sleep(POLL_S)
        self.process = None
        kill_launch(launch_id)
        return code

    def _hand_on(self, number: int, *_: object) -> None:
        """torchrun hands it to the ranks, which save; Ctrl-C asks for the same, and twice means at once."""
        if number == signal.SIGINT and signal.SIGINT in self.signals and self.process is not None:
            self.process.kill()
        self.signals.append(number)
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM if number == signal.SIGINT else number)

    def _back_off(self, failure: Json, fruitless: int) -> None:
        wait = 0.0 if failure["failure"] == "preempted" else FIRST_BACKOFF_S * 2 ** (fruitless - 1)
        wait = min(wait, LONGEST_BACKOFF_S)
        _say(f"{failure['failure']} at step {failure['step']}: {failure['reason']}\nstarting again in {wait:g} s")
        with suppress(OSError):
            self.run.event("restart", after_s=wait)
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline and not self.signals:
            time.sleep(POLL_S)

    def _sum_up(self) -> None:
        """Say what failures have cost a run; one that was merely stopped and continued has lost nothing to speak of."""
        time_spent = effective_time(self.run)
        if self.run.events("fault"):
            _say(
                f"effective training time {time_spent['share']:.1%} of {time_spent['wall_s']:.0f} s, "
                f"{time_spent['restarts']} restarts"
            )


def forget_the_last(run: RunDir, recipe: Recipe) -> None:
    """Remove what an earlier attempt said, which must not be taken for the next one's word."""
    forget(run)
    forget_beats(run)
    status = run.status()
    if status["state"] not in ("none", "finished"):
        run.write_status("starting", status["step"], recipe.steps)


def failure_of(run: RunDir, code: int, said: str, lost: Sequence[int] = ()) -> Json | None:
    """The failure of an attempt that has ended; None after success. The ranks know best; what died without a word is
    known from torchrun, or from its absence.

    Args:
        code: the command's exit code, -N where signal N killed it.
        said: the command's stderr.
        lost: ranks that died without a word while others did not end.

    Returns:
        {"failure", "retryable", "reason", "step"} and of a rank's report the rest.
    """
    status = run.status()
    if code == 0 and status["state"] in ("finished", "stopped"):
        return None
    if status["state"] == "preempted":
        return {
            "failure": "preempted",
            "retryable": True,
            "reason": "a signal asked to stop",
            "step": status["step"],
        }
    if found := cause(run):
        killed = _killed(said) if "silent" in found and found["failure"] == "infra" else ""
        return found | {"reason": f"{killed}{place_of(run, found['silent'][0])}" if killed else found["reason"]}
    if not run.exists():
        return {"failure": "user_config", "retryable": False, "reason": said.strip(), "step": 0}
    if lost:
        reason = f"rank {lost[0]} died without a word{place_of(run, lost[0])}"
    elif code < 0:
        reason = f"torchrun was killed by {signal.Signals(-code).name}"
    else:
        reason = _killed(said) or said.strip() or f"torchrun ended with exit code {code}"
    values: Json = {"failure": "infra", "retryable": True, "reason": reason, "step": status["step"]}
    if watchdog_spoke(run):
        values |= {"failure": "timeout", "reason": f"{who_hangs(run) or 'a rank hangs'}; after that {reason}"}
    return values


def record(run: RunDir, recipe: Recipe, failure: Json | None, **values: object) -> None:
    """Write how an attempt ended, as an event with these values, and as the run's status."""
    run.event("end" if failure is None else "fault", **values, **_brief(failure))
    if failure is not None and failure["failure"] != "preempted":
        run.write_status(
            "failed", failure["step"], recipe.steps, failure["reason"], failure["failure"], failure["retryable"]
        )


def is_worth_another(failure: Json, fruitless: int, recipe: Recipe) -> bool:
    """Whether another attempt is worth it after `fruitless` ones in a row, this one included, since the last
    checkpoint."""
    return failure["retryable"] and fruitless <= recipe.max_restarts_without_progress


def last_words(run: RunDir, failure: Json, fruitless: int) -> str:
    """What people are told when no further attempt is made."""
    tried = f" after {fruitless - 1} restarts without a new checkpoint" if failure["retryable"] else ""
    log = run.log_file(failure.get("rank", 0))
    more = f"\n(more in {log})" if log.is_file() else ""
    return f"error: {failure['failure']} at step {failure['step']}{tried}: {failure['reason']}{more}"


def _brief(failure: Json | None) -> Json:
    keys = ("failure", "retryable", "reason", "step", "rank", "silent")
    return {key: failure[key] for key in keys if failure is not None and key in failure}


def _killed(said: str) -> str:
    """torchrun's summary names the first rank that died, and of what; '' where it was no signal."""
    found = re.search(r"Root Cause.*?rank\s*:\s*(\d+).*?exitcode\s*:\s*-(\d+)", said, re.DOTALL)
    return f"rank {found[1]} was killed by {signal.Signals(int(found[2])).name}" if found else ""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
