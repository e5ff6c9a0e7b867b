"""Writes to a remote: puts packs, then an index, and then creates the log entry that names the index."""

import hashlib
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from pear_store.errors import AbsentError, DamagedError, DamagedRemoteError, PlaceError
from pear_store.format.container import Place as TensorPlace
from pear_store.format.container import lay_out
from pear_store.format.digest import Digest, RawTensor, fresh_name
from pear_store.format.pack import NO_COMMIT, Records, pack_metadata
from pear_store.remote.log import (
    MAX_ENTRY_BYTES,
    Entry,
    Head,
    LogIndex,
    PackListing,
    entry_name,
    index_name,
    pack_name,
)
from pear_store.remote.mirror import Mirror
from pear_store.remote.place import Place, probe
from pear_store.remote.reading import read_on
from pear_store.remote.rebase import base_for_next_entry
from pear_store.remote.retry import TRIES, retried, wait

MOST_CONFLICTS = 1000


def prepare(place: Place, mirror: Mirror) -> None:
    """Checks that several stores can write to a place. This is done once for each mirror.

    Raises:
        PlaceError: they cannot.
    """
    if not place.can_write:
        raise PlaceError(place.url, "it can only be read; push to a remote that can be written")
    if not mirror.was_probed:
        retried(lambda: probe(place))
        mirror.note_probed()


def lay_out_pack(tensors: Mapping[Digest, RawTensor]) -> tuple[bytes, bytes, PackListing]:
    """Lays out a new pack of tensors. Returns its hash, its bytes, and the places of the tensors in it.

    A random id in the pack gives it a name that was never used.
    """
    head, places = lay_out({str(digest): tensor for digest, tensor in tensors.items()},
                           pack_metadata(Records(), NO_COMMIT))  # fmt: skip
    data = b"".join((head, *(tensors[Digest(name)].data for name in places)))
    listing = {Digest(name): TensorPlace(*tensor_place) for name, tensor_place in places.items()}
    return hashlib.sha256(data).digest(), data, PackListing(len(data), listing)


def put_pack(place: Place, tensors: Mapping[Digest, RawTensor]) -> tuple[bytes, PackListing]:
    """Writes tensors to the place, as a new pack."""
    pack, data, listing = lay_out_pack(tensors)
    place.put(pack_name(pack), data)
    return pack, listing


class Committer:
    """Writes log entries for one writer. If another writer takes the next number first, the caller looks again."""

    def __init__(self, place: Place, mirror: Mirror) -> None:
        self._place, self._mirror = place, mirror
        self._sent: set[str] = set()
        self._conflicts = 0
        self._begun_with = mirror.begun_with
        self._has_looked_for_base = False

    def commit(self, head: Head, index: LogIndex, await_packs: Callable[[], None] = lambda: None) -> Head | None:
        """Puts an index, creates the entry after `head` that names it, and enters both in the mirror.

        Args:
            head: the last entry that the caller knows.
            index: what the new entry says.
            await_packs: waits until all packs that the entry names have arrived. Raises if one cannot be sent.

        Returns:
            The new entry. The mirror may know later ones, which another process of this store has read. None: nothing
            was written, because `head` is not the last entry any more. The mirror then knows the last entry.
        """
        number, previous = head[0] + 1, head[1]
        place, mirror = self._place, self._mirror
        if not self._has_looked_for_base:
            base_for_next_entry(mirror, place)
            self._has_looked_for_base = True
        if not mirror.check(head, index):
            return None
        if mirror.has_base and not index.packs:  # the mirror does not know which names were dropped before a base
            index.salt = fresh_name()
        if self._begun_with != mirror.begun_with:  # it does not know what was dropped since these were sent
            self._sent.clear()
        name = index_name(hashed := _encode(index))
        while mirror.is_stray(name):  # a name that was dropped must not be used again
            index.salt = fresh_name()
            name = index_name(hashed := _encode(index))
        if name not in self._sent:
            place.put(name, index.raw)
            self._sent.add(name)
        await_packs()
        base = mirror.base if mirror.base and mirror.base.number < number else None
        entry = Entry(fresh_name(), previous, hashed, time.time_ns(), _host(), base)
        data = entry.encode()
        if _create(place, data, number):
            is_known = False
            with suppress(DamagedRemoteError):  # another process may have begun with a damaged base
                is_known = mirror.apply(number, data, index)
            if not is_known:
                read_on(mirror, place)
            self._conflicts = 0
            return number, hashlib.sha256(data).digest()
        read_on(mirror, place)
        if self._conflicts == MOST_CONFLICTS:
            raise PlaceError(place.url, f"other stores wrote first {MOST_CONFLICTS} times; run the same again")
        if self._conflicts > 2:
            wait(min(self._conflicts - 3, 5))
        self._conflicts += 1
        return None


def _encode(index: LogIndex) -> bytes:
    index.raw = index.encode()
    return hashlib.sha256(index.raw).digest()


def _create(place: Place, data: bytes, number: int) -> bool:
    """Creates an entry. False: another one has its number.

    After an error it is not known whether the entry was created, so this reads what is there. If nothing is there, it
    tries again: the first try may only be late.
    """
    name = entry_name(number)
    for attempt in range(TRIES):
        is_refused = True
        try:
            if place.create(name, data):
                return True
        except PlaceError as error:
            if not error.again:
                raise
            is_refused = False
        try:  # the entry that is there may be our own, from a try whose answer was lost
            return place.get(name, MAX_ENTRY_BYTES) == data
        except AbsentError:
            if is_refused:
                raise DamagedError(name, "the remote says that it exists, but does not return it") from None
        wait(attempt)
    raise PlaceError(place.url, "it does not say whether it took the entry; run the same again, which finds out")


def _host() -> str:
    return "".join(c for c in socket.gethostname() if c.isprintable())[:100]
