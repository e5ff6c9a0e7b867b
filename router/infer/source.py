"""Finds the files that pear-infer is to read: a list, several lists, or pictures instead of lists."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from glob import has_magic, iglob
from pathlib import Path
from typing import Literal

from pear_store.counted import counted
from pear_store.local.sources import Access, files_at, is_url, is_url_pattern, path_in_url
from router.infer.formats.columns import ListError
from router.infer.lists import CSV, FORMATS, list_ending
from router.pictures import extensions

ENDINGS = (*FORMATS, ".tsv")


@dataclass(frozen=True)
class Source:
    """The files to read, in reading order.

    Args:
        name: the name that the user gave.
        files: paths and URLs of lists in natural order, or paths of pictures in order of their bytes.
        folder: the folder where paths of pictures start.
        notes: lines for the user about files that are left out.
    """

    name: str
    kind: Literal["lists", "pictures"]
    files: tuple[str, ...]
    folder: str = ""
    notes: tuple[str, ...] = ()


def find(name: str, out: Path, access: Access | None = None) -> Source:
    """Finds the files that a path, a pattern or a URL names. An existing file of that name wins.

    If a folder or one of its sub-folders has a picture, it is a folder of pictures. Any other is a folder of lists,
    and its sub-folders are not read. A URL can only name lists. The output and its parts are never taken for lists.

    Args:
        out: the output.

    Raises:
        ListError: there is no list and no picture, or there are files of several kinds.
        NotFoundError: there is nothing at the URL.
        SourceError: the URL cannot be opened.
        OSError: a folder cannot be read.
    """
    protocol, _, path = name.partition("://")
    if is_url(name) and protocol in ("file", "local") and "::" not in name:
        name = path
    if is_url(name):
        pattern = is_url_pattern(name)
        if not pattern and _is_list(name):
            return Source(name, "lists", (name,))
        return _lists(name, files_at(name, access), pattern)
    if os.path.isdir(name):
        return _in_folder(name, list(_files_below(name)), out)
    if has_magic(name) and not os.path.lexists(name):
        found = list(filter(os.path.isfile, iglob(name, recursive=True)))
        if found and not any(map(_is_list, found)):
            return Source(name, "pictures", tuple(sorted(found, key=os.fsencode)))
        return _lists(name, [file for file in found if not _is_of(out, file)], True)
    if not _is_list(name):
        raise ListError(name, f"expected a folder, or a file ending in {', '.join(ENDINGS)}")
    return Source(name, "lists", (name,))


def natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sort key that puts ``part-2`` before ``part-10``."""
    pieces = re.split(r"([0-9]+)", name)
    digits = [piece.lstrip("0") for piece in pieces]
    return [(len(digits[at]), digits[at]) if at % 2 else (0, piece) for at, piece in enumerate(pieces)], name


def _in_folder(name: str, below: list[str], out: Path) -> Source:
    """The pictures or the lists of a folder of this machine.

    Args:
        below: all its files, as paths relative to it.
    """
    pictures = [file for file in below if os.path.splitext(file)[1].lower() in extensions()]
    lists = [file for file in below if _is_list(file) and not _is_of(out, os.path.join(name, file))]
    if pictures:
        left_out = len(below) - len(pictures)
        are = (
            "1 file is left out, because it does"
            if left_out == 1
            else f"{left_out} files are left out, because they do"
        )
        note = f"{name}: {are} not end like pictures"
        if lists:
            pattern = _pattern(name, lists, any(os.sep in file for file in lists))
            note += f". {counted(len(lists), 'list')} among them: to read lists instead of pictures, use {pattern}"
        notes = (note,) if left_out else ()
        return Source(name, "pictures", tuple(sorted(pictures, key=os.fsencode)), name, notes)
    deep = [file for file in lists if os.sep in file and not file.startswith("_")]
    if deep and len(deep) == len(lists):
        remedy = f"use the pattern {_pattern(name, deep, True)}"
        raise ListError(name, f"no list in it, {counted(len(deep), 'list')} in its sub-folders: {remedy}")
    others = [file for file in below if not _is_list(file)]
    found = _lists(name, [os.path.join(name, file) for file in (*lists, *others) if os.sep not in file], False)
    if not deep:
        return found
    note = (
        f"{name}: {counted(len(deep), 'list')} in sub-folders left out: to read all, use {_pattern(name, deep, True)}"
    )
    return replace(found, notes=(note,))


def _lists(name: str, found: list[str], pattern: bool) -> Source:
    """The lists among the files of a folder, or among those that a pattern matches."""
    lists = sorted(filter(_is_list, found), key=natural_key)
    if not pattern:  # Spark and others start the names of files without data with these
        bases = {file: (path_in_url(file) if is_url(name) else file).rpartition("/")[2] for file in lists}
        lists = [file for file, base in bases.items() if not base.startswith(("_", "."))]
    others = len(found) - len(lists)
    if not lists:
        kinds = "lists" if is_url(name) else "lists or pictures"
        found_here = f"{counted(others, 'file')} of other kinds" if others else "nothing"
        raise ListError(name, f"expected {kinds}, found {found_here}")
    if pattern and others:
        raise ListError(
            name,
            f"matches {counted(len(lists), 'list')} and {counted(others, 'file')} of other kinds: expected one kind",
        )
    formats = Counter(".csv" if list_ending(file) in CSV else list_ending(file) for file in lists)
    if len(formats) > 1:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(formats.items()))
        remedy = "" if pattern else f": use a pattern for one format, such as {_pattern(name, lists, False)}"
        raise ListError(name, f"expected lists of one format, found {counts}{remedy}")
    return Source(name, "lists", tuple(lists))


def _is_list(file: str) -> bool:
    return list_ending(file) in ENDINGS


def _is_of(out: Path, file: str) -> bool:
    """Whether a file is the output, or one of its parts."""
    own, path = os.path.realpath(out), os.path.realpath(file)
    return path == own or path.startswith((f"{own}{os.sep}", f"{own}.parts{os.sep}"))


def _pattern(folder: str, lists: list[str], deep: bool) -> str:
    """A pattern for lists of one format in a folder, in quotes for a shell."""
    return f"'{folder.rstrip('/')}/{'**/' if deep else ''}*{Path(lists[0]).suffix}'"


def _files_below(path: str) -> Iterator[str]:
    """The files below a folder, as paths relative to it. Skips names with a leading dot, and links to folders."""
    for folder, folders, files in os.walk(path, onerror=_fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(folder, name), path)


def _fail(error: OSError) -> None:
    raise error
