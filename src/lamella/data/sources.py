"""Documents from text that every Python has, from local files, or from the `datasets` library.

A source is a word:

    stdlib-code           the sources of Python's standard library (code)
    python-docs           the topics of Python's `help()` (prose)
    PATH                  a file, or a folder searched for files, in .txt .md .py .jsonl .parquet
    NAME or NAME:CONFIG   a set that `datasets.load_dataset` knows, its split "train", streamed

`#FIELD` behind a path or name says which field of a record is the text; without it, "text".

What is a document: a record of .jsonl, .parquet or a `datasets` name; a topic; a text file of a folder. A text file
that stands alone is cut at line ends into blocks of about 4,000 characters, or it would be one document and leave
nothing for the held-out split.

One document in ten is held out, by a hash of its name (the path inside the source, and the record's or block's
index), so that a document's side depends on nothing but itself.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import xxhash

from lamella.errors import UserError, did_you_mean

Split = Literal["train", "heldout"]
HELDOUT_ONE_IN = 10
BLOCK_CHARS = 4000
TEXT_SUFFIXES = (".txt", ".md", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")
EMBEDDED_SOURCES = ("stdlib-code", "python-docs")
ACCEPTED = (
    f"pass {' or '.join(EMBEDDED_SOURCES)}, a file or folder of {' '.join(SUFFIXES)}, or the name of a `datasets` set"
)
# Tests repeat themselves; the topics are the other embedded source, and must not leak into this one.
_SKIPPED_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}

Named = Iterator[tuple[str, str]]
"""(name of a document, its text)"""


@dataclass(frozen=True)
class Source:
    """A checked source. `root` is the folder that the names of documents are relative to."""

    word: str
    kind: Literal["embedded", "files", "dataset"]
    files: tuple[Path, ...] = ()
    root: Path = Path()
    field: str = "text"

    @property
    def is_streamed(self) -> bool:
        """Whether its length is unknown and it is read over the network."""
        return self.kind == "dataset"


def documents(source: str, split: Split | None = None) -> Iterator[str]:
    """The texts of `source` in a fixed order: those of one split, or all of them; blank ones are left out.

    Raises:
        UserError: no such source, an empty or undecodable file, a broken record (with file and line); the first
            two at once, the others when the reading gets there.
    """
    if split is not None and split not in get_args(Split):
        raise UserError(f"split is {split!r}; it must be one of {', '.join(get_args(Split))}")
    opened = open_source(source)
    return (text for name, text in _named_documents(opened) if split in (None, split_of(name)) and text.strip())


def split_of(name: str) -> Split:
    """The side of the document with this name: one in ten is held out."""
    return "heldout" if xxhash.xxh64_intdigest(name.encode()) % HELDOUT_ONE_IN == 0 else "train"


def open_source(source: str) -> Source:
    """Find out what `source` means; reads no text. Raises UserError where it means nothing."""
    if source in EMBEDDED_SOURCES:
        files = _stdlib_files() if source == "stdlib-code" else ()
        return Source(source, "embedded", files, _stdlib())
    word, _, field = source.rpartition("#") if "#" in source and not Path(source).exists() else (source, "", "text")
    path = Path(word).expanduser()
    if path.is_file():
        return Source(source, "files", (_checked_file(path),), path.parent, field)
    if path.is_dir():
        return Source(source, "files", _folder_files(path), path, field)
    _refuse_unlikely_name(word)
    return Source(source, "dataset", field=field)


def fingerprint(source: Source) -> str:
    """Changes when the texts do: names, sizes and times of the files, Python's version for the embedded ones."""
    stats = [(str(f.relative_to(source.root)), f.stat().st_size, f.stat().st_mtime_ns) for f in source.files]
    return repr((source.word, str(source.root.resolve()), stats, sys.version if source.kind == "embedded" else ""))


