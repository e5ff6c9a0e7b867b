"""Checks a store: every tensor, every manifest, every row of the index."""

import json
import os
from collections import Counter
from collections.abc import Sequence, Set
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pear_store.errors import AccessError, DamagedError, PearStoreError, from_os_error
from pear_store.format.container import Header
from pear_store.format.digest import Digest, from_digest, is_digest, to_digest
from pear_store.format.manifest import manifest_digests, manifest_hash, manifest_names
from pear_store.format.pack import Records
from pear_store.local.directory import PACK_NAME, require_packs, store_path
from pear_store.local.index import OvertakenError, View
from pear_store.local.log import Operation
from pear_store.local.mark import mark
from pear_store.local.opened import OpenStore
from pear_store.local.packs import PackReader, bare_header, open_pack, pack_path, read_records, read_records_alone
from pear_store.local.recorded import Recorded, count_rows
from pear_store.local.rows import NO_PACK, ManifestRow, PackRow, TensorRow
from pear_store.local.sweep import unknown_packs
from pear_store.local.worker import Worker, WorkerDiedError, can_fork

_LOOKS = 5
_OURS = 4
"""Of so many packs, one is checked beside the index, the others in a process of their own."""


@dataclass(frozen=True)
class Damage:
    """A tensor that is damaged or missing, and what needs it: versions as ``task@number``, and their tasks."""

    digest: str
    tasks: list[str] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What a verify found. Bytes are those of the tensors hashed."""

    tensors: int = 0
    packs: int = 0
    bytes: int = 0
    damaged: list[Damage] = field(default_factory=list)
    damaged_packs: list[str] = field(default_factory=list)
    """Packs that cannot be read as such, though each of their tensors may be good"""
    damaged_manifests: list[Damage] = field(default_factory=list)
    unknown_packs: list[str] = field(default_factory=list)
    """Packs that record what the index never had"""
    index: str | None = None
    """What is wrong with the index; None: nothing"""
    advice: list[str] = field(default_factory=list)

    def add(self, other: "Report") -> None:
        """Takes in what was found of other packs."""
        self.tensors += other.tensors
        self.packs += other.packs
        self.bytes += other.bytes
        self.damaged_packs = sorted({*self.damaged_packs, *other.damaged_packs})
        self.unknown_packs = sorted({*self.unknown_packs, *other.unknown_packs})

    @property
    def ok(self) -> bool:
        return not (self.damaged or self.damaged_packs or self.damaged_manifests or self.unknown_packs or self.index)


# ---- verify -------------------------------------------------------------------------------------


def verify(path: str | Path, subset: tuple[int, int] = (1, 1)) -> Report:
    """Hashes every tensor and manifest that versions need, and checks the index against the packs.

    The index is read in a process of its own, because a damaged LMDB page can kill its reader. If it cannot be read,
    all packs are checked by their own headers.

    Args:
        subset: (n, t): only the packs of the n-th of t parts, n from 1; manifests and index are always checked.

    Raises:
        NotFoundError: there is no store.
        AccessError: this process may not read all of it, or not while others write it.
    """
    path = store_path(path)
    part, parts = subset
    if not 1 <= part <= parts:
        raise PearStoreError(f"subset {part}/{parts}: expected n/t with n from 1 to t")
    require_packs(path)
    with Operation(__name__, "verify", path) as operation:
        found, problem = _in_child(path, subset)
        if found is not None and (refused := found.pop("refused", None)):
            raise AccessError(*refused)
        report = Report(index=problem) if found is None else _from_json(found)
        if report.index:
            report = _check_packs_alone(path, subset, report.index)
        report.advice = _advice(report)
        operation.size_bytes = report.bytes
        return report


def _in_child(path: Path, subset: tuple[int, int]) -> tuple[dict[str, Any] | None, str]:
    """What a child process finds, or how it ended."""
    if can_fork():  # starts at once
        try:
            worker = Worker(lambda _: _checked(path, subset))
        except OSError as error:
            raise from_os_error(error, path) from None
        try:
            worker.ask(None)
            return json.loads(worker.answer()), ""
        except WorkerDiedError as error:
            return None, f"reading it {error}"
        finally:
            worker.close()
    import subprocess  # here, for it takes longer to import than most commands
    import sys

    run = (
        "from pear_store.local.worker import end_with; from pear_store.local.verify import _checked; "
        f"end_with({os.getpid()}); print(_checked({os.fspath(path)!r}, {subset!r}))"
    )
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True)
    if done.returncode:
        return None, f"reading it ended with exit code {done.returncode}"
    return json.loads(done.stdout), ""


def _checked(path: str | Path, subset: tuple[int, int]) -> str:
    """The report of :func:`check`, as JSON; it says so if the index cannot be trusted."""
    try:
        report = check(Path(path), subset)
    except AccessError as error:
        return json.dumps({"refused": (error.path, error.reason)})
    except OvertakenError as error:
        return json.dumps({"refused": (str(path), str(error))})
    except DamagedError as error:
        report = Report(index=f"{error.what}: {error.found}")
    except Exception as error:  # a damaged page may give any
        report = Report(index=f"{type(error).__name__}: {error}")
    return json.dumps(asdict(report))


def _from_json(found: dict[str, Any]) -> Report:
    report = Report(**found)
    report.damaged = [Damage(**one) for one in found["damaged"]]
    report.damaged_manifests = [Damage(**one) for one in found["damaged_manifests"]]
    return report


def _advice(report: Report) -> list[str]:
    advice = []
    if report.index or report.unknown_packs:
        advice.append("run 'pear-store rebuild': it makes the index anew from the packs")
    if report.damaged or report.damaged_manifests:
        advice.append(
            "run 'pear-store verify --repair FROM' with another store or checkpoints that hold good copies, or add a "
            "good checkpoint of a task that is hit"
        )
    if report.damaged_packs and not report.index:
        advice.append("run 'pear-store verify --repair': it writes what is good of the damaged packs anew")
    return advice


def check(path: Path, subset: tuple[int, int] = (1, 1)) -> Report:
    """:func:`verify` in this process.

    Raises:
        DamagedError: the index cannot be trusted.
        AccessError: it, or a pack, may not be read.
        OvertakenError: writers were faster, and this process may not lock.
    """
    for _ in range(_LOOKS - 1):
        with suppress(OvertakenError):
            return _check(path, subset)
    return _check(path, subset)


def _check(path: Path, subset: tuple[int, int]) -> Report:
    opened = OpenStore(path)
    worker = None
    try:
        with opened.read() as view:
            ours = set(view.packs.hashes()) if can_fork() else set()
        ours = set(sorted(ours)[::_OURS])
        if ours:  # on a core each: there most packs, here the index and the rest
            with suppress(OSError):  # no process more: all is done here
                worker = Worker(lambda _: _plain(*check_packs(path, subset, ours)))
                worker.ask(None)
        with opened.read() as view:
            lost, bad_manifests, counted = check_index(view)
            report, bad, recorded = Report(), set(), Recorded(path)
            rows: dict[bytes, int] = {}
            for pack in sorted(ours):
                if _is_in(pack, subset):
                    bad |= _check_pack(opened, pack, report, rows, recorded)
            if worker is not None:
                with suppress(WorkerDiedError):
                    theirs, found, their_rows = worker.answer()
                    report.add(Report(**theirs))
                    bad |= found
                    rows |= their_rows
            rest, found, more_rows = check_packs(path, subset, rows.keys() | ours)
            report.add(rest)
            bad |= found
            rows |= more_rows
            bad |= lost if subset[0] == 1 else set()
            suspects = [pack for pack, count in rows.items() if count != counted[pack]]
        report.damaged_packs = sorted({*report.damaged_packs, *_miscounted(opened, suspects)})
        with opened.read() as view:  # what was added meanwhile may be hit, too
            report.damaged = _hit(view, bad)
            report.damaged_manifests = _hit_manifests(view, bad_manifests)
        report.unknown_packs = sorted({*report.unknown_packs, *(pack.hex() for pack in unknown_packs(opened))})
    finally:
        opened.close()
        if worker is not None:
            worker.close()
    return report


def _plain(
    report: Report, bad: set[Digest], rows: dict[bytes, int]
) -> tuple[dict[str, Any], set[Digest], dict[bytes, int]]:
    """What :func:`check_packs` found, in the types that a worker's answer is of."""
    return asdict(report), bad, rows


