"""The index: an LMDB environment that says what a store holds and where.

    tensors    32-byte digest                 -> TensorRow
    packs      32-byte hash                   -> PackRow
    contents   32-byte hash                   -> ContentsRow
    manifests  32-byte hash                   -> ManifestRow
    versions   task, NUL, big-endian number   -> VersionRow
    names      case-folded task               -> NameRow
    tags       task, NUL, tag                 -> TagRow
    removed    task, NUL, big-endian number   -> RemovedRow
    meta       format, id, next_number, commit

Rows are little-endian structs that end with a CRC32 of key and row, because LMDB pages have no checksum (a manifest's
has one of its numbers; its bytes are checked against their hash). Only the format has none: other text is refused. A
task's newest version is in its name's row, too, so that a version which a damaged page hides is missed.
"""

import atexit
import errno
import fcntl
import importlib
import os
import struct
import threading
import zlib
from array import array
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import lmdb

from pear_store.errors import AccessError, DamagedError, DamagedIndexError, DiskFullError, FormatError, PearStoreError
from pear_store.format.digest import ITEM_BYTES, fresh_name
from pear_store.format.pack import Commit
from pear_store.local.directory import check_index, open_folder

INDEX_FORMAT = b"4"
UNSEALED_FORMAT = b"3"
"""Like 4, but the rows of `meta` have no checksum. The first write adds it."""
TABLES = ("tensors", "packs", "contents", "manifests", "versions", "names", "tags", "removed", "meta")
_DTYPES = tuple(ITEM_BYTES)
_MAP_BYTES = (1 << 40, 1 << 34, 1 << 30)  # a map is address space only; smaller where the system limits that
_FULL_BYTES = 4 << 20  # LMDB reports a full disk as an input/output error; below this much free space we believe it is
_LOCK_BYTES = 128 << 10  # a header and 64 bytes for each of 1,024 readers
_MANIFEST_BYTES = 8 << 20  # more than any manifest that add accepts
_MOST_HEADS = 64
"""Packs that a commit follows; more than one only where several processes add at once"""
T = TypeVar("T")


class TensorRow(NamedTuple):
    """Where a tensor lies: its number, pack hash, bytes from the pack's start, length in bytes, dtype and shape.

    Numbers count up over the tensors ever stored; gc marks by them. A tensor that a version needs and that no pack
    has is listed in the pack NO_PACK.
    """

    number: int
    pack: bytes
    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]

    def encode(self, key: bytes) -> bytes:
        dtype = _DTYPES.index(self.dtype)
        head = _TENSOR.pack(self.number, self.pack, self.offset, self.length, dtype, len(self.shape))
        return _sealed(key, head + _SHAPES[len(self.shape)].pack(*self.shape))

    @classmethod
    def decode(cls, key: bytes, row: bytes) -> "TensorRow":
        return cls.peek(_unsealed(key, row))

    @staticmethod
    def number_of(row: bytes) -> int:
        return int.from_bytes(row[:4], "little")

    @staticmethod
    def number_and_length(row: bytes) -> tuple[int, int]:
        """Without a look at the checksum."""
        try:
            number, length = _NUMBER_AND_LENGTH.unpack_from(row)
        except struct.error:
            raise DamagedError("a tensor's index row", "it cannot be read") from None
        return number, length

    @classmethod
    def peek(cls, row: bytes) -> "TensorRow":
        """The row without a look at its checksum, where the tensor is hashed anyway."""
        try:
            number, pack, offset, length, dtype, dimensions = _TENSOR.unpack_from(row)
            return cls(number, pack, offset, length, _DTYPES[dtype], _SHAPES[dimensions].unpack_from(row, _TENSOR.size))
        except (struct.error, IndexError):
            raise DamagedError("a tensor's index row", "it cannot be read") from None


_TENSOR = struct.Struct("<I32sQQBB")
_NUMBER_AND_LENGTH = struct.Struct("<I40xQ")
_SHAPES = [struct.Struct(f"<{dimensions}Q") for dimensions in range(9)]
NO_PACK = bytes(32)


