"""A remote's gc: what it removes, what it never removes, and who writes and reads meanwhile."""

import hashlib
import threading
import time
from pathlib import Path

import pytest

from pear_store import verify
from pear_store.errors import DamagedRemoteError, PearStoreError, PlaceError
from pear_store.remote import gc as collecting
from pear_store.remote import pull as pulling
from pear_store.remote.log import LogIndex, index_name, pack_name
from pear_store.remote.memory import MemoryPlace
from pear_store.remote.mirror import opened_mirror
from pear_store.remote.place import Place
from pear_store.remote.reading import read_on
from pear_store.remote.whole import needs, whole_mirror
from tests.helpers.makers import small_task
from tests.pear_store.remote.faults import Client, Team, lost_answer, no_connection
from tests.pear_store.remote.test_mirror import append, remote
from tests.pear_store.remote.test_sync import filled

pytestmark = pytest.mark.slow


def packs(team: Team) -> list[str]:
    return sorted(team.medium.list("packs/"))


def objects(team: Team) -> dict[str, bytes]:
    assert isinstance(team.medium, MemoryPlace)
    return team.medium.objects


def did(what: object) -> None:
    assert what


def shared_pack(team: Team) -> Client:
    """Four tasks in one pack, three of which were removed: it is mostly dead."""
    a = team.client()
    for seed, task in enumerate(("one", "two", "three", "four")):
        a.store.add(small_task(task, seed=seed))
    a.push()
    a.store.remove("one", "two", "three")
    a.push()
    return a


def test_a_pack_that_nothing_needs_is_dropped_by_an_entry_and_deleted_after_its_grace(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = team.client()
    for seed, task in enumerate(("one", "two")):
        a.store.add(small_task(task, seed=seed))
        a.push()
    a.store.remove("one")
    a.push()
    before = packs(team)
    day = 86400.0
    found = a.gc(grace_s=7 * day)
    assert (found.dropped_packs, found.entries, found.deleted, found.waiting) == (1, 1, 0, 1)
    assert found.dropped_bytes > 0 and packs(team) == before
    assert a.gc(grace_s=7 * day).entries == 0, "it is said once"
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + int(6.9 * day * 1e9))
    assert a.gc(grace_s=7 * day).waiting == 1
    monkeypatch.setattr(time, "time_ns", lambda: now + int(7.1 * day * 1e9))
    assert a.gc(grace_s=7 * day).deleted == 1
    assert len(packs(team)) == len(before) - 1
    assert team.clone().contents() == a.contents()


def test_what_lives_in_a_mostly_dead_pack_moves_to_a_new_one_by_the_same_entry(team: Team) -> None:
    a = shared_pack(team)
    (old,) = packs(team)
    found = a.gc()
    assert (found.dropped_packs, found.rewritten_packs, found.entries, found.deleted) == (1, 1, 1, 1)
    (new,) = packs(team)
    assert new != old and len(objects(team)[new]) == found.moved_bytes < found.dropped_bytes
    assert team.clone().contents() == a.contents()
    assert a.gc() == collecting.RemoteGc(), "there is no more to do"


def test_a_pack_that_is_half_dead_stays(team: Team) -> None:
    a = team.client()
    for seed, task in enumerate(("one", "two")):
        a.store.add(small_task(task, seed=seed))
    a.push()
    a.store.remove("one")
    a.push()
    found = a.gc()
    assert (found.dropped_packs, found.entries) == (0, 0)
    sizes = [tensor.size_bytes for tensor in a.store.get("two").tensors.values()]
    assert found.dead_bytes == sum(sizes)


def test_keep_removes_old_versions_but_no_newest_and_no_tagged_one(team: Team) -> None:
    a = team.client()
    for seed in range(6):
        a.store.add(small_task("dtd", seed=seed))
    a.store.add(small_task("svhn", seed=9))
    a.store.tag("dtd@2", "prod")
    a.push()
    planned = a.gc(keep=2, dry_run=True)
    found = a.gc(keep=2)
    assert found.removed == planned.removed == [("dtd", 1), ("dtd", 3), ("dtd", 4)]
    assert a.pull().removed == found.removed, "stores take it over"
    b = team.clone()
    assert b.contents() == a.contents() and set(b.contents()) == {"dtd@2", "dtd@5", "dtd@6", "svhn@1"}
    assert b.store.add(small_task("dtd", seed=8)).version == 7, "no number is used again"
    with pytest.raises(PearStoreError, match="keep 0: expected 1 or more"):
        a.gc(keep=0)


