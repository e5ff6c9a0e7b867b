"""The store: many tasks in one directory, each distinct tensor once."""

import json
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from pear_store import gc, mounts
from pear_store.checkpoint import TAG_NAME, TASK_NAME, Task, tensor_names, write_checkpoint
from pear_store.commit import NO_COMMIT, Commit
from pear_store.digest import Digest, RawTensor, fresh_name, from_digest
from pear_store.directory import open_folder, store_path, sync_directory
from pear_store.errors import (
    DamagedError,
    DamagedIndexError,
    FormatError,
    NameTakenError,
    NotFoundError,
    OutOfNumbersError,
    PearStoreError,
    TaggedError,
    from_os_error,
)
from pear_store.index import (
    NO_PACK,
    ManifestRow,
    NameRow,
    State,
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
from pear_store.loading import Group, Loaded, Refused, load_groups
from pear_store.manifest import manifest_hash, with_plain_names
from pear_store.opened import OpenStore, PackGoneError, is_store, name_row, version_row
from pear_store.pack import PackedTag, PackedVersion, Records, WrittenPack, write_pack
from pear_store.reading import Access
from pear_store.sources import Source

_PARTS = ("packs", "tmp", "damaged", "lock")
_LOOK_UPS = 3
_KEPT_ROWS = 50_000


@dataclass(frozen=True)
class Added:
    """What `add` did with one task; bytes are tensor bytes."""

    task: str
    version: int
    changed: bool
    new_bytes: int
    shared_bytes: int


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


@dataclass
class _Plan:
    """What one commit would write: tensors that no good copy is stored of, of these the numbers of those that have a
    damaged one, and versions. `stored` are the rows of the good ones that the group needs."""

    tensors: dict[Digest, RawTensor] = field(default_factory=dict)
    damaged: dict[Digest, int] = field(default_factory=dict)
    stored: dict[Digest, bytes] = field(default_factory=dict)
    versions: list[tuple[PackedVersion, Loaded]] = field(default_factory=list)
    healed: list[Loaded] = field(default_factory=list)
    results: list[Added | Refused] = field(default_factory=list)
    commit: Commit = NO_COMMIT

    @property
    def records(self) -> Records:
        return Records(versions=[version for version, _ in self.versions])

    def same_pack(self, other: "_Plan") -> bool:
        return list(self.tensors) == list(other.tensors) and self.records == other.records


@dataclass
class _FoundGood:
    """Encoded rows of tensors that one `add` wrote, or compared with its own, as of a commit and an environment: as
    long as nobody else commits, they need no second look."""

    rows: dict[Digest, bytes] = field(default_factory=dict)
    as_of: State | None = None


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
        self.path = store_path(path)
        self._open = OpenStore(self.path)
        _warn_of_network(self.path)

    @classmethod
    def create(cls, path: str | Path) -> "Store":
        """Makes an empty store, or opens the one that is there.

        Raises:
            FormatError: the directory holds something else.
        """
        path = store_path(path)
        if is_store(path):
            return cls(path)
        fresh = path / f"index-{fresh_name()}"
        new = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            # what a killed or a simultaneous create leaves is ours, too
            if path.exists() and not all(p.name in _PARTS or p.name[:5] == "index" for p in path.iterdir()):
                raise FormatError(f"{path}: neither a store nor an empty directory; choose another place")
            if any((path / "packs").glob("*/*.safetensors")):
                raise FormatError(f"{path}: packs without an index; 'pear-store rebuild' makes it anew from them")
            path.mkdir(parents=True, exist_ok=True)
            with open_folder(path) as root:
                for part in ("packs", "tmp", fresh.name):
                    with root.folder(part, create=True):
                        pass
                os.close(root.open("lock", os.O_RDWR | os.O_CREAT))
                release_index(open_index(fresh, create=True))
                sync_directory(fresh)
                root.rename(fresh.name, "index")  # whole or not at all; fails if another process was first
            for folder in {path, path.parent, *(folder.parent for folder in new)}:
                sync_directory(folder)
        except NotADirectoryError:
            raise FormatError(f"{path}: not a directory; choose another place") from None
        except OSError as error:
            if not is_store(path):
                raise from_os_error(error, path) from None
        with open_folder(path) as root:
            root.remove_index(fresh.name)
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

    def add(self, source: Source, name: str | None = None, access: Access | None = None) -> Added:
        """Adds one task, under another name if given; durable when it returns.

        Args:
            source: a task, a path, an fsspec URL, or a binary file object of a task checkpoint.
            access: which URLs may be opened, where the default is not enough.

        Raises:
            PearStoreError: the source is refused, or the disk is full; nothing was changed.
        """
        (result,) = self.add_many([source], name, access)
        if isinstance(result, Refused):
            raise result.error
        return result

    def add_many(
        self, sources: Iterable[Source], name: str | None = None, access: Access | None = None
    ) -> Iterator[Added | Refused]:
        """Adds tasks in groups, one result for each source in order; a bad source costs only its own result.

        A list or tuple of many local files is read ahead by forked processes, if this one has no threads, numpy's and
        torch's included; other iterables are read one by one as they give their sources.

        Raises:
            DiskFullError: the group that did not fit is not there, all before it are.
        """
        found_good = _FoundGood()
        for group in load_groups(sources, name, access):
            yield from self._commit(group, found_good)

    def _commit(self, group: Group, found_good: "_FoundGood") -> list[Added | Refused]:
        now = time.time_ns()
        opened = self._open
        with opened.read() as view:
            plan = self._plan(view, group, found_good, now, planned_in := view.state)
        if not (plan.tensors or plan.versions or plan.healed):
            return plan.results
        packs: list[WrittenPack] = []
        try:
            if plan.tensors or plan.versions:
                packs.append(write_pack(self.path, plan.tensors, plan.records, plan.commit))
        except OSError as error:
            raise from_os_error(error, self.path) from None

        def change(view: View) -> dict[Digest, bytes]:
            nonlocal plan
            written_in.clear()
            if view.before != planned_in:  # another process added, removed or rebuilt meanwhile
                current = self._plan(view, group, found_good, now, view.before)
                if not current.same_pack(plan):
                    for pack in packs:
                        pack.path.unlink(missing_ok=True)
                    packs.clear()
                    if current.tensors or current.versions:
                        packs.append(write_pack(self.path, current.tensors, current.records, current.commit))
                plan = current
            numbers = dict(plan.damaged)
            fresh = [digest for digest in plan.tensors if digest not in numbers]
            numbers.update(zip(fresh, range(first := view.take_numbers(len(fresh)), first + len(fresh)), strict=True))
            rows: dict[Digest, bytes] = {}
            for pack in packs:
                rows = opened.enter(view, pack, Records(), numbers, plan.damaged)
            places = {**plan.stored, **rows}
            for loaded in plan.healed:
                _put_manifest(view, loaded, places)
            for version, loaded in plan.versions:
                _put_manifest(view, loaded, places)
                key = version_key(version.task, version.version)
                row = VersionRow(loaded.hash, packs[0].hash, version.time_ns, loaded.size_bytes)
                view.put("versions", key, row.encode(key))
                key = name_key(version.task)
                name = NameRow(version.task, version.version, version.version, packs[0].hash)
                view.put("names", key, name.encode(key))
            if view.wrote:
                written_in.append(view.state)
            return rows

        written_in: list[State] = []
        rows = opened.write_packs(change, packs)
        if written_in:
            found_good.rows.update(rows)
            found_good.as_of = written_in[-1]
        return plan.results

    def _plan(self, view: View, group: Group, found_good: "_FoundGood", now: int, state: State) -> _Plan:
        """What this group would add to the store in this state."""
        plan = _Plan(commit=view.next_commit())
        names: dict[bytes, NameRow] = {}
        newest: dict[str, tuple[int, bytes]] = {}
        seen: set[bytes] = set()
        if found_good.as_of != state or len(found_good.rows) > _KEPT_ROWS:
            found_good.rows.clear()
            found_good.as_of = state
        good = found_good.rows
        for loaded in group:
            if isinstance(loaded, Refused):
                plan.results.append(loaded)
                continue
            key = name_key(loaded.name)
            known = names.get(key) or name_row(view, loaded.name)
            if known and known.newest and known.name != loaded.name:
                plan.results.append(Refused(NameTakenError(loaded.name, known.name)))
                continue
            new_bytes = 0
            for digest in loaded.tensors:
                if digest in plan.tensors:
                    continue
                row = good.get(digest)
                if row is None:
                    tensor = loaded.tensors[digest]
                    row = self._good_row(view, digest, tensor, seen, plan)
                    if row is None:
                        plan.tensors[digest] = tensor
                        new_bytes += tensor.size_bytes
                        continue
                    good[digest] = row
                plan.stored[digest] = row
            before = newest.get(loaded.name)
            if before is None and known and known.newest:
                version = version_row(view, loaded.name, known.newest)
                before = (known.newest, version.manifest if version else b"")
            changed = before is None or before[1] != loaded.hash
            number = (known.highest if known else 0) + 1 if before is None or changed else before[0]
            if number >> 32:
                plan.results.append(Refused(OutOfNumbersError(loaded.name)))
                continue
            if changed:
                plan.versions.append((PackedVersion(loaded.name, number, now, loaded.manifest), loaded))
                names[key] = NameRow(loaded.name, number, number, NO_PACK)
                newest[loaded.name] = (number, loaded.hash)
            elif loaded.name not in newest and not _intact(view, loaded):
                plan.healed.append(loaded)
            plan.results.append(Added(loaded.name, number, changed, new_bytes, loaded.size_bytes - new_bytes))
        return plan

    def _good_row(self, view: View, digest: Digest, tensor: RawTensor, seen: set[bytes], plan: _Plan) -> bytes | None:
        """The encoded row of a stored copy that equals the tensor byte for byte; None if there is none, or a damaged
        one, whose number goes into the plan. `seen` are the packs whose files were looked at."""
        found = view.get("tensors", key := from_digest(digest))
        if found is None:
            return None
        try:
            row = TensorRow.decode(key, found)
        except DamagedError as error:  # without its number, gc could not tell who needs the tensor
            raise DamagedIndexError(self.path / "index", f"{error.what}: {error.found}") from None
        with suppress(DamagedError):
            if (row.dtype, row.shape, row.length) == (tensor.dtype, tensor.shape, tensor.size_bytes):
                if row.pack not in seen:
                    self._open.forget_replaced(row.pack)
                mapped = self._open.map_of(view, row.pack)
                seen.add(row.pack)
                # two bytes objects compare by memcmp, memory views item by item
                if bytes(mapped.view[row.offset : row.offset + row.length]) == bytes(tensor.data):
                    return found
        plan.damaged[digest] = row.number
        return None

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
        manifest, tensors = self._open.look(lambda view: self._found(view, reference))
        record = json.loads(manifest)  # checked when it was added, and hashed when it was read
        if copy:
            tensors = {
                digest: RawTensor.checked(t.dtype, t.shape, bytearray(t.data), t.digest)
                for digest, t in tensors.items()
            }
        return Task(record, dict(tensors))

    def _found(self, view: View, reference: str) -> tuple[bytes, dict[str, RawTensor]]:
        """A version's manifest and tensors."""
        kept = self._open.kept(view)
        found = kept.get(reference)
        if found is None:
            name, number, row = _resolve(view, reference, self.path)
            manifest, hints = _manifest(view, row, f"version {name}@{number}")
            names = sorted(tensor_names(json.loads(manifest)))
            found = kept[reference] = manifest, self._open.tensors(view, names, f"version {name}@{number}", hints)
        return found

    def export(self, reference: str, path: str | Path) -> int:
        """Writes a stored version as a task checkpoint, its tensors bit-identical; returns the file's bytes."""
        return write_checkpoint(path, with_plain_names(self.get(reference, copy=False)))

    def tasks(self) -> list[Version]:
        """The newest version of every task, by name."""
        return list(self.iter_tasks())

    def iter_tasks(self) -> Iterator[Version]:
        """Like :meth:`tasks`, one by one."""
        if self._open.index.is_lockless:  # a view does not last
            yield from self._open.look(lambda view: list(_newest(view)))
            return
        with self._open.read() as view:
            for version in _newest(view):
                yield version
                view.check_own()

    def versions(self, task: str | None = None) -> list[Version]:
        """Every version, of one task or of all, by name and number.

        Raises:
            NotFoundError: the named task has no version.
        """
        found = self._open.look(lambda view: _versions(view, task))
        if task is not None and not found:
            raise NotFoundError(_unknown(task, self.path))
        return found

    def tags(self) -> dict[str, dict[str, int]]:
        """Every task's tags: {task: {tag: version}}."""
        found: dict[str, dict[str, int]] = {}
        with self._open.read() as view:
            for (task, number), tags in _all_tags(view).items():
                found.setdefault(task, {}).update(dict.fromkeys(tags, number))
        return found

    def resolve(self, reference: str) -> Version:
        """The version that a reference stands for now.

        Raises:
            NotFoundError: none.
        """

        def look(view: View) -> Version:
            name, number, _ = _resolve(view, reference, self.path)
            return _version(view, name, number, _tags_of(view, name))

        return self._open.look(look)

    def stats(self) -> Stats:
        """Counts and sizes of what is stored."""

        def look(view: View) -> tuple[gc.Marked, int]:
            return gc.mark(view), sum(1 for key, row in view.rows("names") if NameRow.decode(key, row).newest)

        marked, tasks = self._open.look(look)
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
                packs[:] = [write_pack(self.path, {}, records, view.next_commit())]
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
            return self._open.look(change)
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


def _intact(view: View, loaded: Loaded) -> bool:
    """Whether the stored manifest and what the index says of it are whole."""
    row = view.get("manifests", loaded.hash)
    try:
        if row is None:
            return False
        ManifestRow.decode(loaded.hash, row)
        return ManifestRow.manifest_of(row) == loaded.manifest
    except DamagedError:
        return False


def _put_manifest(view: View, loaded: Loaded, rows: Mapping[Digest, bytes]) -> None:
    row = view.get("manifests", loaded.hash)
    own = None
    if row is not None:
        with suppress(DamagedError):
            own = ManifestRow.decode(loaded.hash, row).number
    number = view.take_numbers(1) if own is None else own
    used = [rows[digest] for digest in sorted(loaded.tensors)]
    view.put("manifests", loaded.hash, ManifestRow.encode(loaded.hash, number, used, loaded.manifest))


def _manifest(view: View, row: VersionRow, what: str) -> tuple[bytes, list[TensorRow]]:
    """A version's manifest, its hash checked, and hints of where its tensors lie."""
    found = view.get("manifests", row.manifest)
    if found is None:
        raise DamagedError(f"manifest of {what}", "missing")
    manifest, hints = ManifestRow.unpack(found)
    if manifest_hash(manifest) != row.manifest:
        raise DamagedError(f"manifest of {what}", "its hash differs")
    return manifest, hints


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
            have = ", ".join(tag for tags in _tags_of(view, name).values() for tag in tags) or "none"
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
    return _by_version(view.every("tags"))


def _tags_of(view: View, task: str) -> dict[tuple[str, int], list[str]]:
    """Like :func:`_all_tags`, of one task."""
    return _by_version(view.rows("tags", task.encode("ascii") + b"\0"))


def _by_version(rows: Iterable[tuple[bytes, bytes]]) -> dict[tuple[str, int], list[str]]:
    found: dict[tuple[str, int], list[str]] = {}
    for key, value in rows:
        row = TagRow.decode(key, value)
        if row.version:
            task, tag = parse_tag_key(key)
            found.setdefault((task, row.version), []).append(tag)
    return found


def _newest(view: View) -> Iterator[Version]:
    """The newest version of every task, by name."""
    tags = _all_tags(view)
    for key, value in view.every("names"):
        row = NameRow.decode(key, value)
        if row.newest:
            yield _version(view, row.name, row.newest, tags)


def _versions(view: View, task: str | None) -> list[Version]:
    """Every version, of one task or of all."""
    tags = _all_tags(view)
    rows = view.every("versions") if task is None else view.rows("versions", task.encode("ascii", "replace") + b"\0")
    found = [_version(view, *parse_version_key(key), tags) for key, _ in rows]
    known = name_row(view, task) if task is not None and TASK_NAME.fullmatch(task) else None
    if known is not None and known.name == task and known.newest != (found[-1].version if found else 0):
        raise DamagedError(f"version {task}@{known.newest}", "the index does not list it")
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
    device = os.stat(path).st_dev
    if device not in _NETWORK:
        _NETWORK[device] = mounts.network_file_system(path)
    if kind := _NETWORK[device]:
        warnings.warn(
            f"{path} is on a network file system ({kind}): its locks and memory maps are not reliable enough for an "
            "index; keep the store on a local disk",
            stacklevel=3,
        )


_NETWORK: dict[int, str | None] = {}
"""Kind of network file system, if it is one, by device"""
