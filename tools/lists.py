"""Lists of images in CSV, JSON lines or Parquet: tables in, tables out, never whole in memory."""

import csv
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq

FORMATS = (".csv", ".jsonl", ".parquet")
CHUNK_ROWS, ROW_GROUP_ROWS = 1024, 65_536


@dataclass(frozen=True)
class ImageList:
    """A list's columns and row count, found by reading it through once; `digest` is of its bytes."""

    path: Path
    schema: pa.Schema
    rows: int
    digest: str

    @classmethod
    def scan(cls, path: Path, needed: Iterable[str]) -> "ImageList":
        """Raises a ClickException for what cannot be read to its end, or lacks a column."""
        if not path.is_file():
            raise click.ClickException(f"{path}: no such file")
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            schema, rows = {".csv": _scan_csv, ".jsonl": _scan_jsonl, ".parquet": _scan_parquet}[path.suffix](path)
        except (pa.ArrowException, ValueError, OSError, csv.Error, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise click.ClickException(f"{path}: cannot be read as {path.suffix}: {reason}") from None
        for name in needed:
            if name not in schema.names:
                found = ", ".join(schema.names) or "none"
                expected = " and ".join(needed)
                raise click.ClickException(f"{path}: column {name!r} is missing: expected {expected}, found {found}")
            try:
                pa.nulls(0, schema.field(name).type).cast(pa.string())
            except pa.ArrowException:
                kind = schema.field(name).type
                raise click.ClickException(f"{path}: column {name!r} holds {kind}: expected text") from None
        return cls(path, schema, rows, digest)

    def tables(self, rows: int) -> Iterator[pa.Table]:
        """The list in tables of that many rows, the last one shorter."""
        if self.path.suffix == ".parquet":
            batches = _open_parquet(self.path).iter_batches(batch_size=CHUNK_ROWS)
            return recut((pa.Table.from_batches([b]).replace_schema_metadata() for b in batches), rows)
        if self.path.suffix == ".jsonl":
            return recut((pa.Table.from_pylist(chunk, self.schema) for chunk in _jsonl_chunks(self.path)), rows)
        texts = pa.schema([(name, pa.string()) for name in self.schema.names])
        chunks = (pa.Table.from_arrays(columns, schema=texts) for columns in _csv_chunks(self.path)[1])
        return recut((chunk.cast(self.schema) for chunk in chunks), rows)


def recut(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of that many."""
    held: pa.Table | None = None
    for table in tables:
        held = table if held is None else pa.concat_tables([held, table])
        while held.num_rows >= rows:
            yield held.slice(0, rows)
            held = held.slice(rows)
    if held is not None and held.num_rows:
        yield held


def _scan_parquet(path: Path) -> tuple[pa.Schema, int]:
    with _open_parquet(path) as file:
        return file.schema_arrow.remove_metadata(), file.metadata.num_rows


def _open_parquet(path: Path) -> pq.ParquetFile:
    return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)  # pages, not whole column chunks, in memory


def _scan_csv(path: Path) -> tuple[pa.Schema, int]:
    """A column is of numbers where the numbers, written back, give the very text; else it is text."""
    names, chunks = _csv_chunks(path)
    kinds = {name: [pa.int64(), pa.float64()] if name not in ("image", "task") else [] for name in names}
    rows = 0
    for columns in chunks:
        rows += len(columns[0])
        for name, column in zip(names, columns, strict=True):
            kinds[name] = [kind for kind in kinds[name] if _is_written_as(column, kind)]
    return pa.schema([(name, (*found, pa.string())[0] if rows else pa.string()) for name, found in kinds.items()]), rows


def _is_written_as(column: pa.Array, kind: pa.DataType) -> bool:
    try:
        return bool(column.cast(kind).cast(pa.string()).equals(column))
    except pa.ArrowInvalid:
        return False


def _csv_chunks(path: Path) -> tuple[list[str], Iterator[list[pa.Array]]]:
    """The header, and the columns of some rows at a time, as text."""

    def lines() -> Iterator[list[str]]:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            yield header
            for row in reader:
                if len(row) != len(header) and row:
                    raise ValueError(f"line {reader.line_num} has {len(row)} fields, the header {len(header)}")
                if row:
                    yield row

    rows = lines()
    names = next(rows)
    if len(set(names)) < len(names):
        raise ValueError("two columns have one name")
    chunks = iter(lambda: list(islice(rows, CHUNK_ROWS)), [])
    return names, ([pa.array(column, pa.string()) for column in zip(*chunk, strict=True)] for chunk in chunks)


def _scan_jsonl(path: Path) -> tuple[pa.Schema, int]:
    schema, rows = pa.schema([]), 0
    for chunk in _jsonl_chunks(path):
        rows += len(chunk)
        names = dict.fromkeys(name for row in chunk for name in row)
        found = pa.schema([(name, _json_type(name, [row.get(name) for row in chunk])) for name in names])
        schema = pa.unify_schemas([schema, found], promote_options="permissive")
    return schema, rows


def _json_type(name: str, values: list[object]) -> pa.DataType:
    try:
        return pa.array(values).type
    except (pa.ArrowException, OverflowError) as error:
        raise ValueError(f"column {name!r} has values of unlike types: {error}") from None


def _jsonl_chunks(path: Path) -> Iterator[list[dict[str, Any]]]:
    def lines() -> Iterator[dict[str, Any]]:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except ValueError as error:
                        raise ValueError(f"line {number}: {error}") from None
                    if not isinstance(row, dict):
                        raise ValueError(f"line {number}: expected an object, found {type(row).__name__}")
                    yield row

    rows = lines()
    return iter(lambda: list(islice(rows, CHUNK_ROWS)), [])


def write_list(file: Path, suffix: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    if suffix == ".parquet":
        with pq.ParquetWriter(file, schema) as writer:
            for table in recut(tables, ROW_GROUP_ROWS):
                writer.write_table(table)
        return
    with file.open("w", newline="", encoding="utf-8") as out:
        if suffix == ".csv":
            rows = csv.writer(out, lineterminator="\n")
            rows.writerow(schema.names)
            for table in tables:
                rows.writerows(zip(*map(_texts, table.columns), strict=True))
        else:
            for table in tables:
                for row in table.to_pylist():
                    row = {name: None if _not_finite(value) else value for name, value in row.items()}
                    out.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def _texts(column: pa.ChunkedArray) -> list[str | None]:
    try:
        return column.cast(pa.string()).to_pylist()
    except pa.ArrowException:  # lists, structs, bytes that are no text
        return [json.dumps(value, ensure_ascii=False, default=str) for value in column.to_pylist()]


def _not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
