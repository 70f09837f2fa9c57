"""Low-rank deltas on frozen experts: the paths agree with merged weights, and without them the model is as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lamella.architecture.moe import MoEConfig
from lamella.errors import UserError
from lamella.export import export
from lamella.hf.models import load
from lamella.moe.lora import Lora, lora_experts, merged
from lamella.moe.packed import Experts
from lamella.moe.paths.choose import apply_experts
from lamella.moe.routing import Routing
from support.models import save_tokenizer, tiny_moe
from support.titan import load_titan

S, T, D, F, R = 4, 33, 32, 16, 8
CONFIG = MoEConfig(S, S, F, S, (0,), lora_rank=R, lora_alpha=4.0)


def problem(trainable: int = S, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return 0.3 * torch.randn(shape, generator=generator)

    frozen, copies = (Experts(normal(E, 2 * F, D), normal(E, D, F)) for E in (S, trainable))
    lora = Lora(**{name: normal(*shape).requires_grad_() for name, shape in CONFIG.lora_shapes(D).items()})
    x_TD, K = normal(T, D).requires_grad_(), min(S, 3)
    ids_TK = torch.rand(T, S + trainable, generator=generator).topk(K).indices
    weights_TK = torch.rand(T, K, generator=generator).requires_grad_()
    for tensor in copies:
        tensor.requires_grad_()
    return x_TD, Routing(ids_TK, weights_TK), frozen, copies, lora


@pytest.mark.parametrize("trainable", [S, 0])
@pytest.mark.parametrize("path", ["loop", "grouped"])
def test_paths_are_those_of_merged_weights(path, trainable):
    x_TD, routing, frozen, copies, lora = problem(trainable)
    leaves = [x_TD, routing.weights_TK, *lora, *(copies if trainable else ())]
    expected = apply_experts(x_TD, routing, merged(frozen, lora, CONFIG.lora_scale), copies, "loop")
    found = lora_experts(x_TD, routing, frozen, copies, lora, CONFIG.lora_scale, path)
    assert torch.allclose(found, expected, atol=1e-5)  # fp32, another order of summation
    for a, b in zip(
        torch.autograd.grad(found.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)  # sums over 33 tokens


def test_experts_without_rows_are_no_trouble():
    x_TD, _, frozen, copies, lora = problem()
    only = Routing(torch.full((T, 1), S + 1), torch.ones(T, 1))
    for path in ("loop", "grouped"):
        y_TD = lora_experts(x_TD, only, frozen, copies, lora, 1.0, path)
        assert torch.allclose(y_TD, apply_experts(x_TD, only, frozen, copies, "loop"), atol=1e-6)
        gradient = torch.autograd.grad(y_TD.sum(), lora.down_b)[0] if path == "grouped" else torch.zeros(1)
        assert gradient.eq(0).all()


def test_paths_without_lora_are_refused():
    x_TD, routing, frozen, copies, lora = problem()
    with pytest.raises(UserError, match="'tiled' computes no LoRA; choose one of auto, loop, grouped"):
        lora_experts(x_TD, routing, frozen, copies, lora, 1.0, "tiled")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"num_frozen_experts": 0, "routing": "flat"}, "frozen experts of three"), ({"gated": False}, "three matrices")],
)
def test_models_without_frozen_gated_experts_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        MoEConfig(**{"num_frozen_experts": 4, "num_trainable_experts": 4, "moe_intermediate_size": 8,
                     "num_experts_per_tok": 4, "moe_layers": (0,), "lora_rank": 2} | changes)  # fmt: skip


def test_other_deltas_than_the_models_are_refused():
    assert CONFIG.with_lora(R, 4.0) == CONFIG
    with pytest.raises(UserError, match=r"has LoRA of rank 8 and alpha 4\.0 already"):
        CONFIG.with_lora(R, 5.0)


def model_with_lora(folder: Path, std: float) -> Path:
    """A converted model whose B matrices have this std."""
    tiny_moe("llama", folder, vocab_size=257, moe_changes={"lora_rank": 4, "lora_alpha": 8.0, "moe_layers": [0, 1, 2]})
    save_tokenizer(folder, has_bos=False)
    file = folder / "model.safetensors"
    state = load_file(file)
    for name in [n for n in state if ".lora_" in n and n.endswith("_b")]:
        state[name] = std * torch.randn(state[name].shape, generator=torch.Generator().manual_seed(1))
    save_file(state, file, metadata={"format": "pt"})
    return folder


def test_both_homes_compute_the_same_and_the_dense_model_stays(tmp_path):
    with_deltas = model_with_lora(tmp_path / "lora", 0.3)
    without = model_with_lora(tmp_path / "zero", 0.0)
    ids = torch.randint(128, (2, 16), generator=torch.Generator().manual_seed(0))
    models = [load(folder, torch.float32) for folder in (with_deltas, without)]
    with torch.no_grad():
        routed = [model(ids).logits for model in models]
        titan = load_titan(with_deltas)
        assert torch.allclose(titan(ids), routed[0], atol=1e-5)  # fp32
        assert not torch.allclose(routed[0], routed[1], atol=1e-2)
        for model in models:
            model.set_mode("dense")
        dense = [model(ids).logits for model in models]
        assert torch.allclose(titan(ids, mode="dense"), dense[0], atol=1e-5)
    assert torch.equal(dense[0], dense[1])
    parameters = dict(models[0].named_parameters())
    assert all(p.requires_grad == ("frozen_" not in name) for name, p in parameters.items())


def test_exports(tmp_path):
    """Dense: the same bytes with deltas and without. GLM4-MoE: the deltas are merged, and the logits hold."""
    folders = [model_with_lora(tmp_path / name, std) for name, std in (("lora", 0.3), ("zero", 0.0))]
    states = []
    for folder in folders:
        export(folder, "dense", tmp_path / f"{folder.name}-dense", mode="dense", check=False)
        states.append(load_file(tmp_path / f"{folder.name}-dense" / "model.safetensors"))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert "lora" not in json.dumps(json.loads((tmp_path / "lora-dense" / "config.json").read_text()))
    config = folders[0] / "config.json"
    values = json.loads(config.read_text())
    # what the stock class has no place for, and no test of deltas needs
    config.write_text(json.dumps(values | {"attention_bias": False}))
    state = {k: v for k, v in load_file(folders[0] / "model.safetensors").items() if not k.endswith("_proj.bias")}
    save_file(state, folders[0] / "model.safetensors", metadata={"format": "pt"})
    report = export(folders[0], "glm4-moe", tmp_path / "glm")
    assert report.max_abs_logit_diff < 1e-4
