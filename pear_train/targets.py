"""Checks, before any work, where pictures, reports and curves may be written, and that no two outputs are one file."""

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from pear_store import PearStoreError
from pear_store.files import open_regular_file
from pear_train.errors import ConfigError

Named = tuple[str, Path]
"""An option, and the path that it names."""


def check_target(option: str, path: Path, is_ours: Callable[[bytes], bool], maker: str = "pear-train") -> None:
    """Checks that a file can be written at `path`, and that at most an earlier file of the same kind is replaced.

    Args:
        option: the option's name in messages.
        is_ours: whether the first bytes of an existing file show the same kind. An empty file may always be replaced.
        maker: the command that writes such files.
    Raises:
        ConfigError: `path` holds something else, or its folder is missing or not writable.
    """
    if not os.path.isdir(path.parent):
        raise ConfigError(f"{option} {path}: folder {path.parent} does not exist; make it first")
    if os.path.lexists(path):
        try:
            with open_regular_file(path) as file:
                start = file.read(4096)
        except PearStoreError as error:
            raise ConfigError(f"{option} {error}") from None
        if start and not is_ours(start):
            raise ConfigError(f"{option} {path}: {maker} did not write this file, so it is not replaced: name another")
    beside = beside_of(path)
    try:
        beside.touch()
        beside.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{option} {path}: folder {path.parent} takes no file of this name: {reason}") from None


def beside_of(path: Path) -> Path:
    """The path where a file is written before it gets its name."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def check_apart(outputs: Iterable[Named], inputs: Iterable[Named]) -> None:
    """Checks that no output is also an input or another output. Links are followed.

    Args:
        outputs: files and folders to write.
        inputs: files and folders to read.
    Raises:
        ConfigError: two options name one file; the message has both options.
    """
    read: dict[object, Named] = {}
    for option, path in inputs:
        read |= dict.fromkeys(_places(path), (option, path))
    written: dict[object, Named] = {}
    files = list(outputs)
    for option, path in files:
        for place in _places(path):
            if place in read:
                raise ConfigError(
                    f"{option} {path}: {read[place][0]} reads this file, so it is not replaced: name another"
                )
            if place in written:
                raise ConfigError(f"{option} {path}: {written[place][0]} writes this file, too: name another")
        written |= dict.fromkeys(_places(path), (option, path))
    for option, path in files:
        for above in Path(os.path.realpath(path)).parents:
            if above in written:
                other, file = written[above]
                raise ConfigError(
                    f"{option} {path}: lies below {file}, where {other} writes a file: name another place"
                )


def _places(path: Path) -> list[object]:
    """Keys that paths have in common only if they are one file: the path without links, and a file's inode."""
    places: list[object] = []
    with suppress(OSError, ValueError):  # no such file, or not a possible path
        places.append(Path(os.path.realpath(path)))
        status = path.stat()
        places.append((status.st_dev, status.st_ino))
    return places
