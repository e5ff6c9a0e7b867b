"""Counts and sizes of what is stored."""

from contextlib import suppress
from dataclasses import dataclass

from pear_store.local.index import View
from pear_store.local.mark import Marked, mark
from pear_store.local.opened import OpenStore


@dataclass(frozen=True)
class Stats:
    """Counts and sizes of a store.

    Args:
        tasks: tasks that have a version.
        versions: versions of all tasks.
        tensors: distinct tensors that versions need.
        logical_bytes: tensor bytes of all versions, as if nothing was shared.
        unique_bytes: bytes of the distinct tensors that versions need.
        stored_bytes: bytes on disk: packs and index.
        pack_bytes: bytes of the packs' files.
        index_bytes: bytes that the index takes on disk.
        packs: packs that the index lists.
        dedup_ratio: logical_bytes / unique_bytes; 1 for an empty store.
        live_share: the part of the packs' tensor bytes that versions need, 0 to 1.
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
class CacheStats:
    """What a remote holds, and how much of it is cached here. Bytes are those of packs.

    Args:
        tasks: tasks on the remote that have a version. Likewise versions, packs and pack_bytes.
        cached_versions: versions in the cache.
        cached_bytes: bytes of the cache's packs.
        limit_bytes: the most bytes that the cache's packs may take.
    """

    tasks: int
    versions: int
    packs: int
    pack_bytes: int
    cached_versions: int
    cached_bytes: int
    limit_bytes: int


def count(opened: OpenStore) -> Stats:
    """Counts and sizes of what is stored."""

    def look(view: View) -> tuple[Marked, int]:
        return mark(view), sum(1 for row in view.names.rows() if row.newest)

    marked, tasks = opened.look(look)
    pack_bytes = 0
    for file in (opened.path / "packs").glob("*/*.safetensors"):
        with suppress(FileNotFoundError):  # a gc deleted it meanwhile
            pack_bytes += file.stat().st_size
    index_bytes = opened.index.size_bytes
    in_packs = sum(use.row.tensor_bytes for use in marked.packs.values())
    return Stats(
        tasks, marked.versions, marked.kept_tensors, marked.logical_bytes, marked.kept_bytes,
        pack_bytes + index_bytes, pack_bytes, index_bytes, len(marked.packs),
        round(marked.logical_bytes / marked.kept_bytes, 4) if marked.kept_bytes else 1.0,
        round(marked.kept_bytes / in_packs, 4) if in_packs else 1.0,
    )  # fmt: skip
