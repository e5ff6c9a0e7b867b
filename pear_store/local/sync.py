"""What a store gives to a remote and takes from it. This is the only module of `local` that knows of other stores."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from pear_store.errors import DamagedError, NotFoundError, from_os_error
from pear_store.format.checkpoint import Task
from pear_store.format.digest import Digest, RawTensor
from pear_store.format.pack import PackedTag, PackedVersion, Records
from pear_store.local.add import good_row, is_intact
from pear_store.local.catalog import enter, enter_manifest, free, take_out
from pear_store.local.index import View
from pear_store.local.loading import Loaded
from pear_store.local.opened import OpenStore, PackGoneError
from pear_store.local.packs import WrittenPack, pack_path, read_records_alone, write_pack
from pear_store.local.read import read_version
from pear_store.local.references import manifest_of, resolve
from pear_store.local.repair import rewrite_in
from pear_store.local.rows import NO_PACK, TagRow
from pear_store.local.tables import StoredTensor
from pear_store.local.verify import Report

T = TypeVar("T")
Numbered = tuple[str, int]
"""A task's name and a version's number"""
_LOOK_UPS = 3


@dataclass(frozen=True)
class Held:
    """What a store holds."""

    versions: Mapping[Numbered, tuple[bytes, int]]
    """Versions: the hash of each one's manifest, and its time"""
    tags: Mapping[tuple[str, str], int]
    removed: Mapping[Numbered, bytes | None]
    """Removed versions: the hash of each one's manifest, if it is known"""
    highest: Mapping[str, int]
    """The highest number that each task ever had"""
    spellings: Mapping[str, str]
    """Names of tasks that have a version, by their case-folded names"""


def held(opened: OpenStore, tasks: Collection[str] | None = None) -> Held:
    """What a store holds of some tasks, in any case of their names. None: of all tasks."""

    def look(view: View) -> Held:
        if tasks is None:
            versions, tags, gone = view.versions.every(), view.tags.every(), view.removed.every()
            names = list(view.names.every())
        else:
            rows = {folded: view.names.get(folded) for folded in {task.casefold() for task in tasks}}
            names = [row for row in rows.values() if row is not None]
            spelled = sorted({*tasks, *(row.name for row in names)})
            versions = ((task, number, row) for task in spelled for number, row in view.versions.of(task))
            tags = (row for task in spelled for row in view.tags.of(task))
            gone = (row for task in spelled for row in view.removed.of(task))
        removed: dict[Numbered, bytes | None] = {}
        known: dict[bytes, Records] = {}
        for task, number, removal in gone:
            if removal.pack not in known:
                known[removal.pack] = _records(opened, removal.pack)
            removed[task, number] = known[removal.pack].removed_manifests.get((task, number))
        return Held(
            {(task, number): (row.manifest, row.time_ns) for task, number, row in versions},
            {(task, tag): row.version for task, tag, row in tags if row.version},
            removed,
            {name.name: name.highest for name in names},
            {name.name.casefold(): name.name for name in names if name.newest},
        )

    return opened.look(look)


def _records(opened: OpenStore, pack: bytes) -> Records:
    try:
        return read_records_alone(pack_path(opened.path, pack))
    except DamagedError:
        return Records()


def manifest_in(opened: OpenStore, task: str, number: int) -> bytes:
    """A version's manifest.

    Raises:
        NotFoundError: there is no such version, or it was removed.
    """
    reference = f"{task}@{number}"
    return opened.look(
        lambda view: manifest_of(view, resolve(view, reference, opened.path)[2], f"version {reference}")[0]
    )


def version_in(opened: OpenStore, numbered: Numbered, manifest: bytes, copy: bool) -> Task:
    """A version, if it has this manifest, which is given by its hash.

    Raises:
        NotFoundError: there is no such version, or it has another manifest.
        DamagedError: stored bytes do not match their digest.
    """
    reference = f"{numbered[0]}@{numbered[1]}"

    def is_the_one(view: View) -> bool:
        row = view.versions.get(*numbered)
        return row is not None and row.manifest == manifest

    if not opened.look(is_the_one):
        raise NotFoundError(f"no such version {reference} in {opened.path}")
    return read_version(opened, reference, copy)


