"""Lists in CSV."""

import csv
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, islice
from typing import BinaryIO

import pyarrow as pa

from router.infer.formats import text
from router.infer.formats.columns import CHANGED, CHUNK_ROWS, FAULT, Columns, check_same, check_there, repeated

DELIMITERS = ",;\t"
"""Delimiters of a CSV. Spreadsheets write semicolons in countries whose decimal mark is a comma."""


class Csv(Columns):
    """The columns of CSV files. Each file has the same names.

    A column holds numbers only if writing them back gives the same text.
    """

    def __init__(self, first: str, needed: list[str], encoding: str) -> None:
        super().__init__(first, needed, encoding)
        self._kinds: dict[str, list[pa.DataType]] = {}

    def read(self, name: str, file: BinaryIO) -> None:
        names, chunks = _csv_chunks(file, self._encoding, name)
        check_there(name, names, self._needed)
        if self._kinds:
            check_same(name, names, self._first, self._kinds)
        else:
            self._kinds = {n: [pa.int64(), pa.float64()] if n not in ("image", "task") else [] for n in names}
        for columns, faults in chunks:
            self.rows += len(faults)
            for column_name, column in zip(names, columns, strict=True):
                kinds = self._kinds[column_name]
                self._kinds[column_name] = [kind for kind in kinds if _is_written_as(column, kind)]

    def schema(self) -> pa.Schema:
        found = {name: kinds if self.rows else [] for name, kinds in self._kinds.items()}
        return pa.schema([(name, (*kinds, pa.string())[0]) for name, kinds in found.items()])

    @staticmethod
    def tables(file: BinaryIO, of: str, encoding: str, source: pa.Schema, most_rows: int) -> Iterator[pa.Table]:
        names, chunks = _csv_chunks(file, encoding, of)
        if set(names) != set(source.names):
            raise ValueError(CHANGED)
        for texts, faults in chunks:
            found = dict(zip(names, texts, strict=True))
            columns = [found[field.name].cast(field.type) for field in source]
            yield pa.Table.from_arrays([*columns, faults], schema=source.append(FAULT))


def _is_written_as(column: pa.Array, kind: pa.DataType) -> bool:
    try:
        return bool(column.cast(kind).cast(pa.string()).equals(column))
    except pa.ArrowInvalid:
        return False


def _csv_chunks(file: BinaryIO, encoding: str, of: str) -> tuple[list[str], Iterator[tuple[list[pa.Array], pa.Array]]]:
    """The header, and the rows in chunks: their columns as text, and their faults. `of` is the list's name there."""
    records = _csv_records(file, encoding, of)
    names = next(records)[0] or []
    twice = repeated(names)
    if twice is not None:
        raise ValueError(f"two columns are named {twice!r}: rename one")
    chunks = iter(lambda: list(islice(records, CHUNK_ROWS)), [])
    empty = [None] * len(names)
    return names, (
        (
            [pa.array(column, pa.string()) for column in zip(*(row or empty for row, _ in chunk), strict=True)],
            pa.array([fault for _, fault in chunk], pa.string()),
        )
        for chunk in chunks
    )


def _csv_records(file: BinaryIO, encoding: str, of: str) -> Iterator[tuple[list[str] | None, str | None]]:
    """The header, then the rows. Each has its fields, or the reason why they cannot be read."""
    lines = _csv_lines(file, encoding)
    header = next(lines, "")
    reader = csv.reader(chain([header] if header else [], lines), strict=True, delimiter=_delimiter(header))
    width: int | None = None
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            reason = str(error)
            if "unexpected end" in reason or "field larger" in reason:
                limit = csv.field_size_limit()
                reason = (
                    f"a quote never closes, or a field has more than {limit} characters (JSON lines can have those)"
                )
            raise ValueError(f"line {first}: {reason}") from None
        if width is None:
            if any("\0" in name for name in row):
                raise ValueError(
                    "line 1 holds NUL bytes, so it is not text, or has another encoding: save the list as UTF-8 "
                    "(pear-infer also takes --encoding utf-16)"
                )
            width = len(row)
            yield row, None
        elif row and len(row) != width:
            yield None, f"line {first} of {of}: expected {width} fields, as in the header, found {len(row)}"
        elif any("\0" in field for field in row):
            yield None, f"line {first} of {of} holds NUL bytes"
        elif row:
            yield row, None
    if width is None:
        yield [], None


def _delimiter(header: str) -> str:
    """The delimiter by which the header has a column image, else a comma."""
    for delimiter in DELIMITERS:
        with suppress(csv.Error, StopIteration):
            if "image" in next(csv.reader([header], delimiter=delimiter)):
                return delimiter
    return ","


def _csv_lines(file: BinaryIO, encoding: str) -> Iterator[str]:
    """The lines. Raises a ValueError for a line in another encoding, or one that is too long."""
    for number, line in text.numbered_lines(file, encoding):
        found = text.foreign_byte(line)
        if found is not None:
            byte, at = found
            name = "UTF-8" if encoding == "utf-8-sig" else encoding
            other = "utf-16" if number == at == 1 and byte in (0xFE, 0xFF) else "latin-1"
            raise ValueError(
                f"line {number} is not {name}: byte 0x{byte:02x} at character {at}: "
                f"save the list as UTF-8 (pear-infer also takes --encoding {other})"
            )
        if len(line) >= text.LINE_CHARACTERS:
            raise ValueError(f"line {number} has more than {text.LINE_CHARACTERS} characters: is it CSV?")
        yield line
