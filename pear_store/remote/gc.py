"""Removes from a remote what no version needs.

One log entry drops it all: versions, packs that nothing needs, packs that are mostly dead, and uploads that no entry
names. What is needed of mostly dead packs is in new packs, which the same entry names. A writer that counts on dropped
objects must create the next entry, so it reads this one first. Only then are the objects deleted, after a grace period
for readers with old mirrors. A reader that still misses a pack reads the log again.

A base that a newer one replaced is deleted without an entry, because nobody needs it.
"""

import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from pear_store.errors import AbsentError, DamagedRemoteError, PearStoreError
from pear_store.format.digest import Digest
from pear_store.local.log import Operation
from pear_store.local.sync import Numbered
from pear_store.pools import ThreadPool
from pear_store.remote.base import base_name, shard_name
from pear_store.remote.commit import Committer, prepare
from pear_store.remote.log import BaseName, LogIndex, pack_name
from pear_store.remote.mirror import Mirror
from pear_store.remote.partial import fetch_root
from pear_store.remote.place import Place
from pear_store.remote.pull import READERS
from pear_store.remote.reading import read_on
from pear_store.remote.rewrite import Rewriter
from pear_store.remote.whole import PackUse, WholeMirror, whole_mirror

GRACE_S = 7 * 86400.0
_WRITE_S = 86400.0
"""A file in tmp/ or probe/ may belong to a write under way. It is deleted at least so many seconds after its drop."""
_PACK = re.compile(r"packs/([0-9a-f]{2})/(\1[0-9a-f]{62})\.safetensors")
_INDEX = re.compile(r"index/[0-9a-f]{64}")
_BASE = re.compile(r"base/([0-9]{20})-([0-9a-f]{64})")
_PASSING = re.compile(r"(?:tmp|probe)/[0-9a-f]{32}")
_MOST_REMOVED = 100_000
"""The most removals in one entry. This and the next two keep an index below 16 MiB."""
_MOST_DROPPED = 50_000
_MOST_MOVED = 40_000
Progress = Callable[[str, int, int], None]
"""Called with the name of a step, how much of it is done, and all of it"""


@dataclass
class RemoteGc:
    """What a gc of a remote did, or would do."""

    removed: list[Numbered] = field(default_factory=list)
    dropped_packs: int = 0
    """Packs that nothing needs, and packs that were rewritten"""
    dropped_bytes: int = 0
    """The bytes of these packs"""
    orphans: int = 0
    """Objects that no entry names: packs, indexes, leftovers in tmp/ and probe/"""
    rewritten_packs: int = 0
    moved_bytes: int = 0
    """Bytes that were read from rewritten packs and sent again"""
    deleted: int = 0
    waiting: int = 0
    """Objects that were dropped, and will be deleted after the grace period"""
    dead_bytes: int = 0
    """Tensor bytes that no version needs, in packs that stay"""
    damaged: list[str] = field(default_factory=list)
    """Packs that could not be rewritten, because they are damaged. A verify says more."""
    entries: int = 0
    dry_run: bool = False


@dataclass
class _Listed:
    """The names of objects that a place has, by kind."""

    packs: dict[bytes, str]
    indexes: list[str]
    passing: list[str]

    def names(self) -> Iterator[str]:
        yield from self.packs.values()
        yield from self.indexes
        yield from self.passing


@dataclass
class _Plan:
    index: LogIndex
    dropped: list[PackUse]
    rewritten: list[PackUse]
    moves: list[Digest]
    dead_bytes: int
    is_cut: bool
    """Whether another entry must follow, because one does not take all"""


