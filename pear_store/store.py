"""The store: many tasks in one directory, each distinct tensor once."""

import mmap
import os
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from uuid import uuid4

from pear_store.checkpoint import TASK_NAME, Task, read_checkpoint, tensor_names, write_checkpoint
from pear_store.container import strict_json
from pear_store.digest import Digest, RawTensor, from_digest, tensor_digest, to_digest
from pear_store.errors import (
    CheckpointError,
    DamagedError,
    DiskFullError,
    FormatError,
    NameTakenError,
    NotFoundError,
    PearStoreError,
)
from pear_store.index import (
    Index,
    NameRow,
    PackRow,
    TensorRow,
    Txn,
    VersionRow,
    name_key,
    open_index,
    parse_version_key,
    release_index,
    version_key,
)
from pear_store.manifest import manifest_hash, to_manifest, with_plain_names
from pear_store.pack import PackedVersion, pack_path, place_pack, sync_directory, write_pack

GROUP_TASKS = 100
"""Tasks that one `add` commits together: a commit costs a few fsyncs, whatever its size."""
GROUP_BYTES = 64 * 1024 * 1024
REPACK_BYTES = 256 * 1024 * 1024
"""Live bytes that one step of a repack moves at most."""
REPACK_HEADER_BYTES = 16 * 1024 * 1024
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
"""The largest manifest accepted, and how many bytes of them one commit takes before it is full."""
_OPEN_PACKS = 64
_LOOK_UPS = 3


@dataclass(frozen=True)
class _MappedPack:
    """A pack's memory map, which file it is of, and the (digest, offset) that were found good in it."""

    view: memoryview
    identity: tuple[int, int]
    checked: set[tuple[Digest, int]] = field(default_factory=set)

    def bytes_at(self, row: TensorRow) -> memoryview:
        if row.offset + row.length > len(self.view):
            raise DamagedError(f"pack {row.pack.hex()}", "shorter than the index says")
        return self.view[row.offset : row.offset + row.length]


@dataclass(frozen=True)
class _Loaded:
    """A source of `add`, read and checked."""

    task: Task
    manifest: bytes


class _PackGone(DamagedError):
    """A pack's file is not there: either lost, or its tensors have moved since the index was read."""


@dataclass(frozen=True)
class Added:
    """What `add` did with one task; bytes are tensor bytes."""

    task: str
    version: int
    changed: bool
    new_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Refused:
    """Why `add` left one source alone."""

    error: PearStoreError


@dataclass(frozen=True)
class Version:
    """One version of a task; time in nanoseconds since the epoch, bytes of its distinct tensors."""

    task: str
    version: int
    time_ns: int
    size_bytes: int


@dataclass(frozen=True)
class GcResult:
    """What a gc removed and what is left, in tensors and tensor bytes."""

    removed_versions: int
    removed_tensors: int
    removed_bytes: int
    kept_tensors: int
    kept_bytes: int
    dead_bytes: int
    dry_run: bool


@dataclass(frozen=True)
class Stats:
    """Counts and sizes: logical bytes over all versions, unique bytes (each tensor once), stored bytes on disk."""

    tasks: int
    versions: int
    tensors: int
    logical_bytes: int
    unique_bytes: int
    stored_bytes: int


@dataclass
class _Plan:
    """What one commit would write."""

    tensors: dict[Digest, RawTensor] = field(default_factory=dict)
    versions: list[PackedVersion] = field(default_factory=list)
    manifests: list[bytes] = field(default_factory=list)
    sizes: dict[tuple[str, int], int] = field(default_factory=dict)
    results: list[Added | Refused] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not (self.tensors or self.versions or self.manifests)

    def same_pack(self, other: "_Plan") -> bool:
        return list(self.tensors) == list(other.tensors) and self.versions == other.versions


@dataclass
class _PackUse:
    """How much of a pack is needed."""

    row: PackRow
    live: list[bytes] = field(default_factory=list)
    live_bytes: int = 0
    versions: set[tuple[str, int]] = field(default_factory=set)

    @property
    def dead_bytes(self) -> int:
        return self.row.tensor_bytes - self.live_bytes

    @property
    def needed(self) -> bool:
        return bool(self.live or self.versions)


@dataclass
class _Marked:
    """What the roots need and what they do not."""

    packs: dict[bytes, _PackUse]
    dead_tensors: dict[bytes, int]
    dead_manifests: list[bytes]
    kept_tensors: int
    kept_bytes: int


