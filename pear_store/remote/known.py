"""Answers questions about a remote's log for readers: names, versions and records, as of some seconds ago."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from pear_store.errors import DamagedRemoteError, NotFoundError, PearStoreError
from pear_store.format.checkpoint import check_record
from pear_store.format.container import strict_json
from pear_store.format.manifest import manifest_digests
from pear_store.format.summary import Summary
from pear_store.local.references import Version, parse_reference
from pear_store.local.sync import Incoming
from pear_store.local.uses import Uses
from pear_store.remote import listed
from pear_store.remote.asked import AskedMirror
from pear_store.remote.log import LoggedVersion
from pear_store.remote.mirror import Mirror
from pear_store.remote.place import Place
from pear_store.remote.pull import Have, Pulled, groups

_AT_ONCE = 256
"""How many records are read in one look at the mirror"""
_MOST_NAMES = 1 << 17
"""The most references that are kept in memory. One takes about 500 bytes."""


@dataclass(frozen=True)
class Found:
    """A version of the remote, as users know it and as its log has it."""

    version: Version
    logged: LoggedVersion


class KnownLog(AskedMirror):
    """A remote's log, as a mirror on this machine knows it. Thread-safe."""

    def __init__(self, file: Path, place: Place, ttl_s: float, timeout_s: float) -> None:
        super().__init__(file, place, ttl_s, timeout_s)
        self._names: dict[str, Found] = {}
        self._names_head = -1
        """The last entry that was known when `_names` were looked up"""
        self._sizes: dict[bytes, int] = {}

    # ---- questions

    def find(self, reference: str) -> Found:
        """The version that a reference names. A known version with a number is not asked for again.

        Raises:
            NotFoundError: there is no such version.
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
        with self._lock:
            if self._names_head != self._head:
                self._names, self._names_head = {}, self._head
            if (found := self._names.get(reference)) is not None:
                return found
        task, which = parse_reference(reference)

        def act(mirror: Mirror) -> tuple[Found | None, int]:
            head, number = mirror.head[0], which  # the head is read first, so that what is found is not older
            if number is None:
                number = max((version.number for version in mirror.versions(task)), default=0)
            elif isinstance(number, str):
                number = mirror.tag(task, number) or 0
            there = mirror.version(task, number)
            return None if there is None or there[1] else self._found(mirror, there[0]), head

        found, head = self._look(act)
        with self._lock:
            if self._head < 0 < head:
                self._head = self._names_head = head
            if found is not None and head == self._names_head:
                if len(self._names) >= _MOST_NAMES:
                    self._names = {}
                self._names[reference] = found
        return found

    def _found(self, mirror: Mirror, logged: LoggedVersion) -> Found:
        tags = tuple(mirror.tags_of(logged.task, logged.number))
        size = self._size(mirror, logged)
        return Found(Version(logged.task, logged.number, logged.time_ns, size, tags), logged)

    def _size(self, mirror: Mirror, logged: LoggedVersion) -> int:
        """The bytes of a version's tensors, as the log lists them. 0 if its manifest is invalid: `get` refuses it."""
        if (known := self._sizes.get(logged.manifest)) is None:
            known = 0
            with suppress(ValueError):
                digests = manifest_digests(mirror.manifest_of(logged) or b"")
                known = sum(places[0][1].length for places in mirror.places_of(digests).values() if places)
            self._sizes[logged.manifest] = known
        return known

    def newest(self) -> Iterator[Version]:
        """The newest version of every task, by name."""
        self.ask_if_due()

        def act(mirror: Mirror) -> list[Version]:
            found = (mirror.versions(task)[-1:] for task in mirror.tasks())
            return [self._found(mirror, version).version for versions in found for version in versions]

        yield from self._look(act)

    def versions(self, task: str | None) -> list[Version]:
        """Every version of one task, or of all tasks, sorted by name and number."""
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
        """Which tensors each version names, and the bytes of each, as the log lists them."""
        self.ask_if_due()
        return self._look(lambda mirror: listed.uses(mirror, lambda logged: self._found(mirror, logged).version))

    @property
    def head(self) -> int:
        """The number of the last entry. The remote is asked for it if that is due."""
        self.ask_if_due()
        return self._head

    def counts(self) -> dict[str, int]:
        """How many tasks, versions, packs and bytes of packs the remote has."""
        self.ask_if_due()
        return self._look(lambda mirror: mirror.counts())

    def record(self, logged: LoggedVersion) -> dict[str, Any]:
        """A version's record. It is checked as for `add`, with the dtypes and shapes that the log lists.

        Raises:
            NotFoundError: the version was removed on the remote.
            DamagedRemoteError, CheckpointError: it is no valid record.
        """

        def act(mirror: Mirror) -> dict[str, Any]:
            where = f"{logged.task}@{logged.number}"
            if (text := mirror.manifest_of(logged)) is None:
                raise self._removed(logged)
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
        """A version with all its tensors, checked. Tensors that `have` does not return are read from the remote.

        Raises:
            NotFoundError: the version was removed on the remote.
            DamagedRemoteError, CheckpointError: what the remote gave differs from what its log says.
            PlaceError: the remote cannot be reached.
        """

        def act(mirror: Mirror) -> Incoming:
            for _, found in groups(have, self._place, mirror, [logged], Pulled()):
                for incoming in found:
                    return incoming
            raise self._removed(logged)  # a gc has dropped its tensors

        return self._look(act)

    def _removed(self, logged: LoggedVersion) -> NotFoundError:
        return NotFoundError(f"{self.url}: version {logged.task}@{logged.number} was removed")


def _missing(mirror: Mirror, reference: str) -> str:
    """The message for a reference that names nothing."""
    task, which = parse_reference(reference)
    numbers = [version.number for version in mirror.versions(task)]
    if not numbers:
        return f"no task {task!r} in {mirror.url}; 'pear-store ls' shows what is there"
    if isinstance(which, str):
        have = ", ".join(sorted(tag for number in numbers for tag in mirror.tags_of(task, number))) or "none"
        return f"no tag {which!r} of task {task!r}; its tags: {have}"
    return f"no version {which} of task {task!r}; the newest is {numbers[-1]}"
