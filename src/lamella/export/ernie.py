"""Stock `Ernie4_5_MoeForCausalLM`: softmax over the experts with a selection bias, the chosen scores over their sum.

Its rope turns neighbouring elements of a head, where Llama's turns one of the first half with one of the second: the
rows of the query and key projections are reordered. The routing scale is multiplied into the experts' down
projections, and experts may fill any run of consecutive layers.

Shapes: H heads, d head width, D model width.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lamella.checkpoint.pieces import Sink
from lamella.checkpoint.plan import OutputTensor, WritePlan
from lamella.checkpoint.tensors import SourceTensor
from lamella.export.experts import experts, named, router, shared_expert
from lamella.export.model import ConvertedModel
from lamella.export.stock import (
    backbone_config,
    backbone_tensors,
    expert_tensors,
    experts_needed,
    folded,
    gate_needed,
    no_attention_bias,
    no_qk_norm,
    no_window,
    pairs_hold,
    scale_folds,
    shared_is_multiple,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Interleaved:
    """[H * d, D] -> the same rows, each head's two halves taken alternately."""

    source: SourceTensor
    head_dim: int

    def write(self, sink: Sink, dtype: torch.dtype) -> None:
        """See `lamella.checkpoint.pieces.Piece`."""
        rows, D = self.source.shape
        for row in range(0, rows, self.head_dim):
            head = self.source.read(row * D, self.head_dim * D).view(2, self.head_dim // 2, D)
            sink.append(head.transpose(0, 1).to(dtype).flatten())


def needs(model: ConvertedModel) -> list[str]:
    """What this model has that the class cannot hold."""
    if problems := experts_needed(model):
        return problems
    problems = gate_needed(model, "softmax", normalised=True) + scale_folds(model)
    problems += pairs_hold(model) + shared_is_multiple(model)
    layers = model.moe.moe_layers
    if layers and layers != tuple(range(layers[0], layers[-1] + 1)):
        problems.append("its layers with experts follow each other, this model's moe_layers have gaps")
    return problems + no_attention_bias(model) + no_qk_norm(model) + no_window(model)


def plan(model: ConvertedModel) -> WritePlan:
    """Tensors and config of a model that the class can hold."""
    moe = model.moe
    config = backbone_config(model, "Ernie4_5_MoeForCausalLM", "ernie4_5_moe")
    config |= {
        "use_bias": False,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "moe_k": config.pop("num_experts_per_tok"),
        "moe_num_experts": moe.num_experts,
        "moe_num_shared_experts": moe.shared_intermediate_size // moe.moe_intermediate_size,
        "moe_layer_start_index": moe.moe_layers[0],
        "moe_layer_end_index": moe.moe_layers[-1],
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
        "output_router_logits": False,
    }
    tensors = [_reordered(model, tensor) for tensor in backbone_tensors(model)]
    for layer in moe.moe_layers:
        tensors += _layer_tensors(model, layer)
    trick = "the rows of the query and key projections are reordered: the class pairs neighbours in its rope"
    return WritePlan(tensors, config, notes={"tricks": [*folded(model), trick]})


def _reordered(model: ConvertedModel, tensor: OutputTensor) -> OutputTensor:
    if not tensor.name.endswith((".q_proj.weight", ".k_proj.weight")):
        return tensor
    return dataclasses.replace(tensor, piece=Interleaved(model.tensors[tensor.name], model.head_dim))


def _layer_tensors(model: ConvertedModel, layer: int) -> list[OutputTensor]:
    prefix = model.ffn_prefix(layer)
    weight, bias = router(model, layer)
    bias = dataclasses.replace(bias, shape=(1, *bias.shape))
    tensors = [
        named(weight, f"{prefix}gate.weight"),
        named(bias, f"{prefix}moe_statics.e_score_correction_bias"),
    ]
    for e, expert in enumerate(experts(model, layer, down_scale=model.moe.route_scale)):
        tensors += expert_tensors(expert, f"{prefix}experts.{e}.")
    shared = shared_expert(model, layer)
    return tensors + (expert_tensors(shared, f"{prefix}shared_experts.") if shared else [])
