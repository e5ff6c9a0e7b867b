"""The meaning of tasks' names: their versions until the next refresh, the added tasks, and the pinned ones."""

import json
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any
from weakref import WeakValueDictionary

import torch

from pear_store import NotFoundError, PearStoreError, RawTensor, ReadableStore, Task, Version, make_task
from pear_store.format.checkpoint import FORMAT, check_record
from pear_store.format.manifest import manifest_hash, to_manifest
from router.errors import ClosedError, TaskError, UnknownTaskError
from router.jpegs import JpegDecoder
from router.layout import Layouts
from router.pictures import Limits
from router.preprocess import Preprocess
from router.tensors import all_finite
from router.use import Use

KNOWN_TASKS = 4096
"""Most tasks that are kept after a look-up although they are not loaded. Each takes about 5 KB."""
NAMES = 2**17
"""Most references whose version is kept until the next refresh. Each takes about 300 bytes."""
READ_AHEAD = 16
"""Most tasks that are held with their bytes until they are loaded. Each may hold a pack's map, and a descriptor."""

log = logging.getLogger(__name__)
Ident = tuple[str, int, int]
"""Task, version and time, which identify a version of a store."""


@dataclass(frozen=True, eq=False, slots=True)
class Known:
    """The meaning of a name when it was looked up. It stays this version, even if the name later means another one."""

    use: Use
    version: Version | None
    """The version in the store at the time of the look-up. None for an added task."""

    @property
    def key(self) -> Hashable:
        """The hash of the task's manifest."""
        return self.use.key

    @property
    def name(self) -> str:
        """The task's name, without a version or tag."""
        return self.use.name

    @property
    def labels(self) -> tuple[str, ...]:
        return self.use.labels

    @property
    def threshold(self) -> float | None:
        return self.use.threshold

    @property
    def preprocess(self) -> Preprocess:
        return self.use.preprocess

    @property
    def task(self) -> Task:
        """The task, without its tensors' bytes. It is made anew from what the router keeps of it."""
        return self.use.task


