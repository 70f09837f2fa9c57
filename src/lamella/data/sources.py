"""Documents from text that every Python has, from local files, or from the `datasets` library.

A source is a word:

    stdlib-code           the sources of Python's standard library (code)
    python-docs           the topics of Python's `help()` (prose)
    PATH                  a file, or a folder searched for files, of the forms in `lamella.data.files`
    PATH                  a folder that `lamella data prepare` made (see `lamella.data.prepared`)
    NAME or NAME:CONFIG   a set that `datasets.load_dataset` knows, its split "train", streamed

`#FIELD` behind a path or name says which field of a record is the document; without it, "text", or else "messages".
A field that holds a string is a text; one that holds a list of {"role", "content"} is a conversation, of which only the
assistant's answers are learned (see `lamella.data.records` and `lamella.data.chat`).

What is a document: a record; a topic; a text file.

One document in ten is held out, by a hash of its name (the path inside the source, and the record's index), so that a
document's side depends on nothing but itself. Of a text file that is the only file of its source the last tenth is.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lamella.data.arrow import read_parquet
from lamella.data.files import MANIFEST, READABLE, Form, check_file, describe, find_files, form_of, has_known_suffix
from lamella.data.readers import (
    FIRST,
    BadRecords,
    Place,
    Record,
    Split,
    read_json,
    read_jsonl,
    split_of,
)  # fmt: skip
from lamella.data.records import Piece, record_content
from lamella.data.texts import read_text
from lamella.errors import UserError, did_you_mean
from lamella.installation import find_file

__all__ = ["MANIFEST", "Split", "split_of"]  # beside what is defined here
EMBEDDED_SOURCES = ("stdlib-code", "python-docs")
ACCEPTED = f"pass {' or '.join(EMBEDDED_SOURCES)}, a file or folder of {READABLE}, or the name of a `datasets` set"
RECORD_READERS: dict[str, Callable[[Path, Form, str, str | None, BadRecords, Place], Iterator[Record]]] = {
    "jsonl": read_jsonl,
    "json": read_json,
    "parquet": read_parquet,
}
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
    left_out: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Files of the folder that are not read: names by reason."""

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
    return _joined((r for r in records(opened, BadRecords()) if split in (None, r.split)), split)


def _joined(wanted: Iterator[Record], split: Split | None) -> Iterator[str]:
    """The texts of records, those of a document's pieces put together."""
    pieces: list[str] = []
    for record in wanted:
        text = text_of(record)
        goes_on = isinstance(text, Piece) and not text.begins(split or "all")
        if not goes_on and "".join(pieces).strip():
            yield "".join(pieces)
        pieces = [*(pieces if goes_on else ()), text.text if isinstance(text, Piece) else text]
    if "".join(pieces).strip():
        yield "".join(pieces)


def text_of(record: Record) -> str | Piece:
    """Its content; UserError for a conversation."""
    if not isinstance(record.content, str | Piece):
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
    form = form_of(file) if source.kind == "files" else Form("text")
    if form is None:
        bad(UserError(f"{file} is no text any more; bring it back or remove it"))
    elif form.kind == "text":
        # of the standard library's files some test the decoding of others
        bad_text = bad if source.kind == "files" else BadRecords("skip", named=0)
        yield from read_text(file, form, name, bad_text, start, alone=len(source.files) == 1)
    else:
        yield from RECORD_READERS[form.kind](file, form, name, source.field, bad, start)


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
        return Source(source, "files", (check_file(path, ACCEPTED),), path.parent, field)
    if is_prepared(path):
        return Source(source, "prepared", root=path)
    if path.is_dir():
        return _folder(source, path, field)
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


def _folder(word: str, folder: Path, field: str | None) -> Source:
    files, left_out = find_files(folder)
    if not files:
        there = f" ({describe(files, left_out)})" if left_out else ""
        raise UserError(f"the folder {folder} holds no text{there}; {ACCEPTED}")
    return Source(word, "files", files, folder, field, left_out)


def describe_source(source: Source) -> str:
    """What was found, for people: 'notes: 12 files (12 .md), 30.1 kB; left out: 1 .csv (a.csv)'."""
    if source.kind == "files":
        return f"{source.word}: {describe(source.files, source.left_out)}"
    kinds = {"embedded": "of Python", "dataset": "a set of the `datasets` library", "prepared": "prepared tokens"}
    return f"{source.word}: {kinds[source.kind]}"


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _stdlib_files() -> tuple[Path, ...]:
    found = (p for p in _stdlib().rglob("*.py") if not _SKIPPED_STDLIB.intersection(p.relative_to(_stdlib()).parts))
    return tuple(sorted(p for p in found if p.stat().st_size))


def _refuse_unlikely_name(word: str) -> None:
    """Spare a misspelt path or embedded name the trip over the network."""
    near = difflib.get_close_matches(word, EMBEDDED_SOURCES, n=1, cutoff=0.7)
    is_path = word.startswith(("/", ".", "~")) or has_known_suffix(word) or word.endswith("/")
    if near or is_path or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.+-]+)?", word):
        raise UserError(f"no such data: {word!r}{did_you_mean(word, near)}; {ACCEPTED}")
