"""Exports are reloaded in plain transformers and compared with the model they came from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lamella.errors import UserError
from lamella.export import TARGETS, export
from lamella.export.check import MAX_LOGIT_DIFFERENCE, check_reloaded
from lamella.hf.models import load
from support.trained_model import LLAMA3_ROPE, VOCAB, F, S, save_trained

CASES = {
    "llama": {},
    "llama3 rope, untied": {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": False},
    "llama tied": {"tie_word_embeddings": True},
    "flat": {"moe": {"routing": "flat"}},
    "flat, other top-k": {"moe": {"routing": "flat", "num_experts_per_tok": 3}},
    "not normalised": {"moe": {"norm_topk_prob": False, "route_scale": 2.5}},
    "partitioned": {"moe": {"routing": "flat", "num_frozen_experts": 0, "num_experts_per_tok": 2}},
    "partitioned, shared": {
        "moe": {
            "routing": "flat",
            "num_frozen_experts": 0,
            "num_trainable_experts": 6,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 2 * F // S,
        },
    },
    "first layer dense": {"moe": {"moe_layers": (1, 2)}},
    "mistral": {"family": "mistral", "sliding_window": None},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3"},
    "bf16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_glm4_moe_computes_the_same(tmp_path: Path, changes: dict) -> None:
    source = save_trained(tmp_path / "moe", **changes)
    report = export(source, "glm4-moe", tmp_path / "glm")
    assert report.architecture == "Glm4MoeForCausalLM"
    # fp32 sums of the same terms in another order; measured 2e-6 on these sizes
    assert report.max_abs_logit_diff is not None
    assert report.max_abs_logit_diff < 2e-5
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "glm", output_loading_info=True)
    assert type(model).__module__.startswith("transformers.")
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_selection_bias_stays_fp32(tmp_path: Path) -> None:
    source = save_trained(tmp_path / "moe", dtype=torch.bfloat16)
    export(source, "glm4-moe", tmp_path / "glm", check=False)
    bias = load_file(tmp_path / "glm/model.safetensors")["model.layers.0.mlp.gate.e_score_correction_bias"]
    ours = load_file(source / "model.safetensors")["model.layers.0.mlp.router.selection_bias"]
    assert bias.dtype == torch.float32
    assert torch.equal(bias, torch.cat([-ours, ours]))


def test_dense_is_the_frozen_half(tmp_path: Path) -> None:
    source = save_trained(tmp_path / "moe")
    assert export(source, "dense", tmp_path / "dense").architecture == "LlamaForCausalLM"
    moe = load(source)
    moe.set_mode("dense")
    ids = torch.arange(VOCAB)[None]
    with torch.no_grad():
        difference = (load(tmp_path / "dense")(ids).logits - moe(ids).logits).abs().max()
    assert difference < 2e-5  # fp32, another order of summation


UNFIT = {
    "softmax": ({"moe": {"gate": "softmax"}}, "gate is sigmoid"),
    "one expert": (
        {"moe": {"num_frozen_experts": 0, "num_trainable_experts": 1, "num_experts_per_tok": 1, "routing": "flat"}},
        "two experts or more",
    ),
    "gaps": ({"moe": {"moe_layers": (0, 2)}}, "dense layers can only come first"),
    "o_proj bias": ({"attention_bias": True}, "output projection"),
    "window": ({"family": "mistral", "sliding_window": 16}, "sliding window of 16"),
}


@pytest.mark.parametrize(("changes", "message"), UNFIT.values(), ids=UNFIT)
def test_refuses_what_the_class_cannot_hold(tmp_path: Path, changes: dict, message: str) -> None:
    source = save_trained(tmp_path / "moe", **changes)
    with pytest.raises(UserError, match="glm4-moe cannot hold") as error:
        export(source, "glm4-moe", tmp_path / "glm")
    assert all(word in str(error.value) for word in message.split())
    assert [p.name for p in tmp_path.iterdir()] == ["moe"]


def test_refuses_bad_input(tmp_path: Path) -> None:
    source = save_trained(tmp_path / "moe")
    with pytest.raises(UserError, match="did you mean 'glm4-moe'"):
        export(source, "glm4_moe", tmp_path / "out")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        export(source, "glm4-moe", tmp_path / "taken")
    with pytest.raises(UserError, match=r"no config\.json"):
        export(tmp_path, "glm4-moe", tmp_path / "out")
    export(source, "dense", tmp_path / "dense")
    with pytest.raises(UserError, match="is not converted"):
        export(tmp_path / "dense", "glm4-moe", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "moe", "taken"]


def drop_an_expert(tensors: dict) -> None:
    for part in ("gate", "up", "down"):
        tensors[f"model.layers.1.mlp.experts.5.{part}_proj.weight"].zero_()


def drop_the_bias(tensors: dict) -> None:
    for name in tensors:
        if name.endswith("e_score_correction_bias"):
            tensors[name].zero_()


def lose_a_tensor(tensors: dict) -> None:
    del tensors["model.layers.0.mlp.experts.3.up_proj.weight"]


@pytest.mark.faults
@pytest.mark.parametrize("damage", [drop_an_expert, drop_the_bias, lose_a_tensor])
def test_check_notices_what_is_lost(tmp_path: Path, damage) -> None:
    """An export that silently loses experts or the bias is the classic bug of MoE exporters."""
    source = save_trained(tmp_path / "moe")
    export(source, "glm4-moe", tmp_path / "glm", check=False)
    assert check_reloaded(source, tmp_path / "glm").max_abs_logit_diff < MAX_LOGIT_DIFFERENCE
    tensors = load_file(tmp_path / "glm/model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "glm/model.safetensors", metadata={"format": "pt"})
    with pytest.raises((UserError, RuntimeError)):
        check_reloaded(source, tmp_path / "glm")


@pytest.mark.faults
def test_failed_check_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_trained(tmp_path / "moe")
    monkeypatch.setattr("lamella.export.check.MAX_LOGIT_DIFFERENCE", -1.0)
    with pytest.raises(UserError, match="nothing was kept"):
        export(source, "glm4-moe", tmp_path / "glm")
    assert [p.name for p in tmp_path.iterdir()] == ["moe"]


def test_config_reads_in_plain_json(tmp_path: Path) -> None:
    source = save_trained(tmp_path / "moe", rope_parameters=LLAMA3_ROPE)
    for target in TARGETS:
        export(source, target, tmp_path / target, check=False)
        config = json.loads((tmp_path / target / "config.json").read_text())
        assert "moe" not in config
        assert "auto_map" not in config
        assert config["rope_parameters"]["factor"] == 8.0
