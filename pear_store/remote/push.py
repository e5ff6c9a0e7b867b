"""Sends to a remote what it lacks of a store.

Packs go first, then an index that says what is new, and then the entry that names the index is created under the next
free number. Who finds that number taken reads what others wrote, looks again at all that it counted on, and goes on.
"""

import hashlib
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pear_store.errors import AbsentError, ClashError, DamagedError, PlaceError
from pear_store.format.container import Place as TensorPlace
from pear_store.format.container import lay_out
from pear_store.format.digest import Digest, RawTensor, fresh_name
from pear_store.format.manifest import manifest_digests
from pear_store.format.pack import NO_COMMIT, Records, pack_metadata
from pear_store.local.opened import OpenStore
from pear_store.local.sync import Numbered, held, manifest_in, tensors_in
from pear_store.remote.changes import Changes, compare
from pear_store.remote.log import (
    MAX_ENTRY_BYTES,
    Entry,
    LoggedVersion,
    LogIndex,
    PackListing,
    entry_name,
    index_name,
    pack_name,
)
from pear_store.remote.mirror import Mirror
from pear_store.remote.place import Place, probe
from pear_store.remote.reading import read_on
from pear_store.remote.retry import TRIES, wait

GROUP_BYTES = 64 << 20
"""Tensor bytes that one entry brings at most, if its versions are smaller: what a push holds in memory"""
GROUP_VERSIONS = 500
_GROUP_MANIFEST_BYTES = 4 << 20
_GROUP_TENSORS = 40_000
_MOST_CONFLICTS = 1000
Progress = Callable[[int, int], None]
"""Told versions done and all of them"""


@dataclass
class Pushed:
    """What a push did; bytes are those that were sent."""

    versions: list[Numbered] = field(default_factory=list)
    removed: list[Numbered] = field(default_factory=list)
    tags: list[tuple[str, str, int | None]] = field(default_factory=list)
    sent_bytes: int = 0
    entries: int = 0


@dataclass
class _Group:
    """What one entry is to say, and the packs that were sent for it."""

    versions: list[LoggedVersion] = field(default_factory=list)
    manifests: dict[bytes, bytes] = field(default_factory=dict)
    digests: dict[Digest, Numbered] = field(default_factory=dict)
    """Tensors that the versions need, and a version that has each"""
    is_last: bool = False
    packs: dict[bytes, PackListing] = field(default_factory=dict)


def push(
    opened: OpenStore,
    place: Place,
    mirror: Mirror,
    tasks: set[str] | None = None,
    progress: Progress = lambda done, all_: None,
) -> Pushed:
    """Sends the versions, removals and tags of some tasks, or of all, that the remote lacks.

    What is done is on the remote: a push that was cut off goes on when it is called again.

    Raises:
        ClashError: what is on the remote contradicts what would be sent. It is raised before anything is sent, unless
            another store pushed meanwhile.
        PlaceError: the remote cannot be reached or written. What is acknowledged is there; the last entry may be, too.
    """
    read_on(mirror, place)
    changes = _checked(compare(held(opened), mirror, tasks))
    _agree(mirror, changes)
    pushed = Pushed()
    if changes.is_pushed:
        return pushed
    if not mirror.was_probed:
        probe(place)
        mirror.note_probed()
    done, every = 0, len(changes.push)
    for group in _groups(opened, mirror, changes):
        progress(done, every)
        _push_group(opened, place, mirror, tasks, group, pushed)
        done += len(group.versions)
    progress(every, every)
    return pushed


def _checked(changes: Changes) -> Changes:
    if changes.clashes:
        raise ClashError(changes.clashes)
    return changes


def _agree(mirror: Mirror, changes: Changes) -> None:
    mirror.take(changes.same)
    if changes.same_tags:
        mirror.agree(changes.same_tags)


def _groups(opened: OpenStore, mirror: Mirror, changes: Changes) -> Iterator[_Group]:
    """The versions to push by name and number, in runs of what one entry takes; the last one takes all else, too."""
    group = _Group()
    size = manifest_bytes = 0
    for version in sorted(changes.push, key=lambda version: (version.task, version.number)):
        manifest = manifest_in(opened, version.task, version.number)
        digests = manifest_digests(manifest)
        new = [digest for digest in digests if digest not in group.digests and not mirror.has(digest)]
        tensors = tensors_in(opened, new, f"version {version.task}@{version.number}")
        more = sum(tensor.size_bytes for tensor in tensors.values())
        if group.versions and (
            size + more > GROUP_BYTES
            or manifest_bytes + len(manifest) > _GROUP_MANIFEST_BYTES
            or len(group.versions) == GROUP_VERSIONS
            or len(group.digests) + len(digests) > _GROUP_TENSORS
        ):
            yield group
            group, size, manifest_bytes = _Group(), 0, 0
        group.versions.append(version)
        group.manifests[version.manifest] = manifest
        group.digests.update(
            (digest, (version.task, version.number)) for digest in digests if digest not in group.digests
        )
        size, manifest_bytes = size + more, manifest_bytes + len(manifest)
    group.is_last = True
    yield group


