"""Jobs on a Slurm cluster, by sbatch, squeue, scontrol and scancel; the service runs where these work. No torch.

Training runs the body of launch/slurm/train.sbatch, which queues itself again after a fault and at the end of its time:
one attempt of the service is one Slurm job with all of its restarts. The service's home, the models and the run
directories must be on a file system that the nodes share. Only options that Slurm 22 and 26 both have are used.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from lamella.errors import UserError
from lamella.installation import LAUNCH
from lamella.jsons import Json
from lamella.run.failure import FAILURE_FILE
from lamella.run.folder import write_atomic
from lamella.service.attempt import FAILURE, place_of
from lamella.service.executors.executor import Ask, Place, Seen, Unreachable, submission_of
from lamella.service.jobs import RECIPE, TrainJob
from lamella.service.store import Attempt, Run

SCRIPT, STOP = "job.sbatch", "stop"
WAITING = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD"})
OVER = frozenset({"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "PREEMPTED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL",
                  "DEADLINE"})  # fmt: skip
# What Slurm knows better than an exit code.
FAILURES = {"TIMEOUT": "timeout", "PREEMPTED": "preempted", "NODE_FAIL": "infra", "BOOT_FAIL": "infra",
            "OUT_OF_MEMORY": "oom"}  # fmt: skip
UNKNOWN_JOB = ("Invalid job id", "already completing or completed")
NO_CONTROLLER = ("Unable to contact slurm controller", "Connection refused", "Socket timed out", "Unexpected message")
CALL_S = 60


class Slurm:
    """See `lamella.service.executors.executor.Executor`."""

    def __init__(self, place: Place):
        self.place = place

    def render(self, run: Run, attempt: int) -> dict[str, str]:
        """The job's files and its batch script."""
        return submission_of(run).job.files() | {SCRIPT: self._script(run, attempt)}

    def _script(self, run: Run, attempt: int) -> str:
        submission, folder = submission_of(run), self.place.folder(run.id)
        trains, cluster = isinstance(submission.job, TrainJob), submission.cluster
        gpus = f"{cluster.gpu}:{cluster.gpus_per_node}" if cluster.gpu else str(cluster.gpus_per_node)
        options = {
            "job-name": name_of(run, attempt), "nodes": cluster.nodes if trains else 1, "ntasks-per-node": 1,
            "gpus-per-node": gpus if cluster.gpus_per_node else None, "cpus-per-task": cluster.cores_per_node,
            "time": cluster.time, "partition": cluster.partition, "account": cluster.account,
            "signal": "TERM@300" if trains else None, "open-mode": "append",
            "output": self.place.log(run.id), "chdir": self.place.cwd,
        }  # fmt: skip
        lines = ["#!/bin/bash", *(f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None)]
        lines.append("#SBATCH --requeue" if trains else "#SBATCH --no-requeue")
        lines += ["", "set -euo pipefail", f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"]
        lines.append(f"export {FAILURE_FILE}={shlex.quote(str(place_of(folder, attempt) / FAILURE))}")
        if not cluster.gpus_per_node:
            lines.append("export SLURM_GPUS_ON_NODE=1 # a rank for each node")
        if not trains:
            words = shlex.join(["python", "-m", "lamella.cli", *submission.job.words(folder, 1)])
            return "\n".join([*lines, f"srun --ntasks=1 {words}", ""])
        lines.append(f"export LAMELLA_UV= LAMELLA_STOP_FILE={shlex.quote(str(folder / STOP))}")
        lines.append(f"set -- {shlex.quote(str(folder / RECIPE))}")
        return "\n".join(lines) + "\n" + _body()

    def submit(self, run: Run, attempt: Attempt) -> Json:
        """Hand the script to sbatch, unless a job of this attempt's name is there already."""
        _require("sbatch")
        folder = self.place.folder(run.id)
        place_of(folder, attempt.number).mkdir(parents=True, exist_ok=True)
        (folder / STOP).unlink(missing_ok=True)
        for name, content in self.render(run, attempt.number).items():
            write_atomic(folder / name, content)
        known = _call("squeue", "--noheader", "--format=%i", f"--name={name_of(run, attempt.number)}").split()
        return {"job": known[0] if known else _call("sbatch", "--parsable", str(folder / SCRIPT)).strip().split(";")[0]}

    def look(self, run: Run, attempt: Attempt) -> Seen:
        """What squeue says, and of a job that has left the queue what scontrol still knows."""
        job = str(attempt.handle["job"])
        try:
            states = _ask_about("squeue", "--noheader", "--format=%T %r", f"--jobs={job}").split(maxsplit=1)
            if states and states[0] not in OVER:
                waits = states[0] in WAITING
                return Seen("waiting" if waits else "running", reason=states[1].strip() if len(states) > 1 else "")
            shown = _ask_about("scontrol", "--oneliner", "show", "job", job)
        except Unreachable as error:
            return Seen("unknown", reason=str(error))
        fields = dict(part.split("=", 1) for part in shown.split() if "=" in part)
        state = fields.get("JobState", "")
        if not state:
            return Seen("gone", reason=f"Slurm knows nothing of job {job} any more")
        code, _, number = fields.get("ExitCode", "0:0").partition(":")
        failure = _read(place_of(self.place.folder(run.id), attempt.number) / FAILURE)
        if failure is None and state in FAILURES:
            reason = f"Slurm ended job {job}: {state}, {fields.get('Reason', '')}"
            failure = {"failure": FAILURES[state], "reason": reason}
        cancelled = state == "CANCELLED"
        return Seen("ended", 143 if cancelled else -int(number) if int(number or 0) else int(code), failure)

    def ask(self, run: Run, attempt: Attempt, what: Ask) -> None:
        """SIGTERM to the ranks of training, which save; other jobs, and what waits, are cancelled."""
        job = str(attempt.handle["job"])
        folder = self.place.folder(run.id)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STOP).touch()
        trains = isinstance(submission_of(run).job, TrainJob)
        if what == "stop" and trains and self.look(run, attempt).state == "running":
            _ask_about("scancel", "--signal=TERM", job)
        else:
            _ask_about("scancel", job)

    def fetch_log(self, run: Run, attempt: Attempt) -> None:
        """Slurm writes the log, on the file system that it shares with the service."""


