"""Counts and sizes of what is stored."""

from contextlib import suppress
from dataclasses import dataclass

from pear_store.local.index import View
from pear_store.local.mark import Marked, mark
from pear_store.local.opened import OpenStore


@dataclass(frozen=True)
class Stats:
    """Counts and sizes: logical bytes over all versions, unique bytes (each tensor once), stored bytes on disk.

    `dedup_ratio` is logical over unique bytes, `live_share` the part of the packs' tensor bytes that versions need.
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
    """What a remote holds, and what of it is cached here; bytes are those of packs."""

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
        with suppress(FileNotFoundError):  # a gc beside us
            pack_bytes += file.stat().st_size
    index_bytes = opened.index.size_bytes
    in_packs = sum(use.row.tensor_bytes for use in marked.packs.values())
    return Stats(
        tasks, marked.versions, marked.kept_tensors, marked.logical_bytes, marked.kept_bytes,
        pack_bytes + index_bytes, pack_bytes, index_bytes, len(marked.packs),
        round(marked.logical_bytes / marked.kept_bytes, 4) if marked.kept_bytes else 1.0,
        round(marked.kept_bytes / in_packs, 4) if in_packs else 1.0,
    )  # fmt: skip