def _push_group(
    opened: OpenStore, place: Place, mirror: Mirror, tasks: set[str] | None, group: _Group, pushed: Pushed
) -> None:
    sent: set[bytes] = set()
    for attempt in range(_MOST_CONFLICTS):
        head, previous = mirror.head  # first: what is looked at below may be newer, never older
        changes = _checked(compare(held(opened), mirror, tasks))
        index = _index(opened, place, mirror, group, changes, pushed)
        if not index:
            return
        mirror.check(head + 1, index)
        data = index.encode()
        name = hashlib.sha256(data).digest()
        if name not in sent:
            place.put(index_name(name), data)
            sent.add(name)
        entry = Entry(fresh_name(), previous, name, time.time_ns(), _host())
        if _commit(place, entry, head + 1):
            mirror.apply(head + 1, entry.encode(), index)
            mirror.take((version.task, version.number) for version in index.versions)
            mirror.agree((tag.task, tag.tag, tag.version) for tag in index.tags)
            pushed.versions += [(version.task, version.number) for version in index.versions]
            pushed.removed += index.removed
            pushed.tags += [(tag.task, tag.tag, tag.version) for tag in index.tags]
            pushed.entries += 1
            return
        read_on(mirror, place)
        if attempt > 2:
            wait(min(attempt - 3, 5))
    raise PlaceError(place.url, f"others were first {_MOST_CONFLICTS} times; run the same again")


def _index(
    opened: OpenStore, place: Place, mirror: Mirror, group: _Group, changes: Changes, pushed: Pushed
) -> LogIndex:
    """What the next entry says, by what the remote holds now. Sends the tensors that it lacks."""
    wanted = {(version.task, version.number) for version in group.versions}
    index = LogIndex(versions=[version for version in changes.push if (version.task, version.number) in wanted])
    index.versions.sort(key=lambda version: (version.task, version.number))
    index.manifests = {version.manifest: group.manifests[version.manifest] for version in index.versions}
    if index.versions:
        for pack in [pack for pack in group.packs if mirror.is_dropped(pack)]:  # an orphan to a gc
            del group.packs[pack]
        mine = {digest for listing in group.packs.values() for digest in listing.places}
        needed = set().union(*map(manifest_digests, index.manifests.values()))
        missing = [one for one in group.digests if one in needed and one not in mine and not mirror.has(one)]
        if missing:
            _send(opened, place, group, missing, pushed)
        index.packs = dict(group.packs)
    if group.is_last:
        there = {(version.task, version.number) for version in index.versions}
        index.tags = [  # not of what was added here since the versions were counted
            tag
            for tag in changes.push_tags
            if tag.version is None or (tag.task, tag.version) in there or mirror.has_version(tag.task, tag.version)
        ]
        index.removed = [one for one in changes.push_removed if not _tags_left(mirror, index, *one)]
        index.highest = changes.push_highest
    else:
        tasks = {version.task for version in index.versions}
        index.highest = {task: number for task, number in changes.push_highest.items() if task in tasks}
    return index


def _tags_left(mirror: Mirror, index: LogIndex, task: str, number: int) -> bool:
    """Whether a version is tagged on the remote still, after what an index says."""
    return not set(mirror.tags_of(task, number)) <= {tag.tag for tag in index.tags if tag.task == task}


def _send(opened: OpenStore, place: Place, group: _Group, missing: list[Digest], pushed: Pushed) -> None:
    """Sends tensors in a new pack; each task's lie side by side."""
    by_version: dict[Numbered, list[Digest]] = {}
    for digest in missing:
        by_version.setdefault(group.digests[digest], []).append(digest)
    tensors: dict[str, RawTensor] = {}
    for (task, number), digests in by_version.items():
        for digest, tensor in tensors_in(opened, digests, f"version {task}@{number}").items():
            tensors[str(digest)] = tensor
    head, places = lay_out(tensors, pack_metadata(Records(), NO_COMMIT))
    data = b"".join((head, *(tensors[name].data for name in places)))
    pack = hashlib.sha256(data).digest()
    listing = {Digest(name): TensorPlace(*tensor_place) for name, tensor_place in places.items()}
    place.put(pack_name(pack), data)
    group.packs[pack] = PackListing(len(data), listing)
    pushed.sent_bytes += len(data)


def _commit(place: Place, entry: Entry, number: int) -> bool:
    """Creates an entry; False if another one has its number.

    After an error nobody knows whether it was created: whoever's id is there tells. If there is none, the same is
    tried again, for it may only be late.
    """
    name, data = entry_name(number), entry.encode()
    for attempt in range(TRIES):
        is_refused = True
        try:
            if place.create(name, data):
                return True
        except PlaceError as error:
            if not error.again:
                raise
            is_refused = False
        try:  # what was refused may be our own, of a try whose answer was lost
            return place.get(name, MAX_ENTRY_BYTES) == data
        except AbsentError:
            if is_refused:
                raise DamagedError(name, "the remote says that it is there, and does not give it") from None
        wait(attempt)
    raise PlaceError(place.url, "it does not say whether the push was taken; run the same again, which finds out")


def _host() -> str:
    return "".join(c for c in socket.gethostname() if c.isprintable())[:100]
