"""What pear-infer is asked to read: a list, several lists, or pictures in place of lists."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from glob import has_magic, iglob
from pathlib import Path
from typing import Literal

from pear_store.local.sources import Access, files_at, is_url, is_url_pattern, path_in_url
from router.infer.lists import CSV, FORMATS, ListError, list_ending
from router.pictures import extensions

ENDINGS = (*FORMATS, ".tsv")


@dataclass(frozen=True)
class Source:
    """The files that were named, in the order in which they are read.

    Args:
        name: what the user wrote.
        files: paths and URLs of lists in natural order, or pictures in order of their names' bytes.
        folder: where pictures' names begin.
        notes: lines for the user: what was found, and what is left out.
    """

    name: str
    kind: Literal["lists", "pictures"]
    files: tuple[str, ...]
    folder: str = ""
    notes: tuple[str, ...] = ()


def find(name: str, out: Path, access: Access | None = None) -> Source:
    """Finds out what a path, a pattern or a URL names. A file of that very name wins.

    A folder that has a picture, also in its sub-folders, is a folder of pictures. Any other is one of lists: of those
    right in it. At a URL only lists are looked for. What this command itself writes is no list of its own.

    Args:
        out: the output.

    Raises:
        ListError: there is neither a list nor a picture, or files of several kinds.
        NotFoundError, SourceError: the URL cannot be opened, or nothing is there.
        OSError: a folder cannot be looked into.
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
    """Sort key by which ``part-2`` comes before ``part-10``."""
    pieces = re.split(r"([0-9]+)", name)
    digits = [piece.lstrip("0") for piece in pieces]
    return [(len(digits[at]), digits[at]) if at % 2 else (0, piece) for at, piece in enumerate(pieces)], name


def _in_folder(name: str, below: list[str], out: Path) -> Source:
    """Whether a folder of this machine is one of pictures or of lists, and what is read of it.

    Args:
        below: all its files, by their paths in it.
    """
    pictures = [file for file in below if os.path.splitext(file)[1].lower() in extensions()]
    lists = [file for file in below if _is_list(file) and not _is_of(out, os.path.join(name, file))]
    if pictures:
        left_out = len(below) - len(pictures)
        note = f"{name}: {left_out} files are no pictures by their endings, and are left out"
        if lists:
            pattern = _pattern(name, lists, any(os.sep in file for file in lists))
            note += f"; among them {_count(lists)}: to read lists, not pictures, say {pattern}"
        notes = (note,) if left_out else ()
        return Source(name, "pictures", tuple(sorted(pictures, key=os.fsencode)), name, notes)
    deep = [file for file in lists if os.sep in file and not file.startswith("_")]
    if deep and len(deep) == len(lists):
        remedy = f"name them by {_pattern(name, deep, True)}"
        raise ListError(name, f"{_count(deep)} in sub-folders, none right in it: {remedy}")
    others = [file for file in below if not _is_list(file)]
    found = _lists(name, [os.path.join(name, file) for file in (*lists, *others) if os.sep not in file], False)
    if not deep:
        return found
    note = f"{name}: {_count(deep)} in sub-folders left out: to read those, too, say {_pattern(name, deep, True)}"
    return replace(found, notes=(note,))


def _lists(name: str, found: list[str], pattern: bool) -> Source:
    """The lists among the files right in a folder, or that a pattern matches."""
    lists = sorted(filter(_is_list, found), key=natural_key)
    if not pattern:  # Spark and others mark by these what is no data
        bases = {file: (path_in_url(file) if is_url(name) else file).rpartition("/")[2] for file in lists}
        lists = [file for file, base in bases.items() if not base.startswith(("_", "."))]
    others = len(found) - len(lists)
    if not lists:
        kinds = "no list" if is_url(name) else "no list and no picture"
        raise ListError(name, f"{kinds} is there: found {f'{others} files of other kinds' if others else 'nothing'}")
    if pattern and others:
        raise ListError(name, f"matches {_count(lists)} and {others} files of other kinds: expected one kind")
    formats = Counter(".csv" if list_ending(file) in CSV else list_ending(file) for file in lists)
    if len(formats) > 1:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(formats.items()))
        such_as = "" if pattern else f": name those of one by a pattern, such as {_pattern(name, lists, False)}"
        raise ListError(name, f"expected lists of one format, found {counts}{such_as}")
    return Source(name, "lists", tuple(lists))


def _is_list(file: str) -> bool:
    return list_ending(file) in ENDINGS


def _is_of(out: Path, file: str) -> bool:
    """Whether a file is an output, or one of its parts."""
    own, path = os.path.realpath(out), os.path.realpath(file)
    return path == own or path.startswith((f"{own}{os.sep}", f"{own}.parts{os.sep}"))


def _count(lists: list[str]) -> str:
    return "1 list" if len(lists) == 1 else f"{len(lists)} lists"


def _pattern(folder: str, lists: list[str], deep: bool) -> str:
    """A pattern for lists of one format below a folder, as it is written in a shell."""
    return f"'{folder.rstrip('/')}/{'**/' if deep else ''}*{Path(lists[0]).suffix}'"


def _files_below(path: str) -> Iterator[str]:
    """Files by their paths below a folder. Names with a dot first are passed over, links to folders not followed."""
    for folder, folders, files in os.walk(path, onerror=_fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(folder, name), path)


def _fail(error: OSError) -> None:
    raise error
