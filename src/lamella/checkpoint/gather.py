"""Rows and columns of dense matrices by their indices, a chunk at a time.

Shapes: D model width, F dense FFN width, E experts, f neurons per expert, r rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lamella.checkpoint.pieces import Sink, checked
from lamella.checkpoint.tensors import CHUNK_ELEMENTS, SourceTensor, spans
from lamella.checkpoint.transposed import TransposedTensor


@dataclass(frozen=True, eq=False)
class GatherRows:
    """Rows of matrices of one width, laid end to end: the gate rows of an expert, its up rows, the next expert's."""

    parts: tuple[tuple[SourceTensor, Tensor], ...]
    """(matrix, int64 row ids)"""

    def write(self, sink: Sink, dtype: torch.dtype) -> None:
        for source, ids in self.parts:
            if isinstance(source, TransposedTensor):  # a row of it is a read per stored row
                rows = source.read(0, source.numel).view(source.shape).index_select(0, ids)
                sink.append(checked(rows.to(dtype), rows, source.name).flatten())
                continue
            for row, count in consecutive(ids.tolist()):
                for start, size in spans(row * source.width, count * source.width, CHUNK_ELEMENTS):
                    data = source.read(start, size)
                    sink.append(checked(data.to(dtype), data, source.name))


def consecutive(ids: list[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of the runs of consecutive numbers."""
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or ids[i] != ids[i - 1] + 1:
            yield ids[start], i - start
            start = i


@dataclass(frozen=True, eq=False)
class GatherElements:
    """Elements of a vector."""

    source: SourceTensor
    ids: Tensor

    def write(self, sink: Sink, dtype: torch.dtype) -> None:
        data = self.source.read(0, self.source.numel)[self.ids]
        sink.append(checked(data.to(dtype), data, self.source.name).flatten())


@dataclass(frozen=True, eq=False)
class GatherColumns:
    """[D, F] -> [E, D, f]: each expert's columns, rows optionally scaled. Rows are read once, in order."""

    source: SourceTensor
    ids_Ef: Tensor
    row_scale_D: Tensor | None = None

    def write(self, sink: Sink, dtype: torch.dtype) -> None:
        D, F = self.source.shape
        f = self.ids_Ef.shape[1]
        for row, rows in spans(0, D, max(1, CHUNK_ELEMENTS // F)):
            block_rF = self.source.read(row * F, rows * F).view(rows, F)
            if self.row_scale_D is not None:
                block_rF = block_rF.float() * self.row_scale_D[row : row + rows, None]
            for e, ids_f in enumerate(self.ids_Ef):
                part_rf = block_rF.index_select(1, ids_f)
                sink.place((e * D + row) * f, checked(part_rf.to(dtype), part_rf, self.source.name))


@dataclass(frozen=True, eq=False)
class Given:
    """A small tensor that is in memory."""

    tensor: Tensor

    def write(self, sink: Sink, dtype: torch.dtype) -> None:
        sink.append(self.tensor.to(dtype))
