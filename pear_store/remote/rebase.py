"""Makes a base of a remote's log. Entries since the last base become a run, and runs of similar size are joined.

So each byte of an index is written about as often as its run is joined. No run grows beyond `MOST_JOINED_BYTES` by
being joined. A base is optional: it counts once an entry names it, and nobody waits for it.
"""

import hashlib
import heapq
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby

from pear_store.errors import AbsentError, DamagedRemoteError, PlaceError
from pear_store.format.digest import Digest
from pear_store.format.manifest import manifest_digests
from pear_store.pools import ThreadPool
from pear_store.remote.base import Kind, Root, Run, Shard, base_name, by_task, merged, shard_name
from pear_store.remote.log import (
    MAX_ENTRY_BYTES,
    MAX_INDEX_BYTES,
    BaseName,
    LoggedVersion,
    LogIndex,
    PackListing,
    entry_name,
    parse_entry,
    parse_index,
)
from pear_store.remote.mirror import Mirror
from pear_store.remote.partial import fetch_root
from pear_store.remote.place import Place
from pear_store.remote.reading import AHEAD, fetch_index

MOST_ENTRIES = 128
MOST_BYTES = 2 << 20
"""A base is due after so many entries, or so many bytes of their indexes. A new store reads these besides the base."""
JOINED = 4
"""So many runs of similar size become one"""
MOST_JOINED_BYTES = 64 << 20
_RUN_BYTES = 8 << 20
"""The compressed bytes of indexes that become one run. So much is held in memory."""
_SHARD_TEXT_BYTES = (48 << 10, 384 << 10)
"""The least and the most bytes of a shard's text, before compression. Small runs have small shards."""
_SHARDS = 64
_UNPACKED = 3
"""About how many bytes of text one compressed byte stands for"""
Item = tuple[str, int, LogIndex]
"""A name, the number of a run or entry, and what that says of the name. Items are sorted by name and number."""
Items = Callable[[Kind], Iterator[Item]]
"""Returns the sorted items of a run, or of several entries, for a kind of shard"""


def base_for_next_entry(mirror: Mirror, place: Place) -> BaseName | None:
    """The base that the next entry should name: the newest, or a new one if that is due.

    Raises:
        PlaceError: the place cannot be read or written.
    """
    known = mirror.base
    entries, index_bytes = mirror.since_base()
    is_good = known is None or not mirror.is_refused(known)
    if is_good and entries < MOST_ENTRIES and index_bytes < MOST_BYTES:
        return known
    root = None
    if known is not None and is_good:
        with suppress(AbsentError, DamagedRemoteError):  # it cannot be read, so a whole new base is made
            root = fetch_root(place, mirror.url, known)
    with suppress(AbsentError, DamagedRemoteError, ValueError):  # a base only helps: the push goes on without it
        mirror.note_base(write_base(mirror, place, root))
    return mirror.base


def write_base(mirror: Mirror, place: Place, root: Root | None = None) -> BaseName:
    """Writes a base of the log up to the entry that a mirror knows: on top of an earlier base, or from the first entry.

    Raises:
        AbsentError, DamagedRemoteError: entries or shards that it is made of cannot be read.
        ValueError: it is too large for a reader.
        PlaceError: the place cannot be read or written.
    """
    head, known = mirror.head
    assert known is not None
    runs = list(root.runs) if root else []
    given = {shard.hash for run in runs for shard in run.all_shards}
    writer = _Writer(mirror, place)
    for last, items, index_bytes in _entries(mirror, place, runs[-1].last if runs else 0, root.entry if root else None):
        runs.append(writer.run(last, [items], _UNPACKED * index_bytes, not runs))
        while (count := _joined(runs)) > 1:
            parts = [partial(_run_items, mirror, place, run) for run in runs[-count:]]
            text_bytes = _UNPACKED * sum(run.size_bytes for run in runs[-count:])
            runs[-count:] = [writer.run(last, parts, text_bytes, len(runs) == count)]
    root = Root(known, runs)
    data = root.encode()
    base = BaseName(head, hashlib.sha256(data).digest())
    place.put(base_name(base), data)
    needed = {shard.hash for run in runs for shard in run.all_shards}
    with suppress(PlaceError):  # without permission to delete, some bytes stay
        for shard in sorted(writer.put - needed - given):  # shards of new runs that were joined at once
            place.delete(shard_name(shard))
    return base