def tensors_in(opened: OpenStore, digests: Iterable[Digest], what: str) -> dict[Digest, RawTensor]:
    """Stored tensors, as views of maps. Each has been checked. `what` names their version in messages.

    Raises:
        DamagedError: one is damaged or missing.
    """
    wanted = list(digests)

    def look(view: View) -> dict[Digest, RawTensor]:
        return {Digest(name): tensor for name, tensor in opened.tensors(view, wanted, what).items()}

    for _ in range(_LOOK_UPS):
        try:
            return opened.look(look)
        except PackGoneError:  # a gc moved them meanwhile
            continue
    return opened.look(look)


def good_tensors_in(opened: OpenStore, digests: Iterable[Digest]) -> dict[Digest, RawTensor]:
    """Those of the tensors that are stored and undamaged."""

    def is_stored(digest: Digest, view: View) -> bool:
        return view.tensors.peek(digest) is not None

    found: dict[Digest, RawTensor] = {}
    for digest in digests:
        if opened.look(partial(is_stored, digest)):
            try:
                found.update(tensors_in(opened, [digest], "a task"))
            except DamagedError:
                continue
    return found


@dataclass(frozen=True)
class Incoming:
    """A version from elsewhere with all its tensors. It has been checked."""

    loaded: Loaded
    number: int
    time_ns: int


@dataclass
class Received:
    """What :func:`receive` changed."""

    taken: list[Numbered] = field(default_factory=list)
    renumbered: list[tuple[str, int, int]] = field(default_factory=list)
    """Versions that were only here and gave up their number: task, old number, new number"""
    here: list[Loaded] = field(default_factory=list)
    """Versions that were here already. They are undamaged now."""


def receive(opened: OpenStore, incoming: Sequence[Incoming], floors: Mapping[str, int]) -> Received:
    """Takes versions in under their own numbers, in one commit.

    If another version has such a number here, it gets the next free number, and keeps its tags. Packs whose records are
    outdated by this are rewritten in the same commit. If a version is here already, its damaged or missing parts are
    replaced.

    Args:
        floors: for each task, the highest number that is used elsewhere. New numbers are higher.

    Raises:
        DiskFullError, AccessError: the store cannot be written. Nothing was changed.
    """
    packs: list[WrittenPack] = []

    def change(view: View) -> Received:
        packs.clear()
        received, records, contradicted = _plan(view, opened, incoming, floors)
        used = {(v.task, v.version) for v in records.versions}
        fresh = [one.loaded for one in incoming if (one.loaded.name, one.number) in used]
        sizes = {loaded.hash: loaded.size_bytes for loaded in fresh}
        for task, _, number in received.renumbered:
            for version in records.versions:
                if (version.task, version.version) == (task, number):
                    sizes[version.hash] = _size_of(view, task, version.hash)
        damaged: dict[Digest, int] = {}
        stored: dict[Digest, StoredTensor] = {}
        tensors: dict[Digest, RawTensor] = {}
        seen: set[bytes] = set()
        for loaded in (*fresh, *received.here):
            for digest, tensor in loaded.tensors.items():
                if digest not in stored and digest not in tensors:
                    row = good_row(opened, view, digest, tensor, seen, damaged)
                    if row is None:
                        tensors[digest] = tensor
                    else:
                        stored[digest] = row
        if not (records or tensors):
            for loaded in received.here:
                if not is_intact(view, loaded):
                    enter_manifest(view, loaded.hash, loaded.manifest, loaded.tensors, stored)
            return received
        pack = write_pack(opened.path, tensors, records, view.next_commit())
        packs.append(pack)
        numbers = dict(damaged)
        new = [digest for digest in tensors if digest not in numbers]
        numbers.update(zip(new, range(first := view.take_numbers(len(new)), first + len(new)), strict=True))
        stored |= enter(opened.path, view, pack, records, numbers, damaged, sizes)
        for loaded in (*fresh, *received.here):
            enter_manifest(view, loaded.hash, loaded.manifest, loaded.tensors, stored)
        if contradicted:
            report = Report(damaged_packs=[one.hex() for one in contradicted])
            packs.append(rewrite_in(opened, view, report, {}, {})[0])
        return received

    return _written(opened, change, packs)


