"""Takes from a remote what a store lacks.

Everything that arrives is hashed, and checked as for `add`. It is entered in local commits of limited size. If a pull
is interrupted, what was taken stays.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from pear_store.errors import (
    AbsentError,
    CheckpointError,
    DamagedError,
    DamagedRemoteError,
    NotFoundError,
    PearStoreError,
)
from pear_store.format.checkpoint import TASK_NAME, checked_task
from pear_store.format.container import MAX_FILE_BYTES
from pear_store.format.container import Place as TensorPlace
from pear_store.format.digest import Digest, RawTensor, tensor_digest
from pear_store.format.manifest import parse_manifest
from pear_store.local.loading import Loaded
from pear_store.local.opened import OpenStore
from pear_store.local.references import parse_reference
from pear_store.local.sync import Held, Incoming, Numbered, good_tensors_in, held, receive, settle
from pear_store.pools import ThreadPool
from pear_store.remote.changes import compare
from pear_store.remote.log import Head, LoggedVersion, pack_name
from pear_store.remote.mirror import Mirror
from pear_store.remote.place import Place
from pear_store.remote.reading import read_on
from pear_store.remote.state import Places

GROUP_BYTES = 64 << 20
GROUP_VERSIONS = 200
READERS = 8
"""How many packs are read at once"""
Have = Callable[[Iterable[Digest]], dict[Digest, RawTensor]]
"""Returns those of some tensors that need not be read from the remote"""
Progress = Callable[[int, int, int], None]
"""Called with the versions done, all versions, and the bytes moved for them"""


@dataclass
class Pulled:
    """What a pull did.

    Args:
        versions: versions that were taken: task and number.
        renumbered: versions that were only here and gave up their number: task, old number, new number.
        removed: versions that were removed here, because they were removed on the remote.
        tags: tags that were moved, set or removed here: task and tag.
        problems: what was not taken, and why; one line each.
        read_bytes: bytes of the tensors that were read from the remote.
    """

    versions: list[Numbered] = field(default_factory=list)
    renumbered: list[tuple[str, int, int]] = field(default_factory=list)
    removed: list[Numbered] = field(default_factory=list)
    tags: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    read_bytes: int = 0


def pull(
    opened: OpenStore,
    place: Place,
    mirror: Mirror,
    references: Collection[str] = (),
    patterns: Collection[str] = ("*",),
    progress: Progress = lambda done, all_, moved_bytes: None,
) -> Pulled:
    """Takes versions, removals, tags and numbers.

    Args:
        references: tasks, or versions such as ``T@2`` and ``T@prod``. Empty: all tasks that match one of `patterns`.

    Raises:
        NotFoundError: the remote has no such task or version.
        DamagedRemoteError: what was read differs from what the log says. All versions before it were taken.
        PlaceError: the remote cannot be reached.
    """
    read_on(mirror, place)
    tasks, numbers = mirror.stable(lambda: chosen(mirror, references, patterns))
    pulled = Pulled()
    before = held(opened, tasks)
    changes = mirror.stable(lambda: compare(before, mirror, tasks))
    mirror.take(changes.same)
    wanted = [v for v in changes.pull if v.task not in numbers or v.number in numbers[v.task]]
    _name_removed(mirror, before, numbers)
    for done, group in groups(partial(good_tensors_in, opened), place, mirror, wanted, pulled):
        progress(done + len(group), len(wanted), pulled.read_bytes)
        if group:
            received = receive(opened, group, {one.loaded.name: mirror.highest(one.loaded.name) for one in group})
            mirror.take((one.loaded.name, one.number) for one in group)
            pulled.versions += received.taken
            pulled.renumbered += received.renumbered
            del received
        del group  # before the next group takes its place in memory
    progress(len(wanted), len(wanted), pulled.read_bytes)
    _settle(opened, mirror, tasks, pulled)
    return pulled


def _settle(opened: OpenStore, mirror: Mirror, tasks: set[str], pulled: Pulled) -> None:
    """Takes over removals, tags and numbers, by what the store holds now."""
    now = held(opened, tasks)
    changes = mirror.stable(lambda: compare(now, mirror, tasks))
    mirror.agree(changes.same_tags)
    tags = {
        key: (before, after)
        for key, (before, after) in changes.pull_tags.items()
        if after is None or (key[0], after) in now.versions
    }
    if changes.pull_removed or tags or changes.pull_highest:
        removed, moved = settle(opened, changes.pull_removed, tags, changes.pull_highest)
        pulled.removed += removed
        pulled.tags += moved
        mirror.agree((*key, tags[key][1]) for key in moved)
        for task, number in changes.pull_removed.keys() - set(removed):
            pulled.problems.append(f"{task}@{number} was removed on the remote and is kept here, because it has a tag")
    pulled.problems += [clash for clash in changes.clashes if clash not in pulled.problems]


def chosen(
    mirror: Mirror, references: Collection[str], patterns: Collection[str]
) -> tuple[set[str], dict[str, set[int]]]:
    """The tasks that are meant. For tasks of which only some versions are meant, also their numbers."""
    if not references:
        return set(mirror.tasks(patterns)), {}
    tasks: set[str] = set()
    numbers: dict[str, set[int]] = {}
    whole: set[str] = set()
    for reference in references:
        task, which = parse_reference(reference)
        if not mirror.versions(task):
            raise NotFoundError(f"{mirror.url}: no task {task!r} there; 'pear-store ls --store URL' lists its tasks")
        tasks.add(task)
        if which is None:
            whole.add(task)
            continue
        number = mirror.tag(task, which) if isinstance(which, str) else which
        if number is None or not mirror.has_version(task, number):
            raise NotFoundError(f"{mirror.url}: no version {reference} there")
        numbers.setdefault(task, set()).add(number)
    return tasks, {task: chosen for task, chosen in numbers.items() if task not in whole}


def _name_removed(mirror: Mirror, before: Held, numbers: dict[str, set[int]]) -> None:
    for task, chosen in numbers.items():
        for number in chosen:
            if (task, number) not in before.versions and mirror.taken(task, number):
                raise NotFoundError(
                    f"{task}@{number} was removed here, so it is not taken again; 'push' removes it on the remote"
                )


class _Wanted(NamedTuple):
    """A version to take: its manifest as bytes and parsed, and the tensors that it needs."""

    version: LoggedVersion
    manifest: bytes
    record: dict[str, Any]
    digests: list[Digest]


@dataclass
class _Group:
    """Versions that one commit takes."""

    done: int
    """How many versions came before this group"""
    head: Head
    """The log's last entry when the first of `places` was looked up"""
    versions: list[_Wanted] = field(default_factory=list)
    places: Places = field(default_factory=dict)
    """The places of all their tensors"""
    size_bytes: int = 0

    @property
    def digests(self) -> set[Digest]:
        return {digest for wanted in self.versions for digest in wanted.digests}


