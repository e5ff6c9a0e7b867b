"""Opens the data that --data names, and recognises its kind."""

import os
from dataclasses import replace
from pathlib import Path

from pear_store.files import ending
from pear_train.data.dataset import LOOKED_FOR, Dataset
from pear_train.data.folder import open_folder
from pear_train.data.image_list import LISTS, open_list
from pear_train.data.labelled import Labelled
from pear_train.data.listing import describe_skipped, list_pictures
from pear_train.data.npz import open_npz
from pear_train.data.options import DataOptions
from pear_train.data.tables import is_saved, open_parquet_files, open_saved, parquet_files
from pear_train.data.timm_data import open_timm
from pear_train.data.vtab import is_vtab, open_vtab
from pear_train.errors import DataError
from router import Limits


def open_dataset(data: str, root: Path | None = None, options: DataOptions | None = None) -> Dataset:
    """Opens an image folder, an image list, or another kind of data set that docs/training.md names.

    Args:
        data: a path, or a name ``torch/…``, ``hfds/…``, ``hfids/…``, ``tfds/…`` or ``wds/…``.
        root: folder of named data sets. They are downloaded to it. None: below the user's cache directory.
        options: which folders are splits, whether to leave out unreadable pictures, and how large pictures may be.
            None: folders are recognised by their names.
    Returns:
        The data set. A missing val split is a tenth of train; without any splits, a tenth is test, too.
    Raises:
        DataError: the data does not exist, is of no known kind, or cannot be used for training.
    """
    options = options or DataOptions()
    found = open_labelled(data, root, options).dataset()
    return replace(found, skip_unreadable=options.skip_unreadable, limits=Limits(options.max_pixels))


def open_labelled(
    data: str, root: Path | None = None, options: DataOptions | None = None, needs_train: bool = True
) -> Labelled:
    """Opens the same kinds of data, in the splits that the data has. Nothing is held out.

    Args:
        data, root, options: as for :func:`open_dataset`.
        needs_train: whether data without a train split is refused. Evaluation does not need one.
    Raises:
        DataError: the data does not exist, is of no known kind, or cannot be used.
    """
    if not data:
        raise DataError("data '': expected a file, a folder or a name")
    path, options = Path(data), options or DataOptions()
    if options.of_folders and (not os.path.isdir(path) or is_vtab(path) or is_saved(path)):
        raise DataError(
            f"{data}: not an image folder: leave out --train-split, --val-split, --test-split and --no-splits"
        )
    if os.path.isfile(path):
        if ending(path) == ".npz":
            return open_npz(path, needs_train)
        if ending(path) in LISTS:
            return open_list(path, needs_train)
        raise DataError(f"{data}: a file with an unknown ending: expected {LOOKED_FOR}")
    if os.path.isdir(path):
        return _open_directory(path, options, needs_train)
    if data.split("/")[0].lower() in ("torch", "hfds", "hfids", "tfds", "wds"):
        return open_timm(data, root)
    raise DataError(f"{data}: no such file or folder: expected {LOOKED_FOR}")


def _open_directory(path: Path, options: DataOptions, needs_train: bool) -> Labelled:
    if is_vtab(path):
        return open_vtab(path)
    if is_saved(path):
        return open_saved(path, needs_train)
    if not options.of_folders and parquet_files(path):
        pictures = list_pictures(path).pictures
        if len({picture.rpartition("/")[0] for picture in pictures if "/" in picture}) < 2:  # no class folders
            found = open_parquet_files(path, needs_train)
            beside = describe_skipped({"pictures beside the Parquet files": pictures} if pictures else {})
            return replace(found, notes=(*found.notes, *beside))
    return open_folder(path, options, needs_train)
