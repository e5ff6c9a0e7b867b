"""Reads lists of images in CSV, JSON lines or Parquet. A list is never whole in memory.

A list is one file, or several files of one format that are read one after another. A line of CSV or JSON lines that
cannot be read becomes a row without values, with a fault that names the line.
"""

import csv
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from pear_store import PearStoreError
from pear_store.files import ending
from pear_store.local.sources import Access, is_url, open_copy, path_in_url, url_folder
from router.errors import RouterError
from router.infer.formats.columns import CHANGED, Columns, Image, ListError, images_asked, texts_asked, without_images
from router.infer.formats.csv import Csv
from router.infer.formats.json_lines import JsonLines
from router.infer.formats.parquet import Parquet

FORMATS = (".csv", ".jsonl", ".parquet")
CSV = (".csv", ".tsv")
FILE = pa.field("", pa.int32())
"""One more column of a list while it is read: the number of a row's file."""
_READ_BY: dict[str, type[Columns]] = {**dict.fromkeys(CSV, Csv), ".jsonl": JsonLines, ".parquet": Parquet}


class OutputError(RouterError):
    """An output is not written, or not replaced."""


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
        columns: Columns | None = None
        for name in (str(path),) if files is None else files:
            with _reading(name), open_copy(name, access) as file:
                signature = _signature(name, file)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                file.seek(0)
                columns = columns or _READ_BY[list_ending(name)](name, list(needed), encoding)
                columns.read(name, file)
                source = columns.schema()
                schema = without_images(name, source, needed)
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
        texts, _ = texts_asked(table.column(column), self.schema.field(column))
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
            yield from _READ_BY[list_ending(listed.path)].tables(file, of, self.encoding, self.source, self.most_rows)
        if listed.signature:
            with open_copy(listed.path) as file:
                _check_unchanged(listed, file)

    def _rows(self, table: pa.Table) -> Rows:
        faults, files = (column.to_pylist() for column in table.columns[-2:])
        columns = dict(zip(self.source.names, table.columns[:-2], strict=True))
        images, paths, found = images_asked(columns["image"], self.source.field("image"))
        faults = [fault or more for fault, more in zip(faults, found, strict=True)]
        if paths is not None:
            columns["image"] = paths
        tasks: list[str | None] = [None] * len(images)
        if "task" in self.source.names:
            tasks, found = texts_asked(columns["task"], self.source.field("task"))
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
