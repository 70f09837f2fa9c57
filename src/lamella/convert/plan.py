"""What a conversion will write, decided before a byte is written: each tensor, its place, and how it is made.

Shapes: D model width, F dense FFN width, S slices, f = F/S.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, get_args

import torch
from torch import Tensor

from lamella.config import GateKind, RoutingKind
from lamella.convert.tensors import CHUNK_ELEMENTS, DTYPES, SourceTensor, spans
from lamella.errors import UserError, did_you_mean
from lamella.moe.slicing import add_noise, matrix_std

DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class SliceOptions:
    """How to slice; the `recipe` of the manifest."""

    slices: int = 8
    """Parts that each FFN is cut into; must divide its width."""
    noise: float = 0.05
    """Standard deviation of what is added to the copies, in units of the dense matrix's own."""
    seed: int = 0
    layers: str = "all"
    """"all", "every:N" (layers 0, N, 2N, ...), or a list such as "0,3,5-9"."""
    routing: RoutingKind = "twin"
    gate: GateKind = "sigmoid"
    top_k: int | None = None
    """Experts per token; None: as many as slices."""
    dtype: str | None = None
    """"float32", "bfloat16" or "float16"; None: that of the source, tensor by tensor."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("routing", get_args(RoutingKind)),
            ("gate", get_args(GateKind)),
            ("dtype", (*DTYPE_NAMES, None)),
        ):
            value = getattr(self, name)
            if value not in choices:
                known = [choice for choice in choices if choice]
                raise UserError(
                    f"{name} is {value!r}; it must be one of {', '.join(known)}{did_you_mean(str(value), known)}"
                )
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise UserError(f"noise is {self.noise}; it must be 0 or a positive number")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """The layers that "all", "every:N" or a list such as "0,3,5-9" names, ascending; a UserError if not there."""
    if text == "all":
        return tuple(range(num_layers))
    if match := re.fullmatch(r"every:([1-9]\d*)", text):
        return tuple(range(0, num_layers, int(match[1])))
    layers: set[int] = set()
    for part in text.replace(" ", "").split(","):
        if not (match := re.fullmatch(r"(\d+)(?:-(\d+))?", part)):
            raise UserError(f"layers is {text!r}; write all, every:N, or a list such as 0,3,5-9")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < num_layers:
            raise UserError(f"layers names {part}, but the model has the layers 0-{num_layers - 1}")
        layers |= set(range(first, last + 1))
    return tuple(sorted(layers))


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
        std = {run.source.name: noise_std(run.source, self.noise) for run in self.runs}
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
        for row, rows in spans(0, D, max(1, CHUNK_ELEMENTS // F)):
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
            sink.append(torch.full((self.repeat,), value, dtype=dtype))


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
    if noise is not None and std:
        data = add_noise(data.float(), source.name, noise.seed, std, start)
    cast = data.to(dtype)
    if dtype == torch.float16 and cast is not data and not cast.isfinite().all():
        raise UserError(f"{source.name} holds values beyond float16's range; use --dtype bfloat16 or float32")
    return cast


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
        return self.numel * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Plan:
    """Everything that will be in the output folder, tensors first."""

    tensors: list[OutputTensor]
    config: dict[str, Any]
    """The new config.json."""
    max_shard_bytes: int = field(default=MAX_SHARD_BYTES)

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
        ordered = [sorted(group, key=lambda tensor: -DTYPES[tensor.dtype].itemsize) for group in groups]
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
