"""How the elements of one output tensor come from source tensors, a chunk at a time.

A plan is made without torch, which is imported where the first piece is written.

Shapes: D model width, F dense FFN width, S slices, f = F/S, r rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from lamella.checkpoint.tensors import CHUNK_ELEMENTS, SourceTensor, spans
from lamella.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ChangeBlock: TypeAlias = "Callable[[Tensor, int, torch.dtype], Tensor]"
"""(elements, the place of the first one in the flattened tensor, dtype) -> the changed elements in that dtype."""


class Change(Protocol):
    """What is done to a tensor's elements on their way, such as adding noise."""

    @property
    def unit(self) -> int:
        """Elements that are changed together: cutting within a unit costs all of it."""
        ...

    def prepare(self, source: SourceTensor) -> ChangeBlock | None:
        """The change of this tensor's elements; None where it changes nothing."""
        ...


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
class Stretch:
    """Consecutive elements of a source tensor."""

    source: SourceTensor
    start: int
    count: int


@dataclass(frozen=True)
class Stretches:
    """Stretches laid end to end. A tensor that is copied is one; packed gate and up rows are two per slice."""

    stretches: tuple[Stretch, ...]
    change: Change | None = None

    @classmethod
    def copy(cls, source: SourceTensor) -> Stretches:
        return cls((Stretch(source, 0, source.numel),))

    def write(self, sink: Sink, dtype: torch.dtype) -> None:
        sources = {part.source.name: part.source for part in self.stretches}
        changes = {name: _prepared(source, self.change) for name, source in sources.items()}
        for part in self.stretches:
            for start, count in spans(part.start, part.count, CHUNK_ELEMENTS):
                sink.append(_elements(part.source, start, count, dtype, changes[part.source.name]))


@dataclass(frozen=True)
class SplitColumns:
    """[D, F] -> [S, D, f]: each slice's columns. Rows are read once, in order, and scattered."""

    source: SourceTensor
    slices: int
    change: Change | None = None

    def write(self, sink: Sink, dtype: torch.dtype) -> None:
        D, F = self.source.shape
        f, change = F // self.slices, _prepared(self.source, self.change)
        for row, rows in spans(0, D, _rows_per_chunk(F, self.change)):
            block_rF = _elements(self.source, row * F, rows * F, dtype, change).view(rows, F)
            for i, part_rf in enumerate(block_rF.split(f, dim=1)):
                sink.place((i * D + row) * f, part_rf)


@dataclass(frozen=True)
class JoinColumns:
    """[S, D, f] -> [D, F]: the inverse of SplitColumns."""

    source: SourceTensor

    def write(self, sink: Sink, dtype: torch.dtype) -> None:
        import torch

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
        import torch

        for value in self.values:
            for _, count in spans(0, self.repeat, CHUNK_ELEMENTS):
                sink.append(torch.full((count,), value, dtype=dtype))


@dataclass(frozen=True, eq=False)
class Array:
    """A small float32 array that is in memory."""

    values: np.ndarray

    def write(self, sink: Sink, dtype: torch.dtype) -> None:
        import torch

        data = torch.from_numpy(np.ascontiguousarray(self.values)).flatten()
        sink.append(checked(data.to(dtype), data, "a router"))


@dataclass(frozen=True)
class Columns:
    """[D, F] -> [D, f]: the columns from `first` on."""

    source: SourceTensor
    first: int
    width: int
    change: Change | None = None

    def write(self, sink: Sink, dtype: torch.dtype) -> None:
        D, F = self.source.shape
        change = _prepared(self.source, self.change)
        for row, rows in spans(0, D, _rows_per_chunk(F, self.change)):
            block_rF = _elements(self.source, row * F, rows * F, dtype, change).view(rows, F)
            sink.append(block_rF[:, self.first : self.first + self.width].flatten())


@dataclass(frozen=True)
class BesideEachOther:
    """Matrices [D, F] -> [D, N*F]: their columns, one matrix after the other."""

    parts: tuple[tuple[SourceTensor, Change | None], ...]

    def write(self, sink: Sink, dtype: torch.dtype) -> None:
        import torch

        changes = [_prepared(source, change) for source, change in self.parts]
        D, F = self.parts[0][0].shape
        for row, rows in spans(0, D, max(1, CHUNK_ELEMENTS // (F * len(self.parts)))):
            blocks = [
                _elements(source, row * F, rows * F, dtype, change).view(rows, F)
                for (source, _), change in zip(self.parts, changes, strict=True)
            ]
            sink.append(torch.cat(blocks, dim=1).flatten())


@dataclass(frozen=True)
class EndToEnd:
    """Pieces laid end to end: all of them in order (`append`), so that whole matrices become one packed tensor."""

    pieces: tuple[Piece, ...]

    def write(self, sink: Sink, dtype: torch.dtype) -> None:
        for piece in self.pieces:
            piece.write(sink, dtype)


def plain_stretches(piece: Piece, code: str) -> list[Stretch] | None:
    """The stretches whose bytes, one after another, are the piece's tensor in a dtype; None where bytes change."""
    if isinstance(piece, EndToEnd):
        found = [plain_stretches(part, code) for part in piece.pieces]
        return None if None in found else [stretch for part in found if part is not None for stretch in part]
    if not isinstance(piece, Stretches) or piece.change is not None:
        return None
    # a kind of SourceTensor that computes what it reads has no bytes to be copied
    sources = [part.source for part in piece.stretches]
    is_plain = all(type(source) is SourceTensor and source.dtype == code for source in sources)
    return list(piece.stretches) if is_plain and all(isinstance(source.path, Path) for source in sources) else None


def _rows_per_chunk(width: int, change: Change | None) -> int:
    """As many rows as a chunk holds; whole units of the change where possible."""
    rows = max(1, CHUNK_ELEMENTS // width)
    unit = 1 if change is None else change.unit // math.gcd(width, change.unit)
    return rows - rows % unit if rows >= unit else rows


def _prepared(source: SourceTensor, change: Change | None) -> ChangeBlock | None:
    return None if change is None else change.prepare(source)


def _elements(source: SourceTensor, start: int, count: int, dtype: torch.dtype, change: ChangeBlock | None) -> Tensor:
    data = source.read(start, count)
    cast = data.to(dtype) if change is None else change(data, start, dtype)
    return checked(cast, data, source.name) if cast is not data else cast


def checked(cast: Tensor, data: Tensor, name: str) -> Tensor:
    """`cast`, computed from `data`; UserError where float16 could not hold its values."""
    if str(cast.dtype) == "torch.float16" and not cast.isfinite().all():
        if not data.isfinite().all():
            raise UserError(f"{name} holds NaN or infinite values; the checkpoint is damaged")
        raise UserError(f"{name} holds values beyond float16's range; use dtype bfloat16 or float32")
    return cast
