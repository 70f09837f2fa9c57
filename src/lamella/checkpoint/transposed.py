"""Matrices that are stored [in, out] (transformers' Conv1D, GPT-2's), read as [out, in]: nothing else has to know.
And the matrices that lie one after another in a tensor.

Shapes: R stored rows, C stored columns, m columns of a block.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lamella.checkpoint.dtypes import DTYPES
from lamella.checkpoint.remote import RemotePath
from lamella.checkpoint.tensors import SourceTensor, read_bytes
from lamella.errors import UserError


@dataclass(frozen=True)
class TransposedTensor(SourceTensor):
    """`shape` is (C, R), as it is read; the file holds [R, C]."""

    def read(self, start: int, count: int) -> Tensor:
        """As SourceTensor.read. The columns that hold these elements are read, and no others."""
        C, R = self.shape
        first, last = start // R, -(-(start + count) // R)
        raw = self._rows() if last - first == C else self._columns(first, last)
        block_Rm = torch.from_numpy(raw).view(DTYPES[self.dtype]).view(R, last - first)
        return block_Rm.t().reshape(-1)[start - first * R :][:count]

    def _rows(self) -> np.ndarray:
        return read_bytes(self.path, self.begin, self.numel * DTYPES[self.dtype].itemsize)

    def _columns(self, first: int, last: int) -> np.ndarray:
        C, R = self.shape
        size = DTYPES[self.dtype].itemsize
        if isinstance(self.path, RemotePath):  # one request is quicker than one for each row
            return self._rows().reshape(R, C * size)[:, first * size : last * size].flatten()
        width = (last - first) * size
        buffer = np.empty(R * width, np.uint8)
        fd = os.open(self.path, os.O_RDONLY)
        try:
            for row, part in enumerate(buffer.reshape(R, width)):
                if os.preadv(fd, [part.data], self.begin + (row * C + first) * size) != width:
                    raise UserError(f"{self.path} ends early; it is truncated or changed while it was read")
        finally:
            os.close(fd)
        return buffer


def transposed(source: SourceTensor) -> TransposedTensor:
    """A stored [R, C] matrix as [C, R]."""
    R, C = source.shape
    return TransposedTensor(source.name, source.dtype, (C, R), source.path, source.begin)


@dataclass(frozen=True)
class _Rows(SourceTensor):
    """Consecutive rows of a tensor that computes what it reads."""

    whole: SourceTensor
    first: int
    """Elements before them."""

    def read(self, start: int, count: int) -> Tensor:
        """As SourceTensor.read."""
        return self.whole.read(self.first + start, count)


def halves(source: SourceTensor, called: tuple[str, str]) -> tuple[SourceTensor, SourceTensor]:
    """[2R, C] -> the first R rows and the last, by the source's name and these."""
    rows, columns = source.shape[0] // 2, source.shape[1]
    nbytes = rows * columns * DTYPES[source.dtype].itemsize
    found = []
    for i, half in enumerate(called):
        name, begin = f"{source.name} ({half})", source.begin + i * nbytes
        if type(source) is SourceTensor:
            found.append(dataclasses.replace(source, name=name, shape=(rows, columns), begin=begin))
        else:
            place = (name, source.dtype, (rows, columns), source.path, begin)
            found.append(_Rows(*place, source, i * rows * columns))
    return found[0], found[1]


def matrices(source: SourceTensor) -> list[SourceTensor]:
    """[S, R, C] -> the S matrices [R, C], which lie one after another."""
    S, *shape = source.shape
    nbytes = math.prod(shape) * DTYPES[source.dtype].itemsize
    return [dataclasses.replace(source, shape=tuple(shape), begin=source.begin + i * nbytes) for i in range(S)]
