"""Method "partition": the neurons of every FFN divided among routed experts and, where asked for, a shared one.

The tensors are gathered from the dense ones by the index lists that `lamella.conversion.partition.decide` made for each
layer. Fewer active neurons than the dense model has; with all of them active and gate "unit" the logits are the dense
model's.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from lamella.architecture.converted import converted_config
from lamella.architecture.layout import ffn_layout
from lamella.architecture.moe import MoEConfig
from lamella.architecture.moe_tensors import (
    DOWN,
    GATE_SCALE,
    GATE_UP,
    OUTPUT_BIAS,
    SELECTION_BIAS,
    UP,
    UP_BIAS,
    UP_WEIGHT,
    WEIGHT,
    expert_name,
    is_float32,
    moe_tensors,
    router_name,
    shared_name,
)
from lamella.checkpoint.gather import GatherColumns, GatherElements, GatherRows, Given
from lamella.checkpoint.pieces import Piece
from lamella.checkpoint.plan import OutputTensor, WritePlan
from lamella.checkpoint.source import Checkpoint
from lamella.checkpoint.tensors import SourceTensor
from lamella.conversion.partition.decide import Decision, layer_fields
from lamella.conversion.plan import Undecided
from lamella.conversion.replace import stored_dtype, with_ffns_replaced
from lamella.errors import UserError
from lamella.recipe.methods.partition import Axes, PartitionOptions


def list_tensors(source: Checkpoint, options: PartitionOptions, moe: MoEConfig) -> WritePlan:
    """The plan before any layer is decided: `moe` as of `partition_sizes`."""
    return _plan(source, options, moe, lambda layer, parts: defaultdict(Undecided))


def decided_plan(
    source: Checkpoint,
    options: PartitionOptions,
    sizes: MoEConfig,
    decisions: Mapping[int, Decision],
    matrices: Mapping[int, Mapping[str, SourceTensor]],
) -> WritePlan:
    """All tensors and the config of the partitioned model.

    Args:
        sizes: what was listed.
        decisions: by layer; layers that are not in it stay dense.
        matrices: by layer, tensors in the place of the dense ones, by the parts of `FFNLayout.names`.

    Raises:
        UserError: no layer at all is converted.
    """
    if not decisions:
        raise UserError("every layer would stay dense: nothing to convert; raise the guard's budgets, or name layers")
    moe = decided_sizes(options, sizes, decisions)

    def pieces(layer: int, parts: dict[str, SourceTensor]) -> dict[str, Piece]:
        return _pieces(parts | dict(matrices.get(layer, {})), decisions[layer])

    return _plan(source, options, moe, pieces)


def _plan(
    source: Checkpoint,
    options: PartitionOptions,
    moe: MoEConfig,
    pieces: Callable[[int, dict[str, SourceTensor]], Mapping[str, Piece]],
) -> WritePlan:
    layout = ffn_layout(source.config)

    def experts(layer: int, parts: dict[str, SourceTensor]) -> list[OutputTensor]:
        stored, made = stored_dtype(parts["down"].dtype, options.dtype), pieces(layer, parts)
        return [
            OutputTensor(layout.prefix(layer) + name, "F32" if is_float32(name) else stored, shape, made[name])
            for name, shape in moe_tensors(layout.hidden_size, moe.for_layer(layer)).items()
        ]

    tensors = with_ffns_replaced(source, layout, moe.moe_layers, experts, options.dtype)
    return WritePlan(tensors, converted_config(source.config, source.family, options.dtype, moe=moe.to_dict()))


def decided_sizes(axes: Axes, sizes: MoEConfig, decisions: Mapping[int, Decision]) -> MoEConfig:
    """The sizes with the most common layer's counts, and what differs from it in others."""
    fields = {layer: layer_fields(decision, axes) for layer, decision in decisions.items()}
    common = max(fields.values(), key=[*fields.values()].count)
    differing = {
        layer: {key: value for key, value in own.items() if value != common[key]}
        for layer, own in fields.items()
        if own != common
    }
    return dataclasses.replace(sizes, moe_layers=tuple(sorted(decisions)), per_layer=differing, **common)


def _pieces(parts: dict[str, SourceTensor], decision: Decision) -> dict[str, Piece]:
    """How each tensor of a layer is made, by its name in the layer."""
    pieces = {expert_name("trainable", part): piece for part, piece in _experts(parts, decision.experts_Ef, decision)}
    if len(decision.shared_n):
        pieces |= {shared_name(part): piece for part, piece in _experts(parts, decision.shared_n[None], decision)}
    given = {
        router_name(WEIGHT): decision.router_ED,
        router_name(UP_WEIGHT): decision.router_up_ED,
        router_name(GATE_SCALE): torch.zeros(len(decision.experts_Ef)),
        router_name(SELECTION_BIAS): decision.selection_bias_E,
        OUTPUT_BIAS: decision.output_bias_D,
    }
    return pieces | {name: Given(value) for name, value in given.items() if value is not None}


def _experts(parts: dict[str, SourceTensor], ids_Ef: Tensor, decision: Decision) -> Iterator[tuple[str, Piece]]:
    yield DOWN, GatherColumns(parts["down"], ids_Ef, decision.row_scale_D)
    if "gate" in parts:
        yield GATE_UP, GatherRows(tuple((parts[m], ids_f) for ids_f in ids_Ef for m in ("gate", "up")))
    else:
        yield UP, GatherRows(((parts["up"], ids_Ef.flatten()),))
        yield UP_BIAS, GatherElements(parts["up_bias"], ids_Ef)
