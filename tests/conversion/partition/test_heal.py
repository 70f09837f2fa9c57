"""Healing: the masked dense FFN that trains is the converted layer, and what is written is nearer to the dense one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lamella.calibrate import CalibrationOptions, training_tokens
from lamella.calibrate.sample import FFN, hidden, output
from lamella.checkpoint.source import Checkpoint
from lamella.conversion.partition.decide import converted_ffn, decide, neuron_counts, routed_output
from lamella.conversion.partition.heal import Start, heal
from lamella.errors import UserError
from lamella.evaluate.differences import kl_divergence
from lamella.hf.models import load
from lamella.recipe.conversion import load_conversion
from lamella.recipe.methods.partition import Axes, Heal
from support.models import tiny_model
from support.partition_samples import generator, sample_of
from support.partitioning import dense_model, partition
from support.tiers import slow_but

HALF = "active=2"
HEAL = "heal={tokens: 16384, lr: 0.003, tokens_per_step: 256}"


def distance(dense: Path, converted: Path) -> float:
    """KL(dense || converted), nats per token, of the text that both were calibrated on."""
    options = CalibrationOptions(num_tokens=512, sequence_length=64)
    ids_NL = training_tokens(Checkpoint.open(dense), options, 512).ids_NL
    with torch.no_grad():
        logits = [load(folder, torch.float32)(ids_NL).logits.flatten(0, 1) for folder in (dense, converted)]
    return kl_divergence(*logits) / ids_NL.numel()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("gate", ["unit", "normalised", "softmax"])
def test_masked_neurons_give_what_the_experts_give(gated: bool, gate: str) -> None:
    sample = sample_of(gated)
    axes = Axes(parts=4, active=2, gate=gate, neurons="coactivation", shared=1)  # type: ignore[arg-type]
    decision = decide(sample, axes, generator())
    expected_TD, _ = routed_output(sample, decision, axes)
    ffn, counts = converted_ffn(sample.ffn, decision), neuron_counts(sample.ffn, decision, axes)
    found_TD = output(ffn, hidden(ffn, sample.x_TD) * counts(sample.x_TD))
    torch.testing.assert_close(found_TD, expected_TD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", slow_but(["llama", "opt", "gpt2", "gemma2", "phi3"], "llama", "opt"))
def test_a_healed_model_is_nearer_to_the_dense_one(tmp_path: Path, family: str) -> None:
    dense = dense_model(tmp_path / "dense", family)
    partition(dense, tmp_path / "plain", HALF)
    partition(dense, tmp_path / "healed", HALF, HEAL)
    before, after = distance(dense, tmp_path / "plain"), distance(dense, tmp_path / "healed")
    assert after < 0.8 * before
    assert json.loads((tmp_path / "healed" / "lamella.json").read_text())["heal"]["tokens"] == 16384
    assert not (tmp_path / "healed.calibration").exists()


def test_a_split_by_weights_alone_is_healed_too_and_leaves_nothing_beside(tmp_path: Path) -> None:
    dense = dense_model(tmp_path / "dense")
    words = ["neurons=contiguous", "router=random", "output=plain", "balance=null"]
    partition(dense, tmp_path / "plain", HALF, *words)
    partition(dense, tmp_path / "healed", HALF, HEAL, *words)
    assert distance(dense, tmp_path / "healed") < 0.8 * distance(dense, tmp_path / "plain")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "healed", "plain"]


def test_healing_changes_the_ffn_alone(tmp_path: Path) -> None:
    dense = dense_model(tmp_path / "dense")
    partition(dense, tmp_path / "plain", HALF)
    partition(dense, tmp_path / "healed", HALF, HEAL)
    plain, healed = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "healed"))
    assert plain.keys() == healed.keys()
    changed = {name.rpartition("mlp.")[2] for name in plain if not torch.equal(plain[name], healed[name])}
    assert changed == {
        "experts.trainable_gate_up_proj", "experts.trainable_down_proj", "shared.gate_up_proj", "shared.down_proj",
        "output_bias",
    }  # fmt: skip


def test_the_dense_model_is_as_it_was() -> None:
    model = tiny_model("llama")
    ids_NL = torch.randint(0, 60, (4, 16), generator=generator())
    with torch.no_grad():
        before = model(ids_NL).logits
    first = model.model.layers[0].mlp
    ffn = FFN(first.gate_proj.weight, first.up_proj.weight, first.down_proj.weight)
    kept_F = torch.zeros(len(ffn.up_FD)).index_fill_(0, torch.arange(len(ffn.up_FD) // 2), 1.0)
    seen: list[float] = []
    healed = heal(
        model, {0: Start(ffn, lambda _: kept_F)}, ids_NL.repeat(10, 1), Heal(tokens=640, lr=0.003, tokens_per_step=64),
        lambda step: seen.append(step.kl),
    )  # fmt: skip
    assert model.model.layers[0].mlp is first
    with torch.no_grad():
        assert torch.equal(model(ids_NL).logits, before)
    assert seen[-1] < seen[0]
    assert not torch.equal(healed[0].up_FD, ffn.up_FD)


def test_a_text_shorter_than_the_healing_is_read_again(tmp_path: Path) -> None:
    dense = dense_model(tmp_path / "dense")
    text = tmp_path / "text"
    text.mkdir()
    for i in range(12):
        (text / f"{i}.txt").write_text("".join(chr(97 + (i + j * j) % 26) for j in range(40)))
    options = CalibrationOptions(str(text), num_tokens=64, sequence_length=32)
    found = training_tokens(Checkpoint.open(dense), options, 2048).ids_NL
    assert found.shape == (64, 32)
    assert 1 < len(found.unique(dim=0)) < 64


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["heal={tokens: 0}"], "heal.tokens is 0"),
        (["heal={lr: -1}"], "heal.lr is -1"),
        (["heal={tokens: 10}"], "do not fill a window"),
        (["heal={}", "parts=4", "active=4"], "nothing to heal"),
    ],
)
def test_what_cannot_be_healed_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_conversion(None, ["method=partition", *words])
