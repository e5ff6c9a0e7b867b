"""Slots: which tasks are loaded on the device, and which one is evicted when another needs its memory.

A tensor is stored once, also if many tasks and positions use it.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pear_store import RawTensor
from router.errors import SlotBudgetError
from router.layout import HEAD, POOLED, Ints, Key, Layout, Part
from router.matrices import Matrices, Pool
from router.use import Entry, LoadedTask, Use

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SlotStats:
    """The contents of the slots now, and counters since the router was made."""

    hits: int
    """Tasks of batches that were already loaded. A task counts once per batch."""
    misses: int
    """Tasks of batches that had to be loaded."""
    loads: int
    """Tasks that were loaded, by misses, preloads and pins."""
    evictions: int
    """Tasks that were evicted because others needed their memory."""
    tasks: int
    """Tasks that are loaded now."""
    tensors: int
    """Distinct matrices, cores and heads that are loaded now."""
    size_bytes: int
    """Bytes of these on the device."""
    budget_bytes: int | None
    """The router's slot_bytes."""


class Slots:
    """The loaded tasks. When `budget_bytes` is reached, the least recently used one is evicted. Thread-safe.

    `_tasks` decides what is loaded. A task is entered last, after its values, and removed first. Entries, free rows and
    bytes follow from it. If a change is interrupted, by Ctrl-C or too little memory, `_sound` stays False. Then the
    next call computes them anew.
    """

    def __init__(self, matrices: Matrices, budget_bytes: int | None) -> None:
        self.lock = threading.RLock()
        self.matrices = matrices
        self._budget = budget_bytes
        self._entries: dict[Key, Entry] = {}
        self._tasks: OrderedDict[Hashable, LoadedTask] = OrderedDict()
        self._sound = True
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
        """Checks that these tasks fit together with the pinned ones.

        Raises:
            SlotBudgetError: they do not fit.
        """
        if self._budget is None:
            return
        with self.lock:
            loaded = [self._tasks[key] for key in (*pinned, *(use.key for use in wanted)) if key in self._tasks]
            missing = [use for use in wanted if use.key not in self._tasks]
        sizes = {entry.key: entry.size_bytes for one in loaded for entry in one.entries}
        for use in missing:
            sizes.update(use.sizes())
        if (needed := sum(sizes.values())) > self._budget:
            raise SlotBudgetError(needed, self._budget)

    def count(self, wanted: Sequence[Use]) -> None:
        """Counts the tasks of a batch as hits or misses."""
        with self.lock:
            hits = sum(use.key in self._tasks for use in wanted)
            self._hits += hits
            self._misses += len(wanted) - hits

    def find(self, wanted: Sequence[Use]) -> list[LoadedTask] | None:
        """The loaded tasks, which become the most recently used. None unless all are loaded."""
        with self.lock:
            self._mend()
            if not all(use.key in self._tasks for use in wanted):
                return None
            for use in wanted:
                self._tasks.move_to_end(use.key)
            return [self._tasks[use.key] for use in wanted]

    @torch.inference_mode()
    def load(self, use: Use, tensors: Mapping[str, RawTensor], stay: Collection[Hashable] = ()) -> None:
        """Loads a task, unless it is already loaded.

        Args:
            tensors: its tensors with their bytes, under their layout's names.
            stay: keys of tasks that must not be evicted.
        Raises:
            SlotBudgetError: it does not fit without evicting one of those.
        """
        with self.lock:
            self._mend()
            if use.key in self._tasks:
                return
            began = time.perf_counter()
            self._sound = False
            sizes = use.sizes()
            self._make_room(sizes, stay)
            self._tasks[use.key] = self._put(use, list(sizes), tensors)
            self._sound = True
            self._loads += 1
        if log.isEnabledFor(logging.DEBUG):
            size, seconds = sum(sizes.values()), time.perf_counter() - began
            log.debug("loaded task %s: %d bytes in %.4f s", use.name, size, seconds)

    def keys(self) -> list[Hashable]:
        """The keys of all loaded tasks."""
        with self.lock:
            return list(self._tasks)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._tasks

    def evict(self, key: Hashable) -> None:
        """Unloads a task. Frees the tensors that no other loaded task uses."""
        with self.lock:
            self._mend()
            self._sound = False
            self._evict(key)
            self._sound = True

    def _evict(self, key: Hashable) -> None:
        loaded = self._tasks.pop(key, None)
        freed: dict[Pool, list[Ints]] = {}
        for part, entry in loaded.parts if loaded is not None else ():
            entry.uses -= 1
            if entry.uses == 0:
                if isinstance(entry.values, np.ndarray):
                    freed.setdefault(self.matrices.pool(part.side, part.shape[1]), []).append(entry.values)
                self.used_bytes -= entry.size_bytes
                del self._entries[entry.key]
        for pool, rows in freed.items():
            pool.free(rows)

    def _mend(self) -> None:
        """Computes entries, free rows and bytes anew from the loaded tasks, if a change was interrupted."""
        if self._sound:
            return
        entries: dict[Key, Entry] = {}
        rows: dict[Pool, list[Ints]] = {pool: [] for pool in self.matrices.pools.values()}
        for loaded in self._tasks.values():
            for part, entry in loaded.parts:
                if entry.key not in entries:
                    entries[entry.key], entry.uses = entry, 0
                    if isinstance(entry.values, np.ndarray):
                        rows[self.matrices.pools[part.side, part.shape[1]]].append(entry.values)
                entry.uses += 1
        for pool, taken in rows.items():
            pool.free_all_but(taken)
        self._entries = entries
        self.used_bytes = sum(entry.size_bytes for entry in entries.values())
        self._sound = True

    def _make_room(self, sizes: Mapping[Key, int], stay: Collection[Hashable]) -> None:
        while self._budget is not None and self.used_bytes + self._missing_bytes(sizes) > self._budget:
            oldest = next((key for key in self._tasks if key not in stay), None)
            if oldest is None:
                raise SlotBudgetError(self.used_bytes + self._missing_bytes(sizes), self._budget)
            self._evict(oldest)
            self._evictions += 1

    def clear(self) -> None:
        """Frees all memory."""
        with self.lock:
            self._sound = False
            self._tasks.clear()
            self.matrices.pools.clear()
            self._mend()

    def _missing_bytes(self, sizes: Mapping[Key, int]) -> int:
        return sum(size for key, size in sizes.items() if key not in self._entries)

    def _put(self, use: Use, keys: Sequence[Key], tensors: Mapping[str, RawTensor]) -> LoadedTask:
        """Puts missing tensors into the pools. Float32 pools on the CPU are written directly; others get one copy."""
        layout = use.layout
        missing: dict[tuple[int, int], dict[Key, Part]] = {}
        for key, part in zip(keys, layout.parts, strict=True):
            if key not in self._entries:
                missing.setdefault((part.side, part.shape[1]), {})[key] = part
        to_copy: list[_Copy] = []
        for (side, width), parts in missing.items():
            if side not in POOLED:
                to_copy += [_Copy(key, np.arange(0), [part]) for key, part in parts.items()]
                continue
            pool = self.matrices.pool(side, width)
            rows = pool.take(sum(part.shape[0] for part in parts.values()))
            start = 0
            for key, part in parts.items():
                rank = part.shape[0]
                self._entries[key] = Entry(key, rows[start : start + rank], part.size_bytes)
                start += rank
            run = pool.run(rows) if self.matrices.device.type == "cpu" and pool.rows.dtype == torch.float32 else None
            if run is None:
                to_copy.append(_Copy(pool, rows, list(parts.values())))
            else:
                _write(layout, parts.values(), tensors, run.numpy().reshape(-1))
        self._copy_all(layout, to_copy, tensors)
        entries = tuple(map(self._entries.__getitem__, keys))
        for entry in entries:
            self.used_bytes += entry.size_bytes if entry.uses == 0 else 0
            entry.uses += 1
        self.matrices.remember(use)
        return _loaded(use, entries)

    def _copy_all(self, layout: Layout, copies: Sequence["_Copy"], tensors: Mapping[str, RawTensor]) -> None:
        """Copies adapters and heads to the device in one piece."""
        if not copies:
            return
        counts = [sum(part.elements for part in copy.parts) for copy in copies]
        host = self.matrices.staging(sum(counts))
        values, start = host.numpy(), 0
        for copy, count in zip(copies, counts, strict=True):
            _write(layout, copy.parts, tensors, values[start : start + count])
            start += count
        for copy, copied in zip(copies, torch.split(self.matrices.copy(host), counts), strict=True):
            if isinstance(copy.target, Pool):
                copy.target.put(copy.rows, copied.view(len(copy.rows), -1))
            else:
                (part,) = copy.parts
                value = copied.to(layout.dtype_of(part.side), copy=True)
                value = value if part.side == HEAD else value.view(part.shape)
                self._entries[copy.target] = Entry(copy.target, value, part.size_bytes)


