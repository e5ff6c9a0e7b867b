"""The router: many tasks, one frozen backbone."""

import itertools
import json
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from os import PathLike, fspath
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pear_store import NotFoundError, PearStoreError, RawTensor, Store, Task, Version, make_task, read_checkpoint
from pear_store.format.checkpoint import check_record
from pear_store.local.sources import Access
from router.backbone import AdaptedBackbone, Backbone, load_backbone, open_device
from router.errors import (
    BackboneError,
    ClosedError,
    ForkedError,
    ImageError,
    RouterError,
    SlotBudgetError,
    TaskError,
    UnknownTaskError,
    WrongBackboneError,
)
from router.merge import Merge, Merger
from router.pictures import MAX_PIXELS, ImageLike, Limits, check_reading
from router.precision import fast_precision
from router.preprocess import Preprocess, prepare
from router.slots import LoadedTask, Slots, SlotStats, Use, without_bytes
from router.tensors import all_finite
from router.trie import Ints, bucket, by_level, plan

PIXELS = 512 * 224 * 224
"""Most pixels of the images that are decoded together, and of one forward: longer lists go in parts."""
READ_AHEAD = 16
"""Most tasks that are held as read from the store; each may hold the map of a pack, and a descriptor."""
KNOWN_TASKS = 4096
"""Of some 50 KB each: most tasks that stay looked up although they are not loaded."""
SHARED_ROWS, SHARED_PIXELS_CPU = 512, 64 * 224 * 224
"""Most rows of one forward in which images are shared: more would only cost memory. On a CPU, whose caches hold few,
rows of several images have together at most so many pixels; rows of one, whose trunk runs once, may have more."""

