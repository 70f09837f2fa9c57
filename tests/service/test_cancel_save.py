"""Case 20: a run is cancelled while it writes a checkpoint, which is whole afterwards, or not there."""

from __future__ import annotations

import os
from pathlib import Path
from pydoc_data import topics

import pytest

from lamella.run.folder import RunDir
from lamella.run.processes import kill_launch
from lamella.service import scheduler as scheduling
from lamella.service.context import Service
from lamella.service.executors.local import JOB_ID
from lamella.service.jobs import Submission
from lamella.service.planning import new_run
from support.models import trainable_moe
from support.service import service_in, settle, training, until

pytestmark = [pytest.mark.slow, pytest.mark.faults]


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    trainable_moe(tmp_path / "model")
    (tmp_path / "text.md").write_text("\n".join(topics.topics[name] for name in sorted(topics.topics)[:2]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAMELLA_CACHE", str(tmp_path / "cache"))
    return service_in(tmp_path / "home")


@pytest.mark.parametrize("patience_s", [120.0, 0.3], ids=["patient", "impatient"])
def test_cancel_while_a_checkpoint_is_written(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience_s: float
) -> None:
    """Whoever waits gets the whole checkpoint; where the processes are killed in the middle the one before it stands,
    and another attempt goes on from there."""
    monkeypatch.setattr(scheduling, "STOP_S", patience_s)
    monkeypatch.setenv("LAMELLA_FAULT", "slow-save:step=4,seconds=5")
    directory = RunDir(tmp_path / "run")
    values = training(tmp_path / "model", tmp_path / "text.md", directory.path, steps=8)
    submission = Submission.model_validate(values)
    run_id = service.store.create(new_run(submission, "ada", 0, 1, str(directory.path)))[0].id
    unfinished = directory.checkpoint(4).with_name("step-4.tmp")
    until(service.store, run_id, lambda _: unfinished.is_dir(), 120, service.scheduler.tick)
    assert directory.steps() == [2]
    assert service.store.wish(run_id, "cancelled").state == "cancelling"
    assert settle(service, run_id).state == "cancelled"
    assert kill_launch(run_id, JOB_ID) == 0  # nothing of it runs any more
    waited = patience_s > 5
    # a patient stop saves once more where it stands, and the oldest gives way
    assert 4 in directory.steps() if waited else directory.steps() == [2]
    for step in directory.steps():
        assert list(directory.store().problems(step)) == []
    assert unfinished.is_dir() != waited

    monkeypatch.delenv("LAMELLA_FAULT")
    service.store.retry(run_id)
    assert settle(service, run_id).state == "succeeded"
    assert directory.steps()[-1] == 8
    assert [line["step"] for line in directory.metrics() if line["step"]] == list(range(1, 9))
    assert not any(name.endswith(".tmp") for name in os.listdir(directory.checkpoints))
