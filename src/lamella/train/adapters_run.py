"""The run directory of a training of adapters: several trainings in a row, told as the steps of one.

Beside the files of `lamella.run.folder` it holds an adapter for each domain, the untrained mix, and `NAME.resume`, from
which the training that is at work goes on.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lamella.display import TrainingProgress
from lamella.recipe.adapters_training import AdaptersTraining
from lamella.run.failure import forget, report
from lamella.run.folder import RunDir, State
from lamella.run.heartbeat import Heartbeat
from lamella.run.processes import StopRequest
from lamella.train.adapter_steps import Kept, Pace, StopAskedError


class AdaptersRun:
    """What people and programs are told of a training of adapters, and where it goes on from."""

    def __init__(self, recipe: AdaptersTraining, folder: Path, say: Callable[[str], None]):
        self.recipe, self.run, self._say, self.stop = recipe, RunDir(folder), say, StopRequest()
        self.steps = sum(recipe.steps_of.values())
        self.done = 0
        """Finished steps of all trainings."""

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Inside, the status is kept, and a signal is heard after the step that it comes in."""
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
        if threading.current_thread() is threading.main_thread():  # Python lets no other listen
            self.stop.listen()
        self.run.log.mkdir(exist_ok=True)
        forget(self.run)
        heart = Heartbeat(self.run, 0)
        self.heart = heart
        self.run.event("start", attempt=len(self.run.events("start")) + 1)
        try:
            self._status("running")
            yield
            self._status("finished")
        except (StopAskedError, KeyboardInterrupt) as stopped:
            self._status("preempted", failure="preempted", retryable=True)
            self.run.event("preempted", step=self.done)
            self.say(f"stopped at step {self.done} of {self.steps}; the same command goes on")
            if isinstance(stopped, KeyboardInterrupt):
                raise
            sys.exit(128 + signal.SIGTERM)
        except BaseException as error:
            found = report(self.run, error, 0, 1, self.done)
            self._status("failed", found["reason"], found["failure"], found["retryable"])
            raise
        finally:
            heart.end()
            if threading.current_thread() is threading.main_thread():
                for number, handler in before.items():
                    signal.signal(number, handler)

    def say(self, text: str) -> None:
        """To people, and to the log."""
        self._say(text)
        with self.run.log_file(0).open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def passed(self, name: str) -> None:
        """A training whose result is there already."""
        self.done += self.recipe.steps_of[name]

    @contextmanager
    def training(self, name: str, pace: Pace) -> Iterator[tuple[Callable[[int, float], None], Kept]]:
        """(what to tell each step and its loss, where to go on from) of one of the trainings."""
        before, kept = self.done, Kept(self.run.path / f"{name}.resume", self.recipe.save_every_steps, self._asked)
        display = TrainingProgress(sys.stderr, 0, pace.steps)
        self.run.event("running", step=before, training=name)
        began = time.perf_counter()

        def on_step(number: int, loss: float) -> None:
            nonlocal began
            self.done, now = before + number, time.perf_counter()
            self.heart.enter("end of step", self.done)
            line = {
                "step": self.done, "time": time.time(), "heldout_loss": None, "loss": loss, "training": name,
                "lr": pace.lr * pace.factor(number - 1), "tokens": self.done * pace.tokens_per_step,
                "tokens_per_s": pace.tokens_per_step / (now - began),
            }  # fmt: skip
            began = now
            with self.run.metrics_file.open("a") as file:
                file.write(json.dumps(line) + "\n")
            if number % self.recipe.save_every_steps == 0:
                self._status("running")
            display.show(line | {"step": number})

        try:
            yield on_step, kept
        finally:
            display.close()
        kept.file.unlink(missing_ok=True)

    def _asked(self) -> bool:
        return self.stop.asked

    def _status(self, state: State, reason: str = "", failure: str | None = None, retryable: bool = False) -> None:
        self.run.write_status(state, self.done, self.steps, reason, failure, retryable)
