"""Softmax routers in the classes of Qwen 3, Qwen 2 and ERNIE 4.5, reloaded in plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lamella.errors import UserError
from lamella.export import export
from lamella.export.check import check_reloaded
from support.trained_model import LAYERS, LLAMA3_ROPE, save_trained

SOFTMAX = {"gate": "softmax", "routing": "flat"}
PARTS = SOFTMAX | {"num_frozen_experts": 0, "num_trainable_experts": 6, "num_experts_per_tok": 2}
NO_BIAS = {"selection_bias": False}
YARN = {"rope_type": "yarn", "rope_theta": 20000.0, "factor": 4.0, "original_max_position_embeddings": 64}
# (target, the model). Each is what `auto` chooses, too, by router and family.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3-moe", NO_BIAS | {"family": "qwen3", "moe": SOFTMAX}),
    "qwen3, llama3 rope, twin": (
        "qwen3-moe",
        NO_BIAS | {"family": "qwen3", "rope_parameters": LLAMA3_ROPE, "moe": {"gate": "softmax"}},
    ),
    "qwen3, biases, wide heads, tied": (
        "qwen3-moe",
        NO_BIAS
        | {"family": "qwen3", "attention_bias": True, "head_dim": 16, "tie_word_embeddings": True, "moe": SOFTMAX},
    ),
    "qwen3, not normalised, gaps": (
        "qwen3-moe",
        NO_BIAS | {"family": "qwen3", "moe": SOFTMAX | {"norm_topk_prob": False, "moe_layers": (0, 2)}},
    ),
    "qwen2 with biases": ("qwen2-moe", NO_BIAS | {"family": "qwen2", "moe": SOFTMAX}),
    "qwen2, llama3 rope, twin": (
        "qwen2-moe",
        NO_BIAS | {"family": "qwen2", "rope_parameters": LLAMA3_ROPE, "moe": {"gate": "softmax"}},
    ),
    "llama, not normalised": ("qwen2-moe", NO_BIAS | {"moe": SOFTMAX | {"norm_topk_prob": False, "route_scale": 2.5}}),
    "llama, gaps": ("qwen2-moe", NO_BIAS | {"moe": SOFTMAX | {"moe_layers": (0, 2)}}),
    "llama, shared, bf16": (
        "qwen2-moe",
        NO_BIAS | {"moe": PARTS | {"shared_intermediate_size": 24, "route_scale": 2.0}, "dtype": torch.bfloat16},
    ),
    "llama with a selection bias": ("ernie", {"moe": SOFTMAX}),
    "llama3 rope, scale 3, tied": (
        "ernie",
        {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True, "moe": SOFTMAX | {"route_scale": 3.0}},
    ),
    "yarn, wide heads, shared": (
        "ernie",
        {"rope_parameters": YARN, "head_dim": 16, "moe": PARTS | {"shared_intermediate_size": 32}},
    ),
    "last layer dense": ("ernie", {"moe": SOFTMAX | {"moe_layers": (0, 1)}}),
    "bf16": ("ernie", {"moe": SOFTMAX, "dtype": torch.bfloat16}),
}


@pytest.mark.parametrize(("target", "changes"), CASES.values(), ids=CASES)
def test_computes_the_same(tmp_path: Path, target: str, changes: dict[str, Any]) -> None:
    source = save_trained(tmp_path / "moe", **changes)
    report = export(source, "auto", tmp_path / "out")
    assert report.target == target
    assert report.max_abs_logit_diff is not None
    assert report.max_abs_logit_diff < 5e-5  # fp32 sums in another order
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model).__module__.startswith("transformers.")
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


UNFIT: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen3-moe, llama": ("qwen3-moe", NO_BIAS | {"moe": SOFTMAX}, "llama has none; possible here: mixtral, qwen2-moe"),
    "qwen3-moe, bias": ("qwen3-moe", {"family": "qwen3", "moe": SOFTMAX}, "no selection bias"),
    "qwen3-moe, sigmoid": ("qwen3-moe", {"family": "qwen3"}, "gate is softmax, this model's is sigmoid; "),
    "qwen3-moe, shared": (
        "qwen3-moe",
        NO_BIAS | {"family": "qwen3", "moe": PARTS | {"shared_intermediate_size": 16}},
        "no shared expert",
    ),
    "qwen3-moe, window": (
        "qwen3-moe",
        NO_BIAS
        | {"family": "qwen3", "moe": SOFTMAX, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
        "one of 16 tokens",
    ),
    "qwen2-moe, qwen3": ("qwen2-moe", NO_BIAS | {"family": "qwen3", "moe": SOFTMAX}, "no norm of queries and keys"),
    "qwen2-moe, o_proj bias": ("qwen2-moe", NO_BIAS | {"attention_bias": True, "moe": SOFTMAX}, "output projection"),
    "qwen2-moe, wide heads": ("qwen2-moe", NO_BIAS | {"head_dim": 16, "moe": SOFTMAX}, "16 wide each"),
    "qwen2-moe, scale 3 in bf16": (
        "qwen2-moe",
        NO_BIAS | {"moe": SOFTMAX | {"route_scale": 3.0}, "dtype": torch.bfloat16},
        "would be rounded",
    ),
    "ernie, qwen2": ("ernie", {"family": "qwen2", "moe": SOFTMAX}, "no biases"),
    "ernie, twin": ("ernie", {"moe": {"gate": "softmax"}}, "no top-k of all experts"),
    "ernie, gaps": ("ernie", {"moe": SOFTMAX | {"moe_layers": (0, 2)}}, "have gaps"),
    "ernie, not normalised": ("ernie", {"moe": SOFTMAX | {"norm_topk_prob": False}}, "norm_topk_prob"),
    "ernie, odd shared": ("ernie", {"moe": PARTS | {"shared_intermediate_size": 24}}, "multiple of a routed one"),
}


@pytest.mark.parametrize(("target", "changes", "message"), UNFIT.values(), ids=UNFIT)
def test_refuses_what_the_class_cannot_hold(tmp_path: Path, target: str, changes: dict[str, Any], message: str) -> None:
    source = save_trained(tmp_path / "moe", **changes)
    with pytest.raises(UserError, match=f"{target} cannot hold") as error:
        export(source, target, tmp_path / "out")
    assert message in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def zero(*endings: str) -> Any:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        names = [name for name in tensors if name.endswith(endings)]
        assert names, endings
        for name in names:
            tensors[name] = torch.zeros_like(tensors[name])

    return damage


def halves_in_order(tensors: dict[str, torch.Tensor]) -> None:
    """The rows of queries and keys as Llama has them."""
    for name, tensor in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = tensor.view(-1, 4, 2, tensor.shape[1]).transpose(1, 2)
            tensors[name] = heads.reshape(tensor.shape).contiguous()


LOSSES = {
    "qwen3-moe, an expert": ("qwen3", zero("layers.1.mlp.experts.5.down_proj.weight")),
    "qwen3-moe, norms of queries": ("qwen3", zero("q_norm.weight")),
    "qwen2-moe, biases": ("qwen2 with biases", zero("k_proj.bias")),
    "qwen2-moe, the shared expert": ("llama, shared, bf16", zero("shared_expert.down_proj.weight")),
    "ernie, the selection bias": ("llama with a selection bias", zero("e_score_correction_bias")),
    "ernie, the order of rows": ("llama with a selection bias", halves_in_order),
}


@pytest.mark.faults
@pytest.mark.parametrize(("case", "damage"), LOSSES.values(), ids=LOSSES)
def test_the_check_notices_what_is_lost(tmp_path: Path, case: str, damage: Any) -> None:
    target, changes = CASES[case]
    source = save_trained(tmp_path / "moe", **changes)
    export(source, target, tmp_path / "out", check=False)
    file = tmp_path / "out/model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="differs"):
        check_reloaded(source, tmp_path / "out")


@pytest.mark.parametrize(("target", "changes"), [CASES["qwen3"], CASES["bf16"]], ids=["qwen3-moe", "ernie"])
def test_tokens_that_end_a_text_are_the_models_own(tmp_path: Path, target: str, changes: dict[str, Any]) -> None:
    """The classes have defaults (ERNIE's text ends at token 2), which a model without such tokens must not get."""
    source = save_trained(tmp_path / "moe", **changes | {"bos_token_id": None, "eos_token_id": None})
    export(source, target, tmp_path / "out", check=False)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (None, None, None)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert (reloaded.bos_token_id, reloaded.eos_token_id, reloaded.pad_token_id) == (None, None, None)
    assert reloaded.num_hidden_layers == LAYERS