def _miscounted(opened: OpenStore, packs: Sequence[bytes]) -> list[str]:
    """Of packs, those that more rows name as recording what they say than it is."""
    if not packs:
        return []
    with opened.read() as view:
        counted, recorded = count_rows(view), Recorded(opened.path)
        found = []
        for pack in packs:
            with suppress(DamagedError):  # moved, or said to be damaged
                records = read_records_alone(pack_path(opened.path, pack))
                if recorded.compare(view, pack, records)[1] != counted[pack]:
                    found.append(pack.hex())
        return found


def _is_in(pack: bytes, subset: tuple[int, int]) -> bool:
    """Whether a pack belongs to the n-th of t parts."""
    return int.from_bytes(pack[:8], "big") % subset[1] == subset[0] - 1


def check_packs(
    path: Path, subset: tuple[int, int], others: Set[bytes] = frozenset()
) -> tuple[Report, set[Digest], dict[bytes, int]]:
    """Hashes what the index lists in the packs, other than some that are checked elsewhere; returns a report, the
    tensors that are damaged or missing, and of each pack how many rows name it for what it records."""
    report, recorded = Report(), Recorded(path)
    bad: set[Digest] = set()
    rows: dict[bytes, int] = {}
    done = set(others)
    opened = OpenStore(path)
    try:
        while True:
            with opened.read() as view:
                packs = {pack for pack in view.packs.hashes() if _is_in(pack, subset)}
            if packs <= done:  # else a gc moved something meanwhile, or an add brought more
                return report, bad, rows
            for pack in sorted(packs - done):
                bad |= _check_pack(opened, pack, report, rows, recorded)
            done |= packs
    finally:
        opened.close()


