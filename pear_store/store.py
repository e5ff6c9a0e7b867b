"""The store: many tasks in one directory, each distinct tensor once."""

import json
import os
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from uuid import uuid4

from pear_store import gc, mounts, sources
from pear_store.checkpoint import TAG_NAME, TASK_NAME, Task, tensor_names, write_checkpoint
from pear_store.digest import Digest, RawTensor, from_digest
from pear_store.errors import (
    CheckpointError,
    DamagedError,
    DamagedIndexError,
    FormatError,
    NameTakenError,
    NotFoundError,
    PearStoreError,
    TaggedError,
    from_os_error,
)
from pear_store.index import (
    NO_PACK,
    ManifestRow,
    NameRow,
    TagRow,
    TensorRow,
    VersionRow,
    View,
    name_key,
    open_index,
    parse_tag_key,
    parse_version_key,
    release_index,
    tag_key,
    version_key,
)
from pear_store.manifest import manifest_hash, to_manifest, with_plain_names
from pear_store.opened import OpenStore, PackGoneError, is_store, name_row, version_row
from pear_store.pack import PackedTag, PackedVersion, Records, WrittenPack, sync_directory, write_pack
from pear_store.sources import Source

GROUP_TASKS = 200
"""Tasks that one `add` commits together: a commit costs a few fsyncs, whatever its size."""
GROUP_BYTES = 32 * 1024 * 1024
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
"""The largest manifest accepted, and how many bytes of them one commit takes before it is full."""
_PARTS = ("packs", "tmp", "damaged", "lock")
_LOOK_UPS = 3


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
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stats:
    """Counts and sizes: logical bytes over all versions, unique bytes (each tensor once), stored bytes on disk.

    `dedup_ratio` is logical over unique bytes, `live_share` the part of the packs' tensor bytes that versions need.
    """

    tasks: int
    versions: int
    tensors: int
    logical_bytes: int
    unique_bytes: int
    stored_bytes: int
    pack_bytes: int
    index_bytes: int
    packs: int
    dedup_ratio: float
    live_share: float


@dataclass(frozen=True)
class PositionDiff:
    """What two versions use at one position: the digests of its adapters' tensors with their scales, or None."""

    position: str
    change: str
    """equal, scale (the same tensors, other scales), changed, added or removed"""
    shared_bytes: int
    a_bytes: int
    b_bytes: int


@dataclass(frozen=True)
class Diff:
    """How two versions differ; bytes are tensor bytes, each tensor once."""

    a: Version
    b: Version
    positions: tuple[PositionDiff, ...]
    fields: tuple[str, ...]
    """The fields of the records that differ, adapters and positions aside"""
    head: str
    shared_bytes: int
    only_a_bytes: int
    only_b_bytes: int


@dataclass(frozen=True)
class _Loaded:
    """A source of `add`, read and checked."""

    task: Task
    manifest: bytes
    hash: bytes


@dataclass
class _Plan:
    """What one commit would write."""

    tensors: dict[Digest, RawTensor] = field(default_factory=dict)
    numbers: dict[Digest, int] = field(default_factory=dict)
    versions: list[tuple[PackedVersion, _Loaded]] = field(default_factory=list)
    healed: list[_Loaded] = field(default_factory=list)
    results: list[Added | Refused] = field(default_factory=list)

    @property
    def records(self) -> Records:
        return Records(versions=[version for version, _ in self.versions])

    def same_pack(self, other: "_Plan") -> bool:
        return list(self.tensors) == list(other.tensors) and self.records == other.records


def parse_reference(text: str) -> tuple[str, int | str | None]:
    """``T`` is the newest version of T, ``T@3`` the third, ``T@prod`` the one tagged so.

    Raises:
        NotFoundError: the text is none of these.
    """
    task, at, which = text.partition("@")
    if TASK_NAME.fullmatch(task):
        if not at:
            return task, None
        if which.isascii() and which.isdigit() and len(which) < 10:
            return task, int(which)
        if TAG_NAME.fullmatch(which):
            return task, which
    raise NotFoundError(f"{text!r} is no task or version: expected a task's name such as 'dtd', 'dtd@2' or 'dtd@prod'")