def test_older_than_counts_from_when_a_version_was_added(team: Team) -> None:
    a = team.client()
    for seed in range(3):
        a.store.add(small_task("dtd", seed=seed))
    a.push()
    with opened_mirror(a.folder / "mirror", a.place.url) as mirror:
        assert not collecting.collect(a.place, mirror, None, 3600.0).removed
        assert collecting.collect(a.place, mirror, None, 0.0).removed == [("dtd", 1), ("dtd", 2)]


def test_a_dry_run_writes_nothing_and_says_what_would_go(team: Team) -> None:
    a = shared_pack(team)
    before = dict(objects(team))
    planned = a.gc(dry_run=True)
    assert objects(team) == before
    assert (planned.dry_run, planned.dropped_packs, planned.rewritten_packs) == (True, 1, 1)
    done = a.gc()
    assert (done.dropped_packs, done.dropped_bytes) == (planned.dropped_packs, planned.dropped_bytes)


def test_what_a_killed_push_left_is_dropped_by_an_entry_before_it_is_deleted(team: Team) -> None:
    a = team.client()
    a.store.add(small_task("dtd"))
    team.place.before["create log"] = [no_connection]
    with pytest.raises(PlaceError):
        a.push()
    left = sorted([*team.medium.list("packs/"), *team.medium.list("index/")])
    assert len(left) == 2 and not team.log()
    deleted: list[int] = []
    team.place.before["delete packs"] = [lambda: deleted.append(len(team.log()))]
    b = team.client()
    found = b.gc()
    assert (found.orphans, found.deleted, found.entries) == (2, 2, 1) and deleted == [1]
    assert not [name for name in left if name in objects(team)]
    a.push()
    assert team.clone().contents() == a.contents()


def test_leftovers_of_writes_are_dropped_and_stay_for_a_day_at_least(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = filled(team.client())
    a.push()
    leftovers = [f"tmp/{'1' * 32}", f"probe/{'2' * 32}"]
    for name in (*leftovers, "tmp/not-ours", "packs/ab/other.txt"):
        team.medium.put(name, b"x")
    found = a.gc(grace_s=0.0)
    assert (found.orphans, found.deleted, found.waiting) == (2, 0, 2), "a write may be under way"
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + int(1.1 * 86400e9))
    assert a.gc(grace_s=0.0).deleted == 2
    left = objects(team).keys()
    assert not left & set(leftovers) and {"tmp/not-ours", "packs/ab/other.txt"} <= left


def test_a_write_that_ends_while_the_log_is_read_is_no_leftover(team: Team) -> None:
    a = filled(team.client())
    a.push()
    team.medium.put(name := f"tmp/{'1' * 32}", b"x")
    team.place.before["get pear-remote.json"] = [lambda: team.medium.delete(name)]
    assert a.gc().entries == 0


def test_what_comes_back_under_a_dropped_name_is_deleted_again(team: Team) -> None:
    """A put may be late; and a gc may have died between its entry and its deletions."""
    a = shared_pack(team)
    (old,) = packs(team)
    data = objects(team)[old]
    a.gc()
    team.medium.put(old, data)
    found = a.gc()
    assert (found.deleted, found.entries) == (1, 0) and old not in objects(team)


