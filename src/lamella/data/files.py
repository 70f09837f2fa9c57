"""Which files of a folder hold text, what form each has, and what is left out, by name and number.

A form is told by the suffix, in upper or lower case, behind which one of a compression may stand; a file without a
suffix is looked into. Links are followed wherever they lead (the snapshots of a hub cache consist of them), and every
folder and file is read once, under the first of its names: a link in a circle ends, and no text comes twice.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from lamella.errors import UserError

Kind = Literal["text", "jsonl", "json", "parquet"]
TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".py")
KINDS: dict[str, Kind] = dict.fromkeys(TEXT_SUFFIXES, "text")  # type: ignore[arg-type]
KINDS |= {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
READABLE = f"{' '.join(KINDS)} (these, parquet aside, also with {' '.join(COMPRESSIONS)} behind them)"
# What `lamella data prepare` leaves in its folder.
MANIFEST = "lamella-data.json"
# Descriptions that `datasets` puts beside its records.
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SNIFFED_BYTES = 1 << 16
_NAMED = 3
# What the decompressors raise on damaged data.
DAMAGED = (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error)


class Form(NamedTuple):
    """How a file is to be read."""

    kind: Kind
    compression: str = ""
    """A suffix, or ""."""


class Found(NamedTuple):
    """The files of a source in the order of their paths, and the names of those left out, by reason."""

    files: tuple[Path, ...]
    left_out: dict[str, list[str]]


def form_of(file: Path) -> Form | None:
    """None for what is no text; opens a file only if it has no suffix."""
    compression, suffix = _suffixes(file)
    kind = KINDS.get(suffix) if suffix else _sniffed(file, compression)
    return None if kind is None or (kind == "parquet" and compression) else Form(kind, compression)


def has_known_suffix(name: str) -> bool:
    compression, suffix = _suffixes(Path(name))
    return suffix in KINDS or bool(compression)


def _suffixes(file: Path) -> tuple[str, str]:
    """(of the compression, of the form), lower case."""
    compression = file.suffix.lower()
    if compression in COMPRESSIONS:
        return compression, Path(file.stem).suffix.lower()
    return "", compression


class Opened:
    """A file's decompressed bytes, from one of them on; compressed ones before it are read past.

    `stream` raises one of DAMAGED where a compressed file is cut or changed.
    """

    def __init__(self, file: Path, compression: str, offset: int = 0):
        self._raw = file.open("rb")
        self.is_compressed = bool(compression)
        if compression == ".zst":
            self.stream = cast(BinaryIO, io.BufferedReader(_Zstandard(self._raw), 1 << 17))
        elif compression:
            openers: dict[str, Callable[[BinaryIO], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
            self.stream = openers[compression](self._raw)
        else:
            self.stream = self._raw
        if not compression:
            self.stream.seek(offset)
        while compression and offset > 0 and (passed := self.stream.read(min(offset, 1 << 20))):
            offset -= len(passed)

    def consumed(self, offset: int) -> int:
        """Bytes of the file itself that were read for `offset` bytes of its content, about."""
        return self._raw.tell() if self.is_compressed else offset

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.stream.close()
        self._raw.close()


class _Zstandard(io.RawIOBase):
    """The package's own reader ends without a word where a file is cut; this one raises EOFError as gzip's does."""

    def __init__(self, file: BinaryIO):
        import zstandard

        self._zstandard, self._file = zstandard, file
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            unused = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            compressed = unused or self._file.read(1 << 16)
            is_between = self._frame is None or self._frame.eof
            if not compressed and is_between:
                return 0
            if not compressed:
                raise EOFError("the file ends before its last frame does")
            if is_between:
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._ready = self._frame.decompress(compressed)
            except self._zstandard.ZstdError as error:
                raise OSError(str(error)) from error
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _sniffed(file: Path, compression: str) -> Kind | None:
    """Of a file whose name says nothing: text, or records where it begins with a JSON object in a line."""
    try:
        with Opened(file, compression) as opened:
            head = opened.stream.read(_SNIFFED_BYTES)
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)
    except DAMAGED:
        return None
    if not text or "\0" in text:
        return None
    line, end, _ = text.lstrip().partition("\n")
    try:
        return "jsonl" if isinstance(json.loads(line), dict) else "text"
    except (ValueError, RecursionError):
        return "jsonl" if line.startswith('{"') and not end else "text"


def find_files(folder: Path) -> Found:
    """Of a folder and those in it. Names with a dot in front are left out."""
    seen: set[tuple[int, int]] = set()
    left_out: dict[str, list[str]] = {}
    files = (file for file in _walk(folder, folder, seen, left_out) if _is_new(file, folder, seen, left_out))
    return Found(tuple(files), left_out)


def _walk(folder: Path, root: Path, seen: set[tuple[int, int]], left_out: dict[str, list[str]]) -> Iterator[Path]:
    """In the order of the paths' parts."""
    seen.add(_identity(folder))
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        _leave_out(left_out, "that cannot be read", folder, root)
        return
    for entry in entries:
        if entry.name.startswith("."):
            _leave_out(left_out, "hidden", entry, root)
        elif not entry.is_dir():
            yield entry
        elif _identity(entry) in seen:
            _leave_out(left_out, "link to what is read already", entry, root)
        elif (entry / MANIFEST).is_file():
            _leave_out(left_out, "prepared folder (name it by itself)", entry, root)
        else:
            yield from _walk(entry, root, seen, left_out)


