"""Jobs on Kubernetes: training as a TrainJob of Kubeflow Trainer v2, the others as a batch Job; by kubectl. No torch.

The recipe travels in the environment. Models and run directories lie on a volume that all nodes share, mounted at the
folder of the server, so that paths mean the same there; with the server outside of the cluster it must have it, too.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import cast

import yaml

from lamella.errors import UserError
from lamella.jsons import Json
from lamella.run.folder import write_atomic
from lamella.service.attempt import place_of
from lamella.service.executors.executor import Ask, Place, Seen, Unreachable, submission_of
from lamella.service.jobs import RECIPE, Submission, TrainJob
from lamella.service.store import Attempt, Run

MANIFEST = "job.yaml"
API = "trainer.kubeflow.org/v1alpha1"
MANAGER = "lamella.dev/service"
VOLUME = "shared"
CALL_S = 30
NO_SERVER = (
    "Unable to connect to the server", "was refused", "connection refused", "connection reset", "i/o timeout",
    "TLS handshake timeout", "no such host",
    "ServiceUnavailable", "InternalError", "Timeout", "context deadline exceeded", "EOF",
)  # fmt: skip
PODS_OF = {"trainjob": "jobset.sigs.k8s.io/jobset-name", "job": "batch.kubernetes.io/job-name"}
"""The label by which the pods of an object are known: a TrainJob becomes a JobSet of its name."""
MOST_PODS = 1000
FETCHED = "fetched.json"
GRACE_S = 600
"""Ranks get so long to save."""
LINE = re.compile(
    r"\[(?P<source>[^\]]+)\] (?P<second>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.(?P<fraction>\d+))?Z (?P<text>.*)"
)
SUSPENDED = Seen("ended", 143, None, "suspended")


class Kubernetes:
    """See `lamella.service.executors.executor.Executor`."""

    def __init__(self, place: Place):
        self.place = place

    def render(self, run: Run, attempt: int) -> dict[str, str]:
        """The manifest that is applied."""
        submission = submission_of(run)
        trains = isinstance(submission.job, TrainJob)
        manifest = self._train_job(run, attempt, submission) if trains else self._job(run, attempt, submission)
        return {MANIFEST: yaml.safe_dump(manifest, sort_keys=False)}

    def _train_job(self, run: Run, attempt: int, submission: Submission) -> Json:
        cluster = submission.cluster
        start = f'printf %s "$LAMELLA_RECIPE" > /tmp/{RECIPE} && cd "$LAMELLA_FOLDER" && exec torchrun '
        start += "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --max-restarts=0 "
        start += f"--shutdown-timeout={GRACE_S} -m lamella.worker /tmp/{RECIPE}"
        trainer: Json = {
            "image": cluster.image, "numNodes": cluster.nodes, "numProcPerNode": max(1, cluster.gpus_per_node),
            "resourcesPerNode": _resources(submission), "command": ["bash", "-c", start],
            "env": self._environment(submission),
        }  # fmt: skip
        spec: Json = {"runtimeRef": {"name": cluster.runtime}, "trainer": trainer}
        if cluster.volume:
            spec["runtimePatches"] = [self._patch(cluster.volume)]
        return {"apiVersion": API, "kind": "TrainJob", "metadata": _metadata(run, attempt, submission), "spec": spec}

    def _patch(self, claim: str) -> Json:
        pod: Json = {
            "volumes": [_volume(claim)],
            "terminationGracePeriodSeconds": GRACE_S,
            "containers": [{"name": "node", "volumeMounts": [self._mount()]}],
        }
        replicated = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
        return {
            "manager": MANAGER,
            "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [replicated]}}},
        }

    def _job(self, run: Run, attempt: int, submission: Submission) -> Json:
        words = ["lamella", *submission.job.words(self.place.folder(run.id), 1)]
        script = f'printf %s "$LAMELLA_RECIPE" > /tmp/{RECIPE} && cd "$LAMELLA_FOLDER" && exec "$@"'
        own = str(self.place.folder(run.id) / RECIPE)
        words = [f"/tmp/{RECIPE}" if word == own else word for word in words if not word.startswith("--json=")]
        container: Json = {
            "name": "job", "image": submission.cluster.image, "command": ["bash", "-c", script, "bash", *words],
            "env": self._environment(submission), "resources": _resources(submission),
        }  # fmt: skip
        pod: Json = {"restartPolicy": "Never", "containers": [container]}
        if submission.cluster.volume:
            container["volumeMounts"] = [self._mount()]
            pod["volumes"] = [_volume(submission.cluster.volume)]
        labels = _metadata(run, attempt, submission)["labels"]
        spec = {"backoffLimit": 0, "template": {"metadata": {"labels": labels}, "spec": pod}}
        return {
            "apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(run, attempt, submission), "spec": spec,
        }  # fmt: skip

    def _environment(self, submission: Submission) -> list[Json]:
        recipe = submission.job.files().get(RECIPE, "")
        return [{"name": "LAMELLA_RECIPE", "value": recipe}, {"name": "LAMELLA_FOLDER", "value": str(self.place.cwd)}]

    def _mount(self) -> Json:
        return {"name": VOLUME, "mountPath": str(self.place.cwd)}

    def submit(self, run: Run, attempt: Attempt) -> Json:
        """Apply the manifest; applied twice it is still one job."""
        manifest = self.render(run, attempt.number)[MANIFEST]
        _kubectl("apply", "-f", "-", given=manifest)
        return {"name": name_of(run, attempt.number)}

    def look(self, run: Run, attempt: Attempt) -> Seen:
        """From the conditions of the object."""
        try:
            shown = _kubectl("get", *self._target(run, attempt), "--ignore-not-found", "-o", "json")
        except (UserError, Unreachable) as error:  # no answer is no news
            return Seen("unknown", reason=str(error))
        if not shown.strip():
            return Seen("gone", reason="the cluster knows nothing of the job any more")
        seen = seen_in(json.loads(shown).get("status") or {})
        if seen == SUSPENDED:  # its pods have ended; the next attempt is another object
            _kubectl("delete", *self._target(run, attempt), "--ignore-not-found", "--wait=false")
        return seen

    def ask(self, run: Run, attempt: Attempt, what: Ask) -> None:
        """Suspend training, whose pods get SIGTERM and time to save; delete the object of other jobs, or to kill."""
        if what == "stop" and isinstance(submission_of(run).job, TrainJob):
            _kubectl("patch", *self._target(run, attempt), "--type=merge", "-p", '{"spec": {"suspend": true}}')
        else:
            _kubectl("delete", *self._target(run, attempt), "--ignore-not-found", "--wait=false")

    def fetch_log(self, run: Run, attempt: Attempt) -> None:
        """The new lines of all pods, each after the pod's name; which is the last of each pod is kept in a file."""
        kind, namespace = _kind_of(run), submission_of(run).cluster.namespace
        file = place_of(self.place.folder(run.id), attempt.number) / FETCHED
        last: dict[str, str] = json.loads(file.read_text()) if file.is_file() else {}
        words = [f"--namespace={namespace}", f"--selector={PODS_OF[kind]}={name_of(run, attempt.number)}"]
        words += ["--all-containers", "--prefix", "--timestamps", "--tail=-1", f"--max-log-requests={MOST_PODS}"]
        words.append("--ignore-errors")  # else a pod that has not started withholds the lines of all others
        if last:
            words.append(f"--since-time={min(last.values())[:19]}Z")
        text, new = lines_after(_kubectl("logs", *words), last)
        if not text:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        with self.place.log(run.id).open("a") as log:
            log.write(text)
        write_atomic(file, json.dumps(new))

    def _target(self, run: Run, attempt: Attempt) -> list[str]:
        namespace = submission_of(run).cluster.namespace
        return [f"{_kind_of(run)}/{name_of(run, attempt.number)}", f"--namespace={namespace}"]


