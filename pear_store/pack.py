"""Packs: immutable safetensors files that hold tensors by digest, and the records that were committed with them.

The records let the index be rebuilt from the packs alone. They do not depend on the order in which packs are read:
version numbers are never used twice, a removal outweighs the version it names, and of tags the latest counts.
"""

import errno
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pear_store.checkpoint import TAG_NAME, TASK_NAME
from pear_store.commit import NO_COMMIT, Commit
from pear_store.container import Header, Place, lay_out, read_header, read_metadata, strict_json
from pear_store.digest import Digest, Kept, RawTensor, begin_digest, fresh_name
from pear_store.directory import FAN_NAME, INTENT_NAME, PACK_NAME, Folder, open_folder
from pear_store.errors import AccessError, CheckpointError, DamagedError, SourceError, from_os_error
from pear_store.reading import open_regular

FORMAT = "pear-pack/1"
T = TypeVar("T")


@dataclass(frozen=True)
class PackedVersion:
    """A version of a task; time in nanoseconds since the epoch, manifest as its bytes; the number of the commit that
    added it, if it was moved here since (0: unknown)."""

    task: str
    version: int
    time_ns: int
    manifest: bytes
    moved_from: int | None = None

    @Kept
    def hash(self) -> bytes:
        return hashlib.sha256(self.manifest).digest()


@dataclass(frozen=True)
class PackedTag:
    """What a tag stood for from a time on; None: for nothing."""

    task: str
    tag: str
    version: int | None
    time_ns: int


@dataclass
class Records:
    """What a pack records beside its tensors: versions, versions removed, tags set, highest numbers ever used."""

    versions: list[PackedVersion] = field(default_factory=list)
    removed: list[tuple[str, int]] = field(default_factory=list)
    tags: list[PackedTag] = field(default_factory=list)
    highest: dict[str, int] = field(default_factory=dict)
    removed_manifests: dict[tuple[str, int], bytes] = field(default_factory=dict)
    """Of versions removed, where it is known"""
    commit: Commit = NO_COMMIT
    """As read from a pack"""

    def highest_numbers(self) -> dict[str, int]:
        """The highest number of each task that anything in here names."""
        found = dict(self.highest)
        for task, number in chain(((v.task, v.version) for v in self.versions), self.removed):
            found[task] = max(number, found.get(task, 0))
        return found

    def __len__(self) -> int:
        return len(self.versions) + len(self.removed) + len(self.tags) + len(self.highest)


@dataclass(frozen=True)
class WrittenPack:
    """A pack that lies complete in `path`, not yet under its own name; durable once `wait_synced` has returned."""

    path: Path
    hash: bytes
    file_bytes: int
    tensor_bytes: int
    places: Mapping[Digest, Place]
    wait_synced: Callable[[], None]
    commit: Commit


def pack_path(root: Path, pack: bytes) -> Path:
    name = pack.hex()
    return root / "packs" / name[:2] / f"{name}.safetensors"


def find_packs(root: Path, foreign: list[str]) -> Iterator[bytes]:
    """The hashes of the files that lie where packs belong; appends the paths of what else is there. Links are not
    followed."""
    with open_folder(root, "packs") as packs:
        for fan in packs.names():
            if not (FAN_NAME.fullmatch(fan) and packs.is_folder(fan)):
                foreign.append(str(packs.path / fan))
                continue
            with packs.folder(fan) as folder:
                for name in folder.names():
                    with suppress(FileNotFoundError):
                        if PACK_NAME.fullmatch(name) and name[:2] == fan and folder.is_file(name):
                            yield bytes.fromhex(name[:64])
                        else:
                            foreign.append(str(folder.path / name))


def pack_metadata(records: Records, commit: Commit) -> dict[str, str]:
    """The pack's `__metadata__`: the record, its checksum, and each manifest under its hash."""
    metadata = {v.hash.hex(): v.manifest.decode("utf-8") for v in records.versions}
    record: dict[str, Any] = {
        "format": FORMAT,
        "id": fresh_name(),  # no two packs are one file, so that a healed tensor never lands where a damaged one was
        "store": commit.store,
        "commit": commit.number,
        "after": [pack.hex() for pack in commit.after],
        "versions": [
            {
                "task": v.task,
                "version": v.version,
                "time_ns": v.time_ns,
                "manifest": v.hash.hex(),
                **({} if v.moved_from is None else {"commit": v.moved_from}),
            }
            for v in records.versions
        ],
    }
    if records.removed:
        record["removed"] = [list(one) for one in records.removed]
        manifests = (records.removed_manifests.get(one) for one in records.removed)
        record["removed_manifests"] = [manifest and manifest.hex() for manifest in manifests]
    if records.tags:
        record["tags"] = [vars(tag) for tag in records.tags]
    if records.highest:
        record["highest"] = records.highest
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return {"pear": text, "pear.sha256": hashlib.sha256(text.encode("utf-8")).hexdigest(), **metadata}


