"""A base of a remote's log: what is read of it is what the log says, and little of it is read for little."""

import hashlib
import json
import os
import random
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pear_store.errors import AbsentError, DamagedRemoteError, PlaceError
from pear_store.format.container import Place as TensorPlace
from pear_store.format.digest import Digest, to_digest
from pear_store.pools import ThreadPool
from pear_store.remote import pull as pulling
from pear_store.remote import reading, rebase
from pear_store.remote.base import Root, Run, Shard, base_name, parse_root, shard_name
from pear_store.remote.commit import Committer
from pear_store.remote.gc import collect
from pear_store.remote.log import (
    SETTINGS_NAME,
    BaseName,
    Entry,
    LoggedTag,
    LoggedVersion,
    LogIndex,
    PackListing,
    encode_settings,
    entry_name,
    index_name,
    parse_entry,
)
from pear_store.remote.memory import MemoryPlace
from pear_store.remote.mirror import Mirror
from pear_store.remote.partial import fetch_root
from pear_store.remote.reading import read_on
from pear_store.remote.rebase import write_base
from pear_store.remote.retry import Persistent
from pear_store.remote.tables import SCHEMA
from tests.helpers.makers import floats, small_task
from tests.pear_store.remote.faults import Client, FaultyPlace, Team, no_connection

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("PEAR_BASE_EXAMPLES", "30"))
TABLES = {
    "packs": "SELECT pack, file_bytes, dropped FROM packs WHERE NOT dropped AND whole",
    "dropped": "SELECT pack FROM packs WHERE dropped",
    "tensors": "SELECT * FROM tensors",
    "versions": "SELECT * FROM versions",
    "names": "SELECT * FROM names",
    "tags": "SELECT * FROM tags",
    "manifests": "SELECT DISTINCT m.manifest FROM manifests m JOIN versions v USING (manifest) WHERE NOT removed",
}


class Counting(MemoryPlace):
    def __init__(self) -> None:
        super().__init__("place")
        self.names: list[str] = []
        self.bytes_read = 0

    def get(self, name: str, at_most: int) -> bytes:
        self.names.append(name)
        data = super().get(name, at_most)
        self.bytes_read += len(data)
        return data


def contents(mirror: Mirror) -> dict[str, set[Any]]:
    return {name: set(mirror._db.execute(query)) for name, query in TABLES.items()}


def whole(place: MemoryPlace) -> Mirror:
    """What the log says, entry by entry: no base is read."""
    mirror = Mirror(None, "place")
    bases = {name: place.objects.pop(name) for name in list(place.objects) if name.startswith("base/")}
    read_on(mirror, place)
    place.objects |= bases
    return mirror


