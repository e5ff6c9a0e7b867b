"""Push and pull between stores."""

import hashlib
import json
import os
import random
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from pear_store import Store, rebuild, verify
from pear_store.errors import (
    CheckpointError,
    ClashError,
    DamagedRemoteError,
    NotFoundError,
    PearStoreError,
    PlaceError,
)
from pear_store.format.container import lay_out
from pear_store.format.digest import Digest
from pear_store.format.manifest import dump_manifest, manifest_hash
from pear_store.local.evict import evict
from pear_store.local.loading import Loaded, load_groups
from pear_store.local.opened import OpenStore
from pear_store.local.sync import Incoming, held, receive
from pear_store.local.verify import check
from pear_store.remote import groups as grouping
from pear_store.remote import pull as pulling
from pear_store.remote import push as pushing
from pear_store.remote.directory import DirectoryPlace
from pear_store.remote.log import (
    LoggedVersion,
    LogIndex,
    PackListing,
    index_name,
    pack_name,
    parse_entry,
    parse_index,
)
from pear_store.remote.memory import MemoryPlace
from pear_store.remote.mirror import opened_mirror
from pear_store.remote.place import Place
from pear_store.remote.reading import read_on
from pear_store.remote.web import WebPlace
from tests.helpers.makers import floats, record, small_task, tensors
from tests.pear_store.remote.faults import Client, Team, lost_answer, no_connection
from tests.pear_store.remote.test_mirror import append

pytestmark = pytest.mark.slow


def filled(client: Client) -> Client:
    """Three tasks: two share three tensors, one has two versions, a tag, and a removed version."""
    client.store.add(small_task("one"))
    client.store.add(small_task("two", head__bias=floats([5.0, 5.0])))
    for seed in (3, 4, 5):
        client.store.add(small_task("three", seed=seed))
    client.store.tag("three@1", "prod")
    client.store.remove("three@2")
    return client


def check_whole(store: Store) -> None:
    """A store's index and packs agree, and the packs alone say the same."""
    before = store.versions(), store.tags()
    report = verify(store.path)
    assert report.ok, report
    store.gc()
    assert not rebuild(store.path).problems
    with Store(store.path) as again:
        assert (again.versions(), again.tags()) == before


def test_a_clone_has_all_that_was_pushed(team: Team, tmp_path: Path) -> None:
    a = filled(team.client())
    pushed = a.push()
    assert pushed.versions == [("one", 1), ("three", 1), ("three", 3), ("two", 1)]
    assert (pushed.entries, pushed.tags) == (1, [("three", "prod", 1)])
    b = team.clone()
    assert b.contents() == a.contents()
    assert b.store.tags() == a.store.tags()
    assert [v.time_ns for v in b.store.versions()] == [v.time_ns for v in a.store.versions()]
    assert b.store.add(small_task("three", seed=4)).version == 4, "number 2 was used, though it never was on the remote"
    check_whole(b.store)


def test_all_places_carry_a_store(place: Place, tmp_path: Path) -> None:
    team = Team(tmp_path / "team", place)
    a = filled(team.client())
    a.push()
    b = team.clone()
    b.store.add(small_task("four", seed=9))
    b.push()
    a.pull()
    assert a.contents() == b.contents()
    team.close()


def test_a_web_server_is_pulled_from(tmp_path: Path, serve: Callable[..., str]) -> None:
    (tmp_path / "remote").mkdir()
    team = Team(tmp_path / "team", DirectoryPlace(tmp_path / "remote"))
    a = filled(team.client())
    a.push()
    b = team.client()
    b.place = WebPlace(serve(tmp_path / "remote"))
    b.pull()
    assert a.contents() == b.contents()
    with pytest.raises(PlaceError, match="only be read"):
        b.store.add(small_task("new"))
        b.push()
    b.place.close()
    team.close()


def test_the_same_again_does_nothing(team: Team) -> None:
    a = filled(team.client())
    a.push()
    assert isinstance(team.medium, MemoryPlace)
    before = dict(team.medium.objects)
    assert a.push() == pushing.Pushed()
    b = team.clone()
    commits = len(list((b.store.path / "packs").glob("*/*")))
    assert b.pull() == pulling.Pulled()
    assert b.push() == pushing.Pushed()
    assert len(list((b.store.path / "packs").glob("*/*"))) == commits
    assert dict(team.medium.objects) == before


