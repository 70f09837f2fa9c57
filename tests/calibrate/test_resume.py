"""A calibration goes on where it was interrupted, with the same bits, and never mixes with another's folder."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from lamella.calibrate import CalibrationStep, calibrate
from lamella.calibrate.store import FINGERPRINT, LOCK, STREAMS, ResultFolder
from lamella.calibrate.stream import StreamFolder
from lamella.checkpoint.source import Checkpoint
from lamella.errors import UserError
from support.calibration import busiest, checkpoint, only_kept, random_tokens
from support.models import tiny_checkpoint
from support.tiers import slow_but

MODES: dict[str, dict[str, Any]] = {
    "forward": {},
    "gradients": {"gradients": True},
    "sequential": {"replacement": only_kept},
    "gradients, some layers": {"gradients": True, "layers": [1]},
    "sequential, some layers": {"replacement": only_kept, "layers": [1, 2]},
}


class PowerCut(Exception):
    pass


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    return checkpoint(tmp_path / "model", "llama")


def same(ours: dict[int, dict[str, Tensor]], theirs: dict[int, dict[str, Tensor]]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[layer][name], theirs[layer][name]) for layer in ours for name in theirs[layer]
    )


@pytest.mark.parametrize("stop_at", slow_but(range(1, 12), 1, 5, 9))
@pytest.mark.parametrize("mode", MODES)
def test_an_interrupted_calibration_goes_on(mode: str, stop_at: int, source: Checkpoint, tmp_path: Path) -> None:
    """Cut at each step in turn: in a pass, in the method, between a layer's result and its stream."""
    tokens, options = random_tokens(), MODES[mode] | {"method": {"name": "busiest"}}
    visits: Counter[int] = Counter()
    needed: list[CalibrationStep] = []
    steps: list[CalibrationStep] = []
    expected = calibrate(source, tokens, tmp_path / "whole", busiest, on_progress=needed.append, **options)

    def visit(layer: int, sample) -> dict[str, Tensor]:
        result = busiest(layer, sample)
        visits[layer] += 1
        return result

    def cut(step: CalibrationStep) -> None:
        steps.append(step)
        if len(steps) == stop_at:
            raise PowerCut

    try:
        calibrate(source, tokens, tmp_path / "cut", visit, on_progress=cut, **options)
    except PowerCut:
        assert len(steps) == stop_at
    found = calibrate(source, tokens, tmp_path / "cut", visit, on_progress=steps.append, **options)
    assert same(found, expected)
    # The step that was cut is done again, and if it was the method's, the pass that gives its sample; nothing else.
    done, once = (Counter((step.phase, step.layer) for step in steps) for steps in (steps, needed))
    again = done - once
    assert not once - done
    redone = {(s.phase, s.layer) for s in steps[max(0, stop_at - 2) : stop_at]}
    assert set(again) <= redone
    assert set(again.values()) <= {1}
    assert all(count == 1 + again.get(("method", layer), 0) for layer, count in visits.items())
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == sorted(
        [FINGERPRINT, LOCK, *(f"layer-{layer:04d}.safetensors" for layer in found)]
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_stored_result_is_not_computed_again(
    mode: str, source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut after each save, before the stream has moved on."""
    tokens, options = random_tokens(), MODES[mode] | {"method": {"name": "busiest"}}
    expected = calibrate(source, tokens, tmp_path / "whole", busiest, **options)
    visits: list[int] = []
    save = ResultFolder.save

    def save_and_stop(self: ResultFolder, layer: int, result: dict[str, Tensor]) -> None:
        save(self, layer, result)
        raise PowerCut

    def visit(layer: int, sample) -> dict[str, Tensor]:
        visits.append(layer)
        return busiest(layer, sample)

    monkeypatch.setattr(ResultFolder, "save", save_and_stop)
    for _ in expected:
        with pytest.raises(PowerCut):
            calibrate(source, tokens, tmp_path / "cut", visit, **options)
    monkeypatch.undo()
    assert same(calibrate(source, tokens, tmp_path / "cut", visit, **options), expected)
    assert sorted(visits) == sorted(expected)


def test_a_finished_calibration_is_only_read(source: Checkpoint, tmp_path: Path) -> None:
    first = calibrate(source, random_tokens(), tmp_path / "out", busiest, method={})
    steps: list[CalibrationStep] = []
    again = calibrate(source, random_tokens(), tmp_path / "out", busiest, method={}, on_progress=steps.append)
    assert same(again, first)
    assert not steps


@pytest.mark.parametrize("change", ["model", "text", "method", "mode", "layers"])
def test_another_calibrations_folder(change: str, source: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = dict(calibrate(source, random_tokens(), out, busiest, method={"name": "a"}))  # read before it is replaced
    stamp = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    method, tokens, options, message = {"name": "a"}, random_tokens(), {}, change
    if change == "model":
        source = Checkpoint.open(tiny_checkpoint(tmp_path / "model", sharded=True, seed=1))
    elif change == "text":
        tokens = random_tokens(seed=1)
    elif change == "method":
        method = {"name": "b"}
    else:
        options = {"gradients": True} if change == "mode" else {"layers": [0, 1]}
        message = "method"
    with pytest.raises(UserError, match=f"the calibration of .*{message}; overwrite it"):
        calibrate(source, tokens, out, busiest, method=method, **options)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == stamp
    (out / "mine.txt").write_text("kept")
    found = calibrate(source, tokens, out, busiest, method=method, overwrite=True, **options)
    assert same(found, calibrate(source, tokens, tmp_path / "fresh", busiest, method=method, **options))
    assert same(found, before) == (change in ("method", "mode"))
    assert (out / "mine.txt").read_text() == "kept"


def test_weights_written_anew_are_another_model(source: Checkpoint, tmp_path: Path) -> None:
    """Of the same size, as after training."""
    calibrate(source, random_tokens(), tmp_path / "out", busiest, method={})
    path = next(iter(source.tensors.values())).path
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(UserError, match="another model"):
        calibrate(source, random_tokens(), tmp_path / "out", busiest, method={})


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_refused(overwrite: bool, source: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not the folder of a calibration"):
        calibrate(source, random_tokens(), tmp_path / "out", busiest, method={}, overwrite=overwrite)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_folder_in_use_is_refused(source: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / LOCK), pytest.raises(UserError, match="another process"):
        calibrate(source, random_tokens(), tmp_path / "out", busiest, method={})


def test_results_of_another_method_leave_no_room_for_these(source: Checkpoint, tmp_path: Path) -> None:
    tokens, folder = random_tokens(), tmp_path / "out"
    calibrate(source, tokens, folder, busiest, method={"name": "small"})
    large: dict[str, Any] = {"result_bytes": 10**15}
    calibrate(source, tokens, folder, busiest, method={"name": "small"}, **large)  # all there
    with pytest.raises(UserError, match=r"calibration needs \d+\.\d+ GB"):
        calibrate(source, tokens, folder, busiest, method={"name": "large"}, overwrite=True, **large)
    assert ResultFolder(folder).has(0)


def test_streams_that_do_not_fit_are_refused_beforehand(tmp_path: Path) -> None:
    too_many = StreamFolder(tmp_path / "not" / "there" / STREAMS, (10**9, 512, 4096))
    with pytest.raises(UserError, match=r"needs \d+\.\d+ GB in .*, but only"):
        too_many.check_space(2)
    assert not (tmp_path / "not").exists()
    few = StreamFolder(tmp_path / STREAMS, (2, 4, 8))
    with few.writing("hidden", 0) as tensor:
        tensor.fill_(1)
    few.check_space(3)
    assert few.indices("hidden") == [0]
    assert few.open("hidden", 0).eq(1).all()