def write_pack(root: Path, tensors: Mapping[Digest, RawTensor], records: Records, commit: Commit) -> WrittenPack:
    """Writes a pack into the store's tmp/, where it is synced while the caller goes on (:func:`place_pack` waits)."""
    named = {str(digest): tensor for digest, tensor in tensors.items()}
    head, places = lay_out(named, pack_metadata(records, commit))
    with open_folder(root, "tmp", create=True) as tmp:
        return _write_pack(tmp, named, head, places, commit)


def _write_pack(
    tmp: Folder, named: Mapping[str, RawTensor], head: bytes, places: Mapping[str, Place], commit: Commit
) -> WrittenPack:
    name = f"{fresh_name()}.safetensors"
    state = hashlib.sha256()
    size = 0
    process = os.getpid()
    handle = tmp.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    sync = _Sync(handle)
    try:
        for run in _runs((head, *(named[name].data for name in places))):
            for chunk in run:
                state.update(chunk)
            size += _write(handle, run, size)
        pack = WrittenPack(
            tmp.path / f"{state.hexdigest()}.safetensors", state.digest(), size,
            sum(tensor.size_bytes for tensor in named.values()),
            {Digest(name): place for name, place in places.items()}, sync.wait, commit,
        )  # fmt: skip
        tmp.rename(name, pack.path.name)
    except BaseException:
        os.close(handle)
        if os.getpid() == process:  # else forked meanwhile: the parent still writes it
            tmp.unlink(name)
        raise
    sync.start(apart=size >= _SYNC_APART_BYTES)
    return pack


_SYNC_APART_BYTES = 1 << 20


class _Sync:
    """Syncs and closes a file, in a thread if it is worth one."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run)

    def start(self, apart: bool) -> None:
        try:
            if apart:
                self._thread.start()
                return
        except RuntimeError:  # there can be no thread more
            pass
        self._run()

    def _run(self) -> None:
        try:
            os.fsync(self._handle)
        except OSError as error:
            self._error = error
        finally:
            os.close(self._handle)

    def wait(self) -> None:
        """Raises the OSError of a sync that failed."""
        if self._thread.ident is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error


def _runs(chunks: Iterable[bytes | bytearray | memoryview]) -> Iterator[list[bytes | bytearray | memoryview]]:
    """The chunks in runs of about a MiB: what was hashed is still in the processor's cache when it is written."""
    run: list[bytes | bytearray | memoryview] = []
    size = 0
    for chunk in chunks:
        run.append(chunk)
        size += len(chunk)
        if size >= 1 << 20 or len(run) == _MAX_RUN:
            yield run
            run, size = [], 0
    yield run


_MAX_RUN = 1000  # of the 1,024 pieces that one system call takes


def _write(handle: int, run: list[bytes | bytearray | memoryview], at: int) -> int:
    """Writes a run at the file's end and has the disk begin with it, so that the sync has less to wait for."""
    size = sum(map(len, run))
    written = os.writev(handle, run) if size else 0
    if written < size:  # a full disk, or a signal
        rest = memoryview(b"".join(run))[written:]
        while rest:
            rest = rest[os.write(handle, rest) :]
    if size and hasattr(os, "posix_fadvise"):  # pages that are dirty Linux begins to write, and keeps
        with suppress(OSError):  # advice
            os.posix_fadvise(handle, at, size, os.POSIX_FADV_DONTNEED)
    return size


