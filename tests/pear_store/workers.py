"""What the store tests run in processes of their own."""

import time

from pear_store import NotFoundError, Store, rebuild
from tests.makers import small_task


def add_and_acknowledge(path: str, worker: int, seconds: float) -> None:
    """Adds tasks until time is up or it is killed; prints each name once add has returned."""
    end = time.monotonic() + seconds
    i = 0
    with Store(path) as store:
        while time.monotonic() < end:
            batch = [small_task(f"w{worker}-{i + k}", seed=(i + k) % 7 + 10 * worker) for k in range(3)]
            list(store.add_many(batch))
            print(*(task.name for task in batch), flush=True)
            i += 3


def gc_loop(path: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    with Store(path) as store:
        while time.monotonic() < end:
            store.gc(repack_all=True)
            print("gc", flush=True)


def rebuild_loop(path: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        rebuild(path)
        print("rebuilt", flush=True)


def read_loop(path: str, seconds: float) -> None:
    """Reads whatever is there; prints how many tasks it got and any error that is not that a task was removed."""
    end = time.monotonic() + seconds
    count = 0
    with Store(path) as store:
        while time.monotonic() < end:
            for version in store.tasks()[-20:]:
                try:
                    task = store.get(f"{version.task}@{version.version}", copy=count % 2 == 0)
                    seed = int(version.task.split("-")[1]) % 7 + 10 * int(version.task[1 : version.task.index("-")])
                    want = {t.digest for t in small_task(version.task, seed=seed).tensors.values()}
                    assert {t.digest for t in task.tensors.values()} == want
                    count += 1
                except NotFoundError:
                    continue
    print(count)


def remove_and_gc_loop(path: str, worker: int, seconds: float) -> None:
    """Adds and removes tasks of its own, and collects."""
    end = time.monotonic() + seconds
    i = 0
    with Store(path) as store:
        while time.monotonic() < end:
            list(store.add_many([small_task(f"w{worker}-{i + k}", seed=(i + k) % 7 + 10 * worker) for k in range(4)]))
            store.remove(*(f"w{worker}-{i + k}" for k in range(4)))
            store.gc(repack_all=i % 3 == 0)
            i += 4
    print(i)


def add_file(path: str, file: str) -> None:
    with Store(path) as store:
        store.add(file)
