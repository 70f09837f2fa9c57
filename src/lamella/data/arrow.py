"""Parquet files -> records. What `datasets` finds in another shape in each record it writes as JSON, in columns of the
type arrow.json, which are read back here as `datasets` reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lamella.data.files import Form
from lamella.data.readers import BadRecords, Place, Record
from lamella.data.records import CHAT_FIELDS, OLD_FIELDS, record_content
from lamella.errors import UserError


def read_parquet(
    file: Path, form: Form, name: str, field: str | None, bad: BadRecords, start: Place
) -> Iterator[Record]:
    """A record a row."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        reason = str(error).partition("\n")[0]
        bad(UserError(f"{file} is not a parquet file ({reason}); mend or remove it"))
        return
    names = table.schema_arrow.names
    wanted = [field] if field else ["text", "messages"]
    columns = [column for column in (*wanted, *CHAT_FIELDS, *OLD_FIELDS) if column in names]
    if not set(wanted).intersection(names):
        record_content(dict.fromkeys(names), field, str(file))
    types = {column: table.schema_arrow.field(column).type for column in columns}
    types = {column: type_ for column, type_ in types.items() if holds_json(type_)}
    row_bytes = file.stat().st_size // max(1, table.metadata.num_rows)
    group, row = _group_of(table.metadata, start.records)
    groups = range(group, table.metadata.num_row_groups)
    try:
        for batch in table.iter_batches(batch_size=1024, columns=columns, row_groups=groups):
            for values in batch.to_pylist():
                where = f"{file}, row {row}"
                row += 1
                if row <= start.records:
                    continue
                try:
                    values |= {column: from_json(values[column], type_, where) for column, type_ in types.items()}
                    content = record_content(values, field, where)
                except UserError as error:
                    bad(error)
                else:
                    end = Place(start.file, row * row_bytes, row, row * row_bytes)
                    yield Record(f"{name}:{row - 1}", content, where, row_bytes, end)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        bad(UserError(f"{file}, behind row {row}: cannot be read ({reason}); mend or remove the file"))


def _group_of(metadata: Any, row: int) -> tuple[int, int]:
    """(the row group of a parquet file that holds this row, its first row); behind the last, an empty group."""
    first = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if row < first + rows:
            return group, first
        first += rows
    return metadata.num_row_groups, first


def holds_json(type_: Any) -> bool:
    """Whether values of this Arrow type are, or hold, strings of JSON."""
    if getattr(type_, "extension_name", "") == "arrow.json":
        return True
    return any(holds_json(type_.field(i).type) for i in range(type_.num_fields))


def from_json(value: Any, type_: Any, where: str) -> Any:
    """The value with what is JSON in it parsed; UserError where that is broken."""
    if value is None or not holds_json(type_):
        return value
    if getattr(type_, "extension_name", "") == "arrow.json":
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: broken JSON ({error}); mend or remove the record") from None
    if isinstance(value, dict):
        fields = {type_.field(i).name: type_.field(i).type for i in range(type_.num_fields)}
        return {name: from_json(entry, fields[name], where) for name, entry in value.items()}
    if isinstance(value, list):
        return [from_json(entry, type_.field(0).type, where) for entry in value]
    return value
