"""Opens what --data names, and says what it was taken for."""

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
    """Opens an image folder, an image list, or another of the layouts that docs/training.md names.

    Args:
        data: a path, or ``torch/…``, ``hfds/…``, ``tfds/…``, ``wds/…``.
        root: where a named data set lies or is downloaded to.
        options: which folders are splits, where their names do not say; whether to skip unreadable pictures,
            and how large pictures may be.
    Raises:
        DataError: it is none of these, or not usable.
    """
    options = options or DataOptions()
    found = open_labelled(data, root, options).dataset()
    return replace(found, skip_unreadable=options.skip_unreadable, limits=Limits(options.max_pixels))


def open_labelled(
    data: str, root: Path | None = None, options: DataOptions | None = None, needs_train: bool = True
) -> Labelled:
    """The same images in the splits that the data has: nothing is held out.

    Args:
        data, root, options: see `open_dataset`.
        needs_train: refuse data without a train split; where it is to be evaluated, it needs none.
    Raises:
        DataError: it is none of these, or not usable.
    """
    if not data:
        raise DataError("data '': expected a file, a folder or a name")
    path, options = Path(data), options or DataOptions()
    if options.of_folders and (not os.path.isdir(path) or is_vtab(path) or is_saved(path)):
        raise DataError(f"{data}: no image folder: --train-split and such, and --no-splits, are for those")
    if os.path.isfile(path):
        if ending(path) == ".npz":
            return open_npz(path, needs_train)
        if ending(path) in LISTS:
            return open_list(path, needs_train)
        raise DataError(f"{data}: a file of no kind that is known by its ending; looked for {LOOKED_FOR}")
    if os.path.isdir(path):
        return _open_directory(path, options, needs_train)
    if data.split("/")[0].lower() in ("torch", "hfds", "hfids", "tfds", "wds"):
        return open_timm(data, root)
    raise DataError(f"{data}: no such file or folder; looked for {LOOKED_FOR}")


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
