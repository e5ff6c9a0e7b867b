"""Branches on common bases. All rows of a batch share the products with the bases; each row has its task's core.

    y + φ(x · D) · C · U            D [d_in, R] and U [S, d_out]: of all rows; C [R, S]: of a row's task

If the tasks of a batch use several bases, these lie side by side. A core is zero at bases that its task does not use.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from router.layout import Bases, Ints, Stands
from router.use import LoadedTask, Use

WIDER = 2
"""Bases lie side by side for all rows if their total rank is at most this many times the rank that one task needs."""

Pair = tuple[int, int]
"""A number along R, and one along S."""


@dataclass(frozen=True, slots=True)
class Span:
    """The size of a batch's cores at one position.

    Args:
        ranks: (R, S).
        apart: whether each run of rows has its own bases, because the batch uses too many. Else all rows share theirs.
    """

    ranks: Pair
    apart: bool = False

    def over(self, other: "Span | None") -> "Span":
        """The smallest span that holds both. The own ranks are rounded up to powers of two."""
        first, second = ((1 << (rank - 1).bit_length()) for rank in self.ranks)
        if other is None:
            return Span((first, second), self.apart)
        return Span((max(first, other.ranks[0]), max(second, other.ranks[1])), self.apart or other.apart)


Spans = tuple[tuple[str, Span], ...]


@dataclass(frozen=True, slots=True)
class Block:
    """The place of cores on some bases within their position's span."""

    position: str
    start: Pair
    ranks: Pair


@dataclass(frozen=True, slots=True, eq=False)
class Cored:
    """The branches on bases at a position: `down` [d_in, R], `core` [R, S] and `up` [S, d_out].

    The core has a first axis of runs of rows. So have bases that are apart.
    """

    down: Tensor
    core: Tensor
    up: Tensor

    def take(self, other: "Cored") -> None:
        """Copies the values of `other` into this memory."""
        for kept, made in ((self.down, other.down), (self.core, other.core), (self.up, other.up)):
            kept.copy_(made)

    def own(self) -> "Cored":
        return Cored(self.down.clone(), self.core.clone(), self.up.clone())


@dataclass(frozen=True)
class _Plan:
    """The places of a batch's cores and bases. It depends only on the bases that tasks use."""

    spans: dict[str, Span] = field(default_factory=dict)
    blocks: dict[Block, int] = field(default_factory=dict)
    """Block -> its number."""
    columns: list[list[int]] = field(default_factory=list)
    """For each `Stands` of the batch, the block number of each of its branches."""
    laid: dict[str, list[tuple[tuple[Block, Bases], ...]]] = field(default_factory=dict)
    """Position -> the bases side by side; if they are apart, one entry for each `Stands`."""


