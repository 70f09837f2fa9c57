"""Files -> records, one by one. A broken record is an error that names file and line, raised or skipped by policy."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

from lamella.errors import UserError

BLOCK_CHARS = 4000
Policy = Literal["fail", "skip"]
logger = logging.getLogger(__name__)


def policy(word: str) -> Policy:
    """UserError for a word that is none."""
    if word not in get_args(Policy):
        raise UserError(f"on_bad_data is {word!r}; it must be fail or skip")
    return cast(Policy, word)


class Place(NamedTuple):
    """Where a record begins: reading goes on from here as if everything before had been read."""

    file: int = 0
    """Number of the file in the source."""
    offset: int = 0
    """Bytes of the file before this; of a parquet file, estimated by its rows."""
    records: int = 0
    """Records of the file (lines of JSONL, rows, blocks) before this one."""


FIRST = Place()


class Record(NamedTuple):
    """A document as it is read: a text, or a conversation (a list of messages)."""

    name: str
    """Inside the source; it decides the split."""
    content: str | list[Any]
    where: str
    """File and line, for people."""
    num_bytes: int = 0
    """Read of the source for it; for progress."""
    end: Place = FIRST
    """Where the next record begins."""


class BadRecords:
    """What to do with a broken record: fail with its error, or skip it, counted, the first ones named in the log."""

    def __init__(self, policy: Policy = "fail", named: int = 5):
        self.policy, self.named, self.skipped = policy, named, 0

    def __call__(self, error: UserError) -> None:
        if self.policy == "fail":
            raise error
        self.skipped += 1
        if self.skipped <= self.named:
            logger.warning("skipped: %s", error)


def record_content(record: Any, field: str | None, where: str) -> str | list[Any]:
    """The text or conversation of a record: in `field`, or without one in "text" or else "messages".

    Raises:
        UserError: it has neither; it is empty.
    """
    names = ("text", "messages") if field is None else (field,)
    values = [record.get(name) for name in names] if isinstance(record, dict) else []
    content = next((v for v in values if isinstance(v, str | list)), None)
    if content is None:
        has = f"it has {', '.join(map(repr, record))}" if isinstance(record, dict) else "it is no object"
        wanted = " or ".join(map(repr, names))
        raise UserError(f"{where}: no text in the field {wanted} ({has}); name another one as SOURCE#FIELD")
    if isinstance(content, str):
        check_unicode(content, where)
    return content


def check_unicode(text: str, where: str) -> None:
    """UserError for half of a surrogate pair, which JSON may hold (a cut emoji) and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: not valid Unicode ({error.reason}); mend or remove the record") from None


def record_text(record: Any, field: str | None, where: str) -> str:
    """As `record_content`, where only text will do."""
    content = record_content(record, field or "text", where)
    if not isinstance(content, str):
        raise UserError(f"{where}: the field {field!r} is no text; name another one as SOURCE#FIELD")
    return content


def read_jsonl(file: Path, name: str, field: str | None, bad: BadRecords, start: Place) -> Iterator[Record]:
    with file.open("rb") as lines:
        offset = lines.seek(start.offset)
        for number, line in enumerate(lines, start.records + 1):
            where = f"{file}, line {number} (byte {offset})"
            offset += len(line)
            if not line.strip():
                continue
            try:
                content = record_content(json.loads(line), field, where)
            except UserError as error:
                bad(error)
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
                bad(UserError(f"{where}: not JSON ({error}); mend or remove the line"))
            else:
                yield Record(f"{name}:{number - 1}", content, where, len(line), Place(start.file, offset, number))


def read_parquet(file: Path, name: str, field: str | None, bad: BadRecords, start: Place) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        bad(UserError(f"{file} is not a parquet file ({error}); mend or remove it"))
        return
    names = table.schema_arrow.names
    column = field or ("messages" if "text" not in names and "messages" in names else "text")
    if column not in names:
        record_content(dict.fromkeys(names), field, str(file))
    row_bytes = file.stat().st_size // max(1, table.metadata.num_rows)
    group, row = _group_of(table.metadata, start.records)
    groups = range(group, table.metadata.num_row_groups)
    try:
        for batch in table.iter_batches(batch_size=1024, columns=[column], row_groups=groups):
            for value in batch.column(0).to_pylist():
                where = f"{file}, row {row}"
                row += 1
                if row <= start.records:
                    continue
                try:
                    content = record_content({column: value}, column, where)
                except UserError as error:
                    bad(error)
                else:
                    yield Record(
                        f"{name}:{row - 1}", content, where, row_bytes, Place(start.file, row * row_bytes, row)
                    )
    except (pyarrow.ArrowException, OSError) as error:
        bad(UserError(f"{file}, behind row {row}: cannot be read ({error}); mend or remove the file"))


def _group_of(metadata: Any, row: int) -> tuple[int, int]:
    """(the row group of a parquet file that holds this row, its first row); behind the last, an empty group."""
    first = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if row < first + rows:
            return group, first
        first += rows
    return metadata.num_row_groups, first


def read_text(file: Path, name: str, bad: BadRecords, start: Place) -> Iterator[Record]:
    """The whole file as one record."""
    if start.records:
        return
    raw = file.read_bytes()
    try:
        yield Record(name, _newlines(raw.decode("utf-8")), str(file), len(raw), Place(start.file, len(raw), 1))
    except UnicodeDecodeError as error:
        bad(_not_utf8(file, error, error.start))


def read_blocks(file: Path, name: str, bad: BadRecords, start: Place) -> Iterator[Record]:
    """Records that end at line ends, each the shortest of at least BLOCK_CHARS characters (the last may be shorter)."""
    block: list[str] = []
    size, index, begin, end = 0, start.records, start.offset, start.offset

    def record() -> Record:
        return Record(
            f"{name}:{index}", "".join(block), f"{file}, block {index}", end - begin, Place(start.file, end, index + 1)
        )

    for line, end in _lines(file, bad, start.offset):
        block.append(line)
        size += len(line)
        if size >= BLOCK_CHARS:
            yield record()
            block, size, index, begin = [], 0, index + 1, end
    if block:
        yield record()


def _lines(file: Path, bad: BadRecords, start: int) -> Iterator[tuple[str, int]]:
    """(line, the byte behind it) from byte `start` on; lines end with any of the three newlines."""
    with file.open("rb") as raw_lines:
        offset = raw_lines.seek(start)
        for raw_line in raw_lines:
            for raw in raw_line.splitlines(keepends=True):
                offset += len(raw)
                try:
                    yield _newlines(raw.decode("utf-8")), offset
                except UnicodeDecodeError as error:
                    bad(_not_utf8(file, error, offset - len(raw) + error.start))


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _not_utf8(file: Path, error: UnicodeDecodeError, offset: int) -> UserError:
    return UserError(f"{file} is not UTF-8 text ({error.reason} at byte {offset}); convert or remove it")


RECORD_READERS: dict[str, Callable[[Path, str, str | None, BadRecords, Place], Iterator[Record]]] = {
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}
