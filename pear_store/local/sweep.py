"""Finds and removes files that have no rows in the index."""

import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pear_store.local.directory import WRITTEN_NAME, open_folder
from pear_store.local.opened import OpenStore
from pear_store.local.packs import is_unfinished, pack_path
from pear_store.local.recorded import Recorded


def unknown_packs(opened: OpenStore) -> list[bytes]:
    """Packs that record what the index never had. The caller need not hold the write lock."""
    for _ in range(_LOOKS):
        with opened.read() as view:
            found = Recorded(opened.path).find_unlisted(view)
            state = view.state
        # a pack that is being added has its name in tmp/ until the index lists it
        done = [pack for pack in found.unknown if not is_unfinished(opened.path, pack)]
        with opened.read() as view:
            done = [pack for pack in done if pack not in view.packs and pack_path(opened.path, pack).exists()]
            if not done or view.state == state:  # else packs that were looked at may have moved
                break
    return done


_LOOKS = 5


def set_aside(path: Path, packs: Iterable[bytes]) -> None:
    """Moves packs that cannot be read into damaged/."""
    for pack in packs:
        name = pack_path(path, pack).name
        with open_folder(path, "packs", name[:2]) as folder, open_folder(path, "damaged", create=True) as damaged:
            folder.rename(name, name, damaged)
            damaged.sync()
            folder.sync()


def keep_copy(path: Path, pack: bytes) -> None:
    """Gives a pack a second name in damaged/, so that it is kept."""
    name = pack_path(path, pack).name
    with open_folder(path, "packs", name[:2]) as folder, open_folder(path, "damaged", create=True) as damaged:
        with suppress(FileExistsError):
            folder.link(name, name, damaged)
        damaged.sync()


def clear_tmp(path: Path) -> list[str]:
    """Deletes what a crashed add left in tmp/. Returns the paths of files that are not Pear's, which stay."""
    foreign: list[str] = []
    an_hour_ago = time.time() - 3600
    with suppress(FileNotFoundError), open_folder(path, "tmp") as tmp:
        for name in tmp.names():  # a running add takes seconds only
            with suppress(FileNotFoundError):
                if not (WRITTEN_NAME.fullmatch(name) and tmp.is_file(name)):
                    foreign.append(str(tmp.path / name))
                # the next write deletes a file with two links
                elif (found := tmp.look(name)).st_mtime < an_hour_ago and found.st_nlink == 1:
                    tmp.unlink(name)
    return foreign
