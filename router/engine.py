"""One backbone on a device and the tasks loaded there: how rows of images and tasks run through it."""

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
from router.layout import LoadedTask, Use
from router.matrices import Gathered
from router.merge import Merger
from router.registry import Registry
from router.sharing import Ints, Walk, bucket, by_level, plan
from router.slots import Slots

Way = Literal["shared", "alone", "apart", "compiled", "recorded"]
"""How a batch runs: images shared until tasks part; one task, merged; rows apart, eager, compiled or recorded."""
_TRIES = 4
"""How often a batch loads what others evict, before it holds them up to load it."""


class Engine:
    """Runs rows of images and tasks. Thread-safe: forwards take turns, what they need is read and loaded beside them.

    Args:
        compiled: batches that share no image run through torch.compile, padded to powers of two.
        graphs: on a GPU, small batches that share no image are recorded and replayed, padded likewise.
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
        """On a GPU, an event after the last forward: memory that batches share is then free."""
        self._graphs = Graphs(self._features, adapted.device, adapted.dtype) if graphs else None

    @property
    def changes(self) -> int:
        """How often names of tasks came to mean something else; see `drop_stale`."""
        return self._registry.changes

    def width(self, use: Use, without_heads: bool = False) -> int:
        """How many logits, or features, a task gives."""
        head = None if without_heads else use.task.head
        return self.adapted.feature_width if head is None else head.weight.shape[0]

    def check(self, uses: Sequence[Use]) -> None:
        """That tasks fit into the slots together, beside what is pinned.

        Raises:
            SlotBudgetError: they do not.
        """
        self.slots.check(uses, self._registry.pinned_keys())

    def drop_stale(self, since: int | None, keys: Sequence[Hashable]) -> None:
        """Gives up those of some tasks that no name means any more.

        Args:
            since: nothing can be stale if `changes` still has this value.
        """
        if since is not None and since == self.changes:
            return
        for key in self._registry.stale(keys):
            self.slots.evict(key)
        held = self._merger.held
        if held is not None and self._registry.stale([held]):
            self._merger.forget()

    def load(self, uses: Sequence[Use]) -> None:
        """Loads tasks, one by one; forwards go on meanwhile.

        Raises:
            SlotBudgetError: beside what is pinned they do not fit; nothing was evicted or loaded.
            RouterError, PearStoreError: one of them cannot be read.
        """
        missing = [use for use in uses if use.key not in self.slots]
        if not missing:
            return
        pinned = self._registry.pinned_keys()
        self.slots.check(uses, pinned)
        stay = {use.key for use in uses}.union(pinned)
        for use in missing:
            self.slots.load(use, self._registry.read(use), stay)

    def run(
        self, images: Tensor, image_of: Ints, uses: Sequence[Use], task_of: Ints, without_heads: bool = False
    ) -> list[tuple[Ints, Tensor]]:
        """The answers of rows, each an image and a task.

        Args:
            images: [image, 3, h, w], normalised.
            image_of: int64 [row], indices into `images`.
            uses: distinct tasks.
            task_of: int64 [row], indices into `uses`.
            without_heads: features, which heads would take.
        Returns:
            Rows, and their logits float32 [row, classes] on the CPU; as many pairs as there are widths of logits.

        Raises:
            ClosedError: the router was closed meanwhile.
            SlotBudgetError, RouterError, PearStoreError: see `load`.
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
        return answers.fetch()  # a GPU may begin with the next batch meanwhile

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
        """The tasks and what they add; None if another thread evicted one.

        Args:
            last: then it is loaded again, while everybody waits.
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
        if not eager or not np.array_equal(walk.start, np.arange(len(images))):  # dynamo tells copies apart
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
        """Lets a GPU's stream wait for the forward before, which another thread may have put into another stream."""
        if self._end is not None:
            torch.cuda.current_stream(self.adapted.device).wait_event(self._end)

    def _note_end(self) -> None:
        if self.adapted.device.type == "cuda":
            self._end = torch.cuda.current_stream(self.adapted.device).record_event()

    def clear(self) -> None:
        """Gives the slots' memory back, after the forward under way."""
        with self.adapted.turn:
            self.slots.clear()
            self._merger.forget()
            if self._graphs is not None:
                self._graphs.clear()

    def _adds(self, use: Use, number: int, shared: bool) -> list[Hashable]:
        """What a task adds at each level; where no image is shared, tasks need not be compared."""
        if not shared:
            return [number]
        levels = self.adapted.levels
        return by_level(use.adds, levels.of, len(levels.blocks) + 1)

    def _index(self, rows: Ints) -> Tensor:
        return torch.from_numpy(rows).to(self.adapted.device)


@dataclass(frozen=True)
class _Ready:
    """What a forward needs besides its images."""

    tasks: list[LoadedTask]
    gathered: Gathered


@dataclass(frozen=True, eq=False)
class _Answers:
    """Task by task, its rows and their logits [row, classes] on the device."""

    rows: list[Ints]
    logits: list[Tensor]

    def fetch(self) -> list[tuple[Ints, Tensor]]:
        """Rows, and their logits on the CPU, in one copy."""
        if len({values.shape[1] for values in self.logits}) == 1:
            return [(np.concatenate(self.rows), torch.cat(self.logits).cpu())]
        on_cpu = torch.cat([values.flatten() for values in self.logits]).cpu()
        parts = torch.split(on_cpu, [values.numel() for values in self.logits])
        return [(rows, part.view(v.shape)) for rows, part, v in zip(self.rows, parts, self.logits, strict=True)]