def collect(
    place: Place,
    mirror: Mirror,
    keep: int | None = None,
    older_than_s: float | None = None,
    grace_s: float = GRACE_S,
    dry_run: bool = False,
    progress: Progress = lambda what, done, all_: None,
) -> RemoteGc:
    """See :meth:`pear_store.Store.remote_gc`.

    Args:
        mirror: what the store knows of the remote. It makes sure that this is the same remote.
    """
    if keep is not None and keep < 1:
        raise PearStoreError(f"keep {keep}: expected 1 or more, because the newest version of a task always stays")
    if not (grace_s >= 0 and (older_than_s is None or older_than_s >= 0)):
        raise PearStoreError(f"grace {grace_s} s, age {older_than_s} s: expected 0 or more")
    with Operation(__name__, "remote gc", place.url) as operation, whole_mirror(mirror.url) as whole:
        read_on(mirror, place)
        if not dry_run:
            prepare(place, mirror)
        result = RemoteGc(dry_run=dry_run)
        listed = _list(place)  # before the log is read: an object that a later entry names is no orphan
        progress("read the log", 0, mirror.head[0])
        read_on(whole, place)
        passing = set(_passing(place))  # files of writes that ended while the log was read do not count
        listed.passing = [name for name in listed.passing if name in passing]
        before_ns = None if keep is None and older_than_s is None else time.time_ns() - int((older_than_s or 0) * 1e9)
        names = _drop(place, whole, listed, keep, before_ns, result, progress)
        _delete(place, whole, {*listed.names(), *names}, grace_s, result, progress)
        if not dry_run:
            read_on(mirror, place)
        operation.size_bytes = result.dropped_bytes
        return result


def _list(place: Place) -> _Listed:
    packs = {}
    for name in place.list("packs/"):
        if found := _PACK.fullmatch(name):
            packs[bytes.fromhex(found[2])] = name
    return _Listed(packs, [name for name in place.list("index/") if _INDEX.fullmatch(name)], list(_passing(place)))


def _passing(place: Place) -> Iterator[str]:
    for folder in ("tmp/", "probe/"):
        yield from (name for name in place.list(folder) if _PASSING.fullmatch(name))


def _drop(
    place: Place,
    whole: WholeMirror,
    listed: _Listed,
    keep: int | None,
    before_ns: int | None,
    result: RemoteGc,
    progress: Progress,
) -> list[str]:
    """Appends an entry that drops what is not needed, or several entries if it is very much. Returns the names."""
    committer = Committer(place, whole)
    names: list[str] = []
    with ThreadPool(READERS) as pool:
        rewriter = Rewriter(place, whole, pool)
        damaged: set[bytes] = set()
        while True:
            head = whole.head
            doomed = [] if before_ns is None else list(_expired(whole, keep, before_ns))
            plan = _plan(whole, listed, doomed, damaged, cut=not result.dry_run)
            result.dead_bytes = plan.dead_bytes
            if result.dry_run or not plan.index:
                _count(result, plan)
                break
            progress("rewrite packs", 0, len(plan.rewritten))
            if lost := rewriter.cover(plan.moves):
                read_on(whole, place)
                if whole.head == head:  # no other gc has moved them
                    damaged |= {use.pack for use in plan.rewritten if lost & {d for d, _ in whole.tensors_of(use.pack)}}
                    rewriter.packs.clear()
                continue
            if plan.rewritten:
                plan.index.packs = dict(rewriter.packs)
            if committer.commit(head, plan.index):
                _count(result, plan)
                result.entries += 1
                names += [*map(pack_name, plan.index.drop), *plan.index.strays]
                if plan.rewritten:
                    rewriter.packs.clear()
                if not plan.is_cut:
                    break
    result.moved_bytes = rewriter.sent_bytes
    result.damaged = sorted(pack.hex() for pack in damaged)
    return names


def _count(result: RemoteGc, plan: _Plan) -> None:
    result.removed += plan.index.removed
    result.dropped_packs += len(plan.dropped)
    result.dropped_bytes += sum(use.file_bytes for use in plan.dropped)
    result.orphans += len(plan.index.drop) - len(plan.dropped) + len(plan.index.strays)
    result.rewritten_packs += len(plan.rewritten)
    if result.dry_run:
        result.moved_bytes = sum(use.needed_bytes for use in plan.rewritten)


def _expired(whole: WholeMirror, keep: int | None, before_ns: int) -> Iterator[Numbered]:
    """Versions beyond a task's newest `keep` that are older than a time. Never a newest or a tagged one."""
    tagged = {(task, number) for (task, _), number in whole.tags().items()}
    for task in whole.tasks():
        for version in whole.versions(task)[: -max(1, keep or 1)]:
            if version.time_ns <= before_ns and (task, version.number) not in tagged:
                yield task, version.number


