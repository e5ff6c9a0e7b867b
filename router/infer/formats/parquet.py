"""Lists in Parquet."""

from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from router.infer.formats.columns import (
    CHANGED,
    CHUNK_ROWS,
    FAULT,
    TABLE_BYTES,
    Columns,
    ListError,
    check_same,
    check_there,
    repeated,
)


class Parquet(Columns):
    """The columns of Parquet files. Each file has the same names, and types that fit together."""

    def __init__(self, first: str, needed: list[str], encoding: str) -> None:
        super().__init__(first, needed, encoding)
        self._fields: dict[str, pa.Field] = {}

    def read(self, name: str, file: BinaryIO) -> None:
        with _parquet(file) as parquet:
            schema, metadata = parquet.schema_arrow.remove_metadata(), parquet.metadata
        twice = repeated(schema.names)
        if twice is not None:
            raise ValueError(f"two columns are named {twice!r}: rename one")
        check_there(name, schema.names, self._needed)
        if self._fields:
            check_same(name, schema.names, self._first, self._fields)
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


def _held_as(name: str, kind: pa.DataType) -> pa.DataType:
    """The type in memory. Views become plain types, because rows of views cannot be taken; extensions their storage."""
    if isinstance(kind, pa.BaseExtensionType):
        return _held_as(name, kind.storage_type)
    if pa.types.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        twice = repeated(field.name for field in fields)
        if twice is not None:
            raise ValueError(f"column {name!r} has two fields named {twice!r}: rename one")
        return pa.struct([field.with_type(_held_as(name, field.type)) for field in fields])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_held_as(name, kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_held_as(name, kind.value_type)))
    return {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}.get(kind, kind)
