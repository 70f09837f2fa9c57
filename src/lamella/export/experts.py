"""The experts of a converted layer one by one, as stock formats name them: gate, up and down, and a router row each.

Twin routing becomes plain top-k there: a pair's frozen slice gets the gate row -w and the bias -b, its copy w and b
(lamella.moe.routing says why that picks one of each pair). Frozen experts come first; low-rank deltas are merged.

Shapes: E experts, f neurons per expert, D model width, S pairs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lamella.architecture.moe import MoEConfig
from lamella.architecture.moe_tensors import (
    DOWN,
    GATE_UP,
    KINDS,
    SELECTION_BIAS,
    WEIGHT,
    expert_lora_name,
    expert_name,
    router_name,
    shared_name,
)
from lamella.checkpoint.pieces import Piece, Sink, Stretch, Stretches, Values, checked
from lamella.checkpoint.plan import OutputTensor
from lamella.checkpoint.tensors import SourceTensor
from lamella.export.model import ConvertedModel

Part = Literal["gate", "up", "down"]
PARTS: tuple[Part, ...] = ("gate", "up", "down")
Expert = dict[Part, OutputTensor]
"""The matrices of one expert: gate and up [f, D], down [D, f]. Their names are still to be given."""


@dataclass(frozen=True)
class Mirrored:
    """[S, ...] -> [2S, ...]: the negative rows, then the rows themselves."""

    source: SourceTensor

    def write(self, sink: Sink, dtype: torch.dtype) -> None:
        rows = self.source.read(0, self.source.numel).to(dtype)
        sink.append(-rows)
        sink.append(rows)


@dataclass(frozen=True)
class Merged:
    """The `index`-th matrix of a packed tensor plus its low-rank delta, for a format that has no place for one."""

    packed: SourceTensor
    a: SourceTensor
    b: SourceTensor
    index: int
    shape: tuple[int, int]
    scale: float

    def write(self, sink: Sink, dtype: torch.dtype) -> None:
        rows, columns = self.shape
        r = self.b.width
        sizes = ((self.packed, rows, columns), (self.a, r, columns), (self.b, rows, r))
        weight, a, b = (s.read(self.index * m * n, m * n).float().view(m, n) for s, m, n in sizes)
        sink.append((weight + self.scale * (b @ a)).to(dtype).flatten())


@dataclass(frozen=True)
class Scaled:
    """Another piece, times a number: how a format without a routing scale gets it."""

    piece: Piece
    factor: float

    def write(self, sink: Sink, dtype: torch.dtype) -> None:
        self.piece.write(_ScaledSink(sink, self.factor), dtype)


@dataclass(frozen=True)
class _ScaledSink:
    sink: Sink
    factor: float

    def append(self, data: Tensor) -> None:
        self.sink.append(self._scaled(data))

    def place(self, start: int, data: Tensor) -> None:
        self.sink.place(start, self._scaled(data))

    def _scaled(self, data: Tensor) -> Tensor:
        return checked(data * self.factor, data, "an expert, times the routing scale,")


@dataclass(frozen=True)
class Chain:
    """Pieces laid end to end, as experts stacked into one tensor."""

    pieces: tuple[Piece, ...]

    def write(self, sink: Sink, dtype: torch.dtype) -> None:
        for piece in self.pieces:
            piece.write(sink, dtype)


def experts(model: ConvertedModel, layer: int, down_scale: float = 1.0) -> list[Expert]:
    """The routed experts of a layer, frozen ones first; `down_scale` multiplies their outputs."""
    prefix, moe = model.ffn_prefix(layer), model.moe
    found: list[Expert] = []
    for kind, count in zip(KINDS, (moe.num_frozen_experts, moe.num_trainable_experts), strict=True):
        if not count:
            continue
        gate_up, down = (model.tensors[prefix + expert_name(kind, part)] for part in (GATE_UP, DOWN))
        has_delta = kind == "frozen" and moe.lora_rank > 0
        for i in range(count):
            expert = _matrices(gate_up, down, i)
            if has_delta:
                expert = _merged(expert, prefix, model.tensors, moe, i)
            found.append(_scaled(expert, down_scale))
    return found


def shared_expert(model: ConvertedModel, layer: int, down_scale: float = 1.0) -> Expert | None:
    """The expert that is always on; None where the model has none."""
    prefix = model.ffn_prefix(layer)
    if not model.moe.shared_intermediate_size:
        return None
    gate_up, down = (model.tensors[prefix + shared_name(part)] for part in (GATE_UP, DOWN))
    gate_up, down = (dataclasses.replace(tensor, shape=(1, *tensor.shape)) for tensor in (gate_up, down))
    return _scaled(_matrices(gate_up, down, 0), down_scale)


def zero_expert(width: int, D: int, dtype: str) -> Expert:
    """An expert that adds exactly nothing, for formats that always add a shared one."""
    shapes: dict[Part, tuple[int, int]] = {"gate": (width, D), "up": (width, D), "down": (D, width)}
    return {
        part: OutputTensor(part, dtype, shape, Values((0.0,) * shape[0], shape[1])) for part, shape in shapes.items()
    }


def router(model: ConvertedModel, layer: int) -> tuple[OutputTensor, OutputTensor]:
    """A router row [E, D] and a selection bias [E] per expert, their names still to be given."""
    prefix, moe = model.ffn_prefix(layer), model.moe
    made = []
    for name in (WEIGHT, SELECTION_BIAS):
        source = model.tensors[prefix + router_name(name)]
        piece: Piece = Mirrored(source) if moe.routing == "twin" else Stretches.copy(source)
        made.append(OutputTensor(name, source.dtype, (moe.num_experts, *source.shape[1:]), piece))
    return made[0], made[1]


def named(tensor: OutputTensor, name: str) -> OutputTensor:
    return dataclasses.replace(tensor, name=name)


def _matrices(gate_up: SourceTensor, down: SourceTensor, index: int) -> Expert:
    """The `index`-th expert of two packed tensors, in which matrices lie one after another."""
    D, f = down.shape[1:]
    places: dict[Part, tuple[SourceTensor, int, tuple[int, int]]] = {
        "gate": (gate_up, 2 * index, (f, D)),
        "up": (gate_up, 2 * index + 1, (f, D)),
        "down": (down, index, (D, f)),
    }
    return {
        part: OutputTensor(part, packed.dtype, shape, Stretches((Stretch(packed, at * f * D, f * D),)))
        for part, (packed, at, shape) in places.items()
    }


def _merged(expert: Expert, prefix: str, tensors: dict[str, SourceTensor], moe: MoEConfig, index: int) -> Expert:
    """A frozen expert's matrices with their deltas."""
    places: dict[Part, tuple[str, int]] = {
        "gate": ("gate_up", 2 * index), "up": ("gate_up", 2 * index + 1), "down": ("down", index),
    }  # fmt: skip
    merged: Expert = {}
    for part, (matrix, at) in places.items():
        names = (expert_name("frozen", f"{matrix}_proj"), *(expert_lora_name(f"{matrix}_{half}") for half in "ab"))
        packed, a, b = (tensors[prefix + name] for name in names)
        rows, columns = expert[part].shape
        merged[part] = dataclasses.replace(
            expert[part], piece=Merged(packed, a, b, at, (rows, columns), moe.lora_scale)
        )
    return merged


def _scaled(expert: Expert, factor: float) -> Expert:
    if factor == 1.0:
        return expert
    down = expert["down"]
    return expert | {"down": dataclasses.replace(down, piece=Scaled(down.piece, factor))}
