"""Encodes and parses the log of a remote: its entries and their indexes (docs/remotes.md has the format).

All bytes may come from a stranger. Sizes, counts, names and nesting are checked before anything is used.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple, TypeVar

from pear_store.errors import DamagedRemoteError, FormatError
from pear_store.format.checkpoint import TAG_NAME, TASK_NAME
from pear_store.format.container import Place as TensorPlace
from pear_store.format.container import strict_json
from pear_store.format.digest import ITEM_BYTES, Digest, from_digest, to_digest

SETTINGS_NAME = "pear-remote.json"
SETTINGS_FORMAT = "pear-remote/1"
ENTRY_FORMAT = "pear-log/1"
INDEX_FORMAT = "pear-index/1"
MAX_ENTRY_BYTES = 4096
"""The most bytes of an entry, and of pear-remote.json"""
MAX_INDEX_BYTES = 16 << 20
"""The most bytes of an index, both compressed and as text"""
MAX_MANIFEST_BYTES = 4 << 20
MAX_PACK_BYTES = 1 << 40
_LEVEL = 3
"""The level of compression: twice as fast as 6, for 3 % more bytes"""
_MOST_AXES = 8
_STRAY_NAME = re.compile(r"index/[0-9a-f]{64}|(?:tmp|probe)/[0-9a-f]{32}")
_SALT = re.compile(r"(?:[0-9a-f]{32})?")
T = TypeVar("T")


def entry_name(number: int) -> str:
    return f"log/{number:020d}"


def index_name(index: bytes) -> str:
    return f"index/{index.hex()}"


def pack_name(pack: bytes) -> str:
    return f"packs/{pack.hex()[:2]}/{pack.hex()}.safetensors"


Head = tuple[int, bytes | None]
"""The last entry that is known: its number and its hash. (0, None): there is none."""


class BaseName(NamedTuple):
    """Names a base: the number of the last entry that it covers, and the hash of its root."""

    number: int
    hash: bytes


@dataclass(frozen=True)
class Entry:
    """A log entry.

    Args:
        id: a random id, by which its writer recognises it.
        previous: the hash of the entry before it. None: it is the first.
        index: the hash of its index.
        time_ns: when it was written, by its writer's clock. For people only.
        host: its writer's name. For people only.
        base: the newest base that its writer knew (see base.py).
    """

    id: str
    previous: bytes | None
    index: bytes
    time_ns: int
    host: str
    base: BaseName | None = None

    def encode(self) -> bytes:
        value: dict[str, Any] = {
            "format": ENTRY_FORMAT, "id": self.id, "previous": self.previous and self.previous.hex(),
            "index": self.index.hex(), "time_ns": self.time_ns, "host": self.host,
        }  # fmt: skip
        if self.base is not None:
            value["base"] = [self.base.number, self.base.hash.hex()]
        return dump_json(value)


@dataclass(frozen=True)
class LoggedVersion:
    task: str
    number: int
    time_ns: int
    manifest: bytes
    """Its hash"""


@dataclass(frozen=True)
class LoggedTag:
    """A change of a tag: the version that it names from now on, and the one that it named before. None: no version."""

    task: str
    tag: str
    version: int | None
    before: int | None


@dataclass(frozen=True)
class PackListing:
    """A pack's size, and the places of its tensors."""

    file_bytes: int
    places: dict[Digest, TensorPlace]


