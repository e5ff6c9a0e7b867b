"""The router: many tasks, one frozen backbone."""

import os
import threading
from collections.abc import Iterable, Sequence, Sized
from concurrent.futures import Future
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from pear_store import PearStoreError, RawTensor, ReadableStore, Store, Task, make_task, read_checkpoint
from pear_store.counted import counted
from pear_store.local.sources import Access
from pear_store.pools import ThreadPool
from router.adapted import AdaptedBackbone
from router.backbone import Backbone, load_backbone
from router.batches import Batch, Images, as_images, same_images
from router.call import Call, OnError
from router.device import default_device, open_device
from router.engine import Engine
from router.errors import BackboneError, ClosedError, ForkedError, ImageError, RouterError, UnknownTaskError
from router.fit import check_fit
from router.jpegs import JpegDecoder
from router.matrices import Matrices
from router.merge import Merge, Merger
from router.pictures import MAX_PIXELS, Limits
from router.precision import fast_precision
from router.predictions import Predictions, Threshold
from router.registry import Known, Registry
from router.slots import Slots, SlotStats
from router.threads import computing_alone, side_threads

AHEAD = 4
"""Number of threads that preload. A task that is slow to read then does not block the others."""


class Router:
    """Runs any mix of tasks on one frozen backbone.

    Thread-safe: calls from several threads take turns on the device. As a context manager it closes itself.

    A router can be sent to a spawned process if its backbone was given by name. It is made anew there, with the same
    store, weights, options and added tasks. A forked process cannot use it.

    Args:
        backbone: a timm name, a timm module in float32 at its native size, or a loaded Backbone.
        store: where tasks are looked up: a store's directory, a remote's URL (read through a cache), or an open store
            of either kind. None: only added tasks are known.
        weights: a local safetensors file with the weights of a backbone given by name.
        device: such as "cpu", "cuda" or "mps". None: for a backbone given by name a GPU if there is one, else the CPU;
            for another one its own device.
        dtype: compute precision: torch.float32, bfloat16 or float16. "auto": bfloat16 if the device is faster in it,
            else float32. None: float32.
        slot_bytes: the most bytes that loaded tasks may take on the device, with their heads. None: no limit.
        merge: merges a task into copies of the backbone's matrices. "auto": if it runs alone often; True: as soon as it
            runs alone; False: never. Its positions must be Linears or 1x1 convolutions without
            activation. Only one task is merged at a
            time. slot_bytes does not count the copies.
        compile: run mixed batches through torch.compile; a string names its backend. Batches are padded to powers of
            two. Nothing is merged, and batches that share images run eagerly.
        graphs: on a GPU, record small batches as CUDA graphs. A size is recorded when it comes for the second time, and
            is padded to a power of two. It has no effect with `compile`. New: its tests have not run on a GPU yet, and
            nothing was measured.
        max_pixels: pictures with more pixels are refused before they are decoded.
        access: which paths and URLs of pictures may be opened. None: all files, and URLs of the usual protocols.
        jpegs: JpegDecoder("cuda") decodes large JPEGs on a GPU (docs/pictures.md). Levels then differ a little. None:
            Pillow decodes them. New: its tests have not run on a GPU yet, and nothing was measured.
    Raises:
        RouterError: the backbone cannot be loaded, the device cannot be used, or an argument has a bad value.
        PearStoreError: there is no such store.
    """

    @computing_alone()  # else other threads' forwards would stay slower afterwards
    def __init__(
        self,
        backbone: str | nn.Module | Backbone,
        store: str | Path | ReadableStore | None = None,
        *,
        weights: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | Literal["auto"] | None = None,
        slot_bytes: int | None = None,
        merge: Merge = "auto",
        compile: bool | str = False,
        graphs: bool = False,
        max_pixels: int = MAX_PIXELS,
        access: Access | None = None,
        jpegs: JpegDecoder | None = None,
    ) -> None:
        if merge not in (True, False, "auto"):
            raise RouterError(f"merge {merge!r}: expected 'auto', True or False")
        if slot_bytes is not None and slot_bytes < 1:
            raise RouterError(f"slot_bytes {slot_bytes}: expected at least 1, or None for no limit")
        limits = Limits(max_pixels, access or Access())
        self._process = os.getpid()
        self._own_store = isinstance(store, str | Path)
        store = Store.open(store) if isinstance(store, str | Path) else store
        self.backbone = load_backbone(backbone, weights)
        if device is None:
            own = next(self.backbone.module.parameters()).device
            device = default_device() if isinstance(backbone, str) else own
        self.device = open_device(device)
        self.jpegs = jpegs
        dtype = _precision(dtype, self.device)
        self._options = {
            "device": str(self.device), "dtype": dtype, "slot_bytes": slot_bytes, "merge": merge, "compile": compile,
            "graphs": graphs, "max_pixels": max_pixels, "access": access, "jpegs": jpegs,
        }  # fmt: skip
        backend = "inductor" if compile is True else compile or None
        self._adapted = AdaptedBackbone(self.backbone, self.device, dtype, compile=backend)
        self._slots = Slots(Matrices(self.device, dtype, self._adapted.widths), slot_bytes)
        self._registry = Registry(
            store, limits, jpegs, dtype, partial(check_fit, self._adapted), self._slots.__contains__
        )
        self._merger = Merger(self._adapted, False if backend else merge, self._registry.read)
        self._engine = Engine(
            self._adapted, self._slots, self._merger, self._registry,
            compiled=backend is not None, graphs=graphs and backend is None and self.device.type == "cuda",
        )  # fmt: skip
        self._pin_lock = threading.Lock()
        self._ahead: ThreadPool | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        if self.backbone.source is None:
            raise RouterError(
                f"this router cannot be pickled: its backbone {self.backbone.name} was given as a module: give its "
                "timm name, and weights= for a file of weights, or make a router in each process"
            )
        store = self.store.path.absolute() if isinstance(self.store, Store) else self.store
        added = [_own_memory(known.use.read()) for known in self._registry.added()]
        return _make_again, (type(self), *self.backbone.source, self.backbone.digest, store, self._options, added)

    @property
    def store(self) -> ReadableStore | None:
        """The store where tasks are looked up. None if there is none."""
        return self._registry.store

    @store.setter
    def store(self, store: ReadableStore | None) -> None:
        self._registry.store = store

    def close(self) -> None:
        """Waits for calls under way and frees the slots' memory. Later calls raise a ClosedError."""
        if self._process != os.getpid():
            return
        self._registry.close()
        if self._ahead is not None:
            self._ahead.shutdown(cancel_futures=True)
            self._ahead = None
        self._engine.clear()
        if self._own_store and self.store is not None:
            self.store.close()

    def add(self, task: Task | str | Path) -> str:
        """Adds a task that is in no store. It hides a task of the store with the same name.

        Args:
            task: a Task, or the path of a task checkpoint.
        Returns:
            Its name.
        Raises:
            PearStoreError: the checkpoint is refused.
            RouterError: the task cannot run on this backbone.
        """
        self._check_usable()
        task = make_task(task.record, task.tensors) if isinstance(task, Task) else read_checkpoint(task)
        replaced = self._registry.add(task.name, task)
        if replaced is not None:
            self._engine.drop_stale(None, [replaced])
        return task.name

    def added(self) -> list[str]:
        """The names of the added tasks. They hide tasks of the store with the same name."""
        return [known.name for known in self._registry.added()]

    def check(self, tasks: str | Known | Iterable[str | Known]) -> None:
        """Checks that tasks exist, fit the backbone, and fit into the slots together. Needs no image.

        Raises:
            RouterError, PearStoreError: the error that `run` would raise for these tasks together.
        """
        self._engine.check([self._find(task).use for task in _tasks(tasks)])

    def lookup(self, task: str) -> Known:
        """Looks up what a name means now: its version, its record and its preprocessing.

        `check`, `is_loaded`, `preload` and `run_batch` take the result instead of the name. Then they use this version,
        even if `refresh` takes over a newer one meanwhile.

        Raises:
            UnknownTaskError, WrongBackboneError, TaskError, PearStoreError: as for `run`.
        """
        return self._find(task)

    def is_near(self, task: str) -> bool:
        """Whether `lookup` would not ask a remote: the name is kept from before, or the store is a directory."""
        return self.store is None or not self.store.is_remote or self._registry.known(task) is not None

    def is_loaded(self, task: str | Known) -> bool:
        """Whether a task is loaded now, so that a batch need not load it.

        Raises:
            UnknownTaskError, WrongBackboneError, TaskError, PearStoreError: as for `run`.
        """
        return self._find(task).key in self._slots

    @torch.inference_mode()
    def warm_up(self, tasks: str | Iterable[str] = (), batch_sizes: Iterable[int] = (1,)) -> None:
        """Runs the backbone once, on zeros of its native size, so that the first batch is not slower.

        Given tasks, it also loads them and runs zeros through them in batches of each size. With `compile`, this
        compiles the graphs. Later batches of these sizes, rounded up to powers of two, then compile nothing, with any
        mix of these tasks.

        Args:
            tasks: names of tasks; it may be empty.
            batch_sizes: numbers of rows, each at least 1.
        Raises:
            RouterError: the backbone does not run, this router is closed, or a size is below 1.
            RouterError, PearStoreError: a task cannot be run, as for `run`.
        """
        names, sizes = _names(tasks), list(batch_sizes)
        for size in sizes:
            if type(size) is not int or size < 1:
                raise RouterError(f"batch size {size!r:.80}: expected a whole number of at least 1")
        self._check_usable()
        self._adapted.features(torch.zeros(1, 3, *self.backbone.input_size), {}).cpu()
        self._load(names)  # all of them first, because a graph has the positions of all loaded tasks
        alike: dict[tuple[int, int], list[str]] = {}
        for name in names:
            alike.setdefault(self._find(name).preprocess.size, []).append(name)
        for (height, width), group in alike.items():
            for size in dict.fromkeys(sizes):
                images, rows = torch.zeros(size, 3, height, width, device=self.device), np.arange(size)
                self.run_batch(Batch(images, rows, rows), [group[row % len(group)] for row in rows])

    @computing_alone()
    def refresh(self) -> dict[str, int | None]:
        """Takes over changes of the store: newer versions, moved tags, removals. Unchanged tasks stay loaded.

        A newer version of a pinned task is loaded at once. If that fails, the next `run` of the task says why.

        Returns:
            Each changed reference, as `run` was given it -> its version now; None if it no longer exists.
        Raises:
            PearStoreError: the store cannot be read; nothing changed.
        """
        self._check_usable()
        changed = self._registry.refresh()
        self._engine.drop_stale(None, self._slots.keys())
        for name in self._registry.pinned.intersection(changed):
            with suppress(RouterError, PearStoreError):
                self._load([name])
        return changed

    def preload(self, tasks: str | Known | Iterable[str | Known]) -> Future[None]:
        """Loads tasks in the background while batches run, so that the next batch need not load them.

        Returns:
            A future that is done when they are loaded. Its result() raises the error that `run` would raise for them.
        """
        names = _tasks(tasks)
        self._check_usable()
        with self._registry.lock:
            if self._registry.closed:
                raise ClosedError
            if self._ahead is None:
                self._ahead = side_threads(AHEAD, "router-preload")
            ahead = self._ahead
        try:
            return ahead.submit(self._load, names)
        except RuntimeError:  # it was closed meanwhile
            raise ClosedError from None

    def pin(self, tasks: str | Iterable[str]) -> None:
        """Loads tasks and keeps them loaded until `unpin`. `refresh` does the same with their newer versions.

        Raises:
            UnknownTaskError: a task is neither in the store nor added; nothing is pinned.
            SlotBudgetError: they do not fit together with the pinned tasks; nothing is pinned.
            RouterError, PearStoreError: a task cannot be loaded, as for `run`; nothing is pinned.
        """
        names = _names(tasks)
        self._check_usable()
        with self._pin_lock:
            self._engine.check([self._find(name).use for name in names])
            before = self._registry.pinned
            self._registry.pinned = before.union(names)  # first, so that the next load does not evict the last one
            try:
                self._load(names)
            except BaseException:
                self._registry.pinned = before
                raise

    def unpin(self, tasks: str | Iterable[str]) -> None:
        """Lets pinned tasks be evicted again. Names that are not pinned are ignored."""
        names = _names(tasks)
        if self._process != os.getpid():
            raise ForkedError
        with self._pin_lock:
            self._registry.pinned = self._registry.pinned.difference(names)

    def stats(self) -> SlotStats:
        """The number and bytes of loaded tasks, and counts of hits, misses, loads and evictions."""
        if self._process != os.getpid():
            raise ForkedError
        return self._slots.stats

    @torch.inference_mode()
    def run(
        self,
        images: Images,
        task: str | Sequence[str],
        *,
        on_error: OnError = "raise",
        threshold: Threshold = "stored",
    ) -> Predictions:
        """Predicts all images with one task, or each image with a task of its own.

        An image that comes several times, for different tasks, is decoded once. Its forward is shared until the tasks
        differ. Equal are the same object, path or bytes in a list, and the images of a tensor expanded along the batch.

        Args:
            images: a list of PIL images, uint8 or uint16 arrays [h, w], [h, w, 1], [h, w, 3] or [h, w, 4], paths, URLs,
                files' bytes or open files; each task's own preprocessing is applied. Or normalised floats
                [batch, 3, h, w]. One image alone need not be in a list.
            task: ``name``, ``name@version`` or ``name@tag``; or a list with one for each image.
            on_error: "raise": raise the error of the first image or task that fails. "return": put errors into the
                predictions of their rows, and run all others. Then tasks that do not fit into slot_bytes together run
                in parts.
            threshold: the probability below which the likeliest class counts as unknown. "stored": each task's own, if
                it has one; a number from 0 to 1: for all tasks; None: no threshold.
        Returns:
            Predictions in the order of the images. All logits are float32 on the CPU.
        Raises:
            UnknownTaskError: a task is neither in the store nor added.
            WrongBackboneError: a task was made for another backbone.
            TaskError: a task does not fit the backbone, or its tensors are bad.
            ImageError: an image cannot be read, has a wrong type or shape, or is normalised for tasks whose
                preprocessing differs.
            SlotBudgetError: the tasks do not fit into slot_bytes together.
            ClosedError, ForkedError: this router is closed, or this process was forked.
            PearStoreError: the store cannot read a task.
        """
        given = as_images(images)
        if not isinstance(task, str) and not (isinstance(task, list | tuple) and all(isinstance(t, str) for t in task)):
            raise UnknownTaskError(f"task {task!r:.80}: expected a task's name, or a list of one for each image")
        names = [task] * len(given) if isinstance(task, str) else list(task)
        if len(names) != len(given):
            raise ImageError(f"{_both(given, names)}: expected one task, or one for each image")
        call = Call(self._engine, self._find, names, on_error, in_parts=on_error == "return", threshold=threshold)
        call.run_images(given, same_images(given))
        return call.predictions(slice(None))

    @torch.inference_mode()
    def features(self, images: Images, task: str | Sequence[str] | None = None) -> Tensor:
        """The pooled features of images, which heads take as input.

        Args:
            images: as for `run`.
            task: the task whose adapters and preprocessing are used, or a list with one for each image. None: the bare
                backbone with timm's preprocessing.
        Returns:
            float32 [batch, d] on the CPU.
        Raises:
            RouterError, PearStoreError: as for `run`.
        """
        given = as_images(images)
        names: list[str | Known]
        if task is None:
            names = [self.bare] * len(given)
        else:
            names = [task] * len(given) if isinstance(task, str) else [*_names(task)]
        if len(names) != len(given):
            raise ImageError(f"{_both(given, names)}: expected one task, or one for each image")
        call = Call(self._engine, self._find, names, "raise", in_parts=False, without_heads=True)
        call.run_images(given, same_images(given))
        found = call.predictions(slice(None)).logits
        assert isinstance(found, Tensor)
        return found

    @cached_property
    def bare(self) -> Known:
        """The backbone alone, as a task without adapters and head, with timm's preprocessing."""
        return self._registry.bare(self.backbone.name, self.backbone.digest, self.backbone.preprocess)

    @torch.inference_mode()
    def run_all(
        self,
        images: Images,
        tasks: Sequence[str],
        *,
        on_error: OnError = "raise",
        threshold: Threshold = "stored",
    ) -> dict[str, Predictions]:
        """Predicts every image with every task. Work that tasks have in common is done once.

        Tasks that do not fit into slot_bytes together run in parts.

        Args:
            images, on_error, threshold: as for `run`.
            tasks: names of tasks; a repeated name counts once.
        Returns:
            task -> predictions in the order of the images.
        Raises:
            RouterError, PearStoreError: as for `run`.
        """
        given = as_images(images)
        if isinstance(tasks, str):
            raise UnknownTaskError(f"tasks is one name, {tasks!r}: expected a list of names")
        names = list(dict.fromkeys(_names(tasks)))
        if not names:
            return {}
        count = len(given)
        rows = [name for name in names for _ in range(count)]
        call = Call(self._engine, self._find, rows, on_error, in_parts=True, threshold=threshold)
        call.run_images(given, np.tile(same_images(given), len(names)))
        return {name: call.predictions(slice(i * count, (i + 1) * count)) for i, name in enumerate(names)}

    @torch.inference_mode()
    def run_batch(
        self,
        batch: Batch,
        tasks: Sequence[str | Known],
        *,
        on_error: OnError = "raise",
        without_heads: bool = False,
        threshold: Threshold = "stored",
    ) -> Predictions:
        """Predicts a batch that `prepare` made. So images can be decoded ahead of time.

        Args:
            tasks: a task for each row of the batch: a name, or a result of `lookup`. The caller has prepared the images
                as these tasks expect; that is not checked.
            on_error, threshold: as for `run`.
            without_heads: give features instead of logits.
        Returns:
            Predictions in the order of the batch's rows.
        Raises:
            RouterError, PearStoreError: as for `run`.
        """
        names = _tasks(tasks)
        if len(names) != len(batch.rows):
            raise ImageError(f"a batch of {_both(batch.rows, names, 'row')}: expected one for each row")
        call = Call(self._engine, self._find, names, on_error, True, without_heads, threshold)
        call.run(Batch(batch.images, np.arange(len(names)), batch.image_of))
        return call.predictions(slice(None))

    def _check_usable(self) -> None:
        """Raises an error if this router is closed or in a forked process, where its locks may be held for ever."""
        if self._process != os.getpid():
            raise ForkedError
        if self._registry.closed:
            raise ClosedError

    def _find(self, task: str | Known) -> Known:
        self._check_usable()
        return task if isinstance(task, Known) else self._registry.find(task)

    def _load(self, names: Sequence[str | Known]) -> None:
        since = self._registry.changes
        uses = [self._find(name).use for name in dict.fromkeys(names)]
        self._engine.load(uses)
        self._engine.drop_stale(since, [use.key for use in uses])


