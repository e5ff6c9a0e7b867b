"""What is known of a remote's log by one who only reads: names, versions and records, as of some seconds ago."""

import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from pear_store.errors import DamagedError, DamagedRemoteError, NotFoundError, PearStoreError, PlaceError
from pear_store.format.checkpoint import check_record
from pear_store.format.container import strict_json
from pear_store.format.manifest import manifest_digests
from pear_store.format.summary import Summary
from pear_store.local.references import Version, parse_reference
from pear_store.local.sync import Incoming
from pear_store.local.uses import Uses
from pear_store.remote import listed
from pear_store.remote.flights import Flights
from pear_store.remote.log import LoggedVersion
from pear_store.remote.mirror import Mirror
from pear_store.remote.place import Place
from pear_store.remote.pull import Have, Pulled, groups
from pear_store.remote.reading import read_on

T = TypeVar("T")
PATIENCE_S = 5.0
"""How long one waits for what is new, where what was known will do"""
_AFTER_FAILURE_S = 10.0
"""How long a remote that gave no answer is left alone"""
_AT_ONCE = 256
"""Records that are read in one look at the mirror"""
_MOST_NAMES = 1 << 17
"""Of some 500 bytes each: most references that are kept at hand"""


@dataclass(frozen=True)
class Found:
    """A version of the remote, as users know it and as its log has it."""

    version: Version
    logged: LoggedVersion


