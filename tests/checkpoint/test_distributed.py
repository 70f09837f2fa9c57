"""Distributed checkpoints from elsewhere run no code, and ours read back as torch reads them."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from lamella.checkpoint.distributed import WeightsOnlyPlanner, checkpoint_reader
from lamella.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def state() -> dict:
    return {
        "weights": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "counts": torch.tensor([3, 4], dtype=torch.int32),
        "schedule": {"step": 5, "rates": [1e-3, 2.5], "name": "cosine"},
    }


def empty() -> dict:
    return {
        "weights": torch.zeros(2, 3, dtype=torch.bfloat16),
        "counts": torch.zeros(2, dtype=torch.int32),
        "schedule": {"step": 0, "rates": [0.0, 0.0], "name": ""},
    }


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def load(folder: str, into: dict) -> dict:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(into, storage_reader=checkpoint_reader(folder), planner=WeightsOnlyPlanner(), no_dist=True)
    return into


@pytest.mark.parametrize("place", ["{}", "file://{}"])
def test_our_reader_reads_what_torchs_reader_reads(tmp_path, place):
    dcp.save(state(), checkpoint_id=str(tmp_path), no_dist=True)
    expected = empty()
    dcp.load(expected, checkpoint_id=str(tmp_path), no_dist=True)
    found = load(place.format(tmp_path), empty())
    assert found["schedule"] == expected["schedule"] == state()["schedule"]
    assert torch.equal(found["weights"], expected["weights"])
    assert torch.equal(found["counts"], expected["counts"])


@pytest.mark.faults
def test_a_forged_metadata_file_runs_nothing(tmp_path):
    dcp.save(state(), checkpoint_id=str(tmp_path), no_dist=True)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(CheckpointException, match=r"posix\.mkdir"):
        load(str(tmp_path), empty())
    assert not (tmp_path / "ran").exists()


@pytest.mark.faults
@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"not a pickle", pickle.dumps({"a": 1})])
def test_damaged_metadata_is_one_line(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match="no metadata of a checkpoint"):
        checkpoint_reader(str(tmp_path)).read_metadata()


@pytest.mark.faults
def test_a_forged_entry_runs_nothing(tmp_path):
    forged = state() | {"schedule": {"step": Bomb(tmp_path / "ran"), "rates": [0.0, 0.0], "name": ""}}
    dcp.save(forged, checkpoint_id=str(tmp_path), no_dist=True)
    with pytest.raises(CheckpointException, match=r"schedule\.step is no plain value"):
        load(str(tmp_path), empty())
    assert not (tmp_path / "ran").exists()
