"""Method "upcycle": copies that are the dense model at the start, and what is drawn anew where asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lamella.conversion import convert
from lamella.errors import UserError
from lamella.hf.models import load
from lamella.recipe.conversion import load_conversion
from support.models import WIDELY_TESTED, tiny_checkpoint

EXACT = 2e-5  # fp32, logits of order 1: weights that add up to 1 within a rounding, another order of sums


def upcycle(dense: Path, out: Path, *words: str) -> Path:
    convert(dense, out, load_conversion(None, ["method=upcycle", *words]).options)
    return out


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load(folder, torch.float32)(torch.arange(3, 43).view(2, 20) * 3 % 128).logits


EXACT_VARIANTS = {
    "sparse upcycling": ("experts=4", "top_k=2"),
    "sigmoid": ("experts=4", "top_k=2", "gate=sigmoid"),
    "virtual groups": ("experts=4", "granularity=3", "top_k=2"),
    "identity": ("experts=2", "top_k=1", "identity=true", "redraw=0.5", "noise=0.1"),
}


@pytest.mark.parametrize("family", WIDELY_TESTED)
@pytest.mark.parametrize("variant", EXACT_VARIANTS)
def test_copies_are_the_dense_model_at_the_start(tmp_path: Path, family: str, variant: str) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", family)
    out = upcycle(dense, tmp_path / "moe", *EXACT_VARIANTS[variant])
    assert (logits(out) - logits(dense)).abs().max() < EXACT


def test_a_token_chooses_whole_copies_in_virtual_groups(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense")
    model = load(upcycle(dense, tmp_path / "moe", "experts=4", "granularity=3", "top_k=2"))
    model(torch.arange(3, 63)[None])
    for layer in model.moe_layers:
        copies = layer.last_routing.expert_ids_TK.sort(dim=1).values // 3
        assert (copies.view(-1, 2, 3) == copies.view(-1, 2, 3)[..., :1]).all()
        assert len(copies.unique()) > 1


def test_drop_upcycling_redraws_half_of_the_neurons_from_what_they_replace(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", intermediate_size=512)
    made = load_file(upcycle(dense, tmp_path / "moe", "experts=2", "redraw=0.5") / "model.safetensors")
    source = load_file(dense / "model.safetensors")
    prefix = "model.layers.1.mlp."
    gate_up, down = made[f"{prefix}experts.trainable_gate_up_proj"], made[f"{prefix}experts.trainable_down_proj"]
    matrices = {"gate": gate_up[:, :512], "up": gate_up[:, 512:], "down": down.transpose(1, 2)}
    fresh = {}
    for name, copies_Efd in matrices.items():
        original_fd = source[f"{prefix}{name}_proj.weight"]
        original_fd = original_fd.T if name == "down" else original_fd
        fresh[name] = (copies_Efd != original_fd).any(-1)
        assert fresh[name].sum(1).tolist() == [256, 256]
        for e in range(2):
            new, old = copies_Efd[e][fresh[name][e]], original_fd[fresh[name][e]]
            # 256 * 32 draws: the standard error of the mean is std / 90, of the std std / 128
            assert abs(new.mean() - old.mean()) < 5 * old.std() / 90
            assert abs(new.std() / old.std() - 1) < 5 / 128
    assert torch.equal(fresh["gate"], fresh["up"])
    assert torch.equal(fresh["gate"], fresh["down"])
    assert not torch.equal(fresh["gate"][0], fresh["gate"][1])


def test_noise_differs_from_copy_to_copy_and_repeats_with_the_seed(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense")
    words = ("experts=2", "noise=0.1")
    a, b = (load_file(upcycle(dense, tmp_path / n, *words) / "model.safetensors") for n in ("a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    copies = a["model.layers.0.mlp.experts.trainable_down_proj"]
    noise = copies - load_file(dense / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert not torch.equal(noise[0], noise[1])
    assert abs(noise.std() / 0.01 - 1) < 0.1  # a tenth of the matrix's 0.1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["experts=2", "top_k=3"], "top_k is 3; it must be 1 to the 2 copies"),
        (["granularity=5"], "not divisible by 5"),
        (["redraw=2"], "redraw is 2.0; it must be a share"),
        (["router_std=0"], "could not tell the copies apart"),
        (["gate=unit"], "Input should be 'sigmoid' or 'softmax'"),
    ],
)
def test_bad_options(tmp_path: Path, words: list[str], message: str) -> None:
    dense = tiny_checkpoint(tmp_path / "dense")
    with pytest.raises(UserError, match=message):
        upcycle(dense, tmp_path / "moe", *words)
    assert not (tmp_path / "moe").exists()


def test_the_card_says_what_was_made(tmp_path: Path) -> None:
    out = upcycle(tiny_checkpoint(tmp_path / "dense"), tmp_path / "moe", "experts=3", "granularity=2", "redraw=0.5")
    assert "3 copies of each FFN in 2 shards" in (out / "README.md").read_text()
    assert json.loads((out / "lamella.json").read_text())["recipe"]["redraw"] == 0.5