@dataclass(frozen=True)
class PackRow:
    """A pack's size on disk and the bytes of its tensors."""

    file_bytes: int
    tensor_bytes: int

    def encode(self, key: bytes) -> bytes:
        return _sealed(key, struct.pack("<QQ", self.file_bytes, self.tensor_bytes))

    @classmethod
    def decode(cls, key: bytes, row: bytes) -> "PackRow":
        return cls(*_opened("<QQ", key, row))


@dataclass(frozen=True)
class ContentsRow:
    """The tensors that the index lists in a pack: their numbers, their lengths in bytes, and which of them (1) an
    earlier gc has counted as removed. Those lie in the pack until it goes; an add may use them again."""

    numbers: "array[int]"
    lengths: "array[int]"
    removed: bytes

    def encode(self, key: bytes) -> bytes:
        body = zlib.compress(self.numbers.tobytes() + self.lengths.tobytes() + self.removed, 1)
        return _sealed(key, len(self.numbers).to_bytes(4, "little") + body)

    @classmethod
    def decode(cls, key: bytes, row: bytes, at_most: int) -> "ContentsRow":
        """The row, if it lists no more tensors than the index has: few bytes can say that they stand for terabytes."""
        row = _unsealed(key, row)
        count = int.from_bytes(row[:4], "little")
        if count > at_most:
            raise DamagedError(f"contents of pack {key.hex()}", f"it lists {count} tensors, the index has {at_most}")
        try:
            body = zlib.decompressobj().decompress(row[4:], 13 * count + 1)
        except zlib.error:
            body = b""
        if len(body) != 13 * count:
            raise DamagedError(f"contents of pack {key.hex()}", "its length is wrong")
        return cls(array("I", body[: 4 * count]), array("Q", body[4 * count : 12 * count]), body[12 * count :])

    def without(self, numbers: Container[int]) -> "ContentsRow":
        stays = [number not in numbers for number in self.numbers]
        return ContentsRow(
            array("I", compress(self.numbers, stays)), array("Q", compress(self.lengths, stays)),
            bytes(compress(self.removed, stays)),
        )  # fmt: skip


