"""Run: uv run benchmarks/soak.py [--kills 500] [--job mixed | count | convert | train] [--seed 0] [--out FILE.json]

kill -9 at random moments, of the server, of supervisors, of what they run (`lamella train`, torchrun) and of ranks,
while jobs are submitted and run. A killed server is started again on the same store. At the end every run must have
succeeded, none be lost, none doubled (two processes at work on one run at once), no process of any run be left, and
every training must have the losses of one that nobody disturbed, bit for bit.

Jobs: `train` trains a tiny model with two ranks, whose start takes most of the time; `count` runs
tests/support/small_job.py in the place of `lamella train`, a kill a second; `mixed` has one training run at any time,
and counting runs beside it; `convert` converts a tiny model.
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
from collections import Counter, defaultdict
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
from lamella.service.executors.executor import Place
from lamella.service.states import STATES, TERMINAL
from lamella.service.store import Run

ROOT = Path(__file__).parents[1]
SMALL_JOB = ROOT / "tests" / "support" / "small_job.py"
OPEN_RUNS = {"count": {"count": 4}, "convert": {"convert": 4}, "train": {"train": 2}, "mixed": {"train": 1, "count": 3}}
"""Job -> kind of run -> so many of them have not ended at any time."""
PAUSE_S = {"count": (0.1, 1.0), "convert": (0.5, 6.0), "train": (2.0, 16.0), "mixed": (0.5, 5.0)}
OPEN = sorted(set(STATES) - TERMINAL)
TRAIN_PAUSE_S = (1.0, 60.0)
"""Between two kills of processes of a training: some come before its first step, some after several saves."""
STEPS = {"count": 60, "train": 24}
RANKS = {"count": 1, "train": 2}
POLL_S, START_POLLS, END_POLLS = 0.5, 240, 2400
"""Polls, not seconds, are counted: who stops all of this for some minutes does not fail it."""


def serve(home: Path, job: str) -> None:
    """The server process; runs of the kind `count` count steps in the place of training."""
    from lamella.service.scheduler import Scheduler
    from lamella.service.serve import Settings
    from lamella.service.serve import serve as run

    real_command, real_check = local.command_of, Scheduler._check_folders

    def command(run: Run, place: Place) -> list[str]:
        if not is_count(run):
            return real_command(run, place)
        return [sys.executable, str(SMALL_JOB), str(place.folder(run.id) / "recipe.yaml")]

    local.command_of = command
    Scheduler._check_folders = lambda self, run: None if is_count(run) else real_check(self, run)
    run(Settings(home=home, port=0, cores=3 if job == "count" else 2, backoff_s=0.1, rate=1000))


def is_count(run: Run) -> bool:
    """By the name of the folder that it writes."""
    return Path(run.out or "").name.startswith("count")


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
    train_due: float = 0.0
    """No process of a training is killed before."""
    losses: list[tuple[int, float]] = field(default_factory=list)
    """(step, loss) of a training that nobody disturbs."""
    seen_twice: set[str] = field(default_factory=set)
    """Runs of which one rank was seen as two processes at once."""

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
        for _ in range(START_POLLS):
            assert self.server.poll() is None, (self.folder / "server.log").read_text()[-3000:]
            if (self.home / "address").is_file():
                return
            time.sleep(POLL_S / 4)
        raise AssertionError("the server does not start")

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
        """kill -9 of a process of a training, once it has had its time; else of the server, or of another process."""
        found = self.processes()
        trains = [process for process in found if self.name_of(process).startswith("train")]
        if trains and time.monotonic() > self.train_due:
            kind, found = self.chance.choice(("rank", "rank", "rank", "command", "supervisor")), trains
            self.train_due = time.monotonic() + self.chance.uniform(*TRAIN_PAUSE_S)
        else:
            kind, found = self.chance.choice(("server", "supervisor", "command")), list(set(found) - set(trains))
        if kind == "server":
            assert self.server is not None
            self.server.kill()
            self.server.wait()
            self.kills[kind] += 1
            self.start()
            return
        chosen = sorted((process for process in found if role(process) == kind), key=lambda process: process.pid)
        if chosen:
            with suppress(psutil.NoSuchProcess):
                self.chance.choice(chosen).send_signal(signal.SIGKILL)
                self.kills[f"{kind} of a training" if found is trains else kind] += 1

    def name_of(self, process: psutil.Process) -> str:
        """The key of the run that started it."""
        with suppress(psutil.Error):
            run = process.environ().get(local.JOB_ID)
            return next((key for key, known in self.runs.items() if known == run), "")
        return ""

    def watch(self) -> None:
        """Note where one rank of a run is two processes."""
        found = defaultdict(set)
        for process in self.processes():
            with suppress(psutil.Error):
                environment = process.environ()
                if role(process) == "rank" or SMALL_JOB.name in " ".join(process.cmdline()):
                    found[environment[local.JOB_ID], environment.get("RANK")].add(process)
        self.seen_twice |= {
            run for (run, _), processes in found.items() if sum(_is_first(p, processes) for p in processes) > 1
        }

    def submit(self, client: Client) -> None:
        """Keep the queue filled; after a lost answer the same key is sent again."""
        waiting = [key for key, run in self.runs.items() if run is None]
        names = [Path(run["out"]).name for run in client.runs(limit=500, state=OPEN)]
        for kind, count in OPEN_RUNS[self.job].items() if not waiting else ():
            if sum(name.startswith(kind) for name in names) < count:
                waiting.append(f"{kind}-{len(self.runs) + len(waiting)}")
        for key in waiting:
            self.runs[key] = None
            self.runs[key] = client.submit(self._job(key), key, cores=1, priority=int(key.startswith("train")))["id"]

    def _job(self, key: str) -> Json:
        kind, out = key.partition("-")[0], str(self.folder / "out" / key)
        if kind == "convert":
            return {"kind": "convert", "recipe": {"model": str(self.folder / "dense"), "out": out}, "overwrite": True}
        return {"kind": "train", "recipe": recipe_of(self.folder, kind, out), "ranks": RANKS[kind]}

    def retry(self, client: Client) -> None:
        """Try again what has come to the cap of attempts."""
        for run in client.runs(limit=500, state=["failed"]):
            assert run["failure"] in ("infra", "preempted", "storage", "timeout"), run
            client.change(run["id"], "retry")
            self.retried += 1

    def doubled(self) -> list[str]:
        """Runs on which two processes were at work at once: as was seen, and as the log of what counts tells."""
        found = [key for key, run in self.runs.items() if run in self.seen_twice]
        for key in (key for key in self.runs if key.startswith("count")):
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
            converts = key.startswith("convert")
            done = (out / "config.json").is_file() if converts else RunDir(out).status()["state"] == "finished"
            found += [] if done else [key]
        return found

    def different(self) -> list[str]:
        """Trainings whose losses are not those of the one that nobody disturbed."""
        trained = [key for key in self.runs if key.startswith("train")]
        return [key for key in trained if losses_of(self.folder / "out" / key) != self.losses]


def recipe_of(folder: Path, kind: str, out: str) -> Json:
    """Of a training; what counts reads the same."""
    return {
        "model": str(folder / "model"), "out": out, "data": ["python-docs"], "seq_len": 32, "steps": STEPS[kind],
        "samples_per_step": 2, "heldout_samples": 0, "tensorboard": False, "save_every_steps": STEPS[kind] // 12,
    }  # fmt: skip


def losses_of(out: Path) -> list[tuple[int, float]]:
    """(step, loss), every step once."""
    return [(line["step"], line["loss"]) for line in RunDir(out).metrics() if line["step"] > 0]


def undisturbed(folder: Path) -> list[tuple[int, float]]:
    """The losses of a training that nobody disturbs, by `lamella train`."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps(recipe_of(folder, "train", str(folder / "undisturbed"))))
    words = ["train", str(recipe), "--nproc", str(RANKS["train"]), "threads_per_rank=1"]
    with (folder / "undisturbed.log").open("wb") as log:
        subprocess.run([sys.executable, "-m", "lamella.cli", *words], check=True, stdout=log, stderr=log)
    return losses_of(folder / "undisturbed")