@dataclass
class _Reading:
    """A group whose tensors are being read."""

    group: _Group
    here: dict[Digest, RawTensor]
    """Tensors that need not be read"""
    found: Future[tuple[dict[Digest, RawTensor], PearStoreError | None]]


def groups(
    have: Have, place: Place, mirror: Mirror, wanted: list[LoggedVersion], pulled: Pulled
) -> Iterator[tuple[int, list[Incoming]]]:
    """The versions with all their tensors, in groups of what one commit takes; each with the count of versions before.

    While the caller works on a group, the next one is read.

    Args:
        have: returns tensors that need not be read.
    """
    with ThreadPool(READERS) as pool, ThreadPool(1) as ahead:
        grouped = _grouped(mirror, wanted)
        reading: _Reading | None = None
        while True:
            following: _Reading | None = None
            problem: PearStoreError | None = None
            try:
                if (group := next(grouped, None)) is not None:
                    coming = reading.group.digests if reading else set()
                    here = have(sorted(group.digests - coming))
                    missing = group.digests - coming - here.keys()
                    places = {digest: group.places[digest] for digest in missing}
                    following = _Reading(group, here, ahead.submit(find_tensors, place, places, pool))
            except PearStoreError as error:  # raised after the group before it is taken
                problem = error
            if reading is not None:
                tensors = _fetched(place, mirror, reading, pool, pulled)
                if following is not None:  # copies: else a tensor keeps alive all bytes that were read with it
                    shared = following.group.digests & tensors.keys()
                    following.here.update((digest, _copied(tensors[digest])) for digest in shared)
                done = reading.group.done
                finite: set[Digest] = set()
                incoming = [_checked(mirror, wanted, tensors, finite) for wanted in reading.group.versions]
                del tensors, reading
                yield done, incoming
                del incoming
            if problem is not None:
                raise problem
            if following is None:
                return
            reading = following


def _grouped(mirror: Mirror, wanted: list[LoggedVersion]) -> Iterator[_Group]:
    group = _Group(0, mirror.head)
    for version in wanted:
        head = mirror.head
        manifest = mirror.stable(partial(mirror.manifest_of, version))
        if manifest is None:  # it was removed meanwhile
            continue
        try:
            record, digests = parse_manifest(manifest)
        except ValueError as error:
            if group.versions:
                yield group
            raise DamagedRemoteError(mirror.url, f"manifest of {version.task}@{version.number}", str(error)) from None
        places = mirror.places_of([digest for digest in digests if digest not in group.places])
        more = sum(found[0][1].length for digest in digests if (found := places.get(digest, group.places.get(digest))))
        if more > MAX_FILE_BYTES:
            if group.versions:
                yield group
            where = f"{mirror.url}: {version.task}@{version.number}"
            raise CheckpointError(where, f"tensors: expected at most {MAX_FILE_BYTES} bytes, found {more}")
        if group.versions and (group.size_bytes + more > GROUP_BYTES or len(group.versions) == GROUP_VERSIONS):
            yield group
            places |= {digest: group.places[digest] for digest in digests if digest not in places}
            group = _Group(group.done + len(group.versions), head)
        group.places |= places
        group.versions.append(_Wanted(version, manifest, record, digests))
        group.size_bytes += more
    if group.versions:
        yield group


