"""The trackers beside TensorBoard, without a network: the same names and figures, and one run over its resumptions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamella.errors import UserError
from lamella.run.folder import RunDir
from lamella.train.tracking import Tracker, Trackers, check_trackers
from support.models import trainable_moe

pytestmark = pytest.mark.slow


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


def records(raw: bytes) -> Iterator[bytes]:
    """Of a .wandb file: LevelDB's log format (blocks of 32 KiB; checksum, length, kind) behind 7 bytes of its own."""
    at, parts = 7, b""
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
        parts += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_a_resumed_run_is_one_run_of_the_tracker(folder: Path) -> None:
    pytest.importorskip("wandb")
    for more in ({"stop_at_step": 2}, {}):
        done = train(folder, "wandb", **more)
        assert done.returncode == 0, done.stderr
    from wandb.proto.wandb_internal_pb2 import Record

    kept: dict[int, dict[str, float]] = {}
    ids = set()
    for file in sorted((folder / "run" / "wandb").glob("offline-run-*/*.wandb")):
        for data in records(file.read_bytes()):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                kept[int(items["_step"])] = {name: json.loads(value) for name, value in items.items()}
    assert len(ids) == 1
    lines = {line["step"]: line for line in RunDir(folder / "run").metrics()}
    assert set(kept) == set(lines) == {0, 1, 2, 3, 4}
    for step in (1, 2, 3, 4):
        assert kept[step]["loss"] == lines[step]["loss"]
        assert kept[step]["routing/twin_share"] == pytest.approx(sum(lines[step]["twin_share"]) / 2)


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
