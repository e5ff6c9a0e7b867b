"""Image folders: one folder of images per class."""

from pathlib import Path

import torch
from PIL import Image

from pear_train.data.dataset import LOOKED_FOR, Dataset, Split, hold_out
from pear_train.errors import DataError

_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


def open_folder(path: Path) -> Dataset:
    """Classes as folders, below train/, val/ and test/ or directly; what is missing is held out of train.

    A missing val is a tenth of train; without any split folders, a tenth goes to test, too.
    """
    found = {split: next((path / n for n in names if (path / n).is_dir()), None) for split, names in _SPLITS.items()}
    if found["train"] is None:
        if any(found.values()):
            there = ", ".join(f"{folder.name}/" for folder in found.values() if folder)
            raise DataError(f"{path}: has {there} but no train/: expected train/, or classes without split folders")
        classes, whole = _read(path)
        rest, test = hold_out(whole.targets, 0.1)
        train, val = hold_out(whole.targets[rest], 0.1)
        described = f"{path}: an image folder (a tenth of each class held out for val, a tenth for test)"
        return Dataset(described, classes, whole.subset(rest[train]), whole.subset(rest[val]), whole.subset(test))
    classes, train_split = _read(found["train"])
    others = {}
    for name in ("val", "test"):
        folder = found[name]
        if folder is not None:
            other, others[name] = _read(folder)
            if other != classes:
                odd = sorted(set(other) ^ set(classes))[0]
                raise DataError(
                    f"{folder}: class {odd!r} is not in both this and {found['train']}: expected equal classes"
                )
    described = f"{path}: an image folder with " + ", ".join(f"{f.name}/" for f in found.values() if f)
    if "val" not in others:
        rest, held = hold_out(train_split.targets, 0.1)
        others["val"], train_split = train_split.subset(held), train_split.subset(rest)
        described += " (a tenth of train held out for val)"
    return Dataset(described, classes, train_split, others["val"], others.get("test"))


def _read(path: Path) -> tuple[tuple[str, ...], Split]:
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    if not folders:
        raise DataError(f"{path}: holds no folders; looked for {LOOKED_FOR}")
    extensions = {ext for ext, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        images = sorted(str(file) for file in folder.rglob("*") if file.suffix.lower() in extensions)
        if not images:
            raise DataError(f"{folder}: class folder without images: add some, or remove the folder")
        files += images
        labels += [label] * len(images)
    names = tuple(Path(file).relative_to(path).as_posix() for file in files)
    return tuple(folder.name for folder in folders), Split(files.__getitem__, torch.tensor(labels), names)
