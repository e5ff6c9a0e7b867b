"""What can go wrong with a store.

PearStoreError            exit code 1
├── NotFoundError         3   no such file, store, task or version
├── CheckpointError       4   a file that is no valid task checkpoint
├── DamagedError          5   stored bytes that are not what was stored
├── DiskFullError         6   no space left where the store lives
├── NameTakenError        7   a task name that differs from a stored one in case only
└── FormatError           8   a store written by a newer Pear, or a directory that is no store
"""

from pathlib import Path


class PearStoreError(Exception):
    """Base of all errors of pear_store; its text is one line for a person."""

    exit_code = 1


class NotFoundError(PearStoreError, LookupError):
    exit_code = 3


class CheckpointError(PearStoreError):
    """A task checkpoint that is not accepted: where, which field, what was expected and found."""

    exit_code = 4

    def __init__(self, where: str | Path, problem: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.where = str(where)
        self.problem = problem


class DamagedError(PearStoreError):
    """Bytes in the store that do not hash to their digest, or are missing."""

    exit_code = 5

    def __init__(self, what: str, found: str) -> None:
        super().__init__(f"{what} is damaged: {found}; add a checkpoint that holds it again to heal it")
        self.what, self.found = what, found


class DiskFullError(PearStoreError):
    """No space left; everything stored before is intact."""

    exit_code = 6

    def __init__(self, where: str | Path) -> None:
        super().__init__(f"{where}: no space left on the device; nothing was changed, free some space and run again")
        self.where = str(where)


class NameTakenError(PearStoreError):
    exit_code = 7

    def __init__(self, name: str, taken: str) -> None:
        super().__init__(f"task name {name!r} differs only in case from the stored {taken!r}; use that or another name")
        self.name, self.taken = name, taken


class FormatError(PearStoreError):
    exit_code = 8
