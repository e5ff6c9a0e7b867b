"""Sends to a remote what it lacks of a store.

Packs go first, then an index that says what is new, and then the entry that names the index is created under the next
free number. Who finds that number taken reads what others wrote, looks again at all that it counted on, and goes on.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from pear_store.errors import ClashError
from pear_store.format.digest import Digest, RawTensor
from pear_store.format.manifest import manifest_digests
from pear_store.local.opened import OpenStore
from pear_store.local.sync import Numbered, held, manifest_in, tensors_in
from pear_store.remote.changes import Changes, compare
from pear_store.remote.commit import GROUP_BYTES, Committer, prepare, put_pack
from pear_store.remote.log import LoggedVersion, LogIndex, PackListing
from pear_store.remote.mirror import Mirror
from pear_store.remote.place import Place
from pear_store.remote.reading import read_on

GROUP_VERSIONS = 500
_GROUP_MANIFEST_BYTES = 4 << 20
_GROUP_TENSORS = 40_000
Head = tuple[int, bytes | None]
Progress = Callable[[int, int, int], None]
"""Told versions done, all of them, and bytes moved for them"""


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
    progress: Progress = lambda done, all_, moved_bytes: None,
) -> Pushed:
    """Sends the versions, removals and tags of some tasks, or of all, that the remote lacks.

    What is done is on the remote: a push that was cut off goes on when it is called again.

    Raises:
        ClashError: what is on the remote contradicts what would be sent. It is raised before anything is sent, unless
            another store pushed meanwhile.
        PlaceError: the remote cannot be reached or written. What is acknowledged is there; the last entry may be, too.
    """
    read_on(mirror, place)
    head = mirror.head
    changes = _checked(_compared(opened, mirror, tasks))
    _agree(mirror, changes)
    pushed = Pushed()
    if changes.is_pushed:
        return pushed
    prepare(place, mirror)
    done, every = 0, len(changes.push)
    for group in _groups(opened, mirror, changes):
        progress(done, every, pushed.sent_bytes)
        is_known = group.is_last and mirror.head == head  # then nothing has come since the look above
        _push_group(opened, place, mirror, tasks, group, pushed, (head, changes) if is_known else None)
        done += len(group.versions)
    progress(every, every, pushed.sent_bytes)
    return pushed


def _compared(opened: OpenStore, mirror: Mirror, tasks: set[str] | None) -> Changes:
    """What differs; of tasks that were never here, nothing is to be pushed, so the remote is not asked for them."""
    here = held(opened, tasks)
    known = {task for task, _ in (*here.versions, *here.removed, *mirror.agreed_tags())} | here.highest.keys()
    return compare(here, mirror, known if tasks is None else tasks)


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
    size = manifest_bytes = unknown_bytes = 0
    for version in sorted(changes.push, key=lambda version: (version.task, version.number)):
        manifest = manifest_in(opened, version.task, version.number)
        digests = manifest_digests(manifest)
        known = mirror.known_of(digests)
        new = [digest for digest in digests if digest not in group.digests and digest not in known]
        tensors = tensors_in(opened, new, f"version {version.task}@{version.number}")
        more = sum(tensor.size_bytes for tensor in tensors.values())
        unknown_bytes += more
        if (
            0 < mirror.left_bytes("packs") <= unknown_bytes
        ):  # to know all packs costs less than to send this for nothing
            mirror.need_all("packs")
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
    opened: OpenStore,
    place: Place,
    mirror: Mirror,
    tasks: set[str] | None,
    group: _Group,
    pushed: Pushed,
    known: tuple[Head, Changes] | None,
) -> None:
    """Sends a group, and enters it in the log. `known`: what differs after an entry, if that was looked up."""
    committer = Committer(place, mirror)
    chosen = tasks if group.is_last else {version.task for version in group.versions}
    while True:
        head = mirror.head  # first: what is looked at below may be newer, never older
        is_known = known is not None and known[0] == head
        changes = known[1] if known and is_known else _checked(_compared(opened, mirror, chosen))
        index = _index(opened, place, mirror, group, changes, pushed)
        if not index:
            return
        if committer.commit(head, index):
            mirror.take((version.task, version.number) for version in index.versions)
            mirror.agree((tag.task, tag.tag, tag.version) for tag in index.tags)
            pushed.versions += [(version.task, version.number) for version in index.versions]
            pushed.removed += index.removed
            pushed.tags += [(tag.task, tag.tag, tag.version) for tag in index.tags]
            pushed.entries += 1
            return


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
        sought = [digest for digest in group.digests if digest in needed and digest not in mine]
        known = mirror.known_of(sought)
        missing = [digest for digest in sought if digest not in known]
        if missing:
            _send(opened, place, group, missing, pushed)
        index.packs = dict(group.packs)
        index.shared = _shared(mirror, needed - mine - set(missing))
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


def _shared(mirror: Mirror, digests: Iterable[Digest]) -> dict[bytes, PackListing]:
    """Where tensors lie that are on the remote already."""
    found: dict[bytes, PackListing] = {}
    for digest, places in sorted(mirror.places_of(set(digests)).items()):
        pack, at = places[0]
        found.setdefault(pack, PackListing(mirror.pack_bytes(pack), {})).places[digest] = at
    return found


def _tags_left(mirror: Mirror, index: LogIndex, task: str, number: int) -> bool:
    """Whether a version is tagged on the remote still, after what an index says."""
    return not set(mirror.tags_of(task, number)) <= {tag.tag for tag in index.tags if tag.task == task}


def _send(opened: OpenStore, place: Place, group: _Group, missing: list[Digest], pushed: Pushed) -> None:
    """Sends tensors in a new pack; each task's lie side by side."""
    by_version: dict[Numbered, list[Digest]] = {}
    for digest in missing:
        by_version.setdefault(group.digests[digest], []).append(digest)
    tensors: dict[Digest, RawTensor] = {}
    for (task, number), digests in by_version.items():
        tensors.update(tensors_in(opened, digests, f"version {task}@{number}"))
    pack, listing = put_pack(place, tensors)
    opened.release_pages()
    group.packs[pack] = listing
    pushed.sent_bytes += listing.file_bytes
