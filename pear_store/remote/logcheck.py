"""Checks a remote's log, entry by entry. Finds the original bytes of damaged objects, if a copy is known.

An entry never changes. So a copy can be proved right: the next entry names the entry's hash, or the mirror of a store
that has read it has the same bytes. An index is named by its hash.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count

from pear_store.errors import (
    AbsentError,
    DamagedError,
    DamagedRemoteError,
    FormatError,
    NotFoundError,
    PlaceError,
)
from pear_store.local.sync import Numbered
from pear_store.pools import ThreadPool
from pear_store.remote.log import (
    MAX_ENTRY_BYTES,
    MAX_INDEX_BYTES,
    SETTINGS_NAME,
    Entry,
    LogIndex,
    encode_settings,
    entry_name,
    index_name,
    parse_entry,
    parse_index,
    parse_settings,
)
from pear_store.remote.mirror import Mirror
from pear_store.remote.place import Place
from pear_store.remote.reading import is_another
from pear_store.remote.whole import WholeMirror

_AHEAD = 8
_NAME = re.compile(r"log/[0-9]{20}")


@dataclass(frozen=True)
class LogFault:
    """An object of the log that is damaged or missing."""

    name: str
    problem: str
    good: bytes = b""
    """Its original bytes. b"": no copy is known."""
    versions: list[Numbered] = field(default_factory=list)
    is_missing: bool = False
    ends: bool = False
    """Whether the log after it cannot be read"""


def check_log(place: Place, known: Mirror, whole: WholeMirror, copies: Sequence[Mirror] = ()) -> list[LogFault]:
    """Reads the log into `whole`, until an entry that is damaged and has no good copy. Returns the faults.

    Args:
        known: what this store knows of the remote.
        copies: what other stores know of it. Their copies are used only if a hash proves them right.

    Raises:
        DamagedRemoteError: it is another remote than the one that is known. Nothing can be restored.
        FormatError: another version of Pear wrote it.
    """
    return _LogCheck(place, known, whole, copies).run()


class _LogCheck:
    def __init__(self, place: Place, known: Mirror, whole: WholeMirror, copies: Sequence[Mirror]) -> None:
        self._place, self._known, self._whole, self._copies = place, known, whole, (known, *copies)
        self._faults: list[LogFault] = []

    def run(self) -> list[LogFault]:
        self._check_settings()
        with ThreadPool(_AHEAD) as pool:
            for start in count(1, _AHEAD):
                entries = list(pool.map(self._get_entry, range(start, start + _AHEAD + 1)))
                indexes = list(pool.map(self._get_index, entries[:-1]))
                for number, data, index in zip(count(start), entries, indexes, strict=False):
                    if not self._step(number, data, entries[number - start + 1], index):
                        return self._faults
        raise AssertionError

    # ---- what is there

    def _get(self, name: str, at_most: int) -> bytes | None:
        """An object's bytes. b"" if it is too large. None if it is missing."""
        try:
            return self._place.get(name, at_most)
        except AbsentError:
            return None
        except DamagedError:
            return b""

    def _get_entry(self, number: int) -> bytes | None:
        return self._get(entry_name(number), MAX_ENTRY_BYTES)

    def _get_index(self, data: bytes | None) -> tuple[bytes, bytes | None]:
        """The index that an entry names: its hash, and its object's bytes."""
        entry = _entry(data, 2) or _entry(data, 1)
        return (entry.index, self._get(index_name(entry.index), MAX_INDEX_BYTES)) if entry else (b"", None)

    def _check_settings(self) -> None:
        known = self._known.id
        data = self._get(SETTINGS_NAME, MAX_ENTRY_BYTES)
        if data is None and known is None:
            raise NotFoundError(f"{self._place.url}: there is no {SETTINGS_NAME}")
        try:
            if data is not None:
                found = parse_settings(data, self._place.url)
                self._whole.note_id(known or found)
                if found == known or known is None:
                    return
                first = self._known.copy(entry_name(1))
                if not first or first != self._get_entry(1):
                    raise is_another(self._known)
        except (DamagedRemoteError, FormatError):
            if known is None or (data and _is_settings(data)):
                raise
        assert known is not None
        self._whole.note_id(known)
        problem = "it is missing" if data is None else "it is not what this store knows"
        self._faults.append(LogFault(SETTINGS_NAME, problem, encode_settings(known), is_missing=data is None))

    # ---- what it must be

    def _step(
        self, number: int, data: bytes | None, following: bytes | None, index: tuple[bytes, bytes | None]
    ) -> bool:
        """Enters one entry in the mirror. False: the log ends here, or cannot be read any further."""
        name, previous = entry_name(number), self._whole.head[1]
        after = _entry(following, number + 1)
        copy = next((one for one in self._found(name) if self._is_proved(number, one, after)), b"")
        entry = _entry(data, number)
        problem, is_missing = "", data is None
        if data is None:
            if not copy and following is None and number > self._known.head[0] and not self._is_gap(number):
                return False  # the end
            problem = "it is missing"
        elif copy and copy != data:
            is_told = after is not None and after.previous == _hash(copy)
            if entry and not is_told and not _is_same(entry, parse_entry(copy, "", number), previous):
                raise is_another(self._known)
            problem = "it is not what it was when it was read before" if entry else "it cannot be read"
        elif not copy and entry is None:
            _newer(data, self._place.url, number)
            problem = "it cannot be read"
        elif not copy and entry and entry.previous != previous:
            if number == 1 or after is None or after.previous != _hash(data):
                problem = "it does not follow the one before it"
            else:  # the next entry names this one's hash, so the one before it is damaged
                self._faults.append(LogFault(entry_name(number - 1), f"{name} says another hash than its bytes have"))
                assert entry.previous is not None
                self._whole.believe(number - 1, entry.previous)
        if problem and not copy:
            return self._end(name, problem)
        data = copy or data
        assert data is not None
        found = self._index_of(parse_entry(data, "", number), number, index)
        if problem:
            self._faults.append(LogFault(name, problem, copy, _versions(found), is_missing))
        if found is None:
            return False
        try:
            return self._whole.apply(number, data, found)
        except DamagedRemoteError as error:
            return self._end(name, error.found)

    def _index_of(self, entry: Entry, number: int, read: tuple[bytes, bytes | None]) -> LogIndex | None:
        name = index_name(entry.index)
        data = read[1] if read[0] == entry.index else self._get(name, MAX_INDEX_BYTES)
        if data is None:
            problem = f"it is missing, and {entry_name(number)} names it"
        else:
            try:
                return parse_index(data, self._place.url, entry.index)
            except DamagedRemoteError as error:
                problem = error.found
        for copy in self._found(name):
            if _hash(copy) == entry.index:
                found = parse_index(copy, self._place.url, entry.index)
                self._faults.append(LogFault(name, problem, copy, _versions(found)))
                return found
        self._end(name, problem)
        return None

    def _found(self, name: str) -> Iterator[bytes]:
        return filter(None, (mirror.copy(name) for mirror in self._copies))

    def _is_proved(self, number: int, copy: bytes, after: Entry | None) -> bool:
        """Whether a copy of an entry is proved right: this store has read it, or the next entry names its hash."""
        entry = _entry(copy, number)
        if entry is None or entry.previous != self._whole.head[1]:
            return False
        return copy == self._known.copy(entry_name(number)) or (after is not None and after.previous == _hash(copy))

    def _is_gap(self, number: int) -> bool:
        """Whether later entries exist."""
        with suppress(PlaceError):  # a place that cannot be listed
            return any(_NAME.fullmatch(name) and int(name[4:]) > number for name in self._place.list("log/"))
        return False

    def _end(self, name: str, problem: str) -> bool:
        """Notes a fault that ends the log, and the known versions that cannot be read because of it."""
        hit = {
            (task, number)
            for mirror in self._copies
            for task, number in mirror.known_versions()
            if self._whole.version(task, number) is None
        }
        problem = f"{problem}; no copy of it is known here, and what comes after it cannot be read"
        self._faults.append(LogFault(name, problem, b"", sorted(hit), ends=True))
        return False


def _entry(data: bytes | None, number: int) -> Entry | None:
    """The entry that these bytes are. None if they are no entry."""
    try:
        return None if data is None else parse_entry(data, "", number)
    except (DamagedRemoteError, FormatError):
        return None


def _is_same(entry: Entry, copy: Entry, previous: bytes | None) -> bool:
    """Whether an entry may be a damaged form of this copy, and not another entry. No two entries have the same id."""
    return entry.id == copy.id or entry.previous != previous or entry.index == copy.index


def _newer(data: bytes, url: str, number: int) -> None:
    """Raises a FormatError if another version of Pear wrote an entry."""
    with suppress(DamagedRemoteError):
        parse_entry(data, url, number)


def _is_settings(data: bytes) -> bool:
    try:
        parse_settings(data, "")
        return True
    except (DamagedRemoteError, FormatError):
        return False


def _versions(index: LogIndex | None) -> list[Numbered]:
    return [(version.task, version.number) for version in index.versions] if index else []


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
