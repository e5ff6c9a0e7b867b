"""Garbage collection: what versions need is marked, the rest is swept, and packs that are mostly dead are rewritten.

Marks are one byte for each tensor and manifest ever numbered; no list of either is held in memory. A tensor that no
version needs keeps its row as long as its pack stays, for a later add may need it again; it counts as removed.
"""

import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import compress, groupby
from operator import gt
from pathlib import Path
from types import MappingProxyType

from pear_store.errors import DamagedError, DamagedIndexError, PearStoreError, from_os_error
from pear_store.format.container import Header
from pear_store.format.digest import Digest, RawTensor, from_digest, is_digest
from pear_store.format.pack import Records
from pear_store.local.catalog import Recorded, rows_of
from pear_store.local.directory import WRITTEN_NAME, open_folder
from pear_store.local.index import (
    NO_PACK,
    ContentsRow,
    ManifestRow,
    NameRow,
    PackRow,
    RemovedRow,
    State,
    TagRow,
    TensorRow,
    VersionRow,
    View,
    name_key,
    parse_tag_key,
    parse_version_key,
    version_key,
)
from pear_store.local.opened import OpenStore, name_row, version_row
from pear_store.local.packs import (
    WrittenPack,
    bare_header,
    is_unfinished,
    pack_path,
    read_records,
    unlink_pack,
    write_pack,
)
from pear_store.local.removal import remove_versions

REPACK_BYTES = 256 * 1024 * 1024
"""Live bytes that one step of a repack moves at most."""
REPACK_HEADER_BYTES = 16 * 1024 * 1024
RECORDS_A_PACK = 100_000


@dataclass(frozen=True)
class GcResult:
    """What a gc removed and what is left, in tensors and tensor bytes."""

    removed_versions: int
    removed_tensors: int
    removed_bytes: int
    kept_tensors: int
    kept_bytes: int
    dead_bytes: int
    dry_run: bool
    foreign: tuple[str, ...] = ()
    """What lies in the store's folders and is not Pear's, links included; it was left alone"""


@dataclass
class PackUse:
    """How much of a pack is needed: live tensor bytes, and whether anything else in it is. `contents` is its new row
    where what counts as removed has changed."""

    row: PackRow
    live_bytes: int = 0
    needed: bool = False
    contents: ContentsRow | None = None

    @property
    def dead_bytes(self) -> int:
        return self.row.tensor_bytes - self.live_bytes


@dataclass
class Marked:
    """What the versions need, and what they do not; bytes are tensor bytes."""

    marks: bytearray
    packs: dict[bytes, PackUse] = field(default_factory=dict)
    recorded: Counter[bytes] = field(default_factory=Counter)
    """How many rows name each pack as the one that records what they say"""
    versions: int = 0
    logical_bytes: int = 0
    kept_tensors: int = 0
    kept_bytes: int = 0
    removed_tensors: int = 0
    removed_bytes: int = 0
    lost: ContentsRow | None = None
    """Of NO_PACK, as `PackUse.contents`"""


