"""Folders of Hugging Face's `datasets` on disk: as `save_to_disk` writes them, or Parquet files as the Hub has them.

Only pyarrow is needed to read them. Arrow files are memory-mapped, so pictures stay on disk. Parquet files are read
into memory.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal

import torch

from pear_store import PearStoreError
from pear_store.errors import unreadable
from pear_store.files import open_regular_file, read_text
from pear_train.data.dataset import Split, listed, numbered, raise_all
from pear_train.data.fingerprint import picture_digest
from pear_train.data.labelled import WHOLE, Labelled
from pear_train.data.layout import split_of
from pear_train.data.rows import in_order, in_two_splits
from pear_train.errors import DataError
from router.pictures import ImageLike

if TYPE_CHECKING:
    import pyarrow as pa

_TAIL_BYTES = 64
"""Last bytes of a picture's file. Pictures of equal size mostly differ in them, so the rest need not be read."""
_SHARD = re.compile(r"(?P<split>[A-Za-z]\w*)(?:-\d+-of-\d+)?\.parquet", re.ASCII)


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote this folder."""
    there = {name for name in ("dataset_dict", "state", "dataset_info") if os.path.isfile(path / f"{name}.json")}
    return "dataset_dict" in there or {"state", "dataset_info"} <= there


def parquet_files(path: Path) -> dict[str, list[Path]]:
    """The Parquet files of each split, named as on the Hub: ``data/train-00000-of-00002.parquet``."""
    found: dict[str, list[Path]] = {}
    for folder in (path, path / "data"):
        for file in sorted(path for path in folder.glob("*.parquet") if os.path.isfile(path)):
            named = _SHARD.fullmatch(file.name)
            found.setdefault((named and split_of(named["split"])) or file.name, []).append(file)
    return found


def open_saved(path: Path, needs_train: bool = True) -> Labelled:
    """Opens a folder that `save_to_disk` wrote: a data set with a folder for each split, or one split.

    Raises:
        DataError: files are missing or damaged, or there is no column of pictures or of labels.
    """
    described = f"{path}: a folder of Hugging Face datasets"
    if not os.path.isfile(path / "dataset_dict.json"):
        return _labelled(described, {WHOLE: _arrow(path)}, needs_train)
    names = _json(path / "dataset_dict.json").get("splits")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path / 'dataset_dict.json'}: expected a list of splits")
    return _labelled(described, {name: _arrow(path / _plain(path, name)) for name in names}, needs_train)


def open_parquet_files(path: Path, needs_train: bool = True) -> Labelled:
    """Opens a folder of Parquet files, as on the Hub. Raises as :func:`open_saved`."""
    import_arrow(path)
    import pyarrow.parquet as pq

    tables = {}
    for split, files in parquet_files(path).items():
        shards = {}
        for path_of_shard in files:
            with _reading(path_of_shard, "Parquet"), open_regular_file(path_of_shard) as file:
                shards[path_of_shard] = pq.read_table(file)
        tables[split] = _joined(shards, "Parquet")
    return _labelled(f"{path}: a folder of Parquet files", tables, needs_train)


def class_names(path: Path) -> tuple[str, ...] | None:
    """The names of the classes, if the column label of a Parquet file holds numbers that `datasets` gave names to."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return _names(_features(pq.read_schema(path)), "label")
    except (OSError, ValueError, pa.ArrowException):  # the reader of the rows will report it
        return None


def import_arrow(path: Path) -> None:
    """Raises a DataError that says what to install, if pyarrow is missing."""
    try:
        import pyarrow.parquet  # noqa: F401  (whether it is installed)
    except ModuleNotFoundError as error:
        raise needs_pyarrow(path, error) from None


def needs_pyarrow(path: Path, error: ModuleNotFoundError) -> DataError:
    """The error to raise if pyarrow is missing. Raises `error` itself if another module is missing."""
    if str(error.name).partition(".")[0] != "pyarrow":
        raise error
    return DataError(f"{path}: reading it needs pyarrow: pip install 'pear-adapters[infer]'")


# ---- tables -------------------------------------------------------------------------------------