def _precision(dtype: object, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return fast_precision(device)
    if dtype is None:
        return torch.float32
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise BackboneError(f"dtype {dtype}: expected torch.float32, torch.bfloat16, torch.float16 or 'auto'")
    assert isinstance(dtype, torch.dtype)
    return dtype


def _own_memory(task: Task) -> Task:
    """The task with its own copy of its tensors, because a map cannot be pickled."""
    tensors = {key: RawTensor(raw.dtype, raw.shape, bytes(raw.data)) for key, raw in task.tensors.items()}
    return Task(dict(task.record), tensors)


def _make_again(
    kind: type[Router],
    backbone: str,
    weights: str | None,
    digest: str,
    store: Path | ReadableStore | None,
    options: dict[str, Any],
    added: list[Task],
) -> Router:
    """Makes the router of another process anew."""
    router = kind(backbone, store, weights=weights, **options)
    if router.backbone.digest != digest:
        raise BackboneError(
            f"backbone {backbone}: expected the weights of the process that this router came from, found others: give "
            "both processes the same weights"
        )
    for task in added:
        router.add(task)
    return router


def _names(tasks: str | Iterable[str]) -> list[str]:
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    for name in names:
        if not isinstance(name, str):
            raise UnknownTaskError(f"task {name!r:.80}: expected a task's name")
    return names


def _tasks(tasks: str | Known | Iterable[str | Known]) -> list[str | Known]:
    found = [tasks] if isinstance(tasks, str | Known) else list(tasks)
    _names(task for task in found if not isinstance(task, Known))
    return found


def _both(images: Sized, tasks: Sized, noun: str = "image") -> str:
    """How many images and tasks there are, where the numbers should be equal."""
    return f"{counted(len(images), noun)} but {counted(len(tasks), 'task')}"
