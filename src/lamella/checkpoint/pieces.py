"""How the elements of one output tensor come from source tensors, a chunk at a time.

Shapes: D model width, F dense FFN width, S slices, f = F/S, r rows of a chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lamella.checkpoint.tensors import CHUNK_ELEMENTS, SourceTensor, spans
from lamella.errors import UserError
from lamella.moe.slicing import NOISE_BLOCK, add_noise, matrix_std


@dataclass(frozen=True)
class Noise:
    scale: float
    """In units of the matrix's standard deviation."""
    seed: int


class Sink(Protocol):
    """Takes the elements of one output tensor."""

    def append(self, data: Tensor) -> None:
        """Continue where the last `append` ended."""

    def place(self, start: int, data: Tensor) -> None:
        """Write to the elements from `start` on, in any order; not mixed with `append`."""


class Piece(Protocol):
    """How one output tensor is made."""

    def write(self, sink: Sink, dtype: torch.dtype) -> None: ...


@dataclass(frozen=True)
class Run:
    """Consecutive elements of a source tensor."""

    source: SourceTensor
    start: int
    count: int


@dataclass(frozen=True)
class Runs:
    """Runs laid end to end. A tensor that is copied is one run; packed gate and up rows are two per slice."""

    runs: tuple[Run, ...]
    noise: Noise | None = None

    @classmethod
    def copy(cls, source: SourceTensor) -> Runs:
        return cls((Run(source, 0, source.numel),))

    def write(self, sink: Sink, dtype: torch.dtype) -> None:
        sources = {run.source.name: run.source for run in self.runs}
        std = {name: noise_std(source, self.noise) for name, source in sources.items()}
        for run in self.runs:
            for start, count in spans(run.start, run.count, CHUNK_ELEMENTS):
                sink.append(_elements(run.source, start, count, dtype, std[run.source.name], self.noise))


@dataclass(frozen=True)
class SplitColumns:
    """[D, F] -> [S, D, f]: each slice's columns. Rows are read once, in order, and scattered."""

    source: SourceTensor
    slices: int
    noise: Noise | None = None

    def write(self, sink: Sink, dtype: torch.dtype) -> None:
        D, F = self.source.shape
        f, std = F // self.slices, noise_std(self.source, self.noise)
        for row, rows in spans(0, D, _rows_per_chunk(F)):
            block_rF = _elements(self.source, row * F, rows * F, dtype, std, self.noise).view(rows, F)
            for i, part_rf in enumerate(block_rF.split(f, dim=1)):
                sink.place((i * D + row) * f, part_rf)


@dataclass(frozen=True)
class JoinColumns:
    """[S, D, f] -> [D, F]: the inverse of SplitColumns."""

    source: SourceTensor

    def write(self, sink: Sink, dtype: torch.dtype) -> None:
        S, D, f = self.source.shape
        for row, rows in spans(0, D, max(1, CHUNK_ELEMENTS // (S * f))):
            parts = [self.source.read((i * D + row) * f, rows * f).view(rows, f) for i in range(S)]
            sink.append(torch.cat(parts, dim=1).to(dtype))


@dataclass(frozen=True)
class Values:
    """A few numbers known beforehand."""

    values: tuple[float, ...]
    repeat: int = 1
    """Each value this many times."""

    def write(self, sink: Sink, dtype: torch.dtype) -> None:
        for value in self.values:
            for _, count in spans(0, self.repeat, CHUNK_ELEMENTS):
                sink.append(torch.full((count,), value, dtype=dtype))


def _rows_per_chunk(width: int) -> int:
    """As many rows as a chunk holds; whole blocks of noise where possible, since part of one costs all of it."""
    rows, unit = max(1, CHUNK_ELEMENTS // width), NOISE_BLOCK // math.gcd(width, NOISE_BLOCK)
    return rows - rows % unit if rows >= unit else rows


def noise_std(source: SourceTensor, noise: Noise | None) -> float:
    """Standard deviation of the noise to add, in the weights' own units; 0 without noise."""
    if noise is None or noise.scale == 0:
        return 0.0
    std = matrix_std(source.read(start, count) for start, count in source.chunks())
    if not math.isfinite(std):
        raise UserError(f"{source.name} holds NaN or infinite values; the checkpoint is damaged")
    return noise.scale * std


def _elements(
    source: SourceTensor, start: int, count: int, dtype: torch.dtype, std: float, noise: Noise | None
) -> Tensor:
    data = source.read(start, count)
    cast = data.to(dtype) if noise is None or not std else _noisy(data, source.name, start, dtype, std, noise)
    return checked(cast, data, source.name) if cast is not data else cast


def checked(cast: Tensor, data: Tensor, name: str) -> Tensor:
    """`cast`, computed from `data`; UserError where float16 could not hold its values."""
    if cast.dtype == torch.float16 and not cast.isfinite().all():
        if not data.isfinite().all():
            raise UserError(f"{name} holds NaN or infinite values; the checkpoint is damaged")
        raise UserError(f"{name} holds values beyond float16's range; use dtype bfloat16 or float32")
    return cast


def _noisy(data: Tensor, name: str, start: int, dtype: torch.dtype, std: float, noise: Noise) -> Tensor:
    """`data`, the elements from `start` on, plus noise, by blocks of the noise: they stay in a core's own cache."""
    noisy = torch.empty(data.numel(), dtype=dtype)
    for block in range(start // NOISE_BLOCK, -(-(start + data.numel()) // NOISE_BLOCK)):
        begin, end = max(start, block * NOISE_BLOCK), min(start + data.numel(), (block + 1) * NOISE_BLOCK)
        part = slice(begin - start, end - start)
        noisy[part] = add_noise(data[part].float(), name, noise.seed, std, begin)
    return noisy