def _fetched(
    place: Place, mirror: Mirror, reading: _Reading, pool: ThreadPool, pulled: Pulled
) -> dict[Digest, RawTensor]:
    """All tensors of a group. If a pack was dropped meanwhile, versions that were removed leave the group."""
    group, tensors = reading.group, reading.here
    fetched, problem = reading.found.result()
    head = group.head
    while True:
        pulled.read_bytes += sum(tensor.size_bytes for tensor in fetched.values())
        tensors |= fetched
        if not (missing := group.digests - tensors.keys()):
            return tensors
        try:
            if problem is not None:
                raise problem
            head = mirror.head
            fetched = fetch_tensors(place, mirror, sorted(missing), pool)
        except (AbsentError, DamagedRemoteError):
            problem = None
            read_on(mirror, place)  # a pack may have been dropped; the log says where its tensors are now
            left = [item for item in group.versions if mirror.has_version(item.version.task, item.version.number)]
            if mirror.head == head and len(left) == len(group.versions):
                if not mirror.left_bytes("packs"):
                    raise
                mirror.need_all("packs")  # a pack that is not known yet may have a good copy
            group.versions = left  # without those that were removed meanwhile
            fetched = {}


def _copied(tensor: RawTensor) -> RawTensor:
    return RawTensor.checked(tensor.dtype, tensor.shape, bytes(tensor.data), tensor.digest)


def _checked(mirror: Mirror, wanted: _Wanted, found: Mapping[Digest, RawTensor], finite: set[Digest]) -> Incoming:
    """Checks a version as for `add`: a remote may send anything. `finite` are tensors that were checked before."""
    version, record = wanted.version, wanted.record
    tensors = {digest: found[digest] for digest in wanted.digests}
    where = f"{mirror.url}: {version.task}@{version.number}"
    checked_task(record, {str(digest): tensor for digest, tensor in tensors.items()}, where, finite)
    finite.update(tensors)
    if record["task"] != version.task or not TASK_NAME.fullmatch(version.task):
        raise CheckpointError(where, f"its manifest is of task {str(record['task'])[:100]!r}")
    size_bytes = sum(tensor.size_bytes for tensor in tensors.values())
    loaded = Loaded(version.task, tensors, size_bytes, wanted.manifest, version.manifest)
    return Incoming(loaded, version.number, version.time_ns)


def fetch_tensors(place: Place, mirror: Mirror, digests: Iterable[Digest], pool: ThreadPool) -> dict[Digest, RawTensor]:
    """Tensors by digest, each hashed.

    Raises:
        DamagedRemoteError: no pack has a good copy of one.
        AbsentError: a pack is gone.
    """
    places = mirror.places_of(list(digests))
    found, problem = find_tensors(place, places, pool)
    for digest in places:
        if digest not in found:
            raise problem or DamagedRemoteError(
                mirror.url, f"tensor {digest}", f"{len(places[digest])} packs list it, none has a good copy"
            )
    return found


def find_tensors(
    place: Place, wanted: Places, pool: ThreadPool
) -> tuple[dict[Digest, RawTensor], PearStoreError | None]:
    """Reads tensors and hashes each. Returns the good ones, and the first problem.

    If a pack has a bad copy, or is missing, the next pack that lists the tensor is read.
    """
    found: dict[Digest, RawTensor] = {}
    problem: PearStoreError | None = None
    for attempt in range(max(map(len, wanted.values()), default=0)):
        by_pack: dict[bytes, list[tuple[Digest, TensorPlace]]] = {}
        for digest, places in wanted.items():
            if digest not in found and attempt < len(places):
                by_pack.setdefault(places[attempt][0], []).append((digest, places[attempt][1]))
        for tensors, error in pool.map(lambda item: _read(place, *item), by_pack.items()):
            found.update(tensors)
            problem = problem or error
    return found, problem


def _read(
    place: Place, pack: bytes, listed: list[tuple[Digest, TensorPlace]]
) -> tuple[dict[Digest, RawTensor], PearStoreError | None]:
    found: dict[Digest, RawTensor] = {}
    problem: PearStoreError | None = None
    try:
        read = place.get_ranges(pack_name(pack), [(at.offset, at.length) for _, at in listed])
    except (AbsentError, DamagedError) as error:
        return {}, error
    for (digest, at), data in zip(listed, read, strict=True):
        if tensor_digest(at.dtype, at.shape, data) == digest:
            found[digest] = RawTensor.checked(at.dtype, at.shape, data, digest)
        else:
            problem = DamagedRemoteError(place.url, pack_name(pack), f"the bytes of tensor {digest} do not hash to it")
    return found, problem
