"""Makes batches of a list's rows. They are decoded and put on the device ahead of their turn."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, TypeVar

import pyarrow as pa
import torch

from pear_store import PearStoreError, ReadableStore
from pear_store.local.sources import Access, is_url, url_below
from router import Batch, ImageError, Limits, Preprocess, Router, RouterError, decode
from router.batches import put_together
from router.infer.formats.columns import Image
from router.infer.lists import Rows
from router.pictures import LIMITS, ImageLike
from router.preprocess import Spent
from router.registry import Known
from router.threads import side_threads

PART_BATCHES = 16
"""Number of batches in a part. An interruption costs at most a part. Rows of a part share batches by preprocessing."""
AHEAD = 2
"""Number of batches that are decoded and on the device ahead of their turn."""
TASK = pa.field("task", pa.string())
"""A further result if every image goes through several tasks."""
ROW = pa.field("row", pa.int64())
"""A further result if the output is a folder: the number of the row in the list, from 0."""
RESULTS = pa.schema(
    [
        ("version", pa.int64()),
        ("label", pa.string()),
        ("known", pa.bool_()),
        ("probability", pa.float64()),
        ("topk", pa.list_(pa.struct([("label", pa.string()), ("probability", pa.float64())]))),
        ("error", pa.string()),
    ]
)
EMBEDDINGS = pa.schema([("version", pa.int64()), ("embedding", pa.list_(pa.float32())), ("error", pa.string())])
"""Results of features instead of classes."""
LAYOUT = 3
"""Version of the results' layout. A run with another version is not resumed."""
Result = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """Rows of the list that are processed and written together."""

    number: int
    rows: Rows
    results: list[Result]
    """One for each row, or one for each row and task."""


@dataclass(frozen=True)
class Ask:
    """An image, and the tasks of its row that have the same preprocessing."""

    image: ImageLike
    way: Preprocess
    tasks: list[str | Known]
    results: list[Result]
    """One for each task, to fill in."""


@dataclass(frozen=True)
class Work:
    """Asks with images of one size, and the batch on the device. The batch has a row for each ask."""

    asks: list[Ask]
    batch: Batch


@dataclass
class Times:
    """The times of a run, in seconds. Work that happens at the same time counts in full."""

    list_s: float = 0.0
    """Reading the list, and looking up tasks."""
    spent: Spent = field(default_factory=Spent)
    """Reading and decoding files, summed over all threads."""
    transfer_s: float = 0.0
    """Normalising images, and copying them to the device."""
    device_s: float = 0.0
    """Forwards."""
    wait_s: float = 0.0
    """Waiting for images."""
    write_s: float = 0.0
    """Writing parts."""

    def timed(self, name: str, do: Callable[..., T], *args: Any) -> T:
        """Calls `do` and returns its result. Adds its time to the field `name`."""
        began = time.perf_counter()
        try:
            return do(*args)
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - began)

    def seconds(self) -> dict[str, float]:
        """All times by their names, not rounded."""
        return {
            "list_s": self.list_s, "read_s": self.spent.read_s, "decode_s": self.spent.decode_s,
            "transfer_s": self.transfer_s, "device_s": self.device_s, "wait_s": self.wait_s, "write_s": self.write_s,
        }  # fmt: skip

    def report(self) -> dict[str, float]:
        """The same, rounded to milliseconds."""
        return {name: round(seconds, 3) for name, seconds in self.seconds().items()}


class Tasks:
    """The meaning of tasks' names. Each is looked up once, and then keeps its version.

    Args:
        versions: name -> version, from an interrupted run with the same options.
        limits: limits for opening pictures.
        results: the results of a row.
        bare: whether rows without a task get the bare backbone's features.
    """

    def __init__(
        self,
        router: Router,
        store: ReadableStore | None,
        versions: dict[str, int],
        limits: Limits = LIMITS,
        results: pa.Schema = RESULTS,
        bare: bool = False,
    ) -> None:
        self._router, self._store, self._versions = router, store, versions
        self._preprocess = partial(Preprocess, limits=limits, jpegs=router.jpegs)
        self.results, self._bare = results, router.bare if bare else None
        self.find = lru_cache(65_536)(self._find)

    def expect(self, names: Iterable[str | None]) -> None:
        """Fetches tasks from a remote, several at once."""
        with suppress(PearStoreError):
            if self._store is not None:
                self._store.prefetch([name for name in dict.fromkeys(names) if name])

    def _find(self, name: str | None) -> tuple[str | Known, int | None, Preprocess] | str:
        """The task as ``name@version``, its version and preprocessing; or the reason why it cannot be run."""
        if not name and self._bare is not None:
            return self._bare, None, self._preprocess(self._bare.task.preprocess)
        if not name:
            return "the row names no task"
        assert self._store is not None
        try:
            if name not in self._versions:
                self._versions[name] = self._store.resolve(name).version
            version = self._versions[name]
            task = f"{name.partition('@')[0]}@{version}"
            self._router.check(task)
            return task, version, self._preprocess(self._store.record(task)["preprocess"])
        except (RouterError, PearStoreError) as error:
            return str(error)


