"""An open store's parts: transactions on its index, and its packs as memory maps."""

import errno
import mmap
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from pear_store.counted import counted
from pear_store.errors import AccessError, DamagedError, NotFoundError, PearStoreError, from_os_error
from pear_store.format.digest import Digest, RawTensor, tensor_digest
from pear_store.local.directory import open_folder
from pear_store.local.index import (
    Index,
    IndexReplacedError,
    OvertakenError,
    State,
    View,
    open_index,
    release_index,
)
from pear_store.local.locks import no_writer, write_lock
from pear_store.local.log import info
from pear_store.local.maps import map_file
from pear_store.local.packs import WrittenPack, find_unfinished, open_pack, pack_path, unlink_packs, unlink_written
from pear_store.local.references import all_tags
from pear_store.local.rows import PackRow, TensorRow

_OPEN_PACKS = 4096
"""Maps that are kept. The system allows about 65,000 in a process, including maps that only returned tensors use."""
_TRIES = 100
_KEPT_TASKS = 2048
"""Tasks that are kept. One of 24 tensors takes about 10 KB."""
T = TypeVar("T")


class PackGoneError(DamagedError):
    """A pack's file is missing: it is lost, or its tensors have moved since the index was read."""


@dataclass(frozen=True)
class MappedPack:
    """A pack's memory map.

    Args:
        identity: device and inode of the file.
        checked: tensors in it that were found good, by their offsets.
    """

    file: mmap.mmap
    view: memoryview
    identity: tuple[int, int]
    checked: dict[int, Digest] = field(default_factory=dict)

    def is_of(self, path: Path) -> bool:
        """Whether it maps the file that is there now."""
        try:
            found = os.stat(path)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self.identity and found.st_size == len(self.view)

    def advise(self, advice: str, *range_: int) -> None:
        """Gives the system advice such as "MADV_WILLNEED", if it knows that."""
        if hasattr(mmap, advice):
            with suppress(OSError, ValueError):
                self.file.madvise(getattr(mmap, advice), *range_)


