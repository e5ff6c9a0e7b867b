"""How a task lies in slots: which matrices it needs there, under which keys, and how its positions use them."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pear_store import RawTensor, Task
from pear_store.format.codes import matrix_values, to_numpy, up_values
from pear_store.format.record import Adapter

DOWN, UP, HEAD, BASE_DOWN, BASE_UP, CORE = range(6)
POOLED = (DOWN, UP, CORE)
"""What lies in pools, as rows; all else is a tensor of its own."""
Key = tuple[int, str]
"""One of these sides, and the digests of what is stored."""
Ints = NDArray[np.int64]
Ranks = tuple[tuple[str, int], ...]
"""Positions, and the rank of all branches there together; those without branches are left out."""


@dataclass(frozen=True, slots=True)
class Bases:
    """A `down` and an `up` that stay what they are, with a core between."""

    down: Key
    up: Key
    ranks: tuple[int, int]
    """Of the core: [R, S]."""


Stands = tuple[tuple[str, tuple[Bases, ...]], ...]
"""Positions, and the bases that a task stands on there."""


@dataclass(frozen=True)
class Use:
    """A task as it is to lie in slots, worked out once: what it needs there, and how its positions use that."""

    key: Hashable
    task: Task
    """Its tensors may lack their bytes, see `without_bytes`."""
    dtype: torch.dtype
    """Of the compute, in which `down` and bases are kept; what scales are applied to before the cast is float32."""
    read: Callable[[], Task] = field(repr=False)
    """The task with its tensors' bytes. Drop it soon: it may hold maps of the store's packs, and so descriptors."""

    @cached_property
    def on_bases(self) -> frozenset[str]:
        """The adapters whose core stays a core: those whose `down` and `up` serve one position, through cores alone.

        So common bases are. What a task brings for several positions of its own, nobody else has: with the core
        multiplied into `up`, such a branch runs together with the plain ones.
        """
        adapters, tensors = self.task.adapters, self.task.tensors
        pairs = {name: (adapter.down.key(tensors), adapter.up.key(tensors)) for name, adapter in adapters.items()}
        plain = {pairs[name] for name, adapter in adapters.items() if adapter.core is None}
        serve: dict[tuple[str, str], set[str]] = {}
        for position, branches in self.task.positions.items():
            for branch in branches:
                serve.setdefault(pairs[branch.adapter], set()).add(position)
        return frozenset(name for name, pair in pairs.items() if pair not in plain and len(serve.get(pair, ())) == 1)

    @cached_property
    def _keys(self) -> dict[str, tuple[Key, ...]]:
        """Of each adapter: of its `down` and `up`, and of a core that stays one."""
        found: dict[str, tuple[Key, ...]] = {}
        tensors = self.task.tensors
        for name, adapter in self.task.adapters.items():
            if name in self.on_bases and adapter.core is not None:
                down, up, core = (matrix.key(tensors) for matrix in (adapter.down, adapter.up, adapter.core))
                found[name] = (BASE_DOWN, down), (BASE_UP, up), (CORE, core)
            else:
                down, up = adapter.keys(tensors)
                found[name] = (DOWN, down), (UP, up)
        return found

    @cached_property
    def _sources(self) -> dict[Key, str]:
        """The adapter that gives each key its values; "" for the head."""
        found: dict[Key, str] = {}
        for name, keys in self._keys.items():
            for key in keys:
                found.setdefault(key, name)
        if (head := self.task.head) is not None:
            found[HEAD, head.key(self.task.tensors)] = ""
        return found

    @cached_property
    def shapes(self) -> dict[Key, tuple[int, int]]:
        """[rank, width] of an adapter's side as rows; [1, R * S] of a core; [classes, features] of the head."""
        found = {}
        for (side, stored), name in self._sources.items():
            if side == HEAD:
                assert self.task.head is not None
                found[side, stored] = self.task.head.weight.shape
                continue
            adapter = self.task.adapters[name]
            if side == CORE:
                assert adapter.core is not None
                found[side, stored] = 1, adapter.core.shape[0] * adapter.core.shape[1]
            elif side == BASE_UP:
                found[side, stored] = adapter.up.shape
            else:
                found[side, stored] = adapter.rank, adapter.shape[side == UP]
        return found

    @cached_property
    def elements(self) -> dict[Key, int]:
        return {key: rows * (width + (key[0] == HEAD)) for key, (rows, width) in self.shapes.items()}

    @cached_property
    def sizes(self) -> dict[Key, int]:
        """Bytes on the device."""
        return {key: count * self.dtype_of(key[0]).itemsize for key, count in self.elements.items()}

    def dtype_of(self, side: int) -> torch.dtype:
        return self.dtype if side in (DOWN, BASE_DOWN, BASE_UP) else torch.float32

    @cached_property
    def branches(self) -> dict[str, tuple[tuple[Key, Key, float], ...]]:
        """Position -> its branches without a core: the keys of `down` and `up`, and the scale."""
        found = {}
        for position, branches in self.task.positions.items():
            keys = [(self._keys[one.adapter], one.scale) for one in branches]
            found[position] = tuple((*key, scale) for key, scale in keys if len(key) == 2)
        return {position: branches for position, branches in found.items() if branches}

    @cached_property
    def cored(self) -> dict[str, tuple[tuple[Bases, Key, float], ...]]:
        """Position -> its branches on bases: these, the key of the core, and the scale."""
        found = {}
        for position, branches in self.task.positions.items():
            cored = []
            for one in branches:
                if len(keys := self._keys[one.adapter]) == 3:
                    down, up, core = keys
                    ranks = self.shapes[down][0], self.shapes[up][0]
                    cored.append((Bases(down, up, ranks), core, one.scale))
            found[position] = tuple(cored)
        return {position: branches for position, branches in found.items() if branches}

    @cached_property
    def stands(self) -> Stands:
        """The bases at each position, without what is this task's own."""
        stands = ((position, tuple(bases for bases, _, _ in branches)) for position, branches in self.cored.items())
        return _same(tuple(sorted(stands, key=lambda one: one[0])))

    @cached_property
    def cores(self) -> tuple[tuple[Key, float], ...]:
        """Of each branch on bases the core's key and the scale, in the order of `stands`."""
        return tuple((core, scale) for position, _ in self.stands for _, core, scale in self.cored[position])

    @cached_property
    def core_scale(self) -> NDArray[np.float32]:
        """[branch]"""
        return np.array([scale for _, scale in self.cores], np.float32)

    @cached_property
    def adds(self) -> dict[str, Hashable]:
        """What each position adds: equal where two tasks add the same."""
        return {
            position: (self.branches.get(position, ()), self.cored.get(position, ()), self.task.activation)
            for position in self.task.positions
        }

    @cached_property
    def ranks(self) -> Ranks:
        """Rank rows at each position."""
        return tuple(
            (position, sum(self.shapes[up][0] for _, up, _ in branches)) for position, branches in self.branches.items()
        )

    @cached_property
    def scale(self) -> NDArray[np.float32]:
        """[rank] of all rank rows, position after position."""
        every = [(scale, self.shapes[up][0]) for branches in self.branches.values() for _, up, scale in branches]
        return np.repeat(np.array([scale for scale, _ in every], np.float32), [rank for _, rank in every])

    def write(self, key: Key, task: Task, out: NDArray[np.float32]) -> None:
        """The values of a key of the task as read into [elements]: rows of rank, or a head's weight, then its bias."""
        if key[0] == HEAD:
            head = self.task.head
            assert head is not None
            weight, bias = matrix_values(head.weight, task.tensors), to_numpy(task.tensors[head.bias])
            out[: weight.size].reshape(weight.shape)[...] = weight
            out[weight.size :] = bias
        else:
            adapter = self.task.adapters[self._sources[key]]  # parsed already; the task as read is not
            out.reshape(self.shapes[key])[...] = _values(key[0], adapter, task)


