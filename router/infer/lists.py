"""Reads lists of images in CSV, JSON lines or Parquet. A list is never whole in memory.

A list is one file, or several files of one format that are read one after another. A line of CSV or JSON lines that
cannot be read becomes a row without values, with a fault that names the line.
"""

import csv
import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader, TextIOWrapper
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pear_store import PearStoreError
from pear_store.counted import counted
from pear_store.errors import unreadable
from pear_store.files import ending
from pear_store.local.sources import Access, is_url, open_copy, path_in_url, url_folder
from router.errors import RouterError

FORMATS = (".csv", ".jsonl", ".parquet")
CSV = (".csv", ".tsv")
DELIMITERS = ",;\t"
"""Delimiters of a CSV. Spreadsheets write semicolons in countries whose decimal mark is a comma."""
CHUNK_ROWS, ROW_GROUP_ROWS = 1024, 65_536
TABLE_BYTES = 64 << 20
"""About the most bytes in memory of a list with large rows, such as one that holds its images."""
LINE_CHARACTERS = 16 << 20
COLUMNS = 10_000
EXACT = 2**53
"""Float64 holds every integer up to this one."""
JSON_TEXT = {b"pear": b"json"}
"""Metadata of a column of JSON lines whose values have different types. Such a column is held as JSON texts."""
CHANGED = "it was changed while it was read: run the command again"
FAULT, FILE = pa.field("", pa.string()), pa.field("", pa.int32())
"""Two more columns of a list while it is read: why a row cannot be served, and the number of its file."""
Image = str | bytes


class OutputError(RouterError):
    """An output is not written, or not replaced."""


