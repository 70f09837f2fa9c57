"""Jobs on whatever cloud SkyPilot finds, as managed jobs, by the command `sky`. Imports neither it nor torch.

SkyPilot pins older libraries than the service needs, so it lives in an environment of its own with `sky` on the PATH.
What a job leaves on the disk of a machine goes with the machine. So the checkpoints of training are kept at a URL
(`checkpoint_folder: s3://...`), and the bucket of the cluster's settings is mounted as the folder in which jobs run:
models, run directories and exports lie there.
"""

from __future__ import annotations

import json
import re
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
FAILURES = {"FAILED_NO_RESOURCE": "infra", "FAILED_CONTROLLER": "infra", "FAILED_PRECHECKS": "user_config"}
"""What SkyPilot knows better than an exit code; FAILED_PRECHECKS: no cloud has such machines, or none is set up."""
NO_SERVER = (
    "ApiServerConnectionError", "Could not connect to SkyPilot API server", "ServerTemporarilyUnavailableError",
    "Connection refused", "Max retries exceeded", "timed out",
)  # fmt: skip
NO_CONTROLLER, NO_CLUSTER = "No in-progress managed jobs", "ClusterDoesNotExist"
"""What `sky jobs queue` says while its controller is stopped, and `--refresh` before there was ever one."""
DRIVERS = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}
"""Scheme of a URL -> the package that fsspec needs for it."""
COLOR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
SHARED = "/lamella"
"""The bucket is mounted here."""
RANKS = """printf %s "$LAMELLA_RECIPE" > /tmp/recipe.yaml
head_node=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)
exec torchrun --nnodes="$SKYPILOT_NUM_NODES" --node-rank="$SKYPILOT_NODE_RANK" \\
  --nproc-per-node=RANKS_PER_NODE --master-addr="$head_node" --master-port=29400 \\
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --max-restarts=0 --shutdown-timeout=280 \\
  -m lamella.worker /tmp/recipe.yaml
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
            "setup": f"pip install --quiet lamella=={metadata.version('lamella')}{_drivers(submission)}\n",
            "run": self._script(run, submission),
        }  # fmt: skip
        if cluster.bucket:  # cached: its other mode can neither append nor write in the middle of a file
            task["file_mounts"] = {SHARED: {"source": cluster.bucket, "mode": "MOUNT_CACHED"}}
        return {TASK: yaml.safe_dump(task, sort_keys=False)}

    def _script(self, run: Run, submission: Submission) -> str:
        begin = "set -e\n" + (f"cd {SHARED}\n" if submission.cluster.bucket else "")
        if isinstance(submission.job, TrainJob):
            return begin + RANKS.replace("RANKS_PER_NODE", str(max(1, submission.cluster.gpus_per_node)))
        own = str(self.place.folder(run.id) / RECIPE)
        words = submission.job.words(self.place.folder(run.id), 1)
        words = [f"/tmp/{RECIPE}" if word == own else word for word in words if not word.startswith("--json=")]
        return f'{begin}printf %s "$LAMELLA_RECIPE" > /tmp/{RECIPE}\nexec {shlex.join(["lamella", *words])}\n'

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
        return seen_in(str(jobs[0].get("status", "")), str(jobs[0].get("failure_reason") or ""))

    def ask(self, run: Run, attempt: Attempt, what: Ask) -> None:
        """Cancel the managed job; training goes on later from its checkpoints in a bucket."""
        try:
            _sky("jobs", "cancel", "--yes", f"--name={name_of(run, attempt.number)}")
        except UserError as error:
            if NO_CONTROLLER not in str(error):  # else nothing runs
                raise

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


def seen_in(status: str, why: str = "") -> Seen:
    """How a managed job is, from its status."""
    state = status.rpartition(".")[2]
    reason = f"SkyPilot: {state}{f', {why}' if why else ''}"
    if state in CODES:
        return Seen("ended", CODES[state], reason=reason)
    if state in FAILURES:
        return Seen("ended", 1, {"failure": FAILURES[state], "reason": reason})
    return Seen("waiting" if state in WAITING else "running")


def name_of(run: Run, attempt: int) -> str:
    """By which SkyPilot knows the attempt."""
    return f"{run.id}-{attempt}"


def _drivers(submission: Submission) -> str:
    """The packages, each after a space, by which fsspec reaches the buckets that the job names."""
    schemes = {text.partition("://")[0] for _, text in submission.strings() if "://" in text}
    return "".join(f" {name}" for name in sorted({DRIVERS[scheme] for scheme in schemes & DRIVERS.keys()}))


def _queue() -> list[Json]:
    """All managed jobs of this user, also those that have ended; a controller that has stopped is started for it."""
    words = ["jobs", "queue", "--all", "--verbose", "--output=json"]
    try:
        return jobs_in(_sky(*words))
    except UserError as error:
        if NO_CONTROLLER not in str(error):
            raise
    try:
        return jobs_in(_sky(*words, "--refresh"))
    except UserError as error:
        if NO_CLUSTER in str(error):  # nothing was ever submitted
            return []
        raise


def jobs_in(said: str) -> list[Json]:
    """The jobs of `sky jobs queue --output=json`; lines about its own server come before them.

    Raises:
        Unreachable: there are none to be read.
    """
    lines = said.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith("[")), len(lines))
    try:
        return list(json.loads("\n".join(lines[begin:])))
    except ValueError:
        raise Unreachable(f"sky jobs queue gave no JSON, but {said[:200]!r}") from None


def _sky(*words: str) -> str:
    if shutil.which("sky") is None:
        raise UserError("`sky` is not on this machine; install skypilot in an environment of its own, on the PATH")
    try:
        done = subprocess.run(
            ["sky", *words], capture_output=True, text=True, timeout=CALL_S, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise Unreachable(f"sky {words[1]} has not answered for {CALL_S} s") from None
    if done.returncode:
        said = f"sky {words[0]} {words[1]}: {COLOR.sub('', done.stderr.strip() or done.stdout.strip())[-2000:]}"
        raise Unreachable(said) if any(word in said for word in NO_SERVER) else UserError(said)
    return done.stdout