def _arrow(folder: Path) -> "pa.Table":
    """The rows of one split's folder."""
    import_arrow(folder)
    import pyarrow as pa

    files = _json(folder / "state.json").get("_data_files")
    if not isinstance(files, list) or not files:
        raise DataError(f"{folder / 'state.json'}: expected a list of data files")
    shards = {}
    for file in files:
        named = folder / _plain(folder, file.get("filename") if isinstance(file, dict) else None)
        with _reading(named, "Arrow"):
            open_regular_file(named).close()  # refuses a pipe, which would block
            shards[named] = pa.ipc.open_stream(pa.memory_map(str(named))).read_all()
    table = _joined(shards, "Arrow")
    features = _json(folder / "dataset_info.json").get("features")
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _joined(shards: Mapping[Path, "pa.Table"], kind: Literal["Arrow", "Parquet"]) -> "pa.Table":
    """Several files' rows as one table. Each file is validated first, because a damaged offset could lead anywhere."""
    import pyarrow as pa

    (first, table), *others = shards.items()
    for file, rows in shards.items():
        with _reading(file, kind):
            rows.validate(full=True)
            rows.schema.names  # noqa: B018 (raises where a name is not UTF-8)
    for file, rows in others:
        if not rows.schema.equals(table.schema):
            raise DataError(f"{file}: expected the columns of {first.name}: {_columns(table)}; found {_columns(rows)}")
    return pa.concat_tables(shards.values())


@contextmanager
def _reading(file: Path, kind: Literal["Arrow", "Parquet"]) -> Iterator[None]:
    """Turns every error that pyarrow raises for a damaged file into a DataError."""
    import pyarrow as pa

    try:
        yield
    except PearStoreError as error:
        raise DataError(str(error)) from None
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        raise DataError(f"{file}: cannot be read as {kind}: {unreadable(error):.300}") from None


def _columns(table: "pa.Table") -> str:
    return ", ".join(f"{field.name} {field.type}" for field in table.schema)


def _labelled(described: str, tables: Mapping[str, "pa.Table"], needs_train: bool) -> Labelled:
    first = next(iter(tables.values()))
    features = _features(first.schema)
    image = _column(
        described, first, [name for name, told in features.items() if told.get("_type") == "Image"], "image"
    )
    label = _column(described, first, [n for n, told in features.items() if told.get("_type") == "ClassLabel"], "label")
    names = _names(features, label)
    texts: dict[str, list[str | None]] = {}
    notes: list[str] = []
    chosen: dict[str, pa.Table] = {}
    for split, table in tables.items():
        role = split_of(split)
        if split == WHOLE or (len(tables) == 1 and role in (None, "train")):
            role = WHOLE
        if role is None or role in chosen:
            raise DataError(f"{described}: splits {listed(list(tables))}: expected one each of train, val and test")
        if missing := [name for name in (image, label) if name not in table.column_names]:
            raise DataError(f"{described}: split {split} has no column {missing[0]!r}")
        values = table.column(_of_labels(described, table, label)).to_pylist()
        if names is not None and len(values) and all(value == -1 for value in values):
            notes.append(f"split {split}: its pictures have no labels")
            continue
        chosen[role], texts[role] = table, _texts(described, values, names)
    if needs_train and not {"train", WHOLE} & chosen.keys():
        raise DataError(f"{described}: has {listed(list(tables))}: expected a split train")
    faults = [
        f"{described}: {role}, row {row}: expected a label that names a class"
        for role, found in texts.items()
        for row, text in enumerate(found)
        if text is None
    ]
    raise_all(faults)
    classes = names or in_order([text for found in texts.values() for text in found if text is not None])
    numbers = {name: i for i, name in enumerate(classes)}
    splits = {}
    for role in ("train", "val", "test", WHOLE):
        if role in chosen:
            targets = torch.tensor([numbers[text] for text in texts[role] if text is not None], dtype=torch.long)
            splits[role] = Split(_Pictures(chosen[role], image), targets, _picture_names(chosen[role], image))
    cautions = in_two_splits(splits, _contents(chosen, image))
    return Labelled(described, tuple(classes), splits, notes=tuple(notes), cautions=cautions)


class _Pictures:
    """The pictures of a table by number: bytes, or a path."""

    def __init__(self, table: "pa.Table", column: str) -> None:
        self._column = table.column(column)

    def __call__(self, row: int) -> ImageLike:
        found = self._column[row].as_py()
        if isinstance(found, dict):
            found = found.get("bytes") or found.get("path")
        if not isinstance(found, str | bytes):
            raise DataError(f"row {row}: expected a picture, found none")
        return found