class ListError(RouterError):
    """A list cannot be read, or cannot be written in the wanted format."""

    def __init__(self, path: str | Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")


@dataclass(frozen=True)
class Rows:
    """Some rows of a list."""

    table: pa.Table
    """The columns that the output keeps, with the list's schema."""
    images: list[Image | None]
    """Paths and URLs as in the list, or encoded images."""
    folders: list[str]
    """The folder where each row's relative path starts: that of the row's file. It may be a URL."""
    tasks: list[str | None]
    faults: list[str | None]
    """Why a row cannot be served. None if it can."""


@dataclass(frozen=True)
class ListFile:
    """A file of a list, as it was when it was first read. `digest` is the sha256 of its bytes."""

    path: str
    """A path or a URL."""
    folder: str
    digest: str
    signature: tuple[int, ...]


@dataclass(frozen=True)
class ImageList:
    """A list's columns and number of rows, found by reading all its files once."""

    path: str
    """The name that the user gave: a file, or a folder or pattern of several."""
    files: tuple[ListFile, ...]
    schema: pa.Schema
    rows: int
    encoding: str
    source: pa.Schema
    """The columns of the files. For images that the list holds, `schema` has their paths instead."""
    most_rows: int
    """Most rows of a table in memory."""
    access: Access
    """Which URLs of files may be opened."""

    @classmethod
    def scan(
        cls,
        path: str | Path,
        needed: Iterable[str],
        encoding: str = "utf-8-sig",
        *,
        files: Iterable[str] | None = None,
        allowed: Iterable[str] = (),
    ) -> "ImageList":
        """Reads each file once.

        Args:
            needed: columns that each file must have.
            files: the paths and URLs, if `path` names several files.
            allowed: further protocols that may be opened, as in `Access`.

        Raises:
            ListError: a file cannot be read to its end, lacks a column of `needed`, or has other columns than the
                first file.
        """
        access, found = Access(allowed=frozenset(allowed)), list[ListFile]()
        columns: _Columns | None = None
        for name in (str(path),) if files is None else files:
            with _reading(name), open_copy(name, access) as file:
                signature = _signature(name, file)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                file.seek(0)
                columns = columns or _FORMATS[list_ending(name)](name, list(needed), encoding)
                columns.read(name, file)
                source = columns.schema()
                schema = _without_images(name, source, needed)
            found.append(ListFile(name, _folder(name), digest, signature))
        assert columns is not None, path
        return cls(str(path), tuple(found), schema, columns.rows, encoding, source, columns.most_rows, access)

    @property
    def folder(self) -> str:
        """The folder where relative paths of the first file start, without a user and password."""
        return _public(self.files[0].folder)

    @property
    def digest(self) -> str:
        """The sha256 of a file's bytes. For several files, that of their digests and folders in reading order."""
        if len(self.files) == 1:
            return self.files[0].digest
        lines = "".join(f"{file.digest} {_public(file.folder)}\n" for file in self.files)
        return hashlib.sha256(os.fsencode(lines)).hexdigest()

    def parts(self, rows: int) -> Iterator[Rows]:
        """The list in parts of `rows` rows, or of fewer if rows are large. The last part may be shorter."""
        with _reading(self.path, list_ending(self.files[0].path)):
            for table in recut(self._tables(), min(rows, self.most_rows)):
                yield self._rows(table)

    def tasks(self, table: pa.Table) -> list[str | None]:
        """The column `task` of rows of the output, as text."""
        return self.texts(table, "task")

    def texts(self, table: pa.Table, column: str) -> list[str | None]:
        """A column of rows with the list's schema, as text."""
        texts, _ = _texts_asked(table.column(column), self.schema.field(column))
        return texts

    def _tables(self) -> Iterator[pa.Table]:
        """Tables of the list's own columns, with two last columns: faults, and numbers of files."""
        for number, file in enumerate(self.files):
            with _reading(file.path):
                for table in self._tables_of(file):
                    numbers = pa.array([number] * table.num_rows, FILE.type)
                    yield table.append_column(FILE, numbers)

    def _tables_of(self, listed: ListFile) -> Iterator[pa.Table]:
        """Tables of one file's own columns, with a last column of faults."""
        of = "the list" if len(self.files) == 1 else _public(listed.path)
        with open_copy(listed.path, self.access) as file:
            _check_unchanged(listed, file)
            file.seek(0)
            yield from _FORMATS[list_ending(listed.path)].tables(file, of, self.encoding, self.source, self.most_rows)
        if listed.signature:
            with open_copy(listed.path) as file:
                _check_unchanged(listed, file)

    def _rows(self, table: pa.Table) -> Rows:
        faults, files = (column.to_pylist() for column in table.columns[-2:])
        columns = dict(zip(self.source.names, table.columns[:-2], strict=True))
        images, paths, found = _images_asked(columns["image"], self.source.field("image"))
        faults = [fault or more for fault, more in zip(faults, found, strict=True)]
        if paths is not None:
            columns["image"] = paths
        tasks: list[str | None] = [None] * len(images)
        if "task" in self.source.names:
            tasks, found = _texts_asked(columns["task"], self.source.field("task"))
            faults = [fault or more for fault, more in zip(faults, found, strict=True)]
        kept = pa.Table.from_arrays(list(columns.values()), schema=self.schema)
        return Rows(kept, images, [self.files[file].folder for file in files], tasks, faults)


def recut(tables: Iterable[pa.Table], rows: int, most_bytes: int | None = None) -> Iterator[pa.Table]:
    """The same rows in tables of `rows` rows, or of fewer if those would have more than `most_bytes`."""
    held: pa.Table | None = None
    for table in tables:
        held = table if held is None else pa.concat_tables([held, table])
        while held.num_rows >= rows:
            yield held.slice(0, rows)
            held = held.slice(rows)
        if held.num_rows and most_bytes is not None and held.nbytes > most_bytes:
            yield held
            held = None
    if held is not None and held.num_rows:
        yield held


@contextmanager
def _reading(name: str, kind: str | None = None) -> Iterator[None]:
    """Turns every error of a reader into a ListError."""
    try:
        yield
    except PearStoreError as error:  # the file cannot be opened; the message names it
        raise OutputError(str(error)) from None
    except (pa.ArrowException, ValueError, OSError, OverflowError, csv.Error, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ListError(name, f"cannot be read as {kind or list_ending(name)}: {reason:.500}") from None


def list_ending(name: str) -> str:
    """The ending of a path, or of the path in a URL, in lower case."""
    return ending(path_in_url(name) if is_url(name) else name)


def _folder(name: str) -> str:
    return url_folder(name) if is_url(name) else os.path.dirname(os.path.abspath(name))


def _public(name: str) -> str:
    """A path or URL, without a user and password."""
    return re.sub(r"://[^/@]*@", "://", name)


def _signature(name: str, file: BinaryIO) -> tuple[int, ...]:
    """Values that differ if a file was changed. Empty for a URL, whose file is a copy."""
    found = os.fstat(file.fileno())
    return () if is_url(name) else (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _check_unchanged(listed: ListFile, file: BufferedReader) -> None:
    if listed.signature:
        same = _signature(listed.path, file) == listed.signature
    else:
        same = hashlib.file_digest(file, "sha256").hexdigest() == listed.digest
    if not same:
        raise ValueError(CHANGED)


# ---- columns ------------------------------------------------------------------------------------


def _check_there(path: str, names: Iterable[str], needed: Iterable[str]) -> None:
    """Raises a ListError if a column is missing."""
    names, needed = list(names), list(needed)
    for name in needed:
        if name not in names:
            expected = " and ".join(needed)
            raise ListError(path, f"column {name!r} is missing: expected {expected}, found {_shown_names(names)}")


def _check_same(path: str, names: Collection[str], first: str, expected: Collection[str]) -> None:
    """Raises a ListError if a file has other columns than the first file."""
    lacks = [name for name in expected if name not in names]
    more = [name for name in names if name not in expected]
    told = [f"{verb} {_shown_names(found)}" for verb, found in (("lacks", lacks), ("has", more)) if found]
    if told:
        raise ListError(path, f"{' and '.join(told)}, unlike {first}: all lists of a run need the same columns")


def _shown_names(names: list[str]) -> str:
    shown = ", ".join(f"{name:.40}" if name.isprintable() else f"{name!r:.40}" for name in names[:20])
    return f"{shown} and {len(names) - 20} more" if len(names) > 20 else shown or "none"


def _without_images(path: str, schema: pa.Schema, needed: Iterable[str]) -> pa.Schema:
    """The schema, with images replaced by paths.

    Raises:
        ListError: a column has a type that does not fit.
    """
    for name in needed:
        field = schema.field(name)
        if name == "image" and _holds_images(field.type):
            schema = schema.set(schema.get_field_index(name), pa.field(name, pa.string()))
        elif pa.types.is_nested(field.type):
            also = ", images, or structs of bytes and path" if name == "image" else ""
            raise ListError(path, f"column {name!r} holds {field.type!s:.200}: expected text{also}")
    return schema


def is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _holds_images(kind: pa.DataType) -> bool:
    """Whether a column holds encoded images, either plain or in Hugging Face's structs of bytes and path."""
    if not pa.types.is_struct(kind):
        return is_binary(kind)
    fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
    if not fields or not fields.keys() <= {"bytes", "path"}:
        return False
    data, path = fields.get("bytes", pa.null()), fields.get("path", pa.null())
    text = pa.types.is_string(path) or pa.types.is_large_string(path) or pa.types.is_null(path)
    return text and (is_binary(data) or pa.types.is_null(data))


def _images_asked(
    column: pa.ChunkedArray, field: pa.Field
) -> tuple[list[Image | None], pa.ChunkedArray | None, list[str | None]]:
    """The images, their paths if the column holds encoded images (else None), and the rows' faults."""
    if not _holds_images(field.type):
        texts, faults = _texts_asked(column, field)
        return list(texts), None, faults
    values = column.to_pylist()
    if is_binary(field.type):
        return values, pa.chunked_array([pa.nulls(len(values), pa.string())]), [None] * len(values)
    structs = [value or {} for value in values]
    paths = pa.chunked_array([pa.array([struct.get("path") for struct in structs], pa.string())])
    return [struct.get("bytes") or struct.get("path") for struct in structs], paths, [None] * len(values)


def _texts_asked(column: pa.ChunkedArray, field: pa.Field) -> tuple[list[str | None], list[str | None]]:
    """A column as text, and the rows' faults."""
    if not is_json_text(field):
        texts = column.cast(pa.string()).to_pylist()
        return texts, [None] * len(texts)
    texts, faults = [], []
    for value in map(from_json_text, column.to_pylist()):
        good = value is None or isinstance(value, str | int)
        texts.append(None if value is None or not good else str(value))
        faults.append(None if good else f"{field.name} is {_shown(value)}: expected text")
    return texts, faults


def _shown(value: object) -> str:
    return "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else repr(value)


def is_json_text(field: pa.Field) -> bool:
    return bool(field.metadata) and JSON_TEXT.items() <= field.metadata.items()


def from_json_text(text: str | None) -> Any:
    return None if text is None else json.loads(text)


class _Columns(ABC):
    """The columns of a list's files, and how the files of one format are read.

    Args:
        first: the first file.
        needed: columns that each file must have.
    """

    def __init__(self, first: str, needed: list[str], encoding: str) -> None:
        self._first, self._needed, self._encoding = first, needed, encoding
        self.rows, self.most_rows = 0, ROW_GROUP_ROWS

    @abstractmethod
    def read(self, name: str, file: BinaryIO) -> None:
        """Reads one more file.

        Raises:
            ListError: its columns differ from those of the first file.
        """

    @abstractmethod
    def schema(self) -> pa.Schema:
        """The columns of all files that were read. Their types hold the values of all files."""

    @staticmethod
    @abstractmethod
    def tables(file: BinaryIO, of: str, encoding: str, source: pa.Schema, most_rows: int) -> Iterator[pa.Table]:
        """Tables of a file's rows, with a last column of faults.

        Args:
            of: the file's name in faults.
            source: the columns of all files.
        """


# ---- Parquet ------------------------------------------------------------------------------------


class _Parquet(_Columns):
    """The columns of Parquet files. Each file has the same names, and types that fit together."""

    def __init__(self, first: str, needed: list[str], encoding: str) -> None:
        super().__init__(first, needed, encoding)
        self._fields: dict[str, pa.Field] = {}

    def read(self, name: str, file: BinaryIO) -> None:
        with _parquet(file) as parquet:
            schema, metadata = parquet.schema_arrow.remove_metadata(), parquet.metadata
        twice = _twice(schema.names)
        if twice is not None:
            raise ValueError(f"two columns are named {twice!r}: rename one")
        _check_there(name, schema.names, self._needed)
        if self._fields:
            _check_same(name, schema.names, self._first, self._fields)
        for field in schema:
            field = field.with_type(_held_as(field.name, field.type))
            self._fields[field.name] = _joined(name, field, self._fields.get(field.name, field))
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        row_bytes = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=0)
        self.most_rows = max(1, min(self.most_rows, int(TABLE_BYTES / max(1, row_bytes))))
        self.rows += metadata.num_rows

    def schema(self) -> pa.Schema:
        return pa.schema(list(self._fields.values()))

    @staticmethod
    def tables(file: BinaryIO, of: str, encoding: str, source: pa.Schema, most_rows: int) -> Iterator[pa.Table]:
        for batch in _parquet(file).iter_batches(batch_size=min(CHUNK_ROWS, most_rows)):
            table = pa.Table.from_batches([batch]).replace_schema_metadata()
            if set(table.column_names) != set(source.names):
                raise ValueError(CHANGED)
            table = table.select(source.names).cast(source)
            yield table.append_column(FAULT, pa.nulls(table.num_rows, pa.string()))


def _joined(path: str, field: pa.Field, before: pa.Field) -> pa.Field:
    """A column of several files. Its type holds the values of all files.

    Raises:
        ListError: there is no such type.
    """
    kinds = field.type, before.type
    if pa.types.is_null(kinds[0]) or kinds[0] == kinds[1]:
        kind = kinds[1]
    elif pa.types.is_null(kinds[1]):
        kind = kinds[0]
    elif (kind := _widest(kinds[0])) != _widest(kinds[1]):
        told = f"holds {kinds[0]!s:.100}, in earlier lists {kinds[1]!s:.100}: all lists of a run need the same types"
        raise ListError(path, f"column {field.name!r} {told}")
    return before.with_type(kind).with_nullable(field.nullable or before.nullable)


def _widest(kind: pa.DataType) -> pa.DataType:
    """The widest type of the same kind."""
    types = pa.types
    if types.is_dictionary(kind):
        return _widest(kind.value_type)
    if types.is_integer(kind) and kind != pa.uint64():
        return pa.int64()
    if types.is_floating(kind):
        return pa.float64()
    if types.is_string(kind):
        return pa.large_string()
    return pa.large_binary() if types.is_binary(kind) else kind


def _parquet(file: BinaryIO) -> pq.ParquetFile:
    return pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)  # keeps pages in memory, not whole columns


def _twice(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _held_as(name: str, kind: pa.DataType) -> pa.DataType:
    """The type in memory. Views become plain types, because rows of views cannot be taken; extensions their storage."""
    if isinstance(kind, pa.BaseExtensionType):
        return _held_as(name, kind.storage_type)
    if pa.types.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        twice = _twice(field.name for field in fields)
        if twice is not None:
            raise ValueError(f"column {name!r} has two fields named {twice!r}: rename one")
        return pa.struct([field.with_type(_held_as(name, field.type)) for field in fields])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_held_as(name, kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_held_as(name, kind.value_type)))
    return {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}.get(kind, kind)


# ---- text ---------------------------------------------------------------------------------------


def _lines(binary: BinaryIO, encoding: str) -> Iterator[tuple[int, str]]:
    """Numbered lines. Bytes outside of the encoding come as lone surrogates. A long line comes in pieces."""
    file = TextIOWrapper(binary, encoding=encoding, errors="surrogateescape", newline="")
    try:
        number, whole = 1, True
        while line := file.readline(LINE_CHARACTERS):
            yield number, line
            whole = line.endswith(("\n", "\r"))
            number += whole
    finally:
        with suppress(ValueError):  # it is already closed
            file.detach()  # so that `binary` stays open for its owner


def _foreign_byte(line: str) -> tuple[int, int] | None:
    """The first byte outside of the encoding, and the number of its character in the line, from 1."""
    if line.isascii():
        return None
    return next(((ord(c) - 0xDC00, i) for i, c in enumerate(line, 1) if "\udc80" <= c <= "\udcff"), None)


# ---- CSV ----------------------------------------------------------------------------------------


class _Csv(_Columns):
    """The columns of CSV files. Each file has the same names.

    A column holds numbers only if writing them back gives the same text.
    """

    def __init__(self, first: str, needed: list[str], encoding: str) -> None:
        super().__init__(first, needed, encoding)
        self._kinds: dict[str, list[pa.DataType]] = {}

    def read(self, name: str, file: BinaryIO) -> None:
        names, chunks = _csv_chunks(file, self._encoding, name)
        _check_there(name, names, self._needed)
        if self._kinds:
            _check_same(name, names, self._first, self._kinds)
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
    twice = _twice(names)
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
    for number, line in _lines(file, encoding):
        found = _foreign_byte(line)
        if found is not None:
            byte, at = found
            name = "UTF-8" if encoding == "utf-8-sig" else encoding
            other = "utf-16" if number == at == 1 and byte in (0xFE, 0xFF) else "latin-1"
            raise ValueError(
                f"line {number} is not {name}: byte 0x{byte:02x} at character {at}: "
                f"save the list as UTF-8 (pear-infer also takes --encoding {other})"
            )
        if len(line) >= LINE_CHARACTERS:
            raise ValueError(f"line {number} has more than {LINE_CHARACTERS} characters: is it CSV?")
        yield line


# ---- JSON lines ---------------------------------------------------------------------------------


class _JsonLines(_Columns):
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
            if len(self._kinds) > COLUMNS:
                raise ValueError(f"more than {COLUMNS} names: expected rows with the same names")
        if rows and faults == rows:
            raise ValueError(f"none of {counted(rows, 'line')} can be read; {first}")
        if rows:
            _check_there(name, [column for column in self._kinds if column in names], self._needed)
        self.rows += rows

    def schema(self) -> pa.Schema:
        kinds = self._kinds if self.rows else dict.fromkeys(self._needed, pa.string())
        text = pa.field("", pa.string(), metadata=JSON_TEXT)
        unlike = {n for n, kind in kinds.items() if kind is None or (n in self._large and pa.types.is_floating(kind))}
        return pa.schema([text.with_name(n) if n in unlike else pa.field(n, kind) for n, kind in kinds.items()])

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
    for number, line in _lines(file, encoding):
        if number == skipped:
            continue
        if len(line) >= LINE_CHARACTERS:
            skipped = number
            yield {}, f"line {number} of {of} has more than {LINE_CHARACTERS} characters"
        elif line.strip():
            try:
                yield _json_row(line), None
            except (ValueError, RecursionError) as error:
                found = f"{error.msg} at character {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                yield {}, f"line {number} of {of}: expected a JSON object: {found or unreadable(error)}"


def _json_row(line: str) -> dict[str, Any]:
    """A row. Raises a ValueError or RecursionError if the line is not a row, or could not be written again."""
    found = _foreign_byte(line)
    if found is not None:
        raise ValueError(f"byte 0x{found[0]:02x} at character {found[1]} is not UTF-8")
    row = json.loads(line, object_pairs_hook=_object)
    if not isinstance(row, dict):
        raise ValueError(f"found {_shown(row):.40}")
    if "\\u" in line:
        json.dumps(row, ensure_ascii=False).encode()  # raises for half of a surrogate pair, which is not text
    return row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the name {_twice(name for name, _ in pairs)!r:.60} comes twice")
    return found


_FORMATS: dict[str, type[_Columns]] = {".csv": _Csv, ".tsv": _Csv, ".jsonl": _JsonLines, ".parquet": _Parquet}
