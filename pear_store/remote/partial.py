"""A state that comes from a base and from the entries after it. Shards of the base are read when they are needed.

What entries say of a task waits in a table until the base's shards of that task are read. If the base is missing or
damaged, or contradicts itself or the log, it is refused. Then the log is read without it.
"""

import json
import sqlite3
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from pear_store.errors import AbsentError, DamagedRemoteError
from pear_store.pools import ThreadPool
from pear_store.remote.base import END, KINDS, Kind, Root, base_name, by_task, parse_root, shard_name
from pear_store.remote.log import MAX_INDEX_BYTES, BaseName, LogIndex, parse_index, parse_news
from pear_store.remote.place import Place
from pear_store.remote.renewed import RenewedState
from pear_store.remote.tables import OF_THE_LOG

READERS = 16
"""How many shards are read at once, and entered in one transaction"""
_MOST_REFUSED = 1000
News = list[tuple[int, LogIndex]]
"""What runs and entries say of a task, with their numbers"""


class BaseShard(NamedTuple):
    """A shard of a base, as a mirror knows it. `until` is the first name of the next shard."""

    kind: Kind
    run: int
    first: str
    until: str
    hash: bytes
    size_bytes: int
    is_read: bool


class Coverage:
    """Which shards of a base are read, and which are not."""

    def __init__(self, rows: Iterable[tuple[Kind, int, str, bytes, int, int]]) -> None:
        runs: dict[Kind, dict[int, list[BaseShard]]] = {kind: {} for kind in KINDS}
        for kind, run, first, name, size_bytes, is_read in rows:  # they are sorted
            shards = runs[kind].setdefault(run, [])
            if shards:
                shards[-1] = shards[-1]._replace(until=first)
            shards.append(BaseShard(kind, run, first, END * 2, name, size_bytes, bool(is_read)))
        self._runs = {
            kind: {run: ([shard.first for shard in shards], shards) for run, shards in by_run.items()}
            for kind, by_run in runs.items()
        }
        left = {
            kind: [shard.size_bytes for shards in by_run.values() for shard in shards if not shard.is_read]
            for kind, by_run in runs.items()
        }
        self.left = {kind: len(sizes) for kind, sizes in left.items()}
        self.left_bytes = {kind: sum(sizes) for kind, sizes in left.items()}

    def unread(self, kind: Kind, low: str, high: str) -> list[BaseShard]:
        """The unread shards that may have a name from `low` to `high`."""
        if not self.left[kind]:
            return []
        found: list[BaseShard] = []
        for firsts, shards in self._runs[kind].values():
            start, end = max(bisect_right(firsts, low) - 1, 0), bisect_right(firsts, high)
            found += [shard for shard in shards[start:end] if not shard.is_read]
        return found

    def runs(self) -> set[int]:
        return {run for by_run in self._runs.values() for run in by_run}