Images = Tensor | Sequence[ImageLike] | NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True)
class Predictions:
    """What tasks say of a batch of images, in the images' order.

    `logits` is a float32 tensor [batch, classes] where all rows have equally many classes, else a list of [classes];
    for a task without head, they are its features. `classes` are each row's class names.

    A row whose numbers are not finite, because they overflowed or the image held NaN, has no label: `errors` says so,
    and no other row is touched by it.
    """

    logits: Tensor | list[Tensor]
    tasks: list[str]
    classes: list[tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def probs(self) -> Tensor | list[Tensor]:
        """Softmax of the logits, in the same form."""
        if isinstance(self.logits, Tensor):
            return self.logits.softmax(-1)
        return [row.softmax(-1) for row in self.logits]

    @cached_property
    def finite(self) -> list[bool]:
        """Whether all logits of a row are numbers, neither NaN nor infinite."""
        if isinstance(self.logits, Tensor):
            flags: list[bool] = self.logits.isfinite().all(-1).tolist()
            return flags
        return [bool(row.isfinite().all()) for row in self.logits]

    @property
    def errors(self) -> list[str | None]:
        """Why a row has no answer; None where it has one."""
        reason = "gives NaN or infinity for this image: use dtype float32, or mend the image"
        return [
            None if finite else f"task {task!r} {reason}" for task, finite in zip(self.tasks, self.finite, strict=True)
        ]

    @property
    def labels(self) -> list[str | None]:
        """The likeliest class's name of each image; None for a task without head, and where `errors` has something."""
        return [
            names[int(row.argmax())] if names and finite else None
            for row, names, finite in zip(self.logits, self.classes, self.finite, strict=True)
        ]

    def topk(self, k: int) -> list[list[tuple[str, float]]]:
        """The k likeliest classes of each image with their probabilities, best first; none where there is no label.

        Raises:
            RouterError: k is below 1.
        """
        if k < 1:
            raise RouterError(f"k {k}: expected at least 1")
        found = []
        for row, names, finite in zip(self.probs, self.classes, self.finite, strict=True):
            values, indices = row.topk(min(k, len(names)) if finite else 0)
            found.append([(names[i], p) for i, p in zip(indices.tolist(), values.tolist(), strict=True)])
        return found


@dataclass(frozen=True)
class _Known:
    """A task as looked up, and its preprocessing."""

    use: Use
    preprocess: Preprocess
    version: Version | None
    """What the store had when it was looked up; None for a task that was added."""

    @property
    def key(self) -> Hashable:
        return self.use.key

    @property
    def task(self) -> Task:
        return self.use.task


class Router:
    """Runs any mix of tasks on one frozen backbone.

    Thread-safe: calls from several threads take turns on the device. A context manager, which closes it.

    A router can be sent to a spawned process if its backbone was given by name. It is made anew there, from the same
    store, weights and options, and with the tasks that were added. A forked process cannot use it.

    Args:
        backbone: a timm name, a timm module at native size in float32, or a loaded Backbone.
        store: a store's directory or an open Store to look tasks up in.
        weights: a local safetensors file with the weights of a backbone given by name.
        device: such as "cpu", "cuda" or "mps"; the backbone's own where a module is given, else the CPU.
        dtype: compute precision: torch.float32 (default), bfloat16 or float16; "auto": bfloat16 where the device is
            faster in it, else float32.
        slot_bytes: the most bytes that loaded tasks may take on the device, heads included; None for no limit.
        merge: "auto" merges a task that runs alone often into copies of the backbone's matrices, where its positions
            are Linears without activation; True does so at once, False never. One task at a time; the copies are
            not counted in slot_bytes.
        compile: run mixed batches through torch.compile; a string names its backend. Batches are padded to powers
            of two. Nothing is merged, and batches that share images run eagerly.
        max_pixels: pictures with more pixels are refused before they are decoded.
        access: which paths and URLs of pictures may be opened; by default all files, and URLs of usual protocols.

    Raises:
        RouterError: the backbone cannot be loaded.
        PearStoreError: there is no such store.
    """

    def __init__(
        self,
        backbone: str | nn.Module | Backbone,
        store: str | Path | Store | None = None,
        *,
        weights: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | Literal["auto"] | None = None,
        slot_bytes: int | None = None,
        merge: Merge = "auto",
        compile: bool | str = False,
        max_pixels: int = MAX_PIXELS,
        access: Access | None = None,
    ) -> None:
        if merge not in (True, False, "auto"):
            raise RouterError(f"merge {merge!r}: expected 'auto', True or False")
        if slot_bytes is not None and slot_bytes < 1:
            raise RouterError(f"slot_bytes {slot_bytes}: expected at least 1, or None for no limit")
        self._limits = Limits(max_pixels, access or Access())
        self._process = os.getpid()
        self._own_store = isinstance(store, str | Path)
        self.store = Store(store) if isinstance(store, str | Path) else store
        self.backbone = load_backbone(backbone, weights)
        if device is None:
            device = next(self.backbone.module.parameters()).device
        self.device = open_device(device)
        if dtype == "auto":
            dtype = fast_precision(self.device)
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise BackboneError(f"dtype {dtype}: expected torch.float32, torch.bfloat16, torch.float16 or 'auto'")
        dtype = dtype or torch.float32
        self._options = {
            "device": str(self.device), "dtype": dtype, "slot_bytes": slot_bytes, "merge": merge, "compile": compile,
            "max_pixels": max_pixels, "access": access,
        }  # fmt: skip
        backend = "inductor" if compile is True else compile or None
        self._adapted = AdaptedBackbone(self.backbone, self.device, dtype, compile=backend)
        self._slots = Slots(self.device, dtype, self._adapted.widths, slot_bytes)
        self._compiled = backend is not None
        self._lock = threading.Lock()  # held for moments, to change what is known; nothing is read or run meanwhile
        self._device_lock = threading.RLock()
        self._pin_lock = threading.Lock()
        self._known: dict[str, _Known] = {}
        """Tasks of the store as they were looked up, the oldest first."""
        self._versions: dict[str, Version] = {}
        """What references stand for until the next refresh; of all that were asked for."""
        self._read: dict[Hashable, Task] = {}
        """Tasks that were looked up just now and will be loaded next."""
        self._added: dict[str, _Known] = {}
        """Tasks given to `add`, which come before the store's."""
        self._refreshes = 0
        self._pinned: frozenset[str] = frozenset()
        self._ahead: ThreadPoolExecutor | None = None
        self._closed = False
        self._merger = Merger(self._adapted, False if backend else merge, self._is_live)
        self._numbers = itertools.count()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        if self.backbone.source is None:
            raise RouterError(
                f"this router cannot be pickled: its backbone {self.backbone.name} was given as a module; give its "
                "timm name, and weights= for a file of weights, or make a router in each process"
            )
        store = None if self.store is None else self.store.path.absolute()
        added = [_own_memory(known.task) for known in self._added.values()]
        return _make_again, (type(self), *self.backbone.source, self.backbone.digest, store, self._options, added)

    def _check_usable(self) -> None:
        """Raises where this router was closed, or is in a forked process, in which its locks may be held for ever."""
        if self._process != os.getpid():
            raise ForkedError
        if self._closed:
            raise ClosedError

    def close(self) -> None:
        """Gives the slots' memory back, after calls under way; later calls raise a ClosedError."""
        if self._process != os.getpid():
            return
        with self._lock:
            self._closed = True
        if self._ahead is not None:
            self._ahead.shutdown(cancel_futures=True)
            self._ahead = None
        with self._device_lock:
            self._known, self._added, self._versions, self._read = {}, {}, {}, {}
            self._slots.clear()
            self._merger.ran(0)
            if self._own_store and self.store is not None:
                self.store.close()

    def add(self, task: Task | str | Path) -> str:
        """Makes a task known that is in no store, from a checkpoint; returns its name.

        Raises:
            PearStoreError: the checkpoint is refused.
            RouterError: it is for another backbone.
        """
        self._check_usable()
        task = make_task(task.record, task.tensors) if isinstance(task, Task) else read_checkpoint(task)
        name = task.name
        for key, raw in task.tensors.items():
            if len(raw.data) != raw.size_bytes:
                raise TaskError(name, f"tensor {key!r} has {len(raw.data)} bytes: its shape takes {raw.size_bytes}")
        self._check(name, task)
        known = self._make_known(name, task, None, lambda: task)
        with self._lock:
            if self._closed:
                raise ClosedError
            before = self._get(name)
            self._added[name] = known
        if before is not None:
            self._slots.evict(before.key)
        return name

    def check(self, task: str) -> None:
        """Raises what `run` would raise for this task, before any image is given."""
        self._slots.check([self._find(task).use], self._pinned_keys())

    def refresh(self) -> dict[str, int | None]:
        """Takes up what changed in the store: newer versions, moved tags, removals; what did not change is kept.

        A newer version of a pinned task is loaded at once; should that fail, its next `run` says why.

        Returns:
            The references that changed, as `run` was given them, and the version that each stands for now; None where
            there is none any more.

        Raises:
            PearStoreError: the store cannot be read; nothing changed.
        """
        self._check_usable()
        before = {name: version for name, version in dict(self._versions).items() if name not in self._added}
        versions = {name: self._version(name) for name in before}
        changed = {name: now for name, now in versions.items() if not _same(before[name], now)}
        with self._lock:  # what came meanwhile is looked up again: it may be older than this call
            self._refreshes += 1
            self._known = {n: one for n, one in self._known.items() if n in before and n not in changed}
            self._versions = {n: version for n, version in before.items() if n not in changed}
        self._drop_stale(self._slots.keys())
        for name in self._pinned.intersection(changed):
            with suppress(RouterError, PearStoreError):
                self._load([name])
        return {name: None if now is None else now.version for name, now in changed.items()}

    def preload(self, tasks: str | Iterable[str]) -> Future[None]:
        """Loads tasks in the background, while batches run, so that the next batch finds them in their slots.

        Returns:
            A future, done when they are loaded; its result() raises what `run` would raise for them.
        """
        names = _names(tasks)
        self._check_usable()
        with self._lock:
            if self._closed:
                raise ClosedError
            if self._ahead is None:
                self._ahead = ThreadPoolExecutor(1, "router-preload")
            return self._ahead.submit(self._load, names)

    def _load(self, names: Sequence[str], pin: bool = False) -> None:
        uses = self._uses(names)
        read = self._read_ahead(uses)
        with self._slots.lock:
            self._slots.load(uses, self._pinned_keys(), True, read)
            if pin:
                self._pinned = self._pinned.union(names)
        self._drop_stale(use.key for use in uses)

    def pin(self, tasks: str | Iterable[str]) -> None:
        """Loads tasks and keeps them loaded until `unpin`, whatever else asks for their slots; so their newer versions.

        Raises:
            UnknownTaskError: a task that neither the store nor `add` knows; nothing is pinned.
            SlotBudgetError: they do not fit beside what is pinned; nothing is pinned.
        """
        names = _names(tasks)
        self._check_usable()
        with self._pin_lock:
            self._load(names, pin=True)

    def unpin(self, tasks: str | Iterable[str]) -> None:
        """Lets pinned tasks go when their slots are needed; names that are not pinned are passed over."""
        names = _names(tasks)
        if self._process != os.getpid():
            raise ForkedError
        with self._pin_lock:
            self._pinned = self._pinned.difference(names)

    def stats(self) -> SlotStats:
        """What is loaded now, and counts of hits, misses, loads and evictions."""
        if self._process != os.getpid():
            raise ForkedError
        return self._slots.stats

    @torch.inference_mode()
    def run(self, images: Images, task: str | Sequence[str]) -> Predictions:
        """Predictions of one task for all images, or of one task for each image.

        An image that is given for several tasks is decoded once, and its forward shared until they part: the same
        object or path again in a list, or a tensor expanded along the batch.

        Args:
            images: float tensor [batch, 3, h, w], normalised; or a list of PIL images, uint8 or uint16 arrays [h, w],
                [h, w, 1], [h, w, 3] or [h, w, 4], paths, URLs or files' bytes, to which each task's own preprocessing
                is applied.
            task: ``name`` or ``name@version``; or one for each image.

        Raises:
            UnknownTaskError: a task that neither the store nor `add` knows.
            WrongBackboneError: a task made for another backbone.
            ImageError: images of a wrong kind or shape, or normalised ones for tasks of unlike preprocessing.
            SlotBudgetError: the tasks do not fit into slot_bytes together.
        """
        _check_images(images)
        if not isinstance(task, str) and not (isinstance(task, list | tuple) and all(isinstance(t, str) for t in task)):
            raise UnknownTaskError(f"task {task!r:.80}: expected a task's name, or a list of one for each image")
        count = len(images)
        names = [task] * count if isinstance(task, str) else list(task)
        if len(names) != count:
            raise ImageError(f"{count} images but {len(names)} tasks: expected one task, or one for each image")
        logits, tasks = self._logits(images, _same_images(images), names)
        return _predictions(logits, names, tasks)

    @torch.inference_mode()
    def run_all(self, images: Images, tasks: Sequence[str]) -> dict[str, Predictions]:
        """Every image through every task: {task: predictions}. See `run` for arguments and errors.

        What tasks have in common is computed once. Tasks that do not fit into slot_bytes together run in parts.
        """
        _check_images(images)
        if isinstance(tasks, str):
            raise UnknownTaskError(f"tasks is one name, {tasks!r}: expected a list of names")
        names = list(dict.fromkeys(_names(tasks)))
        if not names:
            return {}
        count = len(images)
        each = [name for name in names for _ in range(count)]
        logits, known = self._logits(images, np.tile(_same_images(images), len(names)), each, in_parts=True)
        return {
            name: _predictions(logits[i * count : (i + 1) * count], [name] * count, known)
            for i, name in enumerate(names)
        }

    def _logits(
        self, images: Images, image_of: Ints, names: list[str], in_parts: bool = False
    ) -> tuple[list[Tensor], dict[str, _Known]]:
        """float32 [classes] of each row, an image and a task; and the tasks as they were found.

        Args:
            in_parts: tasks that do not fit into the slots together may take turns.
        """
        if not names:
            raise ImageError("no images: expected at least one")
        tasks = {name: self._find(name) for name in dict.fromkeys(names)}
        turns = [set(tasks)]
        if any(known.key not in self._slots for known in tasks.values()):
            turns = self._turns(tasks, list(tasks), in_parts)
        logits: list[Tensor] = [torch.empty(0)] * len(names)
        for rows, batch, picked in self._batches(images, image_of, names, tasks):
            pixels = batch.shape[2] * batch.shape[3]
            most = max(1, PIXELS // pixels)
            shared = min(SHARED_ROWS, most)
            together = min(shared, SHARED_PIXELS_CPU // pixels) if self.device.type == "cpu" else shared
            for turn in turns:
                mine = np.arange(len(rows))
                if len(turns) > 1:
                    mine = np.array([i for i, row in enumerate(rows) if names[row] in turn], np.int64)
                for part in _parts(picked[mine], together, shared, most):
                    places = mine[part]
                    found = self._forward(batch, picked[places], [tasks[names[rows[i]]] for i in places])
                    for i, values in zip(places, found, strict=True):
                        logits[rows[i]] = values
        return logits, tasks

    def _turns(self, tasks: dict[str, _Known], names: list[str], in_parts: bool) -> list[set[str]]:
        """Sets of tasks that fit into the slots together."""
        try:
            self._slots.check([tasks[name].use for name in names], self._pinned_keys())
        except SlotBudgetError:
            if len(names) == 1 or not in_parts:
                raise
            half = len(names) // 2
            return self._turns(tasks, names[:half], True) + self._turns(tasks, names[half:], True)
        return [set(names)]

    def _batches(
        self, images: Images, image_of: Ints, names: list[str], tasks: dict[str, _Known]
    ) -> Iterator[tuple[list[int], Tensor, Ints]]:
        """The images as normalised batches of one preprocessing each: row numbers, images, and each row's image."""
        if isinstance(images, Tensor):
            if len({known.preprocess.key for known in tasks.values()}) > 1:
                listed = ", ".join(repr(name) for name in tasks)
                raise ImageError(f"tasks {listed} differ in preprocessing: give a list of images, not one tensor")
            (size,) = {known.preprocess.size for known in tasks.values()}
            if tuple(images.shape[2:]) != size:
                found = f"{images.shape[2]} x {images.shape[3]}"
                raise ImageError(f"images of {found} pixels: the tasks expect {size[0]} x {size[1]}")
            yield list(range(len(names))), images, image_of
            return
        sizes = {known.preprocess.key: known.preprocess.size for known in tasks.values()}
        for rows in _decoded_together(image_of, sum(height * width for height, width in sizes.values())):
            given = [images[i] for i in image_of[rows].tolist()]
            for group in prepare(given, [tasks[names[row]].preprocess for row in rows]):
                yield rows[group.rows].tolist(), group.images, np.array(group.index)

    def _forward(self, images: Tensor, image_of: Ints, tasks: list[_Known]) -> list[Tensor]:
        """Logits [classes] of each row, an image and a task; on the CPU, float32."""
        uses = {known.key: known.use for known in tasks}
        order = {key: i for i, key in enumerate(uses)}
        task_of = np.array([order[known.key] for known in tasks])
        read = self._read_ahead(uses.values())
        try:
            with self._device_lock:
                if self._closed:
                    raise ClosedError
                return self._in_turn(images, image_of, task_of, list(uses.values()), read)
        finally:
            self._drop_stale(uses)

    def _in_turn(
        self, images: Tensor, image_of: Ints, task_of: Ints, uses: list[Use], read: Mapping[Hashable, Task]
    ) -> list[Tensor]:
        if len(uses) > 1:
            self._merger.ran(len(task_of))
        shared = len(np.unique(image_of)) < len(image_of)
        compiled = self._compiled and not shared
        matrices = self._merger.matrices(uses[0], len(task_of)) if len(uses) == 1 else {}
        with self._slots.lock:
            loaded = self._slots.load(uses, self._pinned_keys(), read=read)
            if compiled:
                walk = bucket(image_of, task_of)
            else:
                walk = plan(image_of, task_of, [self._adds(use, i, shared) for i, use in enumerate(uses)])
            level = self._adapted.levels.of if shared else {}
            units = {position: walk.units[level.get(position, 0)] for position in self._adapted.widths}
            weights = {} if matrices else self._slots.gather(loaded, units, padded=compiled)
        grow = {self._adapted.levels.blocks[i - 1]: self._index(rows) for i, rows in walk.grow.items()}
        if compiled or not np.array_equal(walk.start, np.arange(len(images))):  # graphs tell a copy from a given tensor
            images = images.index_select(0, torch.from_numpy(walk.start).to(images.device))
        features = self._adapted.features(
            images, weights, grow=grow, matrices=matrices, compiled=compiled, in_parts=not compiled
        )
        return self._heads(features, walk.end, task_of, loaded)

    def _adds(self, use: Use, number: int, shared: bool) -> list[Hashable]:
        """What a task adds at each level; where no image is shared, tasks need not be compared."""
        if not shared:
            return [number]
        levels = self._adapted.levels
        return by_level(use.adds, levels.of, len(levels.blocks) + 1)

    def _heads(self, features: Tensor, end: Ints, task_of: Ints, loaded: list[LoadedTask]) -> list[Tensor]:
        """Logits of each row on the CPU: task by task, and fetched at once."""
        by_task = np.argsort(task_of, kind="stable")
        counts = np.bincount(task_of, minlength=len(loaded)).tolist()
        groups = torch.split(features.index_select(0, self._index(end[by_task])), counts)
        found = [
            values if one.head is None else F.linear(values, *one.head)
            for values, one in zip(groups, loaded, strict=True)
        ]
        on_cpu = torch.cat([values.flatten() for values in found]).cpu()
        parts = torch.split(on_cpu, [values.numel() for values in found])
        rows = [row for part, values in zip(parts, found, strict=True) for row in part.view(values.shape)]
        out = [torch.empty(0)] * len(rows)
        for row, values in zip(by_task.tolist(), rows, strict=True):
            out[row] = values
        return out

    def _index(self, rows: Ints) -> Tensor:
        return torch.from_numpy(rows).to(self.device)

    def _drop_stale(self, keys: Iterable[Hashable]) -> None:
        """Evicts what was refreshed away while a call was under way."""
        for key in keys:
            if not self._is_live(key):
                self._slots.evict(key)

    def _is_live(self, key: Any) -> bool:
        """Whether a key is of a task that is known now, not of one that was replaced."""
        known = self._get(key[0])
        return known is not None and known.key == key

    def _get(self, name: str) -> _Known | None:
        return self._added.get(name) or self._known.get(name)

    def _find(self, name: str) -> _Known:
        """The task by reference, looked up once and kept until refresh; meanwhile nobody else has to wait."""
        self._check_usable()
        known = self._get(name)
        while known is None:
            refreshes = self._refreshes
            found, task = self._look_up(name)
            with self._lock:
                if self._closed:
                    raise ClosedError
                if refreshes == self._refreshes:  # else a newer version may be there since
                    known = self._added.get(name) or self._keep(name, found, task)
        return known

    def _keep(self, name: str, found: _Known, task: Task) -> _Known:
        """Enters a task as known, unless another thread did, and forgets the oldest that is not loaded."""
        if (known := self._known.get(name)) is not None:
            return known
        assert found.version is not None
        self._read[found.key] = task
        if len(self._read) > READ_AHEAD:
            del self._read[next(iter(self._read))]
        self._versions[name] = found.version
        self._known[name] = found
        for _ in range(4 if len(self._known) > KNOWN_TASKS else 0):
            oldest = next(iter(self._known))
            known = self._known.pop(oldest)
            if known.key not in self._slots and oldest not in self._pinned:
                break
            self._known[oldest] = known
        return found

    def _look_up(self, name: str) -> tuple[_Known, Task]:
        """A task of the store, and it as it was read."""
        if self.store is None:
            raise UnknownTaskError(f"no task {name!r}: this router has no store, and it was not added")
        try:
            version = self._versions.get(name) or self.store.resolve(name)
        except NotFoundError as error:
            raise UnknownTaskError(str(error)) from None
        task = self._read_version(version)
        _check_stored(name, task)
        bare = without_bytes(task)
        self._check(name, bare)
        known = self._make_known(name, bare, version, lambda: self._read_version(version))
        return known, task

    def _read_version(self, version: Version) -> Task:
        assert self.store is not None
        try:
            return self.store.get(f"{version.task}@{version.version}", copy=False)
        except NotFoundError as error:
            raise UnknownTaskError(f"{error}; refresh() takes up what the store has now") from None

    def _read_ahead(self, uses: Iterable[Use]) -> dict[Hashable, Task]:
        """Tasks that must be loaded, as read from the store before anybody has to wait for it; the first few."""
        missing = [use for use in uses if use.key not in self._slots][:READ_AHEAD]
        if not missing:
            return {}
        with self._lock:
            read = {use.key: self._read.pop(use.key) for use in missing if use.key in self._read}
        return {use.key: read.get(use.key) or use.read() for use in missing}

    def _make_known(self, name: str, task: Task, version: Version | None, read: Callable[[], Task]) -> _Known:
        use = Use((name, next(self._numbers)), task, self._adapted.dtype, read)
        return _Known(use, _preprocess(json.dumps(dict(task.preprocess), sort_keys=True), self._limits), version)

    def _version(self, name: str) -> Version | None:
        """What a reference stands for in the store now."""
        assert self.store is not None
        try:
            return self.store.resolve(name)
        except NotFoundError:
            return None

    def _uses(self, names: Iterable[str]) -> list[Use]:
        return [self._find(name).use for name in dict.fromkeys(names)]

    def _pinned_keys(self) -> list[Hashable]:
        return [known.key for name in self._pinned if (known := self._get(name)) is not None]

    def _check(self, name: str, task: Task) -> None:
        """That a task runs on this backbone, its positions attached."""
        if task.backbone_digest != self.backbone.digest:
            raise WrongBackboneError(
                name, task.backbone_model, task.backbone_digest, self.backbone.name, self.backbone.digest
            )
        try:
            check_reading(task.preprocess)
            if not task.positions.keys() <= self._adapted.widths.keys():
                with self._device_lock:
                    self._adapted.attach(task.positions)
        except RouterError as error:
            raise TaskError(name, str(error)) from None
        for position, branches in task.positions.items():
            first = branches[0].adapter
            found = task.adapters[first].shape
            expected = self._adapted.widths[position]
            if found != expected:
                raise TaskError(name, f"position {position!r}: widths {found}, the backbone's are {expected}")
        width = self._adapted.feature_width
        if task.head is not None and (takes := task.head.weight.shape[1]) != width:
            raise TaskError(name, f"its head takes {takes} features, the backbone gives {width}")


def _check_stored(name: str, task: Task) -> None:
    """Raises a TaskError for what an `add` refuses, but a pack made by somebody else may hold."""
    try:
        check_record(task.record, {key: (raw.dtype, raw.shape) for key, raw in task.tensors.items()}, "its record")
    except PearStoreError as error:
        raise TaskError(name, str(error)) from None
    for key, raw in task.tensors.items():
        if not all_finite(raw):
            raise TaskError(name, f"tensor {key!r} holds NaN or infinity: expected finite values; remove this version")


def _own_memory(task: Task) -> Task:
    """A task whose tensors share no memory with a map, which no pickle can hold."""
    tensors = {key: RawTensor(raw.dtype, raw.shape, bytes(raw.data)) for key, raw in task.tensors.items()}
    return Task(dict(task.record), tensors)


def _make_again(
    kind: type[Router],
    backbone: str,
    weights: str | None,
    digest: str,
    store: Path | None,
    options: dict[str, Any],
    added: list[Task],
) -> Router:
    """A router as another process made it."""
    router = kind(backbone, store, weights=weights, **options)
    if router.backbone.digest != digest:
        raise BackboneError(f"backbone {backbone}: its weights are not those of the process that this router came from")
    for task in added:
        router.add(task)
    return router


def _same(a: Version | None, b: Version | None) -> bool:
    """Whether both are one version, whatever its tags; numbers are never used twice."""
    return a is not None and b is not None and (a.task, a.version, a.time_ns) == (b.task, b.version, b.time_ns)


def _names(tasks: str | Iterable[str]) -> list[str]:
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    for name in names:
        if not isinstance(name, str):
            raise UnknownTaskError(f"task {name!r:.80}: expected a task's name")
    return names


def _predictions(logits: list[Tensor], names: list[str], tasks: Mapping[str, _Known]) -> Predictions:
    same = len({len(values) for values in logits}) == 1
    classes = [tasks[name].task.labels for name in names]
    return Predictions(torch.stack(logits) if same else logits, names, classes)


@lru_cache(256)
def _preprocess(record: str, limits: Limits) -> Preprocess:
    """A preprocessing from its JSON: most tasks have the same one."""
    return Preprocess(json.loads(record), limits)


def _same_images(images: Images) -> Ints:
    """The first of its like for each image: the same object or path, or a tensor expanded along the batch."""
    count = len(images)
    if isinstance(images, Tensor):
        return np.zeros(count, np.int64) if count > 1 and images.stride(0) == 0 else np.arange(count)
    if isinstance(images, np.ndarray):
        return np.arange(count)
    first: dict[object, int] = {}
    keys = (fspath(image) if isinstance(image, str | PathLike) else id(image) for image in images)
    return np.array([first.setdefault(key, i) for i, key in enumerate(keys)], np.int64)


def _decoded_together(image_of: Ints, image_pixels: int) -> list[Ints]:
    """Rows whose images are decoded together: all, or those of as many images as PIXELS allow."""
    most, count = max(1, PIXELS // image_pixels), len(image_of)
    if count <= most:
        return [np.arange(count)]
    distinct, number = np.unique(image_of, return_inverse=True)
    return [np.flatnonzero(number // most == part) for part in range(-(-len(distinct) // most))]


def _parts(image_of: Ints, together: int, shared: int, most: int) -> list[Ints]:
    """Rows of each forward: up to `most` of unlike images; where images repeat, of whole images up to `together`, or of
    one up to `shared`."""
    count = len(image_of)
    if count <= together or len(np.unique(image_of)) == count:
        return [np.arange(start, min(start + most, count)) for start in range(0, count, most)]
    by_image = np.argsort(image_of, kind="stable")
    starts = np.flatnonzero(np.diff(image_of[by_image], prepend=-1)).tolist()
    parts, begin = [], 0
    for start, stop in zip(starts, [*starts[1:], count], strict=True):
        if stop - begin > together and start > begin:
            parts.append(by_image[begin:start])
            begin = start
    parts.append(by_image[begin:])
    return [part[i : i + shared] for part in parts for i in range(0, len(part), shared)]


def _check_images(images: Images) -> None:
    """Raises an ImageError unless it is a batch of images."""
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            found = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
            raise ImageError(f"images {found}: expected a normalised float tensor [batch, 3, h, w]")
    elif isinstance(images, np.ndarray):
        if images.ndim != 4:
            raise ImageError(f"images {images.dtype} {list(images.shape)}: expected an array [batch, h, w, 1, 3 or 4]")
    elif isinstance(images, str):
        raise ImageError(f"images is one path, {images!r}: expected a list of images")
    elif not isinstance(images, list | tuple):
        raise ImageError(f"images is one {type(images).__name__}: expected a list of images, an array or a tensor")
