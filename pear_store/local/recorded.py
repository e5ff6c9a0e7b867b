"""Compares what packs record with what the index says."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pear_store.counted import counted
from pear_store.errors import DamagedError, DamagedIndexError
from pear_store.format.digest import Digest, is_digest
from pear_store.format.pack import Records
from pear_store.local.index import State, View
from pear_store.local.packs import find_packs, pack_path, read_records, read_records_alone
from pear_store.local.rows import NO_PACK, TagRow


@dataclass
class Unlisted:
    """Packs that the index does not list."""

    known: list[bytes] = field(default_factory=list)
    """Packs whose records the index knows, without any tensor that it misses. A gc that died leaves such packs."""
    unknown: list[bytes] = field(default_factory=list)
    """Packs that record what the index never had, or that hold tensors which it misses"""
    unreadable: list[bytes] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    """Paths of files that are no packs"""


class Recorded:
    """Compares packs' records with the index. Keeps the records that it has read. For one thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._marks: dict[bytes, frozenset[tuple[str, int, bytes]]] = {}
        self._as_of: State | None = None
        self._room = 0

    def find_unlisted(self, view: View) -> Unlisted:
        """Looks at each pack that the index does not list. Without the write lock, it also finds packs being added."""
        unlisted = Unlisted()
        for pack in find_packs(self._path, unlisted.foreign):
            if pack not in view.packs:
                try:
                    header, records, problems = read_records(pack_path(self._path, pack))
                except DamagedError:
                    unlisted.unreadable.append(pack)
                    continue
                is_known = not problems and self.knows(view, pack, records)
                is_known = is_known and not self._holds_lost(view, header.places)
                (unlisted.known if is_known else unlisted.unknown).append(pack)
        return unlisted

    def knows(self, view: View, pack: bytes, records: Records) -> bool:
        """Whether the index knows all that a pack records, or something later about the same."""
        return self.compare(view, pack, records)[0]

    def compare(self, view: View, pack: bytes, records: Records) -> tuple[bool, int]:
        """Compares a pack's records with the index.

        Returns:
            whether the index knows all of them, or something later about the same; and how many rows name the pack for
            its records.
        """
        if self._as_of != view.state:  # a pack that could not be read may have been moved
            self._marks, self._as_of, self._room = {}, view.state, _MOST_MARKS
        known, rows = True, 0
        current = set()  # numbers for which rows name this pack: they stay used, even if their records move
        for version in records.versions:
            mark = (version.task, version.version, version.hash)
            row = view.versions.get(version.task, version.version)
            if row is None:  # was this version removed? Another copy of the store may have another of this number
                removed = view.removed.get(version.task, version.version)
                known = known and removed is not None and self._has(removed.recorded_in, mark, pack)
            elif row.pack != pack:
                known = known and row.manifest == version.hash and self._has(row.pack, mark, pack)
            else:
                known = known and row.manifest == version.hash
                rows += (row.manifest, row.time_ns) == (version.hash, version.time_ns)
                current.add((version.task, version.version))
        for task, number in records.removed:
            known = known and not view.versions.has(task, number)
            removed = view.removed.get(task, number)  # None: no file records the removed version any more
            if removed is not None and removed.pack == pack:
                rows += 1
                current.add((task, number))
            elif removed is not None:
                known = known and self._has(removed.pack, (task, number, b""), pack)
        for task, number in records.highest_numbers().items():
            name = view.names.get(task)
            known = known and name is not None and name.highest >= number
            if name is not None and name.highest == number:
                rows += (name.name, name.pack) == (task, pack)
                if (task, number) not in current:
                    known = known and self._has(name.pack, (name.name, number, b"highest"), pack)
        for tag in records.tags:
            now = view.tags.get(tag.task, tag.tag) or TagRow(0, 0, NO_PACK)
            rows += now == TagRow(tag.version or 0, tag.time_ns, pack)
            known = known and now.time_ns >= tag.time_ns
            known = known and self._has(now.pack, (f"{tag.task}@{tag.tag}", now.time_ns, b""), pack)
        return known, rows

    def _has(self, pack: bytes, mark: tuple[str, int, bytes], asking: bytes) -> bool:
        """Whether the pack that a row names records what the row says. The asking pack always does."""
        if pack == asking:
            return True
        if pack not in self._marks:
            try:
                records = read_records_alone(pack_path(self._path, pack))
            except DamagedError:
                records = Records()
            marks = frozenset(_marks(records))
            if self._room < len(marks):
                self._marks, self._room = {}, _MOST_MARKS
            self._marks[pack] = marks
            self._room -= len(marks)
        return mark in self._marks[pack]

    def _holds_lost(self, view: View, names: Iterable[str]) -> bool:
        """Whether the index lists one of these tensors in a pack whose file is missing."""
        there: dict[bytes, bool] = {}
        for name in filter(is_digest, names):
            row = view.tensors.peek(Digest(name))
            if row is not None:
                pack = row.pack
                if pack not in there:
                    there[pack] = pack != NO_PACK and pack_path(self._path, pack).exists()
                if not there[pack]:
                    return True
        return False


_MOST_MARKS = 1 << 20
"""Marks that are kept. One takes about 200 bytes."""


def _marks(records: Records) -> Iterator[tuple[str, int, bytes]]:
    """One mark for each thing that is recorded."""
    for version in records.versions:
        yield version.task, version.version, version.hash
    for task, number in records.removed:
        yield task, number, b""
    for tag in records.tags:
        yield f"{tag.task}@{tag.tag}", tag.time_ns, b""
    for task, number in records.highest_numbers().items():
        yield task, number, b"highest"


def count_rows(view: View) -> Counter[bytes]:
    """How many rows name each pack as the one that records them."""
    count: Counter[bytes] = Counter()
    count.update(row.pack for _, _, row in view.versions.rows())
    count.update(row.pack for row in view.names.rows())
    count.update(row.pack for _, _, row in view.tags.rows())
    count.update(row.pack for _, _, row in view.removed.rows())
    return count


def refuse_unknown(path: Path, unknown: list[bytes]) -> None:
    if unknown:
        names = ", ".join(pack.hex() for pack in unknown[:3]) + (", …" if len(unknown) > 3 else "")
        raise DamagedIndexError(
            path / "index",
            f"it never had what {counted(len(unknown), 'pack')} recorded, so nothing was removed: {names}",
        )
