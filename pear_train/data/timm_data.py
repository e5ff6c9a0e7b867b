"""Data sets that timm.data.create_dataset opens by name."""

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from timm.data.dataset import ImageDataset
from timm.data.dataset_factory import create_dataset
from torch.utils.data import IterableDataset

from pear_train.data.dataset import Split, numbered
from pear_train.data.labelled import Labelled
from pear_train.errors import DataError

_TEST_SPLITS = ("test", "validation", "val")


def open_timm(name: str, root: Path | None) -> Labelled:
    """Opens a named data set: its train split, and as test its test split or else its validation split.

    Args:
        root: folder of data sets, to which they are downloaded. None: below the user's cache directory.
    Raises:
        DataError: timm cannot open the data set.
    """
    root = root or user_cache_path("pear") / "datasets"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--data-root {root}: the folder cannot be made: {error.strerror}") from None
    train, names = _open(name, root, "train")
    test, notes = None, []
    for split in ("validation",) if name.lower().startswith("torch/") else _TEST_SPLITS:
        try:
            test, _ = _open(name, root, split)
            break
        except DataError as error:
            notes.append(str(error))
    classes = names or numbered(name, int(train.targets.max()) + 1 if len(train) else 0)
    without = tuple(notes) if test is None else ()
    splits = {"train": train} if test is None else {"train": train, "test": test}
    return Labelled(f"{name}: a data set that timm knows", classes, splits, notes=without)


def _open(name: str, root: Path, split: str) -> tuple[Split, tuple[str, ...]]:
    try:
        converts = not name.lower().startswith(("torch/", "tfds/"))
        given: dict[str, Any] = {"input_img_mode": ""} if converts else {}  # else timm converts to RGB by Pillow's rule
        with redirect_stdout(sys.stderr):  # readers print on stdout
            found: Any = create_dataset(name, root=str(root), split=split, download=True, is_training=False, **given)
        items: Sequence[Any] = list(found) if isinstance(found, IterableDataset) else found
        targets = torch.tensor(_targets(found, items), dtype=torch.long)
    except Exception as error:  # whatever torchvision, datasets, tensorflow_datasets or a download can raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{name}: timm could not open its {split} split in {root}: {reason}") from None
    return Split(lambda i: _picture(items, i), targets, _names(found, root)), _class_names(found)


def _names(found: Any, root: Path) -> tuple[str, ...]:
    """Paths of the images' files, if the reader has them."""
    for owner in (found, getattr(found, "reader", None)):
        samples = getattr(owner, "samples", None) or ()
        if samples and all(isinstance(sample[0], str) for sample in samples):
            return tuple(os.path.relpath(sample[0], root) for sample in samples)
    return ()


def _targets(found: Any, items: Sequence[Any]) -> list[int]:
    for owner in (found, getattr(found, "reader", None)):
        known = getattr(owner, "targets", None)
        if known is not None:
            return [int(label) for label in known]
    samples = getattr(getattr(found, "reader", None), "samples", None)
    if samples is not None:
        return [int(label) for _, label in samples]
    return [int(items[i][1]) for i in range(len(items))]


def _class_names(found: Any) -> tuple[str, ...]:
    for owner in (found, getattr(found, "reader", None)):
        index = getattr(owner, "class_to_idx", None)
        if index:
            return tuple(str(name) for name, _ in sorted(index.items(), key=lambda item: item[1]))
    return ()


def _picture(items: Sequence[Any], index: int) -> Any:
    """A PIL image, an array or a file's bytes, depending on the reader."""
    if isinstance(items, ImageDataset):  # its own indexing would replace an unreadable picture by the next one
        with items.reader[index][0] as file:
            return file.read()
    image = items[index][0]
    return image.permute(1, 2, 0).numpy() if isinstance(image, torch.Tensor) else image
