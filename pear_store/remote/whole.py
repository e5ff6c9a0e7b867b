"""A remote's whole log, read from its first entry into a temporary file. Upkeep works with this.

A store's mirror only knows what a push and a pull need. To call something dead, more must be known: which tensors
versions need, which objects entries name, and when each name was dropped.
"""

import re
import sqlite3
import tempfile
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pear_store.errors import PlaceError
from pear_store.format.container import Place as TensorPlace
from pear_store.format.digest import Digest, from_digest, to_digest
from pear_store.format.manifest import manifest_digests
from pear_store.remote.log import BaseName, LogIndex, pack_name, parse_entry
from pear_store.remote.mirror import Mirror

_TABLES = (
    "CREATE TABLE needs (digest BLOB PRIMARY KEY, named INT, needed INT) WITHOUT ROWID",
    "CREATE TABLE drops (name TEXT PRIMARY KEY, entry INT) WITHOUT ROWID",
    "CREATE TABLE times (entry INTEGER PRIMARY KEY, time_ns INT)",
    "CREATE TABLE bases (base INT, hash BLOB, entry INT, PRIMARY KEY (base, hash)) WITHOUT ROWID",
    "PRAGMA synchronous = OFF",
)
_DIGEST = re.compile(rb"sha256:([0-9a-f]{64})")


@dataclass(frozen=True)
class PackUse:
    """A pack that was not dropped, and how much of it versions may need."""

    pack: bytes
    file_bytes: int
    tensor_bytes: int
    needed: int
    """How many of its tensors versions may need"""
    needed_bytes: int