def _plan(whole: WholeMirror, listed: _Listed, doomed: list[Numbered], damaged: set[bytes], cut: bool) -> _Plan:
    """What the next entry should say. With `cut`, its index stays within the limits."""
    index = LogIndex(removed=doomed[:_MOST_REMOVED] if cut else doomed)
    with whole.after(index):
        uses = list(whole.uses())
        dead = [use for use in uses if not use.needed]
        victims = [use for use in _mostly_dead(uses) if use.pack not in damaged]
        moves: dict[Digest, None] = {}
        rewritten: list[PackUse] = []
        for use in victims:
            tensors = whole.tensors_of(use.pack, only_needed=True)
            if cut and rewritten and len(moves) + len(tensors) > _MOST_MOVED:
                break
            rewritten.append(use)
            moves.update(dict.fromkeys(digest for digest, _ in tensors))
    orphans = [pack for pack in sorted(listed.packs) if not whole.knows_pack(pack)]
    dropped = [*dead[: _MOST_DROPPED if cut else None], *rewritten]
    index.drop = [*(use.pack for use in dropped), *orphans[: _MOST_DROPPED if cut else None]]
    strays = [name for name in listed.indexes if not whole.copy(name) and not whole.is_stray(name)]
    strays += [name for name in listed.passing if not whole.is_stray(name)]
    index.strays = strays[: _MOST_DROPPED if cut else None]
    is_cut = len(index.removed) < len(doomed) or len(rewritten) < len(victims)
    is_cut = is_cut or max(len(dead), len(orphans), len(strays)) > _MOST_DROPPED
    gone = {use.pack for use in dropped}
    left = sum(use.tensor_bytes - use.needed_bytes for use in uses if use.pack not in gone)
    return _Plan(index, dropped, rewritten, list(moves), left, is_cut)


def _mostly_dead(uses: list[PackUse]) -> list[PackUse]:
    """Packs that are more than two thirds dead, if rewriting them frees a tenth of all. Each byte written frees two."""
    needed = [use for use in uses if use.needed]
    found = [use for use in needed if (use.tensor_bytes - use.needed_bytes) * 3 > use.tensor_bytes * 2]
    freed = sum(use.tensor_bytes - use.needed_bytes for use in found)
    return found if freed * 10 >= sum(use.tensor_bytes for use in needed) else []


def _delete(
    place: Place, whole: WholeMirror, names: Iterable[str], grace_s: float, result: RemoteGc, progress: Progress
) -> None:
    """Deletes what entries dropped, if the grace period is over.

    This includes objects that an interrupted gc left, and objects that a late write put under a dropped name.
    """
    now_ns, times_ns = time.time_ns(), whole.times_ns()
    ripe = []
    for name in sorted(names):
        entry = whole.dropped_in(name)
        if entry is None:
            continue
        wait_s = max(grace_s, _WRITE_S) if _PASSING.fullmatch(name) else grace_s
        if wait_s and now_ns - times_ns[entry] < wait_s * 1e9:
            result.waiting += 1
        else:
            ripe.append(name)
    roots, shards = _replaced_bases(place, whole, lambda entry: now_ns - times_ns[entry] >= grace_s * 1e9, result)
    result.deleted = len(ripe) + len(shards) + len(roots)
    if result.dry_run:
        return
    with ThreadPool(READERS) as pool:
        for done, _ in enumerate(pool.map(place.delete, [*ripe, *shards])):
            progress("delete", done + 1, result.deleted)
        deque(pool.map(place.delete, roots), 0)  # last: they name their shards


def _replaced_bases(
    place: Place, whole: WholeMirror, is_ripe: Callable[[int], bool], result: RemoteGc
) -> tuple[list[str], list[str]]:
    """Roots of bases that were replaced long enough ago, and their shards that no other base has."""

    newest = whole.newest_base()
    if newest is None:
        return [], []
    found = [BaseName(int(one[1]), bytes.fromhex(one[2])) for one in map(_BASE.fullmatch, place.list("base/")) if one]
    kept: set[str] = set()
    gone: dict[str, set[str]] = {}
    for base in sorted({newest, *found}):
        replaced = whole.base_replaced_in(base.number)
        try:
            shards = {shard_name(one.hash) for run in fetch_root(place, whole.url, base).runs for one in run.all_shards}
        except (AbsentError, DamagedRemoteError):
            if base == newest:  # the next push makes another
                return [], []
            shards = set()
        if replaced is not None and is_ripe(replaced):
            gone[base_name(base)] = shards
        else:
            result.waiting += replaced is not None
            kept |= shards
    return list(gone), sorted(set().union(*gone.values()) - kept)
