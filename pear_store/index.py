"""The index: an LMDB environment that says what a store holds and where.

    tensors    32-byte digest                 -> TensorRow
    packs      32-byte hash                   -> PackRow
    manifests  32-byte hash                   -> manifest bytes
    versions   task, NUL, big-endian number   -> VersionRow
    names      case-folded task               -> NameRow
    meta       format, id

Rows are little-endian structs. Version and name rows end with a CRC32 of key and row, because LMDB pages have no
checksum; tensors are checked against their digests, manifests against their hashes.
"""

import errno
import os
import shutil
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import lmdb

from pear_store.digest import ITEM_BYTES
from pear_store.errors import DamagedError, DiskFullError, FormatError, PearStoreError

INDEX_FORMAT = b"1"
_DATABASES = (b"tensors", b"packs", b"manifests", b"versions", b"names", b"meta")
_DTYPES = tuple(ITEM_BYTES)
_MAP_BYTES = (1 << 40, 1 << 34, 1 << 30)  # a map is address space only; smaller where the system limits that
_FULL_BYTES = 4 << 20  # LMDB reports a full disk as an input/output error; below this much free space we believe it is
T = TypeVar("T")
Txn = lmdb.Transaction


@dataclass(frozen=True)
class TensorRow:
    """Where a tensor lies: pack hash, bytes from the pack's start, length in bytes, dtype and shape."""

    pack: bytes
    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]

    def encode(self) -> bytes:
        head = struct.pack("<32sQQBB", self.pack, self.offset, self.length, _DTYPES.index(self.dtype), len(self.shape))
        return head + struct.pack(f"<{len(self.shape)}Q", *self.shape)

    @classmethod
    def decode(cls, row: bytes) -> "TensorRow":
        try:
            pack, offset, length, dtype, dimensions = struct.unpack_from("<32sQQBB", row)
            return cls(pack, offset, length, _DTYPES[dtype], struct.unpack_from(f"<{dimensions}Q", row, 50))
        except (struct.error, IndexError):
            raise DamagedError("a tensor's index row", "it cannot be read") from None


@dataclass(frozen=True)
class PackRow:
    """A pack's size on disk and the bytes of its tensors."""

    file_bytes: int
    tensor_bytes: int

    def encode(self) -> bytes:
        return struct.pack("<QQ", self.file_bytes, self.tensor_bytes)

    @classmethod
    def decode(cls, row: bytes) -> "PackRow":
        try:
            return cls(*struct.unpack("<QQ", row))
        except struct.error:
            raise DamagedError("a pack's index row", "it cannot be read") from None


@dataclass(frozen=True)
class VersionRow:
    """A version: its manifest's hash, the pack that records it, when it was added, its tensors' bytes."""

    manifest: bytes
    pack: bytes
    time_ns: int
    size_bytes: int

    def encode(self, key: bytes) -> bytes:
        return _sealed(key, struct.pack("<32s32sQQ", self.manifest, self.pack, self.time_ns, self.size_bytes))

    @classmethod
    def decode(cls, key: bytes, row: bytes) -> "VersionRow":
        return cls(*struct.unpack("<32s32sQQ", _unsealed(key, row)))


@dataclass(frozen=True)
class NameRow:
    """A task's name as written, and the highest version number that it ever had."""

    name: str
    highest: int

    def encode(self, key: bytes) -> bytes:
        return _sealed(key, struct.pack("<I", self.highest) + self.name.encode("ascii"))

    @classmethod
    def decode(cls, key: bytes, row: bytes) -> "NameRow":
        body = _unsealed(key, row)
        return cls(body[4:].decode("ascii"), int.from_bytes(body[:4], "little"))


def _sealed(key: bytes, body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(key + body))


def _unsealed(key: bytes, row: bytes) -> bytes:
    body, checksum = row[:-4], row[-4:]
    if struct.pack("<I", zlib.crc32(key + body)) != checksum:
        raise DamagedError(f"index row {key!r}", "its checksum differs")
    return body


def version_key(task: str, version: int) -> bytes:
    return task.encode("ascii") + b"\0" + version.to_bytes(4, "big")


def parse_version_key(key: bytes) -> tuple[str, int]:
    return key[:-5].decode("ascii"), int.from_bytes(key[-4:], "big")


def name_key(task: str) -> bytes:
    return task.casefold().encode("ascii")