@dataclass
class LogIndex:
    """What an entry says."""

    packs: dict[bytes, PackListing] = field(default_factory=dict)
    manifests: dict[bytes, bytes] = field(default_factory=dict)
    versions: list[LoggedVersion] = field(default_factory=list)
    removed: list[tuple[str, int]] = field(default_factory=list)
    tags: list[LoggedTag] = field(default_factory=list)
    highest: dict[str, int] = field(default_factory=dict)
    """The highest number that each task ever had, also of versions that are on no remote"""
    drop: list[bytes] = field(default_factory=list)
    """Packs that will be deleted"""
    shared: dict[bytes, PackListing] = field(default_factory=dict)
    """Tensors of these versions in packs that were there before. With this hint, a reader need not know all packs."""
    strays: list[str] = field(default_factory=list)
    """Names of other objects that will be deleted, in index/, tmp/ and probe/"""
    salt: str = ""
    """A random text, if the object's name would otherwise be one that was dropped"""
    raw: bytes = field(default=b"", compare=False, repr=False)
    """The bytes of its object, if it was read or encoded"""

    def __len__(self) -> int:
        parts = (self.packs, self.versions, self.removed, self.tags, self.highest, self.drop, self.strays)
        return sum(map(len, parts))

    def encode(self) -> bytes:
        """The bytes of its object. Their hash is the object's name.

        Raises:
            ValueError: it is too large for a reader.
        """
        text = self.text()
        if len(text) > MAX_INDEX_BYTES:
            raise ValueError(f"an index of {len(text)} bytes: at most {MAX_INDEX_BYTES} are read")
        return zlib.compress(text, _LEVEL)

    def text(self) -> bytes:
        value: dict[str, Any] = {
            "format": INDEX_FORMAT,
            "packs": _listings(self.packs),
            "manifests": {key.hex(): manifest.decode("utf-8") for key, manifest in self.manifests.items()},
            "versions": [[v.task, v.number, v.time_ns, v.manifest.hex()] for v in self.versions],
            "removed": [list(one) for one in self.removed],
            "tags": [[t.task, t.tag, t.version, t.before] for t in self.tags],
            "highest": self.highest,
            "drop": [pack.hex() for pack in self.drop],
        }
        if self.shared:
            value["shared"] = _listings(self.shared)
        if self.strays:
            value["strays"] = self.strays
        if self.salt:
            value["salt"] = self.salt
        return dump_json(value)


def _listings(packs: Mapping[bytes, PackListing]) -> dict[str, Any]:
    return {
        pack.hex(): {
            "file_bytes": listing.file_bytes,
            "tensors": [
                [from_digest(digest).hex(), p.dtype, list(p.shape), p.offset, p.length]
                for digest, p in listing.places.items()
            ],
        }
        for pack, listing in packs.items()
    }


def encode_settings(id: str) -> bytes:
    return dump_json({"format": SETTINGS_FORMAT, "id": id})


def parse_settings(data: bytes, place: str) -> str:
    """The id of a remote by its pear-remote.json.

    Raises:
        FormatError: another Pear wrote it.
        DamagedRemoteError: it breaks the rules.
    """
    return parsed(place, SETTINGS_NAME, data, SETTINGS_FORMAT, lambda value: to_hash(value["id"], 16).hex())


def parse_entry(data: bytes, place: str, number: int) -> Entry:
    """Raises as :func:`parse_settings`."""

    def parse(value: Any) -> Entry:
        previous = None if value["previous"] is None else to_hash(value["previous"])
        host, base = value["host"], None
        if (previous is None) != (number == 1) or not (isinstance(host, str) and len(host) <= 255):
            raise ValueError("an invalid field 'previous' or 'host'")
        if value.get("base") is not None:
            at, name = to_list(value["base"])
            base = BaseName(to_count(at), to_hash(name))
            if not 0 < base.number < number:
                raise ValueError("an invalid field 'base'")
        id, index = to_hash(value["id"], 16).hex(), to_hash(value["index"])
        return Entry(id, previous, index, to_count(value["time_ns"]), host, base)

    return parsed(place, entry_name(number), data, ENTRY_FORMAT, parse)


def parse_index(data: bytes, place: str, index: bytes, name: str | None = None) -> LogIndex:
    """Parses the index of an entry. Raises as :func:`parse_settings`.

    Args:
        index: its hash.
        name: the object's name, if it is a base's shard.
    """
    name = name or index_name(index)
    found = parsed(place, name, unpacked(place, name, data, index), INDEX_FORMAT, _index)
    found.raw = data
    return found


def parse_news(text: bytes) -> LogIndex:
    """Parses what :meth:`LogIndex.text` wrote into this store's own mirror."""
    return _index(json.loads(text))


def unpacked(place: str, name: str, data: bytes, known: bytes) -> bytes:
    """Decompresses an object that is named by its hash.

    Raises:
        DamagedRemoteError: it has another hash, or is too large.
    """
    if hashlib.sha256(data).digest() != known:
        raise DamagedRemoteError(place, name, "its bytes do not hash to its name")
    unpacking = zlib.decompressobj()
    try:
        text = unpacking.decompress(data, MAX_INDEX_BYTES)
    except zlib.error:
        raise DamagedRemoteError(place, name, "it cannot be decompressed") from None
    if unpacking.unconsumed_tail or not unpacking.eof or unpacking.unused_data:
        raise DamagedRemoteError(place, name, f"more than {MAX_INDEX_BYTES} bytes, or cut off")
    return text


