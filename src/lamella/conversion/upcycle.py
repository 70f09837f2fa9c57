"""Method "upcycle": more parameters. Every FFN is repeated, whole or in shards, and a router learns to tell them apart.

    sparse upcycling   (arXiv 2212.05055)  `experts` whole copies, softmax over all of them, normalised top-k
    virtual groups     (arXiv 2410.07524)  each copy is cut into `granularity` shards with equal router rows, so that at
                                           the start a token that chooses one shard of a copy chooses all of it
    drop-upcycling     (arXiv 2502.19261)  in every copy a share `redraw` of the neurons is drawn anew from the normal
                                           distribution of the weights that they replace
    identity           the dense FFN itself is a shared expert, and the copies' down projections are 0

Without `noise` and `redraw` the logits are the dense model's: normalised weights of equal copies add up to 1.

Shapes: D model width, F dense FFN width, C copies, G shards per copy, E = C*G experts (shard g of copy c is expert
c*G + g), f = F/G neurons per expert, r rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lamella.architecture.converted import converted_config
from lamella.architecture.layout import ffn_layout
from lamella.architecture.moe import MoEConfig
from lamella.architecture.moe_tensors import (
    DOWN,
    GATE_UP,
    OUTPUT_BIAS,
    SELECTION_BIAS,
    UP,
    UP_BIAS,
    WEIGHT,
    expert_name,
    is_float32,
    moe_tensors,
    router_name,
    shared_name,
)
from lamella.checkpoint.gather import Given
from lamella.checkpoint.pieces import Piece, Sink, Stretch, Stretches, Values, checked
from lamella.checkpoint.plan import OutputTensor, WritePlan
from lamella.checkpoint.source import Checkpoint
from lamella.checkpoint.tensors import CHUNK_ELEMENTS, SourceTensor, spans
from lamella.conversion.noise import Noise, noise_std
from lamella.conversion.plan import ConversionPlan
from lamella.conversion.replace import stored_dtype, with_ffns_replaced
from lamella.moe.noise import gaussian_noise, noise_generator
from lamella.recipe.methods.upcycle import UpcycleOptions, upcycle_sizes


def plan_upcycle(model: str | Path | None, options: UpcycleOptions) -> ConversionPlan:
    """All tensors and the config of the upcycled model. UserError where options and model do not fit."""
    source = Checkpoint.open(model)
    moe, layout = upcycle_sizes(options, source.config), ffn_layout(source.config)

    def copies(layer: int, parts: dict[str, SourceTensor]) -> list[OutputTensor]:
        return _layer(parts, layout.prefix(layer), moe, options)

    tensors = with_ffns_replaced(source, layout, moe.moe_layers, copies, options.dtype)
    config = converted_config(source.config, source.family, options.dtype, moe=moe.to_dict())
    return ConversionPlan(source, WritePlan(tensors, config))


def _layer(parts: dict[str, SourceTensor], prefix: str, moe: MoEConfig, options: UpcycleOptions) -> list[OutputTensor]:
    up, down = parts["up"], parts["down"]
    copies = Copies(options, up.name, moe.moe_intermediate_size)
    pieces: dict[str, Piece] = {
        expert_name("trainable", DOWN): (
            Values((0.0,), moe.num_experts * down.shape[0] * copies.width)
            if options.identity
            else CopiedColumns(down, copies)
        ),
        router_name(WEIGHT): Given(_router_rows(up.name, up.width, options)),
        router_name(SELECTION_BIAS): Values((0.0,), moe.num_experts),
    }
    if "gate" in parts:
        gate = parts["gate"]
        pieces[expert_name("trainable", GATE_UP)] = CopiedRows((gate, up), copies)
        pieces[shared_name(GATE_UP)] = Stretches((Stretch(gate, 0, gate.numel), Stretch(up, 0, up.numel)))
    else:
        pieces[expert_name("trainable", UP)] = CopiedRows((up,), copies)
        pieces[expert_name("trainable", UP_BIAS)] = RepeatedVector(parts["up_bias"], options.experts)
        pieces[shared_name(UP)], pieces[shared_name(UP_BIAS)] = Stretches.copy(up), Stretches.copy(parts["up_bias"])
        pieces[OUTPUT_BIAS] = Stretches.copy(parts["down_bias"])
    pieces[shared_name(DOWN)] = Stretches.copy(down)
    return [
        OutputTensor(
            prefix + name, "F32" if is_float32(name) else stored_dtype(down.dtype, options.dtype), shape, pieces[name]
        )
        for name, shape in moe_tensors(up.width, moe).items()
    ]


def _router_rows(name: str, width: int, options: UpcycleOptions) -> Tensor:
    """[E, D]: a random row per copy, the same for all its shards."""
    rows_CD = torch.randn(options.experts, width, generator=noise_generator(f"{name}@router", options.seed))
    return (rows_CD * options.router_std).repeat_interleave(options.granularity, dim=0)


@dataclass(frozen=True)
class Copies:
    """Which neurons of which expert are drawn anew, and with what noise."""

    options: UpcycleOptions
    layer: str
    """Names the layer in the random numbers."""
    width: int
    """f"""

    @property
    def count(self) -> int:
        """E"""
        return self.options.experts * self.options.granularity

    @property
    def noise(self) -> Noise:
        return Noise(self.options.noise, self.options.seed)

    def first_neuron(self, expert: int) -> int:
        return expert % self.options.granularity * self.width

    def redrawn(self, expert: int) -> Tensor:
        """bool [f]"""
        generator = noise_generator(f"{self.layer}@{expert}", self.options.seed)
        chosen = torch.randperm(self.width, generator=generator)[: round(self.options.redraw * self.width)]
        return torch.zeros(self.width, dtype=torch.bool).index_fill_(0, chosen, True)

    def changed(
        self, block: Tensor, name: str, expert: int, start: int, std: float, fresh: Tensor, moments: tuple[float, float]
    ) -> Tensor:
        """A block of an expert's weights with noise, and new values where `fresh`; `start`: its place in the matrix."""
        if not std and not fresh.any():
            return block
        normal = gaussian_noise(f"{name}@{expert}", self.options.seed, start, block.numel()).view_as(block)
        mean, spread = moments
        return torch.where(fresh, normal * spread + mean, block.float() + normal * std)


