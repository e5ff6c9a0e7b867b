"""What names of tasks mean: their versions until the next refresh, the tasks that were added, and what is pinned."""

import json
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakValueDictionary

import torch

from pear_store import NotFoundError, PearStoreError, ReadableStore, Task, Version, make_task
from pear_store.format.checkpoint import FORMAT, check_record
from pear_store.format.manifest import manifest_hash, to_manifest
from router.errors import ClosedError, TaskError, UnknownTaskError
from router.layout import Use, without_bytes
from router.pictures import Limits
from router.preprocess import Preprocess
from router.tensors import all_finite

KNOWN_TASKS = 4096
"""Of some 50 KB each: most tasks that stay looked up although they are not loaded."""
NAMES = 2**17
"""Of some 300 bytes each: most references whose version is kept until the next refresh."""
READ_AHEAD = 16
"""Most tasks that are held as read from the store; each may hold the map of a pack, and a descriptor."""

log = logging.getLogger(__name__)
Ident = tuple[str, int, int]
"""Task, version and time: what tells one version of a store from all others."""


@dataclass(frozen=True, eq=False)
class Known:
    """What a name means now. Whoever keeps it runs this version, whatever the name comes to mean."""

    use: Use
    preprocess: Preprocess
    version: Version | None
    """What the store had when it was looked up; None for a task that was added."""

    @property
    def key(self) -> Hashable:
        """The hash of the task's manifest."""
        return self.use.key

    @property
    def task(self) -> Task:
        """The task, without its tensors' bytes."""
        return self.use.task