def mark(view: View, dropped: frozenset[bytes] = frozenset()) -> Marked:
    """Marks what all versions but the dropped ones (by key) need, and counts.

    Raises:
        DamagedError: an index row cannot be trusted, so nothing may be called dead.
    """
    count = view.next_number()
    if count > max(_MARKS, _NUMBERS_A_ROW * (view.count("tensors") + view.count("manifests"))):
        raise DamagedError("the index's count of numbers", f"{count} is far beyond what is stored")
    marked = Marked(bytearray(count))
    marks, packs = marked.marks, marked.packs
    for pack, value in view.every("packs"):
        packs[pack] = PackUse(PackRow.decode(pack, value))
    expected = len(packs) + (view.get("contents", NO_PACK) is not None)
    if view.count("contents") != expected:
        raise DamagedError("index table contents", f"{view.count('contents')} rows, expected {expected}")

    def need(pack: bytes) -> PackUse:
        if pack not in packs:
            raise DamagedError(f"pack {pack.hex()}", "the index does not list it")
        packs[pack].needed = True
        return packs[pack]

    manifests = array("I")
    seen: set[bytes] = set()
    newest: dict[bytes, bytes] = {}
    recorded = marked.recorded
    for key, value in view.every("versions"):
        newest[key[:-5]] = key[-4:]
        if key in dropped:
            continue
        manifest_hash, pack, _, size_bytes = VersionRow.fields(key, value)
        marked.versions += 1
        marked.logical_bytes += size_bytes
        recorded[pack] += 1
        found = view.get("manifests", manifest_hash)
        if found is None:
            raise DamagedError(f"manifest of version {'@'.join(map(str, parse_version_key(key)))}", "missing")
        if manifest_hash in seen:
            continue
        seen.add(manifest_hash)
        manifest = ManifestRow.decode(manifest_hash, found)
        manifests.append(manifest.number)
        try:
            for number in manifest.tensors:
                marks[number] = TENSOR
        except IndexError:
            raise DamagedError("the index's count of numbers", "too small") from None
    recorded.update(_recording(view, newest))
    for pack in recorded:
        need(pack)
    packs[NO_PACK] = PackUse(PackRow(0, 0))
    needed = marks.count(TENSOR)
    try:
        for number in manifests:
            if marks[number] == TENSOR:
                raise DamagedError(f"index number {number}", "both a tensor and a manifest have it")
            marks[number] = MANIFEST
    except IndexError:
        raise DamagedError("the index's count of numbers", "too small") from None
    for pack, row in view.every_contents():
        try:
            live = bytes(map(marks.__getitem__, row.numbers))
        except IndexError:
            raise DamagedError("the index's count of numbers", "too small") from None
        if pack not in packs or MANIFEST in live:
            raise DamagedError(f"contents of pack {pack.hex()}", "it lists what is no tensor, or no pack")
        if count := live.count(TENSOR):
            use = need(pack)
            use.live_bytes = sum(compress(row.lengths, live))
            marked.kept_tensors += count
            marked.kept_bytes += use.live_bytes
        dead = live.translate(_OTHER)
        if dead != row.removed:
            fresh = bytes(map(gt, dead, row.removed))
            marked.removed_tensors += fresh.count(1)
            marked.removed_bytes += sum(compress(row.lengths, fresh))
            packs[pack].contents = ContentsRow(row.numbers, row.lengths, dead)
    marked.lost = packs.pop(NO_PACK).contents
    if marked.kept_tensors != needed:
        raise DamagedError("index table contents", f"{needed} tensors are needed, {marked.kept_tensors} are listed")
    return marked


_MARKS, _NUMBERS_A_ROW = 1 << 28, 1000
"""So many numbers are believed, or so many for each tensor and manifest; a mark is a byte"""
TENSOR, MANIFEST = 1, 2
"""What a mark says of a number that a version needs"""


def is_needed(marks: bytearray, row: TensorRow) -> bool:
    return row.number < len(marks) and marks[row.number] == TENSOR


def _recording(view: View, newest: dict[bytes, bytes]) -> list[bytes]:
    """The packs that record names, tags and removals, one for each; `newest` are the versions' tasks and newest
    numbers, as in keys.

    Raises:
        DamagedError: a row is damaged, or contradicts the versions.
    """
    packs = []
    for key, value in view.every("names"):
        name, last, highest, pack = NameRow.fields(key, value)
        packs.append(pack)
        if newest.pop(name, _NONE) != last.to_bytes(4, "big") or last > highest or name.lower() != key:
            raise DamagedError(f"index row of {name!r}", f"its newest version is not {last}")
    if newest:
        raise DamagedError(f"index row of {min(newest)!r}", "missing")
    for key, value in view.every("tags"):
        tag = TagRow.decode(key, value)
        packs.append(tag.pack)
        task, text = parse_tag_key(key)
        if tag.version and view.get("versions", version_key(task, tag.version)) is None:
            raise DamagedError(f"tag {task}@{text}", f"there is no version {tag.version}")
    for key, value in view.every("removed"):
        packs.append(RemovedRow.decode(key, value).pack)
        if view.get("versions", key) is not None:
            raise DamagedError("version {}@{}".format(*parse_version_key(key)), "both there and removed")
    return packs


