"""Folders of Hugging Face's `datasets` on disk: as `save_to_disk` writes them, or Parquet files as the Hub has them.

Read with pyarrow alone. Arrow files are mapped, so pictures stay on disk; Parquet files are held in memory.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import torch

from pear_store import PearStoreError
from pear_store.files import read_text
from pear_train.data.dataset import Split, listed, numbered, raise_all
from pear_train.data.labelled import WHOLE, Labelled
from pear_train.data.layout import split_of
from pear_train.data.rows import in_order, in_train_too
from pear_train.errors import DataError
from router.pictures import ImageLike

if TYPE_CHECKING:
    import pyarrow as pa

_SHARD = re.compile(r"(?P<split>[A-Za-z]\w*)(?:-\d+-of-\d+)?\.parquet", re.ASCII)


def is_saved(path: Path) -> bool:
    """Whether a folder is what `save_to_disk` of `datasets` wrote."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )


def parquet_files(path: Path) -> dict[str, list[Path]]:
    """The Parquet files of each split of a data set as the Hub has it: ``data/train-00000-of-00002.parquet``."""
    found: dict[str, list[Path]] = {}
    for folder in (path, path / "data"):
        for file in sorted(folder.glob("*.parquet")):
            named = _SHARD.fullmatch(file.name)
            found.setdefault((named and split_of(named["split"])) or file.name, []).append(file)
    return found


def open_saved(path: Path, needs_train: bool = True) -> Labelled:
    """What `save_to_disk` wrote: a data set with its splits in folders, or one split alone.

    Raises:
        DataError: files are missing or damaged, or there are no columns of pictures and labels.
    """
    described = f"{path}: a folder of Hugging Face datasets"
    if not (path / "dataset_dict.json").is_file():
        return _labelled(described, {WHOLE: _arrow(path)}, needs_train)
    names = _json(path / "dataset_dict.json").get("splits")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path / 'dataset_dict.json'}: expected a list of splits")
    return _labelled(described, {name: _arrow(path / _plain(path, name)) for name in names}, needs_train)


def open_parquet_files(path: Path, needs_train: bool = True) -> Labelled:
    """A data set as the Hub has it. Raises as :func:`open_saved`."""
    import_arrow(path)
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = {}
    for split, files in parquet_files(path).items():
        try:
            tables[split] = pa.concat_tables([pq.read_table(file) for file in files])
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{files[0]}: cannot be read as Parquet: {_line(error)}") from None
    return _labelled(f"{path}: a folder of Parquet files", tables, needs_train)


def class_names(path: Path) -> tuple[str, ...] | None:
    """The names of the classes, if the column label of a Parquet file is of numbers that `datasets` gave names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return _names(_features(pq.read_schema(path)), "label")
    except (OSError, pa.ArrowException):  # whoever reads the rows says so
        return None


def import_arrow(path: Path) -> None:
    """Raises a DataError that says what to install, where pyarrow is missing."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ModuleNotFoundError as error:
        raise needs_pyarrow(path, error) from None


def needs_pyarrow(path: Path, error: ModuleNotFoundError) -> DataError:
    """What to say where pyarrow is missing; any other missing module is a fault of ours."""
    if str(error.name).partition(".")[0] != "pyarrow":
        raise error
    return DataError(f"{path}: reading it needs pyarrow: pip install 'pear-adapters[infer]'")


# ---- tables -------------------------------------------------------------------------------------


def _arrow(folder: Path) -> "pa.Table":
    """The rows that one split's folder holds."""
    import_arrow(folder)
    import pyarrow as pa

    files = _json(folder / "state.json").get("_data_files")
    if not isinstance(files, list) or not files:
        raise DataError(f"{folder / 'state.json'}: expected a list of data files")
    tables = []
    for file in files:
        named = folder / _plain(folder, file.get("filename") if isinstance(file, dict) else None)
        try:
            tables.append(pa.ipc.open_stream(pa.memory_map(str(named))).read_all())
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{named}: cannot be read as Arrow: {_line(error)}") from None
    table = pa.concat_tables(tables)
    features = _json(folder / "dataset_info.json").get("features")
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


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
        role = WHOLE if split == WHOLE or len(tables) == 1 else split_of(split)
        if role is None or role in chosen:
            raise DataError(f"{described}: splits {listed(list(tables))}: expected one each of train, val and test")
        if missing := [name for name in (image, label) if name not in table.column_names]:
            raise DataError(f"{described}: split {split} has no column {missing[0]!r}")
        values = table.column(label).to_pylist()
        if names is not None and len(values) and all(value == -1 for value in values):
            notes.append(f"split {split}: its pictures have no labels")
            continue
        chosen[role], texts[role] = table, _texts(values, names)
    if needs_train and not {"train", WHOLE} & chosen.keys():
        raise DataError(f"{described}: has {listed(list(tables))}: expected a split train")
    faults = [
        f"{described}: {role}, row {row}: no label that has a name"
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
    return Labelled(described, tuple(classes), splits, notes=(*notes, *in_train_too(splits)))


class _Pictures:
    """The pictures of a table by number: bytes, or a path."""

    def __init__(self, table: "pa.Table", column: str) -> None:
        self._column = table.column(column)

    def __call__(self, row: int) -> ImageLike:
        found = self._column[row].as_py()
        if isinstance(found, dict):
            found = found.get("bytes") or found.get("path")
        if not isinstance(found, str | bytes):
            raise DataError(f"row {row}: there is no picture")
        return found


def _picture_names(table: "pa.Table", column: str) -> tuple[str, ...]:
    """Their files' names where all have one and no two are alike; else none, so that numbers name them."""
    kind = table.schema.field(column).type
    names: Sequence[str | None] = ()
    if "path" in [kind.field(i).name for i in range(kind.num_fields)]:
        names = [name for chunk in table.column(column).chunks for name in chunk.field("path").to_pylist()]
    plain = tuple(PurePath(name).name for name in names if name)  # where the data lies is no part of a name
    return plain if len(set(plain)) == len(names) else ()


def _features(schema: "pa.Schema") -> dict[str, dict[str, Any]]:
    """What `datasets` says of the columns; nothing where it says nothing."""
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
    """The column of that kind: the one of the usual name, or the only one."""
    there: list[str] = table.column_names
    if usual in there:
        return usual
    if len(typed) == 1 and typed[0] in there:
        return typed[0]
    raise DataError(f"{described}: no column {usual!r}: has {listed(there)}; rename the one that is meant")


def _texts(values: list[Any], names: Sequence[str] | None) -> list[str | None]:
    if names is None and values and all(type(value) is int for value in values):
        names = numbered(max(0, *values) + 1)
    if names is None:
        return [None if value is None else str(value) for value in values]
    return [names[value] if type(value) is int and 0 <= value < len(names) else None for value in values]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(path))
    except (PearStoreError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {_line(error)}") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected a JSON object")
    return found


def _plain(folder: Path, name: object) -> str:
    """A name within a folder; nothing outside of it is opened."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w][\w.-]*", name):
        raise DataError(f"{folder}: {str(name)[:80]!r}: expected the name of a file or folder in it")
    return name


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
