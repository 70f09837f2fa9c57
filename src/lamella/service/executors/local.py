"""Jobs on this machine: each attempt is a process group of its own, which no death of the server ends. No torch."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from lamella.jsons import Json
from lamella.run.folder import write_atomic
from lamella.run.processes import kill_launch
from lamella.service.attempt import DEVICES, EXIT, FAILURE, JOB, PROCESS, place_of
from lamella.service.executors.executor import Ask, Place, Seen, command_of, submission_of
from lamella.service.store import Attempt, Run

JOB_ID = "LAMELLA_JOB"
"""In the environment of everything that a run starts."""
SAME_START_S = 0.05
"""Two readings of one process's start agree within this."""


class Local:
    """See `lamella.service.executors.executor.Executor`."""

    def __init__(self, place: Place):
        self.place = place
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    def render(self, run: Run, attempt: int) -> dict[str, str]:
        """The job's files, and the command as a shell would take it."""
        return submission_of(run).job.files() | {"command.sh": f"{shlex.join(command_of(run, self.place))}\n"}

    def submit(self, run: Run, attempt: Attempt) -> Json:
        """Start a process that needs no server; of two for one attempt, one ends at once."""
        folder = self.place.folder(run.id)
        place = place_of(folder, attempt.number)
        place.mkdir(parents=True, exist_ok=True)
        for name, content in submission_of(run).job.files().items():
            write_atomic(folder / name, content)
        environment = {JOB_ID: run.id}
        if run.cores and not run.gpus:
            environment["OMP_NUM_THREADS"] = str(run.cores)
        job: Json = {
            "command": command_of(run, self.place), "cwd": str(self.place.cwd), "environment": environment,
        }  # fmt: skip
        write_atomic(folder / JOB, json.dumps(job, indent=1) + "\n")
        write_atomic(place / DEVICES, json.dumps(attempt.devices))
        with self.place.log(run.id).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "lamella.service.attempt", str(folder), str(attempt.number)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=self.place.cwd,
                env=os.environ | environment,
            )  # fmt: skip
        self._children[process.pid] = process
        return {"submitted": time.time()}

    def look(self, run: Run, attempt: Attempt) -> Seen:
        """From the files of the attempt, and whether its process lives: pid and start time together are one process."""
        self._reap()
        place = place_of(self.place.folder(run.id), attempt.number)
        process = _read(place / PROCESS)
        if process is None:
            return Seen("waiting")
        alive = is_same_process(int(process["pid"]), float(process["started"]))
        ended = _read(place / EXIT)  # after the look at the process: it writes this before it ends
        if ended is not None:
            return Seen("ended", ended["code"], _read(place / FAILURE))
        if alive:
            return Seen("running")
        return Seen("gone", reason="its supervisor was killed, or the machine was started again")

    def ask(self, run: Run, attempt: Attempt, what: Ask) -> None:
        """SIGTERM to the process that hands it on; kill: everything that the run has started here."""
        process = _read(place_of(self.place.folder(run.id), attempt.number) / PROCESS)
        if process is not None and is_same_process(int(process["pid"]), float(process["started"])):
            with suppress(ProcessLookupError):
                if what == "kill":
                    os.killpg(int(process["pid"]), signal.SIGKILL)
                else:
                    os.kill(int(process["pid"]), signal.SIGTERM)
        if what == "kill":
            kill_launch(run.id, JOB_ID)

    def fetch_log(self, run: Run, attempt: Attempt) -> None:
        """Its processes write the log themselves."""

    def _reap(self) -> None:
        for pid, process in list(self._children.items()):
            if process.poll() is not None:
                del self._children[pid]


def is_same_process(pid: int, started: float) -> bool:
    """Whether this very process lives; another one may have its id by now."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < SAME_START_S and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _read(file: Path) -> Json | None:
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
