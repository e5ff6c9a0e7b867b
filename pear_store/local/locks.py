"""Locks on files. The system frees a lock when its holder dies. A forked child never holds its parent's locks."""

import fcntl
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pear_store.local.directory import open_folder

_POLL_S = 0.02


@dataclass(eq=False)
class _Open:
    """A lock's open file. A handle of -1 means that this process does not have it open."""

    handle: int = -1

    def close(self) -> None:
        if self.handle >= 0:
            handle, self.handle = self.handle, -1
            os.close(handle)


@dataclass
class _Process:
    """The lock files that this process has open.

    All copies of an open file share its lock, so a forked child closes its copies. It must know them all: so no fork
    begins while a file is opened or closed. A signal handler may still fork then, in the same thread. A copy that its
    child keeps is harmless, because the lock is released explicitly before the file is closed.
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
    """A context during which no other thread begins to fork. One thread at a time may enter it."""
    guard: AbstractContextManager[object] = _process.guard
    return guard


@contextmanager
def locked(open_file: Callable[[], int], wait_s: float = math.inf, is_shared: bool = False) -> Iterator[bool]:
    """Locks a file for the context. Gives True, or False if somebody else holds the lock for longer than `wait_s`.

    Args:
        open_file: opens the file and returns its handle. The end of the context closes it.
        wait_s: seconds to wait. 0: do not wait.
        is_shared: others may share the lock at the same time. Else this process alone has it.

    Raises:
        OSError: the file cannot be opened or locked.
    """
    file = _Open()
    try:
        with no_fork():
            file.handle = open_file()
            _process.files.add(file)
        yield _take(file.handle, wait_s, fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX)
    finally:
        with no_fork():
            if file.handle >= 0:  # else this is a forked child, and the lock is the parent's
                fcntl.flock(file.handle, fcntl.LOCK_UN)
            file.close()
            _process.files.discard(file)


def _take(handle: int, wait_s: float, kind: int) -> bool:
    if wait_s == math.inf:
        fcntl.flock(handle, kind)
        return True
    until = time.monotonic() + wait_s
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            return True
        if time.monotonic() >= until:
            return False
        time.sleep(_POLL_S)


def write_lock(root: Path) -> AbstractContextManager[bool]:
    """Excludes all other writers of a store.

    LMDB's own lock is not enough: it is in the environment, which a rebuild replaces.
    """

    return locked(partial(_open_lock, root, os.O_RDWR | os.O_CREAT))


@contextmanager
def no_writer(root: Path) -> Iterator[None]:
    """Waits for the writer of a store, and keeps out others meanwhile. This process need not be able to write."""
    with ExitStack() as held:
        with suppress(FileNotFoundError):  # then nobody has ever written
            held.enter_context(locked(partial(_open_lock, root, os.O_RDONLY), is_shared=True))
        yield


def _open_lock(root: Path, flags: int) -> int:
    with open_folder(root) as folder:
        return folder.open("lock", flags)
