"""Stock `MixtralForCausalLM`: softmax over the experts, renormalised over the chosen ones, no selection bias.

The routing scale is multiplied into the experts' down projections.
"""

from __future__ import annotations

from lamella.checkpoint.plan import WritePlan
from lamella.export.experts import Part, experts, named, router
from lamella.export.model import ConvertedModel
from lamella.export.stock import (
    all_layers,
    backbone_config,
    backbone_tensors,
    expert_tensors,
    experts_needed,
    folded,
    gate_needed,
    no_attention_bias,
    no_qk_norm,
    no_selection_bias,
    no_shared_expert,
    one_window,
    scale_folds,
)

_NAMES: dict[Part, str] = {"gate": "w1", "up": "w3", "down": "w2"}


def needs(model: ConvertedModel) -> list[str]:
    """What this model has that the class cannot hold."""
    if problems := experts_needed(model):
        return problems
    problems = gate_needed(model, "softmax", normalised=True) + no_selection_bias(model) + no_shared_expert(model)
    problems += all_layers(model) + scale_folds(model)
    return problems + no_attention_bias(model) + no_qk_norm(model) + one_window(model)


def plan(model: ConvertedModel) -> WritePlan:
    """Tensors and config of a model that the class can hold."""
    config = backbone_config(model, "MixtralForCausalLM", "mixtral")
    config |= {
        "intermediate_size": model.moe.moe_intermediate_size,
        "num_local_experts": model.moe.num_experts,
        "sliding_window": model.windows[0],
        "router_jitter_noise": 0.0,
        "output_router_logits": False,
    }
    tensors = backbone_tensors(model)
    for layer in model.moe.moe_layers:
        prefix = f"model.layers.{layer}.block_sparse_moe."
        tensors.append(named(router(model, layer)[0], f"{prefix}gate.weight"))
        for e, expert in enumerate(experts(model, layer, down_scale=model.moe.route_scale)):
            tensors += expert_tensors(expert, f"{prefix}experts.{e}.", _NAMES)
    return WritePlan(tensors, config, notes={"tricks": folded(model)})