def check_index(view: View) -> tuple[set[Digest], set[bytes], Counter[bytes]]:
    """Checks every row's checksum, and what rows say of one another; returns the tensors that no pack has, the
    manifests that are damaged, and how many rows name each pack as recording them.

    Raises:
        DamagedError: naming the first row that cannot be trusted.
    """
    view.meta(b"id")
    marked = mark(view)
    listed_in: dict[int, tuple[bytes, int]] = {}
    for pack, row in view.contents.every():
        pack_row = view.packs.get(pack)
        if pack_row is not None and sum(row.lengths) > pack_row.tensor_bytes:
            raise DamagedError(f"contents of pack {pack.hex()}", "more bytes than the pack has")
        for number, length in zip(row.numbers, row.lengths, strict=True):
            if listed_in.setdefault(number, (pack, length)) != (pack, length):
                raise DamagedError(f"contents of pack {pack.hex()}", f"its tensor {number} is another's, too")
    numbers = set(listed_in)
    next_number = view.next_number()
    if max(numbers, default=-1) >= next_number:
        raise DamagedError("the index's count of numbers", "too small")
    lost = set()
    known: dict[str, tuple[int, int]] = {}
    for digest, place in view.tensors.every():
        if len(known) < _KNOWN_NUMBERS:
            known[digest] = place.number, place.length
        if listed_in.pop(place.number, None) != (place.pack, place.length):
            raise DamagedError(f"tensor {digest}", f"its number {place.number} is not one of its pack's")
        if place.pack == NO_PACK:
            lost.add(digest)
    if listed_in:
        raise DamagedError("index table tensors", f"{len(listed_in)} tensors of packs are not listed")
    bad_manifests, sizes = _check_manifests(view, numbers, next_number, known)
    for task, number, version in view.versions.every():
        if version.size_bytes > sizes.get(version.manifest, version.size_bytes):  # fewer: some were lost once
            raise DamagedError(f"version {task}@{number}", "more bytes than its tensors have")
    return lost, bad_manifests, marked.recorded