class Store:
    """A directory of tasks. Any number of threads and processes may read and add at once, also after a fork.

    What `add` has returned is durable. Every tensor handed out has been checked against its digest in this process.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens an existing store.

        Raises:
            NotFoundError: there is no store at `path`.
            FormatError: another Pear wrote it.
            DamagedIndexError: its index cannot be opened.
        """
        self.path = Path(path)
        self._open = OpenStore(self.path)
        _warn_of_network(self.path)

    @classmethod
    def create(cls, path: str | Path) -> "Store":
        """Makes an empty store, or opens the one that is there.

        Raises:
            FormatError: the directory holds something else.
        """
        path = Path(path)
        if is_store(path):
            return cls(path)
        fresh = path / f"index-{uuid4().hex}"
        try:
            # what a killed or a simultaneous create leaves is ours, too
            if path.exists() and not all(p.name in _PARTS or p.name[:5] == "index" for p in path.iterdir()):
                raise FormatError(f"{path}: neither a store nor an empty directory; choose another place")
            if any((path / "packs").glob("*/*.safetensors")):
                raise FormatError(f"{path}: packs without an index; 'pear-store rebuild' makes it anew from them")
            for part in (path / "packs", path / "tmp", fresh):
                part.mkdir(parents=True, exist_ok=True)
            (path / "lock").touch()
            release_index(open_index(fresh, create=True))
            sync_directory(fresh)
            os.rename(fresh, path / "index")  # whole or not at all; fails if another process was first
            sync_directory(path)
            sync_directory(path.parent)
        except NotADirectoryError:
            raise FormatError(f"{path}: not a directory; choose another place") from None
        except OSError as error:
            if not is_store(path):
                raise from_os_error(error, path) from None
        shutil.rmtree(fresh, ignore_errors=True)
        return cls(path)

    def close(self) -> None:
        """Releases the index; buffers handed out stay valid."""
        self._open.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- adding -------------------------------------------------------------------------------

    def add(self, source: Source, name: str | None = None) -> Added:
        """Adds one task, under another name if given; durable when it returns.

        Args:
            source: a task, a path, an fsspec URL, or a binary file object of a task checkpoint.

        Raises:
            PearStoreError: the source is refused, or the disk is full; nothing was changed.
        """
        (result,) = self.add_many([source], name)
        if isinstance(result, Refused):
            raise result.error
        return result

    def add_many(self, sources: Iterable[Source], name: str | None = None) -> Iterator[Added | Refused]:
        """Adds tasks in groups, one result for each source in order; a bad source costs only its own result.

        While one group is written, the next is read and hashed.

        Raises:
            DiskFullError: the group that did not fit is not there, all before it are.
        """
        compared: set[tuple[Digest, bytes, int]] = set()
        group: list[_Loaded | Refused] = []
        size = manifest_bytes = 0
        # one thread: reading is Python's work, and more of it at once only waits for the interpreter's lock
        with ThreadPoolExecutor(1) as committer:
            under_way: Future[list[Added | Refused]] | None = None
            for source in sources:
                one = _load(source, name)
                group.append(one)
                if isinstance(one, _Loaded):
                    size += one.task.size_bytes
                    manifest_bytes += len(one.manifest)
                if len(group) == GROUP_TASKS or size >= GROUP_BYTES or manifest_bytes >= MAX_MANIFEST_BYTES:
                    if under_way is not None:
                        yield from under_way.result()
                    under_way = committer.submit(self._commit, group, compared)
                    group, size, manifest_bytes = [], 0, 0
            if under_way is not None:
                yield from under_way.result()
        if group:
            yield from self._commit(group, compared)

    def _commit(
        self, group: Sequence[_Loaded | Refused], compared: set[tuple[Digest, bytes, int]]
    ) -> list[Added | Refused]:
        now = time.time_ns()
        opened = self._open
        with opened.read() as view:
            plan = self._plan(view, group, compared, now)
            planned_in = view.id
        if not (plan.tensors or plan.versions or plan.healed):
            return plan.results
        packs: list[WrittenPack] = []
        try:
            if plan.tensors or plan.versions:
                packs.append(write_pack(self.path, plan.tensors, plan.records))
        except OSError as error:
            raise from_os_error(error, self.path) from None

        def change(view: View) -> list[Added | Refused]:
            nonlocal plan
            if view.id != planned_in + 1:  # another process added or removed meanwhile
                current = self._plan(view, group, compared, now)
                if not current.same_pack(plan):
                    for pack in packs:
                        pack.path.unlink(missing_ok=True)
                    packs.clear()
                    if current.tensors or current.versions:
                        packs.append(write_pack(self.path, current.tensors, current.records))
                plan = current
            numbers = dict(plan.numbers)
            fresh = [digest for digest in plan.tensors if digest not in numbers]
            numbers.update(zip(fresh, range(first := view.take_numbers(len(fresh)), first + len(fresh)), strict=True))
            for pack in packs:
                opened.enter(view, pack, Records(), numbers)
            for loaded in plan.healed:
                _put_manifest(view, loaded, numbers)
            for version, loaded in plan.versions:
                _put_manifest(view, loaded, numbers)
                key = version_key(version.task, version.version)
                row = VersionRow(loaded.hash, packs[0].hash, version.time_ns, loaded.task.size_bytes)
                view.put("versions", key, row.encode(key))
                key = name_key(version.task)
                name = NameRow(version.task, version.version, version.version, packs[0].hash)
                view.put("names", key, name.encode(key))
            return plan.results

        return opened.write_packs(change, packs)

    def _plan(
        self,
        view: View,
        group: Sequence[_Loaded | Refused],
        compared: set[tuple[Digest, bytes, int]],
        now: int,
    ) -> _Plan:
        """What this group would add to the store as it stands; `compared` remembers stored copies found good."""
        plan = _Plan()
        names: dict[bytes, NameRow] = {}
        newest: dict[str, tuple[int, bytes]] = {}
        seen: set[bytes] = set()
        for loaded in group:
            if isinstance(loaded, Refused):
                plan.results.append(loaded)
                continue
            one = loaded.task
            key = name_key(one.name)
            known = names.get(key) or name_row(view, one.name)
            if known and known.newest and known.name != one.name:
                plan.results.append(Refused(NameTakenError(one.name, known.name)))
                continue
            new_bytes = 0
            for digest, tensor in {tensor.digest: tensor for tensor in one.tensors.values()}.items():
                if digest not in plan.tensors and not self._holds(view, digest, tensor, compared, seen, plan.numbers):
                    plan.tensors[digest] = tensor
                    new_bytes += tensor.size_bytes
            last = newest.get(one.name)
            if last is None and known and known.newest:
                row = version_row(view, one.name, known.newest)
                last = (known.newest, row.manifest if row else b"")
            changed = last is None or last[1] != loaded.hash
            number = (known.highest if known else 0) + 1 if last is None or changed else last[0]
            if changed:
                plan.versions.append((PackedVersion(one.name, number, now, loaded.manifest), loaded))
                names[key] = NameRow(one.name, number, number, NO_PACK)
                newest[one.name] = (number, loaded.hash)
            elif one.name not in newest and not _intact(view, loaded):
                plan.healed.append(loaded)
            plan.results.append(Added(one.name, number, changed, new_bytes, one.size_bytes - new_bytes))
        return plan

    def _holds(
        self,
        view: View,
        digest: Digest,
        tensor: RawTensor,
        compared: set[tuple[Digest, bytes, int]],
        seen: set[bytes],
        numbers: dict[Digest, int],
    ) -> bool:
        """Whether a stored copy equals the tensor byte for byte; a damaged or missing one does not count.

        Enters the number of a tensor that the index lists. `seen` are the packs whose files were looked at.
        """
        found = view.get("tensors", key := from_digest(digest))
        if found is None:
            return False
        try:
            row = TensorRow.decode(key, found)
        except DamagedError as error:  # without its number, gc could not tell who needs the tensor
            raise DamagedIndexError(self.path / "index", f"{error.what}: {error.found}") from None
        numbers[digest] = row.number
        try:
            if (row.dtype, row.shape, row.length) != (tensor.dtype, tensor.shape, tensor.size_bytes):
                return False
            if row.pack not in seen:
                self._open.forget_replaced(row.pack)
            mapped = self._open.map_of(view, row.pack)
            seen.add(row.pack)
        except DamagedError:
            return False
        if (digest, row.pack, row.offset) in compared:
            return True
        # two bytes objects compare by memcmp, memory views item by item
        same = bytes(mapped.view[row.offset : row.offset + row.length]) == bytes(tensor.data)
        if same:
            compared.add((digest, row.pack, row.offset))
        return same

    # ---- reading ------------------------------------------------------------------------------

    def get(self, reference: str, copy: bool = True) -> Task:
        """A task by ``name`` (its newest version), ``name@version`` or ``name@tag``.

        Args:
            copy: give tensors their own memory; else they are read-only views of memory-mapped packs, valid as long
                as they are held.

        Raises:
            NotFoundError: no such task, version or tag.
            DamagedError: stored bytes do not match their digest.
        """
        for _ in range(_LOOK_UPS):
            try:
                return self._get(reference, copy)
            except PackGoneError:  # a gc moved its tensors meanwhile: look them up again
                continue
        return self._get(reference, copy)

    def _get(self, reference: str, copy: bool) -> Task:
        with self._open.read() as view:
            name, number, row = _resolve(view, reference, self.path)
            kept = self._open.kept(view)
            manifest, tensors = kept.get(row.manifest, (b"", {}))
            if not manifest:
                manifest = _manifest(view, row, f"version {name}@{number}")
                names = sorted(tensor_names(json.loads(manifest)))
                tensors = self._open.tensors(view, names, f"version {name}@{number}")
                kept[row.manifest] = (manifest, tensors)
        record = json.loads(manifest)  # checked when it was added, and hashed when it was read
        if copy:
            tensors = {
                digest: RawTensor.checked(t.dtype, t.shape, bytearray(t.data), t.digest)
                for digest, t in tensors.items()
            }
        return Task(record, dict(tensors))

    def export(self, reference: str, path: str | Path) -> int:
        """Writes a stored version as a task checkpoint, its tensors bit-identical; returns the file's bytes."""
        return write_checkpoint(path, with_plain_names(self.get(reference, copy=False)))

    def tasks(self) -> list[Version]:
        """The newest version of every task, by name."""
        return list(self.iter_tasks())

    def iter_tasks(self) -> Iterator[Version]:
        """Like :meth:`tasks`, one by one."""
        with self._open.read() as view:
            tags = _all_tags(view)
            for key, value in view.every("names"):
                row = NameRow.decode(key, value)
                if row.newest:
                    yield _version(view, row.name, row.newest, tags)

    def versions(self, task: str | None = None) -> list[Version]:
        """Every version, of one task or of all, by name and number.

        Raises:
            NotFoundError: the named task has no version.
        """
        with self._open.read() as view:
            tags = _all_tags(view)
            rows = (
                view.every("versions")
                if task is None
                else view.rows("versions", task.encode("ascii", "replace") + b"\0")
            )
            found = [_version(view, *parse_version_key(key), tags) for key, _ in rows]
            known = name_row(view, task) if task is not None and TASK_NAME.fullmatch(task) else None
            if known is not None and known.name == task and known.newest != (found[-1].version if found else 0):
                raise DamagedError(f"version {task}@{known.newest}", "the index does not list it")
        if task is not None and not found:
            raise NotFoundError(_unknown(task, self.path))
        return found

    def resolve(self, reference: str) -> Version:
        """The version that a reference stands for now.

        Raises:
            NotFoundError: none.
        """
        with self._open.read() as view:
            name, number, _ = _resolve(view, reference, self.path)
            return _version(view, name, number, _all_tags(view))

    def stats(self) -> Stats:
        """Counts and sizes of what is stored."""
        with self._open.read() as view:
            marked = gc.mark(view)
            tasks = sum(1 for key, row in view.rows("names") if NameRow.decode(key, row).newest)
        pack_bytes = 0
        for file in (self.path / "packs").glob("*/*.safetensors"):
            with suppress(FileNotFoundError):  # a gc beside us
                pack_bytes += file.stat().st_size
        # LMDB's file is sparse where it was never written: what it occupies is its blocks
        index_bytes = (self.path / "index" / "data.mdb").stat().st_blocks * 512
        in_packs = sum(use.row.tensor_bytes for use in marked.packs.values())
        return Stats(
            tasks, marked.versions, marked.kept_tensors, marked.logical_bytes, marked.kept_bytes,
            pack_bytes + index_bytes, pack_bytes, index_bytes, len(marked.packs),
            round(marked.logical_bytes / marked.kept_bytes, 4) if marked.kept_bytes else 1.0,
            round(marked.kept_bytes / in_packs, 4) if in_packs else 1.0,
        )  # fmt: skip

    def diff(self, a: str, b: str) -> Diff:
        """Which positions use other adapters in two versions, which share theirs, and the bytes of each.

        Raises:
            NotFoundError: one of them is not there.
        """
        versions = (self.resolve(a), self.resolve(b))
        tasks = [self.get(f"{v.task}@{v.version}", copy=False) for v in versions]
        return _diff(*versions, *tasks)

    # ---- tags ---------------------------------------------------------------------------------

    def tag(self, reference: str, tag: str) -> Version:
        """Names a version ``task@tag``; a tag that stood for another version of the task is moved.

        Raises:
            NotFoundError: no such version.
            PearStoreError: the tag is no valid name.
        """
        if not TAG_NAME.fullmatch(tag):
            raise PearStoreError(f"tag {tag!r}: expected a lower-case letter, then up to 31 of a-z, 0-9 and '-'")
        return self._set_tag(reference, tag, delete=False)

    def untag(self, reference: str) -> Version:
        """Removes a tag, given as ``task@tag``; the version stays.

        Raises:
            NotFoundError: no such tag.
        """
        _, tag = parse_reference(reference)
        if not isinstance(tag, str):
            raise NotFoundError(f"{reference!r} names no tag: expected 'task@tag'")
        return self._set_tag(reference, tag, delete=True)

    def _set_tag(self, reference: str, tag: str, delete: bool) -> Version:
        packs: list[WrittenPack] = []

        def change(view: View) -> Version:
            name, number, _ = _resolve(view, reference, self.path)
            key = tag_key(name, tag)
            old = view.get("tags", key)
            before = TagRow.decode(key, old) if old else TagRow(0, 0, NO_PACK)
            if before.version != (0 if delete else number):
                now = max(time.time_ns(), before.time_ns + 1)
                records = Records(tags=[PackedTag(name, tag, None if delete else number, now)])
                packs[:] = [write_pack(self.path, {}, records)]
                self._open.enter(view, packs[0], records, {})
            return _version(view, name, number, _all_tags(view))

        return self._open.write_packs(change, packs)

    # ---- removing -----------------------------------------------------------------------------

    def remove(self, *references: str, dry_run: bool = False) -> list[Version]:
        """Removes versions (``T@n``) or all of a task (``T``); the tensors go with the next gc.

        Raises:
            NotFoundError: no such task or version; nothing was removed.
            TaggedError: a tag holds one of them; nothing was removed.
        """
        packs: list[WrittenPack] = []

        def change(view: View) -> list[Version]:
            found: dict[tuple[str, int], Version] = {}
            tags = _all_tags(view)
            for reference in references:
                name, which = parse_reference(reference)
                if isinstance(which, str):
                    raise NotFoundError(f"{reference!r} is a tag: name the version, or untag it")
                _, newest, _ = _resolve(view, reference, self.path)
                prefix = version_key(name, newest) if which is not None else name.encode("ascii") + b"\0"
                for key, _ in view.rows("versions", prefix):
                    version = _version(view, *parse_version_key(key), tags)
                    if version.tags:
                        raise TaggedError(version.task, version.version, version.tags[0])
                    found[version.task, version.version] = version
            if not dry_run:
                packs[:] = gc.remove_versions(self._open, view, list(found))
            return list(found.values())

        if dry_run:
            with self._open.read() as view:
                return change(view)
        return self._open.write_packs(change, packs)

    def gc(
        self,
        dry_run: bool = False,
        repack_all: bool = False,
        keep: int | None = None,
        older_than_s: float | None = None,
    ) -> gc.GcResult:
        """Removes what no version needs: rows at once, then dead packs, then packs that are mostly dead are rewritten.

        Runs while others read and add. `dead_bytes` are what is left in packs that are worth keeping as they are;
        `repack_all` leaves none and merges small packs.

        Args:
            keep: first remove versions beyond the newest `keep` of their task (at least 1) ...
            older_than_s: ... that were added longer ago than this, in seconds. Given one of both, only that counts.
                Neither removes a newest or a tagged version.

        Raises:
            DamagedError: something cannot be trusted, so nothing may be called dead.
        """
        return gc.collect(self._open, dry_run, repack_all, keep, older_than_s)


