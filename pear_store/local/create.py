"""Makes an empty store, whole or not at all."""

import os
from pathlib import Path

from pear_store.errors import FormatError, from_os_error
from pear_store.format.digest import fresh_name
from pear_store.local.directory import open_folder, sync_directory
from pear_store.local.index import open_index, release_index
from pear_store.local.locks import write_lock
from pear_store.local.opened import is_store

_PARTS = ("packs", "tmp", "damaged", "lock")


def make_store(path: Path) -> None:
    """Makes an empty store, if there is none.

    Raises:
        FormatError: the directory holds something else.
    """
    if is_store(path):
        return
    fresh = path / f"index-{fresh_name()}"
    new = [folder for folder in (path, *path.parents) if not os.path.exists(folder)]
    try:
        # these parts may be from a `create` that was killed or is running
        if os.path.exists(path) and not all(p.name in _PARTS or p.name[:5] == "index" for p in path.iterdir()):
            raise FormatError(
                f"{path}: expected a store or an empty directory, found other files; choose another place"
            )
        if any((path / "packs").glob("*/*.safetensors")):
            raise FormatError(f"{path}: found packs without an index; 'pear-store rebuild' makes it anew from them")
        path.mkdir(parents=True, exist_ok=True)
        with open_folder(path) as root:
            for part in ("packs", "tmp", fresh.name):
                with root.folder(part, create=True):
                    pass
            release_index(open_index(fresh, create=True))
            sync_directory(fresh)
            with write_lock(path):  # else it could take the place of an index that a rebuild is renaming
                root.rename(fresh.name, "index")  # whole or not at all; fails if another process has done it
        for folder in {path, path.parent, *(folder.parent for folder in new)}:
            sync_directory(folder)
    except NotADirectoryError:
        raise FormatError(f"{path}: expected a directory, found a file; choose another place") from None
    except OSError as error:
        if not is_store(path):
            raise from_os_error(error, path) from None
    with open_folder(path) as root:
        root.remove_index(fresh.name)
