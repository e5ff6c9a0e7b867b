"""The columns of a list's files: which there must be, of which types, and what rows ask by them."""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from router.errors import RouterError

CHUNK_ROWS, ROW_GROUP_ROWS = 1024, 65_536
TABLE_BYTES = 64 << 20
"""About the most bytes in memory of a list with large rows, such as one that holds its images."""
JSON_TEXT = {b"pear": b"json"}
"""Metadata of a column of JSON lines whose values have different types. Such a column is held as JSON texts."""
CHANGED = "it was changed while it was read: run the command again"
FAULT = pa.field("", pa.string())
"""One more column of a list while it is read: why a row cannot be served."""
Image = str | bytes


class ListError(RouterError):
    """A list cannot be read, or cannot be written in the wanted format."""

    def __init__(self, path: str | Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")


def check_there(path: str, names: Iterable[str], needed: Iterable[str]) -> None:
    """Raises a ListError if a column is missing."""
    names, needed = list(names), list(needed)
    for name in needed:
        if name not in names:
            expected = " and ".join(needed)
            raise ListError(path, f"column {name!r} is missing: expected {expected}, found {_shown_names(names)}")


def check_same(path: str, names: Collection[str], first: str, expected: Collection[str]) -> None:
    """Raises a ListError if a file has other columns than the first file."""
    lacks = [name for name in expected if name not in names]
    more = [name for name in names if name not in expected]
    told = [f"{verb} {_shown_names(found)}" for verb, found in (("lacks", lacks), ("has", more)) if found]
    if told:
        raise ListError(path, f"{' and '.join(told)}, unlike {first}: all lists of a run need the same columns")


def _shown_names(names: list[str]) -> str:
    shown = ", ".join(f"{name:.40}" if name.isprintable() else f"{name!r:.40}" for name in names[:20])
    return f"{shown} and {len(names) - 20} more" if len(names) > 20 else shown or "none"


def without_images(path: str, schema: pa.Schema, needed: Iterable[str]) -> pa.Schema:
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


def images_asked(
    column: pa.ChunkedArray, field: pa.Field
) -> tuple[list[Image | None], pa.ChunkedArray | None, list[str | None]]:
    """The images, their paths if the column holds encoded images (else None), and the rows' faults."""
    if not _holds_images(field.type):
        texts, faults = texts_asked(column, field)
        return list(texts), None, faults
    values = column.to_pylist()
    if is_binary(field.type):
        return values, pa.chunked_array([pa.nulls(len(values), pa.string())]), [None] * len(values)
    structs = [value or {} for value in values]
    paths = pa.chunked_array([pa.array([struct.get("path") for struct in structs], pa.string())])
    return [struct.get("bytes") or struct.get("path") for struct in structs], paths, [None] * len(values)


def texts_asked(column: pa.ChunkedArray, field: pa.Field) -> tuple[list[str | None], list[str | None]]:
    """A column as text, and the rows' faults."""
    if not is_json_text(field):
        texts = column.cast(pa.string()).to_pylist()
        return texts, [None] * len(texts)
    texts, faults = [], []
    for value in map(from_json_text, column.to_pylist()):
        good = value is None or isinstance(value, str | int)
        texts.append(None if value is None or not good else str(value))
        faults.append(None if good else f"{field.name} is {shown(value)}: expected text")
    return texts, faults


def shown(value: object) -> str:
    return "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else repr(value)


def is_json_text(field: pa.Field) -> bool:
    return bool(field.metadata) and JSON_TEXT.items() <= field.metadata.items()


def from_json_text(text: str | None) -> Any:
    return None if text is None else json.loads(text)


class Columns(ABC):
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


def repeated(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)
