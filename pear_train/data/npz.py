"""NumPy archives: x_train, y_train, x_val, y_val, x_test, y_test, classes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pear_store import PearStoreError
from pear_store.files import open_regular_file
from pear_train.data.dataset import Split, numbered
from pear_train.data.labelled import Labelled
from pear_train.errors import DataError


def open_npz(path: Path, needs_train: bool = True) -> Labelled:
    """Opens a NumPy archive: images x_…, labels y_…, and optionally `classes`, the names of the classes.

    Images are uint8 or uint16 [n, h, w] or [n, h, w, 1, 3 or 4]; labels are integers [n].

    Raises:
        DataError: the file is not such an archive, or an array is missing or has another type or shape.
    """
    try:
        with open_regular_file(path) as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except PearStoreError as error:
        raise DataError(str(error)) from None
    except Exception as error:  # whatever a damaged archive makes zipfile, zlib and NumPy raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: not a NumPy archive: {reason:.300}") from None
    if bare := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise DataError(f"{path}: {bare[0]!r} is not an array: expected an archive that numpy.savez wrote")
    splits = {}
    for name in ("train", "val", "test"):
        if f"x_{name}" in arrays or f"y_{name}" in arrays:
            splits[name] = _split(path, name, arrays)
    if not splits or (needs_train and "train" not in splits):
        raise DataError(f"{path}: has {', '.join(sorted(arrays)) or 'no arrays'}: expected x_train and y_train")
    if "classes" in arrays:
        classes = tuple(_class_names(path, arrays["classes"]))
    else:
        first = next(iter(splits.values()))
        classes = numbered(str(path), int(first.targets.max()) + 1 if len(first) else 0)
    return Labelled(f"{path}: a NumPy archive", classes, splits)


def _class_names(path: Path, names: np.ndarray[Any, Any]) -> Iterator[str]:
    if names.ndim != 1:
        raise DataError(f"{path}: classes is {names.dtype} {list(names.shape)}: expected a list of names")
    for name in names.tolist():
        yield name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else str(name)


def _split(path: Path, name: str, arrays: dict[str, Any]) -> Split:
    try:
        x, y = arrays[f"x_{name}"], arrays[f"y_{name}"]
    except KeyError as error:
        raise DataError(f"{path}: {error.args[0]} is missing: expected x_{name} and y_{name}") from None
    if x.dtype not in (np.uint8, np.uint16) or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in (1, 3, 4)):
        expected = "expected uint8 or uint16 [n, h, w] or [n, h, w, 1, 3 or 4]"
        raise DataError(f"{path}: x_{name} is {x.dtype} {list(x.shape)}: {expected}")
    if not np.issubdtype(y.dtype, np.integer) or y.shape != x.shape[:1]:
        raise DataError(f"{path}: y_{name} is {y.dtype} {list(y.shape)}: expected integers [{x.shape[0]}]")
    return Split(lambda i: x[i], torch.from_numpy(y.astype(np.int64)))
