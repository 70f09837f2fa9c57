"""Files -> records, one by one. A broken record is an error that names file and line, raised or skipped by policy."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
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


class Record(NamedTuple):
    """A document as it is read: a text, or a conversation (a list of messages)."""

    name: str
    """Inside the source; it decides the split."""
    content: str | list[Any]
    where: str
    """File and line, for people."""
    num_bytes: int = 0
    """Read of the source for it; for progress."""


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


def read_jsonl(file: Path, name: str, field: str | None, bad: BadRecords) -> Iterator[Record]:
    with file.open("rb") as lines:
        offset = 0
        for number, line in enumerate(lines, 1):
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
                yield Record(f"{name}:{number - 1}", content, where, len(line))


def read_parquet(file: Path, name: str, field: str | None, bad: BadRecords) -> Iterator[Record]:
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
    row, row_bytes = 0, file.stat().st_size // max(1, table.metadata.num_rows)
    try:
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            for value in batch.column(0).to_pylist():
                where = f"{file}, row {row}"
                try:
                    yield Record(f"{name}:{row}", record_content({column: value}, column, where), where, row_bytes)
                except UserError as error:
                    bad(error)
                row += 1
    except (pyarrow.ArrowException, OSError) as error:
        bad(UserError(f"{file}, behind row {row}: cannot be read ({error}); mend or remove the file"))


def read_text(file: Path, name: str, bad: BadRecords) -> Iterator[Record]:
    """The whole file as one record."""
    raw = file.read_bytes()
    try:
        yield Record(name, _newlines(raw.decode("utf-8")), str(file), len(raw))
    except UnicodeDecodeError as error:
        bad(_not_utf8(file, error, error.start))


def read_blocks(file: Path, name: str, bad: BadRecords) -> Iterator[Record]:
    """Records of about BLOCK_CHARS characters, read line by line."""
    for index, block in enumerate(blocks(_lines(file, bad))):
        yield Record(f"{name}:{index}", block, f"{file}, block {index}", len(block.encode()))


def blocks(lines: Iterable[str]) -> Iterator[str]:
    """Pieces that end at line ends, each the shortest of at least BLOCK_CHARS characters (the last may be shorter)."""
    block: list[str] = []
    size = 0
    for line in lines:
        block.append(line)
        size += len(line)
        if size >= BLOCK_CHARS:
            yield "".join(block)
            block, size = [], 0
    if block:
        yield "".join(block)


def _lines(file: Path, bad: BadRecords) -> Iterator[str]:
    offset = 0
    with file.open("rb") as raw_lines:
        for raw in raw_lines:
            try:
                yield from _newlines(raw.decode("utf-8")).splitlines(keepends=True)
            except UnicodeDecodeError as error:
                bad(_not_utf8(file, error, offset + error.start))
            offset += len(raw)


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _not_utf8(file: Path, error: UnicodeDecodeError, offset: int) -> UserError:
    return UserError(f"{file} is not UTF-8 text ({error.reason} at byte {offset}); convert or remove it")


RECORD_READERS: dict[str, Callable[[Path, str, str | None, BadRecords], Iterator[Record]]] = {
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}
