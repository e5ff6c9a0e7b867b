"""Files read by forked workers, and what is not checked twice."""

import gc
import importlib
import inspect
import os
import pkgutil
import signal
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

import pear_store
from pear_store import CheckpointError, Refused, Store, make_task, read_checkpoint, write_checkpoint
from pear_store.format.checkpoint import ReadBefore
from pear_store.local import loading
from pear_store.local.loading import Loaded, load_groups
from pear_store.local.worker import Worker, WorkerDiedError
from tests.helpers.makers import small_task


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """30 checkpoints, some equal in content, one damaged, one missing."""
    paths = []
    for i in range(30):
        paths.append(tmp_path / f"t{i}.safetensors")
        write_checkpoint(paths[-1], small_task(f"t{i}", seed=i % 7))
    damaged = bytearray(paths[11].read_bytes())
    damaged[-3] ^= 1
    paths[11].write_bytes(damaged)
    paths[17].unlink()
    return paths


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four files a group, and two cores whatever the machine has."""
    monkeypatch.setattr(loading, "GROUP_BYTES", 16384)
    monkeypatch.setattr(loading, "GROUP_TASKS", 4)
    monkeypatch.setattr(loading, "can_fork", lambda: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})


def outcome(groups: Iterator[loading.Group]) -> list[object]:
    return [
        (one.name, one.manifest, {d: bytes(one.tensors[d].data) for d in one.tensors}, one.size_bytes)
        if isinstance(one, Loaded)
        else str(one.error)
        for group in groups
        for one in group
    ]


@pytest.mark.usefixtures("small_groups")
def test_workers_read_what_one_process_reads(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(threading.enumerate())
    given: list[Any] = [*files[:9], small_task("in-memory", seed=3), *map(str, files[9:])]
    asked: list[object] = []
    ask = Worker.ask

    def noted(worker: Worker, request: Any) -> None:
        asked.append(request)
        ask(worker, request)

    monkeypatch.setattr(Worker, "ask", noted)
    by_workers = outcome(load_groups(given, None))
    assert len(asked) > 4
    monkeypatch.setattr(loading, "can_fork", lambda: False)
    assert by_workers == outcome(load_groups(given, None))
    assert sum(isinstance(one, str) for one in by_workers) == 2
    assert set(threading.enumerate()) <= before


@pytest.mark.usefixtures("small_groups")
def test_adding_through_workers_stores_what_was_given(files: list[Path], tmp_path: Path) -> None:
    with Store.create(tmp_path / "s") as store:
        results = list(store.add_many(files))
        assert [i for i, one in enumerate(results) if isinstance(one, Refused)] == [11, 17]
        for i in set(range(30)) - {11, 17}:
            want = {t.digest for t in small_task(f"t{i}", seed=i % 7).tensors.values()}
            assert {t.digest for t in store.get(f"t{i}").tensors.values()} == want
        assert store.stats().tensors == len(
            {t.digest for i in range(7) for t in small_task("x", seed=i).tensors.values()}
        )


@pytest.mark.usefixtures("small_groups")
def test_a_killed_worker_costs_nothing(files: list[Path]) -> None:
    groups = load_groups(files, None)
    found = [next(groups)]
    children = {int(pid) for pid in Path("/proc/self/task", str(os.getpid()), "children").read_text().split()}
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    found += groups
    names = [one.name for group in found for one in group if isinstance(one, Loaded)]
    assert names == [f"t{i}" for i in range(30) if i not in (11, 17)]


def test_a_worker_that_dies_is_named_and_leaves_no_child() -> None:
    worker = Worker(lambda request: os._exit(7))
    worker.ask("anything")
    with pytest.raises(WorkerDiedError, match="ended with exit code 7"):
        worker.answer()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, 0)


def test_a_known_digest_is_believed_only_of_equal_bytes(tmp_path: Path) -> None:
    known = ReadBefore()
    for name in "abc":  # the third time it is compared, not hashed
        write_checkpoint(tmp_path / name, small_task(name))
        read_checkpoint(tmp_path / name, known)
    content = bytearray((tmp_path / "c").read_bytes())
    content[-3] ^= 1
    (tmp_path / "c").write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged: its bytes do not hash to its digest"):
        read_checkpoint(tmp_path / "c", known)


@pytest.mark.slow
def test_headers_found_good_change_no_verdict(tmp_path: Path) -> None:
    """Every file of one changed byte is taken or refused alike, whether or not its like was read before."""
    path = tmp_path / "t"
    write_checkpoint(path, small_task())
    good = path.read_bytes()
    length = 8 + int.from_bytes(good[:8], "little")

    def verdict(known: ReadBefore | None = None) -> object:
        try:
            task = read_checkpoint(path, known)
            return dict(task.record), {n: (t.dtype, t.shape, bytes(t.data)) for n, t in task.tensors.items()}
        except CheckpointError as error:
            return str(error)

    refused = 0
    for at in range(0, length, 3):
        path.write_bytes(good[:at] + bytes([good[at] ^ 2]) + good[at + 1 :])
        known = ReadBefore()
        fresh = verdict()
        changed = path.read_bytes()
        path.write_bytes(good)
        verdict(known)
        assert len(known.headers) == 1
        path.write_bytes(changed)
        assert verdict(known) == fresh, at
        refused += isinstance(fresh, str)
    assert refused > length // 6


@pytest.mark.usefixtures("small_groups")
def test_a_generator_is_read_source_by_source(tmp_path: Path) -> None:
    """Its path may hold another task when the next is asked for."""

    def one_path() -> Iterator[Path]:
        for i in range(9):
            write_checkpoint(tmp_path / "same", small_task(f"t{i}", seed=i))
            yield tmp_path / "same"

    def closed_after() -> Iterator[BinaryIO]:
        for path in one_path():
            with open(path, "rb") as file:
                yield file

    for given in (one_path(), closed_after()):
        loaded = [one for group in load_groups(given, None) for one in group if isinstance(one, Loaded)]
        assert [one.name for one in loaded] == [f"t{i}" for i in range(9)]


@pytest.mark.usefixtures("small_groups")
def test_two_adds_at_once_in_one_thread_both_end(files: list[Path]) -> None:
    """The workers of the second hold the pipes of the first's."""
    first, second = load_groups(files, None), load_groups(files, None)
    next(first), next(second)
    assert sum(map(len, first)) == sum(map(len, second)) == 26
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, 0)


