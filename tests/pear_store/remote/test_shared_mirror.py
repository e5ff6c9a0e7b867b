"""What another process forgets of a remote, or makes anew, is no empty remote to those that share the mirror."""

import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pear_store.errors import AbsentError, DamagedRemoteError, PlaceError
from pear_store.remote import pull as pulling
from pear_store.remote import push as pushing
from pear_store.remote import rebase
from pear_store.remote.known import KnownLog
from pear_store.remote.log import SETTINGS_NAME, LoggedVersion, encode_settings, entry_name
from pear_store.remote.memory import MemoryPlace
from pear_store.remote.mirror import Mirror, opened_mirror
from pear_store.remote.partial import Coverage, PartialState
from pear_store.remote.reading import read_on
from pear_store.remote.retry import Persistent
from tests.helpers.makers import small_task
from tests.pear_store.remote.faults import Client, FaultyPlace, StalledPlace, Team, no_connection

pytestmark = pytest.mark.slow


@pytest.fixture
def one(team: Team, monkeypatch: pytest.MonkeyPatch) -> Client:
    """Five tasks, one of them with a tag, and bases."""
    monkeypatch.setattr(rebase, "MOST_ENTRIES", 2)
    monkeypatch.setattr(pulling, "GROUP_VERSIONS", 1)
    client = team.client()
    for n in range(5):
        client.store.add(small_task(f"task{n}", seed=n))
        client.push()
    client.store.tag("task0@1", "prod")
    client.push()
    return client


def forget(mirror: Path) -> None:
    """As a process that has found a base to be no good, and has not read the log again yet."""
    with closing(Mirror(mirror, "place")) as other:
        assert other.has_base
        other.refuse_base(other.begun_with)


def forgets_first(
    monkeypatch: pytest.MonkeyPatch, client: Client, module: Any, name: str, done: Callable[..., Any]
) -> None:
    """Before a function of a module is called for the first time, another process forgets."""

    def again(*arguments: Any) -> Any:
        monkeypatch.setattr(module, name, done)
        forget(client.folder / "mirror")
        return done(*arguments)

    monkeypatch.setattr(module, name, again)


@pytest.mark.parametrize("at", range(1, 7))
def test_a_pull_takes_every_version_and_keeps_tags(team: Team, one: Client, at: int) -> None:
    two = team.client()
    two.pull("task0")
    told = 0

    def progress(*_: int) -> None:
        nonlocal told
        told += 1
        if told == at:
            forget(two.folder / "mirror")

    with opened_mirror(two.folder / "mirror", team.place.url) as mirror:
        pulling.pull(two.store._open, Persistent(team.place), mirror, progress=progress)
    assert told >= 5 and two.contents() == one.contents()
    assert two.store.tags() == {"task0": {"prod": 1}}
    two.pull()
    assert two.store.tags() == {"task0": {"prod": 1}}


