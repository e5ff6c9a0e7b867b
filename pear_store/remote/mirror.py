"""What a store knows of a remote: all that its log says up to some entry, and what both agreed on.

It is an SQLite file in the store's directory, and is made anew from the log where it is gone or cannot be read. Then
nothing is known of what both agreed on: tags that differ are a clash until they are settled by hand, and a version that
was removed here and swept is pulled again.
"""

import hashlib
import json
import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from pear_store.errors import DamagedRemoteError, PlaceError
from pear_store.format.digest import from_digest
from pear_store.local.directory import open_folder
from pear_store.remote.log import LogIndex, entry_name, parse_entry
from pear_store.remote.state import LogState

_SCHEMA = """
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
PRAGMA user_version = 1;
"""


class Mirror(LogState):
    """The state of a remote after the entry `head`, for one thread.

    Args:
        path: of its file; None: in memory, for stores that may not be written.
        url: of the remote, for messages.
    """

    def __init__(self, path: Path | None, url: str) -> None:
        self.url = url
        self._path = path
        if path is not None:
            with open_folder(path.parent) as folder, suppress(FileNotFoundError):
                folder.check(path.name)
        try:
            self._db = self._open()
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError:
            assert path is not None
            with open_folder(path.parent) as folder:
                for name in (path.name, f"{path.name}-journal"):
                    folder.unlink(name)
            self._db = self._open()

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path or ":memory:", timeout=60, isolation_level=None)
        try:
            if db.execute("PRAGMA user_version").fetchone() == (0,):
                db.execute("BEGIN IMMEDIATE")
                if db.execute("PRAGMA user_version").fetchone() == (0,):  # no other process was first
                    for statement in _SCHEMA.split(";")[:-1]:
                        db.execute(statement)
                db.execute("COMMIT")
            if db.execute("PRAGMA user_version").fetchone() != (1,):
                raise sqlite3.DatabaseError("it is of another format")
        except BaseException:
            db.close()
            raise
        return db

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise

    # ---- the log

    def _known(self, key: str) -> bytes | None:
        row = self._db.execute("SELECT value FROM known WHERE key = ?", (key,)).fetchone()
        return None if row is None else bytes(row[0])

    @property
    def head(self) -> tuple[int, bytes | None]:
        """The last entry that is known, and its hash; (0, None): none."""
        value = self._known("head")
        return (0, None) if value is None else (int.from_bytes(value[:8], "big"), value[8:])

    @property
    def was_probed(self) -> bool:
        return self._known("probed") is not None

    def note_probed(self) -> None:
        self._db.execute("INSERT OR REPLACE INTO known VALUES ('probed', x'01')")

    def note_id(self, id: str) -> bool:
        """Notes a remote's id, if none is known; says whether it is the one that is known."""
        known = self._known("id")
        if known is None:
            self._db.execute("INSERT INTO known VALUES ('id', ?)", (id.encode(),))
        return known in (None, id.encode())

    def apply(self, number: int, data: bytes, index: LogIndex) -> None:
        """Enters an entry. One that is known changes nothing.

        Raises:
            DamagedRemoteError: it contradicts the entries before it.
        """
        entry = parse_entry(data, self.url, number)
        with self._transaction() as db:
            head, known = self.head
            if number <= head:
                return
            if number != head + 1 or entry.previous != known:
                raise self._broken(number, "it does not follow the one before it")
            self._enter(db, number, index)
            value = number.to_bytes(8, "big") + hashlib.sha256(data).digest()
            db.execute("INSERT OR REPLACE INTO known VALUES ('head', ?)", (value,))

    def check(self, number: int, index: LogIndex) -> None:
        """Raises a DamagedRemoteError if an entry would contradict those before it."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._enter(self._db, number, index)
        finally:
            self._db.execute("ROLLBACK")

    def _enter(self, db: sqlite3.Connection, number: int, index: LogIndex) -> None:
        for pack, listing in index.packs.items():
            if db.execute("SELECT 1 FROM packs WHERE pack = ?", (pack,)).fetchone():
                raise self._broken(number, f"pack {pack.hex()} was there before")
            db.execute("INSERT INTO packs VALUES (?, ?, 0)", (pack, listing.file_bytes))
            db.executemany(
                "INSERT INTO tensors VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (from_digest(digest), pack, p.dtype, json.dumps(p.shape), p.offset, p.length)
                    for digest, p in listing.places.items()
                ],
            )
        for key, text in index.manifests.items():
            db.execute("INSERT OR IGNORE INTO manifests VALUES (?, ?)", (key, zlib.compress(text, 1)))
        for version in index.versions:
            self._enter_name(db, number, version.task, version.number)
            if self.version(version.task, version.number) is not None:
                raise self._broken(number, f"version {version.task}@{version.number} was there before")
            if not db.execute("SELECT 1 FROM manifests WHERE manifest = ?", (version.manifest,)).fetchone():
                raise self._broken(number, f"the manifest of version {version.task}@{version.number} is nowhere")
            db.execute(
                "INSERT INTO versions VALUES (?, ?, ?, ?, 0)",
                (version.task, version.number, version.time_ns, version.manifest),
            )
        for task, highest in index.highest.items():
            self._enter_name(db, number, task, highest)
        for tag in index.tags:
            if self.tag(tag.task, tag.tag) != tag.before or not (
                tag.version is None or self.has_version(tag.task, tag.version)
            ):
                raise self._broken(number, f"tag {tag.task}@{tag.tag} stood for something else, or its version is gone")
            db.execute("DELETE FROM tags WHERE (task, tag) = (?, ?)", (tag.task, tag.tag))
            if tag.version is not None:
                db.execute("INSERT INTO tags VALUES (?, ?, ?)", (tag.task, tag.tag, tag.version))
        for task, gone in index.removed:
            if not self.has_version(task, gone) or self.tags_of(task, gone):
                raise self._broken(number, f"version {task}@{gone} is not there, or tagged")
            db.execute("UPDATE versions SET removed = 1 WHERE (task, number) = (?, ?)", (task, gone))
        for pack in index.drop:  # also of uploads that no entry names
            db.execute("INSERT INTO packs VALUES (?, 0, 1) ON CONFLICT (pack) DO UPDATE SET dropped = 1", (pack,))
            db.execute("DELETE FROM tensors WHERE pack = ?", (pack,))

    def _enter_name(self, db: sqlite3.Connection, number: int, task: str, highest: int) -> None:
        spelled = self.spelling(task)
        if spelled not in (None, task):
            raise self._broken(number, f"task {task!r} differs only in case from {spelled!r}")
        db.execute(
            "INSERT INTO names VALUES (?, ?, ?) "
            "ON CONFLICT (folded) DO UPDATE SET highest = max(highest, excluded.highest)",
            (task.casefold(), task, highest),
        )

    def _broken(self, number: int, problem: str) -> DamagedRemoteError:
        return DamagedRemoteError(self.url, entry_name(number), problem)

    # ---- what store and remote agreed on

    def taken(self, task: str, number: int) -> bool:
        """Whether this store has, or had, a version as the remote has it."""
        return (
            self._db.execute("SELECT 1 FROM taken WHERE (task, number) = (?, ?)", (task, number)).fetchone() is not None
        )

    def take(self, versions: Iterable[tuple[str, int]]) -> None:
        with self._transaction() as db:
            db.executemany("INSERT OR IGNORE INTO taken VALUES (?, ?)", versions)

    def agreed(self, task: str, tag: str) -> int | None:
        """What a tag stood for when both sides last had the same."""
        row = self._db.execute("SELECT version FROM agreed WHERE (task, tag) = (?, ?)", (task, tag)).fetchone()
        return None if row is None else int(row[0])

    def agreed_tags(self) -> dict[tuple[str, str], int]:
        return {(task, tag): number for task, tag, number in self._db.execute("SELECT task, tag, version FROM agreed")}

    def agree(self, tags: Iterable[tuple[str, str, int | None]]) -> None:
        with self._transaction() as db:
            for task, tag, version in tags:
                db.execute("DELETE FROM agreed WHERE (task, tag) = (?, ?)", (task, tag))
                if version is not None:
                    db.execute("INSERT INTO agreed VALUES (?, ?, ?)", (task, tag, version))


@contextmanager
def opened_mirror(path: Path | None, url: str) -> Iterator[Mirror]:
    """A mirror, closed at the end of its context.

    Raises:
        PlaceError: its file cannot be read or written.
    """
    try:
        with closing(Mirror(path, url)) as mirror:
            yield mirror
    except sqlite3.OperationalError as error:
        raise PlaceError(url, f"{path}: {error}") from None
    except sqlite3.DatabaseError as error:
        raise PlaceError(url, f"{path} is damaged ({error}): delete it, it is made anew from the log") from None
