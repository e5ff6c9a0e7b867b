"""The tasks of a server: those of its store for its backbone, and those added to its router."""

import bisect
import difflib
import json
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pear_store import PearStoreError, ReadableStore, Task, Version
from router.errors import RouterError
from router.registry import Known
from router.router import Router

NEAR = 3
"""Most similar names that are offered for an unknown one."""

ACCURACY = ("test_top1", "val_top1", "top1", "accuracy")
"""Metrics that lists show: shares of right answers, from 0 to 1."""

log = logging.getLogger(__name__)
Tensors = NDArray[np.uint64]
"""For each tensor the first 8 bytes of its digest and its size in bytes, uint64 [tensor, 2]."""


@dataclass(frozen=True)
class Entry:
    """The part of a task that lists need."""

    classes: int
    metrics: Mapping[str, float]
    tensors: Tensors


class Catalogue:
    """The tasks at the last refresh. It reads the store, so call it from a thread, not from the event loop."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._lock = threading.Lock()
        self._listed: dict[str, Version | None] | None = None
        self._entries: dict[tuple[str, int, int], Entry | None] = {}
        """(task, version, time) -> its entry; None if it is for another backbone."""
        self._shared: dict[str, int] | None = None
        """Name -> bytes that other tasks use, too."""

    def forget(self) -> None:
        """Drops the list, so that the next access reads the store again."""
        with self._lock:
            self._listed = self._shared = None

    def tasks(self) -> dict[str, Version | None]:
        """Name -> newest version, sorted by name. None for a task that was added to the router.

        Raises:
            PearStoreError: the store cannot be read.
        """
        with self._lock:
            if self._listed is None:
                stored = self._stored()
                found = {version.task: version for version in stored if self._entry(version) is not None}
                added = dict.fromkeys(self._router.added())
                self._listed = dict(sorted({**found, **added}.items()))
                kept = {(version.task, version.version, version.time_ns) for version in stored}
                self._entries = {key: entry for key, entry in self._entries.copy().items() if key in kept}
            return self._listed

    def _stored(self) -> list[Version]:
        return [] if self._router.store is None else list(self._router.store.iter_tasks())

    def _entry(self, version: Version) -> Entry | None:
        """The entry of a version. None if it is for another backbone, or cannot be read."""
        key = version.task, version.version, version.time_ns
        if key not in self._entries:
            assert self._router.store is not None
            try:
                found = _entry_in(self._router.store, f"{version.task}@{version.version}", self._router.backbone.digest)
            except PearStoreError as error:
                log.warning("task %s@%d is left out of lists: %s", version.task, version.version, error)
                return None
            self._entries[key] = found
        return self._entries[key]

    def shared_bytes(self) -> Mapping[str, int]:
        """Task of the store -> its bytes that other tasks of this server use, too.

        Raises:
            PearStoreError: the store cannot be read.
        """
        tasks = self.tasks()
        with self._lock:
            if self._shared is None:
                entries = {name: self._entry(version) for name, version in tasks.items() if version is not None}
                self._shared = _shared({name: entry.tensors for name, entry in entries.items() if entry is not None})
            return self._shared

    def near(self, name: str) -> list[str]:
        """Names of tasks that are similar to an unknown one, the most similar first."""
        try:
            names = self.tasks()
        except PearStoreError:
            return []
        base = name.partition("@")[0][:100]
        same_start = [one for one in names if one[:1].lower() == base[:1].lower()]
        return difflib.get_close_matches(base, (same_start or list(names))[:1000], NEAR)

    def page(self, count: int, after: str, part: str) -> dict[str, Any]:
        """A page of the tasks whose names contain `part`, in any case.

        Args:
            count: most tasks on the page.
            after: the page starts behind this name.
        Raises:
            PearStoreError: the store cannot be read.
        """
        tasks = self.tasks()
        matching = [name for name in tasks if part in name.lower()] if part else list(tasks)
        start = bisect.bisect_right(matching, after)
        names = matching[start : start + count]
        return {
            "tasks": [self.summary(name, tasks[name]) for name in names],
            "total": len(tasks),
            "matching": len(matching),
            "next": names[-1] if start + count < len(matching) else None,
        }

    def summary(self, name: str, version: Version | None) -> dict[str, Any]:
        """The entry of a task in a list. For its newest version, it has the bytes that other tasks use, too.

        Raises:
            PearStoreError: the store cannot be read.
        """
        if version is None:
            entry = _entry(self._router.lookup(name).task.record, _NONE)
            shared = None
        else:
            entry = self._entry(version) or Entry(0, {}, _NONE)
            newest = self.tasks().get(name)
            is_newest = newest is not None and newest.version == version.version
            shared = self.shared_bytes().get(name) if is_newest and len(entry.tensors) else None
        return {
            "name": name,
            "version": None if version is None else version.version,
            "size_bytes": None if version is None else version.size_bytes,
            "shared_bytes": shared,
            "classes": entry.classes,
            "metrics": dict(entry.metrics),
            "tags": [] if version is None else list(version.tags),
        }

    def describe(self, reference: str) -> dict[str, Any]:
        """The description of a task.

        Raises:
            RouterError, PearStoreError: the task cannot be run.
        """
        known: Known = self._router.lookup(reference)
        task, found = known.task, self.summary(known.name, known.version)
        return {
            **found,
            "classes": len(task.labels),
            "labels": list(task.labels),
            "threshold": task.threshold,
            "preprocess": dict(task.preprocess),
            "metrics": _finite(task.record.get("metrics")),
            "backbone": {"model": task.backbone_model, "digest": task.backbone_digest},
            "loaded": self._is_loaded(known),
        }

    def _is_loaded(self, known: Known) -> bool:
        try:
            return self._router.is_loaded(known)
        except RouterError:
            return False


_NONE: Tensors = np.empty((0, 2), np.uint64)


def _entry_in(store: ReadableStore, reference: str, backbone: str) -> Entry | None:
    """The entry of a stored version. None if it is for another backbone.

    A remote's tensors are not fetched for it. So the bytes that its tasks share are not known.
    """
    record = store.record(reference)
    if record["backbone"]["digest"] != backbone:
        return None
    tensors = _NONE if store.is_remote else _tensors_of(store.get(reference, copy=False))
    return _entry(record, tensors)


def _tensors_of(task: Task) -> Tensors:
    digests = ((digest, raw.size_bytes) for digest, raw in task.tensors.items() if digest.startswith("sha256:"))
    found = [(int(digest[7:23], 16), size_bytes) for digest, size_bytes in digests]
    return np.array(found, np.uint64) if found else _NONE


def _entry(record: Mapping[str, Any], tensors: Tensors) -> Entry:
    metrics = record.get("metrics")
    known = metrics if isinstance(metrics, dict) else {}
    shown = {name: float(known[name]) for name in ACCURACY if _is_share(known.get(name))}
    return Entry(len(record.get("labels") or ()), shown, tensors)


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _shared(tensors: Mapping[str, Tensors]) -> dict[str, int]:
    """Name -> bytes of the tensors that another task has, too."""
    if not tensors:
        return {}
    rows = np.concatenate(list(tensors.values()))
    _, which, uses = np.unique(rows[:, 0], return_inverse=True, return_counts=True)
    sizes = np.where(uses[which] > 1, rows[:, 1], 0).astype(np.int64)
    before = np.concatenate([[0], np.cumsum(sizes)])
    ends = np.cumsum([len(one) for one in tensors.values()])
    totals = before[ends] - before[ends - [len(one) for one in tensors.values()]]
    return dict(zip(tensors, totals.tolist(), strict=True))


def _finite(metrics: object) -> object:
    """A record's metrics. Empty if JSON cannot hold them."""
    try:
        json.dumps(metrics, allow_nan=False)
    except ValueError:
        return {}
    return metrics or {}
