"""Forks at every moment: the child goes on with the store, and its parent notices nothing."""

import fcntl
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from pear_store import Store, rebuild, verify, write_checkpoint
from tests.helpers.forking import LIMIT_S, in_child, use
from tests.helpers.makers import small_task
from tests.pear_store.test_store import contents, packs

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("work", "leave"),
    [("add", "os._exit"), ("add", "sys.exit"), ("get", "sys.exit"), ("iterate", "os._exit"), ("gc", "os._exit"),
     ("verify", "os._exit"), ("rebuild", "os._exit")],
)  # fmt: skip
def test_a_child_forked_while_threads_use_the_store_uses_it_too(store: Store, work: str, leave: str) -> None:
    """In a process of its own, for the child must leave as processes do."""
    store.add(small_task())
    code = (
        "import os, sys\n"
        "from tests.helpers.forking import fork_while_threads_work\n"
        f"fork_while_threads_work({str(store.path)!r}, {work!r}, {leave})\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True,
        timeout=2 * LIMIT_S,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert verify(store.path).ok


def test_a_child_leaves_the_lock_to_its_parent(store: Store) -> None:
    """The lock is one for both as long as the child has the file open, too."""
    store.add(small_task())
    born, stay = os.pipe(), os.pipe()
    gone: list[int] = []

    def fork_in_the_write(view: object) -> None:
        child = os.fork()
        if child == 0:
            os.write(born[1], b"!")
            os.close(stay[1])
            os.read(stay[0], 1)
            os._exit(0)
        gone.append(child)

    store._open.write(fork_in_the_write)
    try:
        assert os.read(born[0], 1) == b"!"
        with open(store.path / "lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if the child still has it
        with open(store.path / "lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            in_child(lambda: None)
            with open(store.path / "lock", "rb") as other, pytest.raises(BlockingIOError):  # no child gives it away
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        for end in (*born, *stay):
            os.close(end)
        os.waitpid(gone[0], 0)


@pytest.mark.parametrize("leave", ["os._exit", "unwind", "sys.exit"])
def test_a_child_forked_in_an_iteration_leaves_the_parents_place_among_the_readers(store: Store, leave: str) -> None:
    list(store.add_many([small_task(f"t{i}", seed=i) for i in range(120)]))
    expected = [version.task for version in store.tasks()]
    code = (
        "import os, sys\n"
        "from tests.helpers.forking import fork_in_an_iteration\n"
        f"fork_in_an_iteration({str(store.path)!r}, {leave!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=LIMIT_S
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == expected


def test_a_child_that_unwinds_its_parents_add_deletes_nothing_of_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forked by a signal's handler in the middle of a write, and ended by an exception."""
    store.add(small_task())
    forked: list[int] = []
    parent = os.getpid()

    class LeaveError(Exception):
        pass

    def forking(act: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            result = act(*args)
            child = os.fork()
            if child == 0:
                raise LeaveError
            forked.append(child)
            return result

        return wrapped

    import pear_store.local.catalog
    import pear_store.local.packs

    for module, name in ((pear_store.local.packs, "_write"), (pear_store.local.catalog, "place_pack")):
        monkeypatch.setattr(module, name, forking(getattr(module, name)))
        try:
            store.add(small_task(f"t{name}", seed=len(forked) + 7))
        except BaseException as error:
            if os.getpid() == parent:
                raise
            os._exit(0 if isinstance(error, LeaveError) else 4)
        monkeypatch.undo()
    assert len(forked) == 2
    for child in forked:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert contents(store.get("t_write")) == contents(small_task("t_write", seed=7))
    assert len(packs(store)) == 3
    assert verify(store.path).ok


class Tasks(Dataset[int]):
    """Reads a task for each item, in whatever process."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> int:
        assert contents(self.store.get(f"t{i}")) == contents(small_task(f"t{i}", seed=i))
        return i


def test_workers_of_a_data_loader_read_the_store(store: Store) -> None:
    list(store.add_many([small_task(f"t{i}", seed=i) for i in range(8)]))
    iteration = store.iter_tasks()
    next(iteration)
    loader = DataLoader(Tasks(store), batch_size=2, num_workers=2, timeout=LIMIT_S, multiprocessing_context="fork")
    for _ in range(2):
        assert torch.cat(list(loader)).tolist() == list(range(8))
    assert [version.task for version in iteration] == [f"t{i}" for i in range(1, 8)]


def test_processes_of_multiprocessing_add_to_their_parents_store(store: Store, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "t.safetensors", small_task("file"))
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=store.add, args=(small_task(f"t{i}", seed=i),)) for i in range(3)]
    processes.append(context.Process(target=store.add, args=(tmp_path / "t.safetensors",)))
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT_S)
    assert [process.exitcode for process in processes] == [0] * 4
    assert [version.task for version in store.tasks()] == ["file", "t0", "t1", "t2"]


def test_a_grandchild_uses_the_store(store: Store) -> None:
    store.add(small_task())
    iteration = store.iter_tasks()
    next(iteration)

    def child() -> None:
        use(store, "child")
        inner: Iterator[object] = store.iter_tasks()
        next(inner)
        in_child(lambda: use(store, "grandchild"))
        assert len(list(inner)) == 1

    in_child(child)
    assert [version.task for version in store.tasks()] == ["child", "dtd", "grandchild"]


def test_an_environment_that_a_rebuild_replaced_is_closed_with_its_last_view(store: Store) -> None:
    store.add(small_task())

    def files() -> int:
        links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        return sum("data.mdb" in os.readlink(link) for link in links if os.path.islink(link))

    before = files()
    for _ in range(5):
        reading = store.iter_tasks()
        next(reading)
        rebuild(store.path)
        assert store.get("dtd").name == "dtd"
        assert list(reading) == []
    store.get("dtd")
    assert files() == before
