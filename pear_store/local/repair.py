"""Repairs what a verify finds, from good copies."""

import json
import os
from collections.abc import Iterable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pear_store.counted import counted
from pear_store.errors import DamagedError, DamagedIndexError, NotFoundError
from pear_store.format.digest import Digest, RawTensor, from_digest, to_digest
from pear_store.format.manifest import as_stored, manifest_hash
from pear_store.format.record import tensor_names
from pear_store.local import sources
from pear_store.local.catalog import enter_manifest, forget_manifests, leave, records_of
from pear_store.local.directory import store_path
from pear_store.local.index import View
from pear_store.local.log import Operation
from pear_store.local.mark import is_needed, mark
from pear_store.local.opened import OpenStore, is_store
from pear_store.local.packs import PackReader, WrittenPack, open_pack, pack_path, read_records
from pear_store.local.repack import Needed, move
from pear_store.local.rows import NO_PACK, TensorRow
from pear_store.local.sources import Access, is_url
from pear_store.local.verify import Damage, Report, rows_in, verify


@dataclass
class Repaired:
    """What a repair mended, and what it found no good copy of.

    Args:
        healed: digests of tensors and manifests that are good again.
        missing: what is still damaged or missing, and the versions that need it.
        packs: how many damaged packs were rewritten.
    """

    healed: list[str] = field(default_factory=list)
    missing: list[Damage] = field(default_factory=list)
    packs: int = 0


def repair(path: str | Path, copies: Iterable[str | Path] = (), access: Access | None = None) -> Repaired:
    """Rewrites damaged packs, with what is good of them and with good copies of the rest.

    Args:
        path: the store's directory.
        copies: where good copies may be: stores, task checkpoints, directories of them, fsspec URLs.
        access: which files and URLs may be opened. None: any file, and URLs of common protocols.

    Raises:
        NotFoundError: one of the copies is missing. Nothing was changed.
        DamagedIndexError: the index is damaged. Rebuild it first.
        DiskFullError, AccessError: the store cannot be written.
    """
    path, copies = store_path(path), list(copies)
    for copy in copies:
        if not is_url(copy) and not os.path.exists(copy):
            raise NotFoundError(f"{copy}: no such store, file or directory; nothing was repaired")
    with Operation(__name__, "repair", path) as operation:
        return _repair(path, copies, access, operation)


def _repair(path: Path, copies: Iterable[str | Path], access: Access | None, operation: Operation) -> Repaired:
    report = verify(path)
    if report.index or report.unknown_packs:
        problem = (
            report.index
            or f"it never had what {counted(len(report.unknown_packs), 'pack')} recorded, so nothing was repaired"
        )
        raise DamagedIndexError(path / "index", problem)
    result = Repaired()
    if report.ok:
        return result
    wanted = {damage.digest for damage in report.damaged}
    wanted_manifests = {damage.digest for damage in report.damaged_manifests}
    found, manifests = _good_copies(copies, wanted, wanted_manifests, access)
    opened = OpenStore(path)
    try:
        result.packs, healed, operation.size_bytes = _rewrite(opened, report, found, manifests)
    finally:
        opened.close()
    result.healed = sorted(healed)
    result.missing = [d for d in [*report.damaged, *report.damaged_manifests] if d.digest not in healed]
    return result


def rewrite_packs(path: Path, packs: Iterable[bytes]) -> None:
    """Rewrites packs, so that their records say what the index says."""
    with closing(OpenStore(path)) as opened:
        _rewrite(opened, Report(damaged_packs=[pack.hex() for pack in packs]), {}, {})


