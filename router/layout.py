"""How a task lies in slots: which matrices it needs there, under which keys, and how its positions use them."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pear_store import RawTensor, Task
from pear_store.format.codes import matrix_values, to_numpy, up_values

DOWN, UP, HEAD = 0, 1, 2
Key = tuple[int, str]
"""DOWN, UP or HEAD, and the digests of what is stored."""
Ints = NDArray[np.int64]
Ranks = tuple[tuple[str, int], ...]
"""Positions, and the rank of all branches there together."""


@dataclass(frozen=True)
class Use:
    """A task as it is to lie in slots, worked out once: what it needs there, and how its positions use that."""

    key: Hashable
    task: Task
    """Its tensors may lack their bytes, see `without_bytes`."""
    dtype: torch.dtype
    """Of the compute, in which `down` is kept; `up` is float32, because scales are applied before the cast."""
    read: Callable[[], Task] = field(repr=False)
    """The task with its tensors' bytes. Drop it soon: it may hold maps of the store's packs, and so descriptors."""

    @cached_property
    def _keys(self) -> dict[str, tuple[Key, Key]]:
        """Of each adapter's `down` and `up`."""
        keys = {name: adapter.keys(self.task.tensors) for name, adapter in self.task.adapters.items()}
        return {name: ((DOWN, down), (UP, up)) for name, (down, up) in keys.items()}

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
        """[rank, width] of an adapter's side as rows; [classes, features] of the head."""
        found = {}
        for (side, stored), name in self._sources.items():
            if side == HEAD:
                assert self.task.head is not None
                found[side, stored] = self.task.head.weight.shape
            else:
                adapter = self.task.adapters[name]
                found[side, stored] = adapter.rank, adapter.shape[side]
        return found

    @cached_property
    def elements(self) -> dict[Key, int]:
        return {key: rows * (width + (key[0] == HEAD)) for key, (rows, width) in self.shapes.items()}

    @cached_property
    def sizes(self) -> dict[Key, int]:
        """Bytes on the device."""
        return {key: count * (self.dtype.itemsize if key[0] == DOWN else 4) for key, count in self.elements.items()}

    @cached_property
    def branches(self) -> dict[str, tuple[tuple[Key, Key, float], ...]]:
        """Position -> its branches: the keys of `down` and `up`, and the scale."""
        return {
            position: tuple((*self._keys[one.adapter], one.scale) for one in branches)
            for position, branches in self.task.positions.items()
        }

    @cached_property
    def adds(self) -> dict[str, Hashable]:
        """What each position adds: equal where two tasks add the same."""
        return {position: (branches, self.task.activation) for position, branches in self.branches.items()}

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
            up = key[0] == UP
            rows = up_values(adapter, task.tensors) if up else matrix_values(adapter.down, task.tensors).T
            out.reshape(self.shapes[key])[...] = rows


@dataclass(frozen=True)
class LoadedTask:
    """A task in its slots."""

    use: Use
    rows: Ints
    """int64 [2, rank]: rows in the pools of `down` and of `up`, position after position."""
    head: tuple[Tensor, Tensor] | None
    """float32 weight [classes, features] and bias [classes]."""
    values: Mapping[Key, Tensor | Ints] = field(repr=False)
    """What each of its keys has: rows of a pool, or the head itself."""


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