def _load(source: Source, name: str | None) -> _Loaded | Refused:
    try:
        task = sources.read_task(source)
        where = sources.label(source)
        if name is not None:
            if not TASK_NAME.fullmatch(name):
                raise CheckpointError(where, f"task name {name!r}: expected up to 100 letters, digits, '.', '_', '-'")
            task = Task({**task.record, "task": name}, task.tensors)
        manifest = to_manifest(task)
        if len(manifest) > MAX_MANIFEST_BYTES:
            raise CheckpointError(
                where, f"its record takes {len(manifest)} bytes: at most {MAX_MANIFEST_BYTES} are stored"
            )
        return _Loaded(task, manifest, manifest_hash(manifest))
    except PearStoreError as error:
        return Refused(error)


def _intact(view: View, loaded: _Loaded) -> bool:
    """Whether the stored manifest and what the index says of it are whole."""
    row = view.get("manifests", loaded.hash)
    try:
        if row is None:
            return False
        ManifestRow.decode(loaded.hash, row)
        return ManifestRow.manifest_of(row) == loaded.manifest
    except DamagedError:
        return False


def _put_manifest(view: View, loaded: _Loaded, numbers: dict[Digest, int]) -> None:
    row = view.get("manifests", loaded.hash)
    own = None
    if row is not None:
        with suppress(DamagedError):
            own = ManifestRow.decode(loaded.hash, row).number
    number = view.take_numbers(1) if own is None else own
    used = {numbers[tensor.digest] for tensor in loaded.task.tensors.values()}
    view.put("manifests", loaded.hash, ManifestRow.encode(loaded.hash, number, used, loaded.manifest))


