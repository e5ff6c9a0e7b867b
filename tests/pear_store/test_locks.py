"""Locks on files, while the process is forked at every line."""

import fcntl
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import lmdb
import pytest

from pear_store import Store
from pear_store.local import index, locks
from pear_store.local.locks import locked
from tests.helpers.makers import small_task


def opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT)


def is_free(path: Path) -> bool:
    with locked(lambda: opened(path), wait_s=0) as is_mine:
        return is_mine


class Forker:
    """Forks children that live until they are let go."""

    def __init__(self, file: Path) -> None:
        self._file = str(file)
        self._stay = os.pipe()
        self._children: list[int] = []
        self._threads: list[threading.Thread] = []
        self._one_at_a_time = threading.Lock()  # filelock, where it is imported, refuses two forks at once

    def fork(self) -> None:
        with self._one_at_a_time:
            child = os.fork()
        if child == 0:
            os.close(self._stay[1])
            os.read(self._stay[0], 1)
            files = {os.path.realpath(f"/proc/self/fd/{one}") for one in os.listdir("/proc/self/fd")}
            os._exit(1 if self._file in files else 0)
        self._children.append(child)

    def fork_in_a_thread(self) -> None:
        """It may have to wait for what this thread is doing."""
        thread = threading.Thread(target=self.fork)
        thread.start()
        thread.join(0.05)
        self._threads.append(thread)

    def end(self) -> list[int]:
        """Lets the children go. Returns for each whether it had the file open: 0 or 1."""
        for thread in self._threads:
            thread.join(20)
        for end in reversed(self._stay):
            os.close(end)
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in self._children]


@contextmanager
def at_each_line(files: set[str | None], act: Callable[[], None]) -> Iterator[None]:
    """Calls `act` before each line of some files that this thread comes to."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            act()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("how", ["fork", "fork_in_a_thread"])
def test_a_child_never_holds_its_parents_lock(tmp_path: Path, how: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Forked by a signal's handler, or by another thread."""
    path = tmp_path / "lock"
    forker = Forker(path)
    try:
        with at_each_line({locks.__file__}, getattr(forker, how)), locked(lambda: opened(path)) as is_mine:
            assert is_mine
        assert is_free(path)
    finally:
        had_it_open = forker.end()
    assert len(had_it_open) > 12
    assert capfd.readouterr().err == ""
    if how == "fork_in_a_thread":
        assert set(had_it_open) == {0}


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(lambda: opened(path)):
        assert not is_free(path)
        with locked(lambda: opened(path), wait_s=0.1) as is_mine:
            assert not is_mine
        threading.Timer(0.1, fcntl.flock, (other := opened(path), fcntl.LOCK_UN)).start()
    fcntl.flock(other, fcntl.LOCK_EX)
    with locked(lambda: opened(path), wait_s=20) as is_mine:
        assert is_mine
    os.close(other)
    with pytest.raises(FileNotFoundError), locked(lambda: os.open(tmp_path / "none", os.O_RDONLY)):
        pass
    assert locks._process.files == set()


def test_a_child_forked_while_a_store_is_closed_ends_well(tmp_path: Path) -> None:
    """It never closes its parent's environment, which would wait for threads that it does not have."""
    with Store.create(tmp_path / "store") as store:
        store.add(small_task())
    opened = index.open_index(tmp_path / "store" / "index")
    codes: list[int] = []

    def is_closed() -> bool:
        try:
            opened._env.info()
        except lmdb.Error:
            return True
        return False

    def fork() -> None:
        child = os.fork()
        if child == 0:
            os._exit(0 if is_closed() or opened._env in index._processes.parents else 1)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    with at_each_line({index.__file__}, fork):
        opened.close()
    assert len(codes) > 3 and set(codes) == {0}


def test_threads_that_close_an_environment_at_once_close_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LMDB would free it twice."""
    with Store.create(tmp_path / "store"):
        pass
    opened = index.open_index(tmp_path / "store" / "index")
    real = opened._env
    closed: list[float] = []

    def close_slowly() -> None:
        time.sleep(0.05)
        real.close()
        closed.append(time.monotonic())

    monkeypatch.setattr(opened, "_env", SimpleNamespace(close=close_slowly))
    with ThreadPoolExecutor(4) as pool:
        for one in [pool.submit(opened.close) for _ in range(4)]:
            one.result(20)
    assert len(closed) == 1
