"""Checkpoints of torch's distributed format, opened so that nothing in them can run code.

Their `.metadata` is a pickle, and entries that are no tensors are pickles too. torch unpickles both with everything
allowed; a run directory that comes from elsewhere may then run whatever its maker wanted. Here an unpickler finds the
classes of a checkpoint and no others, and entries are read as torch reads weights (`weights_only`).
"""

from __future__ import annotations

import io
import os
import pickle
from typing import IO, Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from lamella.checkpoint.seams import FsspecReader, metadata_path
from lamella.errors import UserError

_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = frozenset(
    {
        *((_METADATA, name) for name in (
            "Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "BytesStorageMetadata",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib", "WindowsPath"),
    }
)  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_metadata(file: IO[bytes], where: str | os.PathLike[str]) -> Metadata:
    """What a checkpoint's `.metadata` file says.

    Raises:
        UserError: it is damaged, or asks for anything that no checkpoint needs; nothing of it has run then.
    """
    try:
        metadata = _MetadataUnpickler(file).load()
    except Exception as error:
        raise UserError(
            f"{where} is no metadata of a checkpoint ({error}); it was not opened, take the checkpoint from a source "
            "that you trust"
        ) from None
    if not isinstance(metadata, Metadata):
        raise UserError(f"{where} is no metadata of a checkpoint; restore the file")
    return metadata


class _Reading:
    """Replaces what reads the metadata, in both of torch's readers."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = metadata_path(self, kwargs.get("rank"))  # type: ignore[arg-type]
        with self.fs.create_stream(path, "rb") as file:  # type: ignore[attr-defined]
            metadata = read_metadata(file, path)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id  # type: ignore[attr-defined]
        return metadata


class _LocalReader(_Reading, FileSystemReader):
    pass


class _RemoteReader(_Reading, FsspecReader):
    pass


def checkpoint_reader(place: str) -> FileSystemReader:
    """A reader for `torch.distributed.checkpoint.load` of a folder or, with "://" in it, of a URL."""
    return _RemoteReader(place) if "://" in place else _LocalReader(place)


class WeightsOnlyPlanner(DefaultLoadPlanner):
    """Reads entries that are no tensors (counters, schedules) as plain values."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put an entry into the state; UserError for one that holds more than numbers, text and tensors."""
        try:
            plain = torch.load(value, weights_only=True)
        except pickle.UnpicklingError:
            raise UserError(
                f"the checkpoint's entry {read_item.dest_index.fqn} is no plain value but code or an unknown class; it "
                "was not opened, take the checkpoint from a source that you trust"
            ) from None
        buffer = io.BytesIO()
        torch.save(plain, buffer)
        buffer.seek(0)
        super().load_bytes(read_item, buffer)
