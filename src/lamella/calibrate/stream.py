"""The residual stream of all calibration tokens on disk: one memory-mapped file per layer boundary.

`hidden` i is the input of layer i, `gradient` i the loss's gradient with respect to it (so layer i's output has
gradient i + 1), `ffn` i that with respect to the output of layer i's FFN, where it is another than the layer's
output's. A file is there whole or not at all, so the files say how far a calibration has come.

Shapes: N windows, L tokens per window, D model width.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lamella.errors import UserError

Kind = Literal["hidden", "gradient", "ffn"]
_SPARE_BYTES = 64 << 20


class StreamFolder:
    """Tensors [N, L, D] of float32, by kind and layer."""

    def __init__(self, folder: Path, shape: tuple[int, int, int]):
        self.folder, self.shape = folder, shape

    @property
    def file_bytes(self) -> int:
        return int(np.prod(self.shape)) * 4

    def indices(self, kind: Kind) -> list[int]:
        """The finished files of a kind, ascending."""
        return sorted(int(path.name.partition(".")[2]) for path in self.folder.glob(f"{kind}.*"))

    def check_space(self, num_files: int, other_bytes: int = 0) -> None:
        """UserError unless the disk takes as many files, those already there included, and other bytes."""
        there = sum(len(list(self.folder.glob(f"{kind}.*"))) for kind in get_args(Kind))
        needed = max(0, num_files - there) * self.file_bytes + other_bytes + _SPARE_BYTES
        parent = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise UserError(
                f"calibration needs {needed / 1e9:.2f} GB in {parent}, but only {free / 1e9:.2f} GB "
                "are free; use fewer tokens or another folder"
            )

    def open(self, kind: Kind, index: int) -> Tensor:
        """A finished file, mapped."""
        return self._map(self._path(kind, index))

    @contextmanager
    def writing(self, kind: Kind, index: int) -> Iterator[Tensor]:
        """A new file, mapped; it gets its name when the block ends well, and vanishes when it does not."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f"unfinished.{kind}"
        try:
            self._allocate(temporary)
            tensor = self._map(temporary)
            yield tensor
            with temporary.open("rb") as file:
                os.fsync(file)
            temporary.rename(self._path(kind, index))
        finally:
            temporary.unlink(missing_ok=True)

    def drop(self, kind: Kind, index: int) -> None:
        self._path(kind, index).unlink(missing_ok=True)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, kind: Kind, index: int) -> Path:
        return self.folder / f"{kind}.{index}"

    def _map(self, path: Path) -> Tensor:
        return torch.from_numpy(np.memmap(path, np.float32, "r+", shape=self.shape))

    def _allocate(self, path: Path) -> None:
        """Take the space now: writing to a map of a full disk would kill the process."""
        try:
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, self.file_bytes)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise UserError(f"the disk of {self.folder} is full; free some space and calibrate again") from None
