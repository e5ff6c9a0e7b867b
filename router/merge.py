"""Merges a hot task into copies of the backbone's matrices.

If every position of a task is a Linear and φ is the identity, W is replaced by W + (Σ scale · down · up)ᵀ. Then the
task costs no more than the bare backbone. The sum is computed in float32 from the original matrices and rounded once. A
forward uses the copies; the originals are never changed.
"""

import logging
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from pear_store import Task
from pear_store.format.codes import matrix_values, up_values
from router.adapted import AdaptedBackbone
from router.positions import is_linear
from router.use import Use

Merge = bool | Literal["auto"]
"""When a task that runs alone is merged: at once (True), never (False), or when it has run alone often ("auto")."""
AUTO_ROWS = 512
"""With "auto", a task is merged after this many images in batches of its own. Images of other batches count against it.

For ViT-B's 48 Linears on a CPU, a merge takes as long as 3 images. benchmarks/README.md says what it saves."""

log = logging.getLogger(__name__)


class _UnderWay:
    """Exists as long as a merge is under way."""


class Merger:
    """Holds the merged matrices of at most one task. Thread-safe: tasks are read and merged while forwards run.

    Args:
        read: reads a task with its tensors' bytes.
    """

    def __init__(self, adapted: AdaptedBackbone, merge: Merge, read: Callable[[Use], Task]) -> None:
        self._adapted, self._merge, self._read = adapted, merge, read
        self._lock = threading.Lock()
        self._rows: dict[Hashable, int] = {}
        self._held: tuple[Hashable, dict[str, nn.Parameter]] | None = None
        self._merging: Callable[[], _UnderWay | None] = lambda: None
        """A weak reference to the object of the merge under way. It is gone when that call ends, also by an error."""
        self.merges = 0

    def matrices(self, use: Use, rows: int) -> Mapping[str, nn.Parameter]:
        """Position -> merged matrix for a batch of one task. Empty if it runs unmerged.

        Args:
            rows: images in the batch.
        """
        key = use.key
        if self._merge is False or not self._can(use.layout.task):
            return {}
        with self._lock:
            self._ran(rows, but=key)
            if self._held is not None and self._held[0] == key:
                return self._held[1]
            self._rows[key] = self._rows.get(key, 0) + rows
            if self._merging() is not None or (self._merge == "auto" and self._rows[key] < AUTO_ROWS):
                return {}
            self._held = None  # frees its memory first
            under_way = _UnderWay()
            self._merging = weakref.ref(under_way)
        began = time.perf_counter()
        task = self._read(use)
        held = key, {position: self._on_device(task, position) for position in task.positions}
        self._held = held
        self.merges += 1
        log.debug("merged task %s: %d matrices in %.3f s", task.name, len(held[1]), time.perf_counter() - began)
        return held[1]

    def ran(self, rows: int) -> None:
        """Counts a batch of several tasks against all of them."""
        if self._merge is not False:
            with self._lock:
                self._ran(rows)

    @property
    def held(self) -> Hashable:
        """The key of the merged task. None if there is none."""
        held = self._held
        return None if held is None else held[0]

    def forget(self) -> None:
        """Frees the memory."""
        with self._lock:
            self._held, self._rows = None, {}

    def _ran(self, rows: int, but: Hashable = None) -> None:
        self._rows = {k: left for k, n in self._rows.items() if (left := n if k == but else n - rows) > 0}

    def _can(self, task: Task) -> bool:
        return bool(task.positions) and not unmergeable(self._adapted.backbone.module, task)

    def _on_device(self, task: Task, position: str) -> nn.Parameter:
        weight = merged_weight(self._adapted.backbone.module, task, position)
        return nn.Parameter(weight.to(self._adapted.device, self._adapted.dtype), requires_grad=False)


def unmergeable(backbone: nn.Module, task: Task) -> list[str]:
    """The positions that cannot be merged: they are neither Linears nor 1x1 convolutions, or φ is not the identity."""
    if task.activation != "identity":
        return list(task.positions)
    return [position for position in task.positions if not is_linear(backbone.get_submodule(position))]


def merged_weight(backbone: nn.Module, task: Task, position: str) -> Tensor:
    """W + (Σ scale · down · up)ᵀ at a position, as a new tensor of W's shape and dtype.

    Args:
        task: the task with its tensors' bytes.
    """
    weight = backbone.get_submodule(position).get_parameter("weight").detach().clone()
    for branch in task.positions[position]:
        adapter = task.adapters[branch.adapter]
        values = matrix_values(adapter.down, task.tensors), up_values(adapter, task.tensors)
        down, up = (torch.tensor(one).float() for one in values)
        weight.flatten(1).addmm_(up.t().to(weight.device), down.t().to(weight.device), alpha=branch.scale)
    return weight
