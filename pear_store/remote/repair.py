"""Repairs a remote: its log from copies of the log, and its packs from good copies of their tensors."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from pear_store.errors import DamagedRemoteError
from pear_store.format.digest import Digest, RawTensor
from pear_store.local.log import Operation
from pear_store.local.opened import OpenStore
from pear_store.local.sync import good_tensors_in
from pear_store.pools import ThreadPool
from pear_store.remote.commit import Committer, prepare
from pear_store.remote.log import LogIndex
from pear_store.remote.logcheck import LogFault, check_log
from pear_store.remote.mirror import Mirror
from pear_store.remote.place import Place
from pear_store.remote.pull import READERS
from pear_store.remote.reading import read_on
from pear_store.remote.rewrite import Rewriter
from pear_store.remote.verify import (
    BadPack,
    Fault,
    Findings,
    Progress,
    faults_of,
    find_lost,
    leave_out_dropped,
    look,
)
from pear_store.remote.whole import WholeMirror, whole_mirror

_MOST_TENSORS = 40_000
"""The most tensors that one entry brings"""


@dataclass
class RemoteRepaired:
    """What a repair of a remote mended, and what it found no good copy of."""

    restored: list[str] = field(default_factory=list)
    """Objects of the log that were restored"""
    dropped: list[str] = field(default_factory=list)
    """Damaged packs that were dropped. What versions need of them is in new packs."""
    healed: int = 0
    """Tensors that no pack had a good copy of before"""
    sent_bytes: int = 0
    missing: list[Fault] = field(default_factory=list)
    entries: int = 0


def repair(
    place: Place,
    mirror: Mirror,
    stores: Sequence[OpenStore],
    copies: Sequence[Mirror] = (),
    progress: Progress = lambda what, done, all_: None,
) -> RemoteRepaired:
    """See :meth:`pear_store.Store.remote_repair`.

    Args:
        stores: stores that may have good copies of tensors.
        copies: what other stores know of the remote's log.
    """
    with Operation(__name__, "remote repair", place.url) as operation, whole_mirror(mirror.url) as whole:
        prepare(place, mirror)
        progress("read the log", 0, mirror.head[0])
        log = check_log(place, mirror, whole, copies)
        result = RemoteRepaired()
        if log:
            result.restored = list(_restore(place, log))
        if any(fault.ends for fault in log):  # nothing can be appended to a log that cannot be read
            result.missing = [Fault(one.name, one.problem, one.versions) for one in log if not one.good]
            return result
        read_on(whole, place)
        _, findings = look(place, whole, (1, 1), progress)
        leave_out_dropped(place, whole, findings)
        _mend(place, whole, findings, stores, result)
        findings.log = [fault for fault in log if not fault.good]
        result.missing = list(faults_of(whole, findings))
        if not findings.log:
            read_on(mirror, place)
        operation.size_bytes = result.sent_bytes
        return result


def _restore(place: Place, log: Iterable[LogFault]) -> Iterator[str]:
    """Restores objects of the log, and gives their names.

    A missing object is created, because another store may have taken its name meanwhile. A damaged object is replaced,
    because nobody else can take its name.
    """
    for fault in log:
        if not fault.good:
            continue
        if fault.is_missing and not fault.name.startswith("index/"):
            if not place.create(fault.name, fault.good) and place.get(fault.name, 1 << 20) != fault.good:
                raise DamagedRemoteError(place.url, fault.name, "another entry took its number meanwhile")
        else:
            place.put(fault.name, fault.good)
        yield fault.name


def _mend(
    place: Place, whole: WholeMirror, findings: Findings, stores: Sequence[OpenStore], result: RemoteRepaired
) -> None:
    """Appends an entry that drops bad packs, and names new packs with what versions need of them.

    A bad pack stays if a tensor of it has no good copy anywhere.
    """

    def elsewhere(digests: Collection[Digest]) -> dict[Digest, RawTensor]:
        found: dict[Digest, RawTensor] = {}
        for store in stores:
            found.update(good_tensors_in(store, [digest for digest in digests if digest not in found]))
        return found

    committer = Committer(place, whole)
    with ThreadPool(READERS) as pool:
        for packs in _batches(whole, findings.packs):
            for store in stores:
                store.release_pages()
            rewriter = Rewriter(place, whole, pool, elsewhere)
            hopeless: set[Digest] = set()
            while True:
                head = whole.head
                left = [one for one in packs if not whole.is_dropped(one.pack)]
                lost = find_lost(place, whole, left, pool)
                lost |= set(whole.unlisted())
                unhealed = rewriter.lost(sorted(lost)) | hopeless
                mended = {one.pack: {d for d, _ in whole.tensors_of(one.pack, only_needed=True)} for one in left}
                mended = {pack: needed for pack, needed in mended.items() if not needed & unhealed}
                if missing := rewriter.cover(sorted((lost - unhealed).union(*mended.values()))):
                    hopeless |= missing  # their good copies were there a moment ago
                    continue
                index = LogIndex(packs=dict(rewriter.packs), drop=sorted(mended))
                if not index:
                    read_on(whole, place)
                    if whole.head == head:  # else a gc may have moved tensors that were not found
                        break
                    hopeless.clear()
                    continue
                if committer.commit(head, index):
                    result.entries += 1
                    result.healed += len(lost - unhealed)
                    result.dropped += [pack.hex() for pack in index.drop]
                    break
            result.sent_bytes += rewriter.sent_bytes
        findings.packs = [one for one in findings.packs if not whole.is_dropped(one.pack)]
        findings.lost = find_lost(place, whole, findings.packs, pool)
    findings.unlisted = whole.unlisted()


def _batches(whole: WholeMirror, packs: list[BadPack]) -> Iterator[list[BadPack]]:
    """Groups bad packs by what one entry takes. There is always a last group: it also mends tensors in no pack."""
    batch: list[BadPack] = []
    size = 0
    for one in packs:
        more = len(whole.tensors_of(one.pack, only_needed=True))
        if batch and size + more > _MOST_TENSORS:
            yield batch
            batch, size = [], 0
        batch.append(one)
        size += more
    yield batch
