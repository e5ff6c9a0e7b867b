"""What the store tests run in processes of their own."""

import time

from pear_store import Store
from tests.conftest import small_task


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


def add_file(path: str, file: str) -> None:
    with Store(path) as store:
        store.add(file)
