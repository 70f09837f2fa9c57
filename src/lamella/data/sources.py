"""Documents from text that every Python has, from local files, or from the `datasets` library.

A source is a word:

    stdlib-code           the sources of Python's standard library (code)
    python-docs           the topics of Python's `help()` (prose)
    PATH                  a file, or a folder searched for files, in .txt .md .py .jsonl .parquet
    PATH                  a folder that `lamella data prepare` made (see `lamella.data.prepared`)
    NAME or NAME:CONFIG   a set that `datasets.load_dataset` knows, its split "train", streamed

`#FIELD` behind a path or name says which field of a record is the document; without it, "text", or else "messages".
A field that holds a string is a text; one that holds a list of {"role", "content"} is a conversation, of which only the
assistant's answers are learned (see `lamella.data.chat`).

What is a document: a record of .jsonl, .parquet or a `datasets` name; a topic; a text file of a folder. A text file
that stands alone is cut at line ends into blocks of about 4,000 characters, or it would be one document and leave
nothing for the held-out split.

One document in ten is held out, by a hash of its name (the path inside the source, and the record's or block's
index), so that a document's side depends on nothing but itself.
"""

from __future__ import annotations

import difflib
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import xxhash

from lamella.data.readers import (
    FIRST,
    RECORD_READERS,
    BadRecords,
    Place,
    Record,
    read_blocks,
    read_text,
    record_content,
)
from lamella.errors import UserError, did_you_mean
from lamella.installation import find_file

Split = Literal["train", "heldout"]
HELDOUT_ONE_IN = 10
TEXT_SUFFIXES = (".txt", ".md", ".py")
SUFFIXES = (*TEXT_SUFFIXES, *RECORD_READERS)
# What `lamella data prepare` leaves in its folder.
MANIFEST = "lamella-data.json"
EMBEDDED_SOURCES = ("stdlib-code", "python-docs")
ACCEPTED = (
    f"pass {' or '.join(EMBEDDED_SOURCES)}, a file or folder of {' '.join(SUFFIXES)}, or the name of a `datasets` set"
)
# Tests repeat themselves; the topics are the other embedded source, and must not leak into this one.
_SKIPPED_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}


@dataclass(frozen=True)
class Source:
    """A checked source. `root` is the folder that the names of documents are relative to."""

    word: str
    kind: Literal["embedded", "files", "dataset", "prepared"]
    files: tuple[Path, ...] = ()
    root: Path = Path()
    field: str | None = None

    @property
    def num_bytes(self) -> int:
        """Of its files; 0 where they are not known."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def is_streamed(self) -> bool:
        """Whether its length is unknown and it is read over the network."""
        return self.kind == "dataset"


def documents(source: str, split: Split | None = None) -> Iterator[str]:
    """The texts of `source` in a fixed order: those of one split, or all of them; blank ones are left out.

    Raises:
        UserError: no such source, an empty or undecodable file, a broken record (with file and line), conversations;
            the first two at once, the others when the reading gets there.
    """
    check_split(split)
    opened = open_source(source)
    wanted = (record for record in records(opened, BadRecords()) if split in (None, split_of(record.name)))
    return (text_of(record) for record in wanted if text_of(record).strip())


def text_of(record: Record) -> str:
    """Its content; UserError for a conversation."""
    if not isinstance(record.content, str):
        raise UserError(f"{record.where}: it is a conversation where a text is wanted; use another source")
    return record.content


def check_split(split: str | None) -> None:
    if split is not None and split not in get_args(Split):
        raise UserError(f"split is {split!r}; it must be one of {', '.join(get_args(Split))}")


def records(source: Source, bad: BadRecords, start: Place = FIRST) -> Iterator[Record]:
    """The documents of a source in a fixed order from `start` on (a `Record.end`), broken ones given to `bad`."""
    if source.kind == "prepared":
        raise UserError(f"{source.word} holds tokens, not text; name the text that it was made from")
    if source.kind == "dataset":
        yield from records_of(load_stream(source), source, bad)
    elif source.word == "python-docs":
        from pydoc_data import topics

        for index, (name, text) in enumerate(sorted(topics.topics.items())):
            if index >= start.records:
                yield Record(name, text, f"topic {name}", len(text), Place(records=index + 1))
    else:
        for number, file in enumerate(source.files[start.file :], start.file):
            yield from _read_file(file, source, bad, start if number == start.file else Place(number))


def records_of(stream: Any, source: Source, bad: BadRecords, first: int = 0) -> Iterator[Record]:
    """Those of a `datasets.IterableDataset` whose next record has the index `first`."""
    for index, record in enumerate(stream, first):
        where = f"{source.word}, record {index}"
        try:
            yield Record(str(index), record_content(record, source.field, where), where, end=Place(records=index + 1))
        except UserError as error:
            bad(error)


def _read_file(file: Path, source: Source, bad: BadRecords, start: Place) -> Iterator[Record]:
    name = file.relative_to(source.root).as_posix()
    if reader := RECORD_READERS.get(file.suffix):
        yield from reader(file, name, source.field, bad, start)
    elif source.kind == "embedded":
        yield from read_text(file, name, BadRecords("skip", named=0), start)  # some test the decoding of others
    elif len(source.files) == 1:
        yield from read_blocks(file, name, bad, start)
    else:
        yield from read_text(file, name, bad, start)


def split_of(name: str) -> Split:
    """The side of the document with this name: one in ten is held out."""
    return "heldout" if xxhash.xxh64_intdigest(name.encode()) % HELDOUT_ONE_IN == 0 else "train"


def open_source(source: str) -> Source:
    """Find out what `source` means; reads no text. Raises UserError where it means nothing."""
    if source in EMBEDDED_SOURCES:
        files = _stdlib_files() if source == "stdlib-code" else ()
        return Source(source, "embedded", files, _stdlib())
    word, field = source, None
    if "#" in source and not Path(source).exists():
        word, _, field = source.rpartition("#")
    path = find_file(Path(word).expanduser())
    if path.is_file():
        return Source(source, "files", (_checked_file(path),), path.parent, field)
    if is_prepared(path):
        return Source(source, "prepared", root=path)
    if path.is_dir():
        return Source(source, "files", _folder_files(path), path, field)
    _refuse_unlikely_name(word)
    return Source(source, "dataset", field=field)


def is_prepared(path: Path) -> bool:
    """Whether the folder was made by `lamella data prepare` (finished or not)."""
    return (path / MANIFEST).is_file()


def fingerprint(source: Source) -> str:
    """Changes when the texts do: names, sizes and times of the files, Python's version for the embedded ones."""
    stats = [(str(f.relative_to(source.root)), f.stat().st_size, f.stat().st_mtime_ns) for f in source.files]
    version = sys.version if source.kind == "embedded" else ""
    return repr((source.word, source.field, str(source.root.resolve()), stats, version))


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
    return tuple(sorted(p for p in found if p.stat().st_size))


def _refuse_unlikely_name(word: str) -> None:
    """Spare a misspelt path or embedded name the trip over the network."""
    near = difflib.get_close_matches(word, EMBEDDED_SOURCES, n=1, cutoff=0.7)
    is_path = word.startswith(("/", ".", "~")) or Path(word).suffix in SUFFIXES or word.endswith("/")
    if near or is_path or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.+-]+)?", word):
        raise UserError(f"no such data: {word!r}{did_you_mean(word, near)}; {ACCEPTED}")