def _is_new(file: Path, root: Path, seen: set[tuple[int, int]], left_out: dict[str, list[str]]) -> bool:
    """Whether it is a file with text that was not met before; else it is noted among those left out."""
    try:
        if not file.exists():
            reason = "broken link"
        elif not file.is_file():
            reason = "no regular file"
        elif _identity(file) in seen:
            reason = "link to what is read already"
        elif file.stat().st_size == 0:
            reason = "empty"
        elif file.name in _DESCRIPTIONS:
            reason = "description of a data set"
        elif form_of(file) is None:
            suffix = "".join(part for part in _suffixes(file)[::-1])
            reason = suffix or "without a suffix that is no text"
        else:
            seen.add(_identity(file))
            return True
    except OSError:
        reason = "that cannot be read"
    _leave_out(left_out, reason, file, root)
    return False


def _identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def _leave_out(left_out: dict[str, list[str]], reason: str, path: Path, root: Path) -> None:
    left_out.setdefault(reason, []).append(path.relative_to(root).as_posix())


def check_file(file: Path, accepted: str) -> Path:
    """UserError unless it can be read as text or records."""
    if file.stat().st_size == 0:
        raise UserError(f"{file} is empty; {accepted}")
    if form_of(file) is None:
        suffix = "".join(_suffixes(file)[::-1])
        raise UserError(f"{file}: cannot read {suffix or 'a file without a suffix that is no text'}; {accepted}")
    return file


def describe(files: tuple[Path, ...], left_out: dict[str, list[str]]) -> str:
    """'3 files (2 .jsonl.gz, 1 .md), 12.0 MB; left out: 2 .csv (a.csv, b.csv), 1 hidden (.git)'"""
    suffixes = Counter("".join(_suffixes(file)[::-1]) or "without a suffix" for file in files)
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common())
    said = f"{len(files)} file{'s' * (len(files) != 1)} ({kinds}), {_size(sum(f.stat().st_size for f in files))}"
    parts = []
    for reason, names in left_out.items():
        shown = ", ".join([*names[:_NAMED], *["..."] * (len(names) > _NAMED)])
        parts.append(f"{len(names)} {reason} ({shown})")
    return said + (f"; left out: {', '.join(parts)}" if parts else "")


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:,.0f} {unit}" if unit == "bytes" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"
