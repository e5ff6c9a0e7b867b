"""What a store knows of a remote: what its log says up to some entry, and what both last agreed on.

It is an SQLite file in the store's directory. If the file is missing or cannot be read, it is made anew from the log.
Then it is not known what both agreed on. So tags that differ clash until somebody settles them by hand. A version that
was removed here and swept is pulled again.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from pear_store.errors import PlaceError
from pear_store.local.directory import open_folder
from pear_store.remote.base import by_task
from pear_store.remote.log import BaseName, Head, LogIndex, entry_name, index_name, parse_entry
from pear_store.remote.partial import PartialState
from pear_store.remote.tables import ADDED, BASE_SCHEMA, SCHEMA, VERSION


class Mirror(PartialState):
    """The state of a remote after the entry `head`. For one thread.

    Args:
        path: its file. None: it is in memory, for stores that may not be written.
        url: the remote's URL, for messages.
    """

    def __init__(self, path: Path | None, url: str) -> None:
        self.url = url
        self._path = path
        if path is not None:
            with open_folder(path.parent) as folder, suppress(FileNotFoundError):
                folder.check(path.name)
        try:
            self._db = self._open()
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
            assert path is not None
            with open_folder(path.parent) as folder:
                for name in (path.name, f"{path.name}-journal"):
                    folder.unlink(name)
            self._db = self._open()

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path or ":memory:", timeout=60, isolation_level=None)
        try:
            known = db.execute("PRAGMA user_version").fetchone()
            if known != (VERSION,) and known in [(version,) for version in range(VERSION)]:
                db.execute("BEGIN IMMEDIATE")
                (version,) = db.execute("PRAGMA user_version").fetchone()  # another process may have been first
                schemas = [SCHEMA, BASE_SCHEMA][version:]
                for statement in [one for schema in schemas for one in schema.split(";")[:-1]]:
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {VERSION}")
                db.execute("COMMIT")
            if db.execute("PRAGMA user_version").fetchone() != (VERSION,):
                raise sqlite3.DatabaseError("it is of another format")
            for statement in ADDED:
                db.execute(statement)
        except BaseException:
            db.close()
            raise
        return db

    def close(self) -> None:
        self._db.close()

    # ---- the log

    @property
    def head(self) -> Head:
        """The last entry that is known, and its hash. (0, None): there is none."""
        value = self._known("head")
        return (0, None) if value is None else (int.from_bytes(value[:8], "big"), value[8:])

    @property
    def was_probed(self) -> bool:
        return self._known("probed") is not None

    def note_probed(self) -> None:
        self._db.execute("INSERT OR REPLACE INTO known VALUES ('probed', x'01')")

    @property
    def id(self) -> str | None:
        """The remote's id, if it is known."""
        value = self._known("id")
        return None if value is None else value.decode()

    def note_id(self, id: str) -> bool:
        """Notes a remote's id, if none is known. Returns whether it is the known one."""
        self._db.execute("INSERT OR IGNORE INTO known VALUES ('id', ?)", (id.encode(),))
        return self.id == id

    @property
    def witness(self) -> Head:
        """The last entry that was known before the mirror forgot the log, and its hash. (0, None): there is none."""
        value = self._known("witness")
        return (0, None) if value is None else (int.from_bytes(value[:8], "big"), value[8:])

    @property
    def base(self) -> BaseName | None:
        """The newest base that an entry names, or that this store made."""
        value = self._known("base")
        if value is None:
            return None
        number, name = json.loads(value)
        return BaseName(number, bytes.fromhex(name))

    def note_base(self, base: BaseName) -> None:
        with self._transaction():
            self._note_base(base)

    def _note_base(self, base: BaseName | None) -> None:
        if base is not None and (self.base is None or self.is_refused(self.base) or self.base < base):
            self._note("base", json.dumps([base.number, base.hash.hex()]).encode())
            self._db.execute("DELETE FROM sizes WHERE number <= ?", (base.number,))

    def since_base(self) -> tuple[int, int]:
        """How many entries follow the newest base, and the bytes of their indexes that are known."""
        (size_bytes,) = self._db.execute("SELECT coalesce(sum(index_bytes), 0) FROM sizes").fetchone()
        return self.head[0] - (self.base.number if self.base else 0), size_bytes

    def apply(self, number: int, data: bytes, index: LogIndex) -> bool:
        """Enters an entry. An entry that is known already changes nothing.

        Returns:
            whether it is known now. False: another process has forgotten earlier entries, so they must be read again.

        Raises:
            DamagedRemoteError: the entry contradicts the entries before it.
        """
        entry = parse_entry(data, self.url, number)
        with self._transaction() as db:
            head, known = self.head
            if number <= head:
                return True
            if number > head + 1:
                return False
            if entry.previous != known:
                raise self._broken(number, "it does not follow the one before it")
            if self.is_stray(index_name(entry.index)):
                raise self._broken(number, f"{index_name(entry.index)} was dropped before")
            self._enter(db, number, index)
            for name, copy in ((entry_name(number), data), (index_name(entry.index), index.raw)):
                if copy:
                    db.execute("INSERT OR IGNORE INTO copies VALUES (?, ?)", (name, copy))
            value = number.to_bytes(8, "big") + hashlib.sha256(data).digest()
            db.execute("INSERT OR REPLACE INTO known VALUES ('head', ?)", (value,))
            db.execute("INSERT OR REPLACE INTO sizes VALUES (?, ?)", (number, len(index.raw)))
            self._note_base(entry.base)
        return True

    def check(self, head: Head, index: LogIndex) -> bool:
        """Checks what the entry after `head` would say. Enters nothing.

        Returns:
            whether `head` is still the last known entry. Another process may have read later ones.

        Raises:
            DamagedRemoteError: the entry would contradict the entries before it.
        """
        self.need_tasks(by_task(index))
        self._db.execute("BEGIN IMMEDIATE")
        try:
            if self.head != head:
                return False
            self._enter(self._db, head[0] + 1, index)
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        return True

    # ---- what store and remote agreed on

    def taken(self, task: str, number: int) -> bool:
        """Whether this store has, or once had, the remote's version of this number."""
        return (
            self._db.execute("SELECT 1 FROM taken WHERE (task, number) = (?, ?)", (task, number)).fetchone() is not None
        )

    def take(self, versions: Iterable[tuple[str, int]]) -> None:
        with self._transaction() as db:
            db.executemany("INSERT OR IGNORE INTO taken VALUES (?, ?)", versions)

    def agreed(self, task: str, tag: str) -> int | None:
        """The version that a tag named when both sides last agreed on it."""
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


def is_replaced(error: sqlite3.DatabaseError) -> bool:
    """Whether a mirror's file was deleted while it was open. Another process does so if the file is damaged."""
    return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_READONLY_DBMOVED


def is_damage(error: sqlite3.DatabaseError) -> bool:
    """Whether an error means that a mirror's file is damaged.

    For text that is no UTF-8, Python raises an OperationalError of its own, which has no SQLite code.
    """
    return not isinstance(error, sqlite3.OperationalError) or not hasattr(error, "sqlite_errorcode")


@contextmanager
def opened_mirror(path: Path | None, url: str) -> Iterator[Mirror]:
    """A mirror. The end of the context closes it.

    Raises:
        PlaceError: its file cannot be read or written.
    """
    try:
        with closing(Mirror(path, url)) as mirror:
            yield mirror
    except sqlite3.DatabaseError as error:
        if is_damage(error):
            raise PlaceError(url, f"{path} is damaged ({error}); delete it: it is made anew from the log") from None
        if is_replaced(error):
            raise PlaceError(url, f"{path} was made anew by another command; run the same again") from None
        raise PlaceError(url, f"{path}: {error}") from None
