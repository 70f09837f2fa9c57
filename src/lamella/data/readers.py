"""Files of records -> records, one by one, from any place on.

A broken record is an error that names file and line, raised or left out by policy.
"""

from __future__ import annotations

import codecs
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import xxhash

from lamella.data.files import DAMAGED, Form, Opened
from lamella.data.records import BYTE_ORDER_MARK, Conversation, Piece, record_content
from lamella.errors import UserError

Policy = Literal["fail", "skip"]
Split = Literal["train", "heldout"]
HELDOUT_ONE_IN = 10
_CHUNK_BYTES = 1 << 18
logger = logging.getLogger(__name__)


def policy(word: str) -> Policy:
    """UserError for a word that is none."""
    if word not in get_args(Policy):
        raise UserError(f"on_bad_data is {word!r}; it must be fail or skip")
    return cast(Policy, word)


def split_of(name: str) -> Split:
    """The side of the document with this name: one in ten is held out."""
    return "heldout" if xxhash.xxh64_intdigest(name.encode()) % HELDOUT_ONE_IN == 0 else "train"


class Place(NamedTuple):
    """Where a record begins: reading goes on from here as if everything before had been read."""

    file: int = 0
    """Number of the file in the source."""
    offset: int = 0
    """Bytes of the file's content, decompressed, before this; of a parquet file, estimated by its rows."""
    records: int = 0
    """Records of the file (lines of JSONL, rows, pieces) before this one."""
    read: int = 0
    """Bytes of the file itself that were read for them, about; for progress."""


FIRST = Place()


class Record(NamedTuple):
    """A document as it is read, or a piece of one."""

    name: str
    """Inside the source; it decides the split."""
    content: str | Piece | Conversation
    where: str
    """File and line, for people."""
    num_bytes: int = 0
    """Read of the source for it; for progress."""
    end: Place = FIRST
    """Where the next record begins."""
    side: Split | None = None
    """The split, where the name does not decide it."""

    @property
    def split(self) -> Split:
        return self.side or split_of(self.name)

    @property
    def is_blank(self) -> bool:
        """Whether it is a document without a letter in it; pieces belong to one that has."""
        if isinstance(self.content, Piece):
            return self.content.is_first and self.content.is_last and not self.content.text.strip()
        return isinstance(self.content, str) and not self.content.strip()


class BadRecords:
    """What to do with a broken record: fail with its error, or skip it, counted, the first ones named in the log.

    Blank texts are no errors: they are left out whatever the policy, and counted.
    """

    def __init__(self, policy: Policy = "fail", named: int = 5):
        self.policy, self.named, self.skipped, self.blank = policy, named, 0, 0

    def __call__(self, error: UserError) -> None:
        if self.policy == "fail":
            raise error
        self.skipped += 1
        if self.skipped <= self.named:
            logger.warning("skipped: %s", error)

    def describe(self) -> str:
        """'2 blank and 3 broken records are left out', or ''."""
        parts = [f"{count:,} {what}" for count, what in ((self.blank, "blank"), (self.skipped, "broken")) if count]
        return f"{' and '.join(parts)} records are left out" if parts else ""


def damage(file: Path, offset: int, error: Exception, opened: Opened | None) -> UserError:
    """Of a compressed file that is cut or changed. An error of the system itself goes on: the file may come back."""
    if (isinstance(error, OSError) and error.errno) or opened is None or not opened.is_compressed:
        raise error
    return UserError(
        f"{file}, behind byte {offset} of its content: it is damaged ({error}); bring it back or remove it"
    )


