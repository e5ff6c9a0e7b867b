"""Forks in the middle of work, for the tests of forked children: some in processes of their own."""

import gc as garbage
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pear_store import PearStoreError, Store, Task, rebuild
from pear_store.local import verify as integrity
from tests.helpers.makers import small_task

LIMIT_S = 60


def contents(task: Task) -> dict[str, bytes]:
    return {tensor.digest: bytes(tensor.data) for tensor in task.tensors.values()}


def in_child(act: Callable[[], object], leave: Callable[[int], None] = os._exit) -> None:
    """Runs `act` in a forked child, which must end well, and soon."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(LIMIT_S)  # a child that hangs is killed
            act()
            code = 0
        except BaseException as error:
            os.write(2, f"in the child: {error!r}\n".encode())
        leave(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, f"the child ended with {code}"


def use(store: Store, name: str) -> None:
    """Everything that a child may want."""
    assert contents(store.get("dtd")) == contents(small_task())
    assert store.add(small_task(name, seed=sum(map(ord, name)))).changed
    assert [version.task for version in store.iter_tasks()]
    store.gc(repack_all=True)


def fork_while_threads_work(path: str, work: str, leave: Callable[[int], None]) -> None:
    store = Store(path)
    done = threading.Event()
    wrong: list[BaseException] = []
    acts: dict[str, Callable[[int], object]] = {
        "add": lambda i: store.add(small_task(f"t{i % 40}", seed=i)),
        "get": lambda i: store.get("dtd", copy=i % 2 == 0),
        "iterate": lambda i: list(store.iter_tasks()),
        "gc": lambda i: store.gc(repack_all=i % 2 == 0),
        "verify": lambda i: integrity.check(Path(path)),
        "rebuild": lambda i: rebuild(path),
    }

    def run(number: int) -> None:
        i = number
        while not done.is_set():
            try:
                acts[work](i)
            except BaseException as error:
                wrong.append(error)
                return
            i += 3
            time.sleep(0.005)  # the lock is nobody's in turn: a child must come to it, too

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        for i in range(3):
            time.sleep(0.02)
            in_child(partial(use, store, f"child{i}"), leave)
            store.add(small_task(f"parent{i}", seed=100 + i))
    finally:
        done.set()
        for thread in threads:
            thread.join(LIMIT_S)
    assert wrong == [], wrong
    assert not any(thread.is_alive() for thread in threads)
    assert {f"{who}{i}" for who in ("child", "parent") for i in range(3)} <= {v.task for v in store.tasks()}


def fork_in_an_iteration(path: str, leave: str) -> None:
    store = Store(path)
    iteration: Any = store.iter_tasks()
    names = [next(iteration).task]
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT_S)
        try:
            next(iteration)
            os._exit(3)  # it is the parent's
        except PearStoreError as error:
            assert "began before the process was forked" in str(error)
        if leave == "unwind":
            iteration.close()
            del iteration
            garbage.collect()
        use_again = [version.task for version in store.iter_tasks()]
        assert len(use_again) == 120
        if leave == "os._exit":
            os._exit(0)
        sys.exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with Store(path) as other:
        for i in range(30):  # writers overwrite the pages that no reader is known to read
            other.add(small_task(f"new{i}", seed=1000 + i))
            if i % 5 == 0:
                other.remove(f"t{100 + i // 5}")
                other.gc(repack_all=True)
    names += [version.task for version in iteration]
    print(*names)
