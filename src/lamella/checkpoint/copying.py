"""Carry out a plan of which most tensors are copies: the kernel copies their bytes, unseen and unhashed.

Such a plan is written without torch, which is imported where a tensor has to be computed. What is written, and into
which files, is as in `lamella.checkpoint.write`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lamella.checkpoint.blocks import BlockFile
from lamella.checkpoint.folder import write_index
from lamella.checkpoint.pieces import Array, Stretch, Values, plain_stretches
from lamella.checkpoint.plan import OutputTensor, WritePlan
from lamella.checkpoint.tensors import CHUNK_ELEMENTS, ITEM_BYTES, encode_header, spans
from lamella.errors import UserError

MAX_THREADS = 4
"""More of them copy no faster: the memory is busy."""


def copy_tensors(plan: WritePlan, folder: Path, on_bytes: Callable[[int], None] = lambda _: None) -> None:
    """Write the plan's safetensors files, and their index if there are several, into an existing folder."""
    files: list[BlockFile] = []
    jobs: list[tuple[OutputTensor, BlockFile, int]] = []
    try:
        for name, tensors in plan.shards().items():
            header = encode_header([(t.name, t.dtype, t.shape) for t in tensors])
            file = BlockFile(folder / name, len(header) + sum(t.nbytes for t in tensors))
            files.append(file)
            file.write(0, memoryview(header))
            at = len(header)
            for tensor in tensors:
                jobs.append((tensor, file, at))
                at += tensor.nbytes
        _run(jobs, on_bytes)
        for file in files:
            file.sync()
    finally:
        for file in files:
            file.close()
    write_index(plan, folder)


def _run(jobs: Iterable[tuple[OutputTensor, BlockFile, int]], on_bytes: Callable[[int], None]) -> None:
    failed = threading.Event()

    def make(job: tuple[OutputTensor, BlockFile, int]) -> None:
        if failed.is_set():
            return
        try:
            _write(*job, on_bytes)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        try:
            for _ in pool.map(make, jobs):
                pass
        except BaseException:  # Ctrl-C as well: what is queued must not run on
            failed.set()
            raise


def _write(tensor: OutputTensor, file: BlockFile, at: int, on_bytes: Callable[[int], None]) -> None:
    stretches = plain_stretches(tensor.piece, tensor.dtype)
    if stretches is not None:
        for stretch in stretches:
            at += _copy(stretch, file, at, on_bytes)
    elif isinstance(tensor.piece, Array):
        _write_values(tensor.piece.values.reshape(-1), tensor, file, at, on_bytes)
    elif isinstance(tensor.piece, Values):
        for value in tensor.piece.values:
            for _, count in spans(0, tensor.piece.repeat, CHUNK_ELEMENTS):
                at += _write_values(np.full(count, value, np.float32), tensor, file, at, on_bytes)
    else:
        from lamella.checkpoint.dtypes import DTYPES
        from lamella.checkpoint.write import FileSink

        sink = FileSink(file, at, tensor, on_bytes)
        tensor.piece.write(sink, DTYPES[tensor.dtype])
        sink.digest()


def _copy(stretch: Stretch, file: BlockFile, at: int, on_bytes: Callable[[int], None]) -> int:
    source, size = stretch.source, ITEM_BYTES[stretch.source.dtype]
    assert isinstance(source.path, Path), "other files have no bytes here that the kernel could copy"
    fd = os.open(source.path, os.O_RDONLY)
    try:
        file.copy_from(fd, source.begin + stretch.start * size, stretch.count * size, at)
    except EOFError:
        raise UserError(f"{source.path} ends early; it is truncated or changed while it was read") from None
    finally:
        os.close(fd)
    on_bytes(stretch.count * size)
    return stretch.count * size


def _write_values(
    values: np.ndarray, tensor: OutputTensor, file: BlockFile, at: int, on_bytes: Callable[[int], None]
) -> int:
    raw = encoded(values, tensor.dtype)
    if not np.isfinite(values).all() or (tensor.dtype == "F16" and not np.isfinite(raw).all()):
        raise UserError(f"{tensor.name} holds values that {tensor.dtype} cannot; use dtype bfloat16 or float32")
    file.write(at, raw.view(np.uint8).data)
    on_bytes(raw.nbytes)
    return raw.nbytes


def encoded(values: np.ndarray, code: str) -> np.ndarray:
    """float32 numbers as safetensors' dtype has them, rounded to the nearest, of two equally near to the even one."""
    values = np.ascontiguousarray(values, np.float32)
    if code == "F32":
        return values
    if code == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def decoded(raw: np.ndarray, code: str) -> np.ndarray:
    """Bytes of a file as float32 numbers."""
    if code == "F32":
        return raw.view(np.float32)
    if code == "F16":
        return raw.view(np.float16).astype(np.float32)
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