def role(process: psutil.Process) -> str:
    """What a process of a run is."""
    words = _words(process)
    if "lamella.service.attempt" in words:
        return "supervisor"
    return "rank" if "lamella.worker" in words and "torch.distributed.run" not in words else "command"


def _is_first(process: psutil.Process, processes: set[psutil.Process]) -> bool:
    """Whether it is no child of another one of them."""
    try:
        return process.parent() not in processes
    except psutil.Error:
        return False


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def soak(folder: Path, kills: int, job: str, seed: int) -> Json:
    """Kill so often, then let everything end: what was killed, and what is wrong; all figures but kills must be 0."""
    state, began = Soak(folder, job, random.Random(seed)), time.time()
    if "train" in OPEN_RUNS[job]:
        state.losses = undisturbed(folder)
    state.start()
    try:
        known, attempts = _kill_and_wait(state, kills)
    finally:
        assert state.server is not None
        state.server.terminate()
        state.server.wait(30)
    _, left = psutil.wait_procs(state.processes(), timeout=10)
    kinds = Counter(key.partition("-")[0] for key in state.runs)
    return {
        "job": job, "seed": seed, "kills": dict(state.kills), "all_kills": sum(state.kills.values()),
        "runs": dict(kinds), "attempts": attempts,
        "tried_again_after_the_cap": state.retried, "seconds": round(time.time() - began, 1),
        "lost": len(set(state.runs.values()) - known), "unknown": len(known - set(state.runs.values())),
        "doubled": len(state.doubled()), "unfinished": len(state.unfinished()),
        "different": len(state.different()), "orphans": len(left),
    }  # fmt: skip