class History:
    """A log that grows by chance, with packs, versions, tags, removals and drops."""

    def __init__(self, seed: int, place: MemoryPlace, tasks: int = 12) -> None:
        self.random, self.place = random.Random(seed), place
        place.create(SETTINGS_NAME, encode_settings("0" * 32))
        self.mirror = Mirror(None, "place")
        read_on(self.mirror, place)
        letters = "abXy-9"
        names = {
            "".join(self.random.choices(letters, k=self.random.randint(1, 4))).strip("-") or "z" for _ in range(tasks)
        }
        self.tasks = list({name.casefold(): name for name in names}.values())
        self.base: BaseName | None = None

    def pack(self) -> tuple[bytes, PackListing]:
        pack = self.random.randbytes(32)
        places = {}
        for n in range(self.random.randint(1, 3)):
            places[to_digest(self.random.randbytes(32))] = TensorPlace("U8", (4,), 100 * n, 4)
        return pack, PackListing(1000, places)

    def index(self) -> LogIndex:
        index, rng = LogIndex(), self.random
        known = [to_digest(row[0]) for row in self.mirror._db.execute("SELECT DISTINCT digest FROM tensors ORDER BY 1")]
        kind = rng.random()
        if kind < 0.6 or not self.mirror.tasks():
            for task in rng.sample(self.tasks, rng.randint(1, min(3, len(self.tasks)))):
                pack, listing = self.pack()
                index.packs[pack] = listing
                digests = [*listing.places, *rng.sample(known, min(len(known), rng.randint(0, 2)))]
                text = manifest(task, sorted(set(digests)))
                key = hashlib.sha256(text).digest()
                index.manifests[key] = text
                number = self.mirror.highest(task) + rng.randint(1, 2)
                index.versions.append(LoggedVersion(task, number, rng.randrange(1000), key))
                if rng.random() < 0.3:
                    index.highest[task] = number + rng.randint(0, 2)
                if rng.random() < 0.3:
                    index.tags.append(LoggedTag(task, "prod", number, self.mirror.tag(task, "prod")))
            if rng.random() < 0.7:
                for digest in {d for text in index.manifests.values() for d in digests_of(text)}:
                    for other, at in self.mirror.places(digest):
                        index.shared.setdefault(other, PackListing(1000, {})).places[digest] = at
        elif kind < 0.75:
            for (task, tag), before in sorted(self.mirror.tags().items())[:2]:
                index.tags.append(LoggedTag(task, tag, None, before))
        elif kind < 0.9:
            versions = [version for task in self.mirror.tasks() for version in self.mirror.versions(task)]
            for version in rng.sample(versions, min(2, len(versions))):
                if not self.mirror.tags_of(version.task, version.number):
                    index.removed.append((version.task, version.number))
        else:  # a gc: an orphan, and packs whose tensors are put together in a new one
            index.drop.append(rng.randbytes(32))
            packs = sorted(row[0] for row in self.mirror._db.execute("SELECT pack FROM packs WHERE NOT dropped"))
            gone = rng.sample(packs, min(len(packs), 2))
            index.drop += gone
            moved = [
                to_digest(row[0])
                for pack in gone
                for row in self.mirror._db.execute("SELECT digest FROM tensors WHERE pack = ?", (pack,))
            ]
            if moved:
                places = {digest: TensorPlace("U8", (4,), 10 * n, 4) for n, digest in enumerate(sorted(set(moved)))}
                index.packs[rng.randbytes(32)] = PackListing(1000, places)
        return index

    def step(self) -> None:
        index = self.index()
        append(self.place, index, self.base)
        read_on(self.mirror, self.place)

    def write_base(self) -> None:
        root = None
        if self.base is not None and self.random.random() < 0.9:
            root = parse_root(self.place.objects[base_name(self.base)], "place", self.base)
        self.base = write_base(self.mirror, self.place, root)


def manifest(task: str, digests: list[Digest]) -> bytes:
    adapters = {f"a{n}": {"down": digest, "up": digest} for n, digest in enumerate(digests)}
    record = {"task": task, "adapters": adapters, "positions": {}, "head": None}
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode()


def digests_of(text: bytes) -> set[Digest]:
    return {Digest(one["down"]) for one in json.loads(text)["adapters"].values()}


