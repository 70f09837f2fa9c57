"""The dense model out of a converted one: bit for bit while the router chooses the slices, on request afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lamella.conversion import SliceOptions, convert
from lamella.errors import UserError
from lamella.export import export
from support.models import tiny_checkpoint
from support.trained_model import save_trained

Tensors = dict[str, torch.Tensor]


def change(folder: Path, how: Callable[[Tensors], None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    how(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def a_router_row(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.router.weight"][0, 0] = 1e-3


def a_bias(tensors: Tensors) -> None:
    bias = tensors["model.layers.2.mlp.router.selection_bias"]
    bias[-1] = -bias[-1] if len(bias) == 4 else 10.0  # twin: the last pair takes its copy; flat: the last copy is taken


@pytest.mark.parametrize("routing", ["twin", "flat"])
@pytest.mark.parametrize("how", [a_router_row, a_bias])
def test_refused_once_the_router_chooses_copies(tmp_path: Path, routing: str, how: Callable[[Tensors], None]) -> None:
    dense = tiny_checkpoint(tmp_path / "dense")
    convert(dense, tmp_path / "moe", SliceOptions(slices=4, routing=routing))
    original = load_file(dense / "model.safetensors")
    assert export(tmp_path / "moe", "dense", tmp_path / "back").max_abs_logit_diff is not None
    change(tmp_path / "moe", how)
    with pytest.raises(UserError, match="dense cannot hold this model exactly: its router chooses trained copies"):
        export(tmp_path / "moe", "dense", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    export(tmp_path / "moe", "dense", tmp_path / "again", mode="dense")
    for folder in ("back", "again"):
        found = load_file(tmp_path / folder / "model.safetensors")
        assert found.keys() == original.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in original.items())


def test_copies_that_are_the_slices_lose_nothing(tmp_path: Path) -> None:
    """Any choice among pairs of equals is the dense model."""
    dense = tiny_checkpoint(tmp_path / "dense")
    convert(dense, tmp_path / "moe", SliceOptions(slices=4, noise=0.0))
    change(tmp_path / "moe", a_router_row)
    export(tmp_path / "moe", "dense", tmp_path / "back")
    change(tmp_path / "moe", lambda tensors: tensors["model.layers.0.mlp.experts.trainable_down_proj"].add_(1))
    with pytest.raises(UserError, match="trained copies"):
        export(tmp_path / "moe", "dense", tmp_path / "refused")


def test_a_mode_that_a_target_does_not_compute_is_refused(tmp_path: Path) -> None:
    source = save_trained(tmp_path / "moe")
    with pytest.raises(UserError, match="--mode dense has no effect on --to glm4-moe, which computes the model routed"):
        export(source, "glm4-moe", tmp_path / "out", mode="dense")
    with pytest.raises(UserError, match=r"mode is 'dens'; it must be one of .*did you mean 'dense'"):
        export(source, "glm4-moe", tmp_path / "out", mode="dens")
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]
