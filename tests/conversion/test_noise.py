"""The noise of the trainable copies: of the asked scale, by name and seed alone, the same in any piece."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lamella.conversion import SliceOptions, convert
from lamella.moe.noise import gaussian_noise
from lamella.moe.packed import Experts
from support.models import tiny_checkpoint
from support.slicing import unslice_ffn
from support.tensors import bits_equal, read_all

FFN = ("gate_proj", "up_proj", "down_proj")


def test_zero_noise_makes_equal_copies(tmp_path: Path) -> None:
    convert(tiny_checkpoint(tmp_path / "dense"), tmp_path / "moe", SliceOptions(slices=4, noise=0))
    moe = read_all(tmp_path / "moe")
    for name in [name for name in moe if "frozen" in name]:
        assert bits_equal(moe[name], moe[name.replace("frozen", "trainable")])


def noise_of(folder: Path, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What was added to gate, up [F, D] and down [D, F] of a layer."""
    moe, prefix = read_all(folder), f"model.layers.{layer}.mlp.experts."
    frozen, copies = (
        unslice_ffn(Experts(moe[f"{prefix}{kind}_gate_up_proj"], moe[f"{prefix}{kind}_down_proj"]))
        for kind in ("frozen", "trainable")
    )
    return tuple(copy - own for copy, own in zip(copies, frozen, strict=True))


def test_noise_has_the_asked_scale_per_matrix(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", hidden_size=64, intermediate_size=768)
    convert(dense, tmp_path / "moe", SliceOptions(slices=8, noise=0.25))
    source = read_all(dense)
    for part, noise in zip(FFN, noise_of(tmp_path / "moe", 1), strict=True):
        std = source[f"model.layers.1.mlp.{part}.weight"].std()
        # 49,152 samples: the sample std of a Gaussian scatters by 1/sqrt(2n) = 0.3%; five times that
        assert noise.std() / std == pytest.approx(0.25, rel=0.016)
        assert noise.mean().abs() < 5 * 0.25 * std / noise.numel() ** 0.5
        assert noise.abs().max() > 3 * 0.25 * std  # Gaussian, not uniform


def test_noise_depends_on_name_and_seed_alone(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense")
    runs = {
        "all": {},
        "subset": {"layers": "2"},
        "slices": {"slices": 8},
        "seed": {"seed": 1},
        "flat": {"routing": "flat"},
    }
    for name, changes in runs.items():
        convert(dense, tmp_path / name, SliceOptions(**{"slices": 4} | changes))
    base = noise_of(tmp_path / "all", 2)
    for name in ("subset", "slices", "flat"):
        assert all(torch.equal(a, b) for a, b in zip(base, noise_of(tmp_path / name, 2), strict=True)), name
    assert not any(torch.allclose(a, b) for a, b in zip(base, noise_of(tmp_path / "seed", 2), strict=True))
    assert not torch.allclose(base[0], base[1])  # gate and up have noise of their own
    assert not torch.allclose(base[0], noise_of(tmp_path / "all", 1)[0])


def test_any_range_of_noise_is_the_same() -> None:
    whole = gaussian_noise("w", 3, 0, 200_000)
    for start, count in ((0, 1), (65_535, 2), (65_536, 65_536), (123_457, 70_001)):
        assert torch.equal(gaussian_noise("w", 3, start, count), whole[start : start + count])