_OTHER = bytes([1, 0]) + bytes(254)  # of marks, whether a number is not needed
_NONE = bytes(4)


def expired(view: View, keep: int | None, older_than_s: float | None) -> Iterator[tuple[str, int]]:
    """Versions beyond the newest `keep` that are older than a time; never a newest or a tagged one."""
    if keep is None and older_than_s is None:
        return
    before = time.time_ns() - int((older_than_s or 0) * 1e9)
    tagged = set()
    for key, value in view.every("tags"):
        tagged.add((parse_tag_key(key)[0], TagRow.decode(key, value).version))
    for task, group in groupby(view.every("versions"), lambda row: parse_version_key(row[0])[0]):
        rows = list(group)
        for key, value in rows[: -max(1, keep or 1)]:
            number = parse_version_key(key)[1]
            if VersionRow.decode(key, value).time_ns <= before and (task, number) not in tagged:
                yield task, number


def collect(
    opened: OpenStore, dry_run: bool, repack_all: bool, keep: int | None, older_than_s: float | None
) -> GcResult:
    """See :meth:`pear_store.Store.gc`."""
    if keep is not None and keep < 1:
        raise PearStoreError(f"keep {keep}: at least the newest version of a task stays; expected 1 or more")
    packs: list[WrittenPack] = []

    as_of: State | None = None
    foreign: list[str] = []
    gone: list[bytes] = []

    def sweep(view: View) -> tuple[int, Marked]:
        nonlocal as_of
        recorded = Recorded(opened.path)
        unlisted = recorded.find_unlisted(view)
        _refuse_unknown(opened.path, unlisted.unknown)
        drop_settled_removals(opened.path, view)
        doomed = list(expired(view, keep, older_than_s))
        packs[:] = remove_versions(opened, view, doomed)
        marked = mark(view)
        drop_manifests(view, marked.marks)
        for pack, use in marked.packs.items():
            if use.contents is not None and use.needed:
                view.put("contents", pack, use.contents.encode(pack))
        if marked.lost is not None:
            view.put("contents", NO_PACK, marked.lost.encode(NO_PACK))
        swept = [pack for pack, use in marked.packs.items() if not use.needed]
        drop_packs(opened.path, view, swept, recorded=recorded)
        gone[:] = [*unlisted.known, *swept]  # in this order: who recorded what was removed is asked of what was swept
        foreign[:] = unlisted.foreign
        set_aside(opened.path, unlisted.unreadable)
        as_of = view.state if view.wrote else view.before
        return len(doomed), marked

    if dry_run:
        _refuse_unknown(opened.path, unknown_packs(opened))

        def plan(view: View) -> tuple[int, Marked]:
            dropped = list(expired(view, keep, older_than_s))
            return len(dropped), mark(view, frozenset(version_key(*one) for one in dropped))

        removed, marked = opened.look(plan)
    else:
        removed, marked = opened.write_packs(sweep, packs)
        unlink_packs(opened, gone)  # not before the rows' going is durable
        foreign += clear_tmp(opened.path)
    victims = _victims(marked.packs, repack_all)
    left = sum(use.dead_bytes for pack, use in marked.packs.items() if use.needed and pack not in victims)
    if not dry_run:
        for step in _steps(victims, marked.packs):
            dead_bytes, as_of = _repack(opened, step, marked, as_of)
            left += dead_bytes
    return GcResult(
        removed, marked.removed_tensors, marked.removed_bytes, marked.kept_tensors, marked.kept_bytes, left, dry_run,
        tuple(foreign),
    )  # fmt: skip


