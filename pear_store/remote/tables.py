"""The tables of a mirror. Enters in them what the log says."""

import json
import sqlite3
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pear_store.errors import DamagedRemoteError
from pear_store.format.digest import from_digest
from pear_store.remote.log import LogIndex, PackListing, entry_name
from pear_store.remote.state import LogState

VERSION = 2
SCHEMA = """
CREATE TABLE known (key TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID;
CREATE TABLE packs (pack BLOB PRIMARY KEY, file_bytes INT, dropped INT) WITHOUT ROWID;
CREATE TABLE tensors (digest BLOB, pack BLOB, dtype TEXT, shape TEXT, offset INT, length INT,
    PRIMARY KEY (digest, pack)) WITHOUT ROWID;
CREATE INDEX tensors_of_a_pack ON tensors (pack);
CREATE TABLE manifests (manifest BLOB PRIMARY KEY, text BLOB);
CREATE TABLE versions (task TEXT, number INT, time_ns INT, manifest BLOB, removed INT,
    PRIMARY KEY (task, number)) WITHOUT ROWID;
CREATE TABLE names (folded TEXT PRIMARY KEY, task TEXT, highest INT) WITHOUT ROWID;
CREATE TABLE tags (task TEXT, tag TEXT, version INT, PRIMARY KEY (task, tag)) WITHOUT ROWID;
CREATE TABLE taken (task TEXT, number INT, PRIMARY KEY (task, number)) WITHOUT ROWID;
CREATE TABLE agreed (task TEXT, tag TEXT, version INT, PRIMARY KEY (task, tag)) WITHOUT ROWID;
"""
BASE_SCHEMA = """
ALTER TABLE packs ADD COLUMN whole INT DEFAULT 1;
CREATE TABLE shards (kind TEXT, run INT, first TEXT, shard BLOB, size_bytes INT, is_read INT,
    PRIMARY KEY (kind, run, first)) WITHOUT ROWID;
CREATE TABLE news (folded TEXT, number INT, says TEXT, PRIMARY KEY (folded, number)) WITHOUT ROWID;
CREATE TABLE sizes (number INT PRIMARY KEY, index_bytes INT);
"""
"""What version 2 adds to version 1"""
ADDED = (  # added later; an older mirror has no rows here for entries that it had read before
    "CREATE TABLE IF NOT EXISTS strays (name TEXT PRIMARY KEY) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS copies (name TEXT PRIMARY KEY, data BLOB)",
)
OF_THE_LOG = ("packs", "tensors", "manifests", "versions", "names", "tags", "shards", "news", "sizes")


class LogTables(LogState):
    """A state that can be written. For one thread."""

    url: str

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # after some errors, such as a full disk, SQLite has ended it
                self._db.execute("ROLLBACK")
            raise

    def _enter_packs(self, number: int, index: LogIndex) -> None:
        """Enters packs and manifests. A pack that the base has, too, is noticed only if that part of it is read."""
        db = self._db
        for pack, listing in index.packs.items():
            if db.execute("SELECT 1 FROM packs WHERE pack = ? AND (whole OR dropped)", (pack,)).fetchone():
                raise self._broken(number, f"pack {pack.hex()} was there before")
            if db.execute("SELECT 1 FROM packs WHERE pack = ?", (pack,)).fetchone():  # only named by `shared` so far
                db.execute("DELETE FROM tensors WHERE pack = ?", (pack,))
            db.execute("INSERT OR REPLACE INTO packs VALUES (?, ?, 0, 1)", (pack, listing.file_bytes))
            self._enter_places(pack, listing)
        for key, text in index.manifests.items():
            db.execute("INSERT OR IGNORE INTO manifests VALUES (?, ?)", (key, zlib.compress(text, 1)))

    def _enter_places(self, pack: bytes, listing: PackListing) -> None:
        self._db.executemany(
            "INSERT OR REPLACE INTO tensors VALUES (?, ?, ?, ?, ?, ?)",
            [
                (from_digest(digest), pack, p.dtype, json.dumps(p.shape), p.offset, p.length)
                for digest, p in listing.places.items()
            ],
        )

    def _enter_shared(self, packs: Mapping[bytes, PackListing]) -> None:
        """Enters hints about packs that are not known whole. Hints about other packs are ignored."""
        for pack, listing in packs.items():
            row = self._db.execute("SELECT whole, dropped FROM packs WHERE pack = ?", (pack,)).fetchone()
            if row is None:
                self._db.execute("INSERT INTO packs VALUES (?, ?, 0, 0)", (pack, listing.file_bytes))
            if row in (None, (0, 0)):
                self._enter_places(pack, listing)

    def _enter_drop(self, packs: list[bytes]) -> None:
        for pack in packs:  # also of uploads that no entry names
            self._db.execute(
                "INSERT INTO packs VALUES (?, 0, 1, 1) ON CONFLICT (pack) DO UPDATE SET dropped = 1", (pack,)
            )
            self._db.execute("DELETE FROM tensors WHERE pack = ?", (pack,))

    def _enter_strays(self, number: int, names: list[str]) -> None:
        for name in names:
            if self.copy(name):
                raise self._broken(number, f"it drops {name}, which an entry names")
            self._db.execute("INSERT OR IGNORE INTO strays VALUES (?)", (name,))

    def _enter_task(self, number: int, says: LogIndex, is_run: bool = False) -> None:
        """Enters what an entry, or a run, says of one task. Versions that a run removes need no manifest."""
        db = self._db
        for version in says.versions:
            self._enter_name(number, version.task, version.number)
            if self.version(version.task, version.number) is not None:
                raise self._broken(number, f"version {version.task}@{version.number} was there before")
            if not db.execute("SELECT 1 FROM manifests WHERE manifest = ?", (version.manifest,)).fetchone() and not (
                is_run and (version.task, version.number) in says.removed
            ):
                raise self._broken(number, f"the manifest of version {version.task}@{version.number} is nowhere")
            db.execute(
                "INSERT INTO versions VALUES (?, ?, ?, ?, 0)",
                (version.task, version.number, version.time_ns, version.manifest),
            )
        for task, highest in says.highest.items():
            self._enter_name(number, task, highest)
        for tag in says.tags:
            if self.tag(tag.task, tag.tag) != tag.before or not (
                tag.version is None or self.has_version(tag.task, tag.version)
            ):
                raise self._broken(number, f"tag {tag.task}@{tag.tag} stood for something else, or its version is gone")
            db.execute("DELETE FROM tags WHERE (task, tag) = (?, ?)", (tag.task, tag.tag))
            if tag.version is not None:
                db.execute("INSERT INTO tags VALUES (?, ?, ?)", (tag.task, tag.tag, tag.version))
        for task, gone in says.removed:
            if not self.has_version(task, gone) or self.tags_of(task, gone):
                raise self._broken(number, f"version {task}@{gone} is not there, or tagged")
            db.execute("UPDATE versions SET removed = 1 WHERE (task, number) = (?, ?)", (task, gone))

    def _enter_name(self, number: int, task: str, highest: int) -> None:
        spelled = self.spelling(task)
        if spelled not in (None, task):
            raise self._broken(number, f"task {task!r} differs only in case from {spelled!r}")
        self._db.execute(
            "INSERT INTO names VALUES (?, ?, ?) "
            "ON CONFLICT (folded) DO UPDATE SET highest = max(highest, excluded.highest)",
            (task.casefold(), task, highest),
        )

    def _broken(self, number: int, problem: str) -> DamagedRemoteError:
        return DamagedRemoteError(self.url, entry_name(number), problem)
