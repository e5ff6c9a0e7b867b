"""Matrices on the device: pools of rank rows, and what a batch gathers from them.

A pool holds rank rows of one side and width; its row 0 is zero. A branch is a list of row numbers and a scale. So
concatenation, mixed ranks and scales are index operations, and a batch needs one gather per pool. A core is one row of
its pool. router/cores.py handles its bases.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from router.cores import Cored, Cores, Spans
from router.layout import CORE, DOWN, UP, Ints, Ranks, columns_of, rounded, union
from router.ops import PositionWeights
from router.use import LoadedTask, Use


class Pool:
    """Rows [capacity, width] on the device. It knows which are free, and grows by half when needed."""

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        self.rows = torch.zeros(64, width, device=device, dtype=dtype)
        self._free = np.arange(1, 64)

    def take(self, count: int) -> Ints:
        """Takes free rows and returns their numbers, int64 [count]."""
        old = len(self.rows)
        if len(self._free) < count:
            more = max(old // 2, count)
            self.rows = torch.cat([self.rows, self.rows.new_zeros(more, self.rows.shape[1])])
            self._free = np.concatenate([self._free, np.arange(old, old + more)])
        taken, self._free = self._free[:count].copy(), self._free[count:]
        return taken  # a copy: a view would keep all that was free in memory

    def run(self, taken: Ints) -> Tensor | None:
        """The memory of the rows if they are consecutive, else None. Rows that were freed together often are."""
        if len(taken) and taken[-1] - taken[0] == len(taken) - 1 and (taken[1:] > taken[:-1]).all():
            return self.rows[taken[0] : taken[-1] + 1]
        return None

    def put(self, taken: Ints, values: Tensor) -> None:
        """Copies [count, width] into taken rows."""
        if (run := self.run(taken)) is not None:
            run.copy_(values)
        else:
            self.rows.index_copy_(0, torch.from_numpy(taken).to(values.device), values.to(self.rows.dtype))

    def free(self, rows: Sequence[Ints]) -> None:
        self._free = np.concatenate([*rows, self._free])

    def free_all_but(self, rows: Sequence[Ints]) -> None:
        self._free = np.setdiff1d(np.arange(1, len(self.rows)), np.concatenate([*rows, np.arange(1)]))


class Matrices:
    """The pools of a router. Not thread-safe.

    Args:
        dtype: compute precision, in which `down` and cores are kept. `up` is float32, because scales are applied before
            the cast. A core with a scale that is no power of two is rounded once more.
        widths: position -> (d_in, d_out).
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, widths: Mapping[str, tuple[int, int]]) -> None:
        self.device = device
        self._dtype, self._widths = dtype, widths
        self.pools: dict[tuple[int, int], Pool] = {}
        """(side, width) -> its pool."""
        self._host = torch.empty(0)
        self._cores = Cores(device, dtype, widths, partial(self._scaled, CORE))
        self._ever: Ranks = ()
        self._activations: set[str] = set()

    def pool(self, side: int, width: int) -> Pool:
        pool = self.pools.get((side, width))
        if pool is None:
            dtype = torch.float32 if side == UP else self._dtype
            pool = self.pools[side, width] = Pool(width, self.device, dtype)
        return pool

    def staging(self, count: int) -> Tensor:
        """Host memory, float32 [count], to fill and copy. For a GPU it is pinned, else it is one reused buffer."""
        if self.device.type == "cuda":
            return torch.empty(count, pin_memory=True)
        if len(self._host) < count:
            self._host = torch.empty(count)
        return self._host[:count]

    def copy(self, host: Tensor) -> Tensor:
        """The values on the device. A GPU copies pinned values in the background."""
        return host.to(self.device, non_blocking=self.device.type == "cuda")

    def remember(self, use: Use) -> None:
        """Makes padded batches large enough for this task."""
        self._ever = union(frozenset((self._ever, rounded(use.layout.ranks))))
        self._cores.remember(use)
        self._activations.add(use.layout.activation)

    def form(self, tasks: Sequence[LoadedTask], padded: bool) -> tuple[Ranks, Spans, tuple[str, ...]]:
        """What a batch's shapes depend on: the rank of each position, the spans of cores, and the activations.

        Args:
            padded: give every position that any task has used since the router was made, with its largest rank rounded
                up to a power of two. Then form and shapes do not depend on the tasks.
        """
        spans = self._cores.spans(tasks, padded)
        if padded:
            return self._ever, spans, tuple(sorted(self._activations))
        named = {loaded.use.layout.activation for loaded in tasks}
        return union(frozenset(loaded.use.layout.ranks for loaded in tasks)), spans, tuple(sorted(named))

    def gather(
        self,
        tasks: Sequence[LoadedTask],
        units: Mapping[str, Ints],
        padded: bool = False,
        into: "Gathered | None" = None,
    ) -> "Gathered":
        """Gathers the weights of each position for one forward. Positions that no row uses are left out.

        Args:
            tasks: the distinct tasks of the batch.
            units: position -> for each equal run of rows, its task as an index into `tasks`; -1: it adds nothing.
            padded: as for `form`.
            into: the result for an earlier batch of the same form and units, whose memory is overwritten.
        """
        ranks, spans, activations = self.form(tasks, padded)
        flat: dict[tuple[int, int], Tensor] = {} if into is None else into.flat
        rows, scale = self._rows(tasks, ranks)
        down = self._select(DOWN, ranks, units, rows[DOWN], scale, flat)
        up = self._select(UP, ranks, units, rows[UP], scale, flat)
        cored = self._cores.gather(tasks, units, spans, padded)
        runs = {id(units[position]): units[position] for position, _ in (*ranks, *spans)}
        masks = [self._masks(tasks, found, activations) for found in runs.values()]
        if into is not None:
            into.take(cored, masks)
            return into
        named = dict(zip(runs, masks, strict=True))
        weights = {}
        for position, part in cored.items():
            activation = named[id(units[position])] or activations[0]
            weights[position] = PositionWeights(part.down, part.up, activation, part.core)
        for position, _ in ranks:
            d, u = down[position].transpose(1, 2), up[position]
            if len(u) == 1 and not padded:
                d, u = d[0], u[0]
            activation = named[id(units[position])] or activations[0]
            weights[position] = PositionWeights(d, u, activation, beside=weights.get(position))
        return Gathered(weights, flat, named, cored)

    def _rows(self, tasks: Sequence[LoadedTask], ranks: Ranks) -> tuple[Ints, NDArray[np.float32]]:
        """The rows of `down` and `up` [2, task, rank], position after position, and their scales [task, rank]."""
        count = sum(rank for _, rank in ranks)
        rows = np.zeros((2, len(tasks) + 1, count), np.int64)  # the last entry is empty; -1 selects it
        scale = np.zeros((len(tasks) + 1, count), np.float32)
        for i, loaded in enumerate(tasks):
            columns = columns_of(loaded.use.layout.ranks, ranks)
            rows[:, i, columns] = loaded.rows
            scale[i, columns] = loaded.use.layout.scale
        return rows, scale

    def _scaled(
        self, side: int, width: int, rows: Sequence[Ints], scales: Sequence[NDArray[np.float32]] | None = None
    ) -> Tensor:
        """Rows [row, width] of a pool, each multiplied by its scale."""
        found = self.pool(side, width).rows.index_select(0, self._to_device(rows))
        return found if scales is None else found.mul_(self._to_device(scales).unsqueeze(1))

    def _select(
        self,
        side: int,
        ranks: Ranks,
        units: Mapping[str, Ints],
        rows: Ints,
        scale: NDArray[np.float32],
        flat: dict[tuple[int, int], Tensor],
    ) -> dict[str, Tensor]:
        """Position -> [units, rank, width] in the compute precision, with one index_select for each width.

        Args:
            flat: (side, width) -> [row, width]. It is filled here, or its memory is overwritten.
        """
        places: dict[int, dict[int, list[tuple[str, int, int]]]] = {}  # by width, then by identity of the units
        start = 0
        for position, rank in ranks:
            alike = places.setdefault(self._widths[position][side], {}).setdefault(id(units[position]), [])
            alike.append((position, start, rank))
            start += rank
        out: dict[str, Tensor] = {}
        for width, by_units in places.items():
            picks = []
            for alike in by_units.values():
                columns = np.concatenate([np.arange(begin, begin + rank) for _, begin, rank in alike])
                picks.append(np.ix_(units[alike[0][0]], columns))
            scales = [scale[pick] for pick in picks] if side == UP else None
            found = self._scaled(side, width, [rows[pick] for pick in picks], scales)
            if (side, width) in flat:
                flat[side, width].copy_(found)
                continue
            found = flat[side, width] = found.to(self._dtype)
            start = 0
            for alike, (runs, columns) in zip(by_units.values(), picks, strict=True):
                count = len(runs) * columns.shape[1]
                part = found[start : start + count].view(len(runs), -1, width)
                each = torch.split(part, [rank for _, _, rank in alike], 1)
                out.update((position, one) for (position, _, _), one in zip(alike, each, strict=True))
                start += count
        return out

    def _to_device(self, parts: Sequence[NDArray[Any]]) -> Tensor:
        host = torch.from_numpy(np.concatenate([part.reshape(-1) for part in parts]))
        return self.copy(host.pin_memory() if self.device.type == "cuda" else host)

    def _masks(self, tasks: Sequence[LoadedTask], units: Ints, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Activation -> a mask of the rows that have it, bool [row, 1, 1]. Empty if there is only one activation."""
        if len(names) == 1:
            return {}
        found = np.array([*(loaded.use.layout.activation for loaded in tasks), "identity"])[units]
        return {name: torch.from_numpy(found == name).to(self.device).view(-1, 1, 1) for name in names}


@dataclass(frozen=True, eq=False)
class Gathered:
    """The gathered weights of a batch."""

    weights: dict[str, PositionWeights]
    """Position -> its branches. They are views of the fields below."""
    flat: dict[tuple[int, int], Tensor]
    """(side, width) -> [row, width]."""
    masks: dict[int, dict[str, Tensor]]
    """Identity of the units -> activation -> mask of the units that have it."""
    cored: dict[str, Cored]
    """Position -> its branches on bases. Bases may be the slots' own tensors."""

    def take(self, cored: Mapping[str, Cored], masks: Sequence[Mapping[str, Tensor]]) -> None:
        """Copies the cores, bases and masks of another batch of this form. The memory must be its own, see `own`."""
        for kept, made in zip(self.masks.values(), masks, strict=True):
            for name, mask in made.items():
                kept[name].copy_(mask)
        for position, part in cored.items():
            self.cored[position].take(part)

    def own(self) -> "Gathered":
        """The same weights, with cores and bases in memory of their own."""
        cored = {position: part.own() for position, part in self.cored.items()}
        return replace(self, weights={p: _with(w, cored.get(p)) for p, w in self.weights.items()}, cored=cored)


def _with(weights: PositionWeights, cored: Cored | None) -> PositionWeights:
    """The weights of a position, with its branches on bases replaced by these."""
    if cored is None:
        return weights
    if weights.beside is not None:
        return replace(weights, beside=_with(weights.beside, cored))
    return replace(weights, down=cored.down, up=cored.up, core=cored.core)
