"""Jobs on whatever cloud SkyPilot finds, as managed jobs, by the command `sky`. Imports neither it nor torch.

SkyPilot pins older libraries than the service needs, so it lives in an environment of its own with `sky` on the PATH.
Models and run directories must be where the machines reach them: in buckets (`checkpoint_folder: s3://...`) or on hubs.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from importlib import metadata

import yaml

from lamella.errors import UserError
from lamella.jsons import Json
from lamella.run.folder import write_atomic
from lamella.service.attempt import place_of
from lamella.service.executors.executor import Ask, Place, Seen, Unreachable, submission_of
from lamella.service.jobs import RECIPE, Submission, TrainJob
from lamella.service.store import Attempt, Run

TASK, FETCHED = "task.yaml", "fetched.log"
CALL_S = 600
WAITING = frozenset({"PENDING", "SUBMITTED", "STARTING", "RECOVERING"})
CODES = {"SUCCEEDED": 0, "CANCELLED": 143, "FAILED": 1, "FAILED_SETUP": 1}
INFRA = frozenset({"FAILED_NO_RESOURCE", "FAILED_CONTROLLER", "FAILED_PRECHECKS"})
RANKS = """set -e
printf %s "$LAMELLA_RECIPE" > recipe.yaml
head_node=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)
exec torchrun --nnodes="$SKYPILOT_NUM_NODES" --node-rank="$SKYPILOT_NODE_RANK" \\
  --nproc-per-node="${SKYPILOT_NUM_GPUS_PER_NODE:-1}" --master-addr="$head_node" --master-port=29400 \\
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --max-restarts=0 --shutdown-timeout=280 \\
  -m lamella.worker recipe.yaml
"""


class SkyPilot:
    """See `lamella.service.executors.executor.Executor`."""

    def __init__(self, place: Place):
        self.place = place

    def render(self, run: Run, attempt: int) -> dict[str, str]:
        """The task."""
        submission = submission_of(run)
        cluster, trains = submission.cluster, isinstance(submission.job, TrainJob)
        resources: Json = {"cpus": f"{cluster.cores_per_node}+", "use_spot": cluster.spot}
        if cluster.gpus_per_node:
            resources["accelerators"] = f"{cluster.gpu or 'H100'}:{cluster.gpus_per_node if trains else 1}"
        if cluster.cloud:
            resources["infra"] = cluster.cloud
        resources["job_recovery"] = {"strategy": "EAGER_NEXT_REGION", "max_restarts_on_errors": 3 if trains else 0}
        task = {
            "name": name_of(run, attempt), "num_nodes": cluster.nodes if trains else 1, "resources": resources,
            "envs": {"LAMELLA_RECIPE": submission.job.files().get(RECIPE, "")},
            "setup": f"pip install --quiet lamella=={metadata.version('lamella')}\n",
            "run": RANKS if trains else self._command(run, submission),
        }  # fmt: skip
        return {TASK: yaml.safe_dump(task, sort_keys=False)}

    def _command(self, run: Run, submission: Submission) -> str:
        own = str(self.place.folder(run.id) / RECIPE)
        words = submission.job.words(self.place.folder(run.id), 1)
        words = ["recipe.yaml" if word == own else word for word in words if not word.startswith("--json=")]
        return f'set -e\nprintf %s "$LAMELLA_RECIPE" > recipe.yaml\nexec {shlex.join(["lamella", *words])}\n'

    def submit(self, run: Run, attempt: Attempt) -> Json:
        """Launch a managed job, unless one of this name is there."""
        name = name_of(run, attempt.number)
        if not any(job.get("job_name") == name for job in _queue()):
            folder = self.place.folder(run.id)
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / TASK
            write_atomic(file, self.render(run, attempt.number)[TASK])
            _sky("jobs", "launch", "--yes", "--detach-run", f"--name={name}", str(file))
        return {"name": name}

    def look(self, run: Run, attempt: Attempt) -> Seen:
        """From the queue of managed jobs."""
        name = name_of(run, attempt.number)
        try:
            jobs = [job for job in _queue() if job.get("job_name") == name]
        except (UserError, Unreachable) as error:  # no answer is no news
            return Seen("unknown", reason=str(error))
        if not jobs:
            return Seen("gone", reason="SkyPilot knows nothing of the job any more")
        return seen_in(str(jobs[0].get("status", "")))

    def ask(self, run: Run, attempt: Attempt, what: Ask) -> None:
        """Cancel the managed job; training goes on later from its checkpoints in a bucket."""
        _sky("jobs", "cancel", "--yes", f"--name={name_of(run, attempt.number)}")

    def fetch_log(self, run: Run, attempt: Attempt) -> None:
        """What is new in the whole log; on another machine it begins anew, which is added with a line before it."""
        said = _sky("jobs", "logs", "--no-follow", "--tail=0", f"--name={name_of(run, attempt.number)}")
        file = place_of(self.place.folder(run.id), attempt.number) / FETCHED
        before = file.read_text() if file.is_file() else ""
        if said == before:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        with self.place.log(run.id).open("a") as log:
            log.write(said.removeprefix(before) if said.startswith(before) else f"--- it was started anew\n{said}")
        write_atomic(file, said)


def seen_in(status: str) -> Seen:
    """How a managed job is, from its status."""
    state = status.rpartition(".")[2]
    if state in CODES:
        return Seen("ended", CODES[state])
    if state in INFRA:
        return Seen("ended", 1, {"failure": "infra", "reason": f"SkyPilot: {state}"})
    return Seen("waiting" if state in WAITING else "running")


def name_of(run: Run, attempt: int) -> str:
    """By which SkyPilot knows the attempt."""
    return f"{run.id}-{attempt}"


def _queue() -> list[Json]:
    return list(json.loads(_sky("jobs", "queue", "--all", "--output", "json") or "[]"))


def _sky(*words: str) -> str:
    if shutil.which("sky") is None:
        raise UserError("`sky` is not on this machine; install skypilot in an environment of its own, on the PATH")
    try:
        done = subprocess.run(["sky", *words], capture_output=True, text=True, timeout=CALL_S, check=False)
    except subprocess.TimeoutExpired:
        raise Unreachable(f"sky {words[1]} has not answered for {CALL_S} s") from None
    if done.returncode:
        raise UserError(f"sky {words[0]} {words[1]}: {done.stderr.strip()[-2000:]}")
    return done.stdout