@pytest.mark.usefixtures("small_groups")
def test_without_a_process_more_files_are_read_here(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_fork() -> int:
        raise BlockingIOError("Resource temporarily unavailable")

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "fork", no_fork)
    assert sum(map(len, load_groups(files, None))) == 30
    assert len(os.listdir("/proc/self/fd")) == before


def test_large_structures_are_not_kept(tmp_path: Path) -> None:
    from pear_store.format import checkpoint

    task = small_task()
    checkpoint._good_structure.cache_clear()
    adapters = {"a0": {**task.record["adapters"]["a0"], "note": "x" * 100_000}}
    write_checkpoint(tmp_path / "t", make_task({**task.record, "adapters": adapters}, task.tensors))
    read_checkpoint(tmp_path / "t")
    assert checkpoint._good_structure.cache_info().currsize == 0
    write_checkpoint(tmp_path / "t", task)
    read_checkpoint(tmp_path / "t")
    assert checkpoint._good_structure.cache_info().currsize == 1


def test_a_record_of_other_mappings_is_taken() -> None:
    task = small_task()
    adapters = OrderedDict(task.record["adapters"])
    assert make_task({**task.record, "adapters": adapters}, task.tensors).record["adapters"] == adapters


@pytest.mark.usefixtures("small_groups")
def test_a_process_keeps_nothing_of_an_add(files: list[Path], store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of one that ends, nor of one that is left unfinished: no memory, no file, no process."""
    kept: list[weakref.ref[object]] = []

    class Watched(ReadBefore):
        def __init__(self) -> None:
            super().__init__()
            kept.append(weakref.ref(self))

    monkeypatch.setattr(loading, "ReadBefore", Watched)
    before = len(os.listdir("/proc/self/fd"))
    for fork in (True, False):
        monkeypatch.setattr(loading, "can_fork", lambda fork=fork: fork)
        assert len(list(store.add_many(files))) == 30
        unfinished = store.add_many(files)
        next(unfinished)
        del unfinished
    gc.collect()
    assert kept and not any(known() for known in kept)
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, 0)


def test_no_module_keeps_what_grows() -> None:
    """Modules hold constants. What is kept of calls is in caches of bounded size."""
    for module in pkgutil.walk_packages(pear_store.__path__, "pear_store."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, dict | list | set | deque) and not name.startswith("__"):
                assert value, f"{module.name}.{name} begins empty, so it is meant to be filled"
            if hasattr(value, "cache_info"):
                bounded = value.cache_info().maxsize is not None or not inspect.signature(value).parameters
                assert bounded, f"{module.name}.{name} is a cache without a bound"