def place_pack(root: Path, pack: WrittenPack) -> None:
    """Gives a written pack its own name, durably, once it is synced.

    Its name in tmp/ stays until the commit is through: by the second name the next writer sees that a process died
    before it committed, and unlinks what nobody was promised (:func:`find_unfinished`).
    """
    pack.wait_synced()
    name, fan = pack.path.name, pack.path.name[:2]
    with open_folder(root, "tmp") as tmp, open_folder(root, "packs", fan, create=True) as folder:
        try:
            folder.check(name)  # it is there already when a commit is run again
        except FileNotFoundError:
            try:
                tmp.link(name, name, folder)
            except OSError:  # a file system without hard links: an empty file says the same
                os.close(tmp.open(_intent(pack.hash), os.O_WRONLY | os.O_CREAT))
                tmp.rename(name, name, folder)
        folder.sync()


def _intent(pack: bytes) -> str:
    return f"{pack.hex()}.placing"


def find_unfinished(root: Path) -> list[bytes]:
    """Packs that tmp/ says were given their own name. Under the write lock, each is either committed or was left by a
    process that died."""
    with suppress(FileNotFoundError), open_folder(root, "tmp") as tmp:
        return [
            bytes.fromhex(name[:64])
            for name in tmp.names()
            if (PACK_NAME.fullmatch(name) and _is_linked(tmp, name)) or INTENT_NAME.fullmatch(name)
        ]
    return []


def _is_linked(folder: Folder, name: str) -> bool:
    try:
        return folder.is_file(name) and folder.look(name).st_nlink > 1
    except FileNotFoundError:
        return False


def unlink_pack(root: Path, pack: bytes) -> None:
    """Deletes a pack's file, if there is one."""
    name = f"{pack.hex()}.safetensors"
    with suppress(FileNotFoundError), open_folder(root, "packs", name[:2]) as folder:
        folder.unlink(name)


def unlink_written(root: Path, packs: Iterable[bytes], unless_placed: bool = False) -> None:
    """Deletes packs' names in tmp/; `unless_placed`: only of those that have no other name."""
    with suppress(FileNotFoundError), open_folder(root, "tmp") as tmp:
        for pack in packs:
            name = f"{pack.hex()}.safetensors"
            if not (unless_placed and _is_linked(tmp, name)):
                tmp.unlink(name)
            if not unless_placed:
                tmp.unlink(_intent(pack))


def open_pack(path: Path) -> BinaryIO:
    """Opens a pack's file for reading. A link to it is followed: what is read is checked.

    Raises:
        AccessError: it may not be read.
        DamagedError: it is no regular file, or cannot be opened.
        OSError: there is none; too many files are open.
    """
    try:
        return open_regular(path, path)
    except SourceError as error:
        raise DamagedError(f"pack {path.stem}", error.problem) from None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EMFILE, errno.ENFILE):
            raise
        found = from_os_error(error, path)
        raise found if isinstance(found, AccessError) else DamagedError(f"pack {path.stem}", str(found)) from None


def is_unfinished(root: Path, pack: bytes) -> bool:
    """Whether tmp/ says that a pack's commit is not through; once it is, a view that is begun later lists the pack."""
    return any((root / "tmp" / name).exists() for name in (f"{pack.hex()}.safetensors", _intent(pack)))


class PackReader:
    """Reads a pack's tensors, best in the order in which they lie, without a map: what the disk cannot read is an
    answer, not a signal that ends the process."""

    def __init__(self, file: BinaryIO) -> None:
        self._descriptor = file.fileno()
        self._window = memoryview(b"")
        self._start = 0

    def digest(self, dtype: str, shape: tuple[int, ...], offset: int, length: int) -> bytes | None:
        """A tensor's digest as the file has it; None if it cannot be read whole."""
        state = begin_digest(dtype, shape)
        at, end = offset - self._start, offset + length
        if at >= 0 and at + length <= len(self._window):
            state.update(self._window[at : at + length])
            return state.digest()
        try:
            while offset < end:
                data = self._read(offset, min(end - offset, _WINDOW_BYTES))
                if not data:
                    return None
                state.update(data)
                offset += len(data)
        except OSError:
            return None
        return state.digest()

    def _read(self, offset: int, length: int) -> memoryview:
        at = offset - self._start
        if at < 0 or at + length > len(self._window):
            try:
                self._window = memoryview(os.pread(self._descriptor, _WINDOW_BYTES, offset))
            except OSError:  # it may be what lies behind that cannot be read
                self._window = memoryview(os.pread(self._descriptor, length, offset))
            self._start, at = offset, 0
        return self._window[at : at + length]


_WINDOW_BYTES = 1 << 20