def load_stream(source: Source) -> Any:
    """The `datasets.IterableDataset` of a streamed source."""
    import datasets
    import httpx

    name, _, config = source.word.partition("#")[0].partition(":")
    try:
        stream = datasets.load_dataset(name, config or None, split="train", streaming=True)
    except (OSError, ValueError, httpx.HTTPError) as error:  # not found, no network; unknown config or split
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"no local data {name!r}, and `datasets` cannot load that name: {reason}; {ACCEPTED}"
        ) from error
    return stream


def record_text(record: Any, field: str, where: str) -> str:
    """The text field of a record; UserError with `where` if it has none."""
    if isinstance(record, dict) and isinstance(text := record.get(field), str):
        return text
    has = f"it has {', '.join(map(repr, record))}" if isinstance(record, dict) else "it is no object"
    raise UserError(f"{where}: no text in the field {field!r} ({has}); name another one as SOURCE#FIELD")


def _named_documents(source: Source) -> Named:
    if source.kind == "dataset":
        for index, record in enumerate(load_stream(source)):
            yield str(index), record_text(record, source.field, f"{source.word}, record {index}")
    elif source.word == "python-docs":
        from pydoc_data import topics

        yield from sorted(topics.topics.items())
    else:
        for file in source.files:
            yield from _read_file(file, source)


def _read_file(file: Path, source: Source) -> Named:
    name = file.relative_to(source.root).as_posix()
    if reader := _RECORD_READERS.get(file.suffix):
        for where, text in reader(file, source.field):
            yield f"{name}:{where}", text
    elif source.kind == "files" and len(source.files) == 1:
        for index, block in enumerate(blocks(_decoded(file))):
            yield f"{name}:{index}", block
    else:
        yield name, _decoded(file, skip=source.kind == "embedded")


def blocks(text: str) -> Iterator[str]:
    """Pieces that end at line ends, each the shortest of at least BLOCK_CHARS characters (the last may be shorter)."""
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= BLOCK_CHARS:
            yield "".join(lines)
            lines, size = [], 0
    if lines:
        yield "".join(lines)


def _decoded(file: Path, skip: bool = False) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        if skip:
            return ""
        raise UserError(
            f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); convert or remove it"
        ) from error


def _jsonl_texts(file: Path, field: str) -> Named:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
                raise UserError(f"{file}, line {number}: not JSON ({error}); mend or remove the line") from error
            yield str(number - 1), record_text(record, field, f"{file}, line {number}")


def _parquet_texts(file: Path, field: str) -> Named:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{file} is not a parquet file ({error})") from error
    if field not in table.schema_arrow.names:
        record_text(dict.fromkeys(table.schema_arrow.names), field, str(file))
    row = 0
    for batch in table.iter_batches(batch_size=1024, columns=[field]):
        for value in batch.column(0).to_pylist():
            yield str(row), record_text({field: value}, field, f"{file}, row {row}")
            row += 1


_RECORD_READERS: dict[str, Callable[[Path, str], Named]] = {".jsonl": _jsonl_texts, ".parquet": _parquet_texts}


def _checked_file(path: Path) -> Path:
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: cannot read {path.suffix or 'a file without a suffix'}; {ACCEPTED}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty; {ACCEPTED}")
    return path


def _folder_files(folder: Path) -> tuple[Path, ...]:
    found = (p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file() and p.stat().st_size)
    files = tuple(sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts)))
    if not files:
        raise UserError(f"the folder {folder} holds no text; {ACCEPTED}")
    return files


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _stdlib_files() -> tuple[Path, ...]:
    found = (p for p in _stdlib().rglob("*.py") if not _SKIPPED_STDLIB.intersection(p.relative_to(_stdlib()).parts))
    return tuple(sorted(found))


def _refuse_unlikely_name(word: str) -> None:
    """Spare a misspelt path or embedded name the trip over the network."""
    near = difflib.get_close_matches(word, EMBEDDED_SOURCES, n=1, cutoff=0.7)
    is_path = word.startswith(("/", ".", "~")) or Path(word).suffix in SUFFIXES or word.endswith("/")
    if near or is_path or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.+-]+)?", word):
        raise UserError(f"no such data: {word!r}{did_you_mean(word, near)}; {ACCEPTED}")