class Index:
    """One open environment. Use :func:`open_index`: LMDB allows one per process and directory."""

    def __init__(self, path: Path, create: bool) -> None:
        self.path = path
        self.pid = os.getpid()
        with self._translated():
            for size in _MAP_BYTES:
                try:
                    self._env = lmdb.open(
                        str(path), map_size=size, max_dbs=16, max_readers=1024, create=create, sync=True,
                        writemap=False, metasync=True,
                    )  # fmt: skip
                    break
                except lmdb.MemoryError:
                    if size == _MAP_BYTES[-1]:
                        raise
            self._env.reader_check()
            self._dbs = {name: self._env.open_db(name, create=create) for name in _DATABASES}
        if create:
            self.write(lambda txn: self.put(txn, "meta", b"format", INDEX_FORMAT))
            self.write(lambda txn: self.put(txn, "meta", b"id", uuid4().hex.encode()))
        with self.read() as txn:
            found = self.get(txn, "meta", b"format")
        if found != INDEX_FORMAT:
            raise FormatError(f"{path}: store format {found!r}: this Pear reads {INDEX_FORMAT!r}; install a newer one")

    def close(self) -> None:
        self._env.close()

    def get(self, txn: Txn, db: str, key: bytes) -> bytes | None:
        value = txn.get(key, db=self._dbs[db.encode()])
        return None if value is None else bytes(value)

    def put(self, txn: Txn, db: str, key: bytes, value: bytes) -> None:
        txn.put(key, value, db=self._dbs[db.encode()])

    def delete(self, txn: Txn, db: str, key: bytes) -> None:
        txn.delete(key, db=self._dbs[db.encode()])

    def rows(self, txn: Txn, db: str, prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Keys and values in key order, from the first that starts with the prefix to the last that does."""
        cursor = txn.cursor(db=self._dbs[db.encode()])
        found = cursor.set_range(prefix) if prefix else cursor.first()
        if not found:
            return
        for key, value in cursor:
            if not bytes(key).startswith(prefix):
                return
            yield bytes(key), bytes(value)

    def last(self, txn: Txn, db: str, prefix: bytes) -> tuple[bytes, bytes] | None:
        """The last row whose key starts with the prefix."""
        cursor = txn.cursor(db=self._dbs[db.encode()])
        found = cursor.set_range(prefix + b"\xff" * 8)
        found = cursor.prev() if found else cursor.last()
        if found and bytes(cursor.key()).startswith(prefix):
            return bytes(cursor.key()), bytes(cursor.value())
        return None

    @contextmanager
    def read(self) -> Iterator[Txn]:
        """A consistent view, untouched by writers."""
        with self._translated():
            try:
                txn = self._env.begin()
            except lmdb.MapResizedError:
                self._env.set_mapsize(0)
                txn = self._env.begin()
            with txn:
                yield txn

    def write(self, change: Callable[[Txn], T]) -> T:
        """Runs `change` in the one write transaction there can be, and commits; again, if the map had to grow."""
        with self._translated():
            while True:
                try:
                    with self._env.begin(write=True) as txn:
                        return change(txn)
                except lmdb.MapFullError:
                    self._env.set_mapsize(self._env.info()["map_size"] * 2)
                except lmdb.MapResizedError:
                    self._env.set_mapsize(0)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (lmdb.MapFullError, lmdb.MapResizedError):
            raise
        except (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.PanicError) as error:
            raise DamagedError(f"index {self.path}", str(error)) from None
        except (lmdb.Error, OSError) as error:
            code = getattr(error, "code", None) or getattr(error, "errno", None)
            full = code in (errno.ENOSPC, errno.EDQUOT)
            if code == errno.EIO or "Input/output error" in str(error):
                full = shutil.disk_usage(self.path.parent).free < _FULL_BYTES
            if full:
                raise DiskFullError(self.path.parent) from None
            raise PearStoreError(f"{self.path.parent}: {error}") from None


_open: dict[tuple[int, str], tuple[Index, int]] = {}
_lock = threading.Lock()


def _after_fork() -> None:
    """Lets go of the parent's environments in a forked child; LMDB forbids using them there."""
    for index, _ in _open.values():
        index.close()
    _open.clear()
    _lock.release()


os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_after_fork)


def open_index(path: Path, create: bool = False) -> Index:
    """This process's environment for the directory, opened once however many stores use it."""
    with _lock:
        key = (os.getpid(), str(path.resolve()))
        index, uses = _open.get(key, (None, 0))
        if index is None:
            index = Index(path, create)
        _open[key] = (index, uses + 1)
        return index


def release_index(index: Index) -> None:
    """Closes the environment when its last user has released it."""
    with _lock:
        key = (index.pid, str(index.path.resolve()))
        if index.pid != os.getpid() or key not in _open:
            return
        _, uses = _open[key]
        if uses > 1:
            _open[key] = (index, uses - 1)
        else:
            del _open[key]
            index.close()
