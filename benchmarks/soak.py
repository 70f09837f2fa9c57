"""Run: uv run benchmarks/soak.py [--kills 500] [--job count | convert | train] [--seed 0] [--out FILE.json]

kill -9 at random moments, of the server, of supervisors and of what they run (commands, torchrun, ranks), while jobs
are submitted and run. A killed server is started again on the same store. At the end every run must have succeeded,
none be lost, none doubled (two processes at work on one run at once), and no process of any run be left.

Jobs: `count` runs tests/support/small_job.py in the place of `lamella train`, a kill a second; `convert` and `train`
are the real commands on a tiny model, whose start takes most of the time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from lamella.errors import UserError
from lamella.jsons import Json
from lamella.run.folder import RunDir
from lamella.service.client import Client
from lamella.service.executors import local
from lamella.service.states import TERMINAL

ROOT = Path(__file__).parents[1]
SMALL_JOB = ROOT / "tests" / "support" / "small_job.py"
WAITING_RUNS = 4
PAUSE_S = {"count": (0.1, 1.0), "convert": (0.5, 6.0), "train": (2.0, 25.0)}
START_S, END_S = 60, 600


def serve(home: Path, job: str) -> None:
    """The server process; for `count` its training jobs count steps."""
    from lamella.service.scheduler import Scheduler
    from lamella.service.serve import Settings
    from lamella.service.serve import serve as run

    if job == "count":
        local.command_of = lambda run, place: [
            sys.executable, str(SMALL_JOB), str(place.folder(run.id) / "recipe.yaml"),
        ]  # fmt: skip
        Scheduler._check_folders = lambda *_: None
    run(Settings(home=home, port=0, cores=3 if job == "count" else 2, backoff_s=0.1, rate=1000))


@dataclass
class Soak:
    """The state of one soak."""

    folder: Path
    job: str
    chance: random.Random
    server: subprocess.Popen[bytes] | None = None
    runs: dict[str, str | None] = field(default_factory=dict)
    """Idempotency key -> run, once the server has said it."""
    kills: Counter[str] = field(default_factory=Counter)
    retried: int = 0

    @property
    def home(self) -> Path:
        """Where the server keeps its store."""
        return self.folder / "home"

    def start(self) -> None:
        """Start the server, and wait until it listens."""
        (self.home / "address").unlink(missing_ok=True)
        command = [sys.executable, __file__, "--serve", str(self.home), "--job", self.job]
        with (self.folder / "server.log").open("ab") as log:
            self.server = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while not (self.home / "address").is_file():
            assert self.server.poll() is None, (self.folder / "server.log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def processes(self) -> list[psutil.Process]:
        """Everything that runs started, living."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                run = process.environ().get(local.JOB_ID)
                if run in self.runs.values() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def kill_one(self) -> None:
        """kill -9 of the server, or of a process of a run."""
        victims = self.processes()
        supervisors = [p for p in victims if "lamella.service.attempt" in _words(p)]
        others = [p for p in victims if p not in supervisors]
        kind = self.chance.choice(["server", "supervisor", "command", "command"])
        if kind == "server":
            assert self.server is not None
            self.server.kill()
            self.server.wait()
            self.kills[kind] += 1
            self.start()
            return
        chosen = supervisors if kind == "supervisor" else others
        if chosen:
            with suppress(psutil.NoSuchProcess):
                self.chance.choice(chosen).send_signal(signal.SIGKILL)
                self.kills[kind] += 1

    def submit(self, client: Client) -> None:
        """Keep the queue filled; after a lost answer the same key is sent again."""
        waiting = [key for key, run in self.runs.items() if run is None]
        states = Counter(run["state"] for run in client.runs(limit=50))
        open_runs = sum(count for state, count in states.items() if state not in TERMINAL)
        if not waiting and open_runs < WAITING_RUNS:
            waiting = [f"key-{len(self.runs)}"]
        for key in waiting:
            self.runs[key] = None
            self.runs[key] = client.submit(self._job(key), key, cores=1)["id"]

    def _job(self, key: str) -> Json:
        out = str(self.folder / "out" / key)
        if self.job == "convert":
            return {"kind": "convert", "recipe": {"model": str(self.folder / "dense"), "out": out}, "overwrite": True}
        steps = 60 if self.job == "count" else 200
        recipe = {
            "model": str(self.folder / "model"), "out": out, "data": ["python-docs"], "seq_len": 32, "steps": steps,
            "samples_per_step": 2, "heldout_samples": 0, "tensorboard": False, "save_every_steps": steps // 6,
        }  # fmt: skip
        return {"kind": "train", "recipe": recipe, "ranks": 1}

    def retry(self, client: Client) -> int:
        """Try again what has come to the cap of attempts; how many runs have not ended well."""
        left = 0
        for run in filter(None, self.runs.values()):
            found = client.show(run)
            if found["state"] == "failed":
                assert found["failure"] in ("infra", "preempted", "storage", "timeout"), found
                client.change(run, "retry")
                self.retried += 1
            left += found["state"] != "succeeded"
        return left

    def doubled(self) -> list[str]:
        """Runs on which two processes were at work at once, as far as the job's own log tells."""
        found = []
        for key in self.runs if self.job == "count" else ():
            lines = (self.folder / "out" / key / "log" / "steps.txt").read_text().splitlines()
            pids = [line.split()[1] for line in lines]
            changes = [pid for before, pid in zip(["", *pids], pids, strict=False) if before != pid]
            if len(changes) != len(set(changes)):
                found.append(key)
        return found

    def unfinished(self) -> list[str]:
        """Runs whose folder does not hold what a finished run leaves."""
        found = []
        for key in self.runs:
            out = self.folder / "out" / key
            done = (
                (out / "config.json").is_file()
                if self.job == "convert"
                else RunDir(out).status()["state"] == "finished"
            )
            found += [] if done else [key]
        return found


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def soak(folder: Path, kills: int, job: str, seed: int) -> Json:
    """Kill so often, then let everything end: what was killed, and what is wrong; all figures but kills must be 0."""
    state, began = Soak(folder, job, random.Random(seed)), time.time()
    state.start()
    try:
        known, attempts = _kill_and_wait(state, kills)
    finally:
        assert state.server is not None
        state.server.terminate()
        state.server.wait(30)
    _, left = psutil.wait_procs(state.processes(), timeout=10)
    return {
        "job": job, "seed": seed, "kills": dict(state.kills), "runs": len(state.runs), "attempts": attempts,
        "tried_again_after_the_cap": state.retried, "seconds": round(time.time() - began, 1),
        "lost": len(set(state.runs.values()) - known), "unknown": len(known - set(state.runs.values())),
        "doubled": len(state.doubled()), "unfinished": len(state.unfinished()), "orphans": len(left),
    }  # fmt: skip


