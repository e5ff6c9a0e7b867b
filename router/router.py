"""The router: many tasks, one frozen backbone."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pear_store import NotFoundError, Store, Task, read_checkpoint
from router.backbone import AdaptedBackbone, Backbone, load_backbone, open_device
from router.errors import BackboneError, ImageError, RouterError, TaskError, UnknownTaskError, WrongBackboneError
from router.preprocess import ImageLike, Preprocess
from router.slots import Slots

Images = Tensor | Sequence[ImageLike] | NDArray[np.uint8]


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
    """A task as looked up, its key in the slots, and its preprocessing."""

    key: int
    task: Task
    preprocess: Preprocess


class Router:
    """Runs any mix of tasks on one frozen backbone.

    Thread-safe: calls from several threads take turns on the device.

    Args:
        backbone: a timm name, a timm module at native size in float32, or a loaded Backbone.
        store: a store's directory or an open Store to look tasks up in.
        weights: a local safetensors file with the weights of a backbone given by name.
        device: such as "cpu", "cuda" or "mps"; the backbone's own where a module is given, else the CPU.
        dtype: compute precision: torch.float32 (default), bfloat16 or float16.
        slot_bytes: the most bytes that loaded tasks may take on the device, heads included; None for no limit.

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
        dtype: torch.dtype | None = None,
        slot_bytes: int | None = None,
    ) -> None:
        self.store = Store(store) if isinstance(store, str | Path) else store
        self.backbone = load_backbone(backbone, weights)
        if device is None:
            device = next(self.backbone.module.parameters()).device
        self.device = open_device(device)
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise BackboneError(f"dtype {dtype}: expected torch.float32, torch.bfloat16 or torch.float16")
        self._adapted = AdaptedBackbone(self.backbone, self.device, dtype or torch.float32)
        self._slots = Slots(self.device, self._adapted.widths, slot_bytes)
        self._lock = threading.RLock()
        self._known: dict[str, _Known] = {}
        self._added: dict[str, Task] = {}
        self._count = 0

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
        with self._lock:
            self._find(task)

    def refresh(self) -> None:
        """Looks every task's newest version up again at its next use."""
        with self._lock:
            for name in list(self._known):
                self._forget(name)

    @torch.inference_mode()
    def run(self, images: Images, task: str | Sequence[str]) -> Predictions:
        """Predictions of one task for all images, or of one task for each image.

        Args:
            images: float tensor [batch, 3, h, w], normalised; or a list of PIL images, uint8 arrays [h, w], [h, w, 1]
                or [h, w, 3], or fsspec paths, to which each task's own preprocessing is applied.
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
        if count == 0:
            raise ImageError("no images: expected at least one")
        with self._lock:
            tasks = {name: self._find(name) for name in dict.fromkeys(names)}
        logits: list[Tensor] = [torch.empty(0)] * count
        for rows, batch in self._batches(images, names, tasks):
            with self._lock:
                found = self._forward(batch, [tasks[names[row]] for row in rows])
            for row, values in zip(rows, found, strict=True):
                logits[row] = values
        same = len({len(values) for values in logits}) == 1
        classes = [tasks[name].task.labels for name in names]
        return Predictions(torch.stack(logits) if same else logits, names, classes)

    def run_all(self, images: Images, tasks: Sequence[str]) -> dict[str, Predictions]:
        """Every image through every task: {task: predictions}. See `run` for arguments and errors."""
        if isinstance(tasks, str):
            raise UnknownTaskError(f"tasks is one name, {tasks!r}: expected a list of names")
        return {task: self.run(images, task) for task in tasks}

    def _batches(self, images: Images, names: list[str], tasks: dict[str, _Known]) -> list[tuple[list[int], Tensor]]:
        """The images as normalised batches of one preprocessing each, with their row numbers."""
        if isinstance(images, Tensor):
            if len({known.preprocess.key for known in tasks.values()}) > 1:
                listed = ", ".join(repr(name) for name in tasks)
                raise ImageError(f"tasks {listed} differ in preprocessing: give a list of images, not one tensor")
            (size,) = {known.preprocess.size for known in tasks.values()}
            if tuple(images.shape[2:]) != size:
                found = f"{images.shape[2]} x {images.shape[3]}"
                raise ImageError(f"images of {found} pixels: the tasks expect {size[0]} x {size[1]}")
            return [(list(range(len(names))), images)]
        groups: dict[tuple[object, ...], list[int]] = {}
        for row, name in enumerate(names):
            groups.setdefault(tasks[name].preprocess.key, []).append(row)
        return [(rows, tasks[names[rows[0]]].preprocess([images[row] for row in rows])) for rows in groups.values()]

    def _forward(self, images: Tensor, tasks: list[_Known]) -> list[Tensor]:
        """Logits [classes] of each image, on the CPU, float32."""
        distinct = {known.key: known for known in tasks}
        loaded = self._slots.load([(key, known.task) for key, known in distinct.items()])
        order = {key: i for i, key in enumerate(distinct)}
        task_of_row = torch.tensor([order[known.key] for known in tasks])
        row_task = task_of_row.to(self.device) if len(distinct) > 1 else None
        try:
            features = self._adapted.features(images, self._slots.weights(loaded, row_task))
        finally:
            for key in distinct.keys() - {known.key for known in self._known.values()}:
                self._slots.evict(key)  # refreshed away while this call was under way
        out: list[Tensor] = [torch.empty(0)] * len(tasks)
        for i, one in enumerate(loaded):
            rows = (task_of_row == i).nonzero().flatten()
            values = features[rows.to(self.device)]
            if one.weight is not None:
                values = F.linear(values, one.weight, one.bias)
            for row, value in zip(rows.tolist(), values.cpu(), strict=True):
                out[row] = value
        return out

    def _find(self, name: str) -> _Known:
        """The task by reference, looked up once and kept until refresh."""
        known = self._known.get(name)
        if known is not None:
            return known
        task = self._added.get(name)
        if task is None:
            if self.store is None:
                raise UnknownTaskError(f"no task {name!r}: this router has no store, and it was not added")
            try:
                task = self.store.get(name)
            except NotFoundError as error:
                raise UnknownTaskError(str(error)) from None
            self._check(name, task)
        self._count += 1
        self._known[name] = _Known(self._count, task, Preprocess(task.preprocess))
        return self._known[name]

    def _forget(self, name: str) -> None:
        known = self._known.pop(name, None)
        if known is not None:
            self._slots.evict(known.key)

    def _check(self, name: str, task: Task) -> None:
        """That a task runs on this backbone, its positions attached."""
        if task.backbone_digest != self.backbone.digest:
            raise WrongBackboneError(
                name, task.backbone_model, task.backbone_digest, self.backbone.name, self.backbone.digest
            )
        try:
            self._adapted.attach(task.positions)
        except RouterError as error:
            raise TaskError(name, str(error)) from None
        for position, branches in task.positions.items():
            found = _widths(task, branches[0].adapter)
            expected = self._adapted.widths[position]
            if found != expected:
                raise TaskError(name, f"position {position!r}: widths {found}, the backbone's are {expected}")
        if task.record["head"] is not None:
            shape = task.tensors[task.record["head"]["weight"]].shape
            if shape[1] != self._adapted.feature_width:
                width = self._adapted.feature_width
                raise TaskError(name, f"its head takes {shape[1]} features, the backbone gives {width}")


def _check_images(images: Images) -> None:
    """Raises an ImageError unless it is a batch of images."""
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            found = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
            raise ImageError(f"images {found}: expected a normalised float tensor [batch, 3, h, w]")
    elif isinstance(images, np.ndarray):
        if images.ndim != 4:
            raise ImageError(f"images {images.dtype} {list(images.shape)}: expected an array [batch, h, w, 1 or 3]")
    elif isinstance(images, str):
        raise ImageError(f"images is one path, {images!r}: expected a list of images")
    elif not isinstance(images, list | tuple):
        raise ImageError(f"images is one {type(images).__name__}: expected a list of images, an array or a tensor")


def _widths(task: Task, adapter: str) -> tuple[int, int]:
    """(d_in, d_out) of an adapter."""
    entry = task.record["adapters"][adapter]
    if "quant" in entry:
        return entry["quant"]["down"]["shape"][0], entry["quant"]["up"]["shape"][1]
    return task.tensors[entry["down"]].shape[0], task.tensors[entry["up"]].shape[1]