@dataclass(frozen=True, eq=False)
class LoadedTask:
    """A task in its slots."""

    use: Use
    rows: Ints
    """int64 [2, rank]: rows in the pools of `down` and of `up`, position after position."""
    head: tuple[Tensor, Tensor] | None
    """float32 weight [classes, features] and bias [classes]."""
    cores: Ints
    """int64 [branch]: rows in the pools of cores, in the order of the task's `stands`."""
    values: Mapping[Key, Tensor | Ints] = field(repr=False)
    """What each of its keys has: rows of a pool, or the head or the base itself."""


def _values(side: int, adapter: Adapter, task: Task) -> NDArray[np.floating[Any]]:
    """What a side of an adapter is as rows."""
    if side in (DOWN, BASE_DOWN):
        return matrix_values(adapter.down, task.tensors).T
    if side == CORE:
        assert adapter.core is not None
        return matrix_values(adapter.core, task.tensors).reshape(1, -1)
    return up_values(adapter, task.tensors) if side == UP else matrix_values(adapter.up, task.tensors)


@lru_cache(4096)
def _same(stands: Stands) -> Stands:
    """One object for all tasks that stand on the same, so that they are told apart fast."""
    return stands


def without_bytes(task: Task) -> Task:
    """A task that says all but the values of its tensors, and keeps no map of a pack alive."""
    tensors = {key: RawTensor.checked(raw.dtype, raw.shape, b"", raw.digest) for key, raw in task.tensors.items()}
    return Task(task.record, tensors)


@lru_cache(4096)
def union(patterns: frozenset[Ranks]) -> Ranks:
    """Each position's largest rank."""
    found: dict[str, int] = {}
    for pattern in sorted(patterns):
        for position, rank in pattern:
            found[position] = max(rank, found.get(position, 0))
    return tuple(found.items())


@lru_cache(4096)
def rounded(ranks: Ranks) -> Ranks:
    return tuple((position, 1 << (rank - 1).bit_length()) for position, rank in ranks)


@lru_cache(4096)
def columns_of(own: Ranks, of: Ranks) -> Ints:
    """Where a task's rows lie among those of a batch."""
    starts = dict(zip((position for position, _ in of), np.cumsum([0, *(rank for _, rank in of)]), strict=False))
    return np.concatenate([np.arange(starts[p], starts[p] + rank) for p, rank in own] or [np.arange(0)])
