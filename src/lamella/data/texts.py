"""Text files -> documents, however long: one that is large comes in pieces, each with what stands around it.

A piece ends at a line end, or where there is none at a space, so that its tokens are those of the whole text (see
`lamella.data.tokenizer`). Of a text that is a source of its own the last tenth is held out, from the next line on.
"""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lamella.data.files import DAMAGED, Form, Opened
from lamella.data.readers import HELDOUT_ONE_IN, BadRecords, Place, Record, Split, damage
from lamella.data.records import Edge, Piece
from lamella.errors import UserError

PIECE_BYTES = 1 << 18
CONTEXT_BYTES = 4096
"""On either side of a piece."""
_SEARCHED_BYTES = 1 << 12
# Behind it tokens end: one between two characters that are no spaces.
_LINE_END = re.compile(rb"(?<=\S)\r?\n(?=\S)")


class Stretch(NamedTuple):
    """Bytes of a text file from `offset` on, and those around them."""

    offset: int
    before: bytes
    raw: bytes
    after: bytes
    is_last: bool
    read: int
    """Bytes of the file itself up to its end, about."""


def read_text(file: Path, form: Form, name: str, bad: BadRecords, start: Place, *, alone: bool) -> Iterator[Record]:
    """The file as one record, or as many as it has pieces. `alone`: it has a training and a held-out part."""
    index, read, is_first, opens_side = start.records, start.read, False, False
    opened, offset = None, start.offset
    try:
        border = heldout_from(file, form, file.stat().st_mtime_ns, file.stat().st_size) if alone else None
        opened = Opened(file, form.compression, max(0, offset - CONTEXT_BYTES))
        for part in _stretches(opened, offset, border):
            index, offset = index + 1, part.offset + len(part.raw)
            content = _content(file, part, border, bad)
            is_first, opens_side = is_first or part.offset == 0, opens_side or part.offset in (0, border)
            if content is None:  # the next piece is the first
                continue
            if isinstance(content, Piece):
                content = content._replace(is_first=is_first, opens_side=opens_side)
            is_first = opens_side = False
            side: Split | None = None if border is None else "train" if part.offset < border else "heldout"
            where = f"{file}, from byte {part.offset}" if part.offset else str(file)
            yield Record(name, content, where, part.read - read, Place(start.file, offset, index, part.read), side)
            read = part.read
    except UserError as error:
        bad(error)
    except DAMAGED as error:
        bad(damage(file, offset, error, opened))
    finally:
        if opened is not None:
            opened.close()


def _stretches(opened: Opened, offset: int, border: int | None) -> Iterator[Stretch]:
    """The file from byte `offset` on, in pieces; `opened` stands CONTEXT_BYTES before it, or at its begin."""
    before, waiting, is_end = opened.stream.read(min(offset, CONTEXT_BYTES)), b"", False
    while True:
        most = PIECE_BYTES + PIECE_BYTES // 2  # so that the last one is no shorter than half of the others
        while not is_end and len(waiting) < most + CONTEXT_BYTES:
            raw = opened.stream.read(PIECE_BYTES)
            waiting, is_end = waiting + raw, not raw
        if not waiting:
            return
        rest = border - offset if border is not None and offset < border else len(waiting)
        size = rest if rest <= most else cut(waiting, PIECE_BYTES)
        piece, waiting = waiting[:size], waiting[size:]
        is_last = is_end and not waiting
        yield Stretch(offset, before, piece, waiting[:CONTEXT_BYTES], is_last, opened.consumed(offset + size))
        offset, before = offset + size, (before + piece)[-CONTEXT_BYTES:]


def _content(file: Path, part: Stretch, border: int | None, bad: BadRecords) -> str | Piece | None:
    """The text if it is the whole of a document, else a piece of it; None where nothing can be read.

    Of a document in pieces the lines that are not UTF-8 are given to `bad`, of a whole one all of it is.
    """
    raw = without_mark(part.raw) if part.offset == 0 else part.raw
    at = part.offset + len(part.raw) - len(raw)
    is_whole = part.offset == 0 and part.is_last and border is None
    texts = []
    for line in [raw] if is_whole or _is_utf8(raw) else raw.splitlines(keepends=True):
        try:
            texts.append(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            where = f"{file} is not UTF-8 text ({error.reason} at byte {at + error.start})"
            bad(UserError(f"{where}; convert or remove it"))
        at += len(line)
    if not texts:
        return None
    text = newlines("".join(texts))
    if is_whole:
        return text
    before = without_mark(part.before) if part.offset <= CONTEXT_BYTES else part.before
    tail = (part.before + part.raw)[-CONTEXT_BYTES:]
    tail = without_mark(tail) if part.offset + len(part.raw) <= CONTEXT_BYTES else tail
    begin, end = edge(before, (part.raw + part.after)[:CONTEXT_BYTES]), edge(tail, part.after)
    return Piece(begin, text, end, is_last=part.is_last)


def edge(before: bytes, after: bytes) -> Edge:
    """Without the parts of characters at the outer ends; empty where anything else is no UTF-8."""
    begins = next((i for i in range(min(4, len(before))) if before[i] & 0xC0 != 0x80), 0)
    try:
        known = codecs.getincrementaldecoder("utf-8")().decode(after)
        return Edge(newlines(before[begins:].decode("utf-8")), newlines(known))
    except UnicodeDecodeError:
        return Edge()


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def without_mark(raw: bytes) -> bytes:
    return raw.removeprefix(codecs.BOM_UTF8)


def newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def cut(raw: bytes, size: int) -> int:
    """Where a piece of at most `size` bytes ends, in its second half: behind a line end between two characters that
    are no spaces, where tokens end too; else before a single space, else at any character."""
    at = size
    while (at := raw.rfind(b"\n", size // 2, at)) >= 0:
        if not raw[at + 1 : at + 2].isspace() and not raw[at - 2 : at].removesuffix(b"\r")[-1:].isspace():
            return at + 1
    at = size
    while (at := raw.rfind(b" ", size // 2, at)) >= 0:
        if not raw[at + 1 : at + 2].isspace() and not raw[at - 1 : at].isspace():
            return at
    return character_before(raw, size)


def character_before(raw: bytes, at: int) -> int:
    """The nearest place up to `at` that parts no character and no \\r\\n."""
    while 0 < at < len(raw) and (raw[at] & 0xC0 == 0x80 or raw[at - 1 : at + 1] == b"\r\n"):
        at -= 1
    return at


@functools.lru_cache(maxsize=1024)
def heldout_from(file: Path, form: Form, changed_ns: int, num_bytes: int) -> int:
    """The byte of the file's content at which the held-out tenth begins; reads all of a compressed one.

    Raises:
        UserError: a compressed file that is damaged.
    """
    if form.compression:
        num_bytes = 0
        with Opened(file, form.compression) as opened:
            try:
                while raw := opened.stream.read(1 << 20):
                    num_bytes += len(raw)
            except DAMAGED as error:
                raise damage(file, num_bytes, error, opened) from error
    target = num_bytes - num_bytes // HELDOUT_ONE_IN
    first = max(0, target - 4)  # so that a character is not parted
    with Opened(file, form.compression, first) as opened:
        raw = opened.stream.read(_SEARCHED_BYTES)
    at = target - first
    for ends in (_LINE_END, re.compile(rb"\n"), re.compile(rb"(?= )")):
        if found := ends.search(raw, at):
            return first + found.end()
    return first + character_before(raw, at)
