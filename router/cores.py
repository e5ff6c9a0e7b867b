"""Branches on common bases: what a batch multiplies once for all rows, and the core of each row.

    y + φ(x · D) · C · U            D [d_in, R] and U [S, d_out]: of all rows; C [R, S]: of a row's task

Where tasks of a batch stand on several bases, these lie side by side, and a core is zero where its task does not stand.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from router.layout import Bases, Ints, LoadedTask, Stands, Use

WIDER = 2
"""Bases lie side by side for all rows if their ranks together are at most so many times what one task needs there."""

Pair = tuple[int, int]
"""Along R and along S."""


@dataclass(frozen=True, slots=True)
class Span:
    """What the cores of a batch span at one position.

    Args:
        ranks: [R, S].
        apart: each run of rows has bases of its own, because the batch has too many; else all have the same.
    """

    ranks: Pair
    apart: bool = False

    def over(self, other: "Span | None") -> "Span":
        """What holds both, its ranks rounded up to powers of two."""
        first, second = ((1 << (rank - 1).bit_length()) for rank in self.ranks)
        if other is None:
            return Span((first, second), self.apart)
        return Span((max(first, other.ranks[0]), max(second, other.ranks[1])), self.apart or other.apart)


Spans = tuple[tuple[str, Span], ...]


@dataclass(frozen=True, slots=True)
class Block:
    """Where cores on some bases lie in the span of their position."""

    position: str
    start: Pair
    ranks: Pair


@dataclass(frozen=True, slots=True, eq=False)
class Cored:
    """What branches on bases need at a position: `down` [d_in, R], `core` [R, S] and `up` [S, d_out].

    The core, and bases that are apart, have an axis of runs of rows before these.
    """

    down: Tensor
    core: Tensor
    up: Tensor

    def take(self, other: "Cored") -> None:
        """Copies another's values into this one's memory."""
        for kept, made in ((self.down, other.down), (self.core, other.core), (self.up, other.up)):
            kept.copy_(made)

    def own(self) -> "Cored":
        return Cored(self.down.clone(), self.core.clone(), self.up.clone())


@dataclass(frozen=True)
class _Plan:
    """How the cores of a batch lie, from what its tasks stand on."""

    spans: dict[str, Span] = field(default_factory=dict)
    blocks: dict[Block, int] = field(default_factory=dict)
    """With their numbers."""
    columns: list[list[int]] = field(default_factory=list)
    """For each of the batch's `Stands`, the block of each of its branches."""
    laid: dict[str, list[tuple[tuple[Block, Bases], ...]]] = field(default_factory=dict)
    """Position -> the bases side by side, of each of the `Stands` where they are apart."""


class Cores:
    """The branches on bases of a router's batches. Not thread-safe.

    Args:
        dtype: of the compute.
        widths: position -> (d_in, d_out).
        select: the rows [row, width] of a pool of cores in the compute dtype, multiplied by a scale each, from the
            pool's width, the rows' numbers and the scales, both in parts.
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
        """Counts a task among those that padded batches have room for."""
        self._widen(_lay((use.stands,), frozenset()).spans)

    def spans(self, tasks: Sequence[LoadedTask], padded: bool) -> Spans:
        """What cores span at each position of a batch.

        Args:
            padded: every position that some task used since the router was made, its largest ranks rounded up.
        """
        found = self._plan(tasks, padded)[0].spans
        if not padded:
            return tuple(found.items())
        self._widen(found)
        return tuple(sorted(self._ever.items()))

    def gather(
        self, tasks: Sequence[LoadedTask], units: Mapping[str, Ints], spans: Spans, padded: bool
    ) -> dict[str, Cored]:
        """What each position adds on bases.

        Args:
            tasks, units: see `Matrices.gather`.
            spans: what `spans` gave for these tasks.
        """
        if not spans:
            return {}
        plan, kinds = self._plan(tasks, padded)
        alike = {kind: loaded for kind, loaded in zip(kinds, tasks, strict=False) if loaded.use.stands}
        values = {key: value for loaded in alike.values() for key, value in loaded.values.items()}
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
                    laid.append(self._laid(size, []))  # of the rows that add nothing
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
        """How cores lie; and for each task, and for none, the number of what it stands on."""
        numbers: dict[int, int] = {}
        kinds = [numbers.setdefault(id(loaded.use.stands), len(numbers)) for loaded in tasks]
        stands = {id(loaded.use.stands): loaded.use.stands for loaded in tasks}
        apart = frozenset(position for position, span in self._ever.items() if span.apart) if padded else frozenset()
        return _lay(tuple(stands.values()), apart), [*kinds, -1]

    def _gather_cores(
        self, tasks: Sequence[LoadedTask], units: Mapping[str, Ints], plan: _Plan, kinds: Sequence[int]
    ) -> dict[str, list[tuple[Block, Tensor]]]:
        """Position -> blocks, and what lies there of each run of rows [runs, R, S]."""
        rows = np.zeros((len(tasks) + 1, len(plan.blocks)), np.int64)  # the last task has none: what -1 picks
        scale = np.zeros((len(tasks) + 1, len(plan.blocks)), np.float32)
        for i, loaded in enumerate(tasks):
            columns = plan.columns[kinds[i]]
            rows[i, columns], scale[i, columns] = loaded.cores, loaded.use.core_scale
        alike: dict[int, dict[int, list[tuple[Block, int]]]] = {}  # by width of the pool, and by what the units are
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
        """[runs, R, S], zero where no block lies."""
        if len(blocks) == 1 and blocks[0][0].ranks == ranks:
            return blocks[0][1]
        core = torch.zeros(runs, *ranks, device=self._device, dtype=self._dtype)
        for block, values in blocks:
            (first, second), (high, wide) = block.start, block.ranks
            core[:, first : first + high, second : second + wide] += values
        return core

    def _laid(self, size: Pair, bases: Sequence[tuple[int, Tensor | Ints]]) -> Tensor:
        """[rank, width] of bases, each with its first row; the very tensor where there is but one."""
        parts = [(start, base) for start, base in bases if isinstance(base, Tensor)]
        if len(parts) == 1 and parts[0][1].shape == size:
            return parts[0][1]
        rows = torch.zeros(size, device=self._device, dtype=self._dtype)
        for start, base in parts:
            rows[start : start + len(base)] = base
        return rows


@lru_cache(1024)
def _lay(stands: tuple[Stands, ...], apart: frozenset[str]) -> _Plan:
    """How the cores of tasks lie.

    Args:
        apart: positions whose bases are apart in any case.
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
"""Bases, told apart where a task has several cores on the same."""


def _numbered(bases: Sequence[Bases]) -> _Numbered:
    return tuple((one, bases[:i].count(one)) for i, one in enumerate(bases))


def _ranks(bases: _Numbered) -> Pair:
    """[R, S] of bases side by side."""
    return sum(one.ranks[0] for one, _ in bases), sum(one.ranks[1] for one, _ in bases)


def _places(position: str, bases: _Numbered) -> dict[tuple[Bases, int], Block]:
    return {one: Block(position, _ranks(bases[:i]), one[0].ranks) for i, one in enumerate(bases)}