def test_one_new_task_costs_few_requests_whatever_is_there(team: Team) -> None:
    a = team.client()
    for seed in range(40):
        a.store.add(small_task(f"t{seed}", seed=seed))
        if seed % 4 == 0:
            a.push()
    a.push()
    a.store.add(small_task("new", seed=99))
    team.place.asked.clear()
    a.push()
    assert dict(team.place.asked) == {"get log": 2, "put packs": 1, "put index": 1, "create log": 1}


def test_only_what_is_missing_moves(team: Team) -> None:
    a = team.client()
    a.store.add(small_task("one"))
    a.push()
    a.store.add(small_task("two", head__bias=floats([5.0, 5.0])))
    assert a.push().sent_bytes < 1000
    b = team.client()
    b.pull("two")
    assert team.place.read_bytes == sum(t.size_bytes for t in b.store.get("two").tensors.values())
    team.place.read_bytes = 0
    assert b.pull().read_bytes == team.place.read_bytes == 8, "one's bias is all that it shares not"


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
def test_what_a_push_read_is_not_left_in_this_process(team: Team) -> None:
    a = filled(team.client())

    def resident_kib() -> int:
        """Of maps of this store's packs."""
        found, in_pack = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            name, *rest = line.split()
            if name == "Rss:" and in_pack:
                found += int(rest[0])
            elif "-" in name:
                in_pack = str(a.folder) in line and "/packs/" in line
        return found

    a.contents()
    assert resident_kib() > 0
    a.push()
    assert resident_kib() == 0
    assert len(a.contents()) == 4


def test_a_push_of_some_tasks_leaves_the_others(team: Team) -> None:
    a = filled(team.client())
    a.push("one")
    assert list(team.clone().contents()) == ["one@1"]
    a.push("three")
    b = team.client()
    b.pull("three@prod")
    assert list(b.contents()) == ["three@1"]
    assert b.store.tags() == {"three": {"prod": 1}}
    assert b.store.add(small_task("three", seed=77)).version == 4, "numbers of versions that it lacks are used"
    b.pull("three@3")
    assert list(b.contents()) == ["three@1", "three@3", "three@4"]
    assert b.store.resolve("three").version == 4
    check_whole(b.store)
    for missing in ("none", "three@2", "three@none"):
        with pytest.raises(NotFoundError):
            b.pull(missing)
    c = team.client()
    c.pull(patterns=["th*"])
    assert list(c.contents()) == ["three@1", "three@3"]


# ---- two that write


def test_a_clash_is_named_before_anything_moves_and_a_pull_renumbers(team: Team) -> None:
    a, b = team.client(), team.client()
    a.store.add(small_task("dtd", seed=1))
    a.push()
    b.store.add(small_task("dtd", seed=2))
    b.store.add(small_task("dtd", seed=3))
    b.store.tag("dtd@1", "mine")
    team.place.asked.clear()
    with pytest.raises(
        ClashError, match="dtd@1 is another version on the remote; 'pear-store pull' renumbers"
    ) as found:
        b.push()
    assert found.value.exit_code == 13
    assert not [kind for kind in team.place.asked if not kind.startswith("get ")]
    local = b.contents()
    pulled = b.pull()
    assert pulled.renumbered == [("dtd", 1, 3)]
    contents = b.contents()
    assert contents == {"dtd@1": a.contents()["dtd@1"], "dtd@2": local["dtd@2"], "dtd@3": local["dtd@1"]}
    assert b.store.tags() == {"dtd": {"mine": 3}}
    check_whole(b.store)
    b.push()
    a.pull()
    assert a.contents() == b.contents()
    assert a.store.tags() == b.store.tags()
    check_whole(a.store)


