"""What a remote's log says, up to some entry: versions, tags, names, and where tensors lie."""

import hashlib
import json
import sqlite3
import zlib
from collections.abc import Iterator

from pear_store.format.container import Place as TensorPlace
from pear_store.format.digest import Digest, from_digest
from pear_store.remote.log import MAX_INDEX_BYTES, LoggedVersion


class LogState:
    """Questions to a mirror's tables, for one thread."""

    _db: sqlite3.Connection

    def spelling(self, task: str) -> str | None:
        """A task's name as the remote has it, under any case."""
        row = self._db.execute("SELECT task FROM names WHERE folded = ?", (task.casefold(),)).fetchone()
        return None if row is None else str(row[0])

    def highest(self, task: str) -> int:
        row = self._db.execute("SELECT highest FROM names WHERE folded = ?", (task.casefold(),)).fetchone()
        return 0 if row is None else int(row[0])

    def tasks(self) -> list[str]:
        """All that ever had a version."""
        return [row[0] for row in self._db.execute("SELECT task FROM names ORDER BY task")]

    def version(self, task: str, number: int) -> tuple[LoggedVersion, bool] | None:
        """A version, and whether it was removed."""
        query = "SELECT time_ns, manifest, removed FROM versions WHERE (task, number) = (?, ?)"
        row = self._db.execute(query, (task, number)).fetchone()
        return None if row is None else (LoggedVersion(task, number, row[0], bytes(row[1])), bool(row[2]))

    def has_version(self, task: str, number: int) -> bool:
        found = self.version(task, number)
        return found is not None and not found[1]

    def versions(self, task: str) -> list[LoggedVersion]:
        """A task's versions that were not removed, by number."""
        query = "SELECT number, time_ns, manifest FROM versions WHERE task = ? AND NOT removed ORDER BY number"
        return [LoggedVersion(task, n, time, bytes(key)) for n, time, key in self._db.execute(query, (task,))]

    def removed(self) -> Iterator[LoggedVersion]:
        query = "SELECT task, number, time_ns, manifest FROM versions WHERE removed"
        return (LoggedVersion(task, n, time, bytes(key)) for task, n, time, key in self._db.execute(query))

    def tag(self, task: str, tag: str) -> int | None:
        row = self._db.execute("SELECT version FROM tags WHERE (task, tag) = (?, ?)", (task, tag)).fetchone()
        return None if row is None else int(row[0])

    def tags(self) -> dict[tuple[str, str], int]:
        return {(task, tag): number for task, tag, number in self._db.execute("SELECT task, tag, version FROM tags")}

    def tags_of(self, task: str, number: int) -> list[str]:
        query = "SELECT tag FROM tags WHERE (task, version) = (?, ?) ORDER BY tag"
        return [row[0] for row in self._db.execute(query, (task, number))]

    def manifest(self, key: bytes) -> bytes:
        """A manifest's text; the log was refused if it had none."""
        (text,) = self._db.execute("SELECT text FROM manifests WHERE manifest = ?", (key,)).fetchone()
        found = zlib.decompressobj().decompress(text, MAX_INDEX_BYTES)
        if hashlib.sha256(found).digest() != key:
            raise sqlite3.DatabaseError("a manifest's hash differs")
        return found

    def has(self, digest: Digest) -> bool:
        """Whether a pack that was not dropped has a tensor."""
        query = "SELECT 1 FROM tensors WHERE digest = ? LIMIT 1"
        return self._db.execute(query, (from_digest(digest),)).fetchone() is not None

    def places(self, digest: Digest) -> list[tuple[bytes, TensorPlace]]:
        """Where a tensor lies: packs, and places in them."""
        query = "SELECT pack, dtype, shape, offset, length FROM tensors WHERE digest = ? ORDER BY pack"
        return [
            (bytes(pack), TensorPlace(dtype, tuple(json.loads(shape)), offset, length))
            for pack, dtype, shape, offset, length in self._db.execute(query, (from_digest(digest),))
        ]

    def pack_bytes(self, pack: bytes) -> int:
        row = self._db.execute("SELECT file_bytes FROM packs WHERE pack = ?", (pack,)).fetchone()
        return 0 if row is None else int(row[0])

    def is_dropped(self, pack: bytes) -> bool:
        return self._db.execute("SELECT 1 FROM packs WHERE pack = ? AND dropped", (pack,)).fetchone() is not None

    def counts(self) -> dict[str, int]:
        """Of what is there now."""
        tasks, versions = self._db.execute(
            "SELECT count(DISTINCT task), count(*) FROM versions WHERE NOT removed"
        ).fetchone()
        packs, pack_bytes = self._db.execute(
            "SELECT count(*), coalesce(sum(file_bytes), 0) FROM packs WHERE NOT dropped"
        ).fetchone()
        return {"tasks": tasks, "versions": versions, "packs": packs, "pack_bytes": pack_bytes}
