"""Memory for single experts, and how one gets there: from the model's own files, or from main memory to a GPU.

An expert is one range of bytes of each packed tensor, so it is read in place: there is no second copy of the model on
disk. Reads go past the system's page cache, which would hold the same bytes a second time and count them as ours.

Shapes: D model width, f neurons per expert, E experts of a layer (frozen ones first).
"""

from __future__ import annotations

import math
import mmap
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lamella.errors import UserError
from lamella.moe.matrices import dequantised

PAGE = 4096
"""Bytes; what reading past the page cache wants offsets, lengths and addresses to be multiples of."""
Key = tuple[int, int]
"""(layer, expert)"""


class Range(NamedTuple):
    """A tensor's bytes in a file."""

    path: Path
    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    scales: Range | None = None
    """Of rounded numbers, `shape` of them."""
    width: int = 0
    """With scales: the inputs of the matrix that the numbers stand for."""

    @property
    def nbytes(self) -> int:
        """How many bytes these are, without the scales."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def moved(self) -> int:
        """How many bytes are read for it."""
        return self.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @property
    def numel(self) -> int:
        """The weights of the matrix."""
        return math.prod(self.shape if self.scales is None else (*self.shape[:-1], self.width))


class Slot:
    """Memory for one expert: gate_up [2f, D] and down [D, f], as long as `key` says whose."""

    def __init__(self, memory: tuple[mmap.mmap, ...] = ()):
        self.memory = memory
        """Of each matrix, whole pages."""
        self.gate_up, self.down = torch.empty(0), torch.empty(0)
        self.key: Key | None = None
        self.ready = threading.Event()
        self.error: Exception | None = None
        self.pins = 0
        """How many computations need it where it is."""
        self.is_guess = False
        """Read ahead and not asked for yet."""
        self.last_use: torch.cuda.Event | None = None


class Home(Protocol):
    """Where all experts wait."""

    slot_bytes: int
    """What a slot takes."""

    def expert_bytes(self, key: Key) -> int:
        """What is moved for this expert."""
        ...

    def new_slot(self) -> Slot: ...

    def fill(self, slot: Slot, key: Key) -> None:
        """Bring an expert; returns when it is there. Called from threads."""
        ...


class DiskHome:
    """The experts lie in the model's safetensors.

    Args:
        ranges: per layer and expert the bytes of gate_up and down.
        dtype: to compute in; experts of another, and rounded ones, are converted on the way.
    """

    def __init__(self, ranges: dict[Key, tuple[Range, Range]], dtype: torch.dtype):
        self.ranges, self.dtype = ranges, dtype
        largest = [max(pair[i].nbytes for pair in ranges.values()) for i in (0, 1)]
        widest = [max(pair[i].numel for pair in ranges.values()) * dtype.itemsize for i in (0, 1)]
        scales = max((r.moved - r.nbytes for pair in ranges.values() for r in pair), default=0)
        self._buffers = [_pages(nbytes) + PAGE for nbytes in (*largest, scales)]
        self._slot_sizes = [_pages(nbytes) + PAGE for nbytes in widest]
        self.slot_bytes = sum(self._slot_sizes)
        self._files = _Files()
        self._staging = threading.local()

    def expert_bytes(self, key: Key) -> int:
        """Of both matrices in the file."""
        return sum(range_.moved for range_ in self.ranges[key])

    def new_slot(self) -> Slot:
        """Pages for both matrices. They are taken from the system when they are first written."""
        return Slot(tuple(mmap.mmap(-1, size) for size in self._slot_sizes))

    def fill(self, slot: Slot, key: Key) -> None:
        """Read straight into the slot, or through a page-aligned buffer of the thread where the dtype differs."""
        gate_up, down = self.ranges[key]
        slot.gate_up, slot.down = self._read(slot.memory[0], gate_up, 0), self._read(slot.memory[1], down, 1)

    def _read(self, memory: mmap.mmap, range_: Range, which: int) -> Tensor:
        if range_.dtype == self.dtype and range_.scales is None:
            return self._files.read(range_, memory)
        if not hasattr(self._staging, "memory"):
            self._staging.memory = [mmap.mmap(-1, size) for size in self._buffers]
        read = self._files.read(range_, self._staging.memory[which])
        if range_.scales is not None:
            read = dequantised(read, self._files.read(range_.scales, self._staging.memory[2]), range_.width)
        target = torch.frombuffer(memory, dtype=self.dtype, count=read.numel()).view(read.shape)
        return target.copy_(read)


class _Files:
    """Open files, read past the page cache where the file system can; elsewhere pages are given back at once."""

    def __init__(self) -> None:
        self._open: dict[Path, tuple[int, bool]] = {}
        self._lock = threading.Lock()

    def read(self, range_: Range, memory: mmap.mmap) -> Tensor:
        """The range as a tensor within `memory`, which begins on a page."""
        with self._lock:
            if range_.path not in self._open:
                self._open[range_.path] = _open(range_.path)
            descriptor, is_direct = self._open[range_.path]
        begin = range_.begin // PAGE * PAGE
        want = range_.begin + range_.nbytes - begin
        view = memoryview(memory)[: _pages(want)]
        got = 0
        while got < want:
            count = os.preadv(descriptor, [view[got:]], begin + got)
            got += count
            if not count or (got < want and got % PAGE):
                raise UserError(f"{range_.path} ends {want - got} bytes early; it was changed while it was in use")
        if not is_direct:
            os.posix_fadvise(descriptor, begin, _pages(want), os.POSIX_FADV_DONTNEED)
        count = math.prod(range_.shape)
        offset = range_.begin - begin
        if offset % range_.dtype.itemsize:  # a header of odd length; written by nobody that we know
            raise UserError(f"{range_.path} holds tensors at odd places; save the model again")
        return torch.frombuffer(memory, dtype=range_.dtype, count=count, offset=offset).view(range_.shape)


def _open(path: Path) -> tuple[int, bool]:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT), True
    except OSError:
        return os.open(path, os.O_RDONLY), False


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


class MemoryHome:
    """The experts lie in main memory, pinned where they go to a GPU, and are copied on a stream of their own.

    Args:
        experts: per layer the matrices of its experts, gate_up and down.
    """

    def __init__(self, experts: Mapping[int, tuple[Sequence[Tensor], Sequence[Tensor]]], device: torch.device):
        self.experts, self.device = experts, device
        sizes = [sum(m[0].nbytes for m in matrices) for matrices in experts.values()]
        self.slot_bytes = max(sizes)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def expert_bytes(self, key: Key) -> int:
        """Of both matrices."""
        return sum(matrices[key[1]].nbytes for matrices in self.experts[key[0]])

    def new_slot(self) -> Slot:
        """Nothing yet: the layers' experts may differ in width."""
        return Slot()

    def fill(self, slot: Slot, key: Key) -> None:
        """Copy both matrices; on a GPU after what still computes with the slot."""
        layer, expert = key
        gate_up, down = (matrices[expert] for matrices in self.experts[layer])
        if slot.gate_up.shape != gate_up.shape:
            slot.gate_up, slot.down = (torch.empty_like(m, device=self.device) for m in (gate_up, down))
        if self._stream is None:
            slot.gate_up.copy_(gate_up), slot.down.copy_(down)
            return
        with torch.cuda.stream(self._stream):
            if slot.last_use is not None:
                self._stream.wait_event(slot.last_use)
            slot.gate_up.copy_(gate_up, non_blocking=True)
            slot.down.copy_(down, non_blocking=True)
            self._stream.synchronize()
