"""The trackers beside TensorBoard, without a network: the same names and figures, and one run over its resumptions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lamella.errors import UserError
from lamella.run.folder import RunDir
from lamella.train.tracking import Tracker, Trackers, check_trackers
from support.models import trainable_moe
from support.scripts import script_module

pytestmark = pytest.mark.slow
check_trackers_script = script_module("check_trackers")  # it does so for all three, where they are installed


def train(folder: Path, tracker: Tracker, **values: object) -> subprocess.CompletedProcess:
    recipe = {
        "model": folder / "moe", "out": folder / "run", "data": f'["{folder / "text.txt"}"]', "seq_len": 32, "steps": 4,
        "samples_per_step": 2, "save_every_steps": 2, "heldout_samples": 2, "tensorboard": "false",
        "track": f"[{tracker}]",
    } | values  # fmt: skip
    words = [f"{name}={value}" for name, value in recipe.items()]
    environment = os.environ | {"WANDB_MODE": "offline"}
    command = [sys.executable, "-m", "lamella.worker", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    trainable_moe(tmp_path / "moe")
    (tmp_path / "text.txt").write_text("".join(f"Line {i} of a text about slices.\n" for i in range(2000)))
    return tmp_path


def test_a_resumed_run_is_one_run_of_the_tracker(folder: Path) -> None:
    pytest.importorskip("wandb")
    for more in ({"stop_at_step": 2}, {}):
        done = train(folder, "wandb", **more)
        assert done.returncode == 0, done.stderr
    run = RunDir(folder / "run")
    ids, kept = check_trackers_script.in_wandb(run)
    wanted = check_trackers_script.expected(run)
    assert len(ids) == 1
    assert set(wanted) == {0, 1, 2, 3, 4}
    assert {"loss", "routing/twin_share"} <= kept[4].keys()
    assert check_trackers_script.differences("wandb", ids, kept, wanted) == []
    kept[4]["loss"] += 1e-6
    assert len(check_trackers_script.differences("wandb", ids | {"another"}, kept, wanted)) == 2


def test_a_tracker_that_fails_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers = Trackers(["wandb"], RunDir(tmp_path), {"steps": 4})
    trackers.log({"loss": 1.0}, 0)
    trackers._open["wandb"].finish()  # so that what follows fails
    trackers.log({"loss": 1.0}, 1)
    assert trackers._open == {}
    trackers.log({"loss": 1.0}, 2)
    trackers.finish()
    assert json.loads((tmp_path / "tracking.json").read_text())["wandb"]


def test_a_tracker_that_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises((UserError, ValueError), match="mlflow"):
        check_trackers(["mlflow"])
