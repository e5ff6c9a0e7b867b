"""Sends to a remote what it lacks of a store.

First packs are sent, then an index that says what is new. Then the entry that names the index is created under the next
free number. If that number is taken, this reads what others wrote, compares again, and goes on.

While the packs of one entry are sent, those of the next one are made. Entries are created one after the other.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from pear_store.errors import ClashError, PearStoreError
from pear_store.format.digest import Digest, RawTensor
from pear_store.local.opened import OpenStore
from pear_store.local.sync import Numbered, held, tensors_in
from pear_store.remote.changes import Changes, compare
from pear_store.remote.commit import Committer, prepare
from pear_store.remote.groups import PACK_BYTES, Group, bytes_of, groups
from pear_store.remote.log import Head, LogIndex, PackListing
from pear_store.remote.mirror import Mirror
from pear_store.remote.place import Place
from pear_store.remote.reading import read_on
from pear_store.remote.sender import PackSender, PackUnderWay

ENTRY_NAMES = 10_000
"""The most tags, removals and highest numbers in one entry: readers refuse a larger index"""
Progress = Callable[[int, int, int], None]
"""Called with the versions done, all versions, and the bytes moved for them"""


@dataclass
class Pushed:
    """What a push did.

    Args:
        versions: versions that were sent: task and number.
        removed: versions that were removed on the remote.
        tags: tags that were changed there: task, tag, and the version that it names now. None: no version.
        sent_bytes: bytes of the packs that were sent.
        entries: log entries that were written.
    """

    versions: list[Numbered] = field(default_factory=list)
    removed: list[Numbered] = field(default_factory=list)
    tags: list[tuple[str, str, int | None]] = field(default_factory=list)
    sent_bytes: int = 0
    entries: int = 0


@dataclass
class _Push:
    """What a push works with, and what it knows of others."""

    opened: OpenStore
    place: Place
    mirror: Mirror
    tasks: set[str] | None
    sender: PackSender
    head: Head
    """The last entry when it began, or the last one that it wrote"""
    has_company: bool = False
    """Whether others have written entries since it began. Those may drop its packs."""


def push(
    opened: OpenStore,
    place: Place,
    mirror: Mirror,
    tasks: set[str] | None = None,
    progress: Progress = lambda done, all_, moved_bytes: None,
) -> Pushed:
    """Sends the versions, removals and tags of some tasks, or of all tasks, that the remote lacks.

    If a push is interrupted, what it has done stays on the remote. The next push goes on from there.

    Raises:
        ClashError: what is on the remote contradicts what would be sent. It is raised before anything is sent, unless
            another store pushed meanwhile.
        PlaceError: the remote cannot be reached or written. Everything that was reported as done is there. The last
            entry may be there, too.
    """
    read_on(mirror, place)
    head = mirror.head
    changes = _checked(_compared(opened, mirror, tasks))
    _agree(mirror, changes)
    pushed = Pushed()
    if changes.is_pushed:
        return pushed
    prepare(place, mirror)
    with PackSender(place, opened.release_pages) as sender:
        under_way = _Push(opened, place, mirror, tasks, sender, mirror.head)
        done, every = 0, len(changes.push)
        coming = groups(opened, mirror, changes, sender)
        group: Group | None = next(coming)
        while group is not None:
            following, problem = _next(coming)  # so its packs are under way before this group is entered
            progress(done, every, sender.sent_bytes)
            is_known = group.is_last and mirror.head == head  # then nothing has changed since the comparison above
            _enter(under_way, group, pushed, (head, changes) if is_known else None)
            done += len(group.versions)
            if problem is not None:
                raise problem
            group = following
        pushed.sent_bytes = sender.sent_bytes
    progress(every, every, pushed.sent_bytes)
    return pushed


def _next(coming: Iterator[Group]) -> tuple[Group | None, PearStoreError | None]:
    """The next group, or the error that kept it from being made. The caller first enters the group before it."""
    try:
        return next(coming, None), None
    except PearStoreError as error:
        return None, error


def _compared(opened: OpenStore, mirror: Mirror, tasks: set[str] | None) -> Changes:
    """What differs. Tasks that were never here are left out: nothing of them can be pushed."""
    here = held(opened, tasks)
    known = {task for task, _ in (*here.versions, *here.removed, *mirror.agreed_tags())} | here.highest.keys()
    return mirror.stable(lambda: compare(here, mirror, known if tasks is None else tasks))


def _checked(changes: Changes) -> Changes:
    if changes.clashes:
        raise ClashError(changes.clashes)
    return changes


def _agree(mirror: Mirror, changes: Changes) -> None:
    mirror.take(changes.same)
    if changes.same_tags:
        mirror.agree(changes.same_tags)


def _enter(push: _Push, group: Group, pushed: Pushed, known: tuple[Head, Changes] | None) -> None:
    """Enters a group in the log. `known` is an earlier comparison, and the last entry at that time."""
    opened, mirror = push.opened, push.mirror
    committer = Committer(push.place, mirror)
    group.know_packs()
    chosen = push.tasks if group.is_last else {version.task for version in group.versions}
    while True:
        head = mirror.head  # first, so that what is compared below may be newer, but never older
        push.has_company = push.has_company or head != push.head
        is_known = known is not None and known[0] == head
        changes = known[1] if known and is_known else _checked(_compared(opened, mirror, chosen))
        index = _index(push, group, changes)
        is_cut = group.is_last and _add_names(mirror, index, changes)
        if not index:
            group.await_packs()
            return
        if entered := committer.commit(head, index, group.await_packs):
            mirror.take((version.task, version.number) for version in index.versions)
            mirror.agree((tag.task, tag.tag, tag.version) for tag in index.tags)
            pushed.versions += [(version.task, version.number) for version in index.versions]
            pushed.removed += index.removed
            pushed.tags += [(tag.task, tag.tag, tag.version) for tag in index.tags]
            pushed.entries += 1
            push.head = entered
            if not is_cut:
                return


def _index(push: _Push, group: Group, changes: Changes) -> LogIndex:
    """What the next entry should say, by what the remote holds now. Sends the tensors that the remote lacks."""
    mirror = push.mirror
    wanted = {(version.task, version.number, version.manifest) for version in group.versions}
    index = LogIndex(versions=[one for one in changes.push if (one.task, one.number, one.manifest) in wanted])
    index.versions.sort(key=lambda version: (version.task, version.number))
    index.manifests = {version.manifest: group.manifests[version.manifest] for version in index.versions}
    if index.versions:
        if push.has_company:  # else there is nothing to look up
            for pack in [pack for pack in group.packs if mirror.is_dropped(pack)]:  # a gc took it for an orphan
                del group.packs[pack]
        mine = {digest for listing in group.packs.values() for digest in listing.places}
        needed = set().union(*(group.needs[manifest] for manifest in index.manifests))
        sought = [digest for digest in group.digests if digest in needed and digest not in mine]
        known = mirror.known_of(sought)
        missing = [digest for digest in sought if digest not in known]
        if missing:
            _send(push, group, missing)
        index.packs = dict(group.packs)
        index.shared = _shared(mirror, needed - mine - set(missing))
    if not group.is_last:
        tasks = {version.task for version in index.versions}
        index.highest = {task: number for task, number in changes.push_highest.items() if task in tasks}
    return index


def _add_names(mirror: Mirror, index: LogIndex, changes: Changes) -> bool:
    """Adds as many tags, removals and highest numbers as one entry takes. Returns whether some are left."""
    there = {(version.task, version.number) for version in index.versions}
    tags = [  # without tags of versions that were added here after the push began
        tag
        for tag in changes.push_tags
        if tag.version is None or (tag.task, tag.version) in there or mirror.has_version(tag.task, tag.version)
    ]
    index.tags = tags[:ENTRY_NAMES]
    removed = [one for one in changes.push_removed if not _tags_left(mirror, index, *one)]
    index.removed = removed[: ENTRY_NAMES - len(index.tags)]
    room = ENTRY_NAMES - len(index.tags) - len(index.removed)
    index.highest = dict(islice(changes.push_highest.items(), room))
    return len(tags) + len(removed) + len(changes.push_highest) > ENTRY_NAMES


def _shared(mirror: Mirror, digests: Iterable[Digest]) -> dict[bytes, PackListing]:
    """The places of tensors that are on the remote already."""
    found: dict[bytes, PackListing] = {}
    for digest, places in sorted(mirror.places_of(set(digests)).items()):
        if not places:  # dropped meanwhile: that entry comes before ours, so all will be compared again
            continue
        pack, at = places[0]
        found.setdefault(pack, PackListing(mirror.pack_bytes(pack), {})).places[digest] = at
    return found


def _tags_left(mirror: Mirror, index: LogIndex, task: str, number: int) -> bool:
    """Whether a version still has a tag on the remote, after the changes of an index."""
    return not set(mirror.tags_of(task, number)) <= {tag.tag for tag in index.tags if tag.task == task}


def _send(push: _Push, group: Group, missing: list[Digest]) -> None:
    """Sends tensors in new packs. Tensors of one version are side by side."""

    by_version: dict[Numbered, list[Digest]] = {}
    for digest in missing:
        by_version.setdefault(group.digests[digest], []).append(digest)
    packs: list[PackUnderWay] = []
    packing: dict[Digest, RawTensor] = {}
    for (task, number), digests in by_version.items():
        tensors = tensors_in(push.opened, digests, f"version {task}@{number}")
        if packing and bytes_of(packing) + bytes_of(tensors) > PACK_BYTES:
            packs.append(push.sender.send(packing))
            packing = {}
        packing.update(tensors)
    packs.append(push.sender.send(packing))
    group.under_way += packs
    group.packs.update(pack.known() for pack in packs)
