"""One backbone on a device and the tasks loaded there: runs rows, each an image and a task."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from router.adapted import AdaptedBackbone
from router.errors import ClosedError
from router.graphs import PIXELS as GRAPH_PIXELS
from router.graphs import Graphs
from router.matrices import Gathered
from router.merge import Merger
from router.registry import Registry
from router.sharing import Ints, Walk, bucket, by_level, plan
from router.slots import Slots
from router.use import LoadedTask, Use

Way = Literal["shared", "alone", "apart", "compiled", "recorded"]
"""How a batch runs. shared: rows share images. alone: one task, merged. apart, compiled, recorded: rows share nothing,
and the forward is eager, through torch.compile, or a CUDA graph."""
_TRIES = 4
"""How many times a batch loads its tasks. In the last try it keeps other threads from evicting them."""


class Engine:
    """Runs rows, each an image and a task. Thread-safe: forwards take turns; tasks are read and loaded meanwhile.

    Args:
        compiled: batches without shared images run through torch.compile, padded to powers of two.
        graphs: on a GPU, small batches without shared images are recorded and replayed, padded in the same way.
    """

    def __init__(
        self,
        adapted: AdaptedBackbone,
        slots: Slots,
        merger: Merger,
        registry: Registry,
        compiled: bool,
        graphs: bool,
    ) -> None:
        self.adapted, self.slots, self._merger, self._registry = adapted, slots, merger, registry
        self._compiled = compiled
        self._end: Any = None
        """On a GPU, an event after the last forward. After it, memory that batches share is free."""
        self._graphs = Graphs(self._features, adapted.device, adapted.dtype) if graphs else None

    @property
    def changes(self) -> int:
        """How many times names of tasks changed their meaning; see `drop_stale`."""
        return self._registry.changes

    def width(self, use: Use, without_heads: bool = False) -> int:
        """The number of logits, or of features, that a task gives."""
        head = None if without_heads else use.layout.task.head
        return self.adapted.feature_width if head is None else head.weight.shape[0]

    def check(self, uses: Sequence[Use]) -> None:
        """Checks that tasks fit into the slots together with pinned tasks.

        Raises:
            SlotBudgetError: they do not fit.
        """
        self.slots.check(uses, self._registry.pinned_keys())

    def drop_stale(self, since: int | None, keys: Sequence[Hashable]) -> None:
        """Unloads those of the given tasks that no name means any more.

        Args:
            since: an earlier value of `changes`; if it is still the same, nothing is stale. None: check in any case.
        """
        if since is not None and since == self.changes:
            return
        for key in self._registry.stale(keys):
            self.slots.evict(key)
        held = self._merger.held
        if held is not None and self._registry.stale([held]):
            self._merger.forget()

    def load(self, uses: Sequence[Use]) -> None:
        """Loads tasks, one by one. Forwards go on meanwhile.

        Raises:
            SlotBudgetError: they do not fit together with pinned tasks; nothing was evicted or loaded.
            RouterError, PearStoreError: one of them cannot be read.
        """
        missing = [use for use in uses if use.key not in self.slots]
        if not missing:
            return
        pinned = self._registry.pinned_keys()
        self.slots.check(uses, pinned)
        stay = {use.key for use in uses}.union(pinned)
        for use in missing:
            self.slots.load(use, self._registry.tensors(use), stay)

    def run(
        self, images: Tensor, image_of: Ints, uses: Sequence[Use], task_of: Ints, without_heads: bool = False
    ) -> list[tuple[Ints, Tensor]]:
        """Runs rows, each an image and a task.

        Args:
            images: normalised, [image, 3, h, w].
            image_of: each row's image, as an index into `images`, int64 [row].
            uses: distinct tasks.
            task_of: each row's task, as an index into `uses`, int64 [row].
            without_heads: give features instead of logits.
        Returns:
            Pairs of rows and their logits, float32 [row, classes] on the CPU. Each pair has one number of classes.
        Raises:
            ClosedError: the router was closed meanwhile.
            SlotBudgetError, RouterError, PearStoreError: as for `load`.
        """
        self.slots.count(uses)
        if len(uses) > 1:
            self._merger.ran(len(task_of))
        matrices = self._merger.matrices(uses[0], len(task_of)) if len(uses) == 1 else {}
        way = self._way(images, image_of, bool(matrices))
        if way in ("compiled", "recorded"):
            walk = bucket(image_of, task_of)
        else:
            walk = plan(image_of, task_of, [self._adds(use, i, way == "shared") for i, use in enumerate(uses)])
        answers = None
        for tries in range(_TRIES):
            self.load(uses)
            with self.adapted.turn:
                if self._registry.closed:
                    raise ClosedError
                self._after_the_last()
                if (ready := self._gather(uses, walk, way, images, last=tries == _TRIES - 1)) is not None:
                    answers = self._forward(images, walk, ready, matrices, way, task_of, without_heads)
                    self._note_end()
                    break
        assert answers is not None
        return answers.fetch()  # outside of the turn, so a GPU may start the next batch meanwhile

    def _way(self, images: Tensor, image_of: Ints, merged: bool) -> Way:
        if len(np.unique(image_of)) < len(image_of):
            return "shared"
        if merged:
            return "alone"
        pixels = images.shape[2] * images.shape[3] << (len(image_of) - 1).bit_length()
        if self._graphs is not None and self._graphs.refused is None and pixels <= GRAPH_PIXELS:
            return "recorded"
        return "compiled" if self._compiled else "apart"

    def _gather(self, uses: Sequence[Use], walk: Walk, way: Way, images: Tensor, last: bool) -> "_Ready | None":
        """The loaded tasks and their gathered weights. None if another thread evicted a task.

        Args:
            last: load evicted tasks again while other threads wait.
        """
        level = self.adapted.levels.of if way == "shared" else {}
        units = {position: walk.units[level.get(position, 0)] for position in self.adapted.widths}
        padded = way in ("compiled", "recorded")
        with self.slots.lock:
            if last:
                self.load(uses)
            if (loaded := self.slots.find(uses)) is None:
                return None
            matrices, held = self.slots.matrices, None
            if self._graphs is not None and way == "recorded":
                held = self._graphs.held(matrices.form(loaded, padded), (len(walk.start), images.shape[2:]))
            return _Ready(loaded, matrices.gather(loaded, units, padded, held))

    def _forward(
        self,
        images: Tensor,
        walk: Walk,
        ready: "_Ready",
        matrices: Mapping[str, nn.Parameter],
        way: Way,
        task_of: Ints,
        without_heads: bool,
    ) -> "_Answers":
        eager = way in ("alone", "apart", "shared")
        if not eager or not np.array_equal(walk.start, np.arange(len(images))):  # always a copy for dynamo
            images = images.index_select(0, torch.from_numpy(walk.start).to(images.device))
        if way == "recorded":
            assert self._graphs is not None
            features = self._graphs.features((len(images), images.shape[2:]), images, ready.gathered)
        else:
            grow = {self.adapted.levels.blocks[i - 1]: self._index(rows) for i, rows in walk.grow.items()}
            weights = {} if matrices else ready.gathered.weights
            features = self.adapted.features(
                images, weights, grow=grow, matrices=matrices, compiled=way == "compiled", in_parts=eager
            )
        by_task = np.argsort(task_of, kind="stable")
        counts = np.bincount(task_of, minlength=len(ready.tasks))
        groups = torch.split(features.index_select(0, self._index(walk.end[by_task])), counts.tolist())
        logits = [
            values if one.head is None or without_heads else F.linear(values, *one.head)
            for values, one in zip(groups, ready.tasks, strict=True)
        ]
        return _Answers(np.split(by_task, np.cumsum(counts)[:-1]), logits)

    def _features(self, images: Tensor, gathered: Gathered) -> Tensor:
        return self.adapted.features(images, gathered.weights)

    def _after_the_last(self) -> None:
        """Lets this GPU stream wait for the last forward, which may be in another thread's stream."""
        if self._end is not None:
            torch.cuda.current_stream(self.adapted.device).wait_event(self._end)

    def _note_end(self) -> None:
        if self.adapted.device.type == "cuda":
            self._end = torch.cuda.current_stream(self.adapted.device).record_event()

    def clear(self) -> None:
        """Frees the slots' memory, after the current forward."""
        with self.adapted.turn:
            self.slots.clear()
            self._merger.forget()
            if self._graphs is not None:
                self._graphs.clear()

    def _adds(self, use: Use, number: int, shared: bool) -> list[Hashable]:
        """What a task adds at each level. Without shared images tasks are not compared, so its number will do."""
        if not shared:
            return [number]
        levels = self.adapted.levels
        return by_level(use.adds(), levels.of, len(levels.blocks) + 1)

    def _index(self, rows: Ints) -> Tensor:
        return torch.from_numpy(rows).to(self.adapted.device)


@dataclass(frozen=True)
class _Ready:
    """What a forward needs besides images."""

    tasks: list[LoadedTask]
    gathered: Gathered


@dataclass(frozen=True, eq=False)
class _Answers:
    """For each task its rows, and their logits [row, classes] on the device."""

    rows: list[Ints]
    logits: list[Tensor]

    def fetch(self) -> list[tuple[Ints, Tensor]]:
        """Rows and their logits on the CPU. All logits are copied at once."""
        if len({values.shape[1] for values in self.logits}) == 1:
            return [(np.concatenate(self.rows), torch.cat(self.logits).cpu())]
        on_cpu = torch.cat([values.flatten() for values in self.logits]).cpu()
        parts = torch.split(on_cpu, [values.numel() for values in self.logits])
        return [(rows, part.view(v.shape)) for rows, part, v in zip(self.rows, parts, self.logits, strict=True)]
