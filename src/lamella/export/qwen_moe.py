"""Stock `Qwen3MoeForCausalLM` and `Qwen2MoeForCausalLM`: softmax over the experts, no selection bias.

The chosen scores are divided by their sum or not, and any layer may be dense. The routing scale is multiplied into the
experts' down projections. Qwen3's attention has norms of queries and keys and may have biases; Qwen2's may have biases
of queries, keys and values. Qwen2's class always adds a shared expert, times the sigmoid of a gate: the gate is zero
here and so the sigmoid 1/2, the shared expert twice the model's, or zero.
"""

from __future__ import annotations

from lamella.checkpoint.pieces import Values
from lamella.checkpoint.plan import OutputTensor, WritePlan
from lamella.export.experts import experts, named, router, shared_expert, zero_expert
from lamella.export.model import ConvertedModel
from lamella.export.stock import (
    backbone_config,
    backbone_tensors,
    expert_tensors,
    experts_needed,
    folded,
    gate_needed,
    no_output_bias,
    no_qk_norm,
    no_selection_bias,
    no_shared_expert,
    no_window,
    scale_folds,
)
from lamella.jsons import Json


def qwen3_needs(model: ConvertedModel) -> list[str]:
    """What this model has that Qwen3's class cannot hold."""
    if problems := experts_needed(model):
        return problems
    problems = _router_needed(model) + no_shared_expert(model)
    if not model.attention.qk_norm:
        problems.append(f"it has norms of queries and keys, {model.family.name} has none")
    if model.attention.qkv_bias != model.attention.output_bias:
        problems.append("all four projections of its attention have biases or none, some of this model's have")
    return problems + no_window(model)


def qwen2_needs(model: ConvertedModel) -> list[str]:
    """What this model has that Qwen2's class cannot hold."""
    if problems := experts_needed(model):
        return problems
    problems = _router_needed(model) + no_qk_norm(model) + no_output_bias(model) + no_window(model)
    hf = model.dense_hf
    if model.head_dim * hf.num_attention_heads != hf.hidden_size:
        problems.append(f"its heads together are as wide as the model, this model's are {model.head_dim} wide each")
    return problems


def _router_needed(model: ConvertedModel) -> list[str]:
    return gate_needed(model, "softmax") + no_selection_bias(model) + scale_folds(model)


def qwen3_plan(model: ConvertedModel) -> WritePlan:
    """Tensors and config of a model that Qwen3's class can hold."""
    config = backbone_config(model, "Qwen3MoeForCausalLM", "qwen3_moe") | _expert_config(model)
    config |= {"attention_bias": model.attention.qkv_bias}
    tensors = backbone_tensors(model)
    for layer in model.moe.moe_layers:
        tensors += _routed(model, layer)
    return WritePlan(tensors, config, notes={"tricks": folded(model)})


def qwen2_plan(model: ConvertedModel) -> WritePlan:
    """Tensors and config of a model that Qwen2's class can hold."""
    moe = model.moe
    shared_width = moe.shared_intermediate_size or moe.moe_intermediate_size
    config = backbone_config(model, "Qwen2MoeForCausalLM", "qwen2_moe") | _expert_config(model)
    config |= {"qkv_bias": model.attention.qkv_bias, "shared_expert_intermediate_size": shared_width}
    tensors = backbone_tensors(model)
    for layer in moe.moe_layers:
        tensors += _routed(model, layer) + _shared(model, layer)
    trick = "the shared expert is twice the model's: the class multiplies it by the sigmoid of a gate that is zero"
    if not moe.shared_intermediate_size:
        trick = "an all-zero shared expert per layer, and its gate: the class always adds one"
    return WritePlan(tensors, config, notes={"tricks": [*folded(model), trick]})


def _expert_config(model: ConvertedModel) -> Json:
    moe = model.moe
    return {
        "num_experts": moe.num_experts,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "norm_topk_prob": moe.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": sorted(set(range(model.dense_hf.num_hidden_layers)) - set(moe.moe_layers)),
        "use_sliding_window": False,
        "output_router_logits": False,
    }


def _routed(model: ConvertedModel, layer: int) -> list[OutputTensor]:
    prefix = model.ffn_prefix(layer)
    tensors = [named(router(model, layer)[0], f"{prefix}gate.weight")]
    for e, expert in enumerate(experts(model, layer, down_scale=model.moe.route_scale)):
        tensors += expert_tensors(expert, f"{prefix}experts.{e}.")
    return tensors


def _shared(model: ConvertedModel, layer: int) -> list[OutputTensor]:
    prefix, D, dtype = model.ffn_prefix(layer), model.dense_hf.hidden_size, model.head.dtype
    shared = shared_expert(model, layer, down_scale=2.0)
    if shared is None:
        shared = zero_expert(model.moe.moe_intermediate_size, D, dtype)
    gate = OutputTensor(f"{prefix}shared_expert_gate.weight", dtype, (1, D), Values((0.0,), D))
    return [*expert_tensors(shared, f"{prefix}shared_expert."), gate]
