"""Reads a remote's store through a cache. A task is fetched when it is first read."""

import os
import threading
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from pear_store.errors import AbsentError, NotFoundError, PearStoreError, PlaceError
from pear_store.format.checkpoint import Task
from pear_store.format.digest import RawTensor
from pear_store.format.manifest import from_stored
from pear_store.format.summary import Summary
from pear_store.local.references import Version
from pear_store.local.stats import CacheStats
from pear_store.local.uses import Uses
from pear_store.readable import ReadableStore
from pear_store.remote.asked import PATIENCE_S
from pear_store.remote.cache import Cache, CacheSettings, last_id, mirror_name
from pear_store.remote.crew import CrewedPlace
from pear_store.remote.flights import Flights
from pear_store.remote.known import Found, KnownLog
from pear_store.remote.log import MAX_ENTRY_BYTES, SETTINGS_NAME, LoggedVersion, parse_settings
from pear_store.remote.opening import check_options, checked_url, open_place
from pear_store.remote.place import Place
from pear_store.remote.retry import Persistent

FETCHERS = 8
"""How many tasks are fetched at once"""
_REQUESTS = 16
"""How many requests are made at once"""
_AHEAD = 256
"""The most tasks that one `prefetch` fetches"""
_LEFT_ALONE_S = 10.0
"""Seconds for which a version that could not be fetched is not tried again. Its callers get the same error at once."""
_CLOSE_S = 10.0