def test_a_push_takes_a_tag_away(team: Team, one: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    two = team.clone()
    two.store.untag("task0@prod")
    forgets_first(monkeypatch, two, pushing, "_compared", pushing._compared)
    assert two.push().tags == [("task0", "prod", None)]
    one.pull()
    assert one.store.tags() == {}


def test_a_push_moves_a_tag(team: Team, one: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    two = team.clone()
    two.store.add(small_task("task0", seed=77))
    two.store.tag("task0@2", "prod")
    forgets_first(monkeypatch, two, pushing, "_compared", pushing._compared)
    two.push()
    assert team.clone().store.tags() == {"task0": {"prod": 2}}


def test_a_push_that_shares_tensors_goes_on(team: Team, one: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    two = team.clone()
    two.store.add(small_task("new", seed=3))
    forgets_first(monkeypatch, two, pushing, "_shared", pushing._shared)
    assert two.push().versions == [("new", 1)]
    assert team.clone().contents() == two.contents()


def test_a_reader_finds_what_is_there(team: Team, one: Client) -> None:
    log = KnownLog(team.folder / "lazy", team.medium, 60, 30)
    assert log.find("task0").version.version == 1
    forget(team.folder / "lazy")
    assert log.find("task1").version.version == log.find("task2@1").version.version == 1
    assert log.counts()["tasks"] == 5


def test_a_reader_of_a_file_that_was_damaged_or_replaced_finds_what_is_there(
    team: Team, one: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = team.folder / "lazy"
    log = KnownLog(file, team.medium, 60, 30)
    assert log.find("task0").version.version == 1
    file.write_bytes(b"x" * 5000)
    assert log.find("task1@1").version.version == 1 and log.counts()["tasks"] == 5

    read_shards = PartialState._read_shards

    def unlinked_first(state: PartialState, *arguments: Any) -> None:
        monkeypatch.setattr(PartialState, "_read_shards", read_shards)
        file.unlink()
        read_shards(state, *arguments)

    file.unlink()
    log = KnownLog(file, team.medium, 60, 30)
    assert log.find("task0").version.version == 1
    monkeypatch.setattr(PartialState, "_read_shards", unlinked_first)
    assert log.find("task3").version.version == 1


def test_a_name_that_is_no_text_is_damage(team: Team, one: Client) -> None:
    file = team.folder / "lazy"
    log = KnownLog(file, team.medium, 60, 30)
    assert len(log.versions(None)) == 5
    file.write_bytes(file.read_bytes().replace(b"task1", b"t\xffsk1"))
    assert len(log.versions(None)) == 5
    one.pull()
    mirror = one.folder / "mirror"
    mirror.write_bytes(mirror.read_bytes().replace(b"task1", b"t\xffsk1"))
    with pytest.raises(PlaceError, match="mirror is damaged .*; delete it"):
        one.pull()


def test_without_a_mirror_and_a_network_nothing_is_said_not_to_be_there(team: Team, one: Client) -> None:
    class Out(FaultyPlace):
        is_out = False

        def get(self, name: str, at_most: int) -> bytes:
            if self.is_out:
                no_connection()
            return super().get(name, at_most)

    file, place = team.folder / "lazy", Out(team.medium)
    log = KnownLog(file, place, 60, 30)
    assert log.find("task0").version.version == 1
    place.is_out = True
    file.write_bytes(b"x" * 5000)
    for name in ("task1", "task1", "task2@1"):
        with pytest.raises(PlaceError, match="no connection"):
            log.find(name)

    place.is_out = False
    assert len(log.versions(None)) == 5
    file.write_bytes(file.read_bytes().replace(b"task1", b"t\xffsk1"))
    place.is_out = True
    for number in range(5):
        with pytest.raises(PlaceError, match="no connection"):
            ask_in_some_way(log, number)
    new = KnownLog(team.folder / "new", place, 60, 30)
    with pytest.raises(PlaceError, match="no connection"):
        new.ask()
    for number in range(5):
        with pytest.raises(PlaceError, match="no connection"):
            ask_in_some_way(new, number)


def ask_in_some_way(log: KnownLog, way: int) -> None:
    match way:
        case 0:
            log.versions(None)
        case 1:
            log.find("task2@1")
        case 2:
            log.find("task2")
        case 3:
            log.tags()
        case _:
            log.counts()


def test_all_who_wait_for_what_was_forgotten_read_it_once(team: Team, one: Client) -> None:
    place = FaultyPlace(team.medium)
    log = KnownLog(team.folder / "lazy", place, 60, 30)
    log.find("task0")
    forget(team.folder / "lazy")
    place.asked.clear()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda k: log.find(f"task{k}@1").version.task, [0, 1, 2, 3, 4] * 8))
    assert found == [f"task{k}" for k in range(5)] * 8
    assert place.asked["get log"] < 40, "two reads of the log at most"


def test_nobody_waits_longer_than_they_said_for_what_was_forgotten(team: Team, one: Client) -> None:
    place = StalledPlace(team.medium, lambda name: False)
    log = KnownLog(team.folder / "lazy", place, 60, 0.2)
    log._timeout_s = 30.0
    log.find("task0")
    forget(team.folder / "lazy")
    log._timeout_s = 0.2
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        go.wait(60)

    place.before["get log"] = [hold] * 100
    with pytest.raises(PlaceError, match=r"no answer within 0\.2 s"):
        log.find("task1@1")
    assert held.wait(60)
    go.set()
    log._timeout_s = 30.0
    assert log.find("task1@1").version.version == 1


def test_what_is_known_again_is_used_without_a_network(team: Team, one: Client) -> None:
    """As where a process was killed when it had read all, and not said so."""
    file = team.folder / "lazy"
    log = KnownLog(file, FaultyPlace(team.medium), 60, 30)
    log.find("task0")
    forget(file)
    assert len(log.versions(None)) == 5
    with closing(Mirror(file, "place")) as mirror, mirror._transaction():
        mirror._note("until", mirror.head[0].to_bytes(8, "big"))
    out = FaultyPlace(team.medium)
    out.before["get log"] = [no_connection] * 100
    log = KnownLog(file, out, 60, 30)
    with pytest.warns(UserWarning, match="what was known before is used"):
        assert len(log.versions(None)) == 5


def test_a_log_that_ends_before_what_was_known_is_another(team: Team, one: Client) -> None:
    file = team.folder / "m"
    with closing(Mirror(file, "place")) as mirror:
        read_on(mirror, team.medium)
        with mirror._transaction():
            mirror._note("until", (99).to_bytes(8, "big"))
        with pytest.raises(DamagedRemoteError, match="not the one that this store knows"):
            mirror.counts()


def test_damage_to_the_log_is_named_by_who_knows_it_in_part(team: Team, one: Client) -> None:
    two = team.client()
    two.pull("task0")
    medium = team.medium
    assert isinstance(medium, MemoryPlace)
    with closing(Mirror(two.folder / "mirror", "place")) as mirror:
        assert mirror.left_bytes("tasks")
    medium.objects[entry_name(2)] = b"x"
    del medium.objects[entry_name(3)]
    assert any(entry_name(2) in str(fault) for fault in two.verify().faults)


def test_what_was_found_before_news_is_not_kept_as_news(
    team: Team, one: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = KnownLog(team.folder / "lazy", team.medium, 0, 30)
    size = log._size

    def meanwhile(mirror: Mirror, logged: LoggedVersion) -> int:
        monkeypatch.setattr(log, "_size", size)
        one.store.add(small_task("task0", seed=50))
        one.push()
        log.ask()
        log.find("task1")
        return size(mirror, logged)

    monkeypatch.setattr(log, "_size", meanwhile)
    log.find("task0")
    assert log.find("task0").version.version == 2


def test_a_file_that_is_replaced_again_and_again_is_given_up(
    team: Team, one: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a file system gives a file another number each time."""

    def replaced(*_: object) -> bool:
        error = sqlite3.OperationalError("attempt to write a readonly database")
        error.sqlite_errorcode = sqlite3.SQLITE_READONLY_DBMOVED
        raise error

    monkeypatch.setattr(Mirror, "note_id", replaced)
    with pytest.raises(PlaceError, match="readonly"):
        KnownLog(team.folder / "lazy", team.medium, 0, 30).find("task0")


def test_a_base_that_another_process_began_with_is_not_refused(
    team: Team, one: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Mirror(team.folder / "m", "place")) as mirror, closing(Mirror(team.folder / "m", "place")) as other:
        read_on(mirror, team.medium)
        first, cover, read_shards = mirror.begun_with, mirror._cover, mirror._read_shards
        for n in range(3):
            one.store.add(small_task(f"more{n}", seed=20 + n))
            one.push()

        def then_another_begins() -> Coverage:
            found = cover()
            monkeypatch.setattr(mirror, "_cover", cover)
            other.refuse_base(other.begun_with)
            read_on(other, team.medium)
            return found

        def gone_at_first(*_: object) -> None:
            monkeypatch.setattr(mirror, "_read_shards", read_shards)
            raise AbsentError("place", "base/shards/old")

        monkeypatch.setattr(mirror, "_read_shards", gone_at_first)
        monkeypatch.setattr(mirror, "_cover", then_another_begins)
        mirror._read(lambda cover: cover.unread("tasks", "", "~"))
        assert other.begun_with not in (None, first)


def test_what_only_a_base_says_of_the_log_is_no_witness(tmp_path: Path, team: Team, one: Client) -> None:
    """Else a base that lies, and a read that was cut, would make the remote another one for good."""
    with closing(Mirror(tmp_path / "m", "place")) as mirror:
        read_on(mirror, team.medium)
        at, hash = mirror.head
        assert hash is not None
        known = mirror.base
        assert known is not None
        with mirror._transaction() as db:
            for key in ("head", "begun at"):
                db.execute("UPDATE known SET value = ? WHERE key = ?", (at.to_bytes(8, "big") + bytes(32), key))
        mirror.refuse_base(mirror.begun_with)
        assert mirror.witness == (0, None)
        read_on(mirror, team.medium)
        assert mirror.head == (at, hash)


def test_the_cause_of_a_failed_write_is_named(tmp_path: Path) -> None:
    place = MemoryPlace("place")
    place.create(SETTINGS_NAME, encode_settings("0" * 32))
    with pytest.raises(PlaceError, match="full"), opened_mirror(tmp_path / "m", "place") as mirror:
        (pages,) = mirror._db.execute("PRAGMA page_count").fetchone()
        mirror._db.execute(f"PRAGMA max_page_count = {pages}")
        mirror.take((f"{n:0100}", n) for n in range(10_000))
