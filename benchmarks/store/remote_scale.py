#!/usr/bin/env python3
"""What little things cost on a remote of 100,000 tasks, in a directory: objects and bytes that are asked for.

    python -m benchmarks.store.remote_scale --out benchmarks/results/remote_scale.json

Tasks are those of benchmarks.store.scale: 10 tensors of 256 to 512 bytes, 60 % of them from a pool of 2,000. They
are added and pushed in runs of 5,000; run again, it goes on after the last. Then little things are done by new stores,
and by the one that knows all.
"""

import json
import os
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from benchmarks.store.scale import RUN, make_tasks, memory_bytes
from pear_store import Store
from pear_store.remote.directory import DirectoryPlace
from pear_store.remote.mirror import opened_mirror
from pear_store.remote.place import Place, Range
from pear_store.remote.pull import pull
from pear_store.remote.push import push
from pear_store.remote.reading import read_on
from pear_store.remote.remotes import init_remote


class CountingPlace(Place):
    """A directory; what is asked for is counted."""

    def __init__(self, path: Path) -> None:
        self._place = DirectoryPlace(path)
        self.url = self._place.url
        self.begin()

    def begin(self) -> None:
        self.asked: Counter[str] = Counter()
        self.read_bytes = self.sent_bytes = 0

    def _note(self, verb: str, name: str) -> None:
        self.asked[f"{verb} {name.split('/')[0]}"] += 1

    def get(self, name: str, at_most: int) -> bytes:
        self._note("get", name)
        data = self._place.get(name, at_most)
        self.read_bytes += len(data)
        return data

    def get_ranges(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        self._note("get_ranges", name)
        found = self._place.get_ranges(name, ranges)
        self.read_bytes += sum(map(len, found))
        return found

    def put(self, name: str, data: bytes) -> None:
        self._note("put", name)
        self.sent_bytes += len(data)
        self._place.put(name, data)

    def create(self, name: str, data: bytes) -> bool:
        self._note("create", name)
        self.sent_bytes += len(data)
        return self._place.create(name, data)

    def list(self, prefix: str) -> Iterator[str]:
        self._note("list", prefix)
        return self._place.list(prefix)

    def delete(self, name: str) -> None:
        self._note("delete", name)
        self._place.delete(name)


def measured(place: CountingPlace, act: Callable[[], object]) -> dict[str, Any]:
    place.begin()
    start = time.perf_counter()
    act()
    return {
        "seconds": round(time.perf_counter() - start, 3), "requests": sum(place.asked.values()),
        "read_bytes": place.read_bytes, "sent_bytes": place.sent_bytes, "asked": dict(sorted(place.asked.items())),
    }  # fmt: skip


class Client:
    """A store and what it knows of the remote."""

    def __init__(self, folder: Path, place: CountingPlace) -> None:
        folder.mkdir(exist_ok=True)
        path = folder / "store"
        self.store = Store(path) if path.exists() else Store.create(path)
        self._mirror, self.place = folder / "mirror", place

    def push(self, *tasks: str) -> None:
        with opened_mirror(self._mirror, self.place.url) as mirror:
            push(self.store._open, self.place, mirror, set(tasks) or None)

    def pull(self, *patterns: str) -> int:
        with opened_mirror(self._mirror, self.place.url) as mirror:
            return pull(self.store._open, self.place, mirror, (), patterns).read_bytes

    def know_all(self) -> None:
        """What a clone of everything reads before tensors."""
        with opened_mirror(self._mirror, self.place.url) as mirror:
            read_on(mirror, self.place)
            mirror.need_all("tasks")

    def add(self, number: int) -> str:
        task = next(make_tasks(number, 1))
        self.store.add(task)
        return str(task.record["task"])


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--tasks", default=100_000, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/remote_scale"), show_default=True)
def main(out: Path, tasks: int, work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    first = push_all(tasks, work)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        found = measure(tasks, first, work / "remote", Path(folder))
    out.write_text(json.dumps(found, indent=1) + "\n")
    click.echo(json.dumps({name: value for name, value in found.items() if name != "machine"}, indent=1))


def push_all(tasks: int, folder: Path) -> "Client":
    """Pushes tasks in runs; what a run before this one has pushed is there."""
    init_remote(str(folder / "remote"))
    first = Client(folder / "first", CountingPlace(folder / "remote"))
    start = time.perf_counter()
    there = len(first.store.tasks()) // RUN - 1  # the last run may not have been pushed
    for done in range(max(there, 0) * RUN, tasks, RUN):
        count = min(RUN, tasks - done)
        for _ in first.store.add_many(make_tasks(done, count)):
            pass
        first.push(*(f"task-{number:06}" for number in range(done, done + count)))
        click.echo(f"{done + count}: {time.perf_counter() - start:.0f} s", err=True)
    return first


def measure(tasks: int, first: "Client", remote: Path, folder: Path) -> dict[str, Any]:
    place, sent = first.place, Counter[str]()
    for folder_name in ("index", "base", "packs"):
        files = [file for file in (remote / folder_name).rglob("*") if file.is_file()]
        sent[f"{folder_name}_bytes"] = sum(file.stat().st_size for file in files)
        sent[f"{folder_name}_objects"] = len(files)
    found: dict[str, Any] = {
        "tasks": tasks, "remote": dict(sent),
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform()},
    }  # fmt: skip
    new = int(time.time())  # numbers of tasks that no run before this one has made
    name = first.add(new)
    found["push_one_named"] = measured(place, lambda: first.push(name))
    first.add(new + 1)
    found["push_all_of_which_one_is_new"] = measured(place, first.push)
    first.store.close()
    fresh = Client(folder / "fresh", place)
    fresh.add(new + 2)
    found["first_push_of_a_new_store"] = measured(place, fresh.push)
    fresh.add(new + 3)
    found["second_push_of_a_new_store"] = measured(place, fresh.push)
    fresh.store.close()
    ten = Client(folder / "ten", place)
    with closing(ten.store):
        read: list[int] = []
        pattern = f"task-{tasks // 20:05}*"
        found["clone_of_10"] = measured(place, lambda: read.append(ten.pull(pattern)))
        found["clone_of_10"] |= {"tasks": len(ten.store.tasks()), "tensor_bytes": read[0]}
    every = Client(folder / "every", place)
    with closing(every.store):
        found["mirror_of_a_whole_clone"] = measured(place, every.know_all)
    return found | {"memory_bytes": memory_bytes()}


if __name__ == "__main__":
    main()