def parse_reference(text: str) -> tuple[str, int | None]:
    """``T`` is the newest version of T, ``T@3`` the third.

    Raises:
        NotFoundError: the text is neither.
    """
    task, at, number = text.partition("@")
    if not TASK_NAME.fullmatch(task) or (at and not (number.isascii() and number.isdigit() and len(number) < 10)):
        raise NotFoundError(f"{text!r} is no task or version: expected a task's name such as 'dtd' or 'dtd@2'")
    return task, int(number) if at else None


class Store:
    """A directory of tasks. Any number of threads and processes may read and add at once.

    What `add` has returned is durable. Every tensor handed out has been checked against its digest in this process.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens an existing store.

        Raises:
            NotFoundError: there is no store at `path`.
            FormatError: a newer Pear wrote it.
        """
        self.path = Path(path)
        if not _is_store(self.path):
            raise NotFoundError(f"{self.path}: no store there; make one with 'pear-store init --store {self.path}'")
        self._lock = threading.Lock()
        self._maps: OrderedDict[bytes, _MappedPack] = OrderedDict()
        self._opened: Index | None = open_index(self.path / "index")

    @classmethod
    def create(cls, path: str | Path) -> "Store":
        """Makes an empty store, or opens the one that is there.

        Raises:
            FormatError: the directory holds something else.
        """
        path = Path(path)
        if _is_store(path):
            return cls(path)
        fresh = path / f"index-{uuid4().hex}"
        try:
            # what a killed or a simultaneous create leaves is ours, too
            if path.exists() and not all(p.name in ("packs", "tmp") or p.name[:5] == "index" for p in path.iterdir()):
                raise FormatError(f"{path}: neither a store nor an empty directory; choose another place")
            for part in (path / "packs", path / "tmp", fresh):
                part.mkdir(parents=True, exist_ok=True)
            release_index(open_index(fresh, create=True))
            sync_directory(fresh)
            os.rename(fresh, path / "index")  # whole or not at all; fails if another process was first
            sync_directory(path)
            sync_directory(path.parent)
        except NotADirectoryError:
            raise FormatError(f"{path}: not a directory; choose another place") from None
        except OSError as error:
            if not _is_store(path):
                raise _disk_error(error, path) from None
        shutil.rmtree(fresh, ignore_errors=True)
        return cls(path)

    def close(self) -> None:
        """Releases the index; buffers handed out stay valid."""
        if self._opened is not None:
            release_index(self._opened)
            self._opened = None

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _index(self) -> Index:
        if self._opened is None:
            raise PearStoreError(f"{self.path}: this store was closed")
        if self._opened.pid != os.getpid():  # after a fork; LMDB environments must not be carried over
            self._lock = threading.Lock()
            self._opened = open_index(self.path / "index")
        return self._opened

    # ---- adding -------------------------------------------------------------------------------

    def add(self, source: Task | str | Path, name: str | None = None) -> Added:
        """Adds one task, under another name if given; durable when it returns.

        Raises:
            PearStoreError: the source is refused, or the disk is full; nothing was changed.
        """
        (result,) = self.add_many([source], name)
        if isinstance(result, Refused):
            raise result.error
        return result

    def add_many(self, sources: Iterable[Task | str | Path], name: str | None = None) -> Iterator[Added | Refused]:
        """Adds tasks in groups, one result for each source in order; a bad source costs only its own result.

        Raises:
            DiskFullError: the group that did not fit is not there, all before it are.
        """
        group: list[_Loaded | Refused] = []
        size = manifest_bytes = 0
        for source in sources:
            one = _load(source, name)
            group.append(one)
            if isinstance(one, _Loaded):
                size += one.task.size_bytes
                manifest_bytes += len(one.manifest)
            if len(group) == GROUP_TASKS or size >= GROUP_BYTES or manifest_bytes >= MAX_MANIFEST_BYTES:
                yield from self._commit(group)
                group, size, manifest_bytes = [], 0, 0
        if group:
            yield from self._commit(group)

    def _commit(self, group: Sequence[_Loaded | Refused]) -> list[Added | Refused]:
        compared: set[tuple[Digest, bytes, int]] = set()
        now = time.time_ns()
        with self._index.read() as txn:
            plan = self._plan(txn, group, compared, now)
        if plan.empty:
            return plan.results
        try:
            pack = write_pack(self.path, plan.tensors, plan.versions)
        except OSError as error:
            raise _disk_error(error, self.path) from None
        index = self._index

        def change(txn: Txn) -> list[Added | Refused]:
            nonlocal plan, pack
            current = self._plan(txn, group, compared, now)
            if not current.same_pack(plan):  # another process added or removed meanwhile
                pack.path.unlink(missing_ok=True)
                pack = write_pack(self.path, current.tensors, current.versions)
            plan = current
            for manifest in plan.manifests:
                index.put(txn, "manifests", manifest_hash(manifest), manifest)
            if not plan.tensors and not plan.versions:
                return plan.results
            place_pack(self.path, pack)
            tensor_bytes = sum(tensor.size_bytes for tensor in plan.tensors.values())
            index.put(txn, "packs", pack.hash, PackRow(pack.file_bytes, tensor_bytes).encode())
            for digest, place in pack.places.items():
                row = TensorRow(pack.hash, place.offset, place.length, place.dtype, place.shape)
                index.put(txn, "tensors", from_digest(digest), row.encode())
            for version in plan.versions:
                self._put_version(txn, version, pack.hash, plan.sizes[version.task, version.version])
            return plan.results

        try:
            return index.write(change)
        except OSError as error:
            raise _disk_error(error, self.path) from None
        finally:
            pack.path.unlink(missing_ok=True)

    def _put_version(self, txn: Txn, version: PackedVersion, pack: bytes, size_bytes: int) -> None:
        index = self._index
        digest = manifest_hash(version.manifest)
        index.put(txn, "manifests", digest, version.manifest)
        key = version_key(version.task, version.version)
        index.put(txn, "versions", key, VersionRow(digest, pack, version.time_ns, size_bytes).encode(key))
        key = name_key(version.task)
        index.put(txn, "names", key, NameRow(version.task, version.version).encode(key))

    def _plan(
        self,
        txn: Txn,
        group: Sequence[_Loaded | Refused],
        compared: set[tuple[Digest, bytes, int]],
        now: int,
    ) -> _Plan:
        """What this group would add to the store as it stands; `compared` remembers stored copies found good."""
        plan = _Plan()
        names: dict[bytes, NameRow] = {}
        newest: dict[str, tuple[int, bytes]] = {}
        for loaded in group:
            if isinstance(loaded, Refused):
                plan.results.append(loaded)
                continue
            one, manifest = loaded.task, loaded.manifest
            key = name_key(one.name)
            known = names.get(key) or self._name_row(txn, key)
            last = newest.get(one.name) or self._newest(txn, one.name)
            if known and known.name != one.name and (known.name in newest or self._newest(txn, known.name)):
                plan.results.append(Refused(NameTakenError(one.name, known.name)))
                continue
            distinct = {tensor.digest: tensor for tensor in one.tensors.values()}
            lacking = {
                digest: tensor
                for digest, tensor in distinct.items()
                if digest not in plan.tensors and not self._holds(txn, digest, tensor, compared)
            }
            plan.tensors.update(lacking)
            new_bytes = sum(tensor.size_bytes for tensor in lacking.values())
            changed = last is None or last[1] != manifest_hash(manifest)
            if changed:
                number = (known.highest if known else 0) + 1
                plan.versions.append(PackedVersion(one.name, number, now, manifest))
                plan.sizes[one.name, number] = one.size_bytes
                names[key] = NameRow(one.name, number)
                newest[one.name] = (number, manifest_hash(manifest))
            else:
                assert last is not None
                number = last[0]
                stored = self._index.get(txn, "manifests", last[1])
                if stored != manifest and number not in (v.version for v in plan.versions if v.task == one.name):
                    plan.manifests.append(manifest)  # missing or damaged: this one heals it
            plan.results.append(Added(one.name, number, changed, new_bytes, one.size_bytes - new_bytes))
        return plan

    def _holds(self, txn: Txn, digest: Digest, tensor: RawTensor, compared: set[tuple[Digest, bytes, int]]) -> bool:
        """Whether a stored copy equals the tensor byte for byte; a damaged or missing one does not count."""
        try:
            row = self._tensor_row(txn, from_digest(digest))
            if row is None or (row.dtype, row.shape, row.length) != (tensor.dtype, tensor.shape, tensor.size_bytes):
                return False
            if self._index.get(txn, "packs", row.pack) is None:
                return False
            self._forget_replaced(row.pack)
            data = self._bytes_of(txn, row)
        except DamagedError:
            return False
        if (digest, row.pack, row.offset) in compared:
            return True
        same = data == memoryview(tensor.data).cast("B")
        if same:
            compared.add((digest, row.pack, row.offset))
        return same

    # ---- reading ------------------------------------------------------------------------------

    def get(self, reference: str, copy: bool = True) -> Task:
        """A task by ``name`` (its newest version) or ``name@version``.

        Args:
            copy: give tensors their own memory; else they are read-only views of memory-mapped packs, valid as long
                as they are held.

        Raises:
            NotFoundError: no such task or version.
            DamagedError: stored bytes do not match their digest.
        """
        for _ in range(_LOOK_UPS):
            try:
                return self._get(reference, copy)
            except _PackGone:  # a gc moved its tensors meanwhile: look them up again
                continue
        return self._get(reference, copy)

    def _get(self, reference: str, copy: bool) -> Task:
        with self._index.read() as txn:
            name, number, row = self._resolve(txn, reference)
            what = f"version {name}@{number}"
            manifest = self._index.get(txn, "manifests", row.manifest)
            if manifest is None or manifest_hash(manifest) != row.manifest:
                raise DamagedError(f"manifest of {what}", "missing" if manifest is None else "its hash differs")
            record = strict_json(manifest)
            tensors = {}
            for digest in sorted(tensor_names(record)):
                tensors[digest] = self._read_tensor(txn, Digest(digest), what, copy)
        return Task(record, tensors)

    def export(self, reference: str, path: str | Path) -> int:
        """Writes a stored version as a task checkpoint, its tensors bit-identical; returns the file's bytes."""
        return write_checkpoint(path, with_plain_names(self.get(reference, copy=False)))

    def tasks(self) -> list[Version]:
        """The newest version of every task, by name."""
        with self._index.read() as txn:
            found = []
            for key, row in self._index.rows(txn, "names"):
                name = NameRow.decode(key, row).name
                last = self._index.last(txn, "versions", name.encode() + b"\0")
                if last is not None:
                    found.append(_version(*last))
            return found

    def versions(self, task: str | None = None) -> list[Version]:
        """Every version, of one task or of all, by name and number.

        Raises:
            NotFoundError: the named task has no version.
        """
        with self._index.read() as txn:
            prefix = b"" if task is None else task.encode("ascii", "replace") + b"\0"
            found = [_version(key, row) for key, row in self._index.rows(txn, "versions", prefix)]
        if task is not None and not found:
            raise NotFoundError(self._unknown(task))
        return found

    def resolve(self, reference: str) -> Version:
        """The version that a reference stands for now.

        Raises:
            NotFoundError: none.
        """
        with self._index.read() as txn:
            name, number, row = self._resolve(txn, reference)
        return Version(name, number, row.time_ns, row.size_bytes)

    def stats(self) -> Stats:
        """Counts and sizes of what is stored."""
        with self._index.read() as txn:
            marked = self._mark(txn)
            sizes = [VersionRow.decode(k, v).size_bytes for k, v in self._index.rows(txn, "versions")]
            tasks = len({parse_version_key(key)[0] for key, _ in self._index.rows(txn, "versions")})
        stored = 0
        for file in (self.path / "packs").glob("*/*.safetensors"):
            with suppress(FileNotFoundError):  # a gc beside us
                stored += file.stat().st_size
        # LMDB's file is sparse where it was never written: what it occupies is its blocks
        stored += (self.path / "index" / "data.mdb").stat().st_blocks * 512
        return Stats(tasks, len(sizes), marked.kept_tensors, sum(sizes), marked.kept_bytes, stored)

    def _unknown(self, name: str) -> str:
        return f"no task {name!r} in {self.path}; 'pear-store ls' shows what is there"

    def _resolve(self, txn: Txn, reference: str) -> tuple[str, int, VersionRow]:
        name, number = parse_reference(reference)
        newest = self._index.last(txn, "versions", name.encode() + b"\0")
        if newest is None:
            raise NotFoundError(self._unknown(name))
        if number is None:
            key, row = newest
            return name, parse_version_key(key)[1], VersionRow.decode(key, row)
        key = version_key(name, number) if number < 2**32 else b""
        found = self._index.get(txn, "versions", key) if key else None
        if found is None:
            last = parse_version_key(newest[0])[1]
            raise NotFoundError(f"no version {number} of task {name!r}; the newest is {last}")
        return name, number, VersionRow.decode(key, found)

    def _newest(self, txn: Txn, name: str) -> tuple[int, bytes] | None:
        """Number and manifest hash of a task's newest version."""
        last = self._index.last(txn, "versions", name.encode("ascii") + b"\0")
        if last is None:
            return None
        return parse_version_key(last[0])[1], VersionRow.decode(*last).manifest

    def _name_row(self, txn: Txn, key: bytes) -> NameRow | None:
        row = self._index.get(txn, "names", key)
        return None if row is None else NameRow.decode(key, row)

    def _tensor_row(self, txn: Txn, digest: bytes) -> TensorRow | None:
        row = self._index.get(txn, "tensors", digest)
        return None if row is None else TensorRow.decode(row)

    def _read_tensor(self, txn: Txn, digest: Digest, what: str, copy: bool) -> RawTensor:
        row = self._tensor_row(txn, from_digest(digest))
        if row is None:
            raise DamagedError(f"tensor {digest} of {what}", "the index does not list it")
        try:
            mapped = self._map(txn, row.pack)
            data = mapped.bytes_at(row)
        except DamagedError as error:
            raise type(error)(f"tensor {digest} of {what}", error.found) from None
        if (digest, row.offset) not in mapped.checked:
            if tensor_digest(row.dtype, row.shape, data) != digest:
                raise DamagedError(f"tensor {digest} of {what}", "its bytes do not hash to its digest")
            mapped.checked.add((digest, row.offset))
        return RawTensor(row.dtype, row.shape, bytes(data) if copy else data)

    def _bytes_of(self, txn: Txn, row: TensorRow) -> memoryview:
        """A read-only view of a stored tensor's bytes, unchecked."""
        return self._map(txn, row.pack).bytes_at(row)

    def _map(self, txn: Txn, pack: bytes) -> _MappedPack:
        with self._lock:
            if pack in self._maps:
                self._maps.move_to_end(pack)
                return self._maps[pack]
        expected = self._index.get(txn, "packs", pack)
        try:
            with open(pack_path(self.path, pack), "rb") as file:
                found = os.fstat(file.fileno())
                if expected is None or found.st_size != PackRow.decode(expected).file_bytes:
                    raise DamagedError(f"pack {pack.hex()}", f"{found.st_size} bytes on disk, the index says otherwise")
                view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except FileNotFoundError:
            raise _PackGone(f"pack {pack.hex()}", f"pack {pack.hex()[:12]} is missing") from None
        except OSError as error:
            raise DamagedError(f"pack {pack.hex()}", f"it cannot be read: {error.strerror}") from None
        mapped = _MappedPack(view, (found.st_dev, found.st_ino))
        with self._lock:
            self._maps[pack] = mapped
            while len(self._maps) > _OPEN_PACKS:
                self._maps.popitem(last=False)
        return mapped

    def _forget_replaced(self, pack: bytes) -> None:
        """Drops the map of a pack whose file is gone or is another one now: the map is not what is stored."""
        mapped = self._maps.get(pack)
        if mapped is None:
            return
        try:
            found = os.stat(pack_path(self.path, pack))
            same = (found.st_dev, found.st_ino) == mapped.identity and found.st_size == len(mapped.view)
        except OSError:
            same = False
        if not same:
            with self._lock:
                self._maps.pop(pack, None)

    # ---- removing -----------------------------------------------------------------------------

    def remove(self, reference: str, dry_run: bool = False) -> list[Version]:
        """Removes one version (``T@n``) or all of a task (``T``); the tensors go with the next gc.

        Raises:
            NotFoundError: no such task or version.
        """
        name, number = parse_reference(reference)

        def change(txn: Txn) -> list[Version]:
            if number is not None:
                _, _, row = self._resolve(txn, reference)
                found = [Version(name, number, row.time_ns, row.size_bytes)]
            else:
                rows = self._index.rows(txn, "versions", name.encode() + b"\0")
                found = [_version(key, row) for key, row in rows]
            if not found:
                raise NotFoundError(self._unknown(name))
            if not dry_run:
                for version in found:
                    self._index.delete(txn, "versions", version_key(name, version.version))
            return found

        return self._index.write(change)

    def gc(self, dry_run: bool = False, repack_all: bool = False) -> GcResult:
        """Removes what no version needs: rows at once, then dead packs, then packs that are mostly dead are rewritten.

        Runs while others read and add. `dead_bytes` are what is left in packs that are worth keeping as they are;
        `repack_all` leaves none and merges small packs.
        """
        index = self._index

        def sweep(txn: Txn) -> _Marked:
            marked = self._mark(txn)
            if not dry_run:
                for digest in marked.dead_tensors:
                    index.delete(txn, "tensors", digest)
                for digest in marked.dead_manifests:
                    index.delete(txn, "manifests", digest)
                for pack, use in marked.packs.items():
                    if not use.needed:
                        index.delete(txn, "packs", pack)
            return marked

        if dry_run:
            with index.read() as txn:
                marked = sweep(txn)
        else:
            marked = index.write(sweep)
        victims = _victims(marked.packs, repack_all)
        left = sum(use.dead_bytes for pack, use in marked.packs.items() if use.needed and pack not in victims)
        if not dry_run:
            index.write(self._unlink_orphans)
            for step in _steps(victims, marked.packs):
                left += self._repack(step)
        dead = marked.dead_tensors
        return GcResult(0, len(dead), sum(dead.values()), marked.kept_tensors, marked.kept_bytes, left, dry_run)

    def _mark(self, txn: Txn) -> _Marked:
        """Which rows and packs the versions need.

        Raises:
            DamagedError: a manifest cannot be trusted, so nothing may be called dead.
        """
        index = self._index
        packs = {pack: _PackUse(PackRow.decode(row)) for pack, row in index.rows(txn, "packs")}
        needed: set[bytes] = set()
        manifests: set[bytes] = set()
        for key, row in index.rows(txn, "versions"):
            version = VersionRow.decode(key, row)
            task, number = parse_version_key(key)
            if version.pack in packs:
                packs[version.pack].versions.add((task, number))
            if version.manifest in manifests:
                continue
            manifests.add(version.manifest)
            manifest = index.get(txn, "manifests", version.manifest)
            if manifest is None or manifest_hash(manifest) != version.manifest:
                raise DamagedError(f"manifest of version {task}@{number}", "missing or changed")
            needed.update(from_digest(Digest(name)) for name in tensor_names(strict_json(manifest)))
        dead, kept_tensors, kept_bytes = {}, 0, 0
        for digest, value in index.rows(txn, "tensors"):
            tensor = TensorRow.decode(value)
            if digest not in needed:
                dead[digest] = tensor.length
                continue
            kept_tensors += 1
            kept_bytes += tensor.length
            if tensor.pack in packs:
                packs[tensor.pack].live.append(digest)
                packs[tensor.pack].live_bytes += tensor.length
        dead_manifests = [digest for digest, _ in index.rows(txn, "manifests") if digest not in manifests]
        return _Marked(packs, dead, dead_manifests, kept_tensors, kept_bytes)

    def _unlink_orphans(self, txn: Txn) -> None:
        """Unlinks files that the index does not know; under the write lock, so that no add counts on one."""
        for file in (self.path / "packs").glob("*/*.safetensors"):
            try:
                pack = bytes.fromhex(file.stem)
            except ValueError:
                continue
            if self._index.get(txn, "packs", pack) is None:
                file.unlink(missing_ok=True)
        an_hour_ago = time.time() - 3600
        for file in (self.path / "tmp").iterdir():  # what a crashed add left; a living one takes seconds
            if file.stat().st_mtime < an_hour_ago:
                file.unlink(missing_ok=True)

    def _recorded(self, txn: Txn, task: str, number: int) -> PackedVersion:
        """A version as packs record it."""
        key = version_key(task, number)
        found = self._index.get(txn, "versions", key)
        assert found is not None
        row = VersionRow.decode(key, found)
        manifest = self._index.get(txn, "manifests", row.manifest)
        assert manifest is not None  # _mark has hashed it
        return PackedVersion(task, number, row.time_ns, manifest)

    def _repack(self, victims: list[bytes]) -> int:
        """Moves what is needed of some packs into one new pack; returns the dead bytes that had to stay."""
        index = self._index

        def change(txn: Txn) -> int:
            marked = self._mark(txn)  # anew: others added and removed since
            for dead in marked.dead_tensors:  # no row may be left that points into a pack about to go
                index.delete(txn, "tensors", dead)
            tensors: dict[Digest, RawTensor] = {}
            versions: list[PackedVersion] = []
            moved, left = [], 0
            for pack in victims:
                use = marked.packs.get(pack)
                if use is None:
                    continue
                try:
                    live = {to_digest(raw): self._read_tensor(txn, to_digest(raw), "a pack", False) for raw in use.live}
                except DamagedError:  # what is damaged stays where it is, for a repair to find
                    left += use.dead_bytes
                    continue
                tensors.update(live)
                versions += [self._recorded(txn, task, number) for task, number in sorted(use.versions)]
                moved.append(pack)
            if tensors or versions:
                written = write_pack(self.path, tensors, versions)
                place_pack(self.path, written)
                size = sum(tensor.size_bytes for tensor in tensors.values())
                index.put(txn, "packs", written.hash, PackRow(written.file_bytes, size).encode())
                for digest, place in written.places.items():
                    row = TensorRow(written.hash, place.offset, place.length, place.dtype, place.shape)
                    index.put(txn, "tensors", from_digest(digest), row.encode())
                for version in versions:
                    key = version_key(version.task, version.version)
                    old = index.get(txn, "versions", key)
                    assert old is not None
                    row_now = replace(VersionRow.decode(key, old), pack=written.hash)
                    index.put(txn, "versions", key, row_now.encode(key))
            for pack in moved:
                index.delete(txn, "packs", pack)
            return left

        try:
            left = index.write(change)
            index.write(self._unlink_orphans)
        except OSError as error:
            raise _disk_error(error, self.path) from None
        return left


