"""Answers as `sky` 0.14.1 does, in its place: python sky.py STATE.json jobs queue --output=json

The texts of its errors were seen from the real program on a machine without a cloud.
"""

from __future__ import annotations

import fcntl
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NEW = {"jobs": [], "calls": [], "controller": False, "broken": "", "log": ""}
BANNER = "\x1b[2mFailed to connect to SkyPilot API server at http://127.0.0.1:46580. Starting a local server.\x1b[0m"


class Sky:
    """What the program knows, as tests see and change it.

    Args:
        folder: gets a folder `bin` with the program in it.
    """

    def __init__(self, folder: Path):
        self.file = folder / "sky.json"
        self.bin = folder / "bin"
        self.bin.mkdir()
        program = self.bin / "sky"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "{self.file}" "$@"\n')
        program.chmod(0o755)

    @property
    def state(self) -> dict:
        """What it knows now."""
        with changing(self.file) as state:
            return state

    def write(self, **values: object) -> None:
        """Let it know something else."""
        with changing(self.file) as state:
            state |= values

    def becomes(self, status: str, **more: object) -> None:
        """The last job is in another state."""
        with changing(self.file) as state:
            state["jobs"][-1] |= {"status": status} | more

    @property
    def launches(self) -> int:
        """How often a job was launched."""
        return sum(words[:2] == ["jobs", "launch"] for words in self.state["calls"])


@contextmanager
def changing(file: Path) -> Iterator[dict]:
    """What is known, for whoever has the lock; it is written back."""
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = json.loads(file.read_text()) if file.exists() else json.loads(json.dumps(NEW))
        yield state
        file.write_text(json.dumps(state))


def queue(state: dict, options: dict) -> str:
    """An error, or none."""
    if not state["controller"] and "refresh" not in options:
        return "sky.exceptions.ClusterNotUpError: No in-progress managed jobs."
    if not state["controller"] and not state["jobs"]:
        return "sky.exceptions.ClusterDoesNotExist: Cluster 'sky-jobs-controller-6e7f' does not exist."
    state["controller"] = True
    print(BANNER)
    print(json.dumps(state["jobs"], indent=2))
    return ""


def answer(state: dict, words: list[str]) -> str:
    """An error, or none."""
    options = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
    state["calls"].append(words)
    if state["broken"]:
        return state["broken"]
    if words[:2] == ["jobs", "queue"]:
        return queue(state, options)
    if words[:2] == ["jobs", "launch"]:
        record = {"job_id": len(state["jobs"]) + 1, "task_id": 0, "job_name": options["name"], "status": "PENDING"}
        state["jobs"].append(record | {"failure_reason": None, "recovery_count": 0})
        state["controller"] = True
    elif words[:2] == ["jobs", "logs"]:
        print(state["log"], end="")
    elif words[:2] == ["jobs", "cancel"]:
        if not state["controller"]:
            return "sky.exceptions.ClusterNotUpError: No in-progress managed jobs."
        for job in state["jobs"]:
            if job["job_name"] == options["name"]:
                job["status"] = "CANCELLED"
    return ""


if __name__ == "__main__":
    with changing(Path(sys.argv[1])) as known:
        error = answer(known, sys.argv[2:])
    sys.exit(error or 0)
