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
from pear_store.local.worker import Worker, WorkerDiedError, can_fork, run_python

_LOOKS = 5
_OURS = 4
"""One in so many packs is checked in the process that checks the index, the others in another process."""


@dataclass(frozen=True)
class Damage:
    """A tensor or manifest that is damaged or missing.

    Args:
        digest: its digest.
        tasks: the tasks of the versions that need it.
        versions: the versions that need it, as ``task@number``.
    """

    digest: str
    tasks: list[str] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What a verify found.

    Args:
        tensors: tensors that were hashed.
        packs: packs that were checked.
        bytes: bytes of the tensors that were hashed.
        damaged: tensors that are damaged or missing, if versions need them.
        damaged_packs: packs whose header or records are damaged. Each of their tensors may be good.
        damaged_manifests: manifests that are damaged.
        unknown_packs: packs that record what the index never had.
        index: what is wrong with the index. None: nothing.
        advice: what to do, one line each.
    """

    tensors: int = 0
    packs: int = 0
    bytes: int = 0
    damaged: list[Damage] = field(default_factory=list)
    damaged_packs: list[str] = field(default_factory=list)
    damaged_manifests: list[Damage] = field(default_factory=list)
    unknown_packs: list[str] = field(default_factory=list)
    index: str | None = None
    advice: list[str] = field(default_factory=list)

    def add(self, other: "Report") -> None:
        """Adds what was found of other packs."""
        self.tensors += other.tensors
        self.packs += other.packs
        self.bytes += other.bytes
        self.damaged_packs = sorted({*self.damaged_packs, *other.damaged_packs})
        self.unknown_packs = sorted({*self.unknown_packs, *other.unknown_packs})

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.damaged or self.damaged_packs or self.damaged_manifests or self.unknown_packs or self.index)


# ---- verify -------------------------------------------------------------------------------------


def verify(path: str | Path, subset: tuple[int, int] = (1, 1)) -> Report:
    """Hashes every tensor and manifest that versions need, and checks the index against the packs. Changes nothing.

    Another process reads the index, because a damaged LMDB page can kill its reader. If the index cannot be read, all
    packs are checked by their own headers.

    Args:
        path: the store's directory.
        subset: (n, t): only the packs of the n-th of t parts, n from 1. Manifests and index are always checked.

    Raises:
        NotFoundError: there is no store.
        AccessError: this process may not read all of the store, or cannot lock it while others write.
        PearStoreError: `subset` is no valid part.
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
    """What a child process finds; or None, and how it ended."""
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
    code = (
        "from pear_store.local.worker import end_with; from pear_store.local.verify import _checked; "
        f"end_with({os.getpid()}); print(_checked({os.fspath(path)!r}, {subset!r}))"
    )
    exit_code, printed = run_python(code)
    if exit_code:
        return None, f"reading it ended with exit code {exit_code}"
    return json.loads(printed), ""


def _checked(path: str | Path, subset: tuple[int, int]) -> str:
    """The report of :func:`check` as JSON. If the index cannot be trusted, its field `index` says why."""
    try:
        report = check(Path(path), subset)
    except AccessError as error:
        return json.dumps({"refused": (error.path, error.reason)})
    except OvertakenError as error:
        return json.dumps({"refused": (str(path), str(error))})
    except DamagedError as error:
        report = Report(index=f"{error.what}: {error.found}")
    except Exception as error:  # a damaged page may cause any
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
    """Does what :func:`verify` does, in this process.

    Raises:
        DamagedError: the index cannot be trusted.
        AccessError: the index or a pack may not be read.
        OvertakenError: others wrote meanwhile, and this process may not lock the index.
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
        if ours:  # two cores: the worker checks most packs, this process checks the index and the rest
            with suppress(OSError):  # the system gives no more processes: all is done here
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
    """What :func:`check_packs` found, in types that a worker can send."""
    return asdict(report), bad, rows


def _miscounted(opened: OpenStore, packs: Sequence[bytes]) -> list[str]:
    """Packs that rows name for records which the packs do not have."""
    if not packs:
        return []
    with opened.read() as view:
        counted, recorded = count_rows(view), Recorded(opened.path)
        found = []
        for pack in packs:
            with suppress(DamagedError):  # it was moved, or is reported as damaged already
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
    """Hashes the tensors that the index lists in the packs.

    Args:
        others: packs that are checked elsewhere.

    Returns:
        a report; the tensors that are damaged or missing; and for each pack, how many rows name it for its records.
    """
    report, recorded = Report(), Recorded(path)
    bad: set[Digest] = set()
    rows: dict[bytes, int] = {}
    done = set(others)
    opened = OpenStore(path)
    try:
        while True:
            with opened.read() as view:
                packs = {pack for pack in view.packs.hashes() if _is_in(pack, subset)}
            if packs <= done:  # else a gc or an add made new packs meanwhile
                return report, bad, rows
            for pack in sorted(packs - done):
                bad |= _check_pack(opened, pack, report, rows, recorded)
            done |= packs
    finally:
        opened.close()


def check_index(view: View) -> tuple[set[Digest], set[bytes], Counter[bytes]]:
    """Checks every row's checksum, and that rows agree with each other.

    Returns:
        the tensors that no pack has; the manifests that are damaged; and for each pack, how many rows name it for its
        records.

    Raises:
        DamagedError: a row cannot be trusted. It names the first one.
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
                raise DamagedError(f"contents of pack {pack.hex()}", f"another pack lists its tensor {number}, too")
    numbers = set(listed_in)
    next_number = view.next_number()
    if max(numbers, default=-1) >= next_number:
        raise DamagedError("the index's count of numbers", "lower than a number in use")
    lost = set()
    known: dict[str, tuple[int, int]] = {}
    for digest, place in view.tensors.every():
        if len(known) < _KNOWN_NUMBERS:
            known[digest] = place.number, place.length
        if listed_in.pop(place.number, None) != (place.pack, place.length):
            raise DamagedError(f"tensor {digest}", f"its pack does not list its number {place.number}")
        if place.pack == NO_PACK:
            lost.add(digest)
    if listed_in:
        raise DamagedError("index table tensors", f"{len(listed_in)} tensors that packs hold are missing")
    bad_manifests, sizes = _check_manifests(view, numbers, next_number, known)
    for task, number, version in view.versions.every():
        # fewer bytes are no fault: some tensors may have been missing when the index was rebuilt
        if version.size_bytes > sizes.get(version.manifest, version.size_bytes):
            raise DamagedError(f"version {task}@{number}", "more bytes than its tensors have")
    return lost, bad_manifests, marked.recorded


