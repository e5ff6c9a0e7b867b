"""Slots: which tasks are loaded on the device, and which one is evicted when another needs its memory.

A tensor is stored once, also if many tasks and positions use it.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pear_store import Task
from router.errors import SlotBudgetError
from router.layout import HEAD, POOLED, Ints, Key, LoadedTask, Use
from router.matrices import Matrices, Pool

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


@dataclass(eq=False)
class _Entry:
    values: Tensor | Ints
    """Its rows in a pool, or the head or base itself."""
    size_bytes: int
    uses: int = 0


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
        self._entries: dict[Key, _Entry] = {}
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
            beside = [self._tasks[key].use for key in pinned if key in self._tasks]
        sizes = {key: size for use in (*wanted, *beside) for key, size in use.sizes.items()}
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
    def load(self, use: Use, task: Task, stay: Collection[Hashable] = ()) -> None:
        """Loads a task, unless it is already loaded.

        Args:
            task: the task with its tensors' bytes.
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
            self._make_room(use, stay)
            self._tasks[use.key] = self._put(use, task)
            self._sound = True
            self._loads += 1
        if log.isEnabledFor(logging.DEBUG):
            size, seconds = sum(use.sizes.values()), time.perf_counter() - began
            log.debug("loaded task %s: %d bytes in %.4f s", use.task.name, size, seconds)

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
        for name in loaded.use.shapes if loaded is not None else ():
            entry = self._entries[name]
            entry.uses -= 1
            if entry.uses == 0:
                if isinstance(entry.values, np.ndarray):
                    assert loaded is not None
                    freed.setdefault(self.matrices.pool(name[0], loaded.use.shapes[name][1]), []).append(entry.values)
                self.used_bytes -= entry.size_bytes
                del self._entries[name]
        for pool, rows in freed.items():
            pool.free(rows)

    def _mend(self) -> None:
        """Computes entries, free rows and bytes anew from the loaded tasks, if a change was interrupted."""
        if self._sound:
            return
        entries: dict[Key, _Entry] = {}
        rows: dict[Pool, list[Ints]] = {pool: [] for pool in self.matrices.pools.values()}
        for loaded in self._tasks.values():
            for key, values in loaded.values.items():
                if key not in entries:
                    entries[key] = _Entry(values, loaded.use.sizes[key])
                    if isinstance(values, np.ndarray):
                        rows[self.matrices.pools[key[0], loaded.use.shapes[key][1]]].append(values)
                entries[key].uses += 1
        for pool, taken in rows.items():
            pool.free_all_but(taken)
        self._entries = entries
        self.used_bytes = sum(entry.size_bytes for entry in entries.values())
        self._sound = True

    def _make_room(self, use: Use, stay: Collection[Hashable]) -> None:
        while self._budget is not None and self.used_bytes + self._missing_bytes(use) > self._budget:
            oldest = next((key for key in self._tasks if key not in stay), None)
            if oldest is None:
                raise SlotBudgetError(self.used_bytes + self._missing_bytes(use), self._budget)
            self._evict(oldest)
            self._evictions += 1

    def clear(self) -> None:
        """Frees all memory."""
        with self.lock:
            self._sound = False
            self._tasks.clear()
            self.matrices.pools.clear()
            self._mend()

    def _missing_bytes(self, use: Use) -> int:
        return sum(size for key, size in use.sizes.items() if key not in self._entries)

    def _put(self, use: Use, task: Task) -> LoadedTask:
        """Puts missing tensors into the pools. Float32 pools on the CPU are written directly; others get one copy."""
        missing: dict[tuple[int, int], list[Key]] = {}
        for key, (_, width) in use.shapes.items():
            if key not in self._entries:
                missing.setdefault((key[0], width), []).append(key)
        to_copy: list[tuple[Key | Pool, Ints, list[Key], int]] = []
        for (side, width), keys in missing.items():
            if side not in POOLED:
                to_copy += [(key, np.arange(0), [key], use.elements[key]) for key in keys]
                continue
            pool = self.matrices.pool(side, width)
            rows = pool.take(sum(use.shapes[key][0] for key in keys))
            start = 0
            for key in keys:
                rank = use.shapes[key][0]
                self._entries[key] = _Entry(rows[start : start + rank], use.sizes[key])
                start += rank
            run = pool.run(rows) if self.matrices.device.type == "cpu" and pool.rows.dtype == torch.float32 else None
            if run is None:
                to_copy.append((pool, rows, keys, len(rows) * width))
            else:
                _write(use, task, keys, run.numpy().reshape(-1))
        self._copy_all(use, task, to_copy)
        for key in use.sizes:
            entry = self._entries[key]
            self.used_bytes += entry.size_bytes if entry.uses == 0 else 0
            entry.uses += 1
        self.matrices.remember(use)
        return self._loaded(use)

    def _copy_all(self, use: Use, task: Task, parts: Sequence[tuple[Key | Pool, Ints, list[Key], int]]) -> None:
        """Copies adapters and heads to the device in one piece.

        Args:
            parts: (key of the head or of a base, or the pool; its rows; the keys to write; their number of elements).
        """
        if not parts:
            return
        counts = [count for *_, count in parts]
        host = self.matrices.staging(sum(counts))
        values, start = host.numpy(), 0
        for _, _, keys, count in parts:
            _write(use, task, keys, values[start : start + count])
            start += count
        for (target, rows, _, _), part in zip(parts, torch.split(self.matrices.copy(host), counts), strict=True):
            if isinstance(target, Pool):
                target.put(rows, part.view(len(rows), -1))
            else:
                value = part.to(use.dtype_of(target[0]), copy=True)
                value = value if target[0] == HEAD else value.view(use.shapes[target])
                self._entries[target] = _Entry(value, use.sizes[target])

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
        cores = [self._entries[key].values for key, _ in use.cores]
        return LoadedTask(
            use, np.stack(rows) if rows else np.zeros((2, 0), np.int64), head,
            np.concatenate([np.arange(0), *cores]), values,
        )  # fmt: skip


def _write(use: Use, task: Task, keys: Sequence[Key], out: NDArray[np.float32]) -> None:
    """Writes the values of several keys into `out`, one after another."""
    start = 0
    for key in keys:
        end = start + use.elements[key]
        use.write(key, task, out[start:end])
        start = end