def _kill_and_wait(state: Soak, kills: int) -> tuple[set[str], int]:
    """(the runs that the server knows in the end, all well; their attempts)."""
    while sum(state.kills.values()) < kills:
        with suppress(UserError), Client(home=state.home) as client:  # no server for a moment
            state.submit(client)
        time.sleep(state.chance.uniform(*PAUSE_S[state.job]))
        state.kill_one()
    deadline = time.monotonic() + END_S
    with Client(home=state.home) as client:
        state.submit(client)
        while state.retry(client):
            assert time.monotonic() < deadline, [client.show(run) for run in state.runs.values() if run]
            time.sleep(1)
        known = {run["id"] for run in _all(client)}
        return known, sum(client.show(run)["attempt"] for run in known)


def _all(client: Client) -> list[Json]:
    found: list[Json] = []
    while page := client.runs(limit=500, after=found[-1]["id"] if found else None):
        found += page
    return found


def make_models(folder: Path, job: str) -> None:
    """A tiny dense model, or a converted one."""
    if job == "convert":
        from support.models import save_llama

        save_llama(folder / "dense")
    elif job == "train":
        from support.models import trainable_moe

        trainable_moe(folder / "model")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--job", choices=list(PAUSE_S), default="count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve(args.serve, args.job)
        return
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    )
    with tempfile.TemporaryDirectory(prefix="soak.") as name:
        folder = Path(name)
        os.environ["LAMELLA_CACHE"] = str(folder / "cache")
        make_models(folder, args.job)
        report = soak(folder, args.kills, args.job, args.seed)
    print(json.dumps(report, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    bad = ("lost", "unknown", "doubled", "unfinished", "orphans")
    sys.exit(any(report[name] for name in bad))


if __name__ == "__main__":
    main()