class Registry:
    """The meaning of tasks' names. Thread-safe: its lock is only held for moments, never while something is read.

    Args:
        store: where tasks are looked up; None: only added tasks are known.
        limits: limits for opening pictures.
        jpegs: decodes plain JPEGs; None: Pillow does.
        dtype: compute precision.
        check: raises an error if a task cannot run on the backbone.
        in_use: whether a key's task is loaded, so that it should not be forgotten.
    """

    def __init__(
        self,
        store: ReadableStore | None,
        limits: Limits,
        jpegs: JpegDecoder | None,
        dtype: torch.dtype,
        check: Callable[[str, Task], None],
        in_use: Callable[[Hashable], bool],
    ) -> None:
        self.store = store
        self.closed = False
        self.changes = 0
        """How many times names changed their meaning."""
        self.lock = threading.Lock()
        self._limits, self._jpegs = limits, jpegs
        self._check, self._in_use = check, in_use
        self._layouts = Layouts(dtype)
        self._added: dict[str, Known] = {}
        """Added tasks. They hide tasks of the store with the same name."""
        self._known: dict[str, Known] = {}
        """Looked-up tasks of the store, the oldest first."""
        self._versions: dict[str, Version] = {}
        """Reference -> its version until the next refresh, the oldest first."""
        self._read: dict[Hashable, tuple[Use, Task]] = {}
        """Tasks that were just looked up and will probably be loaded next."""
        self._uses: WeakValueDictionary[Hashable, Use] = WeakValueDictionary()
        """Every layout that still exists, by the hash of its manifest and by its version."""
        self.pinned: frozenset[str] = frozenset()

    def added(self) -> list[Known]:
        """The added tasks."""
        return list(self._added.values())

    def add(self, name: str, task: Task) -> Hashable:
        """Adds a task that is in no store.

        Returns:
            The key that the name had before. None if it had none.
        Raises:
            RouterError: the task cannot run on this backbone.
        """
        for key, raw in task.tensors.items():
            if len(raw.data) != raw.size_bytes:
                raise TaskError(
                    name, f"tensor {key!r}: expected {raw.size_bytes} bytes for its shape, found {len(raw.data)}"
                )
        self._check(name, task)
        known = Known(self._use(task, to_manifest(task)), None)
        with self.lock:
            if self.closed:
                raise ClosedError
            before = self._added.get(name) or self._known.get(name)
            self._added[name] = known
            self.changes += 1
        return before and before.key

    def bare(self, model: str, digest: str, preprocess: Mapping[str, Any]) -> Known:
        """The backbone alone, as a task without adapters and head. It has no name."""
        task = make_task(
            {
                "format": FORMAT, "task": "backbone", "backbone": {"model": model, "digest": digest},
                "activation": "identity", "adapters": {}, "positions": {}, "head": None, "labels": [],
                "preprocess": dict(preprocess), "metrics": {}, "training": {},
            }, {}, "the backbone",
        )  # fmt: skip
        return Known(self._use(task, to_manifest(task)), None)

    def known(self, name: str) -> Known | None:
        """The meaning of a reference, if it is kept from an earlier look-up. Reads nothing."""
        return self._added.get(name) or self._known.get(name)

    def find(self, name: str) -> Known:
        """The meaning of a reference. It is looked up once and kept until `refresh`. Other threads do not wait.

        Raises:
            UnknownTaskError: the task is neither in the store nor added.
            RouterError: the task cannot run on this backbone.
            PearStoreError: the store cannot be read, or its task is refused.
        """
        while (known := self.known(name)) is None:
            changes = self.changes
            version = self._versions.get(name) or self._resolve(name)
            found = self._look_up(name, version)
            with self.lock:
                if self.closed:
                    raise ClosedError
                if changes == self.changes:  # else there may be a newer version by now
                    return self._enter(name, version, found)
        return known

    def _enter(self, name: str, version: Version, found: Known) -> Known:
        """Keeps a looked-up task, unless another thread already did. Forgets the oldest one that is not loaded."""
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
        """A version of the store. It is read and checked unless its layout still exists."""
        use = self._uses.get(_ident(version))
        if use is None:
            began = time.perf_counter()
            task = self._read_version(version)
            _check_stored(name, task)
            manifest = to_manifest(task)
            use = self._uses.get(manifest_hash(manifest))
            if use is None:
                self._check(name, task)
                use = self._use(task, manifest, partial(self._read_version, version))
                self._keep_read(use, task)
            else:  # it may have been read as another version, which may be removed by now
                use = use.read_by(partial(self._read_version, version))
            log.debug("looked task %s up: version %d in %.4f s", name, version.version, time.perf_counter() - began)
        return Known(use, version)

    def _use(self, task: Task, manifest: bytes, read: Callable[[], Task] | None = None) -> Use:
        preprocess = _preprocess(json.dumps(dict(task.preprocess), sort_keys=True), self._limits, self._jpegs)
        return Use.of(task, manifest, self._layouts, preprocess, read)

    def _keep_read(self, use: Use, task: Task) -> None:
        with self.lock:
            self._read[use.key] = use, task
            if len(self._read) > READ_AHEAD:
                del self._read[next(iter(self._read))]

    def read(self, use: Use) -> Task:
        """A task with its tensors' bytes: kept from the look-up, or read anew."""
        with self.lock:
            held = self._read.pop(use.key, None)
        return held[1] if held is not None and held[0] is use else use.read()

    def tensors(self, use: Use) -> Mapping[str, RawTensor]:
        """A task's tensors with their bytes, under their layout's names."""
        return use.tensors(self.read)

    def refresh(self) -> dict[str, int | None]:
        """Takes over changes of the store. References that did not change are kept.

        Returns:
            Each changed reference -> its version now; None if it no longer exists.
        Raises:
            PearStoreError: the store cannot be read; nothing changed.
        """
        if self.store is not None:
            self.store.refresh()
        before = {name: version for name, version in dict(self._versions).items() if name not in self._added}
        versions = {name: self._version(name) for name in before}
        changed = {name: now for name, now in versions.items() if not _same(before[name], now)}
        with self.lock:  # names that came meanwhile are dropped: they may have been looked up before this refresh
            self.changes += 1
            self._known = {n: one for n, one in self._known.items() if n in before and n not in changed}
            self._versions = {n: version for n, version in before.items() if n not in changed}
        return {name: None if now is None else now.version for name, now in changed.items()}

    def stale(self, keys: Iterable[Hashable]) -> list[Hashable]:
        """Those of the keys that no name means any more."""
        with self.lock:
            live = {known.key for names in (self._known, self._added) for known in names.values()}
        return [key for key in keys if key not in live]

    def pinned_keys(self) -> list[Hashable]:
        """The keys of the pinned tasks that are known."""
        known = map(self.known, self.pinned)
        return [one.key for one in known if one is not None]

    def close(self) -> None:
        """Forgets all tasks."""
        with self.lock:
            self.closed = True
        self._known, self._added, self._versions, self._read = {}, {}, {}, {}

    def _resolve(self, name: str) -> Version:
        if self.store is None:
            raise UnknownTaskError(f"no task {name!r}: it was not added, and this router has no store: add it")
        try:
            return self.store.resolve(name)
        except NotFoundError as error:
            raise UnknownTaskError(str(error)) from None

    def _version(self, name: str) -> Version | None:
        """The version of a reference in the store now. None if there is none."""
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
            raise UnknownTaskError(f"{error}; call refresh() to take over the store's changes") from None


@lru_cache(256)
def _preprocess(record: str, limits: Limits, jpegs: JpegDecoder | None) -> Preprocess:
    """The preprocessing for a record as JSON. It is cached because most tasks have the same one."""
    return Preprocess(json.loads(record), limits, jpegs)


def _ident(version: Version) -> Ident:
    return version.task, version.version, version.time_ns


def _same(a: Version | None, b: Version | None) -> bool:
    """Whether both are one version. Tags do not matter."""
    return a is not None and b is not None and _ident(a) == _ident(b)


def _check_stored(name: str, task: Task) -> None:
    """Raises a TaskError for a task that `add` would refuse. A pack that others made may hold such a task."""
    try:
        check_record(task.record, {key: (raw.dtype, raw.shape) for key, raw in task.tensors.items()}, "its record")
    except PearStoreError as error:
        raise TaskError(name, str(error)) from None
    for key, raw in task.tensors.items():
        if not all_finite(raw):
            raise TaskError(name, f"tensor {key!r} holds NaN or infinity: expected finite values; remove this version")
