"""Runs without a server: what the run folders say, and processes that are asked directly. Imports no torch.

A run is known by its folder. There is no queue and no second attempt beyond those of `lamella train` itself.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil

from lamella.errors import UserError
from lamella.jsons import Json
from lamella.recipe.check import checked, refuse
from lamella.recipe.result import CONFIG, result_folder
from lamella.run.folder import RunDir
from lamella.run.gpus import visible_gpus
from lamella.run.heartbeat import read_beats
from lamella.service.executors.executor import Place
from lamella.service.executors.local import Local
from lamella.service.jobs import Submission, TrainJob
from lamella.service.paths import HOME
from lamella.service.planning import draft, plan_of
from lamella.service.progress import progress_of
from lamella.service.queue import Capacity
from lamella.service.store import Attempt
from lamella.service.streams import finite, read_log

DEPTH = 3
STATES = {
    "finished": "succeeded",
    "stopped": "paused",
    "preempted": "preempted",
    "failed": "failed",
    "none": "starting",
}
POLL_S = 0.5
BEAT_S = 30.0


class Folders:
    """The runs below a folder, with the methods of `lamella.Client`."""

    def __init__(self, root: Path = Path("artifacts"), home: Path = HOME):
        self.root = root
        capacity = Capacity(visible_gpus(), len(os.sched_getaffinity(0)))
        self.place = Place(home.resolve(), Path.cwd(), capacity)

    def plan(self, job: Json, **options: object) -> Json:
        """See `lamella.Client.plan`."""
        return plan_of(_submission(job, options), self.place)

    def submit(self, job: Json, key: str | None = None, **options: object) -> Json:
        """Start a job now, as processes that go on when this one ends."""
        submission = _submission(job, options)
        if submission.executor != "local":
            raise UserError(f"executor {submission.executor} needs a server: start one with `lamella serve`")
        submission.check()
        gpus, cores = submission.needs(self.place.capacity)
        out = submission.job.out()
        if isinstance(submission.job, TrainJob):
            for directory in submission.job.outs():
                if _supervisor(RunDir(Path(directory))) is not None:
                    raise UserError(f"a run works in {directory} already")
        run = replace(draft(submission, gpus, cores), id=f"run-{uuid.uuid4().hex[:12]}", created=time.time())
        attempt = Attempt(0, run.id, 1, "", {}, list(range(gpus)), time.time(), None, None, None, "", 0, None)
        Local(self.place).submit(run, attempt)
        log = self.place.log(run.id)
        return {
            "id": out or run.id,
            "name": run.name,
            "kind": run.kind,
            "state": "starting",
            "log": str(log),
            "out": out,
        }

    def runs(self, limit: int = 50, after: str | None = None, state: list[str] | None = None) -> list[Json]:
        """The runs below the root, the newest first."""
        found = [_view(RunDir(file.parent)) for file in _configs(self.root, DEPTH)]
        found = [run for run in found if not state or run["state"] in state]
        return sorted(found, key=lambda run: -run["updated"])[:limit]

    def show(self, run: str) -> Json:
        """A run, with its recipe."""
        directory = _run(run)
        recipe = directory.keys()
        return _view(directory) | {"spec": {"job": {"kind": "train", "recipe": recipe}}}

    def change(self, run: str, what: str) -> Json:
        """cancel, pause, resume or retry a run."""
        directory = _run(run)
        process = _supervisor(directory)
        if what in ("cancel", "pause"):
            if process is not None:
                process.send_signal(signal.SIGTERM)
            return _view(directory)
        if process is None:
            job = {"kind": "train", "recipe": directory.recipe().model_dump(mode="json", exclude_defaults=True)}
            self.submit(job)
        return _view(directory)

    def fork(self, run: str, out: str, step: int | None = None, changes: Json | None = None) -> Json:
        """See `lamella.Client.fork`."""
        directory = _run(run)
        recipe = directory.recipe().model_dump(mode="json", exclude_defaults=True) | (changes or {}) | {"out": out}
        if step is not None:
            if step not in directory.steps():
                raise UserError(f"{run} has no checkpoint of step {step}")
            recipe["model"] = str(result_folder(directory.path, step))
        return self.submit({"kind": "train", "recipe": recipe})

    def events(self, run: str, after: int = 0) -> list[Json]:
        """What the trainer has reported."""
        return [
            {"id": number, "run": run, "time": e["time"], "event": e["event"], "state": None, "data": e}
            for number, e in enumerate(_run(run).events(), 1)
            if number > after
        ]

    def metrics(self, run: str, offset: int = 0) -> Json:
        """See `lamella.Client.metrics`."""
        file = _run(run).metrics_file
        raw = file.read_bytes()[offset:] if file.is_file() else b""
        whole = raw[: raw.rfind(b"\n") + 1]
        lines = [line for part in whole.splitlines() if (line := finite(part)) is not None]
        return {"data": lines, "offset": offset + len(whole)}

    def checkpoints(self, run: str) -> list[Json]:
        """See `lamella.Client.checkpoints`."""
        directory = _run(run)
        return [{"step": step, "path": directory.store().path(step)} for step in directory.steps()]

    def logs(self, run: str, source: str = "rank-0", follow: bool = False) -> Iterator[str]:
        """The log of a rank; with `follow` until the run has ended."""
        directory = _run(run)
        file = directory.log / f"{'rank-0' if source == 'job' else source}.log"
        if not file.is_file():
            raise UserError(f"there is no log {file}")
        offset = 0 if follow else max(0, file.stat().st_size - 65_536)
        while True:
            over = _supervisor(directory) is None
            while True:
                text, after = read_log(file, offset)
                if after == offset:
                    break
                offset = after
                yield text
            if over or not follow:
                return
            time.sleep(POLL_S)


def _submission(job: Json, options: dict[str, object]) -> Submission:
    submission, lines = checked(Submission, {"job": job} | {k: v for k, v in options.items() if v is not None})
    refuse(lines, "the job")
    assert submission is not None
    return submission


def _configs(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / CONFIG).is_file():
        yield folder / CONFIG
        return
    if depth and folder.is_dir():
        for inner in sorted(folder.iterdir()):
            if inner.is_dir() and not inner.is_symlink() and inner.name != "jobs":
                yield from _configs(inner, depth - 1)


def _run(name: str) -> RunDir:
    directory = RunDir(Path(name))
    if not directory.exists():
        raise UserError(f"{name} is no run directory; `lamella runs ls` lists those that there are")
    return directory


def _view(directory: RunDir) -> Json:
    status, progress = directory.status(), progress_of([directory], None)
    state = STATES.get(status["state"], status["state"])
    if state in ("starting", "running") and _supervisor(directory) is None:
        state = "lost"
    return {
        "id": str(directory.path), "kind": "train", "name": directory.path.name, "user": "", "state": state,
        "priority": 0, "executor": "local", "out": str(directory.path), "failure": status.get("failure"),
        "reason": status.get("reason", ""), "attempt": len(directory.events("start")), "progress": progress,
        "created": directory.config.stat().st_mtime, "updated": float(status.get("time", 0.0)),
    }  # fmt: skip


def _supervisor(directory: RunDir) -> psutil.Process | None:
    """The `lamella train` whose ranks beat in the folder: their torchrun's parent, or, of adapters, what beats itself;
    None where nothing runs."""
    for beat in read_beats(directory):
        try:
            rank = psutil.Process(beat.pid)
            if time.time() - beat.time > BEAT_S or rank.create_time() > beat.time:
                continue  # another process has the id by now
            processes = [rank, *rank.parents()]
        except psutil.Error:
            continue
        for process in processes:
            try:
                words = process.cmdline()
            except psutil.Error:
                continue
            if "train" in words and any("lamella" in Path(word).name for word in words):
                return process
    return None
