"""Where pictures, reports and curves may be written, and that no file is meant twice: judged before any work."""

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from pear_store import PearStoreError
from pear_store.files import open_regular_file
from pear_train.errors import ConfigError

Named = tuple[str, Path]
"""A path, and the option that says it."""


def check_target(option: str, path: Path, is_ours: Callable[[bytes], bool], maker: str = "pear-train") -> None:
    """Checks that a file can be written there, and replaces nothing but an earlier one of its kind.

    Args:
        option: what messages call it.
        is_ours: tells by the first bytes of what lies there; an empty file is replaced.
        maker: the command that writes such files.
    Raises:
        ConfigError: something else lies there; or its folder is missing, or takes no file.
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
            raise ConfigError(f"{option} {path}: there is something that {maker} did not write, and it is not replaced")
    beside = beside_of(path)
    try:
        beside.touch()
        beside.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{option} {path}: folder {path.parent} takes no file of this name: {reason}") from None


def beside_of(path: Path) -> Path:
    """Where a file is written before it gets its name."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def check_apart(outputs: Iterable[Named], inputs: Iterable[Named]) -> None:
    """Checks that each output is a file of its own, by what links lead to.

    Args:
        outputs: files, or folders, to be written.
        inputs: files and folders that are read.
    Raises:
        ConfigError: names the two options.
    """
    read: dict[object, Named] = {}
    for option, path in inputs:
        read |= dict.fromkeys(_places(path), (option, path))
    written: dict[object, Named] = {}
    files = list(outputs)
    for option, path in files:
        for place in _places(path):
            if place in read:
                raise ConfigError(f"{option} {path}: is what {read[place][0]} names, and would be replaced")
            if place in written:
                raise ConfigError(f"{option} {path}: {written[place][0]} is written there, too: name another file")
        written |= dict.fromkeys(_places(path), (option, path))
    for option, path in files:
        for above in Path(os.path.realpath(path)).parents:
            if above in written:
                other, file = written[above]
                raise ConfigError(
                    f"{option} {path}: lies below {file}, where {other} writes a file: name another place"
                )


def _places(path: Path) -> list[object]:
    """What only paths to one file have in common: where links lead, and, of a file that is there, its own number."""
    places: list[object] = []
    with suppress(OSError, ValueError):  # nothing is there, or nothing can be
        places.append(Path(os.path.realpath(path)))
        status = path.stat()
        places.append((status.st_dev, status.st_ino))
    return places
