"""Opens what --data names, and says what it was taken for."""

from collections.abc import Callable
from pathlib import Path

from pear_train.data.dataset import LOOKED_FOR, Dataset
from pear_train.data.folder import open_folder
from pear_train.data.npz import open_npz
from pear_train.data.timm_data import open_timm
from pear_train.data.vtab import is_vtab, open_vtab
from pear_train.errors import DataError


def open_dataset(data: str, root: Path | None = None) -> Dataset:
    """Opens an image folder, a VTAB-1k folder, an .npz file, or a data set that timm knows by name.

    Args:
        data: a path, or ``torch/…``, ``hfds/…``, ``tfds/…``, ``wds/…``.
        root: where a named data set lies or is downloaded to.
    Raises:
        DataError: it is none of these, or not usable.
    """
    path = Path(data)
    if path.is_file():
        if path.suffix == ".npz":
            return open_npz(path)
        raise DataError(f"{data}: a file that does not end in .npz; looked for {LOOKED_FOR}")
    if path.is_dir():
        reader: Callable[[Path], Dataset] = open_vtab if is_vtab(path) else open_folder
        return reader(path)
    if data.split("/")[0].lower() in ("torch", "hfds", "hfids", "tfds", "wds"):
        return open_timm(data, root)
    raise DataError(f"{data}: no such file or folder; looked for {LOOKED_FOR}")