def _manifest(view: View, row: VersionRow, what: str) -> bytes:
    """A version's manifest, its hash checked."""
    found = view.get("manifests", row.manifest)
    manifest = None if found is None else ManifestRow.manifest_of(found)
    if manifest is None or manifest_hash(manifest) != row.manifest:
        raise DamagedError(f"manifest of {what}", "missing" if manifest is None else "its hash differs")
    return manifest


def _resolve(view: View, reference: str, path: Path) -> tuple[str, int, VersionRow]:
    name, which = parse_reference(reference)
    known = name_row(view, name)
    if known is None or known.name != name or not known.newest:
        raise NotFoundError(_unknown(name, path))
    if isinstance(which, str):
        key = tag_key(name, which)
        found = view.get("tags", key)
        number = TagRow.decode(key, found).version if found else 0
        if not number:
            have = (
                ", ".join(tag for (task, _), tags in _all_tags(view).items() for tag in tags if task == name) or "none"
            )
            raise NotFoundError(f"no tag {which!r} of task {name!r}; its tags: {have}")
    else:
        number = known.newest if which is None else which
    row = version_row(view, name, number) if 0 < number <= known.highest else None
    if row is None:
        if number == known.newest or isinstance(which, str):
            raise DamagedError(f"version {name}@{number}", "the index does not list it")
        raise NotFoundError(f"no version {number} of task {name!r}; the newest is {known.newest}")
    return name, number, row


