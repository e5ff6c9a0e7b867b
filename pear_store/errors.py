"""What can go wrong with a store.

PearStoreError            exit code 1
├── NotFoundError         3   no such file, store, task, version or tag
│   └── AbsentError           no such object on a remote
├── CheckpointError       4   a file that is no valid task checkpoint
├── DamagedError          5   stored bytes that differ from what was stored, or are missing
│   ├── DamagedIndexError     the index itself; a rebuild makes a new one from the packs
│   └── DamagedRemoteError    the bytes of a remote
├── DiskFullError         6   no space left where the store lives
├── NameTakenError        7   a task name that differs from a stored one in case only
├── FormatError           8   a store written by a newer Pear, or a directory that is no store
├── TaggedError           9   a version that may not be removed, because a tag holds it
├── SourceError          10   a file or URL that is not opened: no regular file, no permission, a protocol not allowed
├── AccessError          11   the system does not let this process read or write the store
├── PlaceError           12   a remote that cannot be reached, or does not do what was asked
└── ClashError           13   another store has pushed something that contradicts what this one would push
"""

import errno
import sys
from pathlib import Path
from typing import Any


class PlainError(Exception):
    """An error that can be pickled, whatever arguments its constructor takes.

    Python would call the constructor with the text alone. A pool of processes hangs at an error that it cannot read.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _made_again, (type(self), *self.args), self.__dict__


def _made_again(kind: type[PlainError], *args: object) -> PlainError:
    return kind.__new__(kind, *args)


def unreadable(error: Exception) -> str:
    """What a parser found wrong with a text, in one line. Of a long number, Python's own text advises programmers."""
    text = " ".join(str(error).split()) or type(error).__name__
    most = sys.get_int_max_str_digits()
    return f"a number has more than {most:,} digits" if "sys.set_int_max_str_digits" in text else text


class PearStoreError(PlainError):
    """Base of all errors of pear_store. Its text is one line for a person.

    A command that ends with it exits with its class's `exit_code`.
    """

    exit_code = 1


class NotFoundError(PearStoreError, LookupError):
    """There is no such file, store, task, version or tag."""

    exit_code = 3


class CheckpointError(PearStoreError):
    """A task checkpoint that is not accepted.

    Args:
        where: the file, or what else messages call it.
        problem: which field or tensor, what was expected, and what was found.
        remedy: what to do, if the problem does not say it.
    """

    exit_code = 4

    def __init__(self, where: str | Path, problem: str, remedy: str = "") -> None:
        super().__init__(f"{where}: {problem}{remedy and f'; {remedy}'}")
        self.where = str(where)
        self.problem = problem
        self.remedy = remedy


class DamagedError(PearStoreError):
    """Bytes in the store that do not hash to their digest, or are missing.

    Args:
        what: which tensor, manifest, pack or row.
        found: what is wrong with it.
    """

    exit_code = 5
    remedy = "'pear-store verify' says what is hit and how to mend it"

    def __init__(self, what: str, found: str) -> None:
        super().__init__(f"{what} is damaged: {found}; {self.remedy}")
        self.what, self.found = what, found


class DamagedIndexError(DamagedError):
    """The index cannot be read, or contradicts itself or the packs."""

    remedy = "'pear-store rebuild' makes it anew from the packs"

    def __init__(self, path: Path, found: str) -> None:
        super().__init__(f"index {path}", found)


class DiskFullError(PearStoreError):
    """No space left; everything stored before is intact."""

    exit_code = 6

    def __init__(self, where: str | Path) -> None:
        super().__init__(f"{where}: no space left on the device; nothing was changed, free some space and run again")
        self.where = str(where)


class NameTakenError(PearStoreError):
    """The store has a task whose name differs from the new one in case only."""

    exit_code = 7

    def __init__(self, name: str, taken: str) -> None:
        super().__init__(f"task name {name!r} differs only in case from the stored {taken!r}; use that or another name")
        self.name, self.taken = name, taken


class OutOfNumbersError(PearStoreError):
    """The task had version 2^32 - 1, the last possible one."""

    def __init__(self, name: str) -> None:
        super().__init__(f"task {name!r} has used up its version numbers, the last is {2**32 - 1}; use another name")
        self.name = name


class FormatError(PearStoreError):
    """A newer Pear wrote the store, or the directory holds something else."""

    exit_code = 8


class TaggedError(PearStoreError):
    """A version that may not be removed, because it has a tag."""

    exit_code = 9

    def __init__(self, task: str, version: int, tag: str) -> None:
        super().__init__(
            f"{task}@{version} is tagged {tag!r} and was kept; untag it first: 'pear-store tag --delete {task}@{tag}'"
        )
        self.task, self.version, self.tag = task, version, tag


class SourceError(PearStoreError):
    """A file or URL of the user's that is not opened, or cannot be read."""

    exit_code = 10

    def __init__(self, source: str | Path, problem: str) -> None:
        super().__init__(f"{source}: {problem}")
        self.source, self.problem = str(source), problem


class AccessError(PearStoreError):
    """This process may not read or write a store, or a part of it."""

    exit_code = 11

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(
            f"{path}: {reason}; to read a store, all of it must be readable; to change it, all of it must be writable"
        )
        self.path, self.reason = str(path), reason


class AbsentError(NotFoundError):
    """A remote does not have an object of that name."""

    def __init__(self, place: str, name: str) -> None:
        super().__init__(f"{place}: there is no {name}")
        self.place, self.name = place, name


class DamagedRemoteError(DamagedError):
    """A remote gave bytes that differ from what its log says, or that break the rules of the format."""

    remedy = "nothing of it was taken"

    def __init__(self, place: str, what: str, found: str) -> None:
        super().__init__(f"{place}: {what}", found)
        self.place = place


class PlaceError(PearStoreError):
    """A remote that cannot be reached, that refuses, or that cannot do what a remote must.

    Args:
        place: the remote's URL.
        problem: what went wrong.
        again: whether another try may help.
    """

    exit_code = 12

    def __init__(self, place: str, problem: str, again: bool = False) -> None:
        super().__init__(f"{place}: {problem}")
        self.place, self.problem, self.again = place, problem, again


class ClashError(PearStoreError):
    """What is on a remote contradicts what would be pushed. Nothing was pushed.

    Args:
        clashes: one line for each. The text shows the first five.
    """

    exit_code = 13

    def __init__(self, clashes: list[str]) -> None:
        shown = "; ".join(clashes[:5]) + (f"; and {len(clashes) - 5} more" if len(clashes) > 5 else "")
        super().__init__(shown)
        self.clashes = clashes


def from_os_error(error: OSError, path: Path, failed: str = "") -> PearStoreError:
    """The operating system's error as one of ours.

    Args:
        path: the store, or the file that is written.
        failed: what was tried, for the message.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(path)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AccessError(path, (error.strerror or str(error)).lower())
    return PearStoreError(f"{path}: {failed + ': ' if failed else ''}{error.strerror or error}")
