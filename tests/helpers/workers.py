"""What the store tests run in processes of their own."""

import json
import os
import random
import time
from itertools import chain
from pathlib import Path
from typing import Any

from pear_store import Added, NotFoundError, Store, rebuild
from pear_store.local import loading
from tests.helpers.makers import small_task


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


def add_files_and_acknowledge(path: str, folder: str) -> None:
    """Adds a folder's files through forked workers, a few a commit; prints the workers, then the name of what is in."""
    loading.GROUP_TASKS, loading.GROUP_BYTES = 4, 1 << 14
    vars(loading)["can_fork"] = lambda: True  # numpy, imported by the makers of tasks, has threads that idle
    os.sched_getaffinity = lambda pid: {0, 1}
    with Store(path) as store:
        results = store.add_many(sorted(Path(folder).iterdir()))
        first = next(results)
        print(Path(f"/proc/self/task/{os.getpid()}/children").read_text(), flush=True)
        for result in chain([first], results):
            assert isinstance(result, Added)
            print(result.task, flush=True)


def change_and_say(path: str, seed: int) -> None:
    """Changes a store in many ways; says as JSON what it should hold: ["plan", state] before, ["done", state] after.

    A state is {"versions": {"t0@2": seed of its tensors}, "tags": {"t0": {"prod": 2}}}.
    """
    rng = random.Random(seed)
    versions: dict[str, int] = {}
    tags: dict[str, dict[str, int]] = {}
    highest: dict[str, int] = {}

    def say(word: str) -> None:
        text = json.dumps([word, {"versions": versions, "tags": tags}]) + "\n"
        os.write(1, text.encode())

    store = Store.create(path)
    say("done")
    for step in range(24):
        work = ["add", "add", "many", "remove", "tag", "gc", "add", "repack", "rebuild"][step % 9]
        if work in ("add", "many"):
            added: list[Any] = []
            for name in rng.sample(["t0", "t1", "t2", "t3", "t4"], 3 if work == "many" else 1):
                highest[name] = highest.get(name, 0) + 1
                versions[f"{name}@{highest[name]}"] = 100 * step + len(added)
                added.append(small_task(name, seed=100 * step + len(added)))
            say("plan")
            for result in store.add_many(added):
                assert isinstance(result, Added) and result.changed, result
        elif work == "remove":
            name, _, number = rng.choice(sorted(versions)).partition("@")
            if int(number) in tags.get(name, {}).values():
                continue
            del versions[f"{name}@{number}"]
            say("plan")
            store.remove(f"{name}@{number}")
        elif work == "tag":
            name, _, number = rng.choice(sorted(versions)).partition("@")
            tags.setdefault(name, {})["prod"] = int(number)
            say("plan")
            store.tag(f"{name}@{number}", "prod")
        elif work == "rebuild":
            store.close()
            rebuild(path)
            store = Store(path)
        else:
            store.gc(repack_all=work == "repack")
        say("done")
    store.close()