def _is_store(path: Path) -> bool:
    try:
        return (path / "index" / "data.mdb").exists()
    except OSError:  # a name that is too long, a folder that may not be entered
        return False


def _victims(packs: dict[bytes, _PackUse], repack_all: bool) -> list[bytes]:
    """Packs worth rewriting: mostly dead ones, or every one with dead bytes and all small ones."""
    if not repack_all:
        return [pack for pack, use in packs.items() if use.needed and use.dead_bytes * 2 > use.row.tensor_bytes]
    small = [pack for pack, use in packs.items() if use.needed and use.row.tensor_bytes * 4 < REPACK_BYTES]
    mergeable = set(small) if len(small) > 1 else set()
    return [pack for pack, use in packs.items() if use.needed and (use.dead_bytes or pack in mergeable)]


def _steps(victims: list[bytes], packs: dict[bytes, _PackUse]) -> Iterator[list[bytes]]:
    """The victims in runs of at most REPACK_BYTES of live bytes and REPACK_HEADER_BYTES of headers, or one alone."""
    step: list[bytes] = []
    size = headers = 0
    for pack in victims:
        row = packs[pack].row
        header = row.file_bytes - row.tensor_bytes
        if step and (size + packs[pack].live_bytes > REPACK_BYTES or headers + header > REPACK_HEADER_BYTES):
            yield step
            step, size, headers = [], 0, 0
        step.append(pack)
        size += packs[pack].live_bytes
        headers += header
    if step:
        yield step


def _version(key: bytes, row: bytes) -> Version:
    task, number = parse_version_key(key)
    found = VersionRow.decode(key, row)
    return Version(task, number, found.time_ns, found.size_bytes)


def _load(source: Task | str | Path, name: str | None) -> _Loaded | Refused:
    try:
        task = source if isinstance(source, Task) else read_checkpoint(source)
        where = task.name if isinstance(source, Task) else source
        if name is not None:
            if not TASK_NAME.fullmatch(name):
                raise CheckpointError(where, f"task name {name!r}: expected up to 100 letters, digits, '.', '_', '-'")
            task = Task({**task.record, "task": name}, task.tensors)
        manifest = to_manifest(task)
        if len(manifest) > MAX_MANIFEST_BYTES:
            raise CheckpointError(
                where, f"its record takes {len(manifest)} bytes: at most {MAX_MANIFEST_BYTES} are stored"
            )
        return _Loaded(task, manifest)
    except PearStoreError as error:
        return Refused(error)


def _disk_error(error: OSError, path: Path) -> PearStoreError:
    if error.errno in (28, 122):  # ENOSPC, EDQUOT
        return DiskFullError(path)
    return PearStoreError(f"{path}: {error.strerror or error}")
