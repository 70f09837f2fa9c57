"""Which GPUs may be used, and the refusal to train an 8B model on the CPU because a driver is too old."""

from __future__ import annotations

from pathlib import Path

import pytest

from lamella.errors import UserError
from lamella.run.gpus import check_seen, driver_version, rank_environment, visible_gpus


@pytest.fixture
def devices(tmp_path):
    folder = tmp_path / "dev"
    folder.mkdir()
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm", "null"):
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    ("chosen", "count"), [(None, 3), ("0,2", 2), ("1", 1), ("", 0), ("-1", 0), ("0,-1,1", 1), ("GPU-3f2a, GPU-77", 2)]
)
def test_cuda_visible_devices_counts(devices, chosen, count):
    assert visible_gpus(devices, {} if chosen is None else {"CUDA_VISIBLE_DEVICES": chosen}) == count


def test_a_machine_without_gpus_has_none(tmp_path):
    assert visible_gpus(tmp_path, {"CUDA_VISIBLE_DEVICES": "0,1"}) == 0


def test_gpus_that_torch_does_not_see_are_a_refusal(devices, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    version = tmp_path / "version"
    version.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version:\n"
    )
    assert driver_version(version) == "550.54.15"
    with pytest.raises(UserError, match=r"has 3 NVIDIA GPUs.*CUDA 13\.0 and needs a driver of series 580.*550\.54\.15"):
        check_seen(0, "2.14.1", "13.0", devices, version)
    with pytest.raises(UserError, match="build without CUDA"):
        check_seen(0, "2.14.1+cpu", None, devices, version)
    check_seen(3, "2.14.1", "13.0", devices, version)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check_seen(0, "2.14.1", "13.0", devices, version)


def test_ranks_get_growing_segments_and_caches_on_their_own_node(devices, tmp_path):
    added = rank_environment(devices, {}, tmp_path)
    assert added["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        assert Path(added[name]).parent.parent == tmp_path
    assert len(set(added.values())) == 3
    assert rank_environment(devices, added, tmp_path) == {}  # what is set already stays
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        assert "PYTORCH_ALLOC_CONF" not in rank_environment(devices, {name: "max_split_size_mb:128"}, tmp_path)
    assert "PYTORCH_ALLOC_CONF" not in rank_environment(devices, {"CUDA_VISIBLE_DEVICES": ""}, tmp_path)