class PartialState(RenewedState):
    """The part of a base that is read, and what waits for the rest."""

    takes_bases = True
    _coverage: Coverage | None = None
    _version = -1

    def _cover(self) -> Coverage:
        (version,) = self._db.execute("PRAGMA data_version").fetchone()  # changes if another process has written
        if self._coverage is None or version != self._version:
            rows = self._db.execute(
                "SELECT kind, run, first, shard, size_bytes, is_read FROM shards ORDER BY kind, run, first"
            )
            self._coverage, self._version = Coverage(rows), version
        return self._coverage

    def left_bytes(self, kind: Kind) -> int:
        """The bytes of the base's unread shards of a kind."""
        return self._cover().left_bytes[kind]

    def _need(self, kind: Kind, low: str, high: str | None = None) -> None:
        self._catch_up()
        if self._cover().left[kind]:
            self._read(lambda cover: cover.unread(kind, low, low if high is None else high))

    def need_all(self, kind: Kind | None = None) -> None:
        self._catch_up()
        kinds: list[Kind] = ["drop", kind] if kind else [*KINDS]
        while any(self._cover().left[one] for one in kinds):  # again, if a base was refused meanwhile
            for one in kinds:
                self._need(one, "", END)

    def need_tasks(self, tasks: Collection[str]) -> None:
        self._catch_up()
        if self._cover().left["tasks"]:
            names = sorted({task.casefold() for task in tasks})
            self._read(lambda cover: [shard for name in names for shard in cover.unread("tasks", name, name)])

    def _read(self, unread: Callable[[Coverage], list[BaseShard]]) -> None:
        """Reads shards. If that fails, the base is refused, and the log is read instead: then no shard is left."""
        while True:
            base = self.begun_with  # first: another process may begin with another base meanwhile
            if not (shards := unread(self._cover())):
                return
            assert not self._db.in_transaction and self._place is not None
            try:
                self._read_shards(self._place, sorted(set(shards), key=lambda shard: shard.first))
            except (DamagedRemoteError, AbsentError):
                self.refuse_base(base)
                self._read_again()

    def _read_shards(self, place: Place, shards: list[BaseShard]) -> None:
        with ThreadPool(READERS) as pool:
            for start in range(0, len(shards), READERS):
                part = shards[start : start + READERS]
                indexes = list(pool.map(lambda shard: _fetch(place, self.url, shard), part))
                with self._transaction():
                    self._coverage = None
                    try:
                        self._enter_shards(list(zip(part, indexes, strict=True)))
                    except BaseException:
                        self._coverage = None
                        raise

    def _enter_shards(self, shards: list[tuple[BaseShard, LogIndex]]) -> None:
        news: dict[str, News] = {}
        for shard, index in shards:
            done = self._db.execute(
                "UPDATE shards SET is_read = 1 WHERE (kind, run, first, shard, is_read) = (?, ?, ?, ?, 0)",
                (shard.kind, shard.run, shard.first, shard.hash),
            )
            if not done.rowcount:  # another process has read it, or has begun anew
                continue
            if shard.kind == "tasks":
                for folded, says in self._said(shard, index).items():
                    news.setdefault(folded, []).append((shard.run, says))
                self._enter_packs(shard.run, LogIndex(manifests=index.manifests))
                self._enter_shared(index.shared)
                waiting = "SELECT folded, number, says FROM news WHERE folded >= ? AND folded < ?"
                for folded, number, says in self._db.execute(waiting, (shard.first, shard.until)):
                    if all(number != known for known, _ in news.setdefault(folded, [])):
                        news[folded].append((number, parse_news(says)))
            elif shard.kind == "packs":
                self._check_range(shard, [pack.hex() for pack in (*index.packs, *index.drop)])
                dropped = [pack for pack in index.packs if self._is_known_dropped(pack)]
                for pack in dropped:
                    del index.packs[pack]
                self._enter_packs(shard.run, index)
                self._enter_drop(index.drop)
            else:
                self._enter_drop(index.drop)
        self._enter_news(news)

    def _said(self, shard: BaseShard, index: LogIndex) -> dict[str, LogIndex]:
        said = dict(by_task(index))
        self._check_range(shard, said)
        return said

    def _check_range(self, shard: BaseShard, names: Iterable[str]) -> None:
        if any(not shard.first <= name < shard.until for name in names):
            raise DamagedRemoteError(self.url, shard_name(shard.hash), "it has what belongs to another shard")

    def _is_known_dropped(self, pack: bytes) -> bool:
        return self._db.execute("SELECT 1 FROM packs WHERE pack = ? AND dropped", (pack,)).fetchone() is not None

    def _enter_news(self, news: dict[str, News]) -> None:
        """Enters what is said of tasks. If unread shards may say more of a task, its news wait."""
        cover = self._cover()
        runs = cover.runs()
        for folded, said in news.items():
            if cover.unread("tasks", folded, folded):
                self._db.executemany(
                    "INSERT OR IGNORE INTO news VALUES (?, ?, ?)",
                    [(folded, number, says.text()) for number, says in said],
                )
                continue
            for number, says in sorted(said, key=lambda one: one[0]):
                self._enter_task(number, says, number in runs)
            self._db.execute("DELETE FROM news WHERE folded = ?", (folded,))

    def _enter(self, db: sqlite3.Connection, number: int, index: LogIndex) -> None:
        """Enters what an entry says."""
        self._enter_packs(number, index)
        if self._cover().left["packs"]:
            self._enter_shared(index.shared)
        self._enter_news({folded: [(number, says)] for folded, says in by_task(index).items()})
        self._enter_drop(index.drop)
        self._enter_strays(number, index.strays)

    # ---- which base

    def begin_with(self, base: BaseName, root: Root) -> None:
        """Begins with a base instead of the entries that it covers, unless another process has read entries."""
        with self._transaction():
            if self._known("head"):
                return
            self._forget()
            self._db.executemany(
                "INSERT INTO shards VALUES (?, ?, ?, ?, ?, 0)",
                [
                    (kind, run.last, shard.first, shard.hash, shard.size_bytes)
                    for run in root.runs
                    for kind, shards in run.shards.items()
                    for shard in shards
                ],
            )
            self._note("head", base.number.to_bytes(8, "big") + root.entry)
            self._note("begun with", base.hash)
            self._note("begun at", self._known("head"))
            self._note("base", json.dumps([base.number, base.hash.hex()]).encode())

    @property
    def begun_with(self) -> bytes | None:
        """The hash of the base that this state began with. None: all of it is from the log."""
        return self._known("begun with")

    @property
    def has_base(self) -> bool:
        return self.begun_with is not None

    def refuse_base(self, base: bytes | None) -> None:
        """Refuses a base for ever and forgets the state that began with it. Does nothing if the state has another.

        Args:
            base: the hash of the base that was found bad.
        """
        with self._transaction():
            if base is not None and base == self.begun_with:
                self._note_refused(base)
                self._forget()

    def refuse(self, base: BaseName) -> None:
        """Notes that a base is bad."""
        with self._transaction():
            self._note_refused(base.hash)

    def _note_refused(self, base: bytes) -> None:
        self._note("refused", ((self._known("refused") or b"") + base)[-32 * _MOST_REFUSED :])

    def is_refused(self, base: BaseName) -> bool:
        known = self._known("refused") or b""
        return any(known[at : at + 32] == base.hash for at in range(0, len(known), 32))

    def _forget(self) -> None:
        for table in OF_THE_LOG:
            self._db.execute(f"DELETE FROM {table}")
        if head := self._known("head"):
            if head != self._known("begun at"):  # else only the base has named this entry
                self._note("witness", head)
            self._note("until", max(head[:8], self._known("until") or b""))
            self._note("times begun", (int.from_bytes(self.times_begun or b"") + 1).to_bytes(8))
        for key in ("head", "begun with", "begun at", "base"):
            self._note(key, None)
        self._coverage = None


def fetch_root(place: Place, url: str, base: BaseName) -> Root:
    """Reads a base's root. Raises a DamagedRemoteError or AbsentError if the base is bad."""
    return parse_root(place.get(base_name(base), MAX_INDEX_BYTES), url, base)


def _fetch(place: Place, url: str, shard: BaseShard) -> LogIndex:
    name = shard_name(shard.hash)
    data = place.get(name, shard.size_bytes)
    if len(data) != shard.size_bytes:
        raise DamagedRemoteError(url, name, f"{len(data)} bytes, its base says {shard.size_bytes}")
    return parse_index(data, url, shard.hash, name)
