"""Jobs on Kubernetes by the real kubectl, against a stand-in for the API server (tests/support/kubernetes.py)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamella.service.context import Service
from lamella.service.jobs import Submission
from lamella.service.planning import new_run as from_submission
from lamella.service.store import Run
from support.kubernetes import Cluster
from support.service import settle, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not here (Debian: kubernetes-client)"),
]
TRAINING = {"kind": "train", "recipe": {"model": "moe", "out": "run", "samples_per_step": 2}}
EVALUATION = {"kind": "evaluate", "folder": "moe"}
JOBSET, JOB = "jobset.sigs.k8s.io/jobset-name", "batch.kubernetes.io/job-name"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    found = Cluster(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(found.config))
    monkeypatch.setenv("HOME", str(tmp_path))  # kubectl keeps there what it has asked the server
    yield found
    found.go_away()


def submit(service: Service, job: dict) -> str:
    settings = {"nodes": 2, "gpus_per_node": 1, "volume": "shared-data"}
    made = Submission.model_validate({"job": job, "executor": "kubernetes", "cluster": settings})
    made.check()
    return service.store.create(from_submission(made, "ada", 0, 0))[0].id


def created(service: Service, run_id: str, cluster: Cluster, number: int = 1) -> str:
    """The name of the object of the attempt, once it is there."""
    name = f"{run_id}-{number}"
    until(service.store, run_id, lambda _: name in cluster.objects, 60, service.scheduler.tick)
    return name


def comes_to(service: Service, run_id: str, *states: str) -> Run:
    return until(service.store, run_id, lambda run: run.state in states, 60, service.scheduler.tick)


def test_training_is_paused_resumed_and_finished(service: Service, cluster: Cluster) -> None:
    """A pause suspends the TrainJob, whose pods save and end; what goes on is another one."""
    run_id = submit(service, TRAINING)
    name = created(service, run_id, cluster)
    assert cluster.objects[name]["spec"]["trainer"]["numNodes"] == 2
    cluster.becomes(name, jobsStatus=[{"name": "node", "active": 1, "ready": 2, "succeeded": 0, "failed": 0}])
    comes_to(service, run_id, "running")
    service.store.wish(run_id, "paused")
    suspends = lambda _: cluster.objects[name]["spec"].get("suspend") is True  # noqa: E731
    until(service.store, run_id, suspends, 60, service.scheduler.tick)
    assert service.store.get(run_id).state == "pausing"
    cluster.becomes(name, conditions=[{"type": "Suspended", "status": "True", "reason": "Suspended"}])
    comes_to(service, run_id, "paused")
    assert name not in cluster.objects
    service.store.wish(run_id, "running")
    second = created(service, run_id, cluster, 2)
    cluster.becomes(second, jobsStatus=[{"name": "node", "active": 1}])
    comes_to(service, run_id, "running")
    cluster.becomes(second, conditions=[{"type": "Complete", "status": "True", "reason": "JobsCompleted"}])
    assert settle(service, run_id).state == "succeeded"
    assert cluster.created == [name, second]
    assert [attempt.failure for attempt in service.store.attempts(run_id)] == ["preempted", None]


def test_a_failed_job_says_why(service: Service, cluster: Cluster) -> None:
    run_id = submit(service, EVALUATION)
    name = created(service, run_id, cluster)
    why = {"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded", "message": "Job has reached its limit"}
    cluster.becomes(name, conditions=[why], failed=1)
    run = settle(service, run_id)
    assert (run.state, run.failure) == ("failed", "infra")
    assert "BackoffLimitExceeded: Job has reached its limit" in run.reason


def test_a_job_is_cancelled(service: Service, cluster: Cluster) -> None:
    run_id = submit(service, EVALUATION)
    name = created(service, run_id, cluster)
    cluster.becomes(name, active=1)
    comes_to(service, run_id, "running")
    service.store.wish(run_id, "cancelled")
    assert settle(service, run_id).state == "cancelled"
    assert name not in cluster.objects


def test_new_lines_of_all_pods_come_once(service: Service, cluster: Cluster) -> None:
    """Also while one pod has not started, and where two lines share a second."""
    run_id = submit(service, TRAINING)
    name = created(service, run_id, cluster)
    for pod in ("a-0", "b-1"):
        cluster.add_pod(f"{name}-{pod}", JOBSET, name, "node")
    cluster.add_pod("another", JOBSET, "another-job", "node")
    cluster.logs["another"] = [("2026-11-29T02:00:00.000000001Z", "not of this run")]
    cluster.logs[f"{name}-b-1"] = [
        ("2026-11-29T02:00:00.1Z", "rank 1: step 1"),
        ("2026-11-29T02:00:00.100000001Z", "rank 1: step 2"),
    ]
    cluster.becomes(name, jobsStatus=[{"name": "node", "active": 1}])
    log = service.place.log(run_id)
    until(service.store, run_id, lambda _: log.is_file(), 60, service.scheduler.tick)
    assert log.read_text().splitlines() == [f"{name}-b-1: rank 1: step 1", f"{name}-b-1: rank 1: step 2"]
    cluster.logs[f"{name}-a-0"] = [("2026-11-29T02:00:05.5Z", "rank 0: step 1")]
    cluster.logs[f"{name}-b-1"].append(("2026-11-29T02:00:00.2Z", "rank 1: step 3"))
    until(service.store, run_id, lambda _: len(log.read_text().splitlines()) > 2, 60, service.scheduler.tick)
    cluster.logs[f"{name}-b-1"].append(("2026-11-29T02:00:09Z", "rank 1: done: it's 100%"))
    cluster.becomes(name, conditions=[{"type": "Complete", "status": "True"}])
    assert settle(service, run_id).state == "succeeded"
    lines = log.read_text().splitlines()
    assert sorted(lines[2:4]) == [f"{name}-a-0: rank 0: step 1", f"{name}-b-1: rank 1: step 3"]
    assert lines[4:] == [f"{name}-b-1: rank 1: done: it's 100%"]


def test_a_cluster_that_does_not_answer_loses_and_doubles_nothing(service: Service, cluster: Cluster) -> None:
    cluster.go_away()
    run_id = submit(service, EVALUATION)
    comes_to(service, run_id, "starting")
    for _ in range(3):
        service.scheduler.tick()
    cluster.come_back()
    name = created(service, run_id, cluster)
    cluster.becomes(name, active=1)
    comes_to(service, run_id, "running")
    cluster.go_away()
    seen = service.scheduler.executors["kubernetes"].look(service.store.get(run_id), service.store.attempts(run_id)[-1])
    assert seen.state == "unknown"
    assert "refused" in seen.reason
    service.scheduler.tick()
    assert service.store.get(run_id).state == "running"
    cluster.come_back()
    cluster.becomes(name, conditions=[{"type": "Complete", "status": "True"}])
    assert settle(service, run_id).state == "succeeded"
    assert cluster.created == [name]


def test_what_the_cluster_refuses_is_said(service: Service, cluster: Cluster) -> None:
    cluster.forbidden = True
    run = settle(service, submit(service, EVALUATION))
    assert (run.state, run.failure) == ("failed", "user_config")
    assert 'User "u" cannot' in run.reason


def test_an_object_that_somebody_deletes_is_made_again_as_another_attempt(service: Service, cluster: Cluster) -> None:
    run_id = submit(service, EVALUATION)
    name = created(service, run_id, cluster)
    del cluster.objects[name]
    created(service, run_id, cluster, 2)
    assert [attempt.failure for attempt in service.store.attempts(run_id)] == ["infra", None]
