"""Stock `Glm4MoeForCausalLM`: sigmoid scores, a selection bias, renormalised weights and a scale, as they are here.

The file holds one tensor per expert and matrix, the layout that other loaders read as well.
"""

from __future__ import annotations

from lamella.checkpoint.plan import OutputTensor, WritePlan
from lamella.export.experts import experts, named, router, shared_expert, zero_expert
from lamella.export.model import ConvertedModel
from lamella.export.stock import (
    backbone_config,
    backbone_tensors,
    dense_layers_first,
    expert_tensors,
    experts_needed,
    gate_needed,
    no_output_bias,
    no_window,
    shared_is_multiple,
)


def needs(model: ConvertedModel) -> list[str]:
    """What this model has that the class cannot hold."""
    if problems := experts_needed(model):
        return problems
    problems = gate_needed(model, "sigmoid") + dense_layers_first(model) + shared_is_multiple(model)
    return problems + no_output_bias(model) + no_window(model)


def plan(model: ConvertedModel) -> WritePlan:
    """Tensors and config of a model that the class can hold."""
    moe = model.moe
    config = backbone_config(model, "Glm4MoeForCausalLM", "glm4_moe")
    config["rope_parameters"] |= {"partial_rotary_factor": 1.0}  # GLM rotates half of each head unless told otherwise
    config |= {
        "attention_bias": model.attention.qkv_bias,
        "use_qk_norm": model.attention.qk_norm,
        "n_routed_experts": moe.num_experts,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "n_shared_experts": max(1, moe.shared_intermediate_size // moe.moe_intermediate_size),
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": moe.moe_layers[0],
        "norm_topk_prob": moe.norm_topk_prob,
        "routed_scaling_factor": moe.route_scale,
        "num_nextn_predict_layers": 0,
    }
    tensors = backbone_tensors(model)
    for layer in moe.moe_layers:
        tensors += _layer_tensors(model, layer)
    tricks = [] if moe.shared_intermediate_size else ["an all-zero shared expert per layer: the class always adds one"]
    return WritePlan(tensors, config, notes={"tricks": tricks})


def _layer_tensors(model: ConvertedModel, layer: int) -> list[OutputTensor]:
    prefix = model.ffn_prefix(layer)
    tensors = [
        t for e, expert in enumerate(experts(model, layer)) for t in expert_tensors(expert, f"{prefix}experts.{e}.")
    ]
    weight, bias = router(model, layer)
    tensors += [named(weight, f"{prefix}gate.weight"), named(bias, f"{prefix}gate.e_score_correction_bias")]
    shared = shared_expert(model, layer)
    if shared is None:
        shared = zero_expert(model.moe.moe_intermediate_size, weight.shape[1], weight.dtype)
    return tensors + expert_tensors(shared, f"{prefix}shared_experts.")
