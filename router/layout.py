"""The layout of a task in slots: which matrices it needs, under which keys, and how its positions use them."""

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
"""Sides that lie in pools, as rows. The other sides are tensors of their own."""
Key = tuple[int, str]
"""A side, and the digests of the stored tensors."""
Ints = NDArray[np.int64]
Ranks = tuple[tuple[str, int], ...]
"""Positions, and the total rank of the branches there. Positions without branches are left out."""


@dataclass(frozen=True, slots=True)
class Bases:
    """A `down` and an `up` with a separate core between them."""

    down: Key
    up: Key
    ranks: tuple[int, int]
    """Shape (R, S) of the core."""


Stands = tuple[tuple[str, tuple[Bases, ...]], ...]
"""Positions, and the bases that a task uses there."""


@dataclass(frozen=True)
class Use:
    """A task's layout in slots, computed once: which matrices it needs, and how its positions use them."""

    key: Hashable
    task: Task
    """Its tensors may lack their bytes, see `without_bytes`."""
    dtype: torch.dtype
    """Compute precision, in which `down` and bases are kept. `up`, cores and heads are float32, because scales are
    applied before the cast."""
    read: Callable[[], Task] = field(repr=False)
    """Reads the task with its tensors' bytes. Drop the result soon: it may hold maps of packs, and so descriptors."""

    @cached_property
    def on_bases(self) -> frozenset[str]:
        """The adapters whose core stays apart: their `down` and `up` serve only one position, and only with cores.

        Common bases are of this kind. A `down` and `up` that serve several positions belong to one task alone. There
        the core is multiplied into `up`, so the branch runs together with plain ones.
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
        """Adapter -> the keys of its `down` and `up`, and of its core if that stays apart."""
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
        """Key -> the adapter that gives its values; "" for the head."""
        found: dict[Key, str] = {}
        for name, keys in self._keys.items():
            for key in keys:
                found.setdefault(key, name)
        if (head := self.task.head) is not None:
            found[HEAD, head.key(self.task.tensors)] = ""
        return found

    @cached_property
    def shapes(self) -> dict[Key, tuple[int, int]]:
        """Key -> shape: (rank, width) of an adapter's side, (1, R * S) of a core, (classes, features) of the head."""
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
        """Key -> bytes on the device."""
        return {key: count * self.dtype_of(key[0]).itemsize for key, count in self.elements.items()}

    def dtype_of(self, side: int) -> torch.dtype:
        return self.dtype if side in (DOWN, BASE_DOWN, BASE_UP) else torch.float32

    @cached_property
    def branches(self) -> dict[str, tuple[tuple[Key, Key, float], ...]]:
        """Position -> its branches without a separate core, as (key of `down`, key of `up`, scale)."""
        found = {}
        for position, branches in self.task.positions.items():
            keys = [(self._keys[one.adapter], one.scale) for one in branches]
            found[position] = tuple((*key, scale) for key, scale in keys if len(key) == 2)
        return {position: branches for position, branches in found.items() if branches}

    @cached_property
    def cored(self) -> dict[str, tuple[tuple[Bases, Key, float], ...]]:
        """Position -> its branches on bases, as (bases, key of the core, scale)."""
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
        """The bases at each position, without the task's own cores and scales."""
        stands = ((position, tuple(bases for bases, _, _ in branches)) for position, branches in self.cored.items())
        return _same(tuple(sorted(stands, key=lambda one: one[0])))

    @cached_property
    def cores(self) -> tuple[tuple[Key, float], ...]:
        """(key of the core, scale) of each branch on bases, in the order of `stands`."""
        return tuple((core, scale) for position, _ in self.stands for _, core, scale in self.cored[position])

    @cached_property
    def core_scale(self) -> NDArray[np.float32]:
        """Scales of the branches on bases, float32 [branch]."""
        return np.array([scale for _, scale in self.cores], np.float32)

    @cached_property
    def adds(self) -> dict[str, Hashable]:
        """Position -> a value that is equal for two tasks if they add the same there."""
        return {
            position: (self.branches.get(position, ()), self.cored.get(position, ()), self.task.activation)
            for position in self.task.positions
        }

    @cached_property
    def ranks(self) -> Ranks:
        """The number of rank rows at each position."""
        return tuple(
            (position, sum(self.shapes[up][0] for _, up, _ in branches)) for position, branches in self.branches.items()
        )

    @cached_property
    def scale(self) -> NDArray[np.float32]:
        """Scales of all rank rows, position after position, float32 [rank]."""
        every = [(scale, self.shapes[up][0]) for branches in self.branches.values() for _, up, scale in branches]
        return np.repeat(np.array([scale for scale, _ in every], np.float32), [rank for _, rank in every])

    def write(self, key: Key, task: Task, out: NDArray[np.float32]) -> None:
        """Writes the values of a key into `out` [elements]: rank rows, or a head's weight and then its bias.

        Args:
            task: the task with its tensors' bytes.
        """
        if key[0] == HEAD:
            head = self.task.head
            assert head is not None
            weight, bias = matrix_values(head.weight, task.tensors), to_numpy(task.tensors[head.bias])
            out[: weight.size].reshape(weight.shape)[...] = weight
            out[weight.size :] = bias
        else:
            adapter = self.task.adapters[self._sources[key]]  # self.task is already parsed, `task` is not
            out.reshape(self.shapes[key])[...] = _values(key[0], adapter, task)


@dataclass(frozen=True, eq=False)
class LoadedTask:
    """A task in its slots."""

    use: Use
    rows: Ints
    """Rows in the pools of `down` and of `up`, position after position, int64 [2, rank]."""
    head: tuple[Tensor, Tensor] | None
    """Weight [classes, features] and bias [classes], float32."""
    cores: Ints
    """Rows in the pools of cores, in the order of the task's `stands`, int64 [branch]."""
    values: Mapping[Key, Tensor | Ints] = field(repr=False)
    """Key -> its rows in a pool, or the head or base itself."""


def _values(side: int, adapter: Adapter, task: Task) -> NDArray[np.floating[Any]]:
    """A side of an adapter as rows."""
    if side in (DOWN, BASE_DOWN):
        return matrix_values(adapter.down, task.tensors).T
    if side == CORE:
        assert adapter.core is not None
        return matrix_values(adapter.core, task.tensors).reshape(1, -1)
    return up_values(adapter, task.tensors) if side == UP else matrix_values(adapter.up, task.tensors)


@lru_cache(4096)
def _same(stands: Stands) -> Stands:
    """One object for all equal values, so that comparing them is fast."""
    return stands


def without_bytes(task: Task) -> Task:
    """The task without its tensors' values. So it keeps no map of a pack alive."""
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
    """The places of a task's rank rows among those of a batch, int64 [rank]."""
    starts = dict(zip((position for position, _ in of), np.cumsum([0, *(rank for _, rank in of)]), strict=False))
    return np.concatenate([np.arange(starts[p], starts[p] + rank) for p, rank in own] or [np.arange(0)])
