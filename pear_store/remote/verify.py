"""Checks a remote: its log, every pack, every tensor. Names the versions that each fault hits."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from pear_store.errors import AbsentError, DamagedError, PearStoreError
from pear_store.format.container import Place as TensorPlace
from pear_store.format.digest import Digest, begin_digest, from_digest
from pear_store.local.log import Operation
from pear_store.local.sync import Numbered
from pear_store.pools import ThreadPool
from pear_store.remote.log import pack_name
from pear_store.remote.logcheck import LogFault, check_log
from pear_store.remote.mirror import Mirror
from pear_store.remote.place import Place
from pear_store.remote.pull import READERS
from pear_store.remote.reading import read_on
from pear_store.remote.rewrite import Rewriter
from pear_store.remote.whole import WholeMirror, whole_mirror

_CHUNK_BYTES = 4 << 20
"""How many bytes of a pack are read at once. READERS packs are read at the same time."""
Progress = Callable[[str, int, int], None]
"""Called with the name of a step, how much of it is done, and all of it"""


@dataclass(frozen=True)
class Fault:
    """An object or a tensor that is damaged or missing.

    Args:
        what: the object's name, or the tensor.
        problem: what is wrong with it.
        versions: the versions that cannot be read because of it: task and number.
    """

    what: str
    problem: str
    versions: list[Numbered] = field(default_factory=list)

    @property
    def tasks(self) -> list[str]:
        """The tasks of these versions."""
        return sorted({task for task, _ in self.versions})


@dataclass
class RemoteReport:
    """What a verify of a remote found.

    Args:
        entries: log entries.
        packs: packs that were read.
        tensors: tensors in these packs.
        bytes: bytes of these packs.
        faults: what is wrong.
    """

    entries: int = 0
    packs: int = 0
    tensors: int = 0
    bytes: int = 0
    faults: list[Fault] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.faults


@dataclass
class BadPack:
    """A pack that is damaged or missing."""

    pack: bytes
    problem: str
    bad: list[Digest]
    """Its tensors that are damaged or missing"""


@dataclass
class Findings:
    log: list[LogFault] = field(default_factory=list)
    packs: list[BadPack] = field(default_factory=list)
    lost: set[Digest] = field(default_factory=set)
    """Tensors of bad packs that no other pack has a good copy of"""
    unlisted: list[Digest] = field(default_factory=list)
    """Tensors that versions need and no pack has"""


def verify(
    place: Place,
    mirror: Mirror,
    subset: tuple[int, int] = (1, 1),
    progress: Progress = lambda what, done, all_: None,
) -> RemoteReport:
    """See :meth:`pear_store.Store.remote_verify`.

    Args:
        mirror: what the store knows of the remote. The log is compared with it.
    """
    part, parts = subset
    if not 1 <= part <= parts:
        raise PearStoreError(f"subset {part}/{parts}: expected n/t with n from 1 to t")
    with Operation(__name__, "remote verify", place.url) as operation, whole_mirror(mirror.url) as whole:
        progress("read the log", 0, mirror.head[0])
        log = check_log(place, mirror, whole)
        report, findings = look(place, whole, subset, progress)
        findings.log = log
        if not log:  # else the rest of the log cannot be read
            leave_out_dropped(place, whole, findings)
        report.faults = list(faults_of(whole, findings))
        operation.size_bytes = report.bytes
        return report


def look(
    place: Place, whole: WholeMirror, subset: tuple[int, int], progress: Progress
) -> tuple[RemoteReport, Findings]:
    """Reads and checks the packs of a part."""
    findings = Findings()
    report = RemoteReport(entries=whole.head[0])
    part, parts = subset
    chosen = [
        (use.pack, use.file_bytes)
        for use in whole.uses()
        if int.from_bytes(use.pack[:8], "big") * parts >> 64 == part - 1
    ]
    with ThreadPool(READERS) as pool:
        _check_packs(place, whole, chosen, pool, report, findings, progress)
        findings.lost = find_lost(place, whole, findings.packs, pool)
    findings.unlisted = whole.unlisted()
    return report, findings


def _check_packs(
    place: Place,
    whole: WholeMirror,
    chosen: list[tuple[bytes, int]],
    pool: ThreadPool,
    report: RemoteReport,
    findings: Findings,
    progress: Progress,
) -> None:
    every = sum(size for _, size in chosen)
    waiting: deque[tuple[int, Future[BadPack | None]]] = deque()

    def finish() -> None:
        size, checking = waiting.popleft()
        found = checking.result()
        if found is not None:
            findings.packs.append(found)
        report.bytes += size
        progress("check packs", report.bytes, every)

    try:
        for pack, size in chosen:
            tensors = whole.tensors_of(pack)
            waiting.append((size, pool.submit(check_pack, place, pack, size, tensors)))
            report.packs += 1
            report.tensors += len(tensors)
            if len(waiting) == 2 * READERS:
                finish()
        while waiting:
            finish()
    finally:
        for _, checking in waiting:
            checking.cancel()


def check_pack(place: Place, pack: bytes, size: int, tensors: Iterable[tuple[Digest, TensorPlace]]) -> BadPack | None:
    """Reads a pack once, in parts, and hashes it and each of its tensors. None: all is good.

    Args:
        tensors: its tensors and their places, in the order in which they lie in the pack.
    """
    waiting = deque(tensors)
    bad: list[Digest] = []
    end = 0
    for digest, at in list(waiting):
        if at.length and at.offset < end:  # so each byte is hashed at most twice, whatever a stranger's log says
            return BadPack(pack, "its tensors overlap", [digest for digest, _ in waiting])
        end = max(end, at.offset + at.length)
    whole = hashlib.sha256()
    state = None
    try:
        for start in range(0, size, _CHUNK_BYTES):
            (data,) = place.get_ranges(pack_name(pack), [(start, min(_CHUNK_BYTES, size - start))])
            view, end = memoryview(data), start + len(data)
            whole.update(view)
            while waiting:
                digest, at = waiting[0]
                if at.offset >= end:
                    break
                state = state or begin_digest(at.dtype, at.shape)
                state.update(view[max(at.offset - start, 0) : max(at.offset + at.length - start, 0)])
                if at.offset + at.length > end:
                    break
                if state.digest() != from_digest(digest):
                    bad.append(digest)
                state = None
                waiting.popleft()
    except AbsentError:
        return BadPack(pack, "it is missing", [digest for digest, at in tensors])
    except DamagedError as error:
        return BadPack(pack, error.found, bad + [digest for digest, _ in waiting])
    for digest, at in waiting:  # empty ones at the end
        if begin_digest(at.dtype, at.shape).digest() != from_digest(digest):
            bad.append(digest)
    if bad:
        return BadPack(pack, f"{len(bad)} of its tensors do not hash to their digests", bad)
    if whole.digest() != pack:
        return BadPack(pack, "its bytes do not hash to its name; all its tensors are good", [])
    return None


def leave_out_dropped(place: Place, whole: WholeMirror, findings: Findings) -> None:
    """Leaves out packs that were dropped meanwhile, because they may be deleted."""
    if findings.packs or findings.unlisted:
        read_on(whole, place)
        findings.packs = [one for one in findings.packs if not whole.is_dropped(one.pack)]
        findings.unlisted = whole.unlisted()


def find_lost(place: Place, whole: WholeMirror, packs: list[BadPack], pool: ThreadPool) -> set[Digest]:
    """Tensors of bad packs that versions need and that have no good copy in any other pack."""
    known = {one.pack: set(one.bad) for one in packs}
    sought = {digest for one in packs for digest in one.bad if whole.is_needed(digest)}
    places = whole.places_of(sought)
    elsewhere = {d for d in sought if any(d not in known.get(pack, ()) for pack, _ in places[d])}
    return sought - elsewhere | Rewriter(place, whole, pool).lost(sorted(elsewhere))


def faults_of(whole: WholeMirror, findings: Findings) -> Iterator[Fault]:
    for fault in findings.log:
        yield Fault(fault.name, fault.problem, fault.versions)
    hit = whole.hit([*findings.lost, *findings.unlisted])
    for one in findings.packs:
        versions = sorted({version for digest in one.bad if digest in findings.lost for version in hit[digest]})
        spared = " (other packs have good copies of all that versions need)" if one.bad and not versions else ""
        yield Fault(pack_name(one.pack), f"{one.problem}{spared}", versions)
    for digest in findings.unlisted:
        yield Fault(f"tensor {digest}", "no pack has it", hit[digest])