class Registry:
    """What names of tasks mean. Thread-safe: its lock is held for moments, never while something is read.

    Args:
        store: to look tasks up in; may be None.
        check: raises what speaks against running a task on the backbone.
        in_use: whether a key's task is loaded, and so not worth forgetting.
    """

    def __init__(
        self,
        store: ReadableStore | None,
        limits: Limits,
        dtype: torch.dtype,
        check: Callable[[str, Task], None],
        in_use: Callable[[Hashable], bool],
    ) -> None:
        self.store = store
        self.closed = False
        self.changes = 0
        """How often names came to mean something else."""
        self.lock = threading.Lock()
        self._limits, self._dtype, self._check, self._in_use = limits, dtype, check, in_use
        self._added: dict[str, Known] = {}
        """Tasks that were added, which come before the store's."""
        self._known: dict[str, Known] = {}
        """Tasks of the store as they were looked up, the oldest first."""
        self._versions: dict[str, Version] = {}
        """What references stand for until the next refresh, the oldest first."""
        self._read: dict[Hashable, tuple[Use, Task]] = {}
        """Tasks that were looked up just now and will be loaded next."""
        self._uses: WeakValueDictionary[Hashable, Use] = WeakValueDictionary()
        """Whatever is held somewhere, by the hash of its manifest, and by its version."""
        self.pinned: frozenset[str] = frozenset()

    def added(self) -> list[Task]:
        """The tasks that were added."""
        return [known.task for known in self._added.values()]

    def add(self, name: str, task: Task) -> Hashable:
        """Makes a task known that is in no store; returns the key that the name had before, None if it had none.

        Raises:
            RouterError: it cannot run on this backbone.
        """
        for key, raw in task.tensors.items():
            if len(raw.data) != raw.size_bytes:
                raise TaskError(name, f"tensor {key!r} has {len(raw.data)} bytes: its shape takes {raw.size_bytes}")
        self._check(name, task)
        known = Known(Use(_hash(task), task, self._dtype, lambda: task), self._preprocess(task), None)
        with self.lock:
            if self.closed:
                raise ClosedError
            before = self._added.get(name) or self._known.get(name)
            self._added[name] = known
            self.changes += 1
        return before and before.key

    def bare(self, model: str, digest: str, preprocess: Mapping[str, Any]) -> Known:
        """A task that adds nothing to a backbone, and has no head. No name means it."""
        task = make_task(
            {
                "format": FORMAT, "task": "backbone", "backbone": {"model": model, "digest": digest},
                "activation": "identity", "adapters": {}, "positions": {}, "head": None, "labels": [],
                "preprocess": dict(preprocess), "metrics": {}, "training": {},
            }, {}, "the backbone",
        )  # fmt: skip
        return Known(Use(_hash(task), task, self._dtype, lambda: task), self._preprocess(task), None)

    def known(self, name: str) -> Known | None:
        """What a reference means, if that was looked up and is kept; nothing is read."""
        return self._added.get(name) or self._known.get(name)

    def find(self, name: str) -> Known:
        """What a reference means, looked up once and kept until refresh; meanwhile nobody else has to wait.

        Raises:
            UnknownTaskError: neither the store nor `add` knows it.
            RouterError: it cannot run on this backbone.
            PearStoreError: the store cannot be read, or what it has is refused.
        """
        while (known := self.known(name)) is None:
            changes = self.changes
            version = self._versions.get(name) or self._resolve(name)
            found = self._look_up(name, version)
            with self.lock:
                if self.closed:
                    raise ClosedError
                if changes == self.changes:  # else a newer version may be there since
                    return self._enter(name, version, found)
        return known

    def _enter(self, name: str, version: Version, found: Known) -> Known:
        """Enters a task as known, unless another thread did, and forgets the oldest that is not loaded."""
        if (known := self.known(name)) is not None:
            return known
        self._versions[name] = version
        self._known[name] = found
        self._uses[found.key] = found.use
        self._uses[_ident(version)] = found.use
        while len(self._versions) > NAMES and (oldest := next(iter(self._versions))) not in self._known:
            del self._versions[oldest]
        for _ in range(4 if len(self._known) > KNOWN_TASKS else 0):
            oldest = next(iter(self._known))
            known = self._known.pop(oldest)
            if not self._in_use(known.key) and oldest not in self.pinned:
                break
            self._known[oldest] = known
        return found

    def _look_up(self, name: str, version: Version) -> Known:
        """A version of the store, as held somewhere or read and judged."""
        use = self._uses.get(_ident(version))
        if use is None:
            began = time.perf_counter()
            task = self._read_version(version)
            _check_stored(name, task)
            key = _hash(task)
            use = self._uses.get(key)
            if use is None:
                bare = without_bytes(task)
                self._check(name, bare)
                use = Use(key, bare, self._dtype, lambda: self._read_version(version))
                self._keep_read(use, task)
            log.debug("looked task %s up: version %d in %.4f s", name, version.version, time.perf_counter() - began)
        return Known(use, self._preprocess(use.task), version)

    def _keep_read(self, use: Use, task: Task) -> None:
        with self.lock:
            self._read[use.key] = use, task
            if len(self._read) > READ_AHEAD:
                del self._read[next(iter(self._read))]

    def read(self, use: Use) -> Task:
        """A task with its tensors' bytes, as read just now or anew."""
        with self.lock:
            held = self._read.pop(use.key, None)
        return held[1] if held is not None and held[0] is use else use.read()

    def refresh(self) -> dict[str, int | None]:
        """Takes up what changed in the store; what did not change is kept.

        Returns:
            The references that changed, and the version that each stands for now; None where there is none any more.

        Raises:
            PearStoreError: the store cannot be read; nothing changed.
        """
        if self.store is not None:
            self.store.refresh()
        before = {name: version for name, version in dict(self._versions).items() if name not in self._added}
        versions = {name: self._version(name) for name in before}
        changed = {name: now for name, now in versions.items() if not _same(before[name], now)}
        with self.lock:  # what came meanwhile is looked up again: it may be older than this call
            self.changes += 1
            self._known = {n: one for n, one in self._known.items() if n in before and n not in changed}
            self._versions = {n: version for n, version in before.items() if n not in changed}
        return {name: None if now is None else now.version for name, now in changed.items()}

    def stale(self, keys: Iterable[Hashable]) -> list[Hashable]:
        """Those of some keys that no name means any more."""
        with self.lock:
            live = {known.key for names in (self._known, self._added) for known in names.values()}
        return [key for key in keys if key not in live]

    def pinned_keys(self) -> list[Hashable]:
        """Of the pinned tasks that are known."""
        known = map(self.known, self.pinned)
        return [one.key for one in known if one is not None]

    def close(self) -> None:
        """Forgets all tasks."""
        with self.lock:
            self.closed = True
        self._known, self._added, self._versions, self._read = {}, {}, {}, {}

    def _resolve(self, name: str) -> Version:
        if self.store is None:
            raise UnknownTaskError(f"no task {name!r}: this router has no store, and it was not added")
        try:
            return self.store.resolve(name)
        except NotFoundError as error:
            raise UnknownTaskError(str(error)) from None

    def _version(self, name: str) -> Version | None:
        """What a reference stands for in the store now."""
        assert self.store is not None
        try:
            return self.store.resolve(name)
        except NotFoundError:
            return None

    def _read_version(self, version: Version) -> Task:
        assert self.store is not None
        try:
            return self.store.get(f"{version.task}@{version.version}", copy=False)
        except NotFoundError as error:
            raise UnknownTaskError(f"{error}; refresh() takes up what the store has now") from None

    def _preprocess(self, task: Task) -> Preprocess:
        return _preprocess(json.dumps(dict(task.preprocess), sort_keys=True), self._limits)


@lru_cache(256)
def _preprocess(record: str, limits: Limits) -> Preprocess:
    """A preprocessing from its JSON: most tasks have the same one."""
    return Preprocess(json.loads(record), limits)


def _hash(task: Task) -> bytes:
    """The hash of a task's manifest, as a store has it: equal where the tasks are."""
    return manifest_hash(to_manifest(task))


def _ident(version: Version) -> Ident:
    return version.task, version.version, version.time_ns


def _same(a: Version | None, b: Version | None) -> bool:
    """Whether both are one version, whatever its tags; numbers are never used twice."""
    return a is not None and b is not None and _ident(a) == _ident(b)


def _check_stored(name: str, task: Task) -> None:
    """Raises a TaskError for what an `add` refuses, but a pack made by somebody else may hold."""
    try:
        check_record(task.record, {key: (raw.dtype, raw.shape) for key, raw in task.tensors.items()}, "its record")
    except PearStoreError as error:
        raise TaskError(name, str(error)) from None
    for key, raw in task.tensors.items():
        if not all_finite(raw):
            raise TaskError(name, f"tensor {key!r} holds NaN or infinity: expected finite values; remove this version")
