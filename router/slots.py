"""Adapters on the device, by digest.

A pool holds rank rows of one side and width; row 0 is zero. A tensor lies in a pool once, whatever number of tasks
and positions use it; a branch is a list of row numbers and a scale. So concatenation, mixed ranks and scales of a
position are index operations, and a batch is one gather for each pool.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pear_store import RawTensor, Task
from pear_store.format.codes import matrix_values, to_numpy, up_values
from router.errors import SlotBudgetError
from router.ops import Activation, PositionWeights

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


@dataclass(frozen=True)
class SlotStats:
    """What the slots hold now, and counters since the router was made.

    A hit is a task of a batch that was loaded already, a miss one that had to be; loads count misses, preloads and
    pins; `size_bytes` are those of adapters and heads that are loaded.
    """

    hits: int
    misses: int
    loads: int
    evictions: int
    tasks: int
    tensors: int
    size_bytes: int
    budget_bytes: int | None


@dataclass
class _Entry:
    values: Tensor | Ints
    """The rows of a pool that hold it; the head itself."""
    size_bytes: int
    uses: int = 0


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


class Slots:
    """Loaded tasks, least recently used first out when `budget_bytes` is reached. Thread-safe.

    `_tasks` is the truth: a task is entered last, when its values are there, and taken out first. The entries, the free
    rows and the bytes follow from it. A change that is interrupted, by Ctrl-C or want of memory, leaves `_sound` False;
    then the next call derives them anew.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        widths: Mapping[str, tuple[int, int]],
        budget_bytes: int | None,
    ) -> None:
        self.lock = threading.RLock()
        self._device, self._dtype, self._widths, self._budget = device, dtype, widths, budget_bytes
        self._pools: dict[tuple[int, int], Pool] = {}
        self._entries: dict[Key, _Entry] = {}
        self._tasks: OrderedDict[Hashable, LoadedTask] = OrderedDict()
        self._sound = True
        self._host = torch.empty(0)
        self._ever: Ranks = ()
        self._activations: set[str] = set()
        self._hits = self._misses = self._loads = self._evictions = 0
        self.used_bytes = 0

    @property
    def stats(self) -> SlotStats:
        with self.lock:
            self._mend()
            return SlotStats(
                self._hits, self._misses, self._loads, self._evictions,
                len(self._tasks), len(self._entries), self.used_bytes, self._budget,
            )  # fmt: skip

    def check(self, wanted: Sequence[Use], pinned: Collection[Hashable] = ()) -> None:
        """That these tasks fit together, beside what is pinned.

        Raises:
            SlotBudgetError: they do not.
        """
        if self._budget is None:
            return
        with self.lock:
            beside = [self._tasks[key].use for key in pinned if key in self._tasks]
        sizes = {key: size for use in (*wanted, *beside) for key, size in use.sizes.items()}
        if (needed := sum(sizes.values())) > self._budget:
            raise SlotBudgetError(needed, self._budget)

    @torch.inference_mode()
    def load(
        self,
        wanted: Sequence[Use],
        pinned: Collection[Hashable] = (),
        ahead: bool = False,
        read: Mapping[Hashable, Task] = MappingProxyType({}),
    ) -> list[LoadedTask]:
        """The tasks of one batch, loaded where they are not yet.

        Args:
            read: some of them as read before; others are read here, while everybody waits.
            pinned: keys of tasks that stay, as those wanted do.
            ahead: for a batch to come: counted as loads, but neither as hits nor as misses.

        Raises:
            SlotBudgetError: beside what is pinned they do not fit; nothing was evicted or loaded.
        """
        with self.lock:
            self._mend()
            missing = [use for use in wanted if use.key not in self._tasks]
            if missing:
                self.check(wanted, pinned)
                self._sound = False
            stay = {use.key for use in wanted}.union(pinned)
            for use in wanted:
                if use.key in self._tasks:
                    self._tasks.move_to_end(use.key)
            for use in missing:
                self._make_room(use, stay)
                self._tasks[use.key] = self._put(use, read.get(use.key) or use.read())
            self._sound = True
            self._loads += len(missing)
            if not ahead:
                self._misses += len(missing)
                self._hits += len(wanted) - len(missing)
            return [self._tasks[use.key] for use in wanted]

    def keys(self) -> list[Hashable]:
        """Of all loaded tasks."""
        with self.lock:
            return list(self._tasks)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._tasks

    def evict(self, key: Hashable) -> None:
        """Forgets a task; tensors that no other loaded task uses give up their rows."""
        with self.lock:
            self._mend()
            self._sound = False
            self._evict(key)
            self._sound = True

    def _evict(self, key: Hashable) -> None:
        loaded = self._tasks.pop(key, None)
        freed: dict[Pool, list[Ints]] = {}
        for name in loaded.use.shapes if loaded is not None else ():
            entry = self._entries[name]
            entry.uses -= 1
            if entry.uses == 0:
                if isinstance(entry.values, np.ndarray):
                    assert loaded is not None
                    freed.setdefault(self._pool(name[0], loaded.use.shapes[name][1]), []).append(entry.values)
                self.used_bytes -= entry.size_bytes
                del self._entries[name]
        for pool, rows in freed.items():
            pool.free(rows)

    def _mend(self) -> None:
        """Derives entries, free rows and bytes from the loaded tasks, where a change to them was interrupted."""
        if self._sound:
            return
        entries: dict[Key, _Entry] = {}
        rows: dict[Pool, list[Ints]] = {pool: [] for pool in self._pools.values()}
        for loaded in self._tasks.values():
            for key, values in loaded.values.items():
                if key not in entries:
                    entries[key] = _Entry(values, loaded.use.sizes[key])
                    if isinstance(values, np.ndarray):
                        rows[self._pools[key[0], loaded.use.shapes[key][1]]].append(values)
                entries[key].uses += 1
        for pool, taken in rows.items():
            pool.free_all_but(taken)
        self._entries = entries
        self.used_bytes = sum(entry.size_bytes for entry in entries.values())
        self._sound = True

    def _make_room(self, use: Use, stay: Collection[Hashable]) -> None:
        while self._budget is not None and self.used_bytes + self._missing_bytes(use) > self._budget:
            self._evict(next(key for key in self._tasks if key not in stay))
            self._evictions += 1

    def clear(self) -> None:
        """Gives all memory back."""
        with self.lock:
            self._sound = False
            self._tasks.clear()
            self._pools.clear()
            self._mend()

    def gather(
        self, tasks: Sequence[LoadedTask], units: Mapping[str, Ints], padded: bool = False
    ) -> dict[str, PositionWeights]:
        """What each position adds, gathered once for a forward; positions that no row uses are left out.

        Args:
            tasks: the distinct tasks of the batch.
            units: position -> index into `tasks` of each equal run of rows there; -1 for rows that add nothing.
            padded: give every position that some task used since the router was made, its largest rank rounded up
                to a power of two: so that forms and shapes do not tell which tasks these are, for compiled graphs.
        """
        ranks = self._ever if padded else _union(frozenset(loaded.use.ranks for loaded in tasks))
        if not ranks:
            return {}
        count = sum(rank for _, rank in ranks)
        rows = np.zeros((2, len(tasks) + 1, count), np.int64)  # the last task has none: what -1 picks
        scale = np.zeros((len(tasks) + 1, count), np.float32)
        for i, loaded in enumerate(tasks):
            columns = _columns(loaded.use.ranks, ranks)
            rows[:, i, columns] = loaded.rows
            scale[i, columns] = loaded.use.scale
        down = self._select(DOWN, ranks, units, rows[DOWN], scale)
        up = self._select(UP, ranks, units, rows[UP], scale)
        runs = {id(units[position]): units[position] for position, _ in ranks}
        activation = {key: self._activation(tasks, found, padded) for key, found in runs.items()}
        weights = {}
        for position, _ in ranks:
            d, u = down[position].transpose(1, 2), up[position]
            if len(u) == 1 and not padded:
                d, u = d[0], u[0]
            weights[position] = PositionWeights(d, u, activation[id(units[position])])
        return weights

    def _select(
        self, side: int, ranks: Ranks, units: Mapping[str, Ints], rows: Ints, scale: NDArray[np.float32]
    ) -> dict[str, Tensor]:
        """[units, rank, width] of each position, in the compute dtype: one index_select for each width."""
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
            found = self._pool(side, width).rows.index_select(0, self._to_device([rows[pick] for pick in picks]))
            if side == UP:
                factor = self._to_device([scale[pick] for pick in picks])
                found = found.mul_(factor.unsqueeze(1)).to(self._dtype)
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
        return self._copy(host.pin_memory() if self._device.type == "cuda" else host)

    def _copy(self, host: Tensor) -> Tensor:
        return host.to(self._device, non_blocking=self._device.type == "cuda")

    def _activation(self, tasks: Sequence[LoadedTask], units: Ints, padded: bool) -> Activation:
        named = [loaded.use.task.activation for loaded in tasks]
        names = sorted(self._activations if padded else set(named))
        if len(names) == 1:
            return names[0]
        found = np.array([*named, "identity"])[units]
        return {name: torch.from_numpy(found == name).to(self._device).view(-1, 1, 1) for name in names}

    def _pool(self, side: int, width: int) -> Pool:
        pool = self._pools.get((side, width))
        if pool is None:
            dtype = torch.float32 if side else self._dtype
            pool = self._pools[side, width] = Pool(width, self._device, dtype)
        return pool

    def _missing_bytes(self, use: Use) -> int:
        return sum(size for key, size in use.sizes.items() if key not in self._entries)

    def _put(self, use: Use, task: Task) -> LoadedTask:
        """Lays what is missing into the pools: written there where they are float32 on the CPU, else copied at once."""
        missing: dict[tuple[int, int], list[Key]] = {}
        for key, (_, width) in use.shapes.items():
            if key not in self._entries:
                missing.setdefault((key[0], width), []).append(key)
        to_copy: list[tuple[Key | Pool, Ints, list[Key], int]] = []
        for (side, width), keys in missing.items():
            if side == HEAD:
                to_copy.append((keys[0], np.arange(0), keys, use.elements[keys[0]]))
                continue
            pool = self._pool(side, width)
            rows = pool.take(sum(use.shapes[key][0] for key in keys))
            start = 0
            for key in keys:
                rank = use.shapes[key][0]
                self._entries[key] = _Entry(rows[start : start + rank], use.sizes[key])
                start += rank
            run = pool.run(rows) if self._device.type == "cpu" and pool.rows.dtype == torch.float32 else None
            if run is None:
                to_copy.append((pool, rows, keys, len(rows) * width))
            else:
                _write(use, task, keys, run.numpy().reshape(-1))
        self._copy_all(use, task, to_copy)
        for key in use.sizes:
            entry = self._entries[key]
            self.used_bytes += entry.size_bytes if entry.uses == 0 else 0
            entry.uses += 1
        self._ever = _union(frozenset((self._ever, _rounded(use.ranks))))
        self._activations.add(use.task.activation)
        return self._loaded(use)

    def _copy_all(self, use: Use, task: Task, parts: Sequence[tuple[Key | Pool, Ints, list[Key], int]]) -> None:
        """Copies adapters and heads to the device in one piece.

        Args:
            parts: the head, or a pool and its rows; the keys that go there, and how many elements they are.
        """
        if not parts:
            return
        counts = [count for *_, count in parts]
        host = self._staging(sum(counts))
        values, start = host.numpy(), 0
        for _, _, keys, count in parts:
            _write(use, task, keys, values[start : start + count])
            start += count
        for (target, rows, _, _), part in zip(parts, torch.split(self._copy(host), counts), strict=True):
            if isinstance(target, Pool):
                target.put(rows, part.view(len(rows), -1))
            else:
                self._entries[target] = _Entry(part.clone(), use.sizes[target])

    def _staging(self, count: int) -> Tensor:
        """float32 [count] on the host, to be filled and copied: pinned for a GPU, else one buffer used again."""
        if self._device.type == "cuda":
            return torch.empty(count, pin_memory=True)
        if len(self._host) < count:
            self._host = torch.empty(count)
        return self._host[:count]

    def _loaded(self, use: Use) -> LoadedTask:
        sides = zip(*((down, up) for branches in use.branches.values() for down, up, _ in branches), strict=True)
        rows = [np.concatenate([self._entries[key].values for key in side]) for side in sides]
        head = None
        for key in use.shapes:
            if key[0] == HEAD:
                classes, width = use.shapes[key]
                both = self._entries[key].values
                assert isinstance(both, Tensor)
                head = (both[: classes * width].view(classes, width), both[classes * width :])
        values = {key: self._entries[key].values for key in use.shapes}
        return LoadedTask(use, np.stack(rows) if rows else np.zeros((2, 0), np.int64), head, values)


