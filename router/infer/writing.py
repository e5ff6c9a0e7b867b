"""Writes lists in CSV, JSON lines or Parquet. A list is never whole in memory."""

import base64
import csv
import json
import math
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pear_store.files import ending
from router.infer.formats.columns import ROW_GROUP_ROWS, TABLE_BYTES, ListError, from_json_text, is_binary, is_json_text
from router.infer.lists import recut


def check_writable(path: Path, schema: pa.Schema) -> None:
    """Raises a ListError if the file's format cannot hold a list of that schema."""
    if ending(path) not in (".csv", ".jsonl"):
        try:
            pq.write_table(schema.empty_table(), BytesIO())
        except pa.ArrowException as error:
            raise ListError(path, f"cannot be written as .parquet: {error}: choose .jsonl or .csv") from None


def write_list(file: Path, suffix: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Writes a list. Raises a ListError for values that the format cannot hold.

    Args:
        suffix: the format: .csv, .jsonl or .parquet.
    """
    try:
        _write(file, suffix, schema, tables)
    except (pa.ArrowException, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise ListError(file, f"cannot be written as {suffix}: {reason:.500}: choose another format") from None


def write_folder(folder: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> list[Path]:
    """Writes numbered Parquet files, in order, and returns their paths.

    Raises:
        ListError: the format cannot hold a value.
    """
    folder.mkdir()
    files = []
    for number, table in enumerate(recut(tables, ROW_GROUP_ROWS, TABLE_BYTES)):
        files.append(folder / f"{number:08}.parquet")
        write_list(files[-1], ".parquet", schema, [table])
    if not files:
        files.append(folder / f"{0:08}.parquet")
        write_list(files[-1], ".parquet", schema, [])
    return files


def _write(file: Path, suffix: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    if suffix == ".parquet":
        plain = pa.schema([field.remove_metadata() for field in schema])
        with pq.ParquetWriter(file, plain) as writer:
            for table in recut(tables, ROW_GROUP_ROWS, TABLE_BYTES):
                columns = map(_unquoted, table.columns, schema)
                writer.write_table(pa.Table.from_arrays(list(columns), schema=plain))
        return
    with file.open("w", newline="", encoding="utf-8") as out:
        if suffix == ".csv":
            rows = csv.writer(out, lineterminator="\n")
            rows.writerow(schema.names)
            for table in tables:
                rows.writerows(zip(*map(_texts, table.columns, schema), strict=True))
        else:
            for table in tables:
                for values in zip(*map(_values, table.columns, schema), strict=True):
                    row = dict(zip(schema.names, values, strict=True))
                    out.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def _unquoted(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    """The column to write. In a column of JSON texts, a JSON string becomes its plain text."""
    if not is_json_text(field):
        return column
    values = [(text, from_json_text(text)) for text in column.to_pylist()]
    return pa.chunked_array([pa.array([v if isinstance(v, str) else text for text, v in values], pa.string())])


def _texts(column: pa.ChunkedArray, field: pa.Field) -> list[str | None]:
    if pa.types.is_nested(field.type) or is_binary(field.type):
        return [v if v is None or isinstance(v, str) else _dumped(v) for v in _values(column, field)]
    texts: list[str | None] = _unquoted(column, field).cast(pa.string()).to_pylist()
    return texts


def _dumped(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _values(column: pa.ChunkedArray, field: pa.Field) -> list[Any]:
    """The values in a form that JSON can hold: bytes as base64, non-finite numbers as null, times as text."""
    kind, types = field.type, pa.types
    if types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if is_json_text(field):
        return [_plain(from_json_text(text)) for text in column.to_pylist()]
    if types.is_nested(kind) or types.is_floating(kind) or is_binary(kind):
        return [_plain(value) for value in column.to_pylist()]
    if types.is_null(kind) or types.is_boolean(kind) or types.is_integer(kind):
        return list(column.to_pylist())
    return list(column.cast(pa.string()).to_pylist())


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, bool | int | str) else str(value)
