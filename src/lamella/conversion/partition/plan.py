"""Method "partition": the neurons of every FFN divided among routed experts and, where asked for, a shared one.

The tensors are gathered from the dense ones by the index lists that `lamella.conversion.partition.decide` made for each
layer. Fewer active neurons than the dense model has; with all of them active and gate "unit" the logits are the dense
model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lamella.architecture.converted import FLOAT32, converted_config, moe_tensors
from lamella.architecture.layout import FFNLayout, ffn_layout
from lamella.architecture.moe import MoEConfig
from lamella.checkpoint.gather import GatherColumns, GatherElements, GatherRows, Given
from lamella.checkpoint.pieces import Piece
from lamella.checkpoint.plan import OutputTensor, WritePlan
from lamella.checkpoint.source import Checkpoint
from lamella.checkpoint.tensors import SourceTensor
from lamella.conversion.partition.decide import Decision, layer_config, layer_fields
from lamella.conversion.replace import stored_dtype, with_ffns_replaced
from lamella.errors import UserError
from lamella.recipe.methods.partition import Axes


def plan_partition(
    source: Checkpoint,
    axes: Axes,
    decisions: Mapping[int, Decision],
    dtype: str | None = None,
    refitted: Mapping[int, SourceTensor] | None = None,
) -> WritePlan:
    """All tensors and the config of the partitioned model.

    Args:
        decisions: by layer; layers that are not in it stay dense.
        dtype: "float32", "bfloat16", "float16", or None for that of the source.
        refitted: by layer, down projections [D, F] in the place of the dense ones.

    Raises:
        UserError: no layer at all is converted.
    """
    if not decisions:
        raise UserError("every layer would stay dense: nothing to convert; raise the guard's budgets, or name layers")
    layout = ffn_layout(source.config)
    moe = moe_config(axes, decisions, layout)

    def experts(layer: int, parts: dict[str, SourceTensor]) -> list[OutputTensor]:
        stored = stored_dtype(parts["down"].dtype, dtype)
        parts = parts | {"down": (refitted or {}).get(layer, parts["down"])}
        return _layer(parts, layout.prefix(layer), decisions[layer], moe.for_layer(layer), stored)

    tensors = with_ffns_replaced(source, layout, decisions, experts, dtype)
    return WritePlan(tensors, converted_config(source.config, source.family, dtype, moe=moe.to_dict()))


def moe_config(axes: Axes, decisions: Mapping[int, Decision], layout: FFNLayout) -> MoEConfig:
    """The config of the most common layer, and what differs from it."""
    fields = {layer: layer_fields(decision, axes) for layer, decision in decisions.items()}
    common: dict[str, Any] = max(fields.values(), key=[*fields.values()].count)
    any_layer = next(layer for layer, own in fields.items() if own == common)
    config = layer_config(decisions[any_layer], axes, layout.gate is not None, layout.activation)
    differing = {
        layer: {key: value for key, value in own.items() if value != common[key]}
        for layer, own in fields.items()
        if own != common
    }
    values = config.to_dict() | {"moe_layers": sorted(decisions), "per_layer": differing}
    return MoEConfig.from_dict(values)


def _layer(
    parts: dict[str, SourceTensor], prefix: str, decision: Decision, moe: MoEConfig, stored: str
) -> list[OutputTensor]:
    pieces = {f"experts.trainable_{name}": piece for name, piece in _experts(parts, decision.experts_Ef, decision)}
    if len(decision.shared_n):
        pieces |= {f"shared.{name}": piece for name, piece in _experts(parts, decision.shared_n[None], decision)}
    given = {
        "router.weight": decision.router_ED,
        "router.up_weight": decision.router_up_ED,
        "router.gate_scale": torch.zeros(moe.num_experts),
        "router.selection_bias": decision.selection_bias_E,
        "output_bias": decision.output_bias_D,
    }
    pieces |= {name: Given(value) for name, value in given.items() if value is not None}
    return [
        OutputTensor(prefix + name, "F32" if name in FLOAT32 else stored, shape, pieces[name])
        for name, shape in moe_tensors(parts["up"].width, moe).items()
    ]


def _experts(parts: dict[str, SourceTensor], ids_Ef: Tensor, decision: Decision) -> Iterator[tuple[str, Piece]]:
    yield "down_proj", GatherColumns(parts["down"], ids_Ef, decision.row_scale_D)
    if "gate" in parts:
        yield "gate_up_proj", GatherRows(tuple((parts[m], ids_f) for ids_f in ids_Ef for m in ("gate", "up")))
    else:
        yield "up_proj", GatherRows(((parts["up"], ids_Ef.flatten()),))
        yield "up_bias", GatherElements(parts["up_bias"], ids_Ef)
