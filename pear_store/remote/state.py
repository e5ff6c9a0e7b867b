"""Answers questions about a remote's log, up to some entry: versions, tags, names, and places of tensors.

If the remote has a base, a mirror only holds the parts that were asked for. Each question here first reads the missing
parts of its answer, so a state answers as if it held all.
"""

import hashlib
import json
import re
import sqlite3
import zlib
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from functools import lru_cache

from pear_store.format.container import Place as TensorPlace
from pear_store.format.digest import Digest, from_digest, to_digest
from pear_store.remote.base import END, Kind
from pear_store.remote.log import MAX_INDEX_BYTES, LoggedVersion

Numbered = tuple[str, int]
LoggedAndRemoved = tuple[LoggedVersion, bool]
Places = dict[Digest, list[tuple[bytes, TensorPlace]]]
"""For each tensor: the packs that have it, and its place in each"""
_PART = 500
"""How many names one query takes"""


def _parts(tasks: Collection[str]) -> Iterator[list[str]]:
    names = sorted(tasks)
    return (names[start : start + _PART] for start in range(0, len(names), _PART))


@lru_cache(1024)
def _shape(text: str) -> tuple[int, ...]:
    return tuple(json.loads(text))


def _folded(tasks: Collection[str]) -> list[str]:
    return [task.casefold() for task in tasks]