class OpenStore:
    """An open store. Threads may share it. A forked child opens its own environment when it first needs one."""

    def __init__(self, path: Path) -> None:
        """Raises a NotFoundError if there is no store at `path`."""
        self.path = path
        self._lock = threading.Lock()
        self._maps: OrderedDict[bytes, MappedPack] = OrderedDict()
        self._kept: tuple[State | None, dict[str, tuple[bytes, dict[str, RawTensor]]]] = (None, {})
        self._tags: tuple[State | None, dict[tuple[str, int], list[str]]] = (None, {})
        self._closed = False
        self._index = self._open_index()

    def _open_index(self) -> Index:
        for _ in range(_TRIES):
            if not is_store(self.path):
                raise no_store(self.path)
            with suppress(IndexReplacedError):
                return open_index(self.path / "index")
        raise PearStoreError(f"{self.path / 'index'}: replaced again and again while it was opened; run again later")

    def close(self) -> None:
        """Releases the index. Tensors that were returned stay valid."""
        if not self._closed:
            self._closed = True
            release_index(self._index)

    @property
    def index(self) -> Index:
        """The environment that the directory holds now. It changes after a fork or a rebuild."""
        if self._closed:
            raise PearStoreError(f"{self.path}: this store was closed")
        if self._index.pid != os.getpid():
            self._lock = threading.Lock()  # another thread of the parent may have held it
            self._index = self._open_index()
        elif not self._index.is_current:
            with self._lock:
                if not self._index.is_current:
                    old, self._index = self._index, self._open_index()
                    release_index(old)  # others may still read it: it closes after its last view
        return self._index

    def read(self) -> AbstractContextManager[View]:
        """A consistent view of the index, which writers do not change. It begins now, so the caller enters it now."""
        while True:
            try:
                return self.index.read()
            except IndexReplacedError:  # a rebuild replaced it, and another thread closed the old one
                continue

    def look(self, act: Callable[[View], T]) -> T:
        """What `act` finds in a view. If writers have overtaken a reader that may not lock, it looks again."""
        for _ in range(_TRIES):
            try:
                with self.read() as view:
                    return act(view)
            except OvertakenError:
                continue
        raise OvertakenError(self.path)

    def write(self, change: Callable[[View], T]) -> T:
        """Runs `change` in a write transaction and commits. `change` may run more than once.

        First deletes packs that a process placed without committing them, because it died.

        Raises:
            DiskFullError: there is no space left. Nothing was changed.
        """
        cleaned = False  # clean only once: a change that runs again has placed its own packs

        def guarded(view: View) -> T:
            nonlocal cleaned
            if not cleaned and (left := _unlink_unfinished(self.path, view)):
                info(__name__, "%s: deleted %s whose writer died", self.path, counted(left, "pack"))
            cleaned = True
            return change(view)

        return self._write(guarded)

    def unlink_doomed(self) -> None:
        """Deletes the packs whose rows were deleted. Each write also does this first."""
        if find_unfinished(self.path):
            self._write(partial(_unlink_unfinished, self.path))

    def _write(self, change: Callable[[View], T]) -> T:
        while True:
            try:
                return self.index.write(change)
            except IndexReplacedError:  # nothing was done
                continue
            except OSError as error:
                raise from_os_error(error, self.path) from None

    def write_packs(self, change: Callable[[View], T], packs: list[WrittenPack]) -> T:
        """Like :meth:`write`, for a change that places packs.

        Args:
            packs: the change appends the packs that it places. After the commit, their names in tmp/ are deleted. If
                the commit fails, all their names are deleted.
        """
        process = os.getpid()
        try:
            result = self.write(change)
        except BaseException:
            if os.getpid() != process:  # this is a child, forked meanwhile: the parent still commits them
                raise
            unlink_written(self.path, (pack.hash for pack in packs), unless_placed=True)
            with suppress(PearStoreError):
                self.write(lambda view: None)
            raise
        unlink_written(self.path, (pack.hash for pack in packs))
        return result

    def tags(self, view: View) -> dict[tuple[str, int], list[str]]:
        """Tags by (task, version), as of the last commit. All are read, so that no damage can hide one."""
        state, tags = self._tags
        if state != view.state:
            tags = all_tags(view)
            self._tags = (view.state, tags)
        return tags

    # ---- tensors ------------------------------------------------------------------------------

    def kept(self, view: View) -> dict[str, tuple[bytes, dict[str, RawTensor]]]:
        """Manifests and tensors that were read since the last commit, by reference. The next commit drops them."""
        state, kept = self._kept
        if state != view.state or len(kept) >= _KEPT_TASKS:
            kept = {}
            self._kept = (view.state, kept)  # in one assignment: other threads may have views of other states
        return kept

    def tensors(
        self, view: View, digests: Sequence[str], what: str, hints: Sequence[TensorRow] = ()
    ) -> dict[str, RawTensor]:
        """Stored tensors, as views of maps. Each is checked against its digest when this process first reads it.

        Args:
            what: the version that needs them, for messages.
            hints: cached places of the tensors. If one is stale, all are looked up.

        Raises:
            DamagedError: a tensor is missing or damaged.
        """
        if len(hints) == len(digests):
            with suppress(DamagedError):
                self._fetch(None, hinted := list(zip(map(Digest, digests), hints, strict=True)))
                return {digest: self.tensor(None, digest, place) for digest, place in hinted}
        found: dict[str, RawTensor] = {}
        rows: list[tuple[Digest, TensorRow]] = []
        digest = ""
        try:
            for digest in digests:
                row = view.tensors.peek(Digest(digest))
                if row is None:
                    raise DamagedError("a tensor", "the index does not list it")
                rows.append((Digest(digest), row))
            self._fetch(view, rows)
            for digest, place in rows:
                found[digest] = self.tensor(view, Digest(digest), place)
        except DamagedError as error:
            raise type(error)(f"tensor {digest} of {what}", error.found) from None
        return found

    def _fetch(self, view: View | None, rows: list[tuple[Digest, TensorRow]]) -> None:
        """Asks the system to read tensors that were not read before, all at once."""
        runs: list[tuple[MappedPack, int, int]] = []  # neighbours in one piece
        for digest, (_, pack, offset, length, _, _) in sorted(rows, key=lambda row: row[1][1:3]):
            mapped = self._maps.get(pack) or self._map(view, pack)
            if mapped.checked.get(offset) == digest:
                continue
            if runs and runs[-1][0] is mapped and offset <= runs[-1][2] + mmap.PAGESIZE:
                runs[-1] = (mapped, runs[-1][1], offset + length)
            else:
                runs.append((mapped, offset - offset % mmap.PAGESIZE, offset + length))
        for mapped, start, end in runs:
            mapped.advise("MADV_WILLNEED", start, end - start)

    def tensor(self, view: View | None, digest: Digest, place: TensorRow) -> RawTensor:
        """One stored tensor, as :meth:`tensors`. Without a view, its place is a hint."""
        _, pack, offset, length, dtype, shape = place
        mapped = self._maps.get(pack) or self._map(view, pack)
        data = mapped.view[offset : offset + length]
        if mapped.checked.get(offset) != digest:
            if len(data) != length:
                raise DamagedError(f"tensor {digest}", "its pack is shorter than the index says")
            if tensor_digest(dtype, shape, data) != digest:
                raise DamagedError(f"tensor {digest}", "its bytes do not hash to its digest")
            mapped.checked[offset] = digest
        return RawTensor.checked(dtype, shape, data, digest)

    def map_of(self, view: View, pack: bytes) -> MappedPack:
        """A pack's memory map.

        Raises:
            PackGoneError: there is no such file.
            DamagedError: it cannot be read, or its length is wrong.
        """
        return self._maps.get(pack) or self._map(view, pack)

    def _map(self, view: View | None, pack: bytes) -> MappedPack:
        """Maps a pack. Checks its length, unless only a hint names the pack."""
        expected = None if view is None else view.packs.get(pack)
        try:
            return self._map_file(pack, expected, view is None)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise DamagedError(f"pack {pack.hex()}", f"it cannot be read: {error.strerror}") from None
        self.forget_maps()
        try:
            return self._map_file(pack, expected, view is None)
        except OSError as error:
            raise from_os_error(error, self.path) from None

    def _map_file(self, pack: bytes, expected: PackRow | None, hinted: bool) -> MappedPack:
        try:
            with open_pack(pack_path(self.path, pack)) as file:
                found = os.fstat(file.fileno())
                right = hinted or (expected and found.st_size == expected.file_bytes)
                if not right or not found.st_size:
                    raise DamagedError(f"pack {pack.hex()}", f"{found.st_size} bytes on disk, the index says otherwise")
                mapped_file = map_file(file.fileno(), found.st_size)
        except FileNotFoundError:
            raise PackGoneError(f"pack {pack.hex()}", f"pack {pack.hex()[:12]} is missing") from None
        mapped = MappedPack(mapped_file, memoryview(mapped_file).toreadonly(), (found.st_dev, found.st_ino))
        mapped.advise("MADV_RANDOM")  # else a page fault reads megabytes around the tensor
        with self._lock:
            self._maps[pack] = mapped
            while len(self._maps) > _OPEN_PACKS:
                self._maps.popitem(last=False)
        return mapped

    def forget_replaced(self, pack: bytes) -> None:
        """Drops the map of a pack whose file was deleted or replaced: the map is not what is stored now."""
        mapped = self._maps.get(pack)
        if mapped is not None and not mapped.is_of(pack_path(self.path, pack)):
            with self._lock:
                self._maps.pop(pack, None)

    def release_pages(self) -> None:
        """Has the system count the pages of maps as its cache, no longer as this process's memory. Maps stay valid."""
        with self._lock:
            for mapped in self._maps.values():
                mapped.advise("MADV_DONTNEED")

    def forget_maps(self) -> None:
        """Drops all maps, and what was found good in them. Tensors that were returned stay valid."""
        with self._lock:
            self._maps.clear()
            self._kept = (None, {})