class WholeMirror(Mirror):
    """The state of a remote, and what its versions need. It is made anew each time, in a file of its own."""

    takes_bases = False

    def _open(self) -> sqlite3.Connection:
        db = super()._open()
        for statement in _TABLES:
            db.execute(statement)
        return db

    def apply(self, number: int, data: bytes, index: LogIndex) -> bool:
        is_known = super().apply(number, data, index)
        entry = parse_entry(data, self.url, number)
        self._db.execute("INSERT OR IGNORE INTO times VALUES (?, ?)", (number, entry.time_ns))
        if entry.base is not None:
            self._db.execute("INSERT OR IGNORE INTO bases VALUES (?, ?, ?)", (*entry.base, number))
        return is_known

    def believe(self, number: int, hash: bytes) -> None:
        """Sets the hash of the last entry to the one that the next entry names, although its bytes have another."""
        value = number.to_bytes(8, "big") + hash
        self._db.execute("INSERT OR REPLACE INTO known VALUES ('head', ?)", (value,))

    def _enter(self, db: sqlite3.Connection, number: int, index: LogIndex) -> None:
        super()._enter(db, number, index)
        for version in index.versions:
            self._count(db, version.manifest, 1)
        for task, gone in index.removed:
            found = self.version(task, gone)
            assert found is not None
            self._count(db, found[0].manifest, -1)
        names = [*map(pack_name, index.drop), *index.strays]
        db.executemany("INSERT OR IGNORE INTO drops VALUES (?, ?)", [(name, number) for name in names])

    def _count(self, db: sqlite3.Connection, manifest: bytes, by: int) -> None:
        exact, named = needs(self.manifest(manifest))
        db.executemany(
            "INSERT INTO needs VALUES (?, ?, ?) ON CONFLICT (digest) "
            "DO UPDATE SET named = named + excluded.named, needed = needed + excluded.needed",
            [(digest, by, by if digest in exact else 0) for digest in named],
        )

    @contextmanager
    def after(self, index: LogIndex) -> Iterator[None]:
        """A context in which questions are answered as if the next entry had this index."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._enter(self._db, self.head[0] + 1, index)
            yield
        finally:
            self._db.execute("ROLLBACK")

    def uses(self) -> Iterator[PackUse]:
        """Every pack that was not dropped."""
        query = """
            SELECT packs.pack, packs.file_bytes, coalesce(sum(length), 0), count(needs.digest),
                coalesce(sum(CASE WHEN needs.digest IS NULL THEN 0 ELSE length END), 0)
            FROM packs LEFT JOIN tensors ON tensors.pack = packs.pack
                LEFT JOIN needs ON needs.digest = tensors.digest AND needs.named > 0
            WHERE NOT packs.dropped GROUP BY packs.pack ORDER BY packs.pack"""
        return (PackUse(bytes(pack), *numbers) for pack, *numbers in self._db.execute(query))

    def tensors_of(self, pack: bytes, only_needed: bool = False) -> list[tuple[Digest, TensorPlace]]:
        """A pack's tensors and their places, in the order in which they lie in the pack."""
        query = "SELECT digest FROM tensors WHERE pack = ? ORDER BY offset"
        if only_needed:
            query = query.replace(" ORDER", " AND digest IN (SELECT digest FROM needs WHERE named > 0) ORDER")
        found = []
        for (digest,) in self._db.execute(query, (pack,)):
            name = to_digest(digest)
            found += [(name, place) for other, place in self.places(name) if other == pack]
        return found

    def is_needed(self, digest: Digest) -> bool:
        query = "SELECT 1 FROM needs WHERE digest = ? AND named > 0"
        return self._db.execute(query, (from_digest(digest),)).fetchone() is not None

    def unlisted(self) -> list[Digest]:
        """Tensors that versions need and no pack has."""
        query = "SELECT digest FROM needs WHERE needed > 0 AND digest NOT IN (SELECT digest FROM tensors)"
        return [to_digest(digest) for (digest,) in self._db.execute(query)]

    def hit(self, digests: Collection[Digest]) -> dict[Digest, list[tuple[str, int]]]:
        """For each tensor, the versions that need it."""
        found: dict[Digest, list[tuple[str, int]]] = {digest: [] for digest in digests}
        if not found:
            return found
        wanted = {from_digest(digest) for digest in digests}
        query = "SELECT manifest, task, number FROM versions WHERE NOT removed ORDER BY manifest, task, number"
        last, hits = b"", set[bytes]()
        for manifest, task, number in self._db.execute(query):
            if manifest != last:
                last, hits = manifest, needs(self.manifest(manifest))[0] & wanted
            for digest in hits:
                found[to_digest(digest)].append((task, number))
        return found

    def knows_pack(self, pack: bytes) -> bool:
        """Whether an entry names a pack or drops it."""
        return self._db.execute("SELECT 1 FROM packs WHERE pack = ?", (pack,)).fetchone() is not None

    def dropped_in(self, name: str) -> int | None:
        """The entry that dropped an object, by its name. None: no entry did."""
        row = self._db.execute("SELECT entry FROM drops WHERE name = ?", (name,)).fetchone()
        return None if row is None else int(row[0])

    def times_ns(self) -> dict[int, int]:
        """The latest time at which each entry can have been written.

        If a later entry has an earlier time, that time counts. So a writer's clock that was ahead delays deletions only
        until the next entry.
        """
        found: dict[int, int] = {}
        earliest = 1 << 63
        for entry, time_ns in self._db.execute("SELECT entry, time_ns FROM times ORDER BY entry DESC"):
            found[entry] = earliest = min(earliest, time_ns)
        return found

    def newest_base(self) -> BaseName | None:
        """The newest base that an entry names."""
        row = self._db.execute("SELECT base, hash FROM bases ORDER BY base DESC, entry LIMIT 1").fetchone()
        return row and BaseName(*row)

    def base_replaced_in(self, number: int) -> int | None:
        """The first entry that names a newer base than the base of this number. None: no entry does."""
        entry: int | None = self._db.execute("SELECT min(entry) FROM bases WHERE base > ?", (number,)).fetchone()[0]
        return entry


def needs(manifest: bytes) -> tuple[set[bytes], set[bytes]]:
    """The tensors that a manifest needs; and all digests in it, because a newer Pear may have more fields for them."""
    named = set(map(bytes.fromhex, map(bytes.decode, _DIGEST.findall(manifest))))
    try:
        exact = set(map(from_digest, manifest_digests(manifest)))
    except ValueError:  # no reader takes such a version
        exact = set()
    return exact, named | exact


@contextmanager
def whole_mirror(url: str) -> Iterator[WholeMirror]:
    """An empty mirror in a temporary folder, which the end of the context deletes.

    Raises:
        PlaceError: its file cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="pear-") as folder:
        try:
            with closing(WholeMirror(Path(folder).resolve() / "mirror", url)) as mirror:
                yield mirror
        except sqlite3.DatabaseError as error:
            raise PlaceError(url, f"its log cannot be read into {folder}: {error}; check the space there") from None