def _kill_and_wait(state: Soak, kills: int) -> tuple[set[str], int]:
    """(the runs that the server knows in the end, all well; their attempts)."""
    while sum(state.kills.values()) < kills:
        with suppress(UserError), Client(home=state.home) as client:  # no server for a moment
            state.retry(client)
            state.submit(client)
        for _ in range(round(state.chance.uniform(*PAUSE_S[state.job]) / POLL_S)):
            time.sleep(POLL_S)
            state.watch()
        state.kill_one()
        if sum(state.kills.values()) % 20 == 0:
            print(dict(state.kills), len(state.runs), "runs", file=sys.stderr, flush=True)
    with Client(home=state.home) as client:
        for key in [key for key, run in state.runs.items() if run is None]:
            state.runs[key] = client.submit(state._job(key), key, cores=1, priority=int(key.startswith("train")))["id"]
        for _ in range(END_POLLS):
            state.retry(client)
            state.watch()
            if not client.runs(limit=1, state=[*OPEN, "failed"]):
                break
            time.sleep(POLL_S)
        found = _all(client)
        return {run["id"] for run in found}, sum(run["attempt"] for run in found)


def _all(client: Client, states: list[str] | None = None) -> list[Json]:
    found: list[Json] = []
    while page := client.runs(limit=500, after=found[-1]["id"] if found else None, state=states):
        found += page
    return found


def make_models(folder: Path, job: str) -> None:
    """A tiny dense model, or a converted one, by a process of its own: torch is large."""
    if "convert" in OPEN_RUNS[job]:
        from support.models import save_llama

        save_llama(folder / "dense")
    if "train" in OPEN_RUNS[job]:
        from support.models import trainable_moe

        trainable_moe(folder / "model")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--job", choices=list(PAUSE_S), default="mixed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.models is not None:
        make_models(args.models, args.job)
        return
    if args.serve is not None:
        serve(args.serve, args.job)
        return
    os.environ.setdefault("SMALL_JOB_STEP_S", "0.2" if args.job == "mixed" else "0.05")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    )
    with tempfile.TemporaryDirectory(prefix="soak.") as name:
        folder = Path(name)
        os.environ["LAMELLA_CACHE"] = str(folder / "cache")
        subprocess.run([sys.executable, __file__, "--models", folder, "--job", args.job], check=True)
        report = soak(folder, args.kills, args.job, args.seed)
    print(json.dumps(report, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    bad = ("lost", "unknown", "doubled", "unfinished", "different", "orphans")
    sys.exit(any(report[name] for name in bad))


if __name__ == "__main__":
    main()
