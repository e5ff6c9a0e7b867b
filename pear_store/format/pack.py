"""What a pack records beside its tensors, in the metadata of a safetensors file.

The records let the index be rebuilt from the packs alone. They do not depend on the order in which packs are read:
version numbers are never used twice, a removal outweighs the version it names, and of tags the latest counts.
"""

import hashlib
import json
import zlib
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from pear_store.errors import DamagedError
from pear_store.format.checkpoint import TAG_NAME, TASK_NAME
from pear_store.format.container import strict_json
from pear_store.format.deflate import deflated, inflated
from pear_store.format.digest import Kept, fresh_name

FORMAT, PLAIN_FORMAT = "pear-pack/2", "pear-pack/1"
"""Of a pack whose manifests are deflated, and of one in which they are plain text: read, not written any more"""
MAX_MANIFESTS_BYTES = 64 << 20
"""Manifests of one pack, inflated: four times what is written, for few bytes can say that they stand for terabytes"""


@dataclass(frozen=True)
class Commit:
    """Which commit of which store wrote a pack: the store's id, the commit's number, and the packs of the commits that
    it followed, which so were acknowledged. Older packs have none."""

    store: str = ""
    number: int = 0
    after: tuple[bytes, ...] = ()


NO_COMMIT = Commit()


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
    """What a tag stood for since a time; None: nothing. Where copies of a store gave one number to two versions,
    the manifest's hash says which one was meant; older packs have none."""

    task: str
    tag: str
    version: int | None
    time_ns: int
    manifest: bytes | None = None


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


def pack_metadata(records: Records, commit: Commit) -> dict[str, str]:
    """The pack's `__metadata__`: the record, its checksum, and each manifest under its hash, deflated, in base 64."""
    metadata = {v.hash.hex(): b64encode(deflated(v.manifest)).decode() for v in records.versions}
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
        record["tags"] = [{**vars(tag), "manifest": tag.manifest and tag.manifest.hex()} for tag in records.tags]
    if records.highest:
        record["highest"] = records.highest
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return {"pear": text, "pear.sha256": hashlib.sha256(text.encode("utf-8")).hexdigest(), **metadata}


def records_in(path: Path, metadata: dict[str, str]) -> tuple[Records, list[str]]:
    """A pack's records by its metadata, and what is wrong with them; see :func:`read_records`."""
    text = metadata.get("pear", "")
    try:
        sound = hashlib.sha256(text.encode("utf-8")).hexdigest() == metadata.get("pear.sha256")
        records, problems = _parse(strict_json(text), metadata) if sound else (Records(), [])
    except (ValueError, KeyError, TypeError, AttributeError):
        expected = f"{FORMAT!r} or {PLAIN_FORMAT!r}"
        raise DamagedError(f"pack {path.stem}", f"its record is not as {expected} is") from None
    if not sound:
        raise DamagedError(f"pack {path.stem}", "its record does not match its checksum")
    return records, problems


def _parse(record: Any, metadata: Mapping[str, str]) -> tuple[Records, list[str]]:
    """The records, and what of them is damaged; a ValueError, KeyError, TypeError or AttributeError, if it is none."""
    read = {FORMAT: _inflated, PLAIN_FORMAT: _plain}[record["format"]]
    found, problems = Records(commit=_commit(record)), []
    manifests: dict[str, bytes] = {}  # many versions may name one
    left = MAX_MANIFESTS_BYTES
    for entry in record["versions"]:
        task, number, name = _task(entry["task"]), _number(entry["version"]), entry["manifest"]
        if name not in manifests:
            manifest = read(metadata.get(name, ""), left)
            left -= len(manifest)
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
        meant = None if entry.get("manifest") is None else _hash(entry["manifest"])
        found.tags.append(PackedTag(_task(entry["task"]), entry["tag"], tagged, _count(entry["time_ns"]), meant))
    for task, number in record.get("highest", {}).items():
        found.highest[_task(task)] = max(_number(number), found.highest.get(task, 0))
    return found, problems


def _inflated(text: str, most_bytes: int) -> bytes:
    """A manifest as a pack has it; empty if it is none, or longer than that."""
    try:
        return inflated(b64decode(text, validate=True), most_bytes) if most_bytes > 0 else b""
    except (ValueError, zlib.error):
        return b""


def _plain(text: str, most_bytes: int) -> bytes:
    return text.encode("utf-8", "replace")


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