def _plan(
    view: View, opened: OpenStore, incoming: Sequence[Incoming], floors: Mapping[str, int]
) -> tuple[Received, Records, set[bytes]]:
    """Plans to take versions in: what changes, the records of that, and the packs whose records are outdated then."""
    received, records = Received(), Records()
    contradicted: set[bytes] = set()
    tops: dict[str, int] = {}
    for one in incoming:
        name = view.names.get(one.loaded.name)
        here = name.highest if name else 0
        tops[one.loaded.name] = max(tops.get(one.loaded.name, 0), here, floors.get(one.loaded.name, 0), one.number)
    for one in sorted(incoming, key=lambda one: (one.loaded.name, one.number)):
        task, number, manifest = one.loaded.name, one.number, one.loaded.hash
        known = view.versions.get(task, number)
        if known is not None and known.manifest == manifest:
            received.here.append(one.loaded)
            continue
        records.versions.append(PackedVersion(task, number, one.time_ns, one.loaded.manifest))
        received.taken.append((task, number))
        if known is not None:
            tops[task] += 1
            text = view.manifests.text(known.manifest)
            records.versions.append(PackedVersion(task, tops[task], known.time_ns, text))
            received.renumbered.append((task, number, tops[task]))
            for _, tag, row in list(view.tags.of(task)):
                if row.version == number:
                    now = max(time.time_ns(), row.time_ns + 1)
                    records.tags.append(PackedTag(task, tag, tops[task], now, known.manifest))
            contradicted.add(known.pack)
        gone = free(view, task, number)
        if gone is not None:  # the number was that of another version, which was only here
            contradicted |= {gone.recorded_in, gone.pack}
    records.versions.sort(key=lambda version: (version.task, version.version))
    return received, records, {pack for pack in contradicted if pack != NO_PACK and pack in view.packs}


def _size_of(view: View, task: str, manifest: bytes) -> int:
    return next(row.size_bytes for _, row in view.versions.of(task) if row.manifest == manifest)


def settle(
    opened: OpenStore,
    removed: Mapping[Numbered, bytes],
    tags: Mapping[tuple[str, str], tuple[int | None, int | None]],
    highest: Mapping[str, int],
) -> tuple[list[Numbered], list[tuple[str, str]]]:
    """Takes over removals, tags and highest numbers, in one commit.

    Args:
        removed: versions to remove, and the manifest of each. One that has another manifest now, or a tag, stays.
        tags: for each tag, the version that it must have now, and the version that it gets. None: no version.
        highest: for each task, the highest number that is used elsewhere.

    Returns:
        the versions that were removed, and the tags that were set.
    """
    packs: list[WrittenPack] = []

    def change(view: View) -> tuple[list[Numbered], list[tuple[str, str]]]:
        packs.clear()
        moved: list[PackedTag] = []
        for (task, tag), (before, after) in tags.items():
            now = view.tags.get(task, tag) or TagRow(0, 0, NO_PACK)
            version = None if after is None else view.versions.get(task, after)
            if (now.version or None) == before != after and (after is None or version is not None):
                time_ns = max(time.time_ns(), now.time_ns + 1)
                moved.append(PackedTag(task, tag, after, time_ns, version and version.manifest))
        tasks = {task for task, _ in removed}
        standing = {(task, tag): row.version for task in tasks for _, tag, row in view.tags.of(task)}
        standing.update({(one.task, one.tag): one.version or 0 for one in moved})
        tagged = {(task, number) for (task, _), number in standing.items()}
        gone = [
            (task, number)
            for (task, number), manifest in removed.items()
            if (row := view.versions.get(task, number)) is not None
            and row.manifest == manifest
            and (task, number) not in tagged
        ]
        records = take_out(view, gone) if gone else Records()
        records.tags = moved
        for task, number in highest.items():
            name = view.names.get(task)
            if name is None or (name.name == task and name.highest < number):
                records.highest[task] = number
        if records:
            packs.append(write_pack(opened.path, {}, records, view.next_commit()))
            enter(opened.path, view, packs[0], records, {})
        return gone, [(one.task, one.tag) for one in moved]

    return _written(opened, change, packs)


def _written(opened: OpenStore, change: Callable[[View], T], packs: list[WrittenPack]) -> T:
    try:
        result = opened.write_packs(change, packs)
    except OSError as error:
        raise from_os_error(error, opened.path) from None
    opened.unlink_doomed()
    return result
