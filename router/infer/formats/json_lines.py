"""Lists in JSON lines."""

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa

from pear_store.counted import counted
from pear_store.errors import unreadable
from router.infer.formats import text
from router.infer.formats.columns import (
    CHUNK_ROWS,
    FAULT,
    JSON_TEXT,
    Columns,
    check_there,
    is_json_text,
    repeated,
    shown,
)

MOST_COLUMNS = 10_000
EXACT = 2**53
"""Float64 holds every integer up to this one."""


class JsonLines(Columns):
    """The columns of files of JSON lines: the names of all rows. A row without a name has no value there."""

    def __init__(self, first: str, needed: list[str], encoding: str) -> None:
        super().__init__(first, needed, encoding)
        self._kinds: dict[str, pa.DataType | None] = {}
        """Column -> its type. None if its values have different types."""
        self._large: set[str] = set()
        """Columns with integers that float64 cannot hold."""

    def read(self, name: str, file: BinaryIO) -> None:
        rows, faults, first = 0, 0, ""
        names: set[str] = set()
        for chunk in _jsonl_chunks(file, self._encoding, "the list"):
            rows += len(chunk)
            for _, fault in chunk:
                faults += fault is not None
                first = first or fault or ""
            for column in dict.fromkeys(column for row, _ in chunk for column in row):
                names.add(column)
                values = [row.get(column) for row, _ in chunk]
                if any(type(value) is int and abs(value) > EXACT for value in values):
                    self._large.add(column)
                found = _json_type(values)
                self._kinds[column] = _both(self._kinds[column], found) if column in self._kinds else found
            if len(self._kinds) > MOST_COLUMNS:
                raise ValueError(f"more than {MOST_COLUMNS} names: expected rows with the same names")
        if rows and faults == rows:
            raise ValueError(f"none of {counted(rows, 'line')} can be read; {first}")
        if rows:
            check_there(name, [column for column in self._kinds if column in names], self._needed)
        self.rows += rows

    def schema(self) -> pa.Schema:
        kinds = self._kinds if self.rows else dict.fromkeys(self._needed, pa.string())
        as_json = pa.field("", pa.string(), metadata=JSON_TEXT)
        unlike = {n for n, kind in kinds.items() if kind is None or (n in self._large and pa.types.is_floating(kind))}
        return pa.schema([as_json.with_name(n) if n in unlike else pa.field(n, kind) for n, kind in kinds.items()])

    @staticmethod
    def tables(file: BinaryIO, of: str, encoding: str, source: pa.Schema, most_rows: int) -> Iterator[pa.Table]:
        for chunk in _jsonl_chunks(file, encoding, of):
            columns = [_json_column(field, [row.get(field.name) for row, _ in chunk]) for field in source]
            faults = pa.array([fault for _, fault in chunk], pa.string())
            yield pa.Table.from_arrays([*columns, faults], schema=source.append(FAULT))


def _json_type(values: list[object]) -> pa.DataType | None:
    try:
        found = pa.array(values).type
    except (pa.ArrowException, OverflowError):
        return None
    return None if _has_empty_struct(found) else found


def _both(first: pa.DataType | None, second: pa.DataType | None) -> pa.DataType | None:
    if first is None or second is None:
        return None
    try:
        schemas = [pa.schema([("", kind)]) for kind in (first, second)]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return None


def _has_empty_struct(kind: pa.DataType) -> bool:
    """Whether a type has a struct without fields, which Parquet cannot hold."""
    if pa.types.is_struct(kind):
        return not kind.num_fields or any(_has_empty_struct(kind.field(i).type) for i in range(kind.num_fields))
    return bool(pa.types.is_list(kind)) and _has_empty_struct(kind.value_type)


def _json_column(field: pa.Field, values: list[Any]) -> pa.Array:
    if is_json_text(field):
        values = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    return pa.array(values, field.type)


def _jsonl_chunks(file: BinaryIO, encoding: str, of: str) -> Iterator[list[tuple[dict[str, Any], str | None]]]:
    """The rows in chunks. Each row has its values, and the reason if it could not be read."""
    rows = _jsonl_rows(file, encoding, of)
    return iter(lambda: list(islice(rows, CHUNK_ROWS)), [])


def _jsonl_rows(file: BinaryIO, encoding: str, of: str) -> Iterator[tuple[dict[str, Any], str | None]]:
    skipped = 0
    for number, line in text.numbered_lines(file, encoding):
        if number == skipped:
            continue
        if len(line) >= text.LINE_CHARACTERS:
            skipped = number
            yield {}, f"line {number} of {of} has more than {text.LINE_CHARACTERS} characters"
        elif line.strip():
            try:
                yield _json_row(line), None
            except (ValueError, RecursionError) as error:
                found = f"{error.msg} at character {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                yield {}, f"line {number} of {of}: expected a JSON object: {found or unreadable(error)}"


def _json_row(line: str) -> dict[str, Any]:
    """A row. Raises a ValueError or RecursionError if the line is not a row, or could not be written again."""
    found = text.foreign_byte(line)
    if found is not None:
        raise ValueError(f"byte 0x{found[0]:02x} at character {found[1]} is not UTF-8")
    row = json.loads(line, object_pairs_hook=_object)
    if not isinstance(row, dict):
        raise ValueError(f"found {shown(row):.40}")
    if "\\u" in line:
        json.dumps(row, ensure_ascii=False).encode()  # raises for half of a surrogate pair, which is not text
    return row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the name {repeated(name for name, _ in pairs)!r:.60} comes twice")
    return found
