"""The index: an LMDB environment that says what a store holds and where. rows.py and tables.py have its format."""

import atexit
import errno
import importlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import lmdb

from pear_store.errors import AccessError, DamagedError, DamagedIndexError, DiskFullError, FormatError, PearStoreError
from pear_store.format.digest import fresh_name
from pear_store.format.pack import Commit
from pear_store.local.directory import check_index
from pear_store.local.locks import no_fork, write_lock
from pear_store.local.rows import sealed, unsealed
from pear_store.local.tables import Contents, Manifests, Names, Packs, Removed, Tags, Tensors, Versions

INDEX_FORMAT = b"5"
OLDER_FORMATS = (b"3", b"4")
"""Read as they are; the first write makes one the format of today"""
UNSEALED_FORMAT = b"3"
"""The rows of its table `meta` have no checksum"""
"""Like 4, but the rows of `meta` have no checksum. The first write adds it."""
TABLES = ("tensors", "packs", "contents", "manifests", "versions", "names", "tags", "removed", "meta")
_MAP_BYTES = (1 << 40, 1 << 34, 1 << 30)  # a map only takes address space; smaller if the system limits that
_FULL_BYTES = 4 << 20
"""LMDB reports a full disk as an input/output error. With less free space than this, the disk counts as full."""
_LOCK_BYTES = 128 << 10  # a header and 64 bytes for each of 1,024 readers
_MOST_HEADS = 64
"""Packs that a commit follows. There is more than one only if several processes add at once."""
T = TypeVar("T")


State = tuple[tuple[int, int], int]
"""An environment (device and inode of its file), and the number of a commit to it"""


class _Inherited:
    """Stands for a transaction of the parent in a forked child, which must not end it.

    That would free the parent's place among LMDB's readers. Writers could then overwrite what the parent reads.
    """

    def __getattr__(self, name: str) -> Any:
        raise PearStoreError("this view began before the process was forked; begin a new one in the child")