def without_bytes(task: Task) -> Task:
    """A task that says all but the values of its tensors, and keeps no map of a pack alive."""
    tensors = {key: RawTensor.checked(raw.dtype, raw.shape, b"", raw.digest) for key, raw in task.tensors.items()}
    return Task(task.record, tensors)


def _write(use: Use, task: Task, keys: Sequence[Key], out: NDArray[np.float32]) -> None:
    """Some keys' values, one behind the other."""
    start = 0
    for key in keys:
        end = start + use.elements[key]
        use.write(key, task, out[start:end])
        start = end


@lru_cache(4096)
def _union(patterns: frozenset[Ranks]) -> Ranks:
    """Each position's largest rank."""
    found: dict[str, int] = {}
    for pattern in sorted(patterns):
        for position, rank in pattern:
            found[position] = max(rank, found.get(position, 0))
    return tuple(found.items())


@lru_cache(4096)
def _rounded(ranks: Ranks) -> Ranks:
    return tuple((position, 1 << (rank - 1).bit_length()) for position, rank in ranks)


@lru_cache(4096)
def _columns(own: Ranks, of: Ranks) -> Ints:
    """Where a task's rows lie among those of a batch."""
    starts = dict(zip((position for position, _ in of), np.cumsum([0, *(rank for _, rank in of)]), strict=False))
    return np.concatenate([np.arange(starts[p], starts[p] + rank) for p, rank in own] or [np.arange(0)])
