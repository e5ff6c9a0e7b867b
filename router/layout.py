"""The layout of tasks in slots: which matrices they need, and how their positions use them."""

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from pear_store import RawTensor, Task
from pear_store.format.checkpoint import Activation
from pear_store.format.codes import matrix_values, to_numpy, up_values
from pear_store.format.digest import Digest
from pear_store.format.record import Adapter, map_tensor_names

DOWN, UP, HEAD, BASE_DOWN, BASE_UP, CORE = range(6)
POOLED = (DOWN, UP, CORE)
"""Sides that lie in pools, as rows. The other sides are tensors of their own."""
Key = tuple[int, str]
"""A side, and the digests of the stored tensors."""
Ints = NDArray[np.int64]
STRUCTURE = ("activation", "adapters", "positions", "head")
"""The fields of a record that its layout depends on."""
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


@dataclass(frozen=True, slots=True)
class Part:
    """A matrix, a core or a head that each task of a layout needs on the device."""

    side: int
    name: str
    """Its stored tensors, as a template for their digests: "{3} at 5" is the fifth matrix in the stack of number 3."""
    shape: tuple[int, int]
    """(rank, width) of an adapter's side, (R, S) of a base's, (1, R * S) of a core, (classes, features) of a head."""
    elements: int
    size_bytes: int
    """Bytes on the device."""
    adapter: str
    """The adapter that gives its values; "" for the head."""


class Layout:
    """What tasks of one form have in common in slots: which parts they need, and how their positions use these.

    A task's tensors have numbers here, not digests. So one layout serves all tasks whose records say the same of
    adapters, positions and head. It is computed once, and a task keeps little besides its digests.

    Args:
        form: see `Layouts`.
        dtype: compute precision, in which `down`, bases and cores are kept. `up` is float32, because scales are
            applied before the cast. Heads are float32.
    """

    def __init__(self, form: str, dtype: torch.dtype) -> None:
        self._dtype = dtype
        record, tensors = json.loads(form)
        named = ((Digest(f"{{{number}}}"), tensor) for number, tensor in enumerate(tensors))
        self.task = Task(record, {n: RawTensor.checked(kind, tuple(shape), b"", n) for n, (kind, shape) in named})
        """The activation, adapters, positions and head. Names and digests of tensors are "{0}", "{1}" and so on."""

    @property
    def activation(self) -> Activation:
        return self.task.activation

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
    def parts(self) -> tuple[Part, ...]:
        """All parts. The head is the last one."""
        found: dict[Key, Part] = {}
        for name, keys in self._keys.items():
            for key in keys:
                if key not in found:
                    found[key] = self._part(key, self._shape(key[0], self.task.adapters[name]), name)
        if (head := self.task.head) is not None:
            key = HEAD, head.key(self.task.tensors)
            found[key] = self._part(key, head.weight.shape, "")
        return tuple(found.values())

    def _part(self, key: Key, shape: tuple[int, int], adapter: str) -> Part:
        side, name = key
        elements = shape[0] * (shape[1] + (side == HEAD))
        dtype = self.dtype_of(side)
        return Part(side, name, shape, elements, elements * dtype.itemsize, adapter)

    def _shape(self, side: int, adapter: Adapter) -> tuple[int, int]:
        if side == CORE:
            assert adapter.core is not None
            return 1, adapter.core.shape[0] * adapter.core.shape[1]
        return adapter.up.shape if side == BASE_UP else (adapter.rank, adapter.shape[side == UP])

    def dtype_of(self, side: int) -> torch.dtype:
        return torch.float32 if side in (UP, HEAD) else self._dtype

    @cached_property
    def _branches(self) -> dict[str, tuple[tuple[tuple[int, ...], float], ...]]:
        """Position -> its branches, as numbers of parts and a scale: of `down`, `up`, and a core that stays apart."""
        numbers = {(part.side, part.name): number for number, part in enumerate(self.parts)}
        keyed = {name: tuple(numbers[key] for key in keys) for name, keys in self._keys.items()}
        return {
            position: tuple((keyed[branch.adapter], branch.scale) for branch in branches)
            for position, branches in self.task.positions.items()
        }

    @cached_property
    def plain(self) -> dict[str, tuple[tuple[int, int, float], ...]]:
        """Position -> its branches without a separate core, as numbers of `down` and `up`, and the scale."""
        found = {
            position: tuple((numbers[0], numbers[1], scale) for numbers, scale in branches if len(numbers) == 2)
            for position, branches in self._branches.items()
        }
        return {position: branches for position, branches in found.items() if branches}

    @cached_property
    def cored(self) -> dict[str, tuple[tuple[int, int, int, float], ...]]:
        """Position -> its branches on bases, as numbers of the bases and of the core, and the scale. Sorted."""
        found = {
            position: tuple((*numbers[:3], scale) for numbers, scale in self._branches[position] if len(numbers) == 3)
            for position in sorted(self._branches)
        }
        return {position: branches for position, branches in found.items() if branches}

    @cached_property
    def cores(self) -> tuple[int, ...]:
        """Number of the core of each branch on bases, in the order of `stands`."""
        return tuple(core for branches in self.cored.values() for _, _, core, _ in branches)

    @cached_property
    def core_scale(self) -> NDArray[np.float32]:
        """Scales of the branches on bases, float32 [branch]."""
        return np.array([scale for branches in self.cored.values() for *_, scale in branches], np.float32)

    @cached_property
    def ranks(self) -> Ranks:
        """The number of rank rows at each position."""
        return tuple(
            (position, sum(self.parts[up].shape[0] for _, up, _ in branches))
            for position, branches in self.plain.items()
        )

    @cached_property
    def scale(self) -> NDArray[np.float32]:
        """Scales of all rank rows, position after position, float32 [rank]."""
        every = [(scale, self.parts[up].shape[0]) for branches in self.plain.values() for _, up, scale in branches]
        return np.repeat(np.array([scale for scale, _ in every], np.float32), [rank for _, rank in every])

    def keys(self, digests: Sequence[Digest]) -> list[Key]:
        """The keys of a task's parts.

        Args:
            digests: of its tensors, by number.
        """
        names = self._names.format(*digests).split("\n")  # one call of `format`, because a miss waits for it
        return [(part.side, name) for part, name in zip(self.parts, names, strict=False)]

    @cached_property
    def _names(self) -> str:
        return "\n".join(part.name for part in self.parts)

    def stands(self, keys: Sequence[Key]) -> Stands:
        """The bases at each position, without the task's own cores and scales.

        Args:
            keys: of a task's parts.
        """
        found = []
        for position, branches in self.cored.items():
            bases = (
                Bases(keys[down], keys[up], (self.parts[down].shape[0], self.parts[up].shape[0]))
                for down, up, *_ in branches
            )
            found.append((position, tuple(bases)))
        return _same(tuple(found))

    def adds(self, keys: Sequence[Key]) -> dict[str, Hashable]:
        """Position -> a value that is equal for two tasks if they add the same there. `keys` as for `stands`."""
        return {
            position: (tuple(map(keys.__getitem__, numbers)), scales, self.activation)
            for position, numbers, scales in self._adds
        }

    @cached_property
    def _adds(self) -> list[tuple[str, tuple[int, ...], tuple[float, ...]]]:
        found = []
        for position in self.task.positions:
            branches = sorted(self._branches[position], key=lambda branch: len(branch[0]))  # plain ones first
            numbers = tuple(chain.from_iterable(numbers for numbers, _ in branches))
            found.append((position, numbers, tuple(scale for _, scale in branches)))
        return found

    def write(self, part: Part, tensors: Mapping[str, RawTensor], out: NDArray[np.float32]) -> None:
        """Writes the values of a part into `out` [elements]: rank rows, or a head's weight and then its bias.

        Args:
            tensors: a task's tensors with their bytes, under the names that they have here.
        """
        if part.side == HEAD:
            head = self.task.head
            assert head is not None
            weight, bias = matrix_values(head.weight, tensors), to_numpy(tensors[head.bias])
            out[: weight.size].reshape(weight.shape)[...] = weight
            out[weight.size :] = bias
        else:
            out.reshape(part.shape)[...] = _values(part.side, self.task.adapters[part.adapter], tensors)


