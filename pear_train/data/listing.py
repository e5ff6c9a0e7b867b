"""The contents of a folder of pictures: the pictures, and everything that is left out, with the reason."""

import errno
import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from router.pictures import extensions

_SYSTEM_NAMES = frozenset(
    (
        "__pycache__", "__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found",
        "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
    )
)  # fmt: skip
"""Folders and files that systems and tools leave behind, in lower case. Names with a leading dot are skipped, too."""
_MOST_VISITS = 100
"""How many times links may lead to one folder. Without a limit, links to folders of links would multiply."""

_CIRCLE = "folders that links lead to in a circle or too often"


@dataclass
class Listing:
    """The pictures below a folder, and what was left out. Paths are relative to the folder, with "/"."""

    pictures: list[str] = field(default_factory=list)
    """In order of their paths."""
    folders: set[str] = field(default_factory=set)
    """All folders that were listed."""
    skipped: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> paths that were left out."""
    faults: list[str] = field(default_factory=list)
    """A line for each folder that could not be listed."""

    def below(self, folder: str) -> list[str]:
        """The pictures below a folder ("" for all), as paths relative to it."""
        if not folder:
            return self.pictures
        start = f"{folder}/"
        first, end = (bisect_left(self.pictures, text) for text in (start, f"{folder}0"))  # "0" comes after "/"
        return [path.removeprefix(start) for path in self.pictures[first:end]]

    def folders_in(self, folder: str) -> list[str]:
        """Names of the folders directly in a folder ("" for the top)."""
        start = f"{folder}/" if folder else ""
        names = (path.removeprefix(start) for path in self.folders if path.startswith(start))
        return sorted(name for name in names if "/" not in name)

    def skipped_below(self, folder: str) -> tuple[str, ...]:
        """A line for each reason why something below a folder was left out."""
        within = {
            reason: below
            for reason, paths in self.skipped.items()
            if (below := [path for path in paths if path.startswith(f"{folder}/")])
        }
        return describe_skipped(within)

    def skip(self, reason: str, path: str) -> None:
        self.skipped.setdefault(reason, []).append(path)


def list_pictures(root: Path) -> Listing:
    """All pictures below a folder, recognised by their endings. Links are followed, except to a folder above."""
    endings = extensions()
    found = Listing()
    visits: Counter[tuple[int, int]] = Counter()
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while waiting:
        folder, above = waiting.pop()
        here = root / folder
        try:
            status = here.stat()
            place = (status.st_dev, status.st_ino)
            if place in above or visits[place] >= _MOST_VISITS:
                found.skip(_CIRCLE, f"{folder}/")
                continue
            visits[place] += 1
            with os.scandir(here) as entries:
                named = sorted((entry.name, _kind(entry)) for entry in entries)
        except OSError as error:
            if error.errno == errno.ELOOP:
                found.skip(_CIRCLE, f"{folder}/")
                continue
            found.faults.append(f"{here}: the folder cannot be read: {error.strerror}")
            continue
        if folder:
            found.folders.add(folder)
        for name, kind in named:
            path = f"{folder}/{name}" if folder else name
            ending = os.path.splitext(name)[1].lower()
            if name.startswith(".") or name.casefold() in _SYSTEM_NAMES:
                found.skip("hidden or left by a system", f"{path}/" if kind == "folder" else path)
            elif kind == "folder":
                waiting.append((path, above | {place}))
            elif kind != "file":
                found.skip(kind, path)
            elif ending in endings:
                found.pictures.append(path)
            else:
                found.skip(f"files ending in {ending}" if ending else "files without an ending", path)
    found.pictures.sort()
    for folder in sorted(found.folders):
        if os.path.splitext(folder)[1].lower() in endings and not found.below(folder):
            found.skip("folders without pictures whose names end like a picture's", f"{folder}/")
    return found


def _kind(entry: "os.DirEntry[str]") -> str:
    """ "folder", "file", or the reason why an entry is neither."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return "pipes, sockets and devices" if os.path.exists(entry.path) else "links to nothing"
    except OSError:  # a link to itself
        return "links to nothing"


def describe_skipped(skipped: Mapping[str, list[str]]) -> tuple[str, ...]:
    """A line for each reason: the number of paths, and the first of them."""
    return tuple(
        f"{reason} ({len(paths):,}): {', '.join(paths[:3])}{', …' if len(paths) > 3 else ''}"
        for reason, paths in sorted(skipped.items())
    )