class Cores:
    """Gathers the branches on bases for a router's batches. Not thread-safe.

    Args:
        dtype: compute precision.
        widths: position -> (d_in, d_out).
        select: gives rows [row, width] of a pool of cores, each multiplied by a scale, in the compute precision. It
            takes the pool's width, the rows' numbers and the scales; both in parts.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        widths: Mapping[str, Pair],
        select: Callable[[int, Sequence[Ints], Sequence[NDArray[np.float32]]], Tensor],
    ) -> None:
        self._device, self._dtype, self._widths, self._select = device, dtype, widths, select
        self._ever: dict[str, Span] = {}

    def remember(self, use: Use) -> None:
        """Makes padded batches large enough for this task."""
        self._widen(_lay((use.stands,), frozenset()).spans)

    def spans(self, tasks: Sequence[LoadedTask], padded: bool) -> Spans:
        """The span of cores at each position of a batch.

        Args:
            padded: give every position that any task has used since the router was made, with its largest ranks
                rounded up.
        """
        found = self._plan(tasks, padded)[0].spans
        if not padded:
            return tuple(found.items())
        self._widen(found)
        return tuple(sorted(self._ever.items()))

    def gather(
        self, tasks: Sequence[LoadedTask], units: Mapping[str, Ints], spans: Spans, padded: bool
    ) -> dict[str, Cored]:
        """The branches on bases at each position.

        Args:
            tasks, units: as for `Matrices.gather`.
            spans: the result of `spans` for these tasks.
        """
        if not spans:
            return {}
        plan, kinds = self._plan(tasks, padded)
        alike = {kind: loaded for kind, loaded in zip(kinds, tasks, strict=False) if loaded.use.stands}
        values = {entry.key: entry.values for loaded in alike.values() for entry in loaded.entries}
        cores = self._gather_cores(tasks, units, plan, kinds)
        found = {}
        for position, span in spans:
            runs = units[position]
            core = self._spanned(len(runs), span.ranks, cores.get(position, []))
            sides = []
            for side in (0, 1):
                size = span.ranks[side], self._widths[position][side]
                laid = [
                    self._laid(size, [(at.start[side], values[base.up if side else base.down]) for at, base in one])
                    for one in plan.laid.get(position, [()] * len(plan.columns))
                ]
                if span.apart:
                    laid.append(self._laid(size, []))  # for the rows that add nothing
                    sides.append(torch.stack([laid[kinds[run]] for run in runs.tolist()]))
                else:
                    sides.append(laid[0])
            down, up = sides
            if len(runs) == 1 and not padded:
                core, down, up = core[0], down.reshape(down.shape[-2:]), up.reshape(up.shape[-2:])
            found[position] = Cored(down.transpose(-1, -2), core, up)
        return found

    def _widen(self, spans: Mapping[str, Span]) -> None:
        for position, span in spans.items():
            self._ever[position] = span.over(self._ever.get(position))

    def _plan(self, tasks: Sequence[LoadedTask], padded: bool) -> tuple[_Plan, list[int]]:
        """The plan, and for each task (and last for no task) the number of its `Stands`."""
        numbers: dict[int, int] = {}
        kinds = [numbers.setdefault(id(loaded.use.stands), len(numbers)) for loaded in tasks]
        stands = {id(loaded.use.stands): loaded.use.stands for loaded in tasks}
        apart = frozenset(position for position, span in self._ever.items() if span.apart) if padded else frozenset()
        return _lay(tuple(stands.values()), apart), [*kinds, -1]

    def _gather_cores(
        self, tasks: Sequence[LoadedTask], units: Mapping[str, Ints], plan: _Plan, kinds: Sequence[int]
    ) -> dict[str, list[tuple[Block, Tensor]]]:
        """Position -> its blocks, each with the cores of all runs of rows [runs, R, S]."""
        rows = np.zeros((len(tasks) + 1, len(plan.blocks)), np.int64)  # the last entry is empty; -1 selects it
        scale = np.zeros((len(tasks) + 1, len(plan.blocks)), np.float32)
        for i, loaded in enumerate(tasks):
            columns = plan.columns[kinds[i]]
            rows[i, columns], scale[i, columns] = loaded.cores, loaded.use.layout.core_scale
        alike: dict[int, dict[int, list[tuple[Block, int]]]] = {}  # by width of the pool, then by identity of units
        for block, column in plan.blocks.items():
            width = block.ranks[0] * block.ranks[1]
            alike.setdefault(width, {}).setdefault(id(units[block.position]), []).append((block, column))
        found: dict[str, list[tuple[Block, Tensor]]] = {}
        for width, by_units in alike.items():
            picks = [
                np.ix_(np.array([column for _, column in blocks]), units[blocks[0][0].position])
                for blocks in by_units.values()
            ]
            values = self._select(width, [rows.T[pick] for pick in picks], [scale.T[pick] for pick in picks])
            sizes = [len(units[block.position]) for blocks in by_units.values() for block, _ in blocks]
            blocks = [block for blocks in by_units.values() for block, _ in blocks]
            for block, part in zip(blocks, torch.split(values, sizes), strict=True):
                found.setdefault(block.position, []).append((block, part.view(-1, *block.ranks)))
        return found

    def _spanned(self, runs: int, ranks: Pair, blocks: Sequence[tuple[Block, Tensor]]) -> Tensor:
        """Cores [runs, R, S] made of blocks, zero elsewhere."""
        if len(blocks) == 1 and blocks[0][0].ranks == ranks:
            return blocks[0][1]
        core = torch.zeros(runs, *ranks, device=self._device, dtype=self._dtype)
        for block, values in blocks:
            (first, second), (high, wide) = block.start, block.ranks
            core[:, first : first + high, second : second + wide] += values
        return core

    def _laid(self, size: Pair, bases: Sequence[tuple[int, Tensor | Ints]]) -> Tensor:
        """Bases side by side, [rank, width]. One that fills it alone is returned itself, without a copy.

        Args:
            bases: (first row, values) of each.
        """
        parts = [(start, base) for start, base in bases if isinstance(base, Tensor)]
        if len(parts) == 1 and parts[0][1].shape == size:
            return parts[0][1]
        rows = torch.zeros(size, device=self._device, dtype=self._dtype)
        for start, base in parts:
            rows[start : start + len(base)] = base
        return rows


@lru_cache(1024)
def _lay(stands: tuple[Stands, ...], apart: frozenset[str]) -> _Plan:
    """Plans the places of the cores of tasks.

    Args:
        apart: positions whose bases are always apart.
    """
    plan = _Plan(columns=[[] for _ in stands])
    for position in sorted({position for one in stands for position, _ in one}):
        own = [_numbered(dict(one).get(position, ())) for one in stands]
        every = tuple(dict.fromkeys(bases for each in own for bases in each))
        needed = max(sum(_ranks(each)) for each in own)
        is_apart = position in apart or sum(_ranks(every)) > WIDER * needed
        groups = own if is_apart else [every]
        first, second = (max(totals) for totals in zip(*map(_ranks, groups), strict=True))
        plan.spans[position] = Span((first, second), is_apart)
        places = [_places(position, group) for group in groups]
        plan.laid[position] = [tuple((at, bases) for (bases, _), at in group.items()) for group in places]
        for i, each in enumerate(own):
            at = places[i if is_apart else 0]
            plan.columns[i].extend(plan.blocks.setdefault(at[bases], len(plan.blocks)) for bases in each)
    return plan


_Numbered = tuple[tuple[Bases, int], ...]
"""Bases, each with a number that distinguishes several cores of a task on the same bases."""


def _numbered(bases: Sequence[Bases]) -> _Numbered:
    return tuple((one, bases[:i].count(one)) for i, one in enumerate(bases))


def _ranks(bases: _Numbered) -> Pair:
    """(R, S) of bases side by side."""
    return sum(one.ranks[0] for one, _ in bases), sum(one.ranks[1] for one, _ in bases)


def _places(position: str, bases: _Numbered) -> dict[tuple[Bases, int], Block]:
    return {one: Block(position, _ranks(bases[:i]), one[0].ranks) for i, one in enumerate(bases)}