@dataclass(frozen=True)
class ManifestRow:
    """A manifest's own number and the numbers of the tensors that it names; behind them, compressed, where those
    tensors lay when it was added, and the manifest.

    The manifest is not checked here: whoever uses it hashes it. The numbers carry a checksum of their own. The places
    are hints: a tensor is hashed when it is read, and looked up in its own row where the hint no longer holds.
    """

    number: int
    tensors: memoryview

    @staticmethod
    def encode(key: bytes, number: int, rows: Sequence[bytes], manifest: bytes) -> bytes:
        """A row; `rows` are the encoded ones of the tensors, in the order of their digests."""
        numbers = array("I", [number, *sorted(TensorRow.number_of(row) for row in rows)]).tobytes()
        packs: dict[bytes, bytes] = {}
        for row in rows:
            packs.setdefault(row[4:36], len(packs).to_bytes(2, "little"))
        hints = b"".join([packs[row[4:36]] + row[36:-4] for row in rows])
        press = zlib.compressobj(1, zdict=_USUAL)
        pressed = press.compress(_HINTS.pack(len(packs), len(rows), len(hints)) + b"".join(packs) + hints + manifest)
        head = struct.pack("<II", zlib.crc32(key + numbers), len(numbers) // 4)
        return head + numbers + pressed + press.flush()

    @classmethod
    def decode(cls, key: bytes, row: bytes) -> "ManifestRow":
        end = 8 + 4 * int.from_bytes(row[4:8], "little")
        if not 12 <= end <= len(row) or zlib.crc32(key + row[8:end]) != int.from_bytes(row[:4], "little"):
            raise DamagedError(f"index row of manifest {key.hex()}", "its checksum differs")
        numbers = memoryview(row)[8:end].cast("I")
        return cls(numbers[0], numbers[1:])

    @staticmethod
    def number_of(row: bytes) -> int:
        """The manifest's number, without a look at the checksum."""
        return int.from_bytes(row[8:12], "little")

    @staticmethod
    def unpack(row: bytes) -> tuple[bytes, list[TensorRow]]:
        """The manifest's bytes, unchecked, and the hints; empty if they cannot be had."""
        try:
            body = ManifestRow._body(row)
            packs, count, _ = _HINTS.unpack_from(body)
            at = _HINTS.size + 32 * packs
            names = [body[begin : begin + 32] for begin in range(_HINTS.size, at, 32)]
            places = []
            for _ in range(count):
                pack, offset, length, dtype, axes = _PLACE.unpack_from(body, at)
                shape = _SHAPES[axes].unpack_from(body, at + _PLACE.size)
                places.append(TensorRow(0, names[pack], offset, length, _DTYPES[dtype], shape))
                at += _PLACE.size + 8 * axes
            return body[at:], places
        except (zlib.error, struct.error, IndexError):
            return b"", []

    @staticmethod
    def manifest_of(row: bytes) -> bytes:
        """The manifest's bytes, unchecked; empty if they cannot be had."""
        try:
            body = ManifestRow._body(row)
            packs, _, hint_bytes = _HINTS.unpack_from(body)
            return body[_HINTS.size + 32 * packs + hint_bytes :]
        except (zlib.error, struct.error):
            return b""

    @staticmethod
    def _body(row: bytes) -> bytes:
        press = zlib.decompressobj(zdict=_USUAL)
        return press.decompress(row[8 + 4 * int.from_bytes(row[4:8], "little") :], _MANIFEST_BYTES)


_HINTS = struct.Struct("<HHI")
_PLACE = struct.Struct("<HQQBB")
_USUAL = (
    b'"scale":"training":{"epochs":,"method":"pear","ratio":0.5,"seed":0},"metrics":{"test_top1":0.,"val_top1":0.'
    b'"blocks.0.mlp.fc1.fc2.attn.qkv.proj":[["a3",1.0],["a12",0.0]],"format":"pear-task/1",'
    b'"head":{"bias":"sha256:","weight":"sha256:"},"labels":["'
    b'"backbone":{"digest":"sha256:","model":"vit_base_patch16_224.augreg_in21k"},"preprocess":{"crop_mode":"center",'
    b'"crop_pct":0.9,"input_size":[3,224,224],"interpolation":"bicubic","mean":[0.485,0.456,0.406],'
    b'"std":[0.229,0.224,0.225]},"mean":[0.5,0.5,0.5],"std":[0.5,0.5,0.5]},"task":"'
    b'"positions":{"blocks.0.attn":[["a0",1.0]],"blocks.1.mlp":[["a1",1.0]],"blocks.10.attn":[["'
    b'{"activation":"identity","adapters":{"a1":{"down":"sha256:","up":"sha256:"},"a2":{"down":"sha256:'
)
"""zlib's preset dictionary: what manifests have in common. Part of the format."""


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
        return cls(*cls.fields(key, row))

    @staticmethod
    def fields(key: bytes, row: bytes) -> tuple[bytes, bytes, int, int]:
        """Manifest, pack, time and bytes."""
        manifest, pack, time_ns, size_bytes = _opened("<32s32sQQ", key, row)
        return manifest, pack, time_ns, size_bytes


@dataclass(frozen=True)
class NameRow:
    """A task's name as written, its newest version (0: none is left), the highest number that it ever had, and the
    pack that records that."""

    name: str
    newest: int
    highest: int
    pack: bytes

    def encode(self, key: bytes) -> bytes:
        return _sealed(key, _NAME.pack(self.newest, self.highest, self.pack) + self.name.encode("ascii"))

    @classmethod
    def decode(cls, key: bytes, row: bytes) -> "NameRow":
        name, newest, highest, pack = cls.fields(key, row)
        try:
            return cls(name.decode("ascii"), newest, highest, pack)
        except UnicodeDecodeError:
            raise DamagedError(f"index row {_shown(key)}", "its name is not ASCII") from None

    @staticmethod
    def fields(key: bytes, row: bytes) -> tuple[bytes, int, int, bytes]:
        """Name, newest, highest and pack."""
        body = _unsealed(key, row)
        if not _NAME.size < len(body) <= _NAME.size + _MOST_NAME_BYTES:
            raise DamagedError(f"index row {_shown(key)}", "its length is wrong")
        newest, highest, pack = _NAME.unpack_from(body)
        return body[_NAME.size :], newest, highest, pack


_NAME = struct.Struct("<II32s")
_MOST_NAME_BYTES = 100


@dataclass(frozen=True)
class TagRow:
    """What a tag stands for, since when, and the pack that records it."""

    version: int
    time_ns: int
    pack: bytes

    def encode(self, key: bytes) -> bytes:
        return _sealed(key, struct.pack("<IQ32s", self.version, self.time_ns, self.pack))

    @classmethod
    def decode(cls, key: bytes, row: bytes) -> "TagRow":
        return cls(*_opened("<IQ32s", key, row))


@dataclass(frozen=True)
class RemovedRow:
    """A version (or tag) that was removed: the pack that still records it, and the pack that records its removal."""

    recorded_in: bytes
    pack: bytes

    def encode(self, key: bytes) -> bytes:
        return _sealed(key, self.recorded_in + self.pack)

    @classmethod
    def decode(cls, key: bytes, row: bytes) -> "RemovedRow":
        return cls(*_opened("<32s32s", key, row))


def _shown(key: bytes) -> str:
    """A key in a message: of a hostile one, which may be long, the beginning."""
    return repr(key) if len(key) <= _MOST_SHOWN_BYTES else f"{key[:_MOST_SHOWN_BYTES]!r}…"


_MOST_SHOWN_BYTES = 150  # more than any key of a task and a tag has


def _sealed(key: bytes, body: bytes) -> bytes:
    return body + zlib.crc32(key + body).to_bytes(4, "little")


def _unsealed(key: bytes, row: bytes) -> bytes:
    body = row[:-4]
    if zlib.crc32(key + body).to_bytes(4, "little") != row[-4:]:
        raise DamagedError(f"index row {_shown(key)}", "its checksum differs")
    return body


def _opened(form: str, key: bytes, row: bytes) -> tuple[Any, ...]:
    try:
        return struct.unpack(form, _unsealed(key, row))
    except struct.error:
        raise DamagedError(f"index row {_shown(key)}", "its length is wrong") from None


def version_key(task: str, version: int) -> bytes:
    return task.encode("ascii") + b"\0" + version.to_bytes(4, "big")


def parse_version_key(key: bytes) -> tuple[str, int]:
    try:
        if key[-5:-4] != b"\0":
            raise ValueError
        return key[:-5].decode("ascii"), int.from_bytes(key[-4:], "big")
    except ValueError:
        raise DamagedError(f"index key {_shown(key)}", "it is no version's") from None


def tag_key(task: str, tag: str) -> bytes:
    return f"{task}\0{tag}".encode("ascii")


def parse_tag_key(key: bytes) -> tuple[str, str]:
    try:
        task, tag = key.decode("ascii").split("\0")
        return task, tag
    except ValueError:
        raise DamagedError(f"index key {_shown(key)}", "it is no tag's") from None


def name_key(task: str) -> bytes:
    return task.casefold().encode("ascii")


State = tuple[tuple[int, int], int]
"""An environment and a commit to it"""


class _Inherited:
    """In a forked child, what stands for a transaction of its parent: ending that one would free the parent's place
    among LMDB's readers, and what it reads may be overwritten."""

    def __getattr__(self, name: str) -> Any:
        raise PearStoreError("this began before the process was forked: begin it again in the child")


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
        """Whether this process was forked since this view was begun, so that it is the parent's."""
        return isinstance(self._txn, _Inherited)

    def begin(self, environment: lmdb.Environment, write: bool) -> None:
        self._txn = environment.begin(write=write)

    def check_own(self) -> None:
        """Raises a PearStoreError in a child that was forked since this view was begun."""
        if self.is_inherited:
            self.commit()

    def commit(self) -> None:
        self._txn.commit()

    def end(self) -> None:
        """Ends the transaction; what was not committed is undone."""
        if not self.is_inherited:
            self._txn.abort()

    def forget(self) -> lmdb.Transaction:
        """Leaves the transaction to the parent of this process; returns it, for it may not be destroyed."""
        txn, self._txn = self._txn, cast(lmdb.Transaction, _Inherited())
        return txn

    @property
    def id(self) -> int:
        """The last commit that a reader sees; a writer's own, which counts only if it writes something: else the next
        writer has it, too."""
        number: int = self._txn.id()
        return number

    @property
    def state(self) -> State:
        """What this view sees if it reads, what the next will see if it is a writer that wrote something: equal states
        hold equal rows."""
        return self.environment, self.id

    @property
    def before(self) -> State:
        """What a writer began with."""
        return self.environment, self.id - 1

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
        """Keys and values in key order, from the first that starts with the prefix to the last that does."""
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

    def drop_pack(self, pack: bytes) -> None:
        """Deletes a pack's rows; those of its tensors are the caller's."""
        self.delete("packs", pack)
        self.delete("contents", pack)

    def list_tensors(self, pack: bytes, numbers: Iterable[int], lengths: Iterable[int]) -> None:
        """Enters which tensors a new pack holds; none of them is listed elsewhere."""
        row = ContentsRow(array("I", numbers), array("Q", lengths), b"")
        row = ContentsRow(row.numbers, row.lengths, bytes(len(row.numbers)))
        self.put("contents", pack, row.encode(pack))

    def unlist_tensors(self, pack: bytes, numbers: Container[int]) -> None:
        """Takes tensors that moved elsewhere from a pack's contents."""
        if self.get("contents", pack) is not None:
            self.put("contents", pack, self.contents(pack).without(numbers).encode(pack))

    def contents(self, pack: bytes) -> ContentsRow:
        """What the index lists in a pack.

        Raises:
            DamagedError: the row is missing or damaged.
        """
        return ContentsRow.decode(pack, self.get("contents", pack) or b"", self.count("tensors"))

    def every_contents(self) -> Iterator[tuple[bytes, ContentsRow]]:
        """Like :meth:`every`, of `contents`."""
        at_most = self.count("tensors")
        for pack, row in self.every("contents"):
            yield pack, ContentsRow.decode(pack, row, at_most)

    def take_numbers(self, count: int) -> int:
        """The first of `count` tensor numbers that were never used."""
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
        if not body and self._is_unsealed and not (self.count("contents") or self.count("manifests")):
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
        return row or b"" if not row or self._is_unsealed else _unsealed(key, row)

    def put_meta(self, key: bytes, body: bytes) -> None:
        self.put("meta", key, _sealed(key, body))

    def next_commit(self) -> Commit:
        """What a commit after all that this view sees is."""
        body = self.meta(b"commit")
        packs = tuple(body[at : at + 32] for at in range(8, len(body), 32))
        return Commit(self.meta(b"id").decode("ascii", "replace"), int.from_bytes(body[:8], "little") + 1, packs)

    def enter_commit(self, pack: bytes, commit: Commit) -> None:
        """Makes a pack one that the next commit follows, in the place of those that it follows itself. What another
        process wrote meanwhile stays, for nothing follows that yet."""
        now = self.next_commit()
        self.put_commit(max(now.number - 1, commit.number), [p for p in now.after if p not in commit.after] + [pack])

    def put_commit(self, number: int, packs: Sequence[bytes]) -> None:
        self.put_meta(b"commit", number.to_bytes(8, "little") + b"".join(packs[-_MOST_HEADS:]))

    def seal_meta(self) -> None:
        """Makes an index of format 3 one of format 4.

        Raises:
            DamagedError: the count of numbers, which had no checksum, contradicts the numbers in use.
        """
        if not self._is_unsealed:
            return
        number, store = self.next_number(), self.meta(b"id")
        for _, contents in self.every_contents():
            self._check_below(number, contents.numbers)
        for key, row in self.every("manifests"):
            manifest = ManifestRow.decode(key, row)
            self._check_below(number, (manifest.number, *manifest.tensors))
        self.put("meta", b"format", INDEX_FORMAT)
        self.put_meta(b"next_number", number.to_bytes(8, "little"))
        self.put_meta(b"id", store)

    @staticmethod
    def _check_below(next_number: int, numbers: Iterable[int]) -> None:
        if max(numbers, default=-1) >= next_number:
            raise DamagedError("the index's count of numbers", f"{next_number}, though higher ones are in use")


def _reserve_lock(path: Path) -> None:
    """Gives LMDB's lock file its space: LMDB writes to it through a map, and on a full disk that kills the process."""
    if path.exists() or not path.parent.exists():
        return
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, _LOCK_BYTES)
        else:  # macOS
            file.write(bytes(_LOCK_BYTES))