def _unknown(name: str, path: Path) -> str:
    return f"no task {name!r} in {path}; 'pear-store ls' shows what is there"


def _all_tags(view: View) -> dict[tuple[str, int], list[str]]:
    """(task, version) -> tags. Walks them all, so that one that a damaged page hides is missed."""
    found: dict[tuple[str, int], list[str]] = {}
    for key, value in view.every("tags"):
        row = TagRow.decode(key, value)
        if row.version:
            task, tag = parse_tag_key(key)
            found.setdefault((task, row.version), []).append(tag)
    return found


def _version(view: View, task: str, number: int, tags: dict[tuple[str, int], list[str]]) -> Version:
    row = version_row(view, task, number)
    if row is None:
        raise DamagedError(f"version {task}@{number}", "the index does not list it")
    return Version(task, number, row.time_ns, row.size_bytes, tuple(tags.get((task, number), ())))


def _diff(a: Version, b: Version, task_a: Task, task_b: Task) -> Diff:
    def uses(task: Task) -> dict[str, list[tuple[tuple[str, ...], float]]]:
        """Position -> its branches as the digests of their tensors and their scales."""
        names = {
            name: tuple(sorted(tensor_names({"adapters": {name: entry}, "head": None})))
            for name, entry in task.record["adapters"].items()
        }
        return {
            position: [(names[branch.adapter], branch.scale) for branch in branches]
            for position, branches in task.positions.items()
        }

    def size(digests: Iterable[str]) -> int:
        return sum((task_a.tensors.get(digest) or task_b.tensors[digest]).size_bytes for digest in set(digests))

    left, right = uses(task_a), uses(task_b)
    positions = []
    for position in sorted({*left, *right}):
        one, two = left.get(position), right.get(position)
        digests_a, digests_b = ({d for names, _ in side or () for d in names} for side in (one, two))
        change = "added" if one is None else "removed" if two is None else "equal" if one == two else "changed"
        if one and two and one != two and [names for names, _ in one] == [names for names, _ in two]:
            change = "scale"
        positions.append(PositionDiff(position, change, size(digests_a & digests_b), size(digests_a), size(digests_b)))
    fields = [
        key
        for key in sorted({*task_a.record, *task_b.record} - {"adapters", "positions", "head"})
        if task_a.record.get(key) != task_b.record.get(key)
    ]
    heads = (task_a.record["head"], task_b.record["head"])
    all_a, all_b = set(task_a.tensors), set(task_b.tensors)
    return Diff(
        a, b, tuple(positions), tuple(fields), "equal" if heads[0] == heads[1] else "changed",
        size(all_a & all_b), size(all_a - all_b), size(all_b - all_a),
    )  # fmt: skip


def _warn_of_network(path: Path) -> None:
    kind = mounts.network_file_system(path)
    if kind:
        warnings.warn(
            f"{path} is on a network file system ({kind}): its locks and memory maps are not reliable enough for an "
            "index; keep the store on a local disk",
            stacklevel=3,
        )