def _joined(runs: list[Run]) -> int:
    """How many of the last runs should become one."""
    size_bytes = runs[-1].size_bytes
    count, total = 1, size_bytes
    while count < len(runs) and runs[-count - 1].size_bytes < 2 * size_bytes:
        count, total = count + 1, total + runs[-count - 1].size_bytes
    return count if count >= JOINED and total <= MOST_JOINED_BYTES else 1


def _entries(mirror: Mirror, place: Place, number: int, previous: bytes | None) -> Iterator[tuple[int, Items, int]]:
    """What the entries after `number` say, in parts of limited size.

    Each part has the number of its last entry, its items, and the bytes of its indexes.
    """
    head, known = mirror.head
    indexes: list[tuple[int, LogIndex]] = []
    size_bytes = 0
    with ThreadPool(AHEAD) as pool:
        while number < head:
            numbers = range(number + 1, min(number + AHEAD, head) + 1)
            entries = list(pool.map(lambda one: place.get(entry_name(one), MAX_ENTRY_BYTES), numbers))
            read = pool.map(lambda one: fetch_index(mirror.url, place, *one), zip(numbers, entries, strict=True))
            for number, entry, index in zip(numbers, entries, read, strict=True):
                if parse_entry(entry, mirror.url, number).previous != previous:
                    raise DamagedRemoteError(mirror.url, entry_name(number), "it does not follow the one before it")
                previous = hashlib.sha256(entry).digest()
                indexes.append((number, index))
                size_bytes += len(index.raw)
                index.raw = b""
                if size_bytes >= _RUN_BYTES and number < head:
                    yield number, partial(_entry_items, indexes), size_bytes
                    indexes, size_bytes = [], 0
    if previous != known:
        raise DamagedRemoteError(mirror.url, entry_name(head), "it is not the one that this store knows")
    if indexes:
        yield head, partial(_entry_items, indexes), size_bytes


def _entry_items(indexes: list[tuple[int, LogIndex]], kind: Kind) -> Iterator[Item]:
    found: list[Item] = []
    for number, index in indexes:
        if kind == "packs":
            found += [(pack.hex(), number, LogIndex(packs={pack: listing})) for pack, listing in index.packs.items()]
        elif kind == "drop":
            found += [(pack.hex(), number, LogIndex(drop=[pack])) for pack in index.drop]
        else:
            found += [(task, number, _with_texts(says, index)) for task, says in by_task(index).items()]
    return iter(sorted(found, key=_order))


def _run_items(mirror: Mirror, place: Place, run: Run, kind: Kind) -> Iterator[Item]:
    for shard in run.shards.get(kind, []):
        name = shard_name(shard.hash)
        index = parse_index(place.get(name, MAX_INDEX_BYTES), mirror.url, shard.hash, name)
        yield from sorted(
            [
                *((pack.hex(), run.last, LogIndex(packs={pack: listing})) for pack, listing in index.packs.items()),
                *((pack.hex(), run.last, LogIndex(drop=[pack])) for pack in index.drop),
                *((task, run.last, _with_texts(says, index)) for task, says in by_task(index).items()),
            ],
            key=_order,
        )


def _with_texts(says: LogIndex, index: LogIndex) -> LogIndex:
    """Adds an index's manifests and places to what it says of one task."""
    says.manifests, says.packs, says.shared = index.manifests, index.packs, index.shared
    return says


def _order(item: Item) -> tuple[str, int]:
    return item[:2]


