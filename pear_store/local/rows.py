"""The rows of the index, by table: what each says, its key and its bytes.

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

import struct
import zlib
from array import array
from collections.abc import Container, Iterable, Sequence
from itertools import compress
from typing import Any, NamedTuple

from pear_store.errors import DamagedError
from pear_store.format.deflate import deflated, inflated
from pear_store.format.digest import ITEM_BYTES

NO_PACK = bytes(32)
_DTYPES = tuple(ITEM_BYTES)
_MANIFEST_BYTES = 8 << 20  # more than any manifest that add accepts


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
        return sealed(key, head + _SHAPES[len(self.shape)].pack(*self.shape))

    @classmethod
    def decode(cls, key: bytes, row: bytes) -> "TensorRow":
        return cls.peek(unsealed(key, row))

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


class PackRow(NamedTuple):
    """A pack's size on disk and the bytes of its tensors."""

    file_bytes: int
    tensor_bytes: int

    def encode(self, key: bytes) -> bytes:
        return sealed(key, struct.pack("<QQ", self.file_bytes, self.tensor_bytes))

    @classmethod
    def decode(cls, key: bytes, row: bytes) -> "PackRow":
        return cls(*_opened("<QQ", key, row))


class ContentsRow(NamedTuple):
    """The tensors that the index lists in a pack: their numbers, their lengths in bytes, and which of them (1) an
    earlier gc has counted as removed. Those lie in the pack until it goes; an add may use them again."""

    numbers: "array[int]"
    lengths: "array[int]"
    removed: bytes

    def encode(self, key: bytes) -> bytes:
        body = zlib.compress(self.numbers.tobytes() + self.lengths.tobytes() + self.removed, 1)
        return sealed(key, len(self.numbers).to_bytes(4, "little") + body)

    @classmethod
    def decode(cls, key: bytes, row: bytes, at_most: int) -> "ContentsRow":
        """The row, if it lists no more tensors than the index has: few bytes can say that they stand for terabytes."""
        row = unsealed(key, row)
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

    @classmethod
    def of(cls, numbers: Iterable[int], lengths: Iterable[int]) -> "ContentsRow":
        """Of tensors none of which was counted as removed."""
        listed = array("I", numbers)
        return cls(listed, array("Q", lengths), bytes(len(listed)))

    def with_more(self, numbers: Iterable[int], lengths: Iterable[int]) -> "ContentsRow":
        more = ContentsRow.of(numbers, lengths)
        return ContentsRow(self.numbers + more.numbers, self.lengths + more.lengths, self.removed + more.removed)

    def without(self, numbers: Container[int]) -> "ContentsRow":
        stays = [number not in numbers for number in self.numbers]
        return ContentsRow(
            array("I", compress(self.numbers, stays)), array("Q", compress(self.lengths, stays)),
            bytes(compress(self.removed, stays)),
        )  # fmt: skip


