"""Image folders: one folder of images per class."""

import os
from pathlib import Path

import torch

from pear_train.data.dataset import LOOKED_FOR, Split, listed, raise_all
from pear_train.data.labelled import WHOLE, Labelled
from pear_train.data.layout import by_folder, choose_splits, lone_folder
from pear_train.data.listing import Listing, describe_skipped, list_pictures
from pear_train.data.options import DataOptions

_STRAY = "pictures outside of class folders"


def open_folder(path: Path, options: DataOptions, needs_train: bool = True) -> Labelled:
    """Opens an image folder: class folders, directly or below train/, val/ and test/. Sub-folders and links are read.

    `notes` says what was left out.

    Raises:
        DataError: folders are in doubt or cannot be read, classes have no pictures, or splits differ in classes.
    """
    described, listing = f"{path}: an image folder", list_pictures(path)
    while not options.of_folders and (inside := lone_folder(listing)) is not None:
        path, outside = path / inside, listing.skipped
        described, listing = f"{described}, in its only folder {inside}/", list_pictures(path)
        for reason, paths in outside.items():
            listing.skipped.setdefault(reason, []).extend(p for p in paths if not p.startswith(f"{inside}/"))
    for stray in by_folder(listing.pictures)[0]:
        listing.skip(_STRAY, stray)
    chosen = choose_splits(path, listing.pictures, options, needs_train)
    if not chosen:
        classes, whole = _read(path, "", listing)
        raise_all(listing.faults)
        return Labelled(described, classes, {WHOLE: whole}, notes=describe_skipped(listing.skipped))
    tops = {folder.split("/")[0] for folder in chosen.values()}
    for folder in listing.folders_in(""):
        if folder not in tops:
            listing.skip("folders that are not a split", f"{folder}/")
    read = {name: _read(path, chosen[name], listing) for name in ("train", "val", "test") if name in chosen}
    first = next(iter(read))
    classes = read[first][0]
    for name in ("val", "test"):
        odd = sorted(set(read[name][0]) ^ set(classes)) if name in read else []
        if odd:
            these = f"{path / chosen[name]}: {'class' if len(odd) == 1 else 'classes'} {listed(odd)}"
            both = f"{'is' if len(odd) == 1 else 'are'} not in both this and {path / chosen[first]}"
            listing.faults.append(f"{these} {both}: expected equal classes")
    raise_all(listing.faults)
    splits: dict[str, Split] = {name: split for name, (_, split) in read.items()}
    described += " with " + ", ".join(f"{chosen[name]}/" for name in splits)
    return Labelled(described, classes, splits, notes=describe_skipped(listing.skipped))


def _read(path: Path, split: str, listing: Listing) -> tuple[tuple[str, ...], Split]:
    """Class names and pictures of a split's folder ("" for the whole). Faults are added to `listing.faults`."""
    direct, below = by_folder(listing.below(split))
    if split and [*below] == [split] and not direct and by_folder(below[split])[1]:  # as in seg_train/seg_train/
        split = f"{split}/{split}"
        direct, below = by_folder(listing.below(split))
    start = f"{split}/" if split else ""
    for picture in direct if split else ():
        listing.skip(_STRAY, f"{start}{picture}")
    folders = listing.folders_in(split)
    if not folders:
        listing.faults.append(f"{path / split}: holds no folders: expected {LOOKED_FOR}")
    for folder in folders:
        if folder not in below:
            left_out = listing.skipped_below(f"{start}{folder}")
            why = f" ({'; '.join(left_out)})" if left_out else ""
            listing.faults.append(
                f"{path / split / folder}: class folder without images{why}: add some, or remove the folder"
            )
    classes = tuple(sorted(below))
    names = tuple(f"{start}{folder}/{rest}" for folder in classes for rest in below[folder])
    labels = [label for label, folder in enumerate(classes) for _ in below[folder]]
    files = [os.path.join(path, name) for name in names]
    return classes, Split(files.__getitem__, torch.tensor(labels, dtype=torch.long), names)
