"""Method "slice": every FFN becomes S frozen slices and S trainable, noisy copies of them.

At conversion the router sends every token to the frozen slices with weight 1, so the logits are the dense model's
(lamella.architecture.moe.DENSE_BIAS says why).
"""

from __future__ import annotations

from pathlib import Path

from lamella.architecture.converted import converted_config
from lamella.architecture.families import ffn_layout
from lamella.architecture.moe import DENSE_BIAS, MoEConfig
from lamella.architecture.moe_tensors import (
    DOWN,
    GATE_UP,
    KINDS,
    OUTPUT_BIAS,
    SELECTION_BIAS,
    UP,
    UP_BIAS,
    WEIGHT,
    expert_name,
    is_float32,
    moe_tensors,
    router_name,
)
from lamella.checkpoint.pieces import Piece, SplitColumns, Stretch, Stretches, Values
from lamella.checkpoint.plan import OutputTensor, WritePlan
from lamella.checkpoint.source import Checkpoint
from lamella.checkpoint.tensors import SourceTensor
from lamella.conversion.noise import Noise
from lamella.conversion.plan import ConversionPlan
from lamella.conversion.replace import stored_dtype, with_ffns_replaced
from lamella.errors import UserError
from lamella.recipe.methods.slice import SliceOptions, slice_sizes


def plan_slices(model: str | Path | None, options: SliceOptions) -> ConversionPlan:
    """All tensors and the config of the sliced model. UserError where options and model do not fit."""
    source = Checkpoint.open(model)
    moe, layout = slice_sizes(options, source.config), ffn_layout(source.config)

    def experts(layer: int, parts: dict[str, SourceTensor]) -> list[OutputTensor]:
        return _layer(parts, layout.prefix(layer), moe, options)

    tensors = with_ffns_replaced(source, layout, moe.moe_layers, experts, options.dtype)
    config = converted_config(source.config, source.family, options.dtype, moe=moe.to_dict())
    return ConversionPlan(source, WritePlan(tensors, config))


def _layer(parts: dict[str, SourceTensor], prefix: str, moe: MoEConfig, options: SliceOptions) -> list[OutputTensor]:
    gate, up = parts.get("gate", parts["up"]), parts["up"]
    if gate.dtype != up.dtype and options.dtype is None:
        raise UserError(f"{gate.name} is {gate.dtype} but {up.name} is {up.dtype}; choose one for all with --dtype")
    made: dict[str, tuple[SourceTensor, Piece]] = {}  # (whose dtype it has, how it is made)
    for kind, noise in zip(KINDS, (None, Noise(options.noise, options.seed)), strict=True):
        made |= {expert_name(kind, part): how for part, how in _experts(parts, options.slices, noise).items()}
    made[router_name(WEIGHT)] = (up, Values((0.0,), moe.num_router_rows * up.width))
    made[router_name(SELECTION_BIAS)] = (up, Values(selection_bias(moe)))
    if moe.output_bias:
        made[OUTPUT_BIAS] = (parts["down_bias"], Stretches.copy(parts["down_bias"]))
    shapes = moe_tensors(up.width, moe)
    return [
        OutputTensor(
            prefix + name, "F32" if is_float32(name) else stored_dtype(like.dtype, options.dtype), shapes[name], piece
        )
        for name, (like, piece) in made.items()
    ]


def _experts(parts: dict[str, SourceTensor], slices: int, noise: Noise | None) -> dict[str, tuple[SourceTensor, Piece]]:
    """The packed tensors of the slices, or with noise of their copies."""
    up, down = parts["up"], parts["down"]
    split = {DOWN: (down, SplitColumns(down, slices, noise))}
    if "gate" in parts:
        return {GATE_UP: (up, Stretches(_gate_up_stretches(parts["gate"], up, slices), noise)), **split}
    bias = parts["up_bias"]
    return {UP: (up, _whole(up, noise)), UP_BIAS: (bias, _whole(bias, noise)), **split}


def _whole(source: SourceTensor, noise: Noise | None) -> Stretches:
    return Stretches((Stretch(source, 0, source.numel),), noise)


def _gate_up_stretches(gate: SourceTensor, up: SourceTensor, slices: int) -> tuple[Stretch, ...]:
    count = gate.numel // slices
    return tuple(Stretch(matrix, i * count, count) for i in range(slices) for matrix in (gate, up))


def selection_bias(moe: MoEConfig) -> tuple[float, ...]:
    """The biases [R] that send every token to the frozen slices, whatever the router says."""
    if moe.routing == "twin":
        return (DENSE_BIAS,) * moe.num_frozen_experts
    return (0.0,) * moe.num_frozen_experts + (DENSE_BIAS,) * moe.num_trainable_experts