def _contents(tables: Mapping[str, "pa.Table"], column: str) -> dict[str, list[Hashable]]:
    """Split -> a key for each row. Rows have equal keys only if they have the same picture.

    Without the picture's bytes, the key is its path. Bytes are only read and hashed if a picture of another split has
    the same size and the same last bytes.
    """
    ends = {split: _ends(table.column(column)) for split, table in tables.items()}
    splits_of = Counter(end for of_split in ends.values() for end in set(of_split))

    def content(split: str, row: int, end: Hashable, pictures: _Pictures) -> Hashable:
        if end is None or splits_of[end] == 1:
            return split, row
        return picture_digest(pictures(row)) if isinstance(end, tuple) else end

    return {
        split: [content(split, row, end, pictures) for row, end in enumerate(ends[split])]
        for split, pictures in ((split, _Pictures(table, column)) for split, table in tables.items())
    }


def _ends(column: "pa.ChunkedArray") -> list[Hashable]:
    """Each picture's size and last bytes, else its path, else None."""
    import pyarrow as pa
    import pyarrow.compute as pc

    types = pa.types

    def part(name: Literal["bytes", "path"], kind: pa.DataType) -> pa.ChunkedArray:
        of_kind = {"path": (types.is_string, types.is_large_string), "bytes": (types.is_binary, types.is_large_binary)}
        if types.is_struct(column.type) and name in [field.name for field in column.type]:
            return pc.struct_field(column, name).cast(kind)
        if any(is_kind(column.type) for is_kind in of_kind[name]):
            return column.cast(kind)
        return pa.chunked_array([pa.nulls(len(column), kind)])

    data = part("bytes", pa.large_binary())
    sizes, tails = pc.binary_length(data).to_pylist(), pc.binary_slice(data, -_TAIL_BYTES).to_pylist()
    paths = part("path", pa.large_string()).to_pylist()
    return [(size, tail) if size else path for size, tail, path in zip(sizes, tails, paths, strict=True)]


def _picture_names(table: "pa.Table", column: str) -> tuple[str, ...]:
    """The names of the pictures' files, if all have one and all are different. Else empty: numbers name them."""
    kind = table.schema.field(column).type
    names: Sequence[str | None] = ()
    if "path" in [kind.field(i).name for i in range(kind.num_fields)]:
        names = [name for chunk in table.column(column).chunks for name in chunk.field("path").to_pylist()]
    plain = tuple(PurePath(name).name for name in names if name)  # without the data's own path
    return plain if len(set(plain)) == len(names) else ()


def _features(schema: "pa.Schema") -> dict[str, dict[str, Any]]:
    """The description of the columns by `datasets`. Empty if there is none."""
    try:
        told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {str(name): what for name, what in told.items() if isinstance(what, dict)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _names(features: Mapping[str, Mapping[str, Any]], column: str) -> tuple[str, ...] | None:
    told = features.get(column, {})
    names = told.get("names") if told.get("_type") == "ClassLabel" else None
    return tuple(map(str, names)) if isinstance(names, list) else None


def _column(described: str, table: "pa.Table", typed: list[str], usual: str) -> str:
    """The column of pictures or of labels: the one of the usual name, else the only one of its type."""
    there: list[str] = table.column_names
    if usual in there:
        return usual
    if len(typed) == 1 and typed[0] in there:
        return typed[0]
    raise DataError(f"{described}: expected a column {usual!r}, found {listed(there)}: rename the right one")


def _of_labels(described: str, table: "pa.Table", column: str) -> str:
    """The column's name. Raises a DataError if its values cannot be labels."""
    import pyarrow as pa

    kind, types = table.schema.field(column).type, pa.types
    if types.is_nested(kind) or types.is_binary(kind) or types.is_large_binary(kind):
        raise DataError(f"{described}: column {column!r} holds {kind!s:.200}: expected one number or text for each row")
    return column


def _texts(described: str, values: list[Any], names: Sequence[str] | None) -> list[str | None]:
    if names is None and values and all(type(value) is int for value in values):
        names = numbered(described, max(0, max(values)) + 1)
    if names is None:
        return [None if value is None or value != value else str(value).strip() or None for value in values]  # no NaN
    return [names[value] if type(value) is int and 0 <= value < len(names) else None for value in values]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(path))
    except PearStoreError as error:  # the message already names the file
        raise DataError(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {unreadable(error)}") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected a JSON object")
    return found


def _plain(folder: Path, name: object) -> str:
    """The name, checked to be a plain one, so that nothing outside of the folder is opened."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w][\w.-]*", name):
        raise DataError(f"{folder}: {str(name)[:80]!r}: expected the name of a file or folder in it")
    return name