def _check_manifests(
    view: View, numbers: set[int], next_number: int, known: dict[str, tuple[int, int]]
) -> tuple[set[bytes], dict[bytes, int]]:
    """Checks manifests against the tensors that they name; returns those that are damaged, and the others' tensor
    bytes. `numbers` are those in use, and come to be all; `known` are some tensors' numbers and lengths."""
    bad: set[bytes] = set()
    sizes: dict[bytes, int] = {}
    for key, row in view.manifests.every():
        if row.number in numbers or row.number >= next_number:
            raise DamagedError(f"index row of manifest {key.hex()}", f"its number {row.number} is not its own")
        numbers.add(row.number)
        manifest = view.manifests.text(key)
        if manifest_hash(manifest) != key:
            bad.add(key)
        else:
            sizes[key] = _check_numbers(view, key, row, manifest, known)
    return bad, sizes


def _check_numbers(view: View, key: bytes, row: ManifestRow, manifest: bytes, known: dict[str, tuple[int, int]]) -> int:
    """Checks that a manifest's numbers are those of the tensors that it names; returns the tensors' bytes. `known` are
    numbers and lengths looked up before."""
    numbers, size = set(), 0
    try:
        names = manifest_names(manifest)
    except ValueError:
        raise DamagedError(f"manifest {key.hex()}", "it is no task's record") from None
    for name in names:
        found = known.get(name)
        if found is None:
            if not is_digest(name):
                raise DamagedError(f"manifest {key.hex()}", "it names what is no digest")
            found = view.tensors.number_and_length(Digest(name))
            if found is None:
                raise DamagedError(f"tensor {name}", "a manifest names it, the index does not list it")
            if len(known) >= _KNOWN_NUMBERS:
                known.clear()
            known[name] = found
        numbers.add(found[0])
        size += found[1]
    if numbers != set(row.tensors):
        raise DamagedError(f"index row of manifest {key.hex()}", "its numbers are not those of its tensors")
    return size


_KNOWN_NUMBERS = 50_000


def _check_pack(
    opened: OpenStore, pack: bytes, report: Report, rows: dict[bytes, int], recorded: Recorded
) -> set[Digest]:
    """Enters what is found into the report, and into `rows` how many name the pack for what it records; returns the
    tensors that are damaged."""
    for _ in range(_LOOKS):
        with opened.read() as view:
            if pack not in view.packs:  # a gc was faster
                return set()
            found, bad, count = _read_pack(opened, view, pack, recorded)
            state = view.state
        if not (bad or found.damaged_packs or found.unknown_packs):
            break
        with opened.read() as now:
            if now.state == state:  # else a gc may have moved what was to be read
                break
    report.add(found)
    rows[pack] = count
    return bad


def _read_pack(opened: OpenStore, view: View, pack: bytes, recorded: Recorded) -> tuple[Report, set[Digest], int]:
    report = Report(packs=1)
    bad: set[Digest] = set()
    rows = 0
    try:
        header, records, problems = read_records(pack_path(opened.path, pack))
        sizes = PackRow(header.file_bytes, sum(place.length for place in header.places.values()))
        sound = not problems and view.packs.is_row(pack, sizes)
        is_known, rows = recorded.compare(view, pack, records)
        if not is_known:
            report.unknown_packs.append(pack.hex())
    except DamagedError:
        header, sound = Header({}, {}, 0), False
    with ExitStack() as stack:
        reader = None
        with suppress(OSError, DamagedError):
            reader = PackReader(stack.enter_context(open_pack(pack_path(opened.path, pack))))
        for name, place in header.places.items():
            row = view.tensors.peek(Digest(name)) if is_digest(name) else None
            if row is None or row.pack != pack:
                continue  # a copy elsewhere counts
            _, _, offset, length, dtype, shape = row
            report.tensors += 1
            report.bytes += length
            if (dtype, shape, offset, length) != place:
                sound = False
            if reader is None or reader.digest(dtype, shape, offset, length) != from_digest(Digest(name)):
                bad.add(Digest(name))
        if report.tensors != len(view.contents.get(pack).numbers):
            sound = False
        if not sound:  # its header does not tell what is in it: look at each row
            report.damaged_packs.append(pack.hex())
            for digest, row in sorted(rows_in(view, {pack}), key=lambda one: one[1].offset):
                found = reader and reader.digest(row.dtype, row.shape, row.offset, row.length)
                if found != from_digest(digest):
                    bad.add(digest)
    return report, bad, rows