class _Writer:
    """Writes runs to a place."""

    def __init__(self, mirror: Mirror, place: Place) -> None:
        self._mirror, self._place = mirror, place
        self.put: set[bytes] = set()
        """The hashes of the shards that it has put"""

    def run(self, last: int, parts: Sequence[Items], text_bytes: int, is_first: bool) -> Run:
        """Writes one run of what consecutive parts say. If it is the first run, no earlier run has packs to drop."""
        most = min(max(text_bytes // _SHARDS, _SHARD_TEXT_BYTES[0]), _SHARD_TEXT_BYTES[1])
        dropped = {pack for part in parts for _, _, says in part("drop") for pack in says.drop}
        earlier: list[tuple[str, LogIndex]] = []
        packs = self._packs(parts, dropped, earlier, is_first)
        return Run(
            last,
            {
                "packs": list(self._shards(packs, most)),
                "drop": list(self._shards(iter(earlier), most)),
                "tasks": list(self._shards(self._tasks(parts, dropped), most)),
            },
        )

    def _packs(
        self, parts: Sequence[Items], dropped: set[bytes], earlier: list[tuple[str, LogIndex]], is_first: bool
    ) -> Iterator[tuple[str, LogIndex]]:
        """Packs, and packs that are dropped. Dropped packs that an earlier run may have are added to `earlier`."""
        drops: Iterator[Item] = ((pack.hex(), 0, LogIndex()) for pack in sorted(dropped))
        for name, group in groupby(heapq.merge(*(part("packs") for part in parts), drops, key=_order), lambda i: i[0]):
            says = [one for _, _, one in group]
            pack = bytes.fromhex(name)
            if pack not in dropped and not any(one.drop for one in says):
                yield name, says[0]
            elif is_first or any(one.drop or one.packs for one in says):
                yield name, LogIndex(drop=[pack])
            else:
                earlier.append((name, LogIndex(drop=[pack])))

    def _tasks(self, parts: Sequence[Items], dropped: set[bytes]) -> Iterator[tuple[str, LogIndex]]:
        for name, group in groupby(heapq.merge(*(part("tasks") for part in parts), key=_order), lambda item: item[0]):
            says = [one for _, _, one in group]
            found = merged(says)
            for version in found.versions:
                if (version.task, version.number) not in found.removed:
                    self._add_texts(found, version, says, dropped)
            yield name, found

    def _add_texts(self, found: LogIndex, version: LoggedVersion, says: list[LogIndex], dropped: set[bytes]) -> None:
        """Adds a version's manifest, and the places of its tensors."""
        text = next((one.manifests[version.manifest] for one in says if version.manifest in one.manifests), None)
        text = text or self._mirror.find_manifest(version.manifest)
        if text is None:
            raise DamagedRemoteError(self._mirror.url, f"version {version.task}@{version.number}", "it has no manifest")
        found.manifests[version.manifest] = text
        with suppress(ValueError):  # nobody can pull a version whose manifest is invalid
            for digest in manifest_digests(text):
                self._add_place(found, digest, says, dropped)

    def _add_place(self, found: LogIndex, digest: Digest, says: list[LogIndex], dropped: set[bytes]) -> None:
        places = {
            pack: (listing.file_bytes, listing.places[digest])
            for one in says
            for packs in (one.shared, one.packs)
            for pack, listing in packs.items()
            if digest in listing.places and pack not in dropped
        } or {pack: (self._mirror.pack_bytes(pack), place) for pack, place in self._mirror.places(digest)}
        for pack, (file_bytes, place) in places.items():
            found.shared.setdefault(pack, PackListing(file_bytes, {})).places[digest] = place

    def _shards(self, items: Iterator[tuple[str, LogIndex]], most: int) -> Iterator[Shard]:
        """Puts items into shards of about `most` bytes of text."""
        index, first, text_bytes = LogIndex(), "", 0
        for name, says in items:
            size_bytes = _text_bytes(says)
            if first and text_bytes + size_bytes > most:
                yield self._put(first, index)
                index, first, text_bytes = LogIndex(), "", 0
            first = first or name
            text_bytes += size_bytes
            index.packs |= says.packs
            index.manifests |= says.manifests
            index.versions += says.versions
            index.removed += says.removed
            index.tags += says.tags
            index.highest |= says.highest
            index.drop += says.drop
            for pack, listing in says.shared.items():
                index.shared.setdefault(pack, PackListing(listing.file_bytes, {})).places.update(listing.places)
        if first:
            yield self._put(first, index)

    def _put(self, first: str, index: LogIndex) -> Shard:
        data = index.encode()
        shard = Shard(first, hashlib.sha256(data).digest(), len(data))
        self._place.put(shard_name(shard.hash), data)
        self.put.add(shard.hash)
        return shard


def _text_bytes(says: LogIndex) -> int:
    """About how many bytes of text an index has."""
    listings = [*says.packs.values(), *says.shared.values()]
    rows = len(says.versions) + len(says.removed) + len(says.tags) + len(says.highest) + len(says.drop) + len(listings)
    return 120 * rows + sum(map(len, says.manifests.values())) + 110 * sum(len(one.places) for one in listings)