def test_a_number_that_was_removed_here_and_is_another_version_there(team: Team) -> None:
    a, b = team.client(), team.client()
    a.store.add(small_task("dtd", seed=1))
    a.push()
    b.store.add(small_task("dtd", seed=2))
    b.store.add(small_task("dtd", seed=3))
    b.store.remove("dtd@1")
    assert b.push().removed == [], "what was removed here is not what is there"
    b.pull()
    assert b.contents()["dtd@1"] == a.contents()["dtd@1"]
    check_whole(b.store)


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("dies", ["before the commit", "after the commit"])
def test_a_death_as_a_number_changes_leaves_the_old_state_or_the_new(
    team: Team, monkeypatch: pytest.MonkeyPatch, dies: str, links: bool
) -> None:
    a, b = team.client(), team.client()
    for client, seed in ((a, 1), (b, 2)):
        client.store.add(small_task("dtd", seed=seed))
    a.push()
    if not links:
        monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(PermissionError(1, "none here")))

    class Died(BaseException):
        pass

    def die(*_: object) -> None:
        raise Died

    before = b.contents()
    with monkeypatch.context() as patch:
        if dies == "after the commit":
            patch.setattr("pear_store.local.opened.OpenStore.unlink_doomed", die)
        else:
            patch.setattr("pear_store.local.index.View.commit", die)
        with pytest.raises(Died):
            b.pull()
    if dies == "before the commit":
        assert b.contents() == before
        b.store.add(small_task("dtd", seed=2))
    else:
        assert b.contents() == {"dtd@1": a.contents()["dtd@1"], "dtd@2": before["dtd@1"]}
    b.pull()
    b.store.add(small_task("next"))
    assert b.contents().keys() == {"dtd@1", "dtd@2", "next@1"}
    assert [file.name for file in (b.store.path / "tmp").iterdir()] == []
    check_whole(b.store)


def test_names_that_differ_in_case_are_a_clash(team: Team) -> None:
    a, b = team.client(), team.client()
    a.store.add(small_task("dtd"))
    a.push()
    b.store.add(small_task("DTD"))
    with pytest.raises(ClashError, match="differs only in case"):
        b.push()
    assert b.pull().problems == ["task 'DTD' differs only in case from 'dtd' on the remote; add it under another name"]
    assert list(b.contents()) == ["DTD@1"]


def test_another_push_in_between_is_read_and_all_is_looked_at_again(team: Team) -> None:
    a, b = team.client(), team.client()
    a.store.add(small_task("a", seed=1))
    b.store.add(small_task("b", seed=2))
    team.place.before["create log"] = [lambda: (b.push(), None)[1]]
    a.push()
    assert len(team.log()) == 2
    assert list(team.clone().contents()) == ["a@1", "b@1"]


def test_a_clash_that_comes_in_between_is_refused(team: Team) -> None:
    a, b = team.client(), team.client()
    a.store.add(small_task("dtd", seed=1))
    b.store.add(small_task("dtd", seed=2))
    team.place.before["create log"] = [lambda: (b.push(), None)[1]]
    with pytest.raises(ClashError, match="dtd@1"):
        a.push()
    assert team.clone().contents() == b.contents()


def test_a_pack_that_was_dropped_in_between_is_sent_again(team: Team) -> None:
    """As a gc drops uploads that no entry names yet."""
    a = team.client()
    a.store.add(small_task("dtd"))

    def drop() -> None:
        (name,) = team.medium.list("packs/")
        assert isinstance(team.medium, MemoryPlace)
        append(team.medium, LogIndex(drop=[bytes.fromhex(Path(name).stem)]))
        team.medium.delete(name)

    team.place.before["create log"] = [drop]
    a.push()
    assert len(list(team.medium.list("packs/"))) == 1
    assert team.clone().contents() == a.contents()


def named_packs(place: MemoryPlace) -> set[str]:
    """The packs that entries name."""
    found: set[str] = set()
    for name in sorted(place.list("log/")):
        entry = parse_entry(place.objects[name], "place", int(Path(name).name))
        index = parse_index(place.objects[index_name(entry.index)], "place", entry.index)
        found.update(map(pack_name, index.packs))
    return found


