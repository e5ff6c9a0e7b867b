"""The VTAB-1k layout: lists of images and labels beside the images."""

import os
from pathlib import Path

import torch

from pear_store.files import read_text
from pear_train.data.dataset import Split, numbered
from pear_train.data.labelled import Labelled
from pear_train.data.rows import in_two_splits
from pear_train.errors import DataError

_LISTS = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}


def is_vtab(path: Path) -> bool:
    return os.path.isfile(path / _LISTS["train"])


def open_vtab(path: Path, whole: bool = False) -> Labelled:
    """Opens a VTAB-1k folder. Its lists have lines ``images/train800/000000.jpg 17``; names of classes are numbers.

    Args:
        whole: train on all 1,000 images, as the benchmark's published figures do. Then val is part of train, and its
            figures mean nothing.
    Raises:
        DataError: a list is missing, or has a line of another form.
    """
    lists = {**_LISTS, "train": "train800val200.txt"} if whole else _LISTS
    splits = {name: _read(path, file) for name, file in lists.items()}
    count = max((int(split.targets.max()) for split in splits.values() if len(split)), default=0) + 1
    classes = numbered(str(path), count)
    described = f"{path}: a VTAB-1k folder" + (" (train and val together are train)" if whole else "")
    cautions = () if whole else in_two_splits(splits, {name: split.names for name, split in splits.items()})
    return Labelled(described, classes, splits, all_in_train=False, cautions=cautions)


def _read(path: Path, name: str) -> Split:
    file = path / name
    if not os.path.isfile(file):
        raise DataError(f"{file}: no such file: a VTAB-1k folder needs {', '.join(_LISTS.values())}")
    images, labels, names = [], [], []
    label_of: dict[str, str] = {}
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        image, _, label = line.strip().rpartition(" ")
        if not image or not label.isdecimal() or len(label) > 9:
            raise DataError(f"{file}, line {number}: {line[:80]!r}: expected an image path, a space, a class number")
        if label_of.setdefault(image, label) != label:
            raise DataError(
                f"{file}, line {number}: {image!r} has class {label}, but class {label_of[image]} in a line above: "
                "expected one class for an image"
            )
        images.append(str(path / image))
        names.append(image)
        labels.append(int(label))
    return Split(images.__getitem__, torch.tensor(labels, dtype=torch.long), tuple(names))
