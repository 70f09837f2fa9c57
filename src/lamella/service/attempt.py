"""One attempt of a job on this machine, as a process that needs no server: python -m lamella.service.attempt FOLDER N

It takes the attempt by making attempts/N/process.json, which only one process can; runs the command in job.json; hands
signals on; and writes how it ended to attempts/N/exit.json. It dies with none, and its command dies with it. Imports no
torch.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

import psutil

from lamella.jsons import Json
from lamella.run.failure import FAILURE_FILE
from lamella.run.folder import write_atomic
from lamella.run.processes import die_with_parent

JOB, PROCESS, EXIT, FAILURE, DEVICES = "job.json", "process.json", "exit.json", "failure.json", "devices.json"
TAKEN = 3
"""The exit code where another process has the attempt."""


def place_of(folder: Path, number: int) -> Path:
    """The folder of an attempt in that of its job."""
    return folder / "attempts" / str(number)


def take(place: Path) -> bool:
    """Write who runs the attempt, whole; False where somebody does already."""
    place.mkdir(parents=True, exist_ok=True)
    me: Json = {"pid": os.getpid(), "started": psutil.Process().create_time(), "host": socket.gethostname()}
    draft = place / f".{PROCESS}.{os.getpid()}"
    draft.write_text(json.dumps(me))
    try:
        os.link(draft, place / PROCESS)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


class Signals:
    """Hands what asks to stop on to the command, also what comes before it runs."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.process: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._hand_on)

    def _hand_on(self, number: int, _: FrameType | None) -> None:
        self.asked.append(number)
        if self.process is not None:
            self.process.send_signal(number)

    def watch(self, process: subprocess.Popen[bytes]) -> None:
        """The command runs from here on."""
        early = list(self.asked)
        self.process = process
        for number in early:
            process.send_signal(number)


def main(folder: Path, number: int) -> int:
    """The exit code of the command, or 128 + N where signal N ended it."""
    place, signals = place_of(folder, number), Signals()
    if not take(place):
        return TAKEN
    job: Json = json.loads((folder / JOB).read_text())
    environment = os.environ | job["environment"] | {FAILURE_FILE: str(place / FAILURE)}
    if devices := json.loads((place / DEVICES).read_text()):
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
    me = os.getpid()
    print(f"--- attempt {number}, {time.strftime('%Y-%m-%d %H:%M:%S %Z')}", flush=True)
    process = subprocess.Popen(
        job["command"], cwd=job["cwd"], env=environment, stdin=subprocess.DEVNULL,
        preexec_fn=lambda: die_with_parent(me),
    )  # fmt: skip
    signals.watch(process)
    code = process.wait()
    write_atomic(place / EXIT, json.dumps({"code": code, "time": time.time(), "signals": signals.asked}))
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