def _refuse_unknown(path: Path, unknown: list[bytes]) -> None:
    if unknown:
        names = ", ".join(pack.hex() for pack in unknown[:3]) + (", …" if len(unknown) > 3 else "")
        raise DamagedIndexError(
            path / "index", f"{len(unknown)} packs record what it never had, and nothing was removed: {names}"
        )


def unknown_packs(opened: OpenStore) -> list[bytes]:
    """Packs that record what the index never had; without the write lock."""
    for _ in range(_LOOKS):
        with opened.read() as view:
            found = Recorded(opened.path).find_unlisted(view)
            state = view.state
        # a pack that is being added has its name in tmp/ until the index lists it
        done = [pack for pack in found.unknown if not is_unfinished(opened.path, pack)]
        with opened.read() as view:
            done = [pack for pack in done if view.get("packs", pack) is None and pack_path(opened.path, pack).exists()]
            if not done or view.state == state:  # else what was asked of other packs may have been moved
                break
    return done


_LOOKS = 5


def set_aside(path: Path, packs: Iterable[bytes]) -> None:
    """Moves packs that cannot be read into damaged/."""
    for pack in packs:
        name = pack_path(path, pack).name
        with open_folder(path, "packs", name[:2]) as folder, open_folder(path, "damaged", create=True) as damaged:
            folder.rename(name, name, damaged)
            damaged.sync()
            folder.sync()


def keep_copy(path: Path, pack: bytes) -> None:
    """Keeps a pack in damaged/, too."""
    name = pack_path(path, pack).name
    with open_folder(path, "packs", name[:2]) as folder, open_folder(path, "damaged", create=True) as damaged:
        with suppress(FileExistsError):
            folder.link(name, name, damaged)
        damaged.sync()


def clear_tmp(path: Path) -> list[str]:
    """Unlinks what a crashed add left in tmp/; returns the paths of what is not Pear's, which stays."""
    foreign: list[str] = []
    an_hour_ago = time.time() - 3600
    with suppress(FileNotFoundError), open_folder(path, "tmp") as tmp:
        for name in tmp.names():  # a living add takes seconds
            with suppress(FileNotFoundError):
                if not (WRITTEN_NAME.fullmatch(name) and tmp.is_file(name)):
                    foreign.append(str(tmp.path / name))
                elif tmp.look(name).st_mtime < an_hour_ago:
                    tmp.unlink(name)
    return foreign


def drop_settled_removals(path: Path, view: View) -> None:
    """Forgets removals of versions that no file records any more; nothing could bring those back."""
    there: dict[bytes, bool] = {}

    def settled(key: bytes, value: bytes) -> bool:
        pack = RemovedRow.decode(key, value).recorded_in
        if pack not in there:
            there[pack] = pack_path(path, pack).exists()
        return not there[pack]

    view.delete_where("removed", settled)


def drop_manifests(view: View, marks: bytearray) -> None:
    """Deletes the manifests that no version has. Those that one has were found whole when they were marked."""

    def dead(key: bytes, value: bytes) -> bool:
        number = ManifestRow.number_of(value)
        if number < len(marks) and marks[number] == MANIFEST:
            return False
        if ManifestRow.decode(key, value).number >= len(marks):
            raise DamagedError("the index's count of numbers", "too small")
        return True

    view.delete_where("manifests", dead)


def drop_packs(
    path: Path,
    view: View,
    packs: Sequence[bytes],
    headers: Mapping[bytes, Header] = MappingProxyType({}),
    recorded: Recorded | None = None,
) -> None:
    """Deletes the rows of packs that nothing needs any more, and of the tensors that they hold; with `recorded`, looks
    whether all is known that they record. `headers` are those of packs that were read already.

    Raises:
        DamagedError: a tensor's row names such a pack, the pack's own row does not list it; or it is not known.
    """
    unread: dict[bytes, set[int]] = {}
    for pack in packs:
        listed = set(view.contents(pack).numbers)
        header = headers.get(pack)
        if header is None:
            header, records = _read(pack_path(path, pack))
            if recorded is not None and not recorded.knows(view, pack, records):
                _refuse_unknown(path, [pack])
        for name in filter(is_digest, header.places if header else ()):
            value = view.get("tensors", key := from_digest(Digest(name)))
            if value is not None and TensorRow.peek(value).pack == pack:
                _check_listed(key, value, listed)
                view.delete("tensors", key)
        if listed:
            unread[pack] = listed
    if unread:  # missing or damaged

        def dead(key: bytes, value: bytes) -> bool:
            listed = unread.get(TensorRow.peek(value).pack)
            if listed is not None:
                _check_listed(key, value, listed)
            return listed is not None

        view.delete_where("tensors", dead)
    for pack in packs:
        view.drop_pack(pack)


