"""Says what each entry of a remote's log did."""

from dataclasses import dataclass, field

from pear_store.local.sync import Numbered
from pear_store.pools import ThreadPool
from pear_store.remote.log import (
    MAX_ENTRY_BYTES,
    MAX_INDEX_BYTES,
    Entry,
    LogIndex,
    entry_name,
    index_name,
    parse_entry,
    parse_index,
)
from pear_store.remote.mirror import Mirror
from pear_store.remote.place import Place
from pear_store.remote.pull import READERS
from pear_store.remote.reading import read_on


@dataclass(frozen=True)
class Logged:
    """What a log entry did.

    Args:
        number: the entry's number, from 1.
        time_ns: when it was written, by its writer's clock, in nanoseconds since the epoch.
        host: the name that its writer gave itself.
        versions: versions that it added.
        removed: versions that it removed.
        tags: task, tag, and the version that it names since then. None: no version.
        packs: how many packs it added.
        pack_bytes: the bytes of these packs.
        dropped_packs: how many packs it dropped.
        strays: how many other objects it dropped.
    """

    number: int
    time_ns: int
    host: str
    versions: list[Numbered] = field(default_factory=list)
    removed: list[Numbered] = field(default_factory=list)
    tags: list[tuple[str, str, int | None]] = field(default_factory=list)
    packs: int = 0
    pack_bytes: int = 0
    dropped_packs: int = 0
    strays: int = 0


def history(place: Place, mirror: Mirror, most: int | None = 20) -> list[Logged]:
    """The newest entries, newest first. Those that the mirror has copies of are not read again.

    Raises:
        DamagedRemoteError: an entry, or its index, is damaged.
    """
    read_on(mirror, place)
    head = mirror.head[0]
    numbers = range(head, 0 if most is None else max(0, head - most), -1)
    found = []
    with ThreadPool(READERS) as pool:
        for start in range(0, len(numbers), READERS):  # a few at a time: an index may be large
            some = numbers[start : start + READERS]
            known = [(entry_name(number), mirror.copy(entry_name(number))) for number in some]
            data = pool.map(lambda one: one[1] or place.get(one[0], MAX_ENTRY_BYTES), known)
            entries = [parse_entry(one, place.url, number) for number, one in zip(some, data, strict=True)]
            known = [(name := index_name(entry.index), mirror.copy(name)) for entry in entries]
            data = pool.map(lambda one: one[1] or place.get(one[0], MAX_INDEX_BYTES), known)
            for number, entry, one in zip(some, entries, data, strict=True):
                found.append(_logged(number, entry, parse_index(one, place.url, entry.index)))
    return found


def _logged(number: int, entry: Entry, index: LogIndex) -> Logged:
    return Logged(
        number, entry.time_ns, entry.host,
        [(version.task, version.number) for version in index.versions], index.removed,
        [(tag.task, tag.tag, tag.version) for tag in index.tags],
        len(index.packs), sum(listing.file_bytes for listing in index.packs.values()),
        len(index.drop), len(index.strays),
    )  # fmt: skip