class ManifestRow(NamedTuple):
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
        body = _HINTS.pack(len(packs), len(rows), len(hints)) + b"".join(packs) + hints + manifest
        head = struct.pack("<II", zlib.crc32(key + numbers), len(numbers) // 4)
        return head + numbers + deflated(body)

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
        return inflated(row[8 + 4 * int.from_bytes(row[4:8], "little") :], _MANIFEST_BYTES)


_HINTS = struct.Struct("<HHI")
_PLACE = struct.Struct("<HQQBB")


class VersionRow(NamedTuple):
    """A version: its manifest's hash, the pack that records it, when it was added, its tensors' bytes."""

    manifest: bytes
    pack: bytes
    time_ns: int
    size_bytes: int

    def encode(self, key: bytes) -> bytes:
        return sealed(key, struct.pack("<32s32sQQ", self.manifest, self.pack, self.time_ns, self.size_bytes))

    @classmethod
    def decode(cls, key: bytes, row: bytes) -> "VersionRow":
        body = row[:-4]  # inline, for a gc reads every version
        if zlib.crc32(key + body).to_bytes(4, "little") != row[-4:] or len(body) != _VERSION.size:
            _opened("<32s32sQQ", key, row)
        return cls._make(_VERSION.unpack(body))


_VERSION = struct.Struct("<32s32sQQ")


class NameRow(NamedTuple):
    """A task's name as written, its newest version (0: none is left), the highest number that it ever had, and the
    pack that records that."""

    name: str
    newest: int
    highest: int
    pack: bytes

    def encode(self, key: bytes) -> bytes:
        return sealed(key, _NAME.pack(self.newest, self.highest, self.pack) + self.name.encode("ascii"))

    @classmethod
    def decode(cls, key: bytes, row: bytes) -> "NameRow":
        body = unsealed(key, row)
        if not _NAME.size < len(body) <= _NAME.size + _MOST_NAME_BYTES:
            raise DamagedError(f"index row {shown(key)}", "its length is wrong")
        newest, highest, pack = _NAME.unpack_from(body)
        try:
            return cls(body[_NAME.size :].decode("ascii"), newest, highest, pack)
        except UnicodeDecodeError:
            raise DamagedError(f"index row {shown(key)}", "its name is not ASCII") from None


_NAME = struct.Struct("<II32s")
_MOST_NAME_BYTES = 100


class TagRow(NamedTuple):
    """What a tag stands for, since when, and the pack that records it."""

    version: int
    time_ns: int
    pack: bytes

    def encode(self, key: bytes) -> bytes:
        return sealed(key, struct.pack("<IQ32s", self.version, self.time_ns, self.pack))

    @classmethod
    def decode(cls, key: bytes, row: bytes) -> "TagRow":
        return cls(*_opened("<IQ32s", key, row))


class RemovedRow(NamedTuple):
    """A version (or tag) that was removed: the pack that still records it, and the pack that records its removal."""

    recorded_in: bytes
    pack: bytes

    def encode(self, key: bytes) -> bytes:
        return sealed(key, self.recorded_in + self.pack)

    @classmethod
    def decode(cls, key: bytes, row: bytes) -> "RemovedRow":
        return cls(*_opened("<32s32s", key, row))


def shown(key: bytes) -> str:
    """A key in a message: of a hostile one, which may be long, the beginning."""
    return repr(key) if len(key) <= _MOST_SHOWN_BYTES else f"{key[:_MOST_SHOWN_BYTES]!r}…"


_MOST_SHOWN_BYTES = 150  # more than any key of a task and a tag has


def sealed(key: bytes, body: bytes) -> bytes:
    return body + zlib.crc32(key + body).to_bytes(4, "little")


def unsealed(key: bytes, row: bytes) -> bytes:
    body = row[:-4]
    if zlib.crc32(key + body).to_bytes(4, "little") != row[-4:]:
        raise DamagedError(f"index row {shown(key)}", "its checksum differs")
    return body


def _opened(form: str, key: bytes, row: bytes) -> tuple[Any, ...]:
    try:
        return struct.unpack(form, unsealed(key, row))
    except struct.error:
        raise DamagedError(f"index row {shown(key)}", "its length is wrong") from None


def version_key(task: str, version: int) -> bytes:
    return task.encode("ascii") + b"\0" + version.to_bytes(4, "big")


def parse_version_key(key: bytes) -> tuple[str, int]:
    try:
        if key[-5:-4] != b"\0":
            raise ValueError
        return key[:-5].decode("ascii"), int.from_bytes(key[-4:], "big")
    except ValueError:
        raise DamagedError(f"index key {shown(key)}", "it is no version's") from None


def tag_key(task: str, tag: str) -> bytes:
    return f"{task}\0{tag}".encode("ascii")


def parse_tag_key(key: bytes) -> tuple[str, str]:
    try:
        task, tag = key.decode("ascii").split("\0")
        return task, tag
    except ValueError:
        raise DamagedError(f"index key {shown(key)}", "it is no tag's") from None


def name_key(task: str) -> bytes:
    return task.casefold().encode("ascii")