def _read(file: Path) -> tuple[Header | None, Records]:
    """A pack's header and records, as far as they can be read."""
    try:
        header, records, _ = read_records(file)
    except DamagedError:
        return bare_header(file), Records()
    return header, records


def _check_listed(key: bytes, value: bytes, listed: set[int]) -> None:
    row = TensorRow.decode(key, value)
    if row.number not in listed:
        raise DamagedError(f"contents of pack {row.pack.hex()}", f"its tensor {row.number} is not listed")
    listed.remove(row.number)


def unlink_packs(opened: OpenStore, packs: Sequence[bytes]) -> None:
    """Unlinks packs that no row names any more; under the write lock, for a rebuild may have come to name one again."""

    def unlink(view: View) -> None:
        fans = set()
        for pack in packs:
            if view.get("packs", pack) is None:
                unlink_pack(opened.path, pack)
                fans.add(pack.hex()[:2])
        for fan in fans:
            with suppress(FileNotFoundError), open_folder(opened.path, "packs", fan) as folder:
                folder.sync()

    opened.write(unlink)


def _victims(packs: dict[bytes, PackUse], repack_all: bool) -> list[bytes]:
    """Packs worth rewriting: every one with dead bytes and all small ones, or else those more than two thirds dead,
    where each byte written frees two or more, if that frees a tenth of the store; many without tensors become one."""
    needed = {pack: use for pack, use in packs.items() if use.needed}
    if repack_all:
        small = [pack for pack, use in needed.items() if use.row.tensor_bytes * 4 < REPACK_BYTES]
        dead = [pack for pack, use in needed.items() if use.dead_bytes]
        many = 2
    else:
        small = [pack for pack, use in needed.items() if not use.row.tensor_bytes]
        dead = [pack for pack, use in needed.items() if use.dead_bytes * 3 > use.row.tensor_bytes * 2]
        many = _RECORD_PACKS
        if sum(needed[pack].dead_bytes for pack in dead) * 10 < sum(use.row.tensor_bytes for use in needed.values()):
            dead = []
    emptied = [pack for pack, use in needed.items() if use.dead_bytes and not use.live_bytes]  # only records to write
    chosen = {*dead, *emptied, *(small if len(small) >= many else ())}
    return [pack for pack in needed if pack in chosen]


_RECORD_PACKS = 8


def _steps(victims: list[bytes], packs: dict[bytes, PackUse]) -> Iterator[list[bytes]]:
    """The victims in runs of at most REPACK_BYTES of live bytes and REPACK_HEADER_BYTES of headers, or one alone."""
    step: list[bytes] = []
    size = headers = 0
    for pack in victims:
        row = packs[pack].row
        header = row.file_bytes - row.tensor_bytes
        if step and (size + packs[pack].live_bytes > REPACK_BYTES or headers + header > REPACK_HEADER_BYTES):
            yield step
            step, size, headers = [], 0, 0
        step.append(pack)
        size += packs[pack].live_bytes
        headers += header
    if step:
        yield step