class View:
    """One transaction's rows, by table and key."""

    __slots__ = ("_tables", "_txn", "environment", "wrote")

    def __init__(self, txn: lmdb.Transaction, tables: Mapping[str, Any], environment: tuple[int, int]) -> None:
        self._txn = txn
        self._tables = tables
        self.environment = environment
        self.wrote = False

    @property
    def is_inherited(self) -> bool:
        """Whether the view is the parent's, because this process was forked after it began."""
        return isinstance(self._txn, _Inherited)

    def begin(self, environment: lmdb.Environment, write: bool) -> None:
        self._txn = environment.begin(write=write)

    def check_own(self) -> None:
        """Raises a PearStoreError in a child that was forked after this view began."""
        if self.is_inherited:
            self.commit()

    def commit(self) -> None:
        self._txn.commit()

    def end(self) -> None:
        """Ends the transaction. Changes that were not committed are undone."""
        if not self.is_inherited:
            self._txn.abort()

    def forget(self) -> lmdb.Transaction:
        """Leaves the transaction to the parent of this process. Returns it, because it must not be destroyed here."""
        txn, self._txn = self._txn, cast(lmdb.Transaction, _Inherited())
        return txn

    @property
    def id(self) -> int:
        """The number of the last commit that a reader sees, or of a writer's own commit.

        A writer that writes nothing makes no commit: the next writer gets the same number.
        """
        number: int = self._txn.id()
        return number

    @property
    def state(self) -> State:
        """The state that a reader sees, or that a writer's changes lead to. Equal states have equal rows."""
        return self.environment, self.id

    @property
    def before(self) -> State:
        """The state that a writer began with."""
        return self.environment, self.id - 1

    @property
    def versions(self) -> Versions:
        return Versions(self)

    @property
    def names(self) -> Names:
        return Names(self)

    @property
    def tags(self) -> Tags:
        return Tags(self)

    @property
    def removed(self) -> Removed:
        return Removed(self)

    @property
    def packs(self) -> Packs:
        return Packs(self)

    @property
    def contents(self) -> Contents:
        return Contents(self)

    @property
    def tensors(self) -> Tensors:
        return Tensors(self)

    @property
    def manifests(self) -> Manifests:
        return Manifests(self)

    # The rest works on bytes, and is for the tables only.

    def get(self, table: str, key: bytes) -> bytes | None:
        return cast(bytes | None, self._txn.get(key, db=self._tables[table]))

    def put(self, table: str, key: bytes, value: bytes) -> None:
        self._txn.put(key, value, db=self._tables[table])
        self.wrote = True

    def delete(self, table: str, key: bytes) -> None:
        self._txn.delete(key, db=self._tables[table])
        self.wrote = True

    def count(self, table: str) -> int:
        entries: int = self._txn.stat(self._tables[table])["entries"]
        return entries

    def rows(self, table: str, prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Keys and values in key order: those whose key starts with the prefix."""
        cursor: Any = self._txn.cursor(db=self._tables[table])
        if not (cursor.set_range(prefix) if prefix else cursor.first()):
            return
        for key, value in cursor:
            if prefix and not key.startswith(prefix):
                return
            yield key, value

    def every(self, table: str) -> Iterator[tuple[bytes, bytes]]:
        """All rows of a table.

        Raises:
            DamagedError: at the end, if rows are missing; earlier, if keys do not ascend.
        """
        expected, seen, before = self.count(table), 0, b""
        for key, value in self.rows(table):
            if seen == expected or (key <= before and seen):
                raise DamagedError(f"index table {table}", f"keys out of order after {seen} rows of {expected}")
            yield key, value
            seen, before = seen + 1, key
        if seen != expected:
            raise DamagedError(f"index table {table}", f"{seen} rows, expected {expected}")

    def last(self, table: str, prefix: bytes) -> tuple[bytes, bytes] | None:
        """The last row whose key starts with the prefix."""
        cursor: Any = self._txn.cursor(db=self._tables[table])
        found = cursor.set_range(prefix + b"\xff" * 8)
        found = cursor.prev() if found else cursor.last()
        if found and cursor.key().startswith(prefix):
            return cursor.key(), cursor.value()
        return None

    def next(self, table: str, key: bytes) -> tuple[bytes, bytes] | None:
        """The first row whose key is not less than this one."""
        cursor: Any = self._txn.cursor(db=self._tables[table])
        return (cursor.key(), cursor.value()) if cursor.set_range(key) else None

    def delete_where(self, table: str, dead: Callable[[bytes, bytes], bool]) -> None:
        """Walks a table once and deletes the rows that `dead` picks by key and value."""
        cursor: Any = self._txn.cursor(db=self._tables[table])
        found = cursor.first()
        while found:
            if dead(cursor.key(), cursor.value()):
                cursor.delete()  # moves to the next
                self.wrote = True
                found = bool(cursor.key())
            else:
                found = cursor.next()

    def take_numbers(self, count: int) -> int:
        """Takes `count` numbers that were never used, for tensors or manifests. Returns the first."""
        first = self.next_number()
        if first + count > 1 << 32:
            raise PearStoreError("the index has used up its 2^32 numbers; 'pear-store rebuild' counts them anew")
        if count:
            self.put_meta(b"next_number", (first + count).to_bytes(8, "little"))
        return first

    def next_number(self) -> int:
        """One more than the highest number that a tensor or manifest ever had.

        Raises:
            DamagedError: the row cannot be trusted.
        """
        body = self.meta(b"next_number")
        if not body and self._is_unsealed and not (len(self.contents) or len(self.manifests)):
            return 0
        if len(body) != 8:
            raise DamagedError("the index's count of numbers", "missing or of a wrong length")
        return int.from_bytes(body, "little")

    @property
    def _is_unsealed(self) -> bool:
        return self.get("meta", b"format") == UNSEALED_FORMAT

    def meta(self, key: bytes) -> bytes:
        """A row of `meta`, its checksum checked; empty if there is none."""
        row = self.get("meta", key)
        return row or b"" if not row or self._is_unsealed else unsealed(key, row)

    def put_meta(self, key: bytes, body: bytes) -> None:
        self.put("meta", key, sealed(key, body))

    def next_commit(self) -> Commit:
        """The number and the predecessors of a commit that follows all that this view sees."""
        body = self.meta(b"commit")
        packs = tuple(body[at : at + 32] for at in range(8, len(body), 32))
        return Commit(self.meta(b"id").decode("ascii", "replace"), int.from_bytes(body[:8], "little") + 1, packs)

    def enter_commit(self, pack: bytes, commit: Commit) -> None:
        """Has the next commit follow this pack instead of the packs that this one follows.

        Packs that another process wrote meanwhile stay in the list, because nothing follows them yet.
        """
        now = self.next_commit()
        self.put_commit(max(now.number - 1, commit.number), [p for p in now.after if p not in commit.after] + [pack])

    def put_commit(self, number: int, packs: Sequence[bytes]) -> None:
        self.put_meta(b"commit", number.to_bytes(8, "little") + b"".join(packs[-_MOST_HEADS:]))

    def upgrade(self) -> None:
        """Makes an index of an older format one of today's: versions of Pear that cannot read new rows refuse it then.

        Raises:
            DamagedError: of format 3, the count of numbers, which had no checksum, contradicts the numbers in use.
        """
        if not self._is_unsealed:
            self.put("meta", b"format", INDEX_FORMAT)
            return
        number, store = self.next_number(), self.meta(b"id")
        for _, contents in self.contents.every():
            self._check_below(number, contents.numbers)
        for _, manifest in self.manifests.every():
            self._check_below(number, (manifest.number, *manifest.tensors))
        self.put("meta", b"format", INDEX_FORMAT)
        self.put_meta(b"next_number", number.to_bytes(8, "little"))
        self.put_meta(b"id", store)

    @staticmethod
    def _check_below(next_number: int, numbers: Iterable[int]) -> None:
        if max(numbers, default=-1) >= next_number:
            raise DamagedError("the index's count of numbers", f"{next_number}, though higher ones are in use")


def _reserve_lock(path: Path) -> None:
    """Reserves disk space for LMDB's lock file. LMDB writes to it through a map, which kills us if the disk is full."""
    if path.exists() or not path.parent.exists():
        return
    # never truncates one that others have made meanwhile: they may use it, and so may readers of a rebuild's new index
    with suppress(FileExistsError), open(path, "xb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, _LOCK_BYTES)
        else:  # macOS
            file.write(bytes(_LOCK_BYTES))


def _free_bytes(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


def _code(error: Exception) -> int | None:
    """The system's number of an error. LMDB's errors may only have its text."""
    code = getattr(error, "code", None) or getattr(error, "errno", None)
    known = {os.strerror(number): number for number in (*_DENIED, errno.ENOENT)}
    return code or next((number for text, number in known.items() if str(error).endswith(text)), None)


class OvertakenError(PearStoreError):
    """A reader that may not lock the index may have read overwritten pages. It must look again."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path}: others wrote while this process read, and it may not lock the index; run again later, or get "
            "write permission"
        )


class IndexReplacedError(Exception):
    """The directory holds another environment now, because a rebuild has replaced it."""


class Index:
    """One open environment. Use :func:`open_index`: LMDB allows one per process and directory."""

    def __init__(self, path: Path, create: bool) -> None:
        self.path = path
        self.pid = os.getpid()
        self._file = str(path / "data.mdb")
        self._views: set[View] = set()
        self._closed = False
        self._translated = _Translated(self)
        with self._translated:
            check_index(path)
            try:
                before = None if create else self._found()
                self.is_lockless = self._open(create)
            except (OSError, lmdb.Error) as error:
                if _code(error) == errno.ENOENT:
                    raise IndexReplacedError from None
                raise
            try:
                self._enter(before, create)
            except BaseException:  # left open, it could not be opened again in this process
                self._env.close()
                raise
        _processes.indexes.add(self)

    def _enter(self, before: tuple[int, int] | None, create: bool) -> None:
        """Checks the open environment, and opens its tables.

        Args:
            before: the file that was there before it was opened.
        """
        try:
            self.identity = self._found()
        except FileNotFoundError:
            raise IndexReplacedError from None
        if before not in (None, self.identity):  # a rebuild replaced it meanwhile: either of the two may be open
            raise IndexReplacedError
        self._env.reader_check()
        meta: Any = self._env.open_db(b"meta", create=create)
        if create:
            with self._env.begin(write=True, db=meta) as txn:
                txn.put(b"format", INDEX_FORMAT)
                txn.put(b"id", sealed(b"id", fresh_name().encode()))
                txn.put(b"next_number", sealed(b"next_number", bytes(8)))
        with self._env.begin(db=meta) as txn:
            found_format = cast(bytes, txn.get(b"format", b"unknown"))
        self._is_upgraded = found_format == INDEX_FORMAT
        if not self._is_upgraded and found_format not in OLDER_FORMATS:
            older = found_format.isdigit() and int(found_format) < int(INDEX_FORMAT)
            remedy = "'pear-store rebuild' makes it anew from the packs"
            if not older:
                remedy = f"use the newer Pear that wrote it; if there is none, it is damaged, and {remedy}"
            raise FormatError(
                f"{self.path.parent}: index format {found_format.decode('ascii', 'replace')!r}: this Pear reads "
                f"{INDEX_FORMAT.decode()!r}; {remedy}"
            )
        self._tables = {name: self._env.open_db(name.encode(), create=create) for name in TABLES}

    def _open(self, create: bool) -> bool:
        """Opens the environment; read-only if this process may not write it. Returns whether it has no LMDB lock.

        Writers do not see a reader without the lock, and may overwrite what it reads: see :meth:`_check_overtaken`.
        """
        try:
            _reserve_lock(self.path / "lock.mdb")
            self._env = self._open_environment(create=create)
            return False
        except (OSError, lmdb.Error) as error:
            if create or _code(error) not in _DENIED:
                raise
        if os.access(self.path / "lock.mdb", os.W_OK):
            self._env = self._open_environment(create=False, readonly=True)
            return False
        self._env = self._open_environment(create=False, readonly=True, lock=False)
        return True

    def _open_environment(self, **options: Any) -> lmdb.Environment:
        for size in _MAP_BYTES:
            with suppress(lmdb.MemoryError):
                return _open_environment(
                    os.fsencode(self.path), map_size=size, max_dbs=16, max_readers=1024, sync=True, writemap=False,
                    metasync=True, readahead=False,  # a fault would read megabytes around a page
                    **options,
                )  # fmt: skip
        raise PearStoreError(
            f"{self.path.parent}: the system gives less than {_MAP_BYTES[-1]} bytes of address space for the index; "
            "raise the limit ('ulimit -v')"
        )

    @property
    def is_current(self) -> bool:
        """Whether the directory still holds this environment."""
        try:
            return self._found() == self.identity
        except OSError:
            return False

    @property
    def size_bytes(self) -> int:
        """The disk space that it takes: less than its file's length, which has holes. 0 while a rebuild replaces it."""
        with suppress(FileNotFoundError):
            return os.stat(self._file).st_blocks * 512
        return 0

    def _found(self) -> tuple[int, int]:
        found = os.stat(self._file)
        return found.st_dev, found.st_ino

    def close(self) -> None:
        """Closes the environment after its last view has ended."""
        self._closed = True
        self._close_unused()

    def reopen(self) -> bool:
        """Goes on with an environment that waits for its last view to end. False: it is closed."""
        with no_fork():
            if self in _processes.indexes:
                self._closed = False
            return not self._closed

    def _close_unused(self) -> None:
        with no_fork():  # if two threads close an environment, LMDB frees it twice
            if self._closed and not self._views and self in _processes.indexes:
                self._env.close()
                # last: a child that is forked before this would close the parent's environment
                _processes.indexes.discard(self)

    def forget(self) -> list[Any]:
        """Leaves everything to the parent, in a forked child. Returns what must not be destroyed here."""
        left = [self._env, *(view.forget() for view in self._views)]
        self._views.clear()
        return left

    def read(self) -> AbstractContextManager[View]:
        """A consistent view, which writers do not change. It begins now, so the caller must enter it now.

        Raises:
            IndexReplacedError: this index was closed, because another one took its place.
        """
        with self._translated:
            try:
                view = self._begin()
            except lmdb.MapResizedError:  # possible only after all views of this process have ended
                self._env.set_mapsize(0)
                view = self._begin()
        return _Within(self, view)

    def _begin(self, write: bool = False) -> View:
        view = View(cast(lmdb.Transaction, None), self._tables, self.identity)
        self._views.add(view)
        try:
            if self._closed:  # if it closes later than this look, `close` sees this view
                raise IndexReplacedError
            view.begin(self._env, write)
        except BaseException:
            self._discard(view)
            raise
        return view

    def _discard(self, view: View) -> None:
        self._views.discard(view)
        if self._closed:
            self._close_unused()

    def end(self, view: View) -> None:
        """Ends a view. Changes that were not committed are undone.

        Raises:
            OvertakenError: what it read may have been overwritten.
        """
        with self._translated:
            try:
                if self.is_lockless:
                    self._check_overtaken(view)
            finally:
                view.end()
                self._discard(view)

    def _check_overtaken(self, view: View) -> None:
        """Raises if a view's pages may have been reused.

        LMDB reuses a page two commits after it was freed, unless it knows of a reader that needs the page.
        """
        if not view.is_inherited and self._env.info()["last_txnid"] > view.id + 1:
            raise OvertakenError(self.path.parent)

    def write(self, change: Callable[[View], T]) -> T:
        """Runs `change` in a write transaction and commits. Only one exists at a time, among all processes.

        If the map is too small, it grows and `change` runs again.

        Raises:
            IndexReplacedError: nothing was done. The caller opens the index anew.
        """
        with self._translated, write_lock(self.path.parent):
            if not self.is_current:
                raise IndexReplacedError
            if not self._is_upgraded:
                try:
                    self.fill(View.upgrade)
                except DamagedError as error:
                    raise DamagedIndexError(self.path, f"{error.what}: {error.found}") from None
                self._is_upgraded = True
            return self.fill(change)

    def fill(self, change: Callable[[View], T]) -> T:
        """Like :meth:`write`, but without the lock: for an index that no other process knows."""
        with self._translated:
            while True:
                try:
                    with _Within(self, self._begin(write=True)) as view:
                        result = change(view)
                        view.commit()
                        return result
                except lmdb.MapFullError:
                    self._env.set_mapsize(self._env.info()["map_size"] * 2)
                except lmdb.MapResizedError:
                    self._env.set_mapsize(0)

    def translate(self, error: BaseException) -> None:
        """Raises errors of LMDB and of the system as ours."""
        if isinstance(error, lmdb.MapFullError | lmdb.MapResizedError):
            return
        if isinstance(error, _DAMAGE):
            raise DamagedIndexError(self.path, str(error)) from None
        if isinstance(error, lmdb.Error | OSError):
            code = _code(error)
            full = code in (errno.ENOSPC, errno.EDQUOT)
            if code == errno.EIO or "Input/output error" in str(error):
                full = _free_bytes(self.path.parent) < _FULL_BYTES
            if full:
                raise DiskFullError(self.path.parent) from None
            if code in _DENIED:
                raise AccessError(self.path.parent, os.strerror(code).lower()) from None
            raise PearStoreError(f"{self.path.parent}: {error}") from None


_DAMAGE = (
    lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.PanicError, lmdb.NotFoundError,
    lmdb.VersionMismatchError, lmdb.IncompatibleError, lmdb.BadDbiError, lmdb.BadValsizeError,
)  # fmt: skip


class _Translated:
    """A context in which errors of LMDB and of the system become ours.

    This and `_Within` are classes, because every read enters them, and a generator takes three times as long.
    """

    __slots__ = ("_index",)

    def __init__(self, index: Index) -> None:
        self._index = index

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._index.translate(error)


class _Within:
    """The context of a view that has begun."""

    __slots__ = ("_index", "_view")

    def __init__(self, index: Index, view: View) -> None:
        self._index = index
        self._view = view

    def __enter__(self) -> View:
        return self._view

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._index.end(self._view)
        if error is not None:
            self._index.translate(error)


# ---- processes ------------------------------------------------------------------------------------------------------
#
# A forked child has copies of its parent's environments and transactions. It must not use or end them:
#
# - Closing an environment would wait for ever, for threads that the child does not have.
# - Ending a transaction would free the parent's place among the readers. A writer could then overwrite its pages.


@dataclass
class _Processes:
    """What this process has open, and what it must never destroy because it belongs to the parent."""

    open: dict[tuple[int, int, int], tuple[Index, int]] = field(default_factory=dict)
    """Environments by process and file, each with the number of stores that use it"""
    indexes: set[Index] = field(default_factory=set)
    """All that are not closed, including those that wait for their last view to end"""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Guards `open`"""
    parents: list[Any] = field(default_factory=list)

    def after_fork(self) -> None:
        """In a forked child."""
        self.lock = threading.Lock()
        for index in self.indexes:
            self.parents += index.forget()
        for kept in (self.open, self.indexes):
            kept.clear()
        if self.parents:
            atexit.register(_keep_for_ever, self.parents)


def _keep_for_ever(objects: list[Any]) -> None:
    """Gives each object a reference that is never released. Else the interpreter would close them when it ends."""
    import ctypes

    for one in objects:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))


_processes = _Processes()
os.register_at_fork(after_in_child=lambda: _processes.after_fork())


def _open_environment(path: bytes, **options: Any) -> lmdb.Environment:
    """Calls lmdb.open, also in a forked child.

    py-lmdb refuses to open an environment twice in a process. In a child it also refuses those that the parent had
    open, so its check is turned off for this call.
    """
    if not _processes.parents:
        return lmdb.open(path, **options)
    identity: Any = importlib.import_module("lmdb._envid")
    keys = identity.env_keys
    identity.env_keys = lambda asked, subdir: () if asked is path else keys(asked, subdir)
    try:
        return lmdb.open(path, **options)
    finally:
        identity.env_keys = keys


def open_index(path: Path, create: bool = False) -> Index:
    """This process's environment for the directory. All stores of a process share one.

    Raises:
        IndexReplacedError: there is none at this moment, or it was replaced while it was opened.
    """
    with _processes.lock:
        try:
            found = os.stat(path / "data.mdb")
            key = (os.getpid(), found.st_dev, found.st_ino)
        except FileNotFoundError:
            key = (0, 0, 0)
        index, uses = _processes.open.get(key, (None, 0))
        if index is None:
            waiting = (one for one in list(_processes.indexes) if (one.pid, *one.identity) == key and one.reopen())
            index = next(waiting, None) or Index(path, create)
        _processes.open[(index.pid, *index.identity)] = (index, uses + 1)
        return index


def release_index(index: Index) -> None:
    """Gives the environment back. Its last user closes it."""
    with _processes.lock:
        key = (index.pid, *index.identity)
        if key not in _processes.open:  # the parent's
            return
        _, uses = _processes.open[key]
        if uses > 1:
            _processes.open[key] = (index, uses - 1)
        else:
            del _processes.open[key]
            index.close()