def gather(
    numbered: Iterable[tuple[int, Rows]],
    tasks: Tasks,
    every: list[str],
    size: int,
    place: Callable[[str, Image], ImageLike],
) -> Iterator[list[Ask] | Part]:
    """For each numbered part of a list, gives the asks of its batches, and then the part itself.

    A batch holds rows with the same preprocessing.

    Args:
        every: tasks that every image goes through; empty if each row has its own.
        size: rows per batch.
        place: gives the path, URL or bytes of an image of the list. It takes the folder where its path starts.
    """
    for number, rows in numbered:
        tasks.expect(every or rows.tasks)
        part = Part(number, rows, [])
        groups: dict[tuple[object, ...], list[list[Ask]]] = {}
        asked_of = zip(rows.images, rows.folders, rows.tasks, rows.faults, strict=True)
        for image, folder, name, fault in asked_of:
            asks: dict[object, Ask] = {}
            for asked in every or (name,):
                part.results.append(result := dict.fromkeys(tasks.results.names))
                known = fault or tasks.find(asked)
                if isinstance(known, str):
                    result["error"] = known
                    continue
                task, result["version"], way = known
                if not image:
                    result["error"] = "the row names no image"
                    continue
                ask = asks.setdefault(way.key, Ask(place(folder, image), way, [], []))
                ask.tasks.append(task)
                ask.results.append(result)
            if asks:
                groups.setdefault(tuple(asks), []).append(list(asks.values()))
        for group in groups.values():
            for start in range(0, len(group), size):
                yield [ask for row in group[start : start + size] for ask in row]
        yield part


def batches(
    numbered: Iterable[tuple[int, Rows]],
    tasks: Tasks,
    every: list[str],
    size: int,
    device: torch.device,
    place: Callable[[str, Image], ImageLike],
    times: Times,
) -> Iterator[Work | Part]:
    """Like `gather`, with the images of each batch decoded and on the device."""
    gathered = gather(numbered, tasks, every, size, place)
    while (item := times.timed("list_s", next, gathered, None)) is not None:
        if isinstance(item, Part):
            yield item
        else:
            pixels = decode([ask.image for ask in item], [ask.way for ask in item], times.spent)
            yield from times.timed("transfer_s", list, load(item, pixels, device))


def load(asks: list[Ask], decoded: Sequence[torch.Tensor | ImageError], device: torch.device) -> Iterator[Work]:
    """Puts decoded images on the device, in a batch for each size. An image that cannot be read only fails its own row.

    Args:
        decoded: the result of `decode` for each ask.
    """
    pixels = {}
    for row, found in enumerate(decoded):
        if isinstance(found, ImageError):
            for result in asks[row].results:
                result["error"] = str(found)
        else:
            pixels[row] = found
    for batch in put_together(pixels, [ask.way for ask in asks], device):
        yield Work([asks[row] for row in batch.rows], batch)


def find_image(access: Access, folder: str, image: Image) -> Image:
    """The image in a form that can be opened here. Relative paths start in the folder, which may be a URL."""
    if isinstance(image, bytes) or access.root is not None:
        return image  # with a root, `access` resolves relative paths
    if is_url(folder):
        return image if "://" in image or "::" in image or os.path.isabs(image) else url_below(folder, image)
    here = os.path.join(folder, image)
    return image if ("://" in image or "::" in image) and not os.path.lexists(here) else here


def ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """The items, made by another thread up to `depth` items ahead."""
    end: Any = object()
    feeder = side_threads(1, "pear-feed")
    try:
        waiting = deque(feeder.submit(next, items, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(feeder.submit(next, items, end))
            yield item
    finally:
        feeder.shutdown(cancel_futures=True)