class Layouts:
    """The layouts that some task has. Equal ones are one object. Thread-safe.

    Args:
        dtype: compute precision.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._layouts: WeakValueDictionary[str, Layout] = WeakValueDictionary()

    def of(self, task: Task) -> tuple[Layout, list[Digest]]:
        """A task's layout, and the digests of its tensors by number."""
        numbers: dict[Digest, int] = {}
        shapes = []

        def numbered(name: str) -> str:
            tensor = task.tensors[name]
            if tensor.digest not in numbers:
                numbers[tensor.digest] = len(numbers)
                shapes.append((tensor.dtype, tensor.shape))
            return f"{{{numbers[tensor.digest]}}}"

        record = map_tensor_names({key: task.record[key] for key in STRUCTURE}, numbered)
        form = json.dumps((record, shapes), separators=(",", ":"))
        layout = self._layouts.get(form)
        if layout is None:
            layout = self._layouts[form] = Layout(form, self._dtype)
        return layout, list(numbers)


def _values(side: int, adapter: Adapter, tensors: Mapping[str, RawTensor]) -> NDArray[np.floating[Any]]:
    """A side of an adapter as rows."""
    if side in (DOWN, BASE_DOWN):
        return matrix_values(adapter.down, tensors).T
    if side == CORE:
        assert adapter.core is not None
        return matrix_values(adapter.core, tensors).reshape(1, -1)
    return up_values(adapter, tensors) if side == UP else matrix_values(adapter.up, tensors)


@lru_cache(4096)
def _same(stands: Stands) -> Stands:
    """One object for all equal values, so that comparing them is fast."""
    return stands


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