def no_store(path: Path) -> NotFoundError:
    """The error for a path where :func:`is_store` finds no store. It says what to do."""
    if os.path.isdir(path / "packs"):
        return NotFoundError(f"{path}: the store's index is gone; 'pear-store rebuild --store {path}' makes it anew")
    return NotFoundError(f"{path}: no store there; make one with 'pear-store init --store {path}'")


def is_store(path: Path) -> bool:
    """Whether there is a store. Waits for a rebuild, and finishes one that was cut off between its two renames.

    The caller must not hold the write lock.

    Raises:
        AccessError: this process may not look.
    """
    try:
        if _is_there(path / "index" / "data.mdb"):
            return True
        if not _is_there(path / "packs"):
            return False
        with no_writer(path):  # a rebuild may be between its renames, and end between two looks
            is_there = _is_there(path / "index" / "data.mdb")
            if is_there or not _is_there(path / "index.new" / "data.mdb"):
                return is_there
        with write_lock(path):
            finish_rebuild(path)
        return True
    except OSError as error:
        if isinstance(found := from_os_error(error, path), AccessError):
            raise found from None
        return False  # such as a name that is too long, or a link to itself


def finish_rebuild(path: Path) -> None:
    """Finishes a rebuild that was cut off between its two renames, if there was one. The caller has the write lock."""
    if not _is_there(path / "index" / "data.mdb") and _is_there(path / "index.new" / "data.mdb"):
        with open_folder(path) as folder:
            folder.check("index.new", stat.S_IFDIR)
            folder.rename("index.new", "index")
            folder.sync()
            info(__name__, "%s: finished a rebuild that was cut off", path)


def _is_there(path: Path) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _unlink_unfinished(path: Path, view: View) -> int:
    """Deletes packs that tmp/ names and the index does not list. Returns how many."""
    unfinished = find_unfinished(path)
    gone = [pack for pack in unfinished if pack not in view.packs]
    if unfinished:
        unlink_packs(path, gone)  # before their names in tmp/ are: a power loss may undo deletions that are not synced

        unlink_written(path, unfinished)
    return len(gone)