def _index(value: Any) -> LogIndex:
    found = LogIndex()
    found.packs = _parse_listings(value["packs"])
    found.shared = _parse_listings(value.get("shared", {}))
    for text, manifest in value["manifests"].items():
        raw = manifest.encode("utf-8")
        if len(raw) > MAX_MANIFEST_BYTES or hashlib.sha256(raw).digest() != to_hash(text):
            raise ValueError("a manifest does not hash to its name, or is too large")
        found.manifests[to_hash(text)] = raw
    for task, number, time_ns, manifest in to_list(value["versions"]):
        found.versions.append(LoggedVersion(_task(task), _number(number), to_count(time_ns), to_hash(manifest)))
    found.removed = [(_task(task), _number(number)) for task, number in to_list(value["removed"])]
    for task, tag, version, before in to_list(value["tags"]):
        if not (isinstance(tag, str) and TAG_NAME.fullmatch(tag)):
            raise ValueError("an invalid name of a tag")
        numbers = (None if number is None else _number(number) for number in (version, before))
        found.tags.append(LoggedTag(_task(task), tag, *numbers))
    found.highest = {_task(task): _number(number) for task, number in value["highest"].items()}
    found.drop = [to_hash(pack) for pack in to_list(value["drop"])]
    found.strays = [_text(name, _STRAY_NAME) for name in to_list(value.get("strays", []))]
    found.salt = _text(value.get("salt", ""), _SALT)
    if len({(v.task.casefold(), v.number) for v in found.versions}) != len(found.versions):
        raise ValueError("the same version twice")
    return found


def _parse_listings(value: Any) -> dict[bytes, PackListing]:
    found = {}
    for text, listing in value.items():
        file_bytes = to_count(listing["file_bytes"])
        if file_bytes > MAX_PACK_BYTES:
            raise ValueError("an invalid size of a pack")
        places = dict(_place(row, file_bytes) for row in to_list(listing["tensors"]))
        if len(places) != len(listing["tensors"]):
            raise ValueError("a pack lists a tensor twice")
        found[to_hash(text)] = PackListing(file_bytes, places)
    return found


def _place(row: Any, file_bytes: int) -> tuple[Digest, TensorPlace]:
    digest, dtype, shape, offset, length = row
    sizes = tuple(map(to_count, shape))
    known = isinstance(dtype, str) and dtype in ITEM_BYTES and isinstance(shape, list) and len(sizes) <= _MOST_AXES
    if not known or prod(sizes) * ITEM_BYTES[dtype] != to_count(length) or to_count(offset) + length > file_bytes:
        raise ValueError("an invalid place of a tensor")
    return to_digest(to_hash(digest)), TensorPlace(dtype, sizes, offset, length)


def parsed(place: str, name: str, data: bytes, known: str, parse: Callable[[Any], T]) -> T:
    try:
        value = strict_json(data)
        if not isinstance(value, dict) or not isinstance(value.get("format"), str):
            raise ValueError("expected an object with the field 'format'")
        if value["format"] != known:
            raise FormatError(
                f"{place}: {name} is of format {value['format'][:40]!r}, this Pear reads {known!r}: use a newer Pear"
            )
        return parse(value)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        problem = f": {str(error)[:120]}" if type(error) is ValueError else ""
        raise DamagedRemoteError(place, name, f"it does not follow the format {known!r}{problem}") from None


def dump_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def to_list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("expected a list")
    return value


def _text(value: Any, pattern: re.Pattern[str]) -> str:
    if not (isinstance(value, str) and pattern.fullmatch(value)):
        raise ValueError("an invalid name")
    return value


def to_hash(value: Any, count: int = 32) -> bytes:
    if not (isinstance(value, str) and len(value) == 2 * count and set(value) <= set("0123456789abcdef")):
        raise ValueError("expected a hash in hex")
    return bytes.fromhex(value)


def to_count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError("expected a count or a time")
    return value


def _task(value: Any) -> str:
    if not (isinstance(value, str) and TASK_NAME.fullmatch(value)):
        raise ValueError("an invalid name of a task")
    return value


def _number(value: Any) -> int:
    if type(value) is not int or not 0 < value < 2**32:
        raise ValueError("an invalid number of a version")
    return value