def read_jsonl(file: Path, form: Form, name: str, field: str | None, bad: BadRecords, start: Place) -> Iterator[Record]:
    """A record a line; empty lines are none."""
    offset, read = start.offset, start.read
    with Opened(file, form.compression, offset) as opened:
        lines = enumerate(opened.stream, start.records + 1)
        while True:
            try:
                number, line = next(lines)
            except StopIteration:
                return
            except DAMAGED as error:
                bad(damage(file, offset, error, opened))
                return
            where, is_first = f"{file}, line {number} (byte {offset})", offset == 0
            offset += len(line)
            before, read = read, opened.consumed(offset)
            if is_first:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                content = record_content(json.loads(line), field, where)
            except UserError as error:
                bad(error)
            except RecursionError:
                bad(UserError(f"{where}: JSON that is nested too deeply; mend or remove the line"))
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
                bad(UserError(f"{where}: not JSON ({error}); mend or remove the line"))
            else:
                yield Record(
                    f"{name}:{number - 1}", content, where, read - before, Place(start.file, offset, number, read)
                )


def read_json(file: Path, form: Form, name: str, field: str | None, bad: BadRecords, start: Place) -> Iterator[Record]:
    """An array of records, or records one after the other: lines, as `datasets` writes them, or printed at length."""
    layout = _layout(file, form)
    if layout == "lines":
        yield from read_jsonl(file, form, name, field, bad, start)
        return
    offset, number, read = start.offset, start.records, start.read
    with Opened(file, form.compression, offset) as opened:
        values = _values(opened, layout == "array", offset)
        while True:
            where = f"{file}, record {number} (behind byte {offset})"
            try:
                value, offset = next(values)
            except StopIteration:
                return
            except RecursionError:
                bad(UserError(f"{where}: JSON that is nested too deeply; mend or remove the file"))
                return
            except DAMAGED as error:
                is_text = isinstance(error, json.JSONDecodeError | UnicodeDecodeError)
                broken = UserError(f"{where}: not JSON ({error}); mend or remove the file")
                bad(broken if is_text else damage(file, offset, error, opened))
                return
            number += 1
            before, read = read, opened.consumed(offset)
            try:
                content = record_content(value, field, where)
            except UserError as error:
                bad(error)
            else:
                yield Record(
                    f"{name}:{number - 1}", content, where, read - before, Place(start.file, offset, number, read)
                )


def _layout(file: Path, form: Form) -> Literal["array", "lines", "values"]:
    """By the first character, and the first line if that is an object."""
    try:
        with Opened(file, form.compression) as opened:
            line = next((line for line in opened.stream if line.removeprefix(codecs.BOM_UTF8).strip()), b"")
        line = line.removeprefix(codecs.BOM_UTF8).lstrip()
        if line.startswith(b"["):
            return "array"
        return "lines" if isinstance(json.loads(line), dict) else "values"
    except (*DAMAGED, RecursionError):
        return "values"


def _values(opened: Opened, is_array: bool, offset: int) -> Iterator[tuple[Any, int]]:
    """(value, the byte behind it) of JSON's, each as soon as it is read; in memory is about the largest one.

    Raises:
        JSONDecodeError, UnicodeDecodeError, RecursionError, one of DAMAGED.
    """
    decoder, utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")()
    text, at, ended, chunk = "", 0, False, _CHUNK_BYTES
    begins = offset == 0

    def more() -> None:
        nonlocal text, at, ended
        raw = opened.stream.read(chunk)
        text, at, ended = text[at:] + utf8.decode(raw, final=not raw), 0, not raw

    while True:
        passed = at
        while at < len(text) and (text[at] in " \t\r\n," or (begins and text[at] in f"{BYTE_ORDER_MARK}[")):
            begins = begins and text[at] != "["
            at += 1
        offset += len(text[passed:at].encode())
        if at == len(text):
            if ended and is_array:
                raise json.JSONDecodeError("the file ends within its array", text, at)
            if ended:
                return
            more()
            continue
        if is_array and text[at] == "]":
            return
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            is_cut = error.pos > len(text) - 64 or error.msg.startswith("Unterminated")
            if ended or not is_cut:
                raise
            chunk *= 2  # so that a value is not looked through too often
            more()
            continue
        offset += len(text[at:end].encode())
        at, chunk, begins = end, _CHUNK_BYTES, False
        yield value, offset