class KnownLog:
    """A remote's log as a mirror on this machine has it, which is asked on where that is due. Thread-safe.

    Args:
        file: the mirror's. Several processes may share it.
        url: for messages.
        ttl_s: what may have changed is asked for once in so many seconds at most.
        timeout_s: how long anybody waits for an answer.
    """

    def __init__(self, file: Path, place: Place, ttl_s: float, timeout_s: float) -> None:
        self._file, self._place, self.url = file, place, place.url
        self._ttl_s, self._timeout_s = ttl_s, timeout_s
        self._asking: Flights[None] = Flights(1)
        self._due = 0.0
        self._names: dict[str, Found] = {}
        self._sizes: dict[bytes, int] = {}
        self._head = -1
        self._lock = threading.Lock()
        self._is_out = False
        """Whether the last question had no answer, which was said"""

    # ---- the mirror

    def _look(self, act: Callable[[Mirror], T]) -> T:
        """What `act` finds in the mirror. One that is damaged is made anew from the log."""
        try:
            return self._look_once(act)
        except sqlite3.DatabaseError:
            self._forget()
            self.ask()
            try:
                return self._look_once(act)
            except sqlite3.DatabaseError as error:
                raise PlaceError(self.url, f"{self._file}: {error}") from None

    def _look_once(self, act: Callable[[Mirror], T]) -> T:
        if not self._file.exists():
            if self._head > 0:
                raise sqlite3.DatabaseError("it is gone")
            with suppress(OSError):
                self._file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(Mirror(self._file, self.url)) as mirror:
                mirror.attach(self._place, partial(read_on, mirror, self._place))
                return act(mirror)
        except sqlite3.OperationalError as error:  # a full disk, a folder that is gone
            raise PlaceError(self.url, f"{self._file}: {error}") from None

    def _forget(self) -> None:
        """Deletes a mirror that is damaged."""
        with suppress(OSError):
            self._file.unlink()
        self._head = -1

    # ---- asking the remote

    def ask(self, wait_s: float | None = None) -> None:
        """Reads the log on now, or waits for whoever does: for so long at most.

        Raises:
            PlaceError, DamagedRemoteError: there was no answer in time that can be used.
            NotFoundError: there is no remote.
        """
        wait_s = self._timeout_s if wait_s is None else wait_s
        pause_s = max(self._ttl_s, _AFTER_FAILURE_S)
        try:
            self._asking.join("log", self._read_on).result(wait_s)
            self._is_out, pause_s = False, self._ttl_s
        except TimeoutError:
            raise PlaceError(self.url, f"no answer within {wait_s:g} s", again=True) from None
        finally:
            self._due = time.monotonic() + pause_s

    def _read_on(self, future: "Future[None]") -> None:
        def act(mirror: Mirror) -> int:
            read_on(mirror, self._place)
            return mirror.head[0]

        try:
            head = self._look_once(act)
        except sqlite3.DatabaseError:
            self._forget()
            head = self._look_once(act)
        with self._lock:
            if head != self._head:
                self._head, self._names = head, {}
        future.set_result(None)

    def ask_if_due(self) -> None:
        """Reads the log on if that was not done just now. Without an answer, what is known stays, with one warning."""
        if time.monotonic() < self._due:
            return
        if self._head < 0:
            self._head = self._look(lambda mirror: mirror.head[0]) if self._file.exists() else 0
        try:
            self.ask(min(self._timeout_s, PATIENCE_S) if self._head else None)
        except (PlaceError, DamagedError) as error:
            if not self._head:  # nothing is known
                self._due = 0.0
                raise
            if not self._is_out:
                self._is_out = True
                warnings.warn(f"{error}; what is known of it is used on", stacklevel=4)

    # ---- questions

    def find(self, reference: str) -> Found:
        """The version that a reference stands for. A version by its number is not asked for again.

        Raises:
            NotFoundError: none.
        """
        _, which = parse_reference(reference)
        if not isinstance(which, int):
            self.ask_if_due()
        if (found := self._find(reference)) is None and isinstance(which, int):
            self.ask_if_due()
            found = self._find(reference)
        if found is None:
            raise NotFoundError(self._look(partial(_missing, reference=reference)))
        return found

    def _find(self, reference: str) -> Found | None:
        if (found := self._names.get(reference)) is not None:
            return found
        task, which = parse_reference(reference)

        def act(mirror: Mirror) -> tuple[Found | None, int]:
            number = which
            if number is None:
                number = max((version.number for version in mirror.versions(task)), default=0)
            elif isinstance(number, str):
                number = mirror.tag(task, number) or 0
            there = mirror.version(task, number)
            return None if there is None or there[1] else self._found(mirror, there[0]), mirror.head[0]

        found, head = self._look(act)
        with self._lock:
            if self._head < 0:
                self._head = head
            if found is not None and head == self._head:
                if len(self._names) >= _MOST_NAMES:
                    self._names = {}
                self._names[reference] = found
        return found

    def _found(self, mirror: Mirror, logged: LoggedVersion) -> Found:
        tags = tuple(mirror.tags_of(logged.task, logged.number))
        size = self._size(mirror, logged.manifest)
        return Found(Version(logged.task, logged.number, logged.time_ns, size, tags), logged)

    def _size(self, mirror: Mirror, manifest: bytes) -> int:
        """Bytes of a version's tensors as the log lists them; 0 where its manifest is none, which `get` refuses."""
        if (known := self._sizes.get(manifest)) is None:
            known = 0
            with suppress(ValueError):
                digests = manifest_digests(mirror.manifest(manifest))
                known = sum(places[0][1].length for places in mirror.places_of(digests).values() if places)
            self._sizes[manifest] = known
        return known

    def newest(self) -> Iterator[Version]:
        """The newest version of every task, by name."""
        self.ask_if_due()

        def act(mirror: Mirror) -> list[Version]:
            found = (mirror.versions(task)[-1:] for task in mirror.tasks())
            return [self._found(mirror, version).version for versions in found for version in versions]

        yield from self._look(act)

    def versions(self, task: str | None) -> list[Version]:
        """Every version, of one task or of all, by name and number."""
        self.ask_if_due()

        def act(mirror: Mirror) -> list[Version]:
            tasks = mirror.tasks() if task is None else [task]
            return [self._found(mirror, version).version for name in tasks for version in mirror.versions(name)]

        return self._look(act)

    def tags(self) -> dict[tuple[str, str], int]:
        self.ask_if_due()
        return self._look(lambda mirror: mirror.tags())

    def summaries(self, versions: Iterable[Version]) -> Iterator[Summary | PearStoreError]:
        waiting = iter(versions)
        while part := list(islice(waiting, _AT_ONCE)):
            yield from self._look(partial(listed.summaries, versions=part))

    def uses(self) -> Uses:
        """Which tensors each version names, and their bytes as the log lists them."""
        self.ask_if_due()
        return self._look(lambda mirror: listed.uses(mirror, lambda logged: self._found(mirror, logged).version))

    @property
    def head(self) -> int:
        """The last entry that is known; what it says is asked for if that is due."""
        self.ask_if_due()
        return self._head

    def counts(self) -> dict[str, int]:
        """Tasks, versions, packs and their bytes."""
        self.ask_if_due()
        return self._look(lambda mirror: mirror.counts())

    def record(self, logged: LoggedVersion) -> dict[str, Any]:
        """A version's record, judged as any that is added, by what the log says of its tensors.

        Raises:
            DamagedRemoteError, CheckpointError: it is none.
        """

        def act(mirror: Mirror) -> dict[str, Any]:
            where = f"{logged.task}@{logged.number}"
            text = mirror.manifest(logged.manifest)
            try:
                record = strict_json(text)
                digests = manifest_digests(text)
            except ValueError as error:
                raise DamagedRemoteError(self.url, f"manifest of {where}", str(error)) from None
            listed = {str(digest): places[0][1] for digest, places in mirror.places_of(digests).items() if places}
            shapes = {digest: (place.dtype, place.shape) for digest, place in listed.items()}
            check_record(record, shapes, f"{self.url}: {where}")
            if record["task"] != logged.task:
                raise DamagedRemoteError(self.url, f"manifest of {where}", "it is of another task")
            return dict(record)

        return self._look(act)

    def fetch(self, have: Have, logged: LoggedVersion) -> Incoming:
        """A version with all its tensors: what `have` does not give is read from the remote; all are checked.

        Raises:
            NotFoundError: it was removed there.
            DamagedRemoteError, CheckpointError: what the remote gave is not what its log says.
            PlaceError: it cannot be reached.
        """

        def act(mirror: Mirror) -> Incoming:
            ((_, found),) = groups(have, self._place, mirror, [logged], Pulled())
            if not found:  # a gc has dropped its tensors
                raise NotFoundError(f"{self.url}: version {logged.task}@{logged.number} was removed")
            (incoming,) = found
            return incoming

        return self._look(act)


def _missing(mirror: Mirror, reference: str) -> str:
    """What to say of a reference that stands for nothing."""
    task, which = parse_reference(reference)
    numbers = [version.number for version in mirror.versions(task)]
    if not numbers:
        return f"no task {task!r} in {mirror.url}; 'pear-store ls' shows what is there"
    if isinstance(which, str):
        have = ", ".join(sorted(tag for number in numbers for tag in mirror.tags_of(task, number))) or "none"
        return f"no tag {which!r} of task {task!r}; its tags: {have}"
    return f"no version {which} of task {task!r}; the newest is {numbers[-1]}"
