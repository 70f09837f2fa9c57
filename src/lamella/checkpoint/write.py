"""Carry out a plan: a few threads write safetensors files, in a folder that appears whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from lamella.checkpoint.blocks import BlockFile, Stream
from lamella.checkpoint.plan import OutputTensor, WritePlan
from lamella.checkpoint.remote import AnyPath
from lamella.checkpoint.tensors import DTYPES, encode_header
from lamella.errors import UserError
from lamella.jsons import Json

# A thread holds a few chunks of 4 MiB. More threads than this do not help a disk.
MAX_THREADS = 16
MAX_STREAMS = 64  # open at a time in one tensor, each with a buffer
_SPARE_BYTES = 64 << 20  # tokenizer, manifest and the file system's own needs


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


def write_index(plan: WritePlan, folder: Path) -> None:
    """Write the index of the plan's files, if there are several."""
    shards = plan.shards()
    if len(shards) > 1:
        weight_map = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
        index = {"metadata": {"total_size": plan.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, values: Json) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_output(out: Path, overwrite: bool, needed_bytes: int = 0, sources: Iterable[AnyPath] = ()) -> None:
    """UserError if `out` cannot take a checkpoint of this size; nothing is touched.

    Only an empty folder or a checkpoint is ever overwritten, and never one that holds a source file.
    """
    if out.exists() or out.is_symlink():
        if not overwrite:
            raise UserError(f"{out} exists; pass --overwrite to replace it, or another --out")
        if out.is_symlink() or not out.is_dir():
            raise UserError(f"{out} is not a folder; give another --out")
        if any(out.iterdir()) and not ((out / "config.json").is_file() or any(out.glob("*.gguf"))):
            raise UserError(f"{out} is not a checkpoint, so it is not overwritten; give another --out")
    if out.resolve() == Path.cwd():
        raise UserError("the working directory itself cannot be replaced; give another --out")
    here = [path for path in sources if isinstance(path, Path)]
    files = [place for path in here for place in (path.parent.resolve() / path.name, path.resolve())]  # links too
    if any(out.resolve() in file.parents for file in files):
        raise UserError(f"{out} holds the model that is to be read; give another --out")
    parent = _existing_parent(out)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"cannot write into {parent}; give another --out")
    free = shutil.disk_usage(parent).free
    if free < needed_bytes + _SPARE_BYTES:
        raise UserError(
            f"{out} needs {needed_bytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free; give another --out"
        )


def _existing_parent(out: Path) -> Path:
    return next(parent for parent in out.absolute().parents if parent.exists())


@contextmanager
def appearing_folder(out: Path) -> Iterator[Path]:
    """A temporary sibling of `out` that takes its place when the block ends well, and vanishes when it does not."""
    made = [parent for parent in out.absolute().parents if not parent.exists()]
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.absolute().parent, prefix=f".{out.name}."))
    try:
        temporary.chmod(0o755)  # mkdtemp lets in its owner only
        yield temporary
        _replace(temporary, out.absolute())
        made = []
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"the disk of {out} became full; nothing was kept") from None
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            parent.rmdir()


def _replace(temporary: Path, out: Path) -> None:
    """Rename; an old folder is moved aside first and deleted last."""
    if not out.exists():
        temporary.rename(out)
    else:
        aside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.old."))
        out.rename(aside / out.name)
        temporary.rename(out)
        shutil.rmtree(aside)
    directory = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