def name_of(run: Run, attempt: int) -> str:
    """By which Slurm and people know the attempt."""
    return f"{run.id}-{attempt}"


def _body() -> str:
    """launch/slurm/train.sbatch without its head: what follows the line that both set."""
    text = (LAUNCH / "slurm" / "train.sbatch").read_text()
    return text.partition("set -euo pipefail\n")[2]


def _require(program: str) -> None:
    if shutil.which(program) is None:
        raise UserError(f"{program} is not on this machine; start the server where Slurm's commands are")


def _ask_about(*words: str) -> str:
    """What a command says of a job; empty where Slurm does not know it."""
    try:
        return _call(*words)
    except UserError as error:
        if any(said in str(error) for said in UNKNOWN_JOB):
            return ""
        raise Unreachable(str(error)) from None  # which command it is does not change, so the fault is elsewhere


def _call(*words: str) -> str:
    """UserError where Slurm refuses; Unreachable where it does not answer."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=CALL_S, check=False, env=_environment())
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{words[0]} has not answered for {CALL_S} s") from None
    said = done.stderr.strip() or done.stdout.strip()
    if done.returncode and any(word in said for word in NO_CONTROLLER):
        raise Unreachable(f"{words[0]}: {said}")
    if done.returncode:
        raise UserError(f"{words[0]}: {said}")
    return done.stdout


def _environment() -> dict[str, str]:
    """Without what a Slurm job around the server would say about itself."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name == "SLURM_CONF"}


def _read(file: Path) -> Json | None:
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None