def _check_manifests(
    view: View, numbers: set[int], next_number: int, known: dict[str, tuple[int, int]]
) -> tuple[set[bytes], dict[bytes, int]]:
    """Checks manifests against the tensors that they name.

    Args:
        numbers: the tensors' numbers. Those of the manifests are added.
        known: numbers and lengths of some tensors.

    Returns:
        the manifests that are damaged, and the tensor bytes of the others.
    """
    bad: set[bytes] = set()
    sizes: dict[bytes, int] = {}
    for key, row in view.manifests.every():
        if row.number in numbers or row.number >= next_number:
            raise DamagedError(f"index row of manifest {key.hex()}", f"its number {row.number} is in use, or too high")
        numbers.add(row.number)
        manifest = view.manifests.text(key)
        if manifest_hash(manifest) != key:
            bad.add(key)
        else:
            sizes[key] = _check_numbers(view, key, row, manifest, known)
    return bad, sizes


def _check_numbers(view: View, key: bytes, row: ManifestRow, manifest: bytes, known: dict[str, tuple[int, int]]) -> int:
    """Checks that a manifest's row has the numbers of the tensors that the manifest names.

    Args:
        known: numbers and lengths of tensors that were looked up before. More are added.

    Returns:
        the tensors' bytes.
    """
    numbers, size = set(), 0
    try:
        names = manifest_names(manifest)
    except ValueError:
        raise DamagedError(f"manifest {key.hex()}", "it is no task's record") from None
    for name in names:
        found = known.get(name)
        if found is None:
            if not is_digest(name):
                raise DamagedError(f"manifest {key.hex()}", "it names a tensor by a text that is no digest")
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
    """Checks one pack, and returns its damaged tensors.

    Args:
        report: what is found is added to it.
        rows: gets the number of rows that name the pack for its records.
    """
    for _ in range(_LOOKS):
        with opened.read() as view:
            if pack not in view.packs:  # a gc has deleted it
                return set()
            found, bad, count = _read_pack(opened, view, pack, recorded)
            state = view.state
        if not (bad or found.damaged_packs or found.unknown_packs):
            break
        with opened.read() as now:
            if now.state == state:  # else a gc may have moved the tensors
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
                continue  # another pack's copy is the one in use
            _, _, offset, length, dtype, shape = row
            report.tensors += 1
            report.bytes += length
            if (dtype, shape, offset, length) != place:
                sound = False
            if reader is None or reader.digest(dtype, shape, offset, length) != from_digest(Digest(name)):
                bad.add(Digest(name))
        if report.tensors != len(view.contents.get(pack).numbers):
            sound = False
        if not sound:  # its header cannot be trusted: check each tensor that a row lists in it
            report.damaged_packs.append(pack.hex())
            for digest, row in sorted(rows_in(view, {pack}), key=lambda one: one[1].offset):
                found = reader and reader.digest(row.dtype, row.shape, row.offset, row.length)
                if found != from_digest(digest):
                    bad.add(digest)
    return report, bad, rows


def rows_in(view: View, packs: set[bytes]) -> list[tuple[Digest, TensorRow]]:
    """The tensors that the index lists in some packs. Walks the whole table."""
    return [(digest, row) for digest, row in view.tensors.rows() if row.pack in packs]


def _hit(view: View, digests: set[Digest]) -> list[Damage]:
    """The versions that need each damaged tensor. A tensor that no version needs is left out."""
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
    """Checks packs by their own headers. The manifests that packs record say which tensors versions need."""
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
