"""Locks on files. The system frees them when their holder dies, and a forked child never holds its parent's."""

import fcntl
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pear_store.local.directory import open_folder

_POLL_S = 0.02


@dataclass(eq=False)
class _Open:
    """A lock's file; -1: not open in this process."""

    handle: int = -1

    def close(self) -> None:
        if self.handle >= 0:
            handle, self.handle = self.handle, -1
            os.close(handle)


@dataclass
class _Process:
    """What this process has open.

    A lock is one for all copies of its open file, so a forked child closes its own. It must know of them all: no fork
    begins while one is opened or closed. A signal's handler may still fork there, in the same thread. What its child
    then keeps is harmless, since a lock is freed by name before its file is closed.
    """

    files: set[_Open] = field(default_factory=set)
    guard: Any = field(default_factory=threading.RLock)

    def after_fork(self) -> None:
        """In a forked child."""
        self.guard = threading.RLock()
        for file in self.files:
            file.close()
        self.files.clear()


_process = _Process()
os.register_at_fork(
    before=lambda: _process.guard.acquire(),
    after_in_parent=lambda: _process.guard.release(),
    after_in_child=_process.after_fork,
)


def no_fork() -> AbstractContextManager[object]:
    """In its context, which one thread enters at a time, no other thread begins to fork."""
    guard: AbstractContextManager[object] = _process.guard
    return guard


@contextmanager
def locked(open_file: Callable[[], int], wait_s: float = math.inf) -> Iterator[bool]:
    """Whether a file's lock is this context's alone: always, unless another holds it for longer than it is waited for.

    Args:
        open_file: returns the file's handle; it is closed at the end.
        wait_s: seconds; 0 does not wait.

    Raises:
        OSError: the file cannot be opened or locked.
    """
    file = _Open()
    try:
        with no_fork():
            file.handle = open_file()
            _process.files.add(file)
        yield _take(file.handle, wait_s)
    finally:
        with no_fork():
            if file.handle >= 0:  # else it is the parent's
                fcntl.flock(file.handle, fcntl.LOCK_UN)
            file.close()
            _process.files.discard(file)


def _take(handle: int, wait_s: float) -> bool:
    if wait_s == math.inf:
        fcntl.flock(handle, fcntl.LOCK_EX)
        return True
    until = time.monotonic() + wait_s
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() >= until:
            return False
        time.sleep(_POLL_S)


def write_lock(root: Path) -> AbstractContextManager[bool]:
    """Excludes all other writers of a store.

    LMDB has a lock of its own, but in the environment that a rebuild replaces.
    """

    def open_file() -> int:
        with open_folder(root) as folder:
            return folder.open("lock", os.O_RDWR | os.O_CREAT)

    return locked(open_file)
