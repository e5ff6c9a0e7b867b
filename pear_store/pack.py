"""Packs: immutable safetensors files that hold tensors by digest and the manifests that were added with them."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from pear_store.container import Place, lay_out
from pear_store.digest import Digest, RawTensor

FORMAT = "pear-pack/1"


@dataclass(frozen=True)
class PackedVersion:
    """A version of a task as its pack records it; time in nanoseconds since the epoch."""

    task: str
    version: int
    time_ns: int
    manifest: bytes


@dataclass(frozen=True)
class WrittenPack:
    """A pack that lies complete and synced in `path`, not yet under its own name."""

    path: Path
    hash: bytes
    file_bytes: int
    places: Mapping[Digest, Place]


def pack_path(root: Path, pack: bytes) -> Path:
    name = pack.hex()
    return root / "packs" / name[:2] / f"{name}.safetensors"


def write_pack(root: Path, tensors: Mapping[Digest, RawTensor], versions: list[PackedVersion]) -> WrittenPack:
    """Writes a pack into the store's tmp/ and syncs it."""
    record = {
        "format": FORMAT,
        "id": uuid4().hex,  # no two packs are one file, so that a healed tensor never lands where a damaged one was
        "versions": [
            {"task": v.task, "version": v.version, "time_ns": v.time_ns, "manifest": v.manifest.decode("utf-8")}
            for v in versions
        ],
    }
    metadata = {"pear": json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)}
    named = {str(digest): tensor for digest, tensor in tensors.items()}
    head, places = lay_out(named, metadata)
    path = root / "tmp" / f"{uuid4().hex}.safetensors"
    state = hashlib.sha256()
    try:
        with open(path, "wb") as file:
            for chunk in (head, *(named[name].data for name in places)):
                state.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return WrittenPack(path, state.digest(), size, {Digest(name): place for name, place in places.items()})


def place_pack(root: Path, pack: WrittenPack) -> None:
    """Renames a written pack to its own name, durably."""
    target = pack_path(root, pack.hash)
    if not target.parent.exists():
        target.parent.mkdir()
        sync_directory(target.parent.parent)
    if pack.path.exists() or not target.exists():  # it is there already when a commit is run again
        os.replace(pack.path, target)
    sync_directory(target.parent)


def sync_directory(path: Path) -> None:
    """Makes renames and new files in a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
