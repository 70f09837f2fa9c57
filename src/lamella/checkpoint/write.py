"""Carry out a plan: a few threads write safetensors files, and hash every tensor on its way."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from lamella.checkpoint.blocks import BlockFile, Stream
from lamella.checkpoint.dtypes import DTYPES
from lamella.checkpoint.folder import appearing_folder, check_output, write_index, write_json
from lamella.checkpoint.plan import OutputTensor, WritePlan
from lamella.checkpoint.tensors import encode_header

__all__ = [
    "FileSink", "appearing_folder", "check_output", "one_torch_thread", "write_index", "write_json", "write_shard",
    "write_tensors",
]  # fmt: skip

# A thread holds a few chunks of 4 MiB. More threads than this do not help a disk.
MAX_THREADS = 16
MAX_STREAMS = 64  # open at a time in one tensor, each with a buffer


class FileSink:
    """One output tensor's place in a file, and the hash of what was written there."""

    def __init__(self, file: BlockFile, offset: int, tensor: OutputTensor, on_bytes: Callable[[int], None]):
        self._file, self._offset, self._tensor, self._on_bytes = file, offset, tensor, on_bytes
        self._hash = xxhash.xxh3_128()
        self._streams: dict[int, Stream] = {}  # by their end: slices of columns are as many streams
        self._appended = 0
        self._placed = 0

    def append(self, data: Tensor) -> None:
        view = _bytes_of(data)
        self._hash.update(view)
        self._write(self._offset + self._appended, view)
        self._appended += len(view)

    def place(self, start: int, data: Tensor) -> None:
        view = _bytes_of(data)
        self._write(self._offset + start * data.element_size(), view)
        self._placed += len(view)

    def _write(self, at: int, view: memoryview) -> None:
        stream = self._streams.pop(at, None)
        if stream is None:
            if len(self._streams) == MAX_STREAMS:
                self._streams.pop(next(iter(self._streams))).close()
            stream = Stream(self._file, at)
        stream.write(view)
        self._streams[stream.end] = stream
        self._on_bytes(len(view))

    def digest(self) -> str:
        """Finish writing: xxh3_128 of the tensor's bytes. Those placed out of order are read back."""
        assert self._appended + self._placed == self._tensor.nbytes, self._tensor.name
        assert not (self._appended and self._placed), self._tensor.name
        for stream in self._streams.values():
            stream.close()
        if self._placed:
            for view in self._file.read(self._offset, self._placed):
                self._hash.update(view)
        return self._hash.hexdigest()


def _bytes_of(data: Tensor) -> memoryview:
    return data.contiguous().view(torch.uint8).numpy().data.cast("B")


def write_tensors(plan: WritePlan, folder: Path, on_bytes: Callable[[int], None] = lambda _: None) -> dict[str, str]:
    """Write the plan's safetensors files, and their index if there are several, into an existing folder.

    Returns:
        name -> xxh3_128 of each tensor's little-endian bytes.
    """
    jobs: list[tuple[OutputTensor, FileSink]] = []
    files: list[BlockFile] = []
    try:
        for name, tensors in plan.shards().items():
            header = encode_header([(t.name, t.dtype, t.shape) for t in tensors])
            files.append(BlockFile(folder / name, len(header) + sum(t.nbytes for t in tensors)))
            files[-1].write(0, memoryview(header))
            jobs += _lay_out(files[-1], len(header), tensors, on_bytes)
        hashes = _run(jobs)
        for file in files:
            file.sync()
    finally:
        for file in files:
            file.close()
    write_index(plan, folder)
    return hashes


def _lay_out(
    file: BlockFile, offset: int, tensors: list[OutputTensor], on_bytes: Callable[[int], None]
) -> Iterator[tuple[OutputTensor, FileSink]]:
    """Each tensor with its place, one after the other from `offset` on."""
    for tensor in tensors:
        yield tensor, FileSink(file, offset, tensor, on_bytes)
        offset += tensor.nbytes


def _run(jobs: list[tuple[OutputTensor, FileSink]]) -> dict[str, str]:
    failed = threading.Event()

    def make(job: tuple[OutputTensor, FileSink]) -> tuple[str, str]:
        tensor, sink = job
        if failed.is_set():
            return tensor.name, ""
        try:
            tensor.piece.write(sink, DTYPES[tensor.dtype])
            return tensor.name, sink.digest()
        except BaseException:
            failed.set()
            raise

    with one_torch_thread(), ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        try:
            return dict(pool.map(make, jobs))
        except BaseException:  # Ctrl-C as well: what is queued must not run on
            failed.set()
            raise


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Parallelism is over tensors here; torch's own threads in each worker would only contend."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_shard(path: Path, tensors: list[OutputTensor], on_bytes: Callable[[int], None]) -> dict[str, str]:
    """Write one safetensors file; the hashes are those of `write_tensors`."""
    header = encode_header([(t.name, t.dtype, t.shape) for t in tensors])
    file = BlockFile(path, len(header) + sum(t.nbytes for t in tensors))
    try:
        file.write(0, memoryview(header))
        return _run(list(_lay_out(file, len(header), tensors, on_bytes)))
    finally:
        file.close()