class LogState:
    """Answers questions from a mirror's tables. For one thread."""

    _db: sqlite3.Connection

    def _need(self, kind: Kind, low: str, high: str | None = None) -> None:
        """Reads what the base says of the names from `low` to `high`, or of one name."""
        raise NotImplementedError

    def _need_task(self, task: str) -> None:
        self._need("tasks", task.casefold())

    def need_all(self, kind: Kind | None = None) -> None:
        """Reads all of the base, or all of a kind and all drops."""
        raise NotImplementedError

    def spelling(self, task: str) -> str | None:
        """A task's name as the remote spells it. It may be given in any case."""
        self._need_task(task)
        row = self._db.execute("SELECT task FROM names WHERE folded = ?", (task.casefold(),)).fetchone()
        return None if row is None else str(row[0])

    def highest(self, task: str) -> int:
        self._need_task(task)
        row = self._db.execute("SELECT highest FROM names WHERE folded = ?", (task.casefold(),)).fetchone()
        return 0 if row is None else int(row[0])

    def tasks(self, patterns: Collection[str] = ("*",)) -> list[str]:
        """The tasks whose names match a pattern, if they ever had a version. Only what can match is read."""
        found: set[str] = set()
        for pattern in patterns:
            low = re.split(r"[*?\[]", pattern, maxsplit=1)[0].casefold()
            self._need("tasks", low, low + END)
            names = self._db.execute("SELECT task FROM names WHERE folded BETWEEN ? AND ?", (low, low + END))
            found.update(name for (name,) in names if fnmatchcase(name, pattern))
        return sorted(found)

    def version(self, task: str, number: int) -> tuple[LoggedVersion, bool] | None:
        """A version, and whether it was removed."""
        self._need_task(task)
        query = "SELECT time_ns, manifest, removed FROM versions WHERE (task, number) = (?, ?)"
        row = self._db.execute(query, (task, number)).fetchone()
        return None if row is None else (LoggedVersion(task, number, row[0], bytes(row[1])), bool(row[2]))

    def of_tasks(self, tasks: Collection[str]) -> tuple[dict[str, tuple[str, int]], dict[Numbered, LoggedAndRemoved]]:
        """For many tasks: spelling and highest number, by case-folded name; and versions, as :meth:`version`."""
        names: dict[str, tuple[str, int]] = {}
        versions: dict[Numbered, LoggedAndRemoved] = {}
        self.need_tasks(tasks)
        for part in _parts(tasks):
            marks = ",".join("?" * len(part))
            query = f"SELECT folded, task, highest FROM names WHERE folded IN ({marks})"
            names.update((folded, (task, highest)) for folded, task, highest in self._db.execute(query, _folded(part)))
            query = f"SELECT task, number, time_ns, manifest, removed FROM versions WHERE task IN ({marks})"
            for task, number, time_ns, key, removed in self._db.execute(query, part):
                versions[task, number] = LoggedVersion(task, number, time_ns, bytes(key)), bool(removed)
        return names, versions

    def need_tasks(self, tasks: Collection[str]) -> None:
        """Reads all that the base says of these tasks, at once."""
        raise NotImplementedError

    def has_version(self, task: str, number: int) -> bool:
        found = self.version(task, number)
        return found is not None and not found[1]

    def versions(self, task: str) -> list[LoggedVersion]:
        """A task's versions that were not removed, by number."""
        self._need_task(task)
        query = "SELECT number, time_ns, manifest FROM versions WHERE task = ? AND NOT removed ORDER BY number"
        return [LoggedVersion(task, n, time, bytes(key)) for n, time, key in self._db.execute(query, (task,))]

    def known_versions(self) -> list[Numbered]:
        """Versions that were read so far and not removed. Nothing more is read."""
        return [(task, n) for task, n in self._db.execute("SELECT task, number FROM versions WHERE NOT removed")]

    def removed(self) -> Iterator[LoggedVersion]:
        self.need_all("tasks")
        query = "SELECT task, number, time_ns, manifest FROM versions WHERE removed"
        return (LoggedVersion(task, n, time, bytes(key)) for task, n, time, key in self._db.execute(query))

    def tag(self, task: str, tag: str) -> int | None:
        self._need_task(task)
        row = self._db.execute("SELECT version FROM tags WHERE (task, tag) = (?, ?)", (task, tag)).fetchone()
        return None if row is None else int(row[0])

    def tags(self, tasks: Collection[str] | None = None) -> dict[tuple[str, str], int]:
        """All tags and the versions that they name; or those of some tasks."""
        if tasks is None:
            self.need_all("tasks")
            return {(task, tag): number for task, tag, number in self._db.execute("SELECT * FROM tags")}
        found: dict[tuple[str, str], int] = {}
        self.need_tasks(tasks)
        for part in _parts(tasks):
            query = f"SELECT task, tag, version FROM tags WHERE task IN ({','.join('?' * len(part))})"
            found.update(((task, tag), number) for task, tag, number in self._db.execute(query, part))
        return found

    def tags_of(self, task: str, number: int) -> list[str]:
        self._need_task(task)
        query = "SELECT tag FROM tags WHERE (task, version) = (?, ?) ORDER BY tag"
        return [row[0] for row in self._db.execute(query, (task, number))]

    def manifest(self, key: bytes) -> bytes:
        """A manifest's text. It is there, because a log without it is refused."""
        row = self._db.execute("SELECT text FROM manifests WHERE manifest = ?", (key,)).fetchone()
        if row is None:
            raise sqlite3.DatabaseError("a manifest is gone")
        (text,) = row
        found = zlib.decompressobj().decompress(text, MAX_INDEX_BYTES)
        if hashlib.sha256(found).digest() != key:
            raise sqlite3.DatabaseError("a manifest's hash differs")
        return found

    def manifest_of(self, version: LoggedVersion) -> bytes | None:
        """The text of a version's manifest. It is read again if it was forgotten. None: the version was removed."""
        self._need_task(version.task)
        if (text := self.find_manifest(version.manifest)) is None and self.has_version(version.task, version.number):
            raise sqlite3.DatabaseError("a manifest is gone")
        return text

    def find_manifest(self, key: bytes) -> bytes | None:
        """A manifest's text, if it is known."""
        row = self._db.execute("SELECT 1 FROM manifests WHERE manifest = ?", (key,)).fetchone()
        return None if row is None else self.manifest(key)

    def knows(self, digest: Digest) -> bool:
        """Whether a known pack that was not dropped has a tensor. If not, an unknown pack may have it."""
        return bool(self.known_of([digest]))

    def known_of(self, digests: Collection[Digest]) -> set[Digest]:
        """The tensors that :meth:`knows` of."""
        self._need("drop", "", END)
        return {digest for digest, places in self._places(digests).items() if places}

    def has(self, digest: Digest) -> bool:
        """Whether a pack that was not dropped has a tensor."""
        return bool(self.places(digest))

    def places(self, digest: Digest) -> list[tuple[bytes, TensorPlace]]:
        """The packs that have a tensor, and its place in each. Packs that are not known yet may have it, too."""
        return self.places_of([digest])[digest]

    def places_of(self, digests: Collection[Digest]) -> Places:
        """The :meth:`places` of many tensors."""
        self._need("drop", "", END)
        found = self._places(digests)
        if not all(found.values()):
            self.need_all("packs")
            found = self._places(digests)
        return found

    def _places(self, digests: Collection[Digest]) -> Places:
        found: Places = {digest: [] for digest in digests}
        for part in _parts(digests):
            query = (
                "SELECT digest, pack, dtype, shape, offset, length FROM tensors "
                f"WHERE digest IN ({','.join('?' * len(part))}) ORDER BY pack"
            )
            keys = [from_digest(Digest(digest)) for digest in part]
            for digest, pack, dtype, shape, offset, length in self._db.execute(query, keys):
                found[to_digest(digest)].append((bytes(pack), TensorPlace(dtype, _shape(shape), offset, length)))
        return found

    def _need_pack(self, pack: bytes) -> None:
        self.need_all("drop")
        if self._db.execute("SELECT 1 FROM packs WHERE pack = ?", (pack,)).fetchone() is None:
            self._need("packs", pack.hex())

    def pack_bytes(self, pack: bytes) -> int:
        self._need_pack(pack)
        row = self._db.execute("SELECT file_bytes FROM packs WHERE pack = ?", (pack,)).fetchone()
        return 0 if row is None else int(row[0])

    def is_dropped(self, pack: bytes) -> bool:
        self._need_pack(pack)
        return self._db.execute("SELECT 1 FROM packs WHERE pack = ? AND dropped", (pack,)).fetchone() is not None

    def is_stray(self, name: str) -> bool:
        """Whether an object that is no pack was dropped."""
        return self._db.execute("SELECT 1 FROM strays WHERE name = ?", (name,)).fetchone() is not None

    def copy(self, name: str) -> bytes:
        """The bytes of an entry or an index as they were read, by the object's name. b"": they are not known."""
        row = self._db.execute("SELECT data FROM copies WHERE name = ?", (name,)).fetchone()
        return b"" if row is None else bytes(row[0])

    def counts(self) -> dict[str, int]:
        """How many tasks, versions, packs and bytes of packs there are now."""
        self.need_all()
        tasks, versions = self._db.execute(
            "SELECT count(DISTINCT task), count(*) FROM versions WHERE NOT removed"
        ).fetchone()
        packs, pack_bytes = self._db.execute(
            "SELECT count(*), coalesce(sum(file_bytes), 0) FROM packs WHERE whole AND NOT dropped"
        ).fetchone()
        return {"tasks": tasks, "versions": versions, "packs": packs, "pack_bytes": pack_bytes}
