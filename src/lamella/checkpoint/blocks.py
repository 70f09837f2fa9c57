"""Files written past the page cache: O_DIRECT, in whole blocks, from aligned buffers.

A checkpoint is large and is written once. Through the page cache each of its bytes is copied and each of its pages
allocated by the kernel, which takes more CPU time than making the tensors, and pushes out the model that is being read.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

BLOCK_BYTES = 4096  # of the file systems and devices in use; a multiple of what O_DIRECT asks for
BUFFER_BYTES = 1 << 20
COPY_BYTES = 64 << 20
"""Copied in the kernel at a time."""


class BlockFile:
    """A new file of known length. Where O_DIRECT is not to be had, everything goes through the page cache."""

    def __init__(self, path: Path, size: int):
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self._direct = _open_direct(path)
        self._buffers: list[mmap.mmap] = []
        os.posix_fallocate(self._fd, 0, size)

    def write(self, at: int, view: memoryview) -> None:
        """Write bytes at an offset. Past the page cache if `at`, length and memory are aligned to blocks."""
        done = 0
        while done < len(view):
            done += self._write_some(at + done, view[done:])

    def _write_some(self, at: int, view: memoryview) -> int:
        if self._direct is not None and at % BLOCK_BYTES == 0 and len(view) % BLOCK_BYTES == 0:
            try:
                return os.pwrite(self._direct, view, at)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        return os.pwrite(self._fd, view, at)

    def copy_from(self, source: int, begin: int, count: int, at: int) -> None:
        """Copy `count` bytes of an open file from `begin` on to offset `at`, in the kernel where it can.

        Raises:
            EOFError: the source ends early.
        """
        while count:
            done = self._copy_some(source, begin, min(count, COPY_BYTES), at)
            if not done:
                raise EOFError
            begin, at, count = begin + done, at + done, count - done

    def _copy_some(self, source: int, begin: int, count: int, at: int) -> int:
        try:
            return os.copy_file_range(source, self._fd, count, begin, at)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        buffer = self.take_buffer()
        got = os.preadv(source, [memoryview(buffer)[: min(count, BUFFER_BYTES)]], begin)
        self.write(at, memoryview(buffer)[:got])
        self.give_back(buffer)
        return got

    def read(self, at: int, count: int) -> Iterator[memoryview]:
        """What was written to a range, in order; each view is good until the next."""
        buffer, end = self.take_buffer(), at + count
        while at < end:
            fd, wanted = self._fd, min(end - at, BUFFER_BYTES)
            if self._direct is not None and at % BLOCK_BYTES:
                wanted = min(wanted, BLOCK_BYTES - at % BLOCK_BYTES)
            elif self._direct is not None and wanted >= BLOCK_BYTES:
                fd, wanted = self._direct, _floor(wanted)
            got = os.preadv(fd, [memoryview(buffer)[:wanted]], at)
            assert got, "a file that is being written cannot end early"
            yield memoryview(buffer)[:got]
            at += got
        self.give_back(buffer)

    def take_buffer(self) -> mmap.mmap:
        """BUFFER_BYTES, aligned; reused, because the first touch of fresh memory costs more than a copy."""
        try:
            return self._buffers.pop()
        except IndexError:
            return mmap.mmap(-1, BUFFER_BYTES)

    def give_back(self, buffer: mmap.mmap) -> None:
        self._buffers.append(buffer)

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)
        if self._direct is not None:
            os.close(self._direct)


def _open_direct(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what file systems without it answer
            raise
        return None


class Stream:
    """Consecutive bytes of a file, gathered until a buffer's worth of whole blocks can be written.

    Its two ends may lie within a block that another stream shares; they go through the page cache.
    """

    def __init__(self, file: BlockFile, at: int):
        self._file = file
        self._begin = at  # of what is gathered
        self.end = at
        self._buffer = memoryview(file.take_buffer())
        self._base = _floor(at)  # the buffer's first byte in the file

    def write(self, view: memoryview) -> None:
        while len(view):
            used = self.end - self._base
            count = min(len(view), BUFFER_BYTES - used)
            self._buffer[used : used + count] = view[:count]
            self.end += count
            view = view[count:]
            if used + count == BUFFER_BYTES:
                self._flush()

    def close(self) -> None:
        self._flush()
        buffer = self._buffer.obj
        self._buffer.release()
        self._file.give_back(buffer)  # type: ignore[arg-type]

    def _flush(self) -> None:
        first, last = min(_floor(self._begin + BLOCK_BYTES - 1), self.end), max(_floor(self.end), self._begin)
        for begin, end in ((self._begin, first), (first, last), (max(first, last), self.end)):
            if begin < end:
                self._file.write(begin, self._buffer[begin - self._base : end - self._base])
        self._begin = self.end
        self._base = _floor(self.end)


def _floor(offset: int) -> int:
    return offset - offset % BLOCK_BYTES
