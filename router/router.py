"""The router: many tasks, one frozen backbone."""

import threading
from collections.abc import Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pear_store import NotFoundError, Store, Task, read_checkpoint
from pear_store.reading import Access
from router.backbone import AdaptedBackbone, Backbone, load_backbone, open_device
from router.errors import (
    BackboneError,
    ClosedError,
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
from router.slots import LoadedTask, Slots, SlotStats, Use, adapter_shape, head_shape
from router.trie import Ints, bucket, by_level, plan

SHARED_ROWS, SHARED_PIXELS_CPU = 512, 64 * 224 * 224
"""Most rows of one forward in which images are shared: more would only cost memory. On a CPU, whose caches hold few,
rows of several images have together at most so many pixels; rows of one, whose trunk runs once, may have more."""

Images = Tensor | Sequence[ImageLike] | NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True)
class Predictions:
    """What tasks say of a batch of images, in the images' order.

    `logits` is a float32 tensor [batch, classes] where all rows have equally many classes, else a list of [classes];
    for a task without head, they are its features. `classes` are each row's class names.
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

    @property
    def labels(self) -> list[str | None]:
        """The likeliest class's name of each image; None for a task without head."""
        best = [int(row.argmax()) for row in self.logits]
        return [names[i] if names else None for i, names in zip(best, self.classes, strict=True)]

    def topk(self, k: int) -> list[list[tuple[str, float]]]:
        """The k likeliest classes of each image with their probabilities, best first."""
        found = []
        for row, names in zip(self.probs, self.classes, strict=True):
            values, indices = row.topk(min(k, len(names)))
            found.append([(names[i], p) for i, p in zip(indices.tolist(), values.tolist(), strict=True)])
        return found


@dataclass(frozen=True)
class _Known:
    """A task as looked up, and its preprocessing."""

    use: Use
    preprocess: Preprocess

    @property
    def key(self) -> object:
        return self.use.key

    @property
    def task(self) -> Task:
        return self.use.task