def read_records(path: Path) -> tuple[Header, Records, list[str]]:
    """A pack's header, its records, and what is wrong with them (of versions whose manifest is damaged, say).

    Raises:
        DamagedError: the header or the record cannot be trusted at all.
    """
    header = _read(path, read_header)
    return header, *records_in(path, header.metadata)


def read_records_alone(path: Path) -> Records:
    """A pack's records, without a look at what else its header says.

    Raises:
        DamagedError: they cannot be trusted.
    """
    return records_in(path, _read(path, read_metadata))[0]


def _read(path: Path, read: Callable[[BinaryIO, Path, int], T]) -> T:
    try:
        with open_pack(path) as file:
            return read(file, path, os.fstat(file.fileno()).st_size)
    except CheckpointError as error:
        raise DamagedError(f"pack {path.stem}", error.problem) from None
    except OSError as error:
        raise DamagedError(f"pack {path.stem}", f"it cannot be read: {error.strerror}") from None


def records_in(path: Path, metadata: dict[str, str]) -> tuple[Records, list[str]]:
    """A pack's records by its metadata, and what is wrong with them; see :func:`read_records`."""
    text = metadata.get("pear", "")
    try:
        sound = hashlib.sha256(text.encode("utf-8")).hexdigest() == metadata.get("pear.sha256")
        records, problems = _parse(strict_json(text), metadata) if sound else (Records(), [])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedError(f"pack {path.stem}", "its record is not as 'pear-pack/1' is") from None
    if not sound:
        raise DamagedError(f"pack {path.stem}", "its record does not match its checksum")
    return records, problems


def bare_header(file: Path) -> Header | None:
    """A pack's header though its record is damaged; None if even that cannot be read."""
    try:
        with open_pack(file) as handle:
            return read_header(handle, file, os.fstat(handle.fileno()).st_size)
    except (OSError, CheckpointError, DamagedError):
        return None


def _parse(record: Any, metadata: Mapping[str, str]) -> tuple[Records, list[str]]:
    """The records, and what of them is damaged; a ValueError, KeyError, TypeError or AttributeError, if it is none."""
    if record["format"] != FORMAT:
        raise ValueError
    found, problems = Records(commit=_commit(record)), []
    manifests: dict[str, bytes] = {}  # many versions may name one
    for entry in record["versions"]:
        task, number, name = _task(entry["task"]), _number(entry["version"]), entry["manifest"]
        if name not in manifests:
            manifest = metadata.get(name, "").encode("utf-8", "replace")
            manifests[name] = manifest if hashlib.sha256(manifest).hexdigest() == name else b""
        if manifests[name]:
            moved_from = _count(entry["commit"]) if "commit" in entry else None
            version = PackedVersion(task, number, _count(entry["time_ns"]), manifests[name], moved_from)
            version.__dict__["hash"] = bytes.fromhex(name)
            found.versions.append(version)
        else:
            problems.append(f"manifest of version {task}@{number}")
            found.highest[task] = max(number, found.highest.get(task, 0))  # it stays used
    found.removed = [(_task(task), _number(number)) for task, number in record.get("removed", [])]
    for one, text in zip(found.removed, record.get("removed_manifests", ()), strict=False):
        if text is not None:
            found.removed_manifests[one] = _hash(text)
    for entry in record.get("tags", []):
        if not TAG_NAME.fullmatch(entry["tag"]):
            raise ValueError
        tagged = None if entry["version"] is None else _number(entry["version"])
        found.tags.append(PackedTag(_task(entry["task"]), entry["tag"], tagged, _count(entry["time_ns"])))
    for task, number in record.get("highest", {}).items():
        found.highest[_task(task)] = max(_number(number), found.highest.get(task, 0))
    return found, problems


def _commit(record: Any) -> Commit:
    store, number, after = record.get("store", ""), record.get("commit", 0), record.get("after", [])
    if not (isinstance(store, str) and len(store) <= 64 and store.isascii() and isinstance(after, list)):
        raise ValueError
    return Commit(store, _count(number), tuple(map(_hash, after)))


def _hash(value: Any) -> bytes:
    if not (isinstance(value, str) and len(value) == 64):
        raise ValueError
    return bytes.fromhex(value)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError
    return value


def _task(value: Any) -> str:
    if not TASK_NAME.fullmatch(value):
        raise ValueError
    return str(value)


def _number(value: Any) -> int:
    if type(value) is not int or not 0 < value < 2**32:
        raise ValueError
    return value
