"""What a conversion will write, decided before a byte is written: each tensor, its place, and how it is made."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lamella.checkpoint.pieces import Piece
from lamella.checkpoint.tensors import STORED_BYTES
from lamella.jsons import Json

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class OutputTensor:
    name: str
    dtype: str
    """safetensors' code."""
    shape: tuple[int, ...]
    piece: Piece

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * STORED_BYTES[self.dtype]


@dataclass(frozen=True)
class WritePlan:
    """Everything that will be in the output folder, tensors first."""

    tensors: list[OutputTensor]
    config: Json
    """The new config.json."""
    max_shard_bytes: int = MAX_SHARD_BYTES
    notes: Json = field(default_factory=dict)
    """What was found on the way, for the manifest."""
    scratch: Path | None = None
    """Folder that tensors are read from, and that has served when they are written."""

    @property
    def total_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def shards(self) -> dict[str, list[OutputTensor]]:
        """File name -> its tensors. Wider dtypes first in each file, so that every tensor is aligned."""
        groups = list(_fill(self.tensors, self.max_shard_bytes))
        if len(groups) == 1:
            names = ["model.safetensors"]
        else:
            names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
        ordered = [sorted(group, key=lambda tensor: -STORED_BYTES[tensor.dtype]) for group in groups]
        return dict(zip(names, ordered, strict=True))

    def describe(self) -> str:
        """One line per tensor with dtype, shape and size, by file."""
        lines = []
        for file, tensors in self.shards().items():
            lines.append(f"{file}  {sum(t.nbytes for t in tensors) / 1e6:,.1f} MB")
            lines += [f"  {t.name:<64} {t.dtype:<5} {list(t.shape)!s:<24} {t.nbytes / 1e6:>10,.2f} MB" for t in tensors]
        parameters = sum(tensor.numel for tensor in self.tensors)
        return "\n".join(
            [*lines, f"{len(self.tensors)} tensors, {parameters:,} parameters, {self.total_bytes / 1e9:,.2f} GB"]
        )


def _fill(tensors: list[OutputTensor], max_bytes: int) -> Iterator[list[OutputTensor]]:
    group: list[OutputTensor] = []
    size = 0
    for tensor in tensors:
        if group and size + tensor.nbytes > max_bytes:
            yield group
            group, size = [], 0
        group.append(tensor)
        size += tensor.nbytes
    yield group