def _kind_of(run: Run) -> str:
    return "trainjob" if isinstance(submission_of(run).job, TrainJob) else "job"


def lines_after(said: str, last: dict[str, str]) -> tuple[str, dict[str, str]]:
    """(the lines of `kubectl logs --prefix --timestamps` that are new, the time of the last one of each container).

    Args:
        last: what the call before this one returned, such as {"pod/a/node": "2026-11-29T02:00:00.123456789Z"}.
    """
    kept, newest = [], dict(last)
    for line in said.splitlines():
        found = LINE.match(line)
        if found is None:
            continue
        source, when = found["source"], f"{found['second']}.{found['fraction'] or '':0<9}Z"
        if when > last.get(source, ""):
            kept.append(f"{source.split('/')[1]}: {found['text']}\n")
            newest[source] = max(when, newest.get(source, ""))
    return "".join(kept), newest


def seen_in(status: Json) -> Seen:
    """How a TrainJob or Job is, from its status."""
    conditions = {c["type"]: c for c in cast(list[Json], status.get("conditions") or []) if c.get("status") == "True"}
    if "Complete" in conditions:
        return Seen("ended", 0)
    if "Failed" in conditions:
        why = conditions["Failed"]
        return Seen("ended", 1, None, f"{why.get('reason', '')}: {why.get('message', '')}")
    if "Suspended" in conditions:
        return SUSPENDED
    jobs = cast(list[Json], status.get("jobsStatus") or [])
    is_active = bool(status.get("active")) or any(job.get("active") for job in jobs)
    return Seen("running" if is_active else "waiting")


def name_of(run: Run, attempt: int) -> str:
    """By which the cluster knows the attempt."""
    return f"{run.id}-{attempt}"


def _metadata(run: Run, attempt: int, submission: Submission) -> Json:
    labels = {"app.kubernetes.io/name": "lamella", "lamella.dev/run": run.id}
    labels["lamella.dev/user"] = re.sub(r"[^A-Za-z0-9_.-]", "-", run.user).strip("-_.")[:63] or "nobody"
    return {"name": name_of(run, attempt), "namespace": submission.cluster.namespace, "labels": labels}


def _resources(submission: Submission) -> Json:
    cluster = submission.cluster
    limits: dict[str, str] = {"cpu": str(cluster.cores_per_node)}
    if cluster.gpus_per_node:
        limits["nvidia.com/gpu"] = str(cluster.gpus_per_node if isinstance(submission.job, TrainJob) else 1)
    return {"limits": limits, "requests": dict(limits)}


def _volume(claim: str) -> Json:
    return {"name": VOLUME, "persistentVolumeClaim": {"claimName": claim}}


def _kubectl(*words: str, given: str | None = None) -> str:
    if shutil.which("kubectl") is None:
        raise UserError("kubectl is not on this machine; start the server where it is, with access to the cluster")
    command = ["kubectl", f"--request-timeout={CALL_S}s", *words]
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=2 * CALL_S, check=False)
    except subprocess.TimeoutExpired:
        raise Unreachable(f"kubectl {words[0]} has not answered for {2 * CALL_S} s") from None
    if done.returncode:
        said = f"kubectl {words[0]}: {done.stderr.strip()}"
        raise Unreachable(said) if any(word in said for word in NO_SERVER) else UserError(said)
    return done.stdout