def rows_in(view: View, packs: set[bytes]) -> list[tuple[Digest, TensorRow]]:
    """The tensors that the index lists in some packs; walks the table."""
    return [(digest, row) for digest, row in view.tensors.rows() if row.pack in packs]


def _hit(view: View, digests: set[Digest]) -> list[Damage]:
    """Which versions need damaged tensors; a tensor that none needs is left out."""
    if not digests:
        return []
    rows = ((digest, view.tensors.peek(digest)) for digest in digests)
    numbers = {row.number: digest for digest, row in rows if row is not None}
    hit: dict[Digest, list[str]] = {}
    known: dict[bytes, list[int]] = {}
    for task, version, row in view.versions.rows():
        if row.manifest not in known:
            manifest = view.manifests.get(row.manifest)
            if manifest is None:
                raise DamagedError(f"manifest of version {task}@{version}", "missing")
            known[row.manifest] = [number for number in manifest.tensors if number in numbers]
        for number in known[row.manifest]:
            hit.setdefault(numbers[number], []).append(f"{task}@{version}")
    return [_damage(digest, versions) for digest, versions in sorted(hit.items())]


def _hit_manifests(view: View, manifests: set[bytes]) -> list[Damage]:
    hit: dict[bytes, list[str]] = {}
    for task, version, row in view.versions.rows() if manifests else ():
        if row.manifest in manifests:
            hit.setdefault(row.manifest, []).append(f"{task}@{version}")
    return [_damage(to_digest(manifest), versions) for manifest, versions in sorted(hit.items())]


def _damage(digest: str, versions: Sequence[str]) -> Damage:
    return Damage(digest, sorted({version.partition("@")[0] for version in versions}), list(versions))


def _check_packs_alone(path: Path, subset: tuple[int, int], problem: str) -> Report:
    """Checks packs by their own headers; which tensors versions need is told by the manifests that packs record."""
    report = Report(index=problem)
    good: set[str] = set()
    bad: set[str] = set()
    needs: dict[str, list[str]] = {}
    for file in sorted((path / "packs").glob("*/*.safetensors")):
        header = None
        try:
            header, records, problems = read_records(file)
        except DamagedError:
            records, problems = Records(), ["record"]
            header = bare_header(file)
        for manifest, named in _by_manifest(records).items():
            try:
                for digest in manifest_digests(manifest):
                    needs.setdefault(digest, []).extend(named)
            except ValueError:
                problems.append("manifest")
        if problems:
            report.damaged_packs.append(file.stem)
        if header is None or not (PACK_NAME.fullmatch(file.name) and _is_in(bytes.fromhex(file.stem), subset)):
            continue
        report.packs += 1
        with ExitStack() as stack:
            reader = PackReader(stack.enter_context(open_pack(file)))
            for name, place in header.places.items():
                if is_digest(name):
                    report.tensors += 1
                    report.bytes += place.length
                    found = reader.digest(place.dtype, place.shape, place.offset, place.length)
                    (good if found == from_digest(Digest(name)) else bad).add(name)
    report.damaged = [_damage(name, needs[name]) for name in sorted((bad - good) & set(needs))]
    return report


def _by_manifest(records: Records) -> dict[bytes, list[str]]:
    found: dict[bytes, list[str]] = {}
    for version in records.versions:
        found.setdefault(version.manifest, []).append(f"{version.task}@{version.version}")
    return found
