"""Weights in a folder that fsspec reaches (s3://bucket/model, memory://model): read in place, never copied whole.

A `RemotePath` answers what `pathlib.Path` does as far as reading a checkpoint asks it.
"""

from __future__ import annotations

import fnmatch
import posixpath
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from lamella.errors import UserError

BLOCK_BYTES = 16 << 20


class Stat(NamedTuple):
    """As `os.stat_result`, as far as it is asked for."""

    st_size: int
    st_mtime_ns: int
    """No time, but another number where the file is another one."""


@dataclass(frozen=True)
class RemotePath:
    """A file or folder of a file system of fsspec."""

    files: AbstractFileSystem
    place: str
    """The path on that file system."""
    url: str

    @classmethod
    def open(cls, url: str) -> RemotePath:
        """The place that a URL names.

        Raises:
            UserError: there is no driver for it.
        """
        try:
            files, place = url_to_fs(url, use_listings_cache=False)  # other machines write there, too
        except (ImportError, ValueError) as error:
            raise UserError(f"{url} cannot be opened: {error}") from None
        return cls(files, place.rstrip("/"), url.rstrip("/"))

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.files, posixpath.join(self.place, name), posixpath.join(self.url, name))

    def __lt__(self, other: AnyPath) -> bool:
        return str(self) < str(other)

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part."""
        return posixpath.basename(self.place)

    def exists(self) -> bool:
        """Whether there is a file or a folder."""
        return self.files.exists(self.place)

    def is_file(self) -> bool:
        """Whether there is a file."""
        return self.files.isfile(self.place)

    def is_dir(self) -> bool:
        """Whether there is a folder."""
        return self.files.isdir(self.place)

    def iterdir(self) -> Iterator[RemotePath]:
        """What is in the folder; nothing where there is none."""
        if self.is_dir():
            for path in self.files.ls(self.place, detail=False):
                yield self / posixpath.basename(path.rstrip("/"))

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """What is in the folder and has such a name."""
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def stat(self) -> Stat:
        """Its size, and what tells it from another version."""
        return Stat(self.files.size(self.place), int(self.files.ukey(self.place)[:15], 16))

    def read_bytes(self) -> bytes:
        """All of a small file."""
        return self.files.cat_file(self.place)

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """All of a small file."""
        return self.read_bytes().decode(encoding, errors)

    def read_range(self, begin: int, end: int) -> bytes:
        """The bytes from `begin` up to `end`."""
        return self.files.cat_file(self.place, start=begin, end=end)

    def write_bytes(self, content: bytes) -> None:
        """Write a small file, which appears whole."""
        self.files.pipe_file(self.place, content)

    def upload(self, source: Path) -> None:
        """Write a file block by block."""
        self.files.makedirs(posixpath.dirname(self.place), exist_ok=True)
        with source.open("rb") as read, self.files.open(self.place, "wb", block_size=BLOCK_BYTES) as written:
            shutil.copyfileobj(read, written, BLOCK_BYTES)

    def make_folder(self) -> None:
        """Make it with its parents; a store of objects has no folders."""
        self.files.makedirs(self.place, exist_ok=True)

    def remove(self) -> None:
        """Delete it, and what is inside; nothing where there is nothing."""
        if self.exists():
            self.files.rm(self.place, recursive=True)


AnyPath = Path | RemotePath


def is_remote(name: object) -> bool:
    """Whether a folder is named by a URL."""
    return "://" in str(name)


def any_path(name: str | Path) -> AnyPath:
    """A folder by its path or URL."""
    return RemotePath.open(str(name)) if is_remote(name) else Path(name)
