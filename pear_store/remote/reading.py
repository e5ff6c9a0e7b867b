"""Reads a remote's log from where a mirror ends. No listing is needed: an entry that is not there is the end."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

from pear_store.errors import AbsentError, DamagedRemoteError
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
from pear_store.remote.place import Place

_AHEAD = 8
"""Entries that are asked for at once, where one after the other was there"""


def read_on(mirror: Mirror, place: Place) -> None:
    """Reads the log from the entry that is known to its end.

    Raises:
        NotFoundError: there is no remote.
        DamagedRemoteError: what is there breaks the rules, or is not the remote that is known.
    """
    number, known = mirror.head
    if not number:
        if not mirror.note_id(parse_settings(place.get(SETTINGS_NAME, MAX_ENTRY_BYTES), mirror.url)):
            raise _is_another(mirror)
    else:
        data = _get(place, entry_name(number))
        if data is None or hashlib.sha256(data).digest() != known:
            raise _is_another(mirror)
    ahead = 1
    with ThreadPoolExecutor(_AHEAD) as pool:
        while True:
            numbers = range(number + 1, number + 1 + ahead)
            entries: list[tuple[int, bytes]] = []
            for one, data in zip(numbers, pool.map(lambda one: _get(place, entry_name(one)), numbers), strict=True):
                if data is None:
                    break
                entries.append((one, data))
            indexes = pool.map(lambda entry: _get_index(mirror.url, place, *entry), entries)
            for (number, entry), index in zip(entries, indexes, strict=True):
                mirror.apply(number, entry, index)
            if len(entries) < ahead:
                return
            ahead = min(2 * ahead, _AHEAD)


def _get(place: Place, name: str) -> bytes | None:
    try:
        return place.get(name, MAX_ENTRY_BYTES)
    except AbsentError:
        return None


def _get_index(url: str, place: Place, number: int, data: bytes) -> LogIndex:
    entry = parse_entry(data, url, number)
    name = index_name(entry.index)
    try:
        return parse_index(place.get(name, MAX_INDEX_BYTES), url, entry.index)
    except AbsentError as error:
        raise DamagedRemoteError(url, name, f"entry {number} names it: {error}") from None


def _is_another(mirror: Mirror) -> DamagedRemoteError:
    return DamagedRemoteError(
        mirror.url,
        "the log",
        "it is not the one that this store knows, as if the remote was made anew or put back from a backup "
        "('pear-store remote rm' and 'remote add' begin anew)",
    )
