"""Opening a store while its index is replaced: at every call of the system, and between any two."""

import builtins
import fcntl
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE
from typing import Any

import lmdb
import pytest

from pear_store import DamagedIndexError, Store, rebuild, verify
from pear_store.local import create as creating
from pear_store.local.index import Index, open_index
from pear_store.local.opened import is_store
from pear_store.remote.cache import Cache
from tests.helpers.makers import small_task
from tests.helpers.users import as_nobody
from tests.pear_store.test_copies import die_after_placing, held
from tests.pear_store.test_store import contents

CALLS = [
    (os, "stat"), (os, "open"), (os, "access"), (os, "rename"), (builtins, "open"), (fcntl, "flock"), (lmdb, "open"),
]  # fmt: skip
"""What opening a store asks of the system"""


pytestmark = pytest.mark.usefixtures("no_hang")


class Rebuilder:
    """Does what the end of a rebuild does: its first rename before one call of the system, its second before another.

    Before the calls, `index.new` is ready, as a rebuild leaves it. It has the lock from the first rename to the second.
    """

    def __init__(self, path: Path, first: int, second: int) -> None:
        self._calls = 0
        self._path, self._first, self._second = path, first, second
        self._lock = os.open(path / "lock", os.O_RDWR)
        self._step = 0
        self._is_busy = False

    def before(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        if self._is_busy:
            return call(*arguments, **named)
        self._is_busy = True
        try:
            self._calls += 1
            if self._step == 0 and self._calls >= self._first:
                self.begin()
            waits = call is FLOCK and arguments[1] in (fcntl.LOCK_EX, fcntl.LOCK_SH)
            if self._step == 1 and (self._calls >= self._second or waits):
                self._end()
        finally:
            self._is_busy = False
        return call(*arguments, **named)

    def begin(self) -> None:
        try:
            FLOCK(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # the other one has the lock: a rebuild would wait
            return
        (self._path / "index").rename(self._path / "index.old-1")
        self._step = 1

    def _end(self) -> None:
        (self._path / "index.new").rename(self._path / "index")
        FLOCK(self._lock, fcntl.LOCK_UN)
        self._step = 2

    def finish(self) -> bool:
        """Ends the rebuild, too late for the other one. Returns whether it was not too late."""
        met = self._step == 2
        for step in (self.begin, self._end)[self._step :]:
            step()
        os.close(self._lock)
        return met


FLOCK = fcntl.flock


def replaced(path: Path, act: Callable[[], object], first: int, second: int) -> bool:
    """Runs `act` while the index is replaced. Returns whether the index was replaced before `act` ended."""
    rebuilder = Rebuilder(path, first, second)
    with pytest.MonkeyPatch.context() as patch:
        for module, name in CALLS:
            real = getattr(module, name)
            patch.setattr(module, name, lambda *args, _real=real, **named: rebuilder.before(_real, *args, **named))
        act()
    return rebuilder.finish()


def get(path: Path) -> None:
    with Store(path) as store:
        assert contents(store.get("dtd")) == contents(small_task())


def add(path: Path) -> None:
    with Store(path) as store:
        assert not store.add(small_task("new", seed=9)).changed


def create(path: Path) -> None:
    with Store.create(path) as store:
        assert [version.task for version in store.tasks()] == ["dtd", "new"]


def look(path: Path) -> None:
    assert is_store(path)


def open_cache(path: Path) -> None:
    """It warns if it cannot use the store."""
    Cache(path.parent, 1 << 30).close()


@pytest.mark.parametrize("act", [get, add, create, look, open_cache])
def test_an_index_that_is_replaced_meanwhile_is_always_found(tmp_path: Path, act: Callable[[Path], None]) -> None:
    path = tmp_path / "store"
    with Store.create(path) as store:
        store.add(small_task())
        store.add(small_task("new", seed=9))
    rebuild(path)
    (old,) = path.glob("index.old-*")
    act(path)
    tried = 0
    first = second = 1
    while True:
        old.rename(path / "index.new")  # says the same as the other one
        met = replaced(path, lambda: act(path), first, second)
        get(path)
        old = path / "index.old-1"
        tried += met
        if met and second < first + 5:
            second += 1
        elif met:
            first = second = first + 1
        else:
            break
    assert tried > 3


def test_a_store_that_another_process_makes_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is rebuilt at that moment."""
    path = tmp_path / "s"
    made: list[Rebuilder] = []

    def open_late(index: Path, create: bool) -> Index:
        if not made:
            monkeypatch.undo()
            with Store.create(path) as store:
                store.add(small_task())
            shutil.copytree(path / "index", path / "index.new")
            made.append(Rebuilder(path, 1, 1 << 30))
            monkeypatch.setattr(fcntl, "flock", lambda *args: made[0].before(FLOCK, *args))
            made[0].begin()
        return open_index(index, create)

    monkeypatch.setattr(creating, "open_index", open_late)
    with Store.create(path) as store:
        assert made[0].finish()
        monkeypatch.undo()
        assert store.get("dtd").name == "dtd"


def test_a_reader_that_may_not_write_waits_for_a_rebuild(public: Path) -> None:
    """It may not finish what looks like a rebuild that was cut off."""
    (public / "index").rename(public / "index.new")
    lock = os.open(public / "lock", os.O_RDWR)
    FLOCK(lock, fcntl.LOCK_EX)
    waits = os.pipe()

    def rebuild_ends() -> None:
        os.read(waits[0], 1)
        (public / "index.new").rename(public / "index")
        FLOCK(lock, fcntl.LOCK_UN)

    def say_and_wait(handle: int, kind: int) -> None:
        os.write(waits[1], b"!")
        FLOCK(handle, kind)

    def read() -> None:
        os.close(lock)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fcntl, "flock", say_and_wait)
            assert len(Store(public).tasks()) == 5

    thread = threading.Thread(target=rebuild_ends)
    thread.start()
    try:
        as_nobody(read)
    finally:
        os.close(waits[1])
        thread.join()
        os.close(waits[0])
        os.close(lock)


def test_a_lock_file_that_another_process_made_meanwhile_is_kept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both open a copy without one. Emptied, it would be no lock file to either."""
    store.add(small_task())
    store.close()
    lock = store.path / "index" / "lock.mdb"
    lock.unlink()
    others: list[subprocess.Popen[bytes]] = []
    real = builtins.open

    def open_late(file: Any, *arguments: Any, **named: Any) -> Any:
        if file == lock and not others:
            code = f"from pear_store import Store; opened = Store({str(store.path)!r}); print(flush=True); input()"
            others.append(subprocess.Popen([sys.executable, "-c", code], stdin=PIPE, stdout=PIPE))
            assert others[0].stdout is not None and others[0].stdout.readline() == b"\n"
        return real(file, *arguments, **named)

    monkeypatch.setattr(builtins, "open", open_late)
    try:
        with Store(store.path) as ours:
            assert ours.get("dtd").name == "dtd"
    finally:
        monkeypatch.undo()
        (other,) = others
        other.communicate(b"\n", timeout=60)
    assert other.returncode == 0


def test_a_rebuild_after_one_that_was_cut_off_asks_its_index_what_was_committed(store: Store) -> None:
    store.add(small_task(seed=1))
    die_after_placing(store.path, "small_task(seed=2)")
    (store.path / "index").rename(store.path / "index.new")
    assert "the index does not list it; moved to" in rebuild(store.path).problems[0]
    assert held(store.path).keys() == {"dtd@1"}


@pytest.mark.parametrize("work", [rebuild, verify])
def test_a_child_that_is_forked_meanwhile_is_not_waited_for(
    store: Store, work: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has copies of all pipes, and may wait for the lock of the rebuild."""
    store.add(small_task(seed=1))
    die_after_placing(store.path, "small_task(seed=2)")
    monkeypatch.setattr("pear_store.local.verify.can_fork", lambda: False)
    children: list[int] = []
    done = os.pipe()

    def fork_after(act: Callable[..., Any]) -> Callable[..., Any]:
        def forking(*arguments: Any, **named: Any) -> Any:
            result = act(*arguments, **named)
            if child := os.fork():
                children.append(child)
                return result
            os.close(done[1])
            if work is rebuild:
                store.add(small_task(f"child{len(children)}", seed=3 + len(children)))
            else:
                os.read(done[0], 1)
            os._exit(0)

        return forking

    with monkeypatch.context() as patch:
        patch.setattr(subprocess.Popen, "_get_handles", fork_after(subprocess.Popen._get_handles))  # type: ignore[attr-defined]
        patch.setattr(os, "pipe", fork_after(os.pipe))
        try:
            work(store.path)
        finally:
            for end in done:
                os.close(end)
            codes = [os.waitpid(child, 0)[1] for child in children]
    assert set(codes) == {0}
    assert verify(store.path).ok


def test_an_index_that_cannot_be_opened_gives_the_same_error_again(tmp_path: Path) -> None:
    Store.create(tmp_path / "s").close()
    shutil.rmtree(tmp_path / "s" / "index")
    lmdb.open(str(tmp_path / "s" / "index")).close()  # without its tables
    for _ in range(2):
        with pytest.raises(DamagedIndexError, match="'pear-store rebuild' makes it anew from the packs"):
            Store(tmp_path / "s")
    rebuild(tmp_path / "s")
    Store(tmp_path / "s").close()


def test_a_store_opens_again_while_an_iteration_of_before_goes_on(store: Store) -> None:
    list(store.add_many([small_task(f"t{i}", seed=i) for i in range(3)]))
    reading = store.iter_tasks()
    names = [next(reading).task]
    store.close()
    with Store(store.path) as again:
        again.remove("t2")
        assert [version.task for version in again.tasks()] == ["t0", "t1"]
        names += [version.task for version in reading]
        again.add(small_task("t3", seed=3))
    assert names == ["t0", "t1", "t2"]
    with Store(store.path) as again:
        assert again.get("t3").name == "t3"