@dataclass(frozen=True, eq=False, slots=True)
class _Copy:
    """What is to be copied to one place."""

    target: Key | Pool
    """The key of a head or of a base, or a pool."""
    rows: Ints
    """The rows in the pool."""
    parts: list[Part]


def _loaded(use: Use, entries: tuple[Entry, ...]) -> LoadedTask:
    layout = use.layout
    sides = zip(*((down, up) for branches in layout.plain.values() for down, up, _ in branches), strict=True)
    rows = [np.concatenate([entries[number].values for number in side]) for side in sides]
    head = None
    if layout.task.head is not None:
        classes, width = layout.task.head.weight.shape
        both = entries[-1].values
        assert isinstance(both, Tensor)
        head = (both[: classes * width].view(classes, width), both[classes * width :])
    cores = [entries[number].values for number in layout.cores]
    return LoadedTask(
        use, np.stack(rows) if rows else np.zeros((2, 0), np.int64), head, np.concatenate([np.arange(0), *cores]),
        entries,
    )  # fmt: skip


def _write(layout: Layout, parts: Iterable[Part], tensors: Mapping[str, RawTensor], out: NDArray[np.float32]) -> None:
    """Writes the values of several parts into `out`, one after another."""
    start = 0
    for part in parts:
        end = start + part.elements
        layout.write(part, tensors, out[start:end])
        start = end
