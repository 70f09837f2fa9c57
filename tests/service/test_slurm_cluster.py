"""Jobs on a real Slurm of one node: `scripts/with_slurm.py pytest tests/service/test_slurm_cluster.py`."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from pydoc_data import topics

import pytest

from lamella.run.folder import RunDir
from lamella.service import progress
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
    run = settle(service, submit(service, evaluation("missing/model")), 300)
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
        until(service.store, run_id, lambda run: run.state == "starting", 300, service.scheduler.tick)
        service.store.wish(run_id, "cancelled")
        assert settle(service, run_id, 300).state == "cancelled"
    finally:
        subprocess.run(["scontrol", "update", "PartitionName=main", "State=UP"], check=True)
    assert not (folder / "other" / "config.yaml").exists()


def controller() -> int:
    """The process id of slurmctld."""
    return int((Path(os.environ["SLURM_CONF"]).parent / "slurmctld.pid").read_text())


def start_controller() -> None:
    """In the background; scripts/with_slurm.py ends it."""
    program = shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin")
    subprocess.run([str(program), "-f", os.environ["SLURM_CONF"]], check=True)
    deadline = time.monotonic() + 300
    while subprocess.run(["scontrol", "ping"], capture_output=True, check=False).returncode:
        assert time.monotonic() < deadline
        time.sleep(0.5)


def jobs_named(run_id: str) -> int:
    """How many jobs Slurm has had for a run."""
    shown = subprocess.run(["scontrol", "--oneliner", "show", "job"], capture_output=True, text=True, check=True).stdout
    return sum(f"JobName={run_id}-" in line for line in shown.splitlines())


def test_a_controller_that_is_down_loses_and_doubles_nothing(
    service: Service, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on meanwhile; what is asked and submitted meanwhile is done when it is back."""
    monkeypatch.setattr(progress, "STALE_S", 20.0)
    job = training(folder / "model", folder / "text.md", folder / "down", steps=100_000, save_every_steps=50_000)
    run_id = submit(service, job)
    directory, tick = RunDir(folder / "down"), service.scheduler.tick
    until(service.store, run_id, lambda run: run.state == "running", 300, tick)
    os.kill(controller(), signal.SIGKILL)
    step = directory.status()["step"]
    other = submit(service, evaluation("missing/model"))
    until(service.store, run_id, lambda run: run.state == "lost", 300, tick)
    assert "slurm controller" in service.store.get(run_id).reason
    until(service.store, other, lambda run: run.state == "starting", 300, tick)
    service.store.wish(run_id, "paused")
    until(service.store, run_id, lambda _: directory.all_metrics()[-1]["step"] > step + 5, 300, tick)
    assert not directory.steps()  # nobody could ask it to save
    start_controller()
    run = until(service.store, run_id, lambda run: run.state in ("paused", "failed"), 300, tick)
    assert run.state == "paused", (run, service.place.log(run_id).read_text())
    assert len(directory.steps()) == 1
    assert settle(service, other, 300).state == "failed"
    assert (jobs_named(run_id), jobs_named(other)) == (1, 1)
    assert [line["step"] for line in directory.all_metrics()] == list(range(1, directory.steps()[0] + 1))
    service.store.wish(run_id, "cancelled")


def test_a_controller_that_hangs_is_waited_for(service: Service, folder: Path) -> None:
    """Its commands end with a timeout after a while."""
    run_id = submit(service, evaluation("missing/model"))
    frozen = controller()
    os.kill(frozen, signal.SIGSTOP)
    try:
        until(service.store, run_id, lambda run: run.state == "starting", 300, service.scheduler.tick)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            service.scheduler.tick()
            time.sleep(1)
        assert service.store.get(run_id).state == "starting"
    finally:
        os.kill(frozen, signal.SIGCONT)
    assert settle(service, run_id, 300).failure == "user_config"
    assert jobs_named(run_id) == 1