def _good_copies(
    copies: Iterable[str | Path], wanted: set[str], manifests: set[str], access: Access | None
) -> tuple[dict[Digest, RawTensor], dict[str, bytes]]:
    """Good copies of wanted tensors and manifests, by digest."""
    found: dict[Digest, RawTensor] = {}
    found_manifests: dict[str, bytes] = {}
    for copy in copies:
        if not is_url(copy) and is_store(Path(copy)):
            with ExitStack() as stack:
                other = OpenStore(Path(copy))
                stack.callback(other.close)
                view = stack.enter_context(other.read())
                for digest in wanted - found.keys():
                    with suppress(DamagedError):
                        found.update(
                            (Digest(name), RawTensor(t.dtype, t.shape, bytes(t.data)))
                            for name, t in other.tensors(view, [digest], "a copy").items()
                        )
                for digest in manifests - found_manifests.keys():
                    manifest = view.manifests.text(from_digest(Digest(digest)))
                    if to_digest(manifest_hash(manifest)) == digest:
                        found_manifests[digest] = manifest
            continue
        for file in sources.expand([str(copy)], access):
            task = sources.read_task(file, access=access)
            manifest, tensors = as_stored(task)
            found.update((digest, tensor) for digest, tensor in tensors.items() if digest in wanted)
            if to_digest(manifest_hash(manifest)) in manifests:
                found_manifests[to_digest(manifest_hash(manifest))] = manifest
    return found, found_manifests


def _rewrite(
    opened: OpenStore, report: Report, copies: dict[Digest, RawTensor], manifests: dict[str, bytes]
) -> tuple[int, set[str], int]:
    """Moves everything that is good out of the damaged packs, in one commit.

    Returns:
        how many packs were rewritten, what was healed, and the bytes written.
    """
    packs: list[WrittenPack] = []
    gone: list[bytes] = []

    def change(view: View) -> tuple[int, set[str]]:
        written, left, healed = rewrite_in(opened, view, report, copies, manifests)
        packs[:], gone[:] = [written], left
        return len(gone), healed

    count, healed = opened.write_packs(change, packs)
    opened.unlink_doomed()
    return count, healed, sum(pack.file_bytes for pack in packs)


def rewrite_in(
    opened: OpenStore, view: View, report: Report, copies: dict[Digest, RawTensor], manifests: dict[str, bytes]
) -> tuple[WrittenPack, list[bytes], set[str]]:
    """Moves everything that is good out of the damaged packs into a new pack.

    Returns:
        the new pack; the packs that have no rows any more, whose files are deleted after the commit; and what was
        healed.
    """
    wanted = {damage.digest for damage in report.damaged}
    healed: set[str] = set()
    hit = {bytes.fromhex(pack) for pack in report.damaged_packs}
    for digest in wanted:
        row = view.tensors.peek(Digest(digest))
        if row is not None:
            hit.add(row.pack)
    for damage in report.damaged_manifests:
        key = from_digest(Digest(damage.digest))
        manifest = manifests.get(damage.digest) or _manifest_in_packs(opened.path, view, key)
        if manifest is not None and view.manifests.get(key) is not None:
            names = map(Digest, tensor_names(json.loads(manifest)))
            rows = {name: stored for name in names if (stored := view.tensors.stored(name)) is not None}
            enter_manifest(view, key, manifest, rows, rows)
            healed.add(damage.digest)
    contents = Needed()
    stays: set[bytes] = set()
    marks = mark(view).marks
    for digest, place in rows_in(view, hit):
        if not is_needed(marks, place):
            continue
        try:
            _check_readable(opened.path, digest, place)
            contents.tensors[digest] = opened.tensor(view, digest, place)
        except DamagedError:
            if digest in copies:
                contents.tensors[digest] = copies[digest]
                healed.add(digest)
            else:  # there is no good copy; or it was damaged since the verify
                stays.add(place.pack)
                continue
        contents.numbers[digest] = place.number
    contents.records = records_of(view, hit, stays)
    gone = list(hit - stays - {NO_PACK})
    written = move(opened, view, contents)
    forget_manifests(view, marks)
    leave(opened.path, view, gone)
    return written, gone, healed


def _check_readable(path: Path, digest: Digest, place: TensorRow) -> None:
    """Raises a DamagedError if the disk cannot read a tensor. Reading it through a map would end this process."""
    try:
        with open_pack(pack_path(path, place.pack)) as file:
            if PackReader(file).digest(place.dtype, place.shape, place.offset, place.length) == from_digest(digest):
                return
    except OSError:
        pass
    raise DamagedError(f"tensor {digest}", "it cannot be read")


def _manifest_in_packs(path: Path, view: View, key: bytes) -> bytes | None:
    for _, _, row in view.versions.rows():
        if row.manifest == key:
            with suppress(DamagedError):
                for version in read_records(pack_path(path, row.pack))[1].versions:
                    if manifest_hash(version.manifest) == key:
                        return version.manifest
    return None