class Router:
    """Runs any mix of tasks on one frozen backbone.

    Thread-safe: calls from several threads take turns on the device. A context manager, which closes it.

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
        backend = "inductor" if compile is True else compile or None
        self._adapted = AdaptedBackbone(self.backbone, self.device, dtype, compile=backend)
        self._slots = Slots(self.device, dtype, self._adapted.widths, slot_bytes)
        self._compiled = backend is not None
        self._lock = threading.RLock()  # of what is known; taken before the device's
        self._device_lock = threading.RLock()
        self._known: dict[str, _Known] = {}
        self._added: dict[str, Task] = {}
        self._pinned: set[str] = set()
        self._ahead: ThreadPoolExecutor | None = None
        self._closed = False
        self._live: set[object] = set()
        """The keys of what is known now."""
        self._merger = Merger(self._adapted, False if backend else merge, self._live)
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives the slots' memory back, after calls under way; later calls raise a ClosedError."""
        with self._lock:
            self._closed = True
            ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.shutdown(cancel_futures=True)
        with self._lock, self._device_lock:
            for name in list(self._known):
                self._forget(name)
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
        if not isinstance(task, Task):
            task = read_checkpoint(task)
        with self._lock:
            self._check(task.name, task)
            self._added[task.name] = task
            self._forget(task.name)
        return task.name

    def check(self, task: str) -> None:
        """Raises what `run` would raise for this task, before any image is given."""
        self._slots.check([self._find(task).use], self._pinned_keys())

    def refresh(self) -> None:
        """Looks every task's newest version up again at its next use."""
        with self._lock:
            for name in list(self._known):
                self._forget(name)

    def preload(self, tasks: str | Iterable[str]) -> Future[None]:
        """Loads tasks in the background, while batches run, so that the next batch finds them in their slots.

        Returns:
            A future, done when they are loaded; its result() raises what `run` would raise for them.
        """
        names = _names(tasks)
        with self._lock:
            if self._closed:
                raise ClosedError
            if self._ahead is None:
                self._ahead = ThreadPoolExecutor(1, "router-preload")
            return self._ahead.submit(self._load_ahead, names)

    def _load_ahead(self, names: Sequence[str]) -> None:
        uses = self._uses(names)
        self._slots.load(uses, self._pinned_keys(), ahead=True)
        self._drop_stale(use.key for use in uses)

    def pin(self, tasks: str | Iterable[str]) -> None:
        """Loads tasks and keeps them loaded until `unpin`, whatever else asks for their slots; so their newer versions.

        Raises:
            UnknownTaskError: a task that neither the store nor `add` knows; nothing is pinned.
            SlotBudgetError: they do not fit beside what is pinned; nothing is pinned.
        """
        names = _names(tasks)
        self._slots.load(self._uses(names), self._pinned_keys(), ahead=True)
        with self._lock:
            self._pinned.update(names)

    def unpin(self, tasks: str | Iterable[str]) -> None:
        """Lets pinned tasks go when their slots are needed; names that are not pinned are passed over."""
        with self._lock:
            self._pinned.difference_update(_names(tasks))

    def stats(self) -> SlotStats:
        """What is loaded now, and counts of hits, misses, loads and evictions."""
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
        uses = self._uses(names)
        if not names:
            return {}
        try:
            self._slots.check(uses, self._pinned_keys())
        except SlotBudgetError:
            if len(names) == 1:
                raise
            half = len(names) // 2
            return self.run_all(images, names[:half]) | self.run_all(images, names[half:])
        count = len(images)
        each = [name for name in names for _ in range(count)]
        logits, known = self._logits(images, np.tile(_same_images(images), len(names)), each)
        return {
            name: _predictions(logits[i * count : (i + 1) * count], [name] * count, known)
            for i, name in enumerate(names)
        }

    def _logits(self, images: Images, image_of: Ints, names: list[str]) -> tuple[list[Tensor], dict[str, _Known]]:
        """float32 [classes] of each row, an image and a task; and the tasks as they were found."""
        if not names:
            raise ImageError("no images: expected at least one")
        tasks = {name: self._find(name) for name in dict.fromkeys(names)}
        if any(known.key not in self._slots for known in tasks.values()):
            self._slots.check([known.use for known in tasks.values()], self._pinned_keys())
        logits: list[Tensor] = [torch.empty(0)] * len(names)
        for rows, batch, picked in self._batches(images, image_of, names, tasks):
            fitting = SHARED_PIXELS_CPU // (batch.shape[2] * batch.shape[3])
            together = min(SHARED_ROWS, fitting) if self.device.type == "cpu" else SHARED_ROWS
            for part in _parts(picked, together, SHARED_ROWS):
                found = self._forward(batch, picked[part], [tasks[names[rows[i]]] for i in part])
                for i, values in zip(part, found, strict=True):
                    logits[rows[i]] = values
        return logits, tasks

    def _batches(
        self, images: Images, image_of: Ints, names: list[str], tasks: dict[str, _Known]
    ) -> list[tuple[list[int], Tensor, Ints]]:
        """The images as normalised batches of one preprocessing each: row numbers, images, and each row's image."""
        if isinstance(images, Tensor):
            if len({known.preprocess.key for known in tasks.values()}) > 1:
                listed = ", ".join(repr(name) for name in tasks)
                raise ImageError(f"tasks {listed} differ in preprocessing: give a list of images, not one tensor")
            (size,) = {known.preprocess.size for known in tasks.values()}
            if tuple(images.shape[2:]) != size:
                found = f"{images.shape[2]} x {images.shape[3]}"
                raise ImageError(f"images of {found} pixels: the tasks expect {size[0]} x {size[1]}")
            return [(list(range(len(names))), images, image_of)]
        given = [images[i] for i in image_of.tolist()]
        groups = prepare(given, [tasks[name].preprocess for name in names])
        return [(group.rows, group.images, np.array(group.index)) for group in groups]

    def _forward(self, images: Tensor, image_of: Ints, tasks: list[_Known]) -> list[Tensor]:
        """Logits [classes] of each row, an image and a task; on the CPU, float32."""
        uses = {known.key: known.use for known in tasks}
        order = {key: i for i, key in enumerate(uses)}
        task_of = np.array([order[known.key] for known in tasks])
        pinned = self._pinned_keys()
        try:
            with self._device_lock:
                if self._closed:
                    raise ClosedError
                return self._in_turn(images, image_of, task_of, list(uses.values()), pinned)
        finally:
            self._drop_stale(uses)

    def _in_turn(
        self, images: Tensor, image_of: Ints, task_of: Ints, uses: list[Use], pinned: list[object]
    ) -> list[Tensor]:
        if len(uses) > 1:
            self._merger.ran(len(task_of))
        shared = len(np.unique(image_of)) < len(image_of)
        compiled = self._compiled and not shared
        matrices = self._merger.matrices(uses[0], len(task_of)) if len(uses) == 1 else {}
        with self._slots.lock:
            loaded = self._slots.load(uses, pinned)
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

    def _drop_stale(self, keys: Iterable[object]) -> None:
        """Evicts what was refreshed away while a call was under way."""
        for key in keys:
            if key not in self._live:
                self._slots.evict(key)

    def _find(self, name: str) -> _Known:
        """The task by reference, looked up once and kept until refresh."""
        with self._lock:
            if self._closed:
                raise ClosedError
            known = self._known.get(name)
            if known is not None:
                return known
            task = self._added.get(name)
            if task is None:
                if self.store is None:
                    raise UnknownTaskError(f"no task {name!r}: this router has no store, and it was not added")
                try:
                    task = self.store.get(name, copy=False)
                except NotFoundError as error:
                    raise UnknownTaskError(str(error)) from None
                self._check(name, task)
            self._count += 1
            self._known[name] = _Known(
                Use(self._count, task, self._adapted.dtype), Preprocess(task.preprocess, self._limits)
            )
            self._live.add(self._count)
            return self._known[name]

    def _uses(self, names: Iterable[str]) -> list[Use]:
        return [self._find(name).use for name in dict.fromkeys(names)]

    def _pinned_keys(self) -> list[object]:
        with self._lock:
            return [self._known[name].key for name in self._pinned if name in self._known]

    def _forget(self, name: str) -> None:
        known = self._known.pop(name, None)
        if known is not None:
            self._live.discard(known.key)
            self._slots.evict(known.key)

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
            found = (adapter_shape(task, first, "down")[0], adapter_shape(task, first, "up")[1])
            expected = self._adapted.widths[position]
            if found != expected:
                raise TaskError(name, f"position {position!r}: widths {found}, the backbone's are {expected}")
        if task.record["head"] is not None:
            shape = head_shape(task)
            if shape[1] != self._adapted.feature_width:
                width = self._adapted.feature_width
                raise TaskError(name, f"its head takes {shape[1]} features, the backbone gives {width}")


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


def _parts(image_of: Ints, together: int, most: int) -> list[Ints]:
    """Rows of each forward: all, or where images repeat, of whole images up to `together`, or of one up to `most`."""
    count = len(image_of)
    if count <= together or len(np.unique(image_of)) == count:
        return [np.arange(count)]
    by_image = np.argsort(image_of, kind="stable")
    starts = np.flatnonzero(np.diff(image_of[by_image], prepend=-1)).tolist()
    parts, begin = [], 0
    for start, stop in zip(starts, [*starts[1:], count], strict=True):
        if stop - begin > together and start > begin:
            parts.append(by_image[begin:start])
            begin = start
    parts.append(by_image[begin:])
    return [part[i : i + most] for part in parts for i in range(0, len(part), most)]


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