@pytest.mark.parametrize("request_", ["put packs", "put index", "create log", "delete packs", "list packs", "get log"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_gc_that_was_cut_off_goes_on(team: Team, request_: str, when: str) -> None:
    a = shared_pack(team)
    getattr(team.place, when)[request_] = [no_connection]
    with pytest.raises(PlaceError):
        a.gc(keep=1)
    assert team.clone().contents() == a.contents()
    a.gc(keep=1)
    a.gc(keep=1)
    assert len(packs(team)) == 1
    assert team.clone().contents() == a.contents()


def test_an_answer_that_is_lost_makes_no_second_entry(team: Team) -> None:
    a = shared_pack(team)
    team.place.after["create log"] = [lost_answer]
    assert a.gc().entries == 1
    assert len(team.log()) == 3


# ---- pushes meanwhile


def test_a_push_that_counted_on_a_dead_pack_has_its_tensors_kept(team: Team) -> None:
    """It creates its entry just before the gc does."""
    a = shared_pack(team)
    b = team.client()
    b.pull()
    b.store.add(small_task("again", seed=0))  # the tensors of "one", which is removed
    sent: list[int] = []
    team.place.before["create log"] = [lambda: sent.append(b.push().sent_bytes)]
    a.gc()
    assert sent == [0], "it counted on them"
    a.pull()
    assert team.clone().contents() == b.contents() == a.contents()


def test_a_push_sees_the_drop_of_what_it_counted_on(team: Team) -> None:
    """The gc creates its entry just before the push does."""
    a = shared_pack(team)
    b = team.client()
    b.pull()
    b.store.add(small_task("again", seed=0))
    team.place.before["create log"] = [lambda: did(a.gc().deleted)]
    assert b.push().sent_bytes
    assert team.clone().contents() == b.contents()


def test_a_push_under_way_sends_again_what_a_gc_took_for_an_orphan(team: Team) -> None:
    a, b = filled(team.client()), team.client()
    found: list[collecting.RemoteGc] = []
    team.place.before["create log"] = [lambda: found.append(b.gc())]
    a.push()
    assert found[0].orphans == 2 and found[0].deleted == 2, "the pack, and the index"
    assert team.clone().contents() == a.contents()


def test_a_dropped_index_is_never_named_again(team: Team) -> None:
    """A push that says the same again says it under another name."""
    a, b = team.client(), team.client()
    a.store.add(small_task("dtd"))
    a.push()
    a.store.tag("dtd@1", "prod")
    team.place.before["create log"] = [no_connection]
    with pytest.raises(PlaceError):
        a.push()
    indexes = set(team.medium.list("index/"))
    b.gc()
    a.push()
    assert len(indexes & set(team.medium.list("index/"))) == 1, "that of the first entry"
    assert team.clone().store.tags() == {"dtd": {"prod": 1}}


def test_an_entry_that_names_a_dropped_index_is_damage() -> None:
    place = MemoryPlace("place")
    team_index = LogIndex(highest={"dtd": 3})
    name = index_name(hashlib.sha256(team_index.encode()).digest())
    remote(LogIndex(strays=[name]), place=place)
    append(place, team_index)
    with opened_mirror(None, "place") as mirror, pytest.raises(DamagedRemoteError, match="was dropped before"):
        read_on(mirror, place)


def test_two_gcs_at_once_are_one(team: Team) -> None:
    a = shared_pack(team)
    b = team.clone()
    team.place.before["create log"] = [lambda: did(b.gc().entries)]
    found = a.gc()
    assert found.dropped_packs == 0 and len(packs(team)) == 1 + found.orphans
    a.gc()
    assert len(packs(team)) == 1
    assert team.clone().contents() == a.contents()


def test_a_gc_whose_new_pack_is_an_orphan_to_another_one_sends_it_again(team: Team) -> None:
    a = shared_pack(team)
    (old,) = packs(team)

    def drop() -> None:
        (new,) = set(packs(team)) - {old}
        assert isinstance(team.medium, MemoryPlace)
        append(team.medium, LogIndex(drop=[bytes.fromhex(Path(new).stem)]))
        team.medium.delete(new)

    team.place.before["create log"] = [drop]
    assert a.gc().rewritten_packs == 1
    assert len(packs(team)) == 1 and team.clone().contents() == a.contents()


# ---- readers meanwhile


def test_a_pull_goes_on_where_a_gc_moved_what_it_reads(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulling, "GROUP_VERSIONS", 1)
    a = shared_pack(team)
    for seed in range(10, 14):
        a.store.add(small_task(f"more{seed}", seed=seed))
    a.push()
    b = team.client()
    collected: list[collecting.RemoteGc] = []

    def collect() -> None:
        a.store.remove("more10", "more11", "more12")
        a.push()
        collected.append(a.gc())

    team.place.before["get_ranges packs"] = [lambda: None, collect]
    b.pull()
    assert collected[0].rewritten_packs and collected[0].deleted
    b.pull()
    assert b.contents() == a.contents() == team.clone().contents()
    assert verify(b.store.path).ok


def test_a_pull_leaves_out_what_is_removed_while_it_reads(team: Team) -> None:
    a = team.client()
    for seed in range(3):
        a.store.add(small_task("dtd", seed=seed))
        a.push()
    b = team.client()
    turn = threading.Lock()

    def collect_once() -> None:
        with turn:  # packs are read in parallel: none is read before the first reader has collected
            if not collected:
                collected.append(a.gc(keep=1).deleted)

    collected: list[int] = []
    team.place.before["get_ranges packs"] = [collect_once] * 3
    assert b.pull().versions == [("dtd", 3)]
    assert collected == [2]
    a.pull()
    assert b.contents() == a.contents() == team.clone().contents()


def test_a_store_with_an_old_mirror_reads_the_log_again(team: Team) -> None:
    a = shared_pack(team)
    b = team.client()
    with opened_mirror(b.folder / "mirror", team.place.url) as mirror:
        read_on(mirror, team.place)
    team.place.before["get log"] = [lambda: did(a.gc().deleted)]
    b.pull()
    assert b.contents() == a.contents()


# ---- clocks


@pytest.mark.parametrize("off_s", [-86400.0, 86400.0, 400 * 86400.0])
def test_a_clock_that_is_off_costs_nothing_but_grace(team: Team, off_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    a = shared_pack(team)
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + int(off_s * 1e9))
    a.gc(grace_s=86400.0 * 7)
    monkeypatch.setattr(time, "time_ns", lambda: now)
    assert team.clone().contents() == a.contents()
    found = a.gc(grace_s=86400.0 * 7)
    assert (found.deleted, found.waiting) == (0, 1)
    a.store.add(small_task("later", seed=77))
    a.push()  # by a clock that is right: what came before is no younger
    monkeypatch.setattr(time, "time_ns", lambda: now + int(7.1 * 86400e9))
    assert a.gc(grace_s=86400.0 * 7).deleted == 1
    assert team.clone().contents() == a.contents()


# ---- damage, and what cannot be done


def test_a_damaged_pack_is_left_as_it_is(team: Team) -> None:
    a = shared_pack(team)
    (name,) = packs(team)
    with whole_mirror("place") as whole:
        read_on(whole, team.place)
        pack = bytes.fromhex(Path(name).stem)
        at = whole.tensors_of(pack, only_needed=True)[0][1]
    data = bytearray(objects(team)[name])
    data[at.offset] ^= 1
    objects(team)[name] = bytes(data)
    for _ in range(2):
        found = a.gc()
        assert found.damaged == [pack.hex()] and found.dropped_packs == 0
        assert name in objects(team)
    assert len(packs(team)) == 1, "nothing is sent in vain"


def test_a_log_that_was_put_back_is_not_written_to(team: Team) -> None:
    a = shared_pack(team)
    del objects(team)[team.log()[-1]]
    before = dict(objects(team))
    with pytest.raises(DamagedRemoteError, match="not the one that this store knows"):
        a.gc()
    assert objects(team) == before


def test_names_in_a_manifest_that_a_newer_pear_knows_are_kept() -> None:
    text = b'{"format":"pear-task/9","new":["sha256:' + b"a" * 64 + b'"]}'
    assert needs(text) == (set(), {bytes.fromhex("a" * 64)})


def test_very_much_goes_in_several_entries(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_MOST_REMOVED", "_MOST_DROPPED", "_MOST_MOVED"):
        monkeypatch.setattr(collecting, name, 2)
    a = team.client()
    for seed in range(6):
        a.store.add(small_task("dtd", seed=seed))
        a.push()
    for number in range(5):
        team.medium.put(pack_name(bytes([number]) * 32), b"x")
    found = a.gc(keep=1)
    assert found.entries > 2 and len(found.removed) == 5 and found.orphans == 5
    assert found.deleted == 10 and len(packs(team)) == 1
    a.pull()
    assert team.clone().contents() == a.contents()


def test_all_places_are_collected(place: Place, tmp_path: Path) -> None:
    team = Team(tmp_path / "team", place)
    a = shared_pack(team)
    assert a.gc().rewritten_packs == 1
    assert len(packs(team)) == 1
    assert team.clone().contents() == a.contents()
    team.close()


def test_a_place_that_can_only_be_read_is_one_line(team: Team) -> None:
    a = shared_pack(team)
    team.place.can_write = False
    with pytest.raises(PlaceError, match="only be read"):
        a.gc()
