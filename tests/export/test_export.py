"""Exports are reloaded in plain transformers and compared with the model they came from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lamella.errors import UserError
from lamella.export import export
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


NO_BIAS = {"selection_bias": False}
SOFTMAX = {"gate": "softmax", "routing": "flat"}
MIXTRAL = {
    "flat": {"moe": SOFTMAX},
    "twin": {"moe": {"gate": "softmax"}},
    "scale 3, llama3 rope, tied": {
        "moe": SOFTMAX | {"route_scale": 3.0, "num_experts_per_tok": 3},
        "rope_parameters": LLAMA3_ROPE,
        "tie_word_embeddings": True,
    },
    "mistral's window": {"family": "mistral", "sliding_window": 16, "moe": SOFTMAX},
    "bf16": {"moe": SOFTMAX, "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("changes", MIXTRAL.values(), ids=MIXTRAL)
def test_mixtral_computes_the_same(tmp_path: Path, changes: dict) -> None:
    source = save_trained(tmp_path / "moe", **NO_BIAS, **changes)
    report = export(source, "auto", tmp_path / "out")
    assert (report.target, report.architecture) == ("mixtral", "MixtralForCausalLM")
    assert report.max_abs_logit_diff is not None
    assert report.max_abs_logit_diff < 5e-5  # fp32 sums in another order
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


NO_MIXTRAL = {
    "sigmoid": ({}, "gate is softmax, this model's is sigmoid; possible here: glm4-moe"),
    "bias": ({"moe": SOFTMAX, "selection_bias": True}, "no selection bias"),
    "not normalised": ({"moe": SOFTMAX | {"norm_topk_prob": False}}, "norm_topk_prob"),
    "qwen2": ({"family": "qwen2", "moe": SOFTMAX}, "no biases"),
    "qwen3": ({"family": "qwen3", "moe": SOFTMAX}, "no norm of queries and keys"),
    "scale 3 in bf16": ({"moe": SOFTMAX | {"route_scale": 3.0}, "dtype": torch.bfloat16}, "would be rounded"),
    "dense layer": ({"moe": SOFTMAX | {"moe_layers": (1, 2)}}, "all its layers have experts"),
    "shared": (
        {"moe": SOFTMAX | {"num_frozen_experts": 0, "num_experts_per_tok": 2, "shared_intermediate_size": 16}},
        "no shared expert",
    ),
}


@pytest.mark.parametrize(("changes", "message"), NO_MIXTRAL.values(), ids=NO_MIXTRAL)
def test_mixtral_refuses_what_it_cannot_hold(tmp_path: Path, changes: dict, message: str) -> None:
    source = save_trained(tmp_path / "moe", **NO_BIAS | changes)
    with pytest.raises(UserError, match="mixtral cannot hold") as error:
        export(source, "mixtral", tmp_path / "out")
    assert message in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["moe"]


def test_auto_refuses_with_every_reason(tmp_path: Path) -> None:
    source = save_trained(tmp_path / "moe", attention_bias=True)
    with pytest.raises(UserError, match=r"no stock class.*glm4-moe: .*output projection.*mixtral: .*ernie: "):
        export(source, "auto", tmp_path / "out")
    fits = save_trained(tmp_path / "fits")
    with pytest.raises(UserError, match="--tokenizer is for --to gguf"):
        export(fits, "auto", tmp_path / "out", tokenizer=tmp_path / "model.gguf")
    with pytest.raises(UserError, match=r"unknown dtype 'Q8_0'; known: F32, BF16, F16; for others take --to gguf"):
        export(fits, "auto", tmp_path / "out", dtype="q8_0")


def test_what_config_json_leaves_out_keeps_its_meaning(tmp_path: Path) -> None:
    """The families' defaults differ: an epsilon left out is 1e-6 in Llama and 1e-5 in GLM4-MoE."""
    source = save_trained(tmp_path / "moe", rms_norm_eps=1e-6)
    config = json.loads((source / "config.json").read_text())
    del config["rms_norm_eps"]
    (source / "config.json").write_text(json.dumps(config))
    export(source, "glm4-moe", tmp_path / "glm")
    assert json.loads((tmp_path / "glm/config.json").read_text())["rms_norm_eps"] == 1e-6


def test_the_card_says_what_it_is(tmp_path: Path) -> None:
    source = save_trained(tmp_path / "moe")
    manifest = {
        "source": {"model": "a/b", "architecture": "LlamaForCausalLM", "licence": "mit"},
        "recipe": {"slices": 4},
    }
    (source / "lamella.json").write_text(json.dumps(manifest))
    export(source, "glm4-moe", tmp_path / "glm")
    card = (tmp_path / "glm/README.md").read_text()
    for words in ("license: mit", "Base model: a/b", "slices 4", "max |logit difference|", "all-zero shared expert"):
        assert words in card


def test_selection_bias_stays_fp32(tmp_path: Path) -> None:
    source = save_trained(tmp_path / "moe", dtype=torch.bfloat16)
    export(source, "glm4-moe", tmp_path / "glm", check=False)
    bias = load_file(tmp_path / "glm/model.safetensors")["model.layers.0.mlp.gate.e_score_correction_bias"]
    ours = load_file(source / "model.safetensors")["model.layers.0.mlp.router.selection_bias"]
    assert bias.dtype == torch.float32
    assert torch.equal(bias, torch.cat([-ours, ours]))


def test_dense_is_the_frozen_half(tmp_path: Path) -> None:
    source = save_trained(tmp_path / "moe")
    assert export(source, "dense", tmp_path / "dense", mode="dense").architecture == "LlamaForCausalLM"
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
    export(source, "dense", tmp_path / "dense", mode="dense")
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
    for target in ("glm4-moe", "dense"):
        export(source, target, tmp_path / target, check=False, mode="dense" if target == "dense" else None)
        config = json.loads((tmp_path / target / "config.json").read_text())
        assert "moe" not in config
        assert "auto_map" not in config
        assert config["rope_parameters"]["factor"] == 8.0
