"""Jobs on a real Slurm of one node: `scripts/with_slurm.py pytest tests/service/test_slurm_cluster.py`."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from pydoc_data import topics

import pytest

from lamella.run.folder import RunDir
from lamella.service.context import Service
from lamella.service.jobs import Submission
from lamella.service.planning import new_run as from_submission
from support.models import trainable_moe
from support.service import evaluation, service_in, settle, training, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("LAMELLA_TEST_SLURM" not in os.environ, reason="scripts/with_slurm.py starts a Slurm"),
]
CLUSTER = {"executor": "slurm", "cluster": {"nodes": 1, "gpus_per_node": 0, "cores_per_node": 1, "time": "00:20:00"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("shared")
    trainable_moe(found / "model")
    (found / "text.md").write_text("\n".join(topics.topics[name] for name in sorted(topics.topics)[:2]))
    return found


@pytest.fixture
def service(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LAMELLA_CACHE", str(folder / "cache"))
    return service_in(tmp_path / "home")


def submit(service: Service, values: dict) -> str:
    submission = Submission.model_validate({"job": values["job"]} | CLUSTER)
    submission.check()
    return service.store.create(from_submission(submission, "ada", *submission.needs(service.place.capacity)))[0].id


def test_a_refused_job_says_why(service: Service) -> None:
    run = settle(service, submit(service, evaluation("missing/model")), 200)
    assert (run.state, run.failure) == ("failed", "user_config")
    assert "missing/model" in run.reason


def test_training_is_paused_resumed_and_finished(service: Service, folder: Path) -> None:
    """The job saves when it is asked to, is not queued again by itself, and goes on in another job."""
    job = training(folder / "model", folder / "text.md", folder / "run", steps=60, save_every_steps=50)
    run_id = submit(service, job)
    directory = RunDir(folder / "run")
    until(service.store, run_id, lambda _: directory.status()["state"] == "running", 300, service.scheduler.tick)
    service.store.wish(run_id, "paused")
    run = until(
        service.store, run_id, lambda run: run.state in ("paused", "succeeded", "failed"), 300, service.scheduler.tick
    )
    assert run.state == "paused", (run, service.place.log(run_id).read_text())
    saved = directory.steps()
    assert saved
    assert saved[-1] < 60
    service.store.wish(run_id, "running")
    run = settle(service, run_id, 400)
    assert run.state == "succeeded", (run, service.place.log(run_id).read_text())
    assert [line["step"] for line in directory.all_metrics()] == list(range(1, 61))  # nothing lost, nothing twice
    assert [attempt.failure for attempt in service.store.attempts(run_id)] == ["preempted", None]


def test_what_waits_in_the_queue_is_cancelled(service: Service, folder: Path) -> None:
    job = training(folder / "model", folder / "text.md", folder / "other")
    subprocess.run(["scontrol", "update", "PartitionName=main", "State=DOWN"], check=True)
    try:
        run_id = submit(service, job)
        until(service.store, run_id, lambda run: run.state == "starting", 60, service.scheduler.tick)
        service.store.wish(run_id, "cancelled")
        assert settle(service, run_id, 60).state == "cancelled"
    finally:
        subprocess.run(["scontrol", "update", "PartitionName=main", "State=UP"], check=True)
    assert not (folder / "other" / "config.yaml").exists()
