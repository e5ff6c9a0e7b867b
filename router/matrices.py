"""Matrices on the device: pools of rank rows, and what a batch gathers from them.

A pool holds rank rows of one side and width; row 0 is zero. A branch is a list of row numbers and a scale. So
concatenation, mixed ranks and scales of a position are index operations, and a batch is one gather for each pool.
A core is one row of its pool; what it stands between is no business of pools (router/cores.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from router.cores import Cored, Cores, Spans
from router.layout import CORE, DOWN, UP, Ints, LoadedTask, Ranks, Use, columns_of, rounded, union
from router.ops import PositionWeights


class Pool:
    """[capacity, width] on the device, with the rows that are free; grows by half."""

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        self.rows = torch.zeros(64, width, device=device, dtype=dtype)
        self._free = np.arange(1, 64)

    def take(self, count: int) -> Ints:
        """The numbers of free rows, to be filled."""
        old = len(self.rows)
        if len(self._free) < count:
            more = max(old // 2, count)
            self.rows = torch.cat([self.rows, self.rows.new_zeros(more, self.rows.shape[1])])
            self._free = np.concatenate([self._free, np.arange(old, old + more)])
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def run(self, taken: Ints) -> Tensor | None:
        """The memory of rows that lie one behind the other, as rows that were freed together do; else None."""
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
        dtype: of the compute, in which `down` is kept; `up` is float32, because scales are applied before the cast.
        widths: position -> (d_in, d_out).
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, widths: Mapping[str, tuple[int, int]]) -> None:
        self.device = device
        self._dtype, self._widths = dtype, widths
        self.pools: dict[tuple[int, int], Pool] = {}
        """By side and width."""
        self._host = torch.empty(0)
        self._cores = Cores(device, dtype, widths, self._select_cores)
        self._ever: Ranks = ()
        self._activations: set[str] = set()

    def pool(self, side: int, width: int) -> Pool:
        pool = self.pools.get((side, width))
        if pool is None:
            dtype = torch.float32 if side else self._dtype
            pool = self.pools[side, width] = Pool(width, self.device, dtype)
        return pool

    def staging(self, count: int) -> Tensor:
        """float32 [count] on the host, to be filled and copied: pinned for a GPU, else one buffer used again."""
        if self.device.type == "cuda":
            return torch.empty(count, pin_memory=True)
        if len(self._host) < count:
            self._host = torch.empty(count)
        return self._host[:count]

    def copy(self, host: Tensor) -> Tensor:
        """The values on the device; a GPU copies pinned ones while this goes on."""
        return host.to(self.device, non_blocking=self.device.type == "cuda")

    def remember(self, use: Use) -> None:
        """Counts a task among those that padded batches have room for."""
        self._ever = union(frozenset((self._ever, rounded(use.ranks))))
        self._cores.remember(use)
        self._activations.add(use.task.activation)

    def form(self, tasks: Sequence[LoadedTask], padded: bool) -> tuple[Ranks, Spans, tuple[str, ...]]:
        """The positions of a batch with their ranks, what cores span there, and its activations: what its shapes follow
        from.

        Args:
            padded: every position that some task used since the router was made, its largest rank rounded up to a power
                of two: so that form and shapes do not tell which tasks these are.
        """
        spans = self._cores.spans(tasks, padded)
        if padded:
            return self._ever, spans, tuple(sorted(self._activations))
        named = {loaded.use.task.activation for loaded in tasks}
        return union(frozenset(loaded.use.ranks for loaded in tasks)), spans, tuple(sorted(named))

    def gather(
        self,
        tasks: Sequence[LoadedTask],
        units: Mapping[str, Ints],
        padded: bool = False,
        into: "Gathered | None" = None,
    ) -> "Gathered":
        """What each position adds, gathered once for a forward; positions that no row uses are left out.

        Args:
            tasks: the distinct tasks of the batch.
            units: position -> index into `tasks` of each equal run of rows there; -1 for rows that add nothing.
            padded: see `form`.
            into: what an earlier batch of the same form and units gathered: its memory is written to.
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
        rows = np.zeros((2, len(tasks) + 1, count), np.int64)  # the last task has none: what -1 picks
        scale = np.zeros((len(tasks) + 1, count), np.float32)
        for i, loaded in enumerate(tasks):
            columns = columns_of(loaded.use.ranks, ranks)
            rows[:, i, columns] = loaded.rows
            scale[i, columns] = loaded.use.scale
        return rows, scale

    def _select_cores(self, width: int, rows: Sequence[Ints], scales: Sequence[NDArray[np.float32]]) -> Tensor:
        return self._scaled(CORE, width, rows, scales).to(self._dtype)

    def _scaled(
        self, side: int, width: int, rows: Sequence[Ints], scales: Sequence[NDArray[np.float32]] | None = None
    ) -> Tensor:
        """[row, width] of a pool, each row multiplied by its scale."""
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
        """[units, rank, width] of each position, in the compute dtype: one index_select for each width.

        Args:
            flat: by side and width, [row, width]; made here, or written to.
        """
        places: dict[int, dict[int, list[tuple[str, int, int]]]] = {}  # by width, and by what the units are
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
        """Of each activation, the rows that have it; none where there is but one."""
        if len(names) == 1:
            return {}
        found = np.array([*(loaded.use.task.activation for loaded in tasks), "identity"])[units]
        return {name: torch.from_numpy(found == name).to(self.device).view(-1, 1, 1) for name in names}


@dataclass(frozen=True, eq=False)
class Gathered:
    """What a batch gathered."""

    weights: dict[str, PositionWeights]
    """Position -> what it adds: views of the rest."""
    flat: dict[tuple[int, int], Tensor]
    """By side and width: [row, width]."""
    masks: dict[int, dict[str, Tensor]]
    """By what the units are, and by activation: which of them have it."""
    cored: dict[str, Cored]
    """Position -> its branches on bases. The bases may be the very tensors of the slots."""

    def take(self, cored: Mapping[str, Cored], masks: Sequence[Mapping[str, Tensor]]) -> None:
        """Takes in the cores, bases and masks of another batch of this form. Only for memory of its own, see `own`."""
        for kept, made in zip(self.masks.values(), masks, strict=True):
            for name, mask in made.items():
                kept[name].copy_(mask)
        for position, part in cored.items():
            self.cored[position].take(part)

    def own(self) -> "Gathered":
        """The same, in memory that nobody else has."""
        cored = {position: part.own() for position, part in self.cored.items()}
        return replace(self, weights={p: _with(w, cored.get(p)) for p, w in self.weights.items()}, cored=cored)


def _with(weights: PositionWeights, cored: Cored | None) -> PositionWeights:
    """The weights of a position, with these branches on bases in place of its own."""
    if cored is None:
        return weights
    if weights.beside is not None:
        return replace(weights, beside=_with(weights.beside, cored))
    return replace(weights, down=cored.down, up=cored.up, core=cored.core)