def append(place: MemoryPlace, index: LogIndex, base: BaseName | None = None) -> None:
    entries = sorted(place.list("log/"))
    previous = hashlib.sha256(place.objects[entries[-1]]).digest() if entries else None
    data = index.encode()
    name = hashlib.sha256(data).digest()
    place.put(index_name(name), data)
    entry = Entry(f"{len(entries):032x}", previous, name, 0, "", base)
    assert place.create(entry_name(len(entries) + 1), entry.encode())


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a short history has several shards in a run, and several runs."""
    monkeypatch.setattr(rebase, "_SHARD_TEXT_BYTES", (900, 900))


@pytest.mark.parametrize("seed", range(EXAMPLES))
def test_what_is_read_of_a_base_is_what_the_log_says(seed: int) -> None:
    place = MemoryPlace("place")
    history = History(seed, place)
    partly: Mirror | None = None
    rng = random.Random(f"asks {seed}")
    for _ in range(rng.randint(5, 40)):
        history.step()
        if rng.random() < 0.25:
            history.write_base()
        if partly is None and rng.random() < 0.2:
            partly = Mirror(None, "place")
        if partly is not None and rng.random() < 0.5:
            read_on(partly, place)
            ask(partly, history, rng)
    with closing(whole(place)) as known:
        expected = contents(known)
        for mirror in (partly, Mirror(None, "place")):
            if mirror is not None:
                read_on(mirror, place)
                ask(mirror, history, rng)
                mirror.need_all()
                assert mirror.head == known.head
                assert contents(mirror) == expected
                assert mirror.counts() == known.counts()
                assert not mirror._db.execute("SELECT * FROM news").fetchall()
                assert not mirror._known("refused")


def ask(mirror: Mirror, history: History, rng: random.Random) -> None:
    """Some questions: each is answered as by a mirror that knows all."""
    known = history.mirror
    assert mirror.head == known.head
    for task in rng.sample(history.tasks, min(3, len(history.tasks))):
        assert mirror.spelling(task.upper()) == known.spelling(task.upper())
        assert mirror.highest(task) == known.highest(task)
        assert mirror.versions(task) == known.versions(task)
        assert mirror.tags([task]) == known.tags([task])
        for version in known.versions(task):
            text = mirror.manifest(version.manifest)
            assert text == known.manifest(version.manifest)
            for digest in digests_of(text):
                there = known.places(digest)
                found = mirror.places(digest)
                assert set(found) <= set(there) and bool(found) == bool(there)
    prefix = rng.choice(history.tasks)[:1]
    assert mirror.tasks([f"{prefix}*", "*9"]) == known.tasks([f"{prefix}*", "*9"])
    packs = known._db.execute("SELECT pack FROM packs ORDER BY 1").fetchall()
    for (pack,) in rng.sample(packs, min(3, len(packs))):
        assert mirror.is_dropped(pack) == known.is_dropped(pack)
        assert known.is_dropped(pack) or mirror.pack_bytes(pack) == known.pack_bytes(pack)
    digests = known._db.execute("SELECT digest FROM tensors ORDER BY 1").fetchall()
    for (digest,) in rng.sample(digests, min(2, len(digests))):
        assert mirror.has(to_digest(digest))
    assert not mirror.has(to_digest(rng.randbytes(32)))


def big_remote(count: int, place: MemoryPlace) -> None:
    """A remote of many tasks, with a base that the last entry names."""
    place.create(SETTINGS_NAME, encode_settings("0" * 32))
    rng = random.Random(count)
    with closing(Mirror(None, "place")) as mirror:
        for start in range(0, count, 500):
            index = LogIndex()
            for number in range(start, min(start + 500, count)):
                task = f"task-{number * 7919 % count:06}"
                places = {to_digest(rng.randbytes(32)): TensorPlace("U8", (400,), 400 * n, 400) for n in range(4)}
                index.packs[rng.randbytes(32)] = PackListing(4000, places)
                text = manifest(task, list(places))
                index.manifests[key := hashlib.sha256(text).digest()] = text
                index.versions.append(LoggedVersion(task, 1, 0, key))
            append(place, index)
        read_on(mirror, place)
        base = write_base(mirror, place)
    append(place, LogIndex(highest={"task-000000": 2}), base)


@pytest.fixture(scope="module", params=[1_500, pytest.param(10_000, marks=pytest.mark.slow)])
def remotes(request: pytest.FixtureRequest) -> dict[int, dict[str, bytes]]:
    """Places with remotes of three sizes, in order."""
    made = {}
    for count in (100, 1_000, request.param):
        place = MemoryPlace("place")
        big_remote(count, place)
        made[count] = place.objects
    return made


def client_of(objects: dict[str, bytes], folder: Path, name: str) -> tuple[Client, FaultyPlace, Counting]:
    medium = Counting()
    medium.objects = objects
    (folder / name).mkdir(parents=True)
    place = FaultyPlace(medium)
    return Client(folder / name, place), place, medium


def test_one_new_task_costs_the_same_whatever_is_there(remotes: dict[int, dict[str, bytes]], tmp_path: Path) -> None:
    first, second = {}, {}
    for count, objects in remotes.items():
        client, place, medium = client_of(dict(objects), tmp_path, str(count))
        with closing(client.store):
            client.store.add(small_task("new", seed=1))
            client.push()
            first[count] = (sum(place.asked.values()), medium.bytes_read)
            place.asked.clear()
            medium.bytes_read = 0
            client.store.add(small_task("newer", seed=2))
            client.push()
            second[count] = (dict(place.asked), medium.bytes_read)
    assert len({str(asked) for asked, _ in second.values()}) == 1, second
    assert second[100][0] == {"get log": 2, "put packs": 1, "put index": 1, "create log": 1}
    assert max(size for _, size in second.values()) < 2_000
    assert max(asked for asked, _ in first.values()) < 60 and max(size for _, size in first.values()) < 400_000, first


def test_a_clone_of_few_tasks_reads_little_more_than_their_bytes(
    remotes: dict[int, dict[str, bytes]], tmp_path: Path
) -> None:
    count, objects = max(remotes), dict(remotes[max(remotes)])
    one, _, _ = client_of(objects, tmp_path, "one")
    for k in range(3):
        weight = floats([[float(k + n % 7) for n in range(20_000)]] * 2)
        one.store.add(small_task(f"dtd{k}", seed=k, head__weight=weight))
    one.push()
    mirror_file = one.folder / "mirror"
    with closing(Mirror(mirror_file, "place")) as mirror:
        assert mirror.base is not None
        mirror.note_base(write_base(mirror, one.place, fetch_root(one.place, "place", mirror.base)))
    one.store.add(small_task("other"))
    one.push()
    two, place, medium = client_of(objects, tmp_path, "two")
    two.pull(patterns=["dtd*"])
    assert tasks_of(two) == ["dtd0", "dtd1", "dtd2"]
    tasks = sum(version.size_bytes for version in one.store.versions() if version.task.startswith("dtd"))
    assert medium.bytes_read + place.read_bytes <= 1.5 * tasks + (512 << 10)
    with closing(whole_of(objects)) as mirror:
        log = sum(len(data) for name, data in objects.items() if name.startswith("index/"))
        assert mirror.counts()["tasks"] == count + 4
        assert count < 10_000 or log > 5 * medium.bytes_read
    one.store.close()
    two.store.close()


def tasks_of(client: Client) -> list[str]:
    return sorted(version.task for version in client.store.tasks())


def whole_of(objects: dict[str, bytes]) -> Mirror:
    place = MemoryPlace("place")
    place.objects = dict(objects)
    return whole(place)


def _root(place: MemoryPlace) -> tuple[str, BaseName]:
    (name,) = [name for name in place.list("base/") if "shards" not in name]
    number, _, key = name.rpartition("/")[2].partition("-")
    return name, BaseName(int(number), bytes.fromhex(key))


def _name_instead(place: MemoryPlace, change: Callable[[Root], None]) -> None:
    """Has the last entry name another base."""
    name, base = _root(place)
    root = parse_root(place.objects[name], "place", base)
    change(root)
    data = root.encode()
    lie = BaseName(base.number, hashlib.sha256(data).digest())
    place.put(base_name(lie), data)
    last = sorted(place.list("log/"))[-1]
    number = int(last.rpartition("/")[2])
    entry = parse_entry(place.objects[last], "place", number)
    place.objects[last] = replace(entry, base=lie).encode()


def no_root(place: MemoryPlace) -> None:
    place.delete(_root(place)[0])


def bad_root(place: MemoryPlace) -> None:
    place.put(_root(place)[0], b"no base")


def no_shards(place: MemoryPlace) -> None:
    for name in place.list("base/shards/"):
        place.delete(name)


def bad_shards(place: MemoryPlace) -> None:
    for name in place.list("base/shards/"):
        place.objects[name] = place.objects[name][:-1] + b"?"


def changed_places(root: Root) -> None:
    """Shards stand where others should, under names that ascend."""
    for shards in root.runs[0].shards.values():
        for n, other in enumerate(reversed(list(shards))):
            shards[n] = Shard(shards[n].first, other.hash, other.size_bytes)


def overlapping(root: Root) -> None:
    shards = root.runs[0].shards["tasks"]
    shards.append(shards[0])


def another_entry(root: Root) -> None:
    root.entry = bytes(32)


def said_twice(root: Root) -> None:
    root.runs[0].last -= 1
    root.runs.append(Run(root.runs[0].last + 1, root.runs[0].shards))


def without_sizes(root: Root) -> None:
    for run in root.runs:
        for kind, shards in run.shards.items():
            run.shards[kind] = [Shard(shard.first, shard.hash, 0) for shard in shards]


HOSTILE: dict[str, Callable[[MemoryPlace], None]] = {
    "no root": no_root,
    "a bad root": bad_root,
    "no shards": no_shards,
    "bad shards": bad_shards,
    "shards in other places": partial(_name_instead, change=changed_places),
    "shards that overlap": partial(_name_instead, change=overlapping),
    "another entry": partial(_name_instead, change=another_entry),
    "no sizes": partial(_name_instead, change=without_sizes),
    "all is said twice": partial(_name_instead, change=said_twice),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_base_that_is_no_good_costs_only_time(what: str, tmp_path: Path) -> None:
    place = MemoryPlace("place")
    history = History(3, place)
    for _ in range(25):
        history.step()
    history.write_base()
    history.step()
    HOSTILE[what](place)
    with closing(whole(place)) as known, closing(Mirror(tmp_path / "m", "place")) as mirror:
        read_on(mirror, place)
        for task in history.tasks:
            assert mirror.versions(task) == known.versions(task)
        mirror.need_all()
        assert contents(mirror) == contents(known) and mirror.head == known.head
        assert not mirror.has_base
        base = rebase.base_for_next_entry(mirror, place)  # who knows that it is no good makes another
        assert base is not None and base.number == mirror.head[0]
        append(place, LogIndex(highest={history.tasks[0]: 99}), base)
        with closing(Mirror(None, "place")) as later:
            read_on(later, place)
            assert later.has_base and later.highest(history.tasks[0]) == 99
            later.need_all()
            assert later.has_base


def test_a_log_that_goes_on_wrongly_after_a_base_is_refused(tmp_path: Path) -> None:
    place = MemoryPlace("place")
    history = History(4, place)
    for _ in range(10):
        history.step()
    history.write_base()
    history.step()
    append(place, LogIndex(removed=[("nobody", 1)]), history.base)
    with closing(Mirror(tmp_path / "m", "place")) as mirror:
        read_on(mirror, place)  # the task was not asked for
        with pytest.raises(DamagedRemoteError, match="nobody@1 is not there"):
            mirror.versions("nobody")
        with pytest.raises(DamagedRemoteError, match="nobody@1 is not there"):
            read_on(mirror, place)


def test_a_mirror_of_the_first_kind_is_read(tmp_path: Path) -> None:
    place = MemoryPlace("place")
    history = History(5, place)
    for _ in range(10):
        history.step()
    with closing(sqlite3.connect(tmp_path / "m")) as db:
        for statement in SCHEMA.split(";")[:-1]:
            db.execute(statement)
        db.execute("INSERT INTO taken VALUES ('dtd', 1)")
        db.execute("PRAGMA user_version = 1")
        db.commit()
    with closing(Mirror(tmp_path / "m", "place")) as mirror:
        read_on(mirror, place)
        assert mirror.taken("dtd", 1)
        assert contents(mirror) == contents(history.mirror)


def test_several_that_push_write_bases_at_once(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebase, "MOST_ENTRIES", 2)
    one, two = team.client(), team.client()

    def push_by_two() -> None:
        two.push()

    for n in range(6):
        one.store.add(small_task(f"one{n}", seed=n))
        two.store.add(small_task(f"two{n}", seed=n))
        team.place.before["create log"] = [push_by_two]
        one.push()
    three = team.clone()
    assert tasks_of(three) == sorted(f"{name}{n}" for name in ("one", "two") for n in range(6))
    assert len([name for name in team.medium.list("base/") if "shards" not in name]) > 3
    with closing(Mirror(three.folder / "mirror", team.place.url)) as mirror:
        assert mirror.has_base
    one.pull()
    assert one.contents() == three.contents()


@pytest.mark.parametrize("which", range(3))
def test_a_push_that_dies_as_it_writes_a_base_goes_on(team: Team, monkeypatch: pytest.MonkeyPatch, which: int) -> None:
    monkeypatch.setattr(rebase, "MOST_ENTRIES", 2)
    one = team.client()
    for n in range(4):
        one.store.add(small_task(f"one{n}", seed=n))
        one.push(f"one{n}")
    one.store.add(small_task("last"))
    team.place.after["put base"] = [*[lambda: None] * which, no_connection]
    with pytest.raises(PlaceError, match="no connection"):
        one.push()
    assert "last" not in tasks_of(team.clone())
    one.push()
    three = team.clone()
    assert tasks_of(three) == ["last", "one0", "one1", "one2", "one3"]
    with closing(Mirror(three.folder / "mirror", team.place.url)) as mirror:
        assert mirror.base is not None and mirror.base.number == 4


def test_a_log_that_is_another_is_seen_after_a_base_was_refused(tmp_path: Path) -> None:
    place = MemoryPlace("place")
    history = History(6, place)
    for _ in range(5):
        history.step()
    history.write_base()
    history.step()
    with closing(Mirror(tmp_path / "m", "place")) as mirror:
        read_on(mirror, place)
        mirror.take([("dtd", 1)])
        mirror.refuse_base(mirror.begun_with)
        assert mirror.head == (0, None) and mirror.taken("dtd", 1)
        place.objects[entry_name(6)] = place.objects[entry_name(6)].replace(b'"time_ns":0', b'"time_ns":1')
        with pytest.raises(DamagedRemoteError, match="not the one that this store knows"):
            read_on(mirror, place)


def test_a_mirror_that_another_process_began_anew_is_read_again(tmp_path: Path) -> None:
    history = History(7, place := Counting())
    for _ in range(5):
        history.step()
    history.write_base()
    for _ in range(8):
        history.step()

    class Meanwhile(MemoryPlace):
        def get(self, name: str, at_most: int) -> bytes:
            if name.startswith("index/"):
                with closing(Mirror(tmp_path / "m", "place")) as other:
                    other.refuse_base(other.begun_with)
            return super().get(name, at_most)

    watched = Meanwhile("place")
    watched.objects = place.objects
    with closing(Mirror(tmp_path / "m", "place")) as mirror:
        read_on(mirror, watched)
        assert not mirror.has_base and mirror.head == history.mirror.head
        assert contents(mirror) == contents(history.mirror)


def test_a_pull_goes_on_where_another_process_took_another_base(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebase, "MOST_ENTRIES", 2)
    monkeypatch.setattr(pulling, "GROUP_VERSIONS", 1)
    one = team.client()
    pushes(one, 6)
    two = team.client()

    def meanwhile() -> None:
        one.store.add(small_task("later"))
        one.store.remove("task5")
        one.push()
        with closing(Mirror(two.folder / "mirror", team.place.url)) as other:
            other.refuse_base(other.begun_with)
            read_on(other, team.medium)
            assert other.has_base and other.left_bytes("tasks")

    team.place.before["get_ranges packs"] = [meanwhile]
    two.pull()
    two.pull()
    assert two.contents() == one.contents()


def test_a_name_that_may_have_been_dropped_before_a_base_is_not_used(tmp_path: Path) -> None:
    place = MemoryPlace("place")
    place.create(SETTINGS_NAME, encode_settings("0" * 32))
    again = LogIndex(highest={"dtd": 7})
    name = index_name(hashlib.sha256(again.encode()).digest())
    append(place, LogIndex(strays=[name]))
    with closing(Mirror(None, "place")) as known:
        read_on(known, place)
        base = write_base(known, place)
    append(place, LogIndex(highest={"dtd": 6}), base)
    with closing(Mirror(tmp_path / "m", "place")) as mirror:
        read_on(mirror, place)
        assert mirror.has_base and not mirror.is_stray(name)
        assert Committer(place, mirror).commit(mirror.head, again)
    with closing(whole(place)) as known:
        assert known.highest("dtd") == 7 and known.is_stray(name)


@pytest.mark.parametrize("count", [0, 1, 2, 15, 16, 17, 70_000, 65_536 * 3])
def test_the_last_entry_is_found_in_few_requests(count: int) -> None:
    asked: list[int] = []

    class Known(MemoryPlace):
        def get(self, name: str, at_most: int) -> bytes:
            asked.append(number := int(name.rpartition("/")[2]))
            if number > count:
                raise AbsentError("place", name)
            return b"entry"

    with ThreadPool(4) as pool:
        assert reading.Entries(Known(), pool).last(0) == count
        assert len(asked) <= 16 * 7 and len(asked) == len(set(asked))
        assert reading.Entries(Known(), pool).last(count) == count


def test_a_gc_among_bases_loses_nothing(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebase, "MOST_ENTRIES", 2)
    one = team.client()
    for n in range(6):
        one.store.add(small_task("dtd", seed=n))
        one.store.add(small_task(f"other{n}", seed=n + 100))
        one.push()
    with closing(Mirror(one.folder / "mirror", team.place.url)) as mirror:
        before = sorted(team.medium.list("base/"))
        collect(Persistent(team.place), mirror, keep=1, grace_s=0, dry_run=True)
        assert sorted(team.medium.list("base/")) == before
        assert collect(Persistent(team.place), mirror, keep=1, grace_s=0).entries
    one.store.add(small_task("new", seed=9))
    one.push("new")
    one.pull()
    two = team.clone()
    with closing(Mirror(two.folder / "mirror", team.place.url)) as mirror:
        assert mirror.has_base
    assert two.contents() == one.contents()
    two.store.add(small_task("newer", seed=2))
    two.push()
    assert team.clone().contents() == two.contents()


def base_objects(team: Team) -> tuple[list[str], set[str]]:
    """Roots, and shards."""
    names = sorted(team.medium.list("base/"))
    return [name for name in names if "shards" not in name], {name for name in names if "shards" in name}


def pushes(client: Client, count: int) -> None:
    for n in range(count):
        client.store.add(small_task(f"task{n}", seed=n))
        client.push(f"task{n}")


def test_a_gc_deletes_replaced_bases_after_their_grace(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebase, "MOST_ENTRIES", 2)
    monkeypatch.setattr(rebase, "JOINED", 2)
    monkeypatch.setattr(rebase, "_SHARD_TEXT_BYTES", (3000, 3000))  # shards of two tasks and more: joined, they differ
    one = team.client()
    pushes(one, 9)
    roots, shards = base_objects(team)
    assert len(roots) > 3
    old = team.client()
    old.pull("task0")  # has a base, and little of it
    pushes(one, 20)
    roots, shards = base_objects(team)
    found = one.gc(grace_s=7 * 86400)
    assert found.deleted == 0 and found.waiting == len(roots) - 1 and base_objects(team) == (roots, shards)
    found = one.gc(dry_run=True)
    assert found.deleted > len(roots) - 1 and base_objects(team) == (roots, shards)
    assert one.gc().deleted == found.deleted
    left, left_shards = base_objects(team)
    assert left == roots[-1:]
    needed = parse_root(team.medium.get(left[0], 1 << 20), "place", named(left[0]))
    assert left_shards == {shard_name(shard.hash) for run in needed.runs for shard in run.all_shards}
    fresh = team.clone()
    with closing(Mirror(fresh.folder / "mirror", team.place.url)) as mirror:
        assert mirror.has_base
    assert fresh.contents() == one.contents()
    old.pull()
    assert old.contents() == one.contents()
    assert one.gc().deleted == 0


def test_no_base_is_deleted_where_the_newest_cannot_be_read(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebase, "MOST_ENTRIES", 2)
    one = team.client()
    pushes(one, 9)
    roots, shards = base_objects(team)
    team.medium.delete(roots[-1])
    assert one.gc().deleted == 0 and base_objects(team) == (roots[:-1], shards)


def test_a_gc_that_dies_among_bases_goes_on(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebase, "MOST_ENTRIES", 2)
    one = team.client()
    pushes(one, 9)
    team.place.after["delete base"] = [no_connection]
    with pytest.raises(PlaceError, match="no connection"):
        one.gc()
    one.gc()
    roots, shards = base_objects(team)
    assert len(roots) == 1
    needed = parse_root(team.medium.get(roots[0], 1 << 20), "place", named(roots[0]))
    assert shards == {shard_name(shard.hash) for run in needed.runs for shard in run.all_shards}


def named(root: str) -> BaseName:
    number, _, hash = root.removeprefix("base/").partition("-")
    return BaseName(int(number), bytes.fromhex(hash))