def test_what_another_process_of_this_store_read_is_looked_at_too(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouping, "GROUP_VERSIONS", 1)
    a = team.client()
    a.store.add(small_task("one", seed=1))
    a.store.add(small_task("two", seed=2))
    medium = team.medium
    assert isinstance(medium, MemoryPlace)

    def meanwhile() -> None:
        """A gc drops what was sent for the second entry, and another process reads that first."""
        while len(packs := list(medium.list("packs/"))) < 2:
            time.sleep(0.01)
        (unnamed,) = set(packs) - named_packs(medium)
        append(medium, LogIndex(drop=[bytes.fromhex(Path(unnamed).stem)]))
        medium.delete(unnamed)
        with opened_mirror(a.folder / "mirror", team.place.url) as other:
            read_on(other, medium)

    team.place.after["create log"] = [meanwhile]
    assert a.push().entries == 2
    assert team.clone().contents() == a.contents()


def test_two_pushes_of_one_store_at_once_are_no_damage(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    a = team.client()
    a.store.add(small_task("dtd"))
    make_index = pushing._index

    def meanwhile(*arguments: Any) -> LogIndex:
        monkeypatch.setattr(pushing, "_index", make_index)
        index = make_index(*arguments)
        assert a.push().versions == [("dtd", 1)]
        return index

    monkeypatch.setattr(pushing, "_index", meanwhile)
    assert a.push().versions == []
    assert len(team.log()) == 1
    assert team.clone().contents() == a.contents()


def test_packs_that_are_sent_again_are_bounded(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushing, "PACK_BYTES", 100)
    a = team.client()
    for n in range(5):
        a.store.add(small_task(f"task{n}", seed=n))
    medium = team.medium
    assert isinstance(medium, MemoryPlace)

    def drop() -> None:
        (name,) = medium.list("packs/")
        append(medium, LogIndex(drop=[bytes.fromhex(Path(name).stem)]))
        medium.delete(name)

    team.place.before["create log"] = [drop]
    a.push()
    assert len(list(medium.list("packs/"))) == 5
    assert team.clone().contents() == a.contents()


def test_any_number_of_tags_and_removals_is_pushed(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushing, "ENTRY_NAMES", 3)
    a = team.client()
    for n in range(4):
        for seed in range(3):
            a.store.add(small_task(f"task{n}", seed=10 * n + seed))
        a.store.tag(f"task{n}@1", "old")
    a.push()
    for n in range(4):
        a.store.tag(f"task{n}@2", "new")
        a.store.untag(f"task{n}@old")
        a.store.remove(f"task{n}@1")
        a.store.add(small_task(f"task{n}", seed=100 + n))
        a.store.remove(f"task{n}@4")
    pushed = a.push()
    assert len(pushed.tags) == 8 and len(pushed.removed) == 4 and pushed.entries == 6
    assert a.push().entries == 0
    b = team.clone()
    assert b.contents() == a.contents() and b.store.tags() == a.store.tags()
    assert b.store.add(small_task("task3", seed=7)).version == 5


def test_what_was_counted_on_and_is_dropped_in_between_is_sent(team: Team) -> None:
    a, b = team.client(), team.client()
    b.store.add(small_task("old"))
    b.push()
    b.store.remove("old")
    a.store.add(small_task("new"))

    def drop() -> None:
        b.push()
        assert isinstance(team.medium, MemoryPlace)
        (name,) = team.medium.list("packs/")
        append(team.medium, LogIndex(drop=[bytes.fromhex(Path(name).stem)]))
        team.medium.delete(name)

    team.place.before["create log"] = [drop]
    assert a.push().sent_bytes
    assert team.clone().contents() == a.contents()


def test_what_is_added_and_tagged_during_a_push_waits_for_the_next(team: Team) -> None:
    a, b = team.client(), team.client()
    a.store.add(small_task("dtd", seed=1))
    b.store.add(small_task("b"))

    def meanwhile() -> None:
        b.push()
        a.store.add(small_task("dtd", seed=2))
        a.store.tag("dtd@2", "prod")

    team.place.before["create log"] = [meanwhile]
    assert a.push().versions == [("dtd", 1)]
    assert team.clone().store.tags() == {}
    assert a.push().tags == [("dtd", "prod", 2)]
    assert team.clone().store.tags() == {"dtd": {"prod": 2}}


# ---- faults


def test_an_answer_that_is_lost_is_no_conflict(team: Team) -> None:
    a = team.client()
    a.store.add(small_task("dtd"))
    team.place.after["create log"] = [lost_answer]
    assert a.push().versions == [("dtd", 1)]
    assert len(team.log()) == 1
    a.store.add(small_task("dtd", seed=2))
    team.place.before["create log"] = [lost_answer, lost_answer]
    a.push()
    assert len(team.log()) == 2


def test_a_push_that_is_not_answered_at_all_finds_itself_the_next_time(team: Team) -> None:
    a = team.client()
    a.store.add(small_task("dtd"))
    team.place.after["create log"] = [no_connection]
    with pytest.raises(PlaceError, match="no connection"):
        a.push()
    assert a.push() == pushing.Pushed()
    assert len(team.log()) == 1
    assert team.clone().contents() == a.contents()


@pytest.mark.parametrize("request_", ["put packs", "put index", "create log", "get log", "get pear-remote.json"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_push_that_was_cut_off_goes_on(team: Team, request_: str, when: str) -> None:
    a = filled(team.client())
    if (request_, when) == ("get log", "after"):
        a.push("one")  # so that there is an entry to get
    getattr(team.place, when)[request_] = [no_connection]
    with pytest.raises(PlaceError):
        a.push()
    a.push()
    assert team.clone().contents() == a.contents()


def test_a_pull_that_was_cut_off_keeps_what_it_took(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulling, "GROUP_VERSIONS", 1)
    a = filled(team.client())
    a.push()
    b = team.client()
    for taken in range(4):
        team.place.before["get_ranges packs"] = [*[lambda: None] * min(taken, 1), no_connection]
        if taken < 3:
            with pytest.raises(PlaceError):
                b.pull()
            assert len(b.contents()) == min(taken, 3)
    team.place.before.clear()
    b.pull()
    assert b.contents() == a.contents()
    sizes = {t.digest: t.size_bytes for r in a.contents() for t in a.store.get(r).tensors.values()}
    assert sum(sizes.values()) <= team.place.read_bytes <= 3 * sum(sizes.values())


def test_a_pushs_groups_are_bounded_and_each_is_whole(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pear_store.remote.groups.GROUP_BYTES", 300)
    a = filled(team.client())
    pushed = a.push()
    assert pushed.entries == len(team.log()) > 1
    assert team.clone().contents() == a.contents()


# ---- removals, tags, numbers


def test_what_was_removed_stays_removed_everywhere(team: Team) -> None:
    a = filled(team.client())
    a.push()
    b = team.clone()
    a.store.remove("three@3")
    a.store.remove("two")
    assert a.push().removed == [("three", 3), ("two", 1)]
    assert b.pull().removed == [("three", 3), ("two", 1)]
    assert a.contents() == b.contents() == team.clone().contents()
    b.push()
    a.store.gc()
    assert a.pull().versions == []
    for store in (a.store, b.store):
        assert store.add(small_task("three", seed=8)).version == 4
        check_whole(store)
    assert team.clone().store.add(small_task("two", seed=8)).version == 2


def test_a_number_that_was_used_and_removed_here_is_used_nowhere(team: Team) -> None:
    a = team.client()
    a.store.add(small_task("dtd", seed=1))
    a.push()
    a.store.add(small_task("dtd", seed=2))
    a.store.remove("dtd@2")
    a.push()
    assert a.push().entries == 0
    assert team.clone().store.add(small_task("dtd", seed=3)).version == 3


def test_what_was_removed_here_is_not_pulled_again(team: Team) -> None:
    a = filled(team.client())
    a.push()
    b = team.clone()
    b.store.remove("two")
    assert b.pull().versions == []
    b.store.gc(repack_all=True)
    b.store.add(small_task("other", seed=9))
    b.store.gc(repack_all=True)  # two packs become one, without what nothing could bring back
    assert not held(b.store._open).removed, "the removal is forgotten, no pack has the version"
    assert b.pull().versions == []
    with pytest.raises(NotFoundError, match="was removed here"):
        b.pull("two@1")


def test_a_version_that_is_tagged_on_either_side_is_not_removed_from_the_other(team: Team) -> None:
    a = filled(team.client())
    a.push()
    b = team.clone()
    b.store.tag("two@1", "keep")
    a.store.remove("two")
    a.push()
    assert "is kept here, because it has a tag" in b.pull().problems[0]
    assert "two@1" in b.contents()
    with pytest.raises(ClashError, match="was removed on the remote"):
        b.push()
    c = team.clone()
    a.store.tag("one", "keep")
    a.push()
    c.store.remove("one")
    with pytest.raises(ClashError, match="removed here and is tagged 'keep' on the remote"):
        c.push()
    check_whole(b.store)


def test_tags_move_only_from_what_the_mover_saw(team: Team) -> None:
    a = team.client()
    for seed in range(3):
        a.store.add(small_task("dtd", seed=seed))
    a.store.tag("dtd@1", "prod")
    a.push()
    b = team.clone()
    a.store.tag("dtd@2", "prod")
    assert a.push().tags == [("dtd", "prod", 2)]
    b.store.tag("dtd@3", "prod")
    with pytest.raises(ClashError, match="tag dtd@prod is on version 3 here and on version 2 on the remote"):
        b.push()
    assert b.pull().problems and b.store.tags() == {"dtd": {"prod": 3}}, "neither is chosen"
    b.store.tag("dtd@2", "prod")
    b.push()
    b.store.tag("dtd@3", "prod")
    b.push()
    assert a.pull().tags == [("dtd", "prod")]
    assert a.store.tags() == {"dtd": {"prod": 3}}
    a.store.untag("dtd@prod")
    assert a.push().tags == [("dtd", "prod", None)]
    b.pull()
    assert b.store.tags() == team.clone().store.tags() == {}
    check_whole(b.store)


def test_a_version_is_untagged_and_removed_in_one_push(team: Team) -> None:
    a = filled(team.client())
    a.push()
    b = team.clone()
    a.store.untag("three@prod")
    a.store.remove("three@1")
    assert a.push().removed == [("three", 1)]
    assert b.pull().removed == [("three", 1)]
    assert b.store.tags() == {}


def test_a_lost_mirror_costs_no_version(team: Team) -> None:
    a = filled(team.client())
    a.push()
    (a.folder / "mirror").unlink()
    a.store.add(small_task("new"))
    assert a.push().versions == [("new", 1)]
    assert a.pull().versions == []


# ---- damage and strangers


def pack_of(team: Team) -> str:
    (name,) = team.medium.list("packs/")
    return name


def test_flipped_bits_are_never_taken(team: Team) -> None:
    a = filled(team.client())
    a.push()
    assert isinstance(team.medium, MemoryPlace)
    rng = random.Random(1)
    good = dict(team.medium.objects)
    for attempt in range(60):
        b = team.client(f"flip{attempt}") if attempt % 20 == 0 else team.clients[-1]
        name = rng.choice(sorted(good))
        data = bytearray(good[name])
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        team.medium.objects = {**good, name: bytes(data)}
        (b.folder / "mirror").unlink(missing_ok=True)
        try:
            b.pull()
        except PearStoreError as error:
            assert "\n" not in str(error)
        assert b.contents().items() <= a.contents().items()
    team.medium.objects = good
    (b.folder / "mirror").unlink(missing_ok=True)
    b.pull()
    assert b.contents() == a.contents()


def test_damage_costs_only_the_tasks_that_it_hits(team: Team) -> None:
    a = team.client()
    a.store.add(small_task("one", seed=1))
    a.store.add(small_task("two", seed=2))
    a.push()
    assert isinstance(team.medium, MemoryPlace)
    name = pack_of(team)
    data = bytearray(team.medium.objects[name])
    data[-1] ^= 1
    team.medium.objects[name] = bytes(data)
    b = team.client()
    with pytest.raises(DamagedRemoteError, match="do not hash to it") as found:
        b.pull()
    assert found.value.exit_code == 5
    took = []
    for task in ("one", "two"):
        with suppress(DamagedRemoteError):
            took += b.pull(task).versions
    assert len(took) == 1


def test_another_good_copy_is_used(team: Team) -> None:
    a = team.client()
    a.store.add(small_task("dtd"))
    a.push()
    assert isinstance(team.medium, MemoryPlace)
    name = pack_of(team)
    good = team.medium.objects[name]
    entry = parse_entry(team.medium.objects[team.log()[0]], "", 1)
    listing = next(iter(parse_index(team.medium.objects[f"index/{entry.index.hex()}"], "", entry.index).packs.values()))
    copy = hashlib.sha256(b"any").digest()
    append(team.medium, LogIndex(packs={copy: listing}))
    team.medium.objects[f"packs/{copy.hex()[:2]}/{copy.hex()}.safetensors"] = good
    team.medium.objects[name] = bytes(len(good))
    assert team.clone().contents() == a.contents()


def test_packs_that_moved_while_they_were_read_are_found_again(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of commits to come, whose places were looked up before."""
    monkeypatch.setattr(pulling, "GROUP_VERSIONS", 1)
    a = team.client()
    for number in range(4):
        a.store.add(small_task(f"t{number}", seed=number))
        a.push()
    b = team.client()
    medium = team.medium
    assert isinstance(medium, MemoryPlace)

    def repack() -> None:
        for number in range(1, 5):
            entry = parse_entry(medium.objects[team.log()[number - 1]], "", number)
            index = parse_index(medium.objects[f"index/{entry.index.hex()}"], "", entry.index)
            ((pack, listing),) = index.packs.items()
            moved = hashlib.sha256(pack).digest()
            medium.put(pack_name(moved), medium.objects[pack_name(pack)])
            append(medium, LogIndex(packs={moved: listing}, drop=[pack]))
            medium.delete(pack_name(pack))

    team.place.before["get_ranges packs"] = [repack]
    b.pull()
    assert b.contents() == a.contents()


def logged(manifest: dict[str, object] | bytes, task: str = "evil") -> LogIndex:
    text = manifest if isinstance(manifest, bytes) else dump_manifest(manifest)
    return LogIndex(manifests={manifest_hash(text): text}, versions=[LoggedVersion(task, 1, 0, manifest_hash(text))])


@pytest.mark.parametrize(
    "manifest",
    [
        b"{}", b"[]", b"no json", b'{"a":' * 1000, {**record("evil"), "head": None},
        {**record("evil"), "adapters": {}, "positions": {}, "head": None, "labels": [], "task": "../../x"},
        {**record("evil"), "adapters": {}, "positions": {}, "head": None, "labels": [], "task": "other"},
        {**record("evil"), "adapters": {}, "positions": {}, "head": {"weight": "sha256:" + "0" * 64, "bias": "x"}},
    ],
)  # fmt: skip
def test_a_strangers_version_is_refused_and_nothing_is_written(team: Team, manifest: dict[str, object] | bytes) -> None:
    assert isinstance(team.medium, MemoryPlace)
    append(team.medium, logged(manifest))
    b = team.client()
    b.store.add(small_task("mine"))
    before = sorted(os.walk(team.folder))
    with pytest.raises((DamagedRemoteError, CheckpointError)) as found:
        b.pull()
    assert "\n" not in str(found.value) and len(str(found.value)) < 1000
    after = [one for one in sorted(os.walk(team.folder)) if "mirror" not in str(one)]
    assert after == [one for one in before if "mirror" not in str(one)] or list(b.contents()) == ["mine@1"]
    assert list(b.contents()) == ["mine@1"]


@pytest.mark.parametrize("change", ["none", "nan", "labels", "shape"])
def test_a_task_whose_tensors_are_there_is_checked_as_if_it_were_added(team: Team, change: str) -> None:
    assert isinstance(team.medium, MemoryPlace)
    found = tensors()
    if change == "nan":
        found["head.bias"] = floats([1.0, float("nan")])
    if change == "shape":
        found["a0.up"] = floats([[1.0] * 6] * 3)
    digests = {name: str(tensor.digest) for name, tensor in found.items()}
    manifest = dict(record("evil"))
    manifest["adapters"] = {"a0": {"down": digests["a0.down"], "up": digests["a0.up"]}}
    manifest["head"] = {"weight": digests["head.weight"], "bias": digests["head.bias"]}
    if change == "labels":
        manifest["labels"] = ["only one"]
    named = {str(tensor.digest): tensor for tensor in found.values()}
    head, places = lay_out(named, {})
    data = b"".join((head, *(named[name].data for name in places)))
    pack = hashlib.sha256(data).digest()
    team.medium.put(pack_name(pack), data)
    index = logged(manifest)
    index.packs[pack] = PackListing(len(data), {Digest(name): at for name, at in places.items()})
    append(team.medium, index)
    if change == "none":
        assert list(team.clone().contents()) == ["evil@1"]
        return
    b = team.client()
    with pytest.raises(CheckpointError, match="place|memory"):
        b.pull()
    assert not b.contents()


def test_no_entry_is_created_that_a_reader_would_refuse(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    a = team.client()
    a.store.add(small_task("dtd"))

    def add_wrong(_: object, index: LogIndex, *__: object) -> bool:
        index.removed = [("dtd", 7)]
        return False

    monkeypatch.setattr(pushing, "_add_names", add_wrong)
    with pytest.raises(DamagedRemoteError, match="dtd@7"):
        a.push()
    assert not team.log()


def test_a_remote_that_claims_gigabytes_is_refused_before_they_are_asked_for(team: Team) -> None:
    a = team.client()
    a.store.add(small_task("dtd"))
    a.push()
    assert isinstance(team.medium, MemoryPlace)
    entry = parse_entry(team.medium.objects[team.log()[0]], "", 1)
    index = parse_index(team.medium.objects[f"index/{entry.index.hex()}"], "", entry.index)
    team.medium.objects = {n: d for n, d in team.medium.objects.items() if n == "pear-remote.json"}
    ((pack, listing),) = index.packs.items()
    huge = {
        digest: at._replace(dtype="U8", shape=(1 << 33,), offset=8, length=1 << 33)
        for digest, at in listing.places.items()
    }
    append(team.medium, LogIndex({pack: type(listing)(1 << 39, huge)}, index.manifests, index.versions))
    with pytest.raises(CheckpointError, match="at most 4294967296"):
        team.client().pull()
    assert not team.place.asked["get_ranges packs"]


def test_a_json_text_of_the_manifests_task_is_what_the_version_says(team: Team) -> None:
    """A version under another task's name would replace that task."""
    a = team.client()
    a.store.add(small_task("dtd"))
    manifest = json.loads(next(iter(a.contents().values())))
    a.push()
    assert isinstance(team.medium, MemoryPlace)
    append(team.medium, logged(manifest, "svhn"))
    with pytest.raises(CheckpointError, match="its manifest is of task 'dtd'"):
        team.clone()


@pytest.mark.parametrize("seed", range(12))
def test_versions_that_go_and_come_back_under_their_numbers_contradict_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """As in a cache: what records that a version went must not outlive its coming back, also where a process died
    before it deleted that."""
    chosen = random.Random(seed)
    tasks = [small_task(f"t{number}", seed=number // 2) for number in range(12)]
    loaded = [one for group in load_groups(tasks, None) for one in group if isinstance(one, Loaded)]
    with closing(OpenStore(store.path)) as opened:
        for _ in range(30):
            some = chosen.sample(loaded, chosen.randint(1, 3))
            with monkeypatch.context() as patch:
                if chosen.random() < 0.3:
                    patch.setattr(OpenStore, "unlink_doomed", lambda _: None)
                if chosen.random() < 0.5:
                    receive(opened, [Incoming(one, 1, 1) for one in some], {})
                else:
                    evict(opened, [(one.name, 1) for one in some], repack_all=chosen.random() < 0.3)
            report = check(store.path)
            assert report.ok, report
    store.gc()
    assert verify(store.path).ok
    before = store.versions()
    rebuild(store.path)
    assert Store(store.path).versions() == before


def test_a_push_leaves_out_what_a_pull_from_another_remote_renumbers(tmp_path: Path) -> None:
    """Else an entry would name a manifest by another one's hash, and nobody could read the remote any more."""
    one, two = Team(tmp_path / "one"), Team(tmp_path / "two")
    other = one.client()
    other.store.add(small_task("a", seed=5))
    other.push()
    a = two.client()
    a.store.add(small_task("a", seed=1))
    again = one.client()
    again.store = a.store
    two.place.before["create probe"] = [lambda: assert_renumbered(again.pull().renumbered)]
    a.push()
    a.push()
    assert two.clone().contents() == a.contents()
    assert a.verify().ok


def assert_renumbered(renumbered: list[tuple[str, int, int]]) -> None:
    assert renumbered == [("a", 1, 2)]
