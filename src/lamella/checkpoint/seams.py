"""Private names of torch that reading and writing checkpoints touches. tests/titan/test_seams.py says when torch
changes one.

torch reads and writes its distributed format on remote storage through fsspec, but exports none of the classes.
"""

from __future__ import annotations

import os

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint._fsspec_filesystem import FileSystem, FsspecReader, FsspecWriter

__all__ = ["FileSystem", "FsspecReader", "FsspecWriter", "metadata_path"]


def metadata_path(reader: FileSystemReader, rank: int | None) -> str | os.PathLike[str]:
    """Where a reader's checkpoint keeps its metadata: a name that a reader of our own must find as torch's does."""
    return reader._get_metadata_path(rank)