@dataclass
class Contents:
    """What of some packs is needed: tensors with their numbers, and records; and the packs' headers."""

    headers: dict[bytes, Header] = field(default_factory=dict)
    tensors: dict[Digest, RawTensor] = field(default_factory=dict)
    numbers: dict[Digest, int] = field(default_factory=dict)
    records: Records = field(default_factory=Records)

    def merge(self, other: "Contents") -> None:
        self.headers.update(other.headers)
        self.tensors.update(other.tensors)
        self.numbers.update(other.numbers)
        self.records.versions += other.records.versions
        self.records.removed += other.records.removed
        self.records.tags += other.records.tags
        self.records.highest.update(other.records.highest)
        self.records.removed_manifests.update(other.records.removed_manifests)


def _needed_of(opened: OpenStore, view: View, pack: bytes, marked: Marked, recorded: Recorded) -> Contents:
    """What is still needed of a pack, by the pack's own header.

    Raises:
        DamagedError: something in it is damaged.
    """
    header, records, problems = read_records(pack_path(opened.path, pack))
    if problems:
        raise DamagedError(f"pack {pack.hex()}", f"{problems[0]} does not match its hash")
    found = Contents({pack: header})
    for name in header.places:
        if not is_digest(name):
            continue
        value = view.get("tensors", key := from_digest(Digest(name)))
        row = TensorRow.decode(key, value) if value is not None else None
        if row is not None and row.pack == pack and is_needed(marked.marks, row):
            digest = Digest(name)
            found.tensors[digest] = opened.tensor(view, digest, row)
            found.numbers[digest] = row.number
    live = bytes(map(marked.marks.__getitem__, view.contents(pack).numbers)).count(TENSOR)
    if live != len(found.tensors):
        raise DamagedError(
            f"pack {pack.hex()}", f"{live} of its tensors are needed, rows of {len(found.tensors)} are there"
        )
    found.records = rows_of(view, pack, records)
    if len(found.records) != marked.recorded[pack] or not recorded.knows(view, pack, records):
        raise DamagedError(f"pack {pack.hex()}", "its records are not what the index says")
    return found


def move(opened: OpenStore, view: View, contents: Contents) -> WrittenPack:
    """Writes contents into a new pack and points the index there."""
    written = write_pack(opened.path, contents.tensors, contents.records, view.next_commit())
    opened.enter(view, written, contents.records, contents.numbers, contents.tensors)
    for version in contents.records.versions:
        key = version_key(version.task, version.version)
        row = version_row(view, version.task, version.version)
        assert row is not None
        view.put("versions", key, VersionRow(row.manifest, written.hash, row.time_ns, row.size_bytes).encode(key))
    for task in contents.records.highest:
        known = name_row(view, task)
        assert known is not None
        row_now = NameRow(known.name, known.newest, known.highest, written.hash)
        view.put("names", name_key(task), row_now.encode(name_key(task)))
    return written


def _repack(opened: OpenStore, victims: list[bytes], marked: Marked, as_of: State | None) -> tuple[int, State]:
    """Moves what is needed of some packs into one new pack; returns the dead bytes that had to stay, and the state
    after it.

    `marked` holds as of a state; it is marked anew if there was a commit since, for an add may have come to need what
    was dead.
    """
    packs: list[WrittenPack] = []
    moved: list[bytes] = []

    def change(view: View) -> tuple[int, State]:
        packs.clear()
        moved.clear()
        left = 0
        contents, recorded = Contents(), Recorded(opened.path)
        now = marked if view.before == as_of else mark(view)
        for pack in victims:
            if view.get("packs", pack) is None:
                continue
            try:
                contents.merge(_needed_of(opened, view, pack, now, recorded))
                moved.append(pack)
            except DamagedError:  # what is damaged stays where it is, for a repair to find
                left += marked.packs[pack].dead_bytes
        drop_manifests(view, now.marks)  # of what was removed meanwhile: their tensors' rows go, too
        drop_packs(opened.path, view, moved, contents.headers)
        if contents.tensors or contents.records:
            packs.append(move(opened, view, contents))
        return left, view.state if view.wrote else view.before

    try:
        result = opened.write_packs(change, packs)
    except OSError as error:
        raise from_os_error(error, opened.path) from None
    unlink_packs(opened, moved)
    return result