def _free_bytes(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


def _code(error: Exception) -> int | None:
    """The number of an error of the system's, of LMDB's too."""
    code = getattr(error, "code", None) or getattr(error, "errno", None)
    known = {os.strerror(number): number for number in (*_DENIED, errno.ENOENT)}
    return code or next((number for text, number in known.items() if str(error).endswith(text)), None)


class OvertakenError(PearStoreError):
    """What a reader saw that may not lock the index may have been overwritten meanwhile: it has to look again."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path}: writers were faster than this reader, which may not write and so cannot lock; run again later"
        )


class IndexReplacedError(Exception):
    """The directory holds another environment now: a rebuild has put it there."""


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
                self.identity = self._found()
            except (OSError, lmdb.Error) as error:
                if _code(error) == errno.ENOENT:
                    raise IndexReplacedError from None
                raise
            if before not in (None, self.identity):  # a rebuild replaced it meanwhile, and which of both is open?
                self._env.close()
                raise IndexReplacedError
            self._env.reader_check()
            meta: Any = self._env.open_db(b"meta", create=create)
            if create:
                with self._env.begin(write=True, db=meta) as txn:
                    txn.put(b"format", INDEX_FORMAT)
                    txn.put(b"id", _sealed(b"id", fresh_name().encode()))
                    txn.put(b"next_number", _sealed(b"next_number", bytes(8)))
            with self._env.begin(db=meta) as txn:
                found_format = cast(bytes, txn.get(b"format", b"unknown"))
            self._sealed = found_format == INDEX_FORMAT
            if not self._sealed and found_format != UNSEALED_FORMAT:
                self._env.close()
                older = found_format.isdigit() and int(found_format) < int(INDEX_FORMAT)
                remedy = "'pear-store rebuild' makes it anew from the packs"
                if not older:
                    remedy = f"use the Pear that wrote it; if none did, it is damaged, and {remedy}"
                raise FormatError(
                    f"{path.parent}: index format {found_format.decode('ascii', 'replace')!r}: this Pear reads "
                    f"{INDEX_FORMAT.decode()!r}; {remedy}"
                )
            self._tables = {name: self._env.open_db(name.encode(), create=create) for name in TABLES}
        _processes.indexes.add(self)

    def _open(self, create: bool) -> bool:
        """Opens the environment, to be read only where it may not be written; says whether even without LMDB's lock.

        Writers do not know of a reader without the lock, and overwrite what it reads: see :meth:`_check_overtaken`.
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
        raise PearStoreError(f"{self.path.parent}: the system gives no address space for its index")

    @property
    def is_current(self) -> bool:
        """Whether the environment is still the one that the directory holds."""
        try:
            return self._found() == self.identity
        except OSError:
            return False

    def _found(self) -> tuple[int, int]:
        found = os.stat(self._file)
        return found.st_dev, found.st_ino

    def close(self) -> None:
        """Closes the environment, once the last view of it has ended."""
        self._closed = True
        if not self._views and self in _processes.indexes:
            _processes.indexes.discard(self)
            self._env.close()

    def forget(self) -> list[Any]:
        """In a forked child: leaves all to the parent. Returns what may not be destroyed in here."""
        left = [self._env, *(view.forget() for view in self._views)]
        self._views.clear()
        return left

    def read(self) -> AbstractContextManager[View]:
        """A consistent view, untouched by writers. It begins at once; the caller enters it at once.

        Raises:
            IndexReplacedError: it was closed, because another took its place.
        """
        with self._translated:
            try:
                view = self._begin()
            except lmdb.MapResizedError:  # not before all views of this process have ended
                self._env.set_mapsize(0)
                view = self._begin()
        return _Within(self, view)

    def _begin(self, write: bool = False) -> View:
        view = View(cast(lmdb.Transaction, None), self._tables, self.identity)
        self._views.add(view)
        try:
            if self._closed:  # seen by now, or else its closing sees this view
                raise IndexReplacedError
            view.begin(self._env, write)
        except BaseException:
            self._discard(view)
            raise
        return view

    def _discard(self, view: View) -> None:
        self._views.discard(view)
        if self._closed:
            self.close()

    def end(self, view: View) -> None:
        """Ends a view; what it wrote and did not commit is undone.

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
        """LMDB reuses a page two commits after the one that freed it, unless it knows of a reader before that."""
        if not view.is_inherited and self._env.info()["last_txnid"] > view.id + 1:
            raise OvertakenError(self.path.parent)

    def write(self, change: Callable[[View], T]) -> T:
        """Runs `change` in the one write transaction there can be, and commits; again, if the map had to grow.

        Raises:
            IndexReplacedError: nothing was done; open the index anew.
        """
        with self._translated, write_lock(self.path.parent):
            if not self.is_current:
                raise IndexReplacedError
            if not self._sealed:
                try:
                    self.fill(View.seal_meta)
                except DamagedError as error:
                    raise DamagedIndexError(self.path, f"{error.what}: {error.found}") from None
                self._sealed = True
            return self.fill(change)

    def fill(self, change: Callable[[View], T]) -> T:
        """Like :meth:`write`, for an index that no other process can know of: without the lock."""
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
        """Raises LMDB's and the system's errors as ours."""
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
    """In its context, LMDB's and the system's errors become ours. These two are classes, for every read enters them,
    and a generator takes three times as long."""

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


@contextmanager
def write_lock(root: Path) -> Iterator[None]:
    """Excludes all other writers of a store; the system lets go of it when its holder dies.

    LMDB has a lock of its own, but in the environment that a rebuild replaces.
    """
    held = _HeldLock()
    try:
        with _processes.opening:  # a fork meanwhile would give the child a lock that it does not know of
            with open_folder(root) as folder:
                held.handle = folder.open("lock", os.O_RDWR | os.O_CREAT)
            _processes.locks.add(held)
        fcntl.flock(held.handle, fcntl.LOCK_EX)
        yield
    finally:
        _processes.locks.discard(held)
        held.close()


# ---- processes ------------------------------------------------------------------------------------------------------
#
# A forked child has copies of its parent's environments, transactions and locks. It uses none and ends none:
#
# - to close an environment would wait for ever for threads that the child does not have;
# - to end a transaction would free the parent's place among the readers, whose pages a writer then overwrites;
# - the lock on the file "lock" is one for both as long as either has the file open, so the child closes its copy.


@dataclass(eq=False)
class _HeldLock:
    """The open file "lock"; -1: not open in this process."""

    handle: int = -1

    def close(self) -> None:
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1


@dataclass
class _Processes:
    """What this process has open, and what it must never destroy because it is its parent's."""

    open: dict[tuple[int, int, int], tuple[Index, int]] = field(default_factory=dict)
    """Environments by process and file, and how many stores use each"""
    indexes: set[Index] = field(default_factory=set)
    """All that are not closed, those included that wait for their last view"""
    locks: set[_HeldLock] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Of `open`"""
    opening: Any = field(default_factory=threading.RLock)  # reentrant: a signal's handler may fork
    parents: list[Any] = field(default_factory=list)

    def after_fork(self) -> None:
        """In a forked child."""
        self.lock, self.opening = threading.Lock(), threading.RLock()
        for held in self.locks:
            held.close()
        for index in self.indexes:
            self.parents += index.forget()
        for kept in (self.open, self.indexes, self.locks):
            kept.clear()
        if self.parents:
            atexit.register(_keep_for_ever, self.parents)


def _keep_for_ever(objects: list[Any]) -> None:
    """Gives each a reference that nobody owns: the end of the interpreter would destroy, that is close, them."""
    import ctypes

    for one in objects:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))


_processes = _Processes()
os.register_at_fork(
    before=lambda: _processes.opening.acquire(),
    after_in_parent=lambda: _processes.opening.release(),
    after_in_child=lambda: _processes.after_fork(),
)


def _open_environment(path: bytes, **options: Any) -> lmdb.Environment:
    """lmdb.open, also in a forked child: py-lmdb refuses what it believes this process to have open, and in a child it
    believes that of what the parent has open."""
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
    """This process's environment for the directory, opened once however many stores use it.

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
            index = Index(path, create)
        _processes.open[(index.pid, *index.identity)] = (index, uses + 1)
        return index


def release_index(index: Index) -> None:
    """Closes the environment when its last user has released it."""
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
