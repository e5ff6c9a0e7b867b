"""Reads a remote's log on from where a mirror ends. No listing is needed: the first missing entry is the end.

An empty mirror finds the last entry by trying numbers. It begins with the base that this entry names, and only reads
the entries after the base. This checks that those entries follow each other and the base's own entry. It does not check
that the base says what the entries before it say.
"""

import hashlib
from collections.abc import Sequence
from functools import partial

from pear_store.errors import AbsentError, DamagedRemoteError
from pear_store.pools import ThreadPool
from pear_store.remote.log import (
    MAX_ENTRY_BYTES,
    MAX_INDEX_BYTES,
    SETTINGS_NAME,
    LogIndex,
    entry_name,
    index_name,
    parse_entry,
    parse_index,
    parse_settings,
)
from pear_store.remote.mirror import Mirror
from pear_store.remote.partial import fetch_root
from pear_store.remote.place import Place

AHEAD = 16
"""The most entries that are asked for at once"""


class Entries:
    """The entries of a place. Each is read when it is first asked for, then kept."""

    def __init__(self, place: Place, pool: ThreadPool) -> None:
        self.place, self._pool = place, pool
        self._found: dict[int, bytes | None] = {}

    def get(self, numbers: Sequence[int]) -> list[bytes | None]:
        """The bytes of entries. None: there is no such entry."""
        missing = [number for number in numbers if number not in self._found]
        found = self._pool.map(lambda number: _get(self.place, entry_name(number)), missing)
        self._found |= dict(zip(missing, found, strict=True))
        return [self._found[number] for number in numbers]

    def last(self, known: int) -> int:
        """The number of the last entry. 0: there is none.

        Looks at distances that double, then between the last entry found and the first one missing.

        Args:
            known: the number of an entry that exists; or 0.
        """
        low, step = known, 1
        while True:
            numbers = [low + (step << k) for k in range(AHEAD)]
            there = [number for number, data in zip(numbers, self.get(numbers), strict=True) if data is not None]
            if len(there) < AHEAD:
                break
            low, step = there[-1], step << AHEAD
        high = numbers[len(there)]
        low = max(low, *there, 0)
        while high - low > 1:
            numbers = sorted({low + (high - low) * k // (AHEAD + 1) for k in range(1, AHEAD + 1)} - {low})
            found = [data is not None for data in self.get(numbers)]
            first = found.index(False) if False in found else len(found)
            low, high = ([low, *numbers])[first], ([*numbers, high])[first]
        return low


def read_on(mirror: Mirror, place: Place) -> None:
    """Reads the log from the last known entry to its end.

    Raises:
        NotFoundError: there is no remote.
        DamagedRemoteError: the log breaks the rules, or it is not that of the known remote.
    """
    mirror.attach(place, partial(read_on, mirror, place))
    with ThreadPool(AHEAD) as pool:
        entries = Entries(place, pool)
        number, known = mirror.head
        if not number:
            if not mirror.note_id(parse_settings(place.get(SETTINGS_NAME, MAX_ENTRY_BYTES), mirror.url)):
                raise is_another(mirror)
            number, known = mirror.witness
        if number:
            (data,) = entries.get([number])
            if data is None or hashlib.sha256(data).digest() != known:
                raise is_another(mirror)
        while True:
            if not mirror.head[0] and mirror.takes_bases:
                _begin(mirror, entries, entries.last(number))
            base, times = mirror.begun_with, mirror.times_begun
            try:
                if _read_entries(mirror, entries, pool) and (is_whole := mirror.note_read(times)) is not None:
                    break
            except DamagedRemoteError:
                if (base := base or mirror.begun_with) is None:
                    raise
                mirror.refuse_base(base)  # either the base or the log is bad: reading without the base tells
    if not is_whole:  # the log ends before the last entry that was known
        raise is_another(mirror)
    mirror.need_all("drop")


def _read_entries(mirror: Mirror, entries: Entries, pool: ThreadPool) -> bool:
    """Enters all entries that follow. False: another process has reset the mirror."""
    ahead = 1
    while True:
        number = mirror.head[0]
        numbers = range(number + 1, number + 1 + ahead)
        there: list[tuple[int, bytes]] = []
        for one, data in zip(numbers, entries.get(numbers), strict=True):
            if data is None:
                break
            there.append((one, data))
        indexes = pool.map(lambda entry: fetch_index(mirror.url, entries.place, *entry), there)
        for (one, entry), index in zip(there, indexes, strict=True):
            if not mirror.apply(one, entry, index):
                return False
        if len(there) < ahead:
            return True
        ahead = min(2 * ahead, AHEAD)


def _begin(mirror: Mirror, entries: Entries, last: int) -> None:
    """Begins with the base that the last entry names, if that base is good."""
    if not last:
        return
    (data,) = entries.get([last])
    assert data is not None
    base = parse_entry(data, mirror.url, last).base
    if base is None or mirror.is_refused(base):
        return
    try:
        root = fetch_root(entries.place, mirror.url, base)
    except (AbsentError, DamagedRemoteError):
        mirror.refuse(base)
        return
    mirror.begin_with(base, root)


def _get(place: Place, name: str) -> bytes | None:
    try:
        return place.get(name, MAX_ENTRY_BYTES)
    except AbsentError:
        return None


def fetch_index(url: str, place: Place, number: int, data: bytes) -> LogIndex:
    """Reads the index of an entry."""
    entry = parse_entry(data, url, number)
    name = index_name(entry.index)
    try:
        packed = place.get(name, MAX_INDEX_BYTES)
    except AbsentError as error:
        raise DamagedRemoteError(url, name, f"entry {number} names it: {error}") from None
    return parse_index(packed, url, entry.index)


def is_another(mirror: Mirror) -> DamagedRemoteError:
    return DamagedRemoteError(
        mirror.url,
        "the log",
        "it is not the one that this store knows; perhaps the remote was made anew or restored from a backup "
        "('pear-store remote rm' and 'remote add' begin anew)",
    )