class RemoteStore(ReadableStore):
    """Tasks of a remote. Each is fetched by ranges when it is first read, then checked and kept in the cache.

    Without a network, names mean what they meant last, and cached tasks can be read. One warning says so.

    Args:
        url: the remote's URL.
        options: options of the remote's place. Never a secret.
        settings: settings of the cache.
    """

    is_remote = True

    def __init__(self, url: str, options: Mapping[str, str], settings: CacheSettings | None = None) -> None:
        """Opens the remote, and asks for its id.

        Raises:
            PlaceError: the remote cannot be reached, and nothing is known of it from before.
            NotFoundError: there is no remote at the URL.
        """
        check_options(options)
        self._url, self._options = checked_url(url), dict(options)
        self._settings = settings or CacheSettings()
        self._limit_bytes = self._settings.resolved_limit()
        self._closed = False
        folder = self._settings.resolved_folder()
        mirror = mirror_name(self._url, self._options)
        with closing(self._place()) as place:
            self.name = place.url
            known, timeout_s = last_id(folder, mirror), self._settings.timeout_s
            try:
                self._id = _ask(partial(_id, place), place, timeout_s if known is None else min(timeout_s, PATIENCE_S))
            except PlaceError:
                if known is None:
                    raise
                self._id = known
        self._cache = Cache(folder / self._id, self._limit_bytes)
        self._mirror = self._cache.folder / mirror
        self._begin()

    def _place(self) -> Place:
        return Persistent(open_place(self._url, self._options))

    def _begin(self) -> None:
        """Connects anew, in this process."""
        self._here = CrewedPlace(self._place(), _REQUESTS)
        self._log = KnownLog(self._mirror, self._here, self._settings.ttl_s, self._settings.timeout_s)
        self._flights: Flights[Task] = Flights(FETCHERS)
        self._failed: dict[LoggedVersion, tuple[float, PearStoreError]] = {}
        self._lock = threading.Lock()
        self._pid = os.getpid()  # last: a thread that sees it uses all of the above

    def _known(self) -> KnownLog:
        if self._closed:
            raise PearStoreError(f"{self.name}: this store was closed")
        if self._pid != os.getpid():  # a forked child has neither the threads nor the connections
            self._begin()
        return self._log

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._url, self._options, self._settings)

    @property
    def where(self) -> str:
        return self._url

    @property
    def cache_folder(self) -> Path:
        """The folder of the remote's cache."""
        return self._cache.folder

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._pid == os.getpid():
            self._flights.finish(_CLOSE_S)
            self._here.close()
        self._cache.close()

    # ---- reading

    def get(self, reference: str, copy: bool = True) -> Task:
        found = self._known().find(reference)
        task = self._cache.get(found.logged) or self._fetched(found)
        if not copy:
            return task
        tensors = {
            name: RawTensor.checked(t.dtype, t.shape, bytearray(t.data), t.digest) for name, t in task.tensors.items()
        }
        return Task(dict(task.record), tensors)

    def record(self, reference: str) -> Mapping[str, Any]:
        log = self._known()
        return log.record(log.find(reference).logged)

    def resolve(self, reference: str) -> Version:
        return self._known().find(reference).version

    def iter_tasks(self) -> Iterator[Version]:
        return self._known().newest()

    def versions(self, task: str | None = None) -> list[Version]:
        found = self._known().versions(task)
        if task is not None and not found:
            raise NotFoundError(f"no task {task!r} in {self.name}; 'pear-store ls' shows what is there")
        return found

    def tags(self) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {}
        for (task, tag), number in sorted(self._known().tags().items()):
            found.setdefault(task, {})[tag] = number
        return found

    def stats(self) -> CacheStats:
        return CacheStats(
            **self._known().counts(), cached_versions=self._cache.count(), cached_bytes=self._cache.size_bytes(),
            limit_bytes=self._limit_bytes,
        )  # fmt: skip

    def summaries(self, versions: Iterable[Version]) -> Iterator[Summary | PearStoreError]:
        return self._known().summaries(versions)

    def uses(self) -> Uses:
        return self._known().uses()

    @property
    def state(self) -> Hashable:
        return self._known().head

    def refresh(self) -> None:
        self._known().ask()

    def prefetch(self, references: Collection[str]) -> None:
        log = self._known()
        for reference in list(references)[:_AHEAD]:
            try:
                found = log.find(reference)
            except PearStoreError:
                continue
            if self._failure(found.logged) is None and self._cache.get(found.logged) is None:
                self._flights.join(found.logged, partial(self._fetch, found.logged))

    # ---- fetching

    def _fetched(self, found: Found) -> Task:
        """Fetches a version that is not cached. All callers that ask for it share one request."""
        logged = found.logged
        if (failure := self._failure(logged)) is not None:
            raise failure.with_traceback(None)  # else each raise would add frames to it
        future = self._flights.join(logged, partial(self._fetch, logged))
        timeout_s = self._settings.timeout_s
        try:
            return future.result(timeout_s)
        except TimeoutError:
            error = PlaceError(self.name, f"{_named(logged)} is not cached, and did not come within {timeout_s:g} s")
            self._note_failed(logged, error)
            raise error from None
        finally:
            del future

    def _fetch(self, logged: LoggedVersion, future: "Future[Task]") -> None:
        try:
            with self._cache.fetching(logged, self._settings.timeout_s / 2):
                if (cached := self._cache.get(logged)) is not None:  # another process was first
                    future.set_result(cached)
                    return
                incoming = self._log.fetch(self._cache.tensors, logged)
                tensors = {str(digest): tensor for digest, tensor in incoming.loaded.tensors.items()}
                task = from_stored(incoming.loaded.manifest, tensors, _named(logged))
                with self._lock:
                    self._failed.pop(logged, None)
                future.set_result(task)  # before it is kept: callers need not wait for the disk
                self._cache.keep(incoming, task)
        except PlaceError as error:
            named = PlaceError(self.name, f"{_named(logged)} is not cached, and cannot be fetched: {error.problem}")
            self._note_failed(logged, named)
            raise named from None
        except PearStoreError as error:
            self._note_failed(logged, error)
            raise

    def _failure(self, logged: LoggedVersion) -> PearStoreError | None:
        """The error of a version that could not be fetched a moment ago. None: there was none."""
        until, error = self._failed.get(logged, (0.0, None))
        return error if time.monotonic() < until else None

    def _note_failed(self, logged: LoggedVersion, error: PearStoreError) -> None:
        now = time.monotonic()
        with self._lock:
            self._failed = {key: one for key, one in self._failed.items() if one[0] > now}
            self._failed[logged] = now + _LEFT_ALONE_S, error

    # ---- what a remote store cannot do

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise PearStoreError(
            f"{self.name}: a remote is only read; to change it, clone it ('pear-store clone URL DIR'), change the "
            "clone and push"
        )

    add = add_many = tag = untag = remove = gc = push = pull = remote_status = remote_stats = _refuse
    remote_gc = remote_verify = remote_repair = remote_log = _refuse


def _named(logged: LoggedVersion) -> str:
    return f"{logged.task}@{logged.number}"


def _id(place: Place, future: "Future[str]") -> None:
    try:
        future.set_result(parse_settings(place.get(SETTINGS_NAME, MAX_ENTRY_BYTES), place.url))
    except AbsentError:
        raise NotFoundError(f"{place.url}: no remote there; check the URL") from None


def _ask(work: Callable[["Future[str]"], None], place: Place, timeout_s: float) -> str:
    """The id of the remote at a place."""
    flights: Flights[str] = Flights(1)
    try:
        return flights.join("id", work).result(timeout_s)
    except TimeoutError:
        raise PlaceError(place.url, f"no answer within {timeout_s:g} s") from None
