"""A loaded model's weights in int8 or float16 for decoding, in the place of what was loaded.

All Linear layers and experts; embeddings, norms, routers and their biases stay as they are. The output head is
float16 at the least: bfloat16 logits, as the int8 product gives them, have steps of 1/8 between 16 and 32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lamella.errors import UserError
from lamella.hf.blocks import ExpertsElsewhere, MoELayer, PackedExperts
from lamella.moe.matrices import PackedDtype, packed_matrix
from lamella.moe.packed import Experts
from lamella.moe.quantised import Beside, Quantised
from lamella.moe.routing import Routing


class PackedLinear(nn.Module):
    """Takes the place of an nn.Linear."""

    def __init__(self, linear: nn.Linear, dtype: PackedDtype):
        super().__init__()
        self.matrix = packed_matrix(linear.weight.detach(), dtype)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.matrix(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class QuantisedStock(nn.Module):
    """Takes the place of transformers' own packed experts (GLM4-MoE, Mixtral)."""

    def __init__(self, experts: Quantised):
        super().__init__()
        self.experts = experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self.experts.compute(hidden_states, Routing(top_k_index, top_k_weights))


@torch.no_grad()
def pack(model: PreTrainedModel, dtype: PackedDtype) -> None:
    """Replace the weights, a layer at a time: what is not packed yet is the most that is held twice.

    Raises:
        UserError: experts of two matrices, low-rank deltas, attention experts.
    """
    _check(model)
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, PackedExperts) and not isinstance(child, ExpertsElsewhere):
                frozen, trainable = child.frozen, child.trainable
                assert isinstance(frozen, Experts)
                assert isinstance(trainable, Experts)
                setattr(parent, name, ExpertsElsewhere(Quantised.of(frozen, trainable, dtype)))
            elif (stock := _stock(child)) is not None:
                none = Experts(*(t[:0] for t in stock))
                setattr(parent, name, QuantisedStock(Quantised.of(stock, none, dtype)))
            elif type(child) is nn.Linear:
                on_cpu = child.weight.device.type == "cpu"
                setattr(parent, name, PackedLinear(child, "float16" if child is head and on_cpu else dtype))


def packed_bytes(model: PreTrainedModel) -> int:
    """What the model's weights take now."""
    total = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    for module in model.modules():
        if isinstance(module, PackedLinear):
            total += module.matrix.nbytes
        elif isinstance(module, ExpertsElsewhere) and isinstance(module.given, Quantised | Beside):
            total += module.given.nbytes
        elif isinstance(module, ExpertsElsewhere) and (slices := getattr(module.given, "slices", None)) is not None:
            total += slices.nbytes
        elif isinstance(module, QuantisedStock):
            total += module.experts.nbytes
    return total


def _stock(module: nn.Module) -> Experts | None:
    """The packed experts of a class of transformers."""
    gate_up, down = (getattr(module, name, None) for name in Experts._fields)
    if not isinstance(gate_up, nn.Parameter) or not isinstance(down, nn.Parameter) or gate_up.dim() != 3:
        return None
    return Experts(gate_up, down)


def _check(model: PreTrainedModel) -> None:
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    linear = any(
        type(module) is nn.Linear and module is not model.get_output_embeddings() for module in model.modules()
    )
    if not linear or any(not layer.config.gated for layer in layers):
        raise UserError(
            "int8 and float16 hold Linear layers and gated experts, which this family has not; "
            "use --dtype float32 or bfloat16"
        )
    if any(layer.config.lora_rank for layer in layers):
        raise UserError("the low-rank deltas of this model are not packed; use --dtype float32 or bfloat16")
    if any(getattr(model.config, entry, None) is not None for entry in ("attention_moe", "adapters")):
        raise UserError("attention experts and adapters are not packed; use --dtype float32 or bfloat16")
