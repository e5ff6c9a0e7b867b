"""Lists of pictures: CSV, JSON lines or Parquet, with the columns image and label, and optionally split."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pear_store.files import ending
from pear_store.local.sources import Access
from pear_train.data.labelled import Labelled
from pear_train.data.layout import split_of
from pear_train.data.rows import Row, Rows
from pear_train.data.tables import class_names, needs_pyarrow
from pear_train.errors import DataError
from router import RouterError

if TYPE_CHECKING:
    from router.infer.lists import ImageList

LISTS = (".csv", ".tsv", ".jsonl", ".parquet")
_ROWS = 4096


def open_list(path: Path, needs_train: bool = True) -> Labelled:
    """Opens a list; its ending says which format it has.

    Paths are relative to the list's folder. Pictures whose bytes are in the list stay in memory.

    Raises:
        DataError: the list cannot be read to its end, lacks a column, or has rows without an image, label or split.
    """
    try:
        from router.infer.lists import ImageList
        from router.infer.plan import find_image
    except ModuleNotFoundError as error:
        raise needs_pyarrow(path, error) from None
    try:
        found = ImageList.scan(path, ["image", "label"])
        known = class_names(path) if ending(path) == ".parquet" else None
        rows = _read(found, partial(find_image, Access()), known)
    except RouterError as error:
        raise DataError(str(error)) from None
    return rows.labelled(f"{path}: an image list", known, needs_train)


def _read(found: "ImageList", place: Callable[[str, str | bytes], str | bytes], known: Sequence[str] | None) -> Rows:
    of_number = None if known is None else {str(number): name for number, name in enumerate(known)}
    rows = Rows(with_splits="split" in found.schema.names)
    number = 0
    for part in found.parts(_ROWS):
        labels, names = found.texts(part.table, "label"), found.texts(part.table, "image")
        splits = found.texts(part.table, "split") if rows.with_splits else [None] * len(labels)
        each = zip(part.images, part.folders, names, labels, splits, part.faults, strict=True)
        for image, folder, name, label, split, fault in each:
            number, label = number + 1, (label or "").strip()
            if fault is not None:
                rows.faults.append(fault)
            elif not image or not label:
                rows.faults.append(f"row {number} has no {'label' if image else 'image'}")
            elif of_number is not None and label not in of_number:
                rows.faults.append(
                    f"row {number}: label {label[:40]!r}: expected the number of one of {len(of_number)} classes"
                )
            elif rows.with_splits and split_of(split or "") is None:
                rows.faults.append(f"row {number}: split {(split or '')[:40]!r}: expected train, val or test")
            else:
                label = label if of_number is None else of_number[label]
                rows.add(Row(number, place(folder, image), name or str(number), label, split))
    return rows