@dataclass(frozen=True)
class CopiedRows:
    """[F, D] matrices -> [E, m f, D]: for every expert, its rows of each of the m matrices."""

    matrices: tuple[SourceTensor, ...]
    copies: Copies

    def write(self, sink: Sink, dtype: torch.dtype) -> None:
        std = {matrix.name: noise_std(matrix, self.copies.noise) for matrix in self.matrices}
        for expert in range(self.copies.count):
            fresh_f = self.copies.redrawn(expert)
            for matrix in self.matrices:
                moments = _moments(self._blocks(matrix, expert), fresh_f, by_row=True)
                for rows, block_rD in self._blocks(matrix, expert):
                    changed = self.copies.changed(
                        block_rD, matrix.name, expert, rows.start * matrix.width, std[matrix.name],
                        fresh_f[rows, None], moments,
                    )  # fmt: skip
                    sink.append(checked(changed.to(dtype), changed, matrix.name))

    def _blocks(self, matrix: SourceTensor, expert: int) -> Iterator[tuple[slice, Tensor]]:
        """(rows of the expert, [r, D])"""
        D, first = matrix.width, self.copies.first_neuron(expert)
        for row, count in spans(0, self.copies.width, max(1, CHUNK_ELEMENTS // D)):
            yield slice(row, row + count), matrix.read((first + row) * D, count * D).view(count, D)


@dataclass(frozen=True)
class CopiedColumns:
    """[D, F] -> [E, D, f]: for every expert, its columns."""

    source: SourceTensor
    copies: Copies

    def write(self, sink: Sink, dtype: torch.dtype) -> None:
        std, f, D = noise_std(self.source, self.copies.noise), self.copies.width, self.source.shape[0]
        for expert in range(self.copies.count):
            fresh_f = self.copies.redrawn(expert)
            moments = _moments(self._blocks(expert), fresh_f, by_row=False)
            for rows, block_rf in self._blocks(expert):
                changed = self.copies.changed(block_rf, self.source.name, expert, rows.start * f, std, fresh_f, moments)
                sink.place((expert * D + rows.start) * f, checked(changed.to(dtype), changed, self.source.name))

    def _blocks(self, expert: int) -> Iterator[tuple[slice, Tensor]]:
        """(rows, [r, f])"""
        D, F = self.source.shape
        first = self.copies.first_neuron(expert)
        for row, rows in spans(0, D, max(1, CHUNK_ELEMENTS // F)):
            block_rF = self.source.read(row * F, rows * F).view(rows, F)
            yield slice(row, row + rows), block_rF[:, first : first + self.copies.width].contiguous()


@dataclass(frozen=True)
class RepeatedVector:
    """[F] -> C copies of it: of its shards, one after another."""

    source: SourceTensor
    copies: int

    def write(self, sink: Sink, dtype: torch.dtype) -> None:
        vector = self.source.read(0, self.source.numel).to(dtype)
        for _ in range(self.copies):
            sink.append(vector)


def _moments(blocks: Iterable[tuple[slice, Tensor]], fresh_f: Tensor, by_row: bool) -> tuple[float, float]:
    """(mean, standard deviation) of what is drawn anew; (0, 0) where nothing is, without a read."""
    if not fresh_f.any():
        return 0.0, 0.0
    count, total, squares = 0, 0.0, 0.0
    for rows, block in blocks:
        values = (block[fresh_f[rows]] if by_row else block[:, fresh_f]).double()
        count += values.numel()
        total += values.sum().item()
        squares += values.square().sum().item()
    mean = total / count
    return mean, math.sqrt(max(0.0, squares / count - mean**2))
