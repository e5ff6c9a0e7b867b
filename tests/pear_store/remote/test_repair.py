"""A remote that is damaged: every fault is named with what it hits, and mended where a good copy is."""

import os
import random
from functools import partial
from pathlib import Path

import pytest

from pear_store.errors import DamagedRemoteError, FormatError, NotFoundError, PearStoreError, PlaceError
from pear_store.format.digest import Digest
from pear_store.format.manifest import manifest_digests
from pear_store.remote import verify as checking
from pear_store.remote.log import (
    SETTINGS_NAME,
    LogIndex,
    encode_settings,
    entry_name,
    index_name,
    pack_name,
    parse_entry,
)
from pear_store.remote.memory import MemoryPlace
from pear_store.remote.place import Place
from pear_store.remote.reading import read_on
from pear_store.remote.whole import whole_mirror
from tests.helpers.makers import small_task
from tests.pear_store.remote.faults import Client, Team, no_connection
from tests.pear_store.remote.test_gc import did, objects, packs, shared_pack
from tests.pear_store.remote.test_mirror import append, listing
from tests.pear_store.remote.test_sync import filled

pytestmark = pytest.mark.slow

FLIPS = int(os.environ.get("PEAR_REMOTE_FLIPS", "24"))


def three_pushes(team: Team) -> Client:
    """Three entries, each with a pack of its own."""
    a = team.client()
    for seed, task in enumerate(("one", "two", "three")):
        a.store.add(small_task(task, seed=seed))
        a.push()
    return a


def flip(team: Team, name: str, at: int = -1) -> None:
    data = bytearray(objects(team)[name])
    data[at] ^= 1
    objects(team)[name] = bytes(data)


def index_of(team: Team, number: int) -> str:
    return index_name(parse_entry(objects(team)[entry_name(number)], "", number).index)


def pack_of_task(team: Team, task: str) -> str:
    """The pack that a task's version 1 lies in."""
    with whole_mirror("place") as whole:
        read_on(whole, team.medium)
        found = whole.version(task, 1)
        assert found is not None
        digests = manifest_digests(whole.manifest(found[0].manifest))
        return pack_name(whole.places(digests[0])[0][0])


def test_a_good_remote_is_good(team: Team) -> None:
    a = filled(team.client())
    a.push()
    report = a.verify()
    assert report.ok and (report.entries, report.packs) == (1, 1)
    assert report.bytes == len(objects(team)[packs(team)[0]]) and report.tensors == 13
    before = dict(objects(team))
    assert a.repair().entries == 0 and objects(team) == before, "there is nothing to do"
    assert team.client().verify() == report, "a store that knows nothing of it finds the same"


@pytest.mark.slow
def test_each_flipped_bit_is_named_with_what_it_hits_and_mended(team: Team) -> None:
    a = three_pushes(team)
    contents = a.contents()
    rng = random.Random(5)
    fresh = team.client()
    hit_tasks = 0
    for _ in range(FLIPS):
        good = dict(objects(team))
        name = rng.choice(sorted(good))
        data = bytearray(good[name])
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        objects(team)[name] = bytes(data)
        if name.endswith(".safetensors") and not any(name == pack_name(use) for use in live(team, good)):
            continue  # it was dropped before
        report = a.verify()
        assert [fault.what for fault in report.faults] == [name], report
        hit_tasks += bool(report.faults[0].tasks)
        try:
            fresh.pull()
        except PearStoreError as error:
            assert "\n" not in str(error)
        assert fresh.contents().items() <= contents.items(), "nothing wrong is taken"
        repaired = a.repair()
        assert not repaired.missing, repaired
        if not name.endswith(".safetensors"):
            assert repaired.restored == [name] and objects(team) == good
        assert a.verify().ok
        a.gc()
        assert team.client(f"clone{rng.random()}").verify().ok
    assert hit_tasks
    assert team.clone().contents() == contents


def live(team: Team, good: dict[str, bytes]) -> list[bytes]:
    place = MemoryPlace("place")
    place.objects = dict(good)
    with whole_mirror("place") as whole:
        read_on(whole, place)
        return [use.pack for use in whole.uses()]


def test_versions_hit_are_those_that_need_the_tensor(team: Team) -> None:
    a = three_pushes(team)
    name = pack_of_task(team, "two")
    flip(team, name)
    (fault,) = a.verify().faults
    assert (fault.what, fault.tasks, fault.versions) == (name, ["two"], [("two", 1)])
    assert "1 of its tensors do not hash" in fault.problem
    repaired = a.repair()
    assert (repaired.healed, repaired.entries, len(repaired.dropped)) == (1, 1, 1)
    assert a.verify().ok and team.clone().contents() == a.contents()
    assert a.gc().deleted == 1 and team.clone().contents() == a.contents()


def test_a_flip_in_a_packs_own_header_hits_no_version(team: Team) -> None:
    a = three_pushes(team)
    flip(team, pack_of_task(team, "two"), 20)
    (fault,) = a.verify().faults
    assert "all its tensors are good" in fault.problem and not fault.versions
    assert a.repair().healed == 0
    assert a.verify().ok and team.clone().contents() == a.contents()


@pytest.mark.parametrize("cut", [0, 100, None])
def test_a_pack_that_is_missing_or_cut_off(team: Team, cut: int | None) -> None:
    a = three_pushes(team)
    name = pack_of_task(team, "one")
    if cut is None:
        del objects(team)[name]
    else:
        objects(team)[name] = objects(team)[name][:cut]
    (fault,) = a.verify().faults
    assert fault.what == name and fault.versions == [("one", 1)]
    assert a.repair().healed == 4
    assert a.verify().ok and team.clone().contents() == a.contents()


def test_every_pack_is_in_one_part(team: Team) -> None:
    a = three_pushes(team)
    for seed in range(4, 9):
        a.store.add(small_task(f"t{seed}", seed=seed))
        a.push()
    parts = [a.verify((part, 3)) for part in (1, 2, 3)]
    assert sum(report.packs for report in parts) == a.verify().packs == 8
    assert all(report.packs < 8 for report in parts)
    for subset in ((0, 3), (4, 3), (1, 0)):
        with pytest.raises(PearStoreError, match="expected n/t"):
            a.verify(subset)


def test_packs_are_read_in_parts(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "_CHUNK_BYTES", 7)
    a = filled(team.client())
    a.push()
    assert a.verify().ok
    flip(team, packs(team)[0])
    assert a.verify().faults[0].versions


def test_a_log_that_claims_overlapping_tensors_costs_no_more_than_the_pack(team: Team) -> None:
    place = team.medium
    one = listing(b"o" * 32)
    (pack, found) = next(iter(one.packs.items()))
    (at,) = found.places.values()
    for number in range(50):
        found.places[Digest(f"sha256:{number:064x}")] = at
    append_to(place, one)
    a = team.client()
    place.put(pack_name(pack), bytes(found.file_bytes))
    (fault,) = a.verify().faults
    assert "overlap" in fault.problem and not team.place.read_bytes


def append_to(place: Place, index: LogIndex) -> None:
    assert isinstance(place, MemoryPlace)
    append(place, index)


# ---- what has no good copy


def test_what_nobody_has_is_named_and_nothing_is_dropped(team: Team) -> None:
    a = three_pushes(team)
    b = team.client()
    b.pull("three")
    flip(team, pack_of_task(team, "one"))
    flip(team, pack_of_task(team, "three"))
    repaired = b.repair()
    assert [fault.versions for fault in repaired.missing] == [[("one", 1)]]
    assert repaired.healed == 1 and len(repaired.dropped) == 1
    (fault,) = b.verify().faults
    assert fault.versions == [("one", 1)]
    before = dict(objects(team))
    assert b.repair().sent_bytes == 0 and objects(team) == before, "the same again sends nothing"
    assert b.repair(a).healed == 1, "another store has it"
    assert b.verify().ok and team.clone().contents() == a.contents()


def test_a_pack_of_which_a_part_is_lost_stays_and_gets_company(team: Team) -> None:
    a = team.client()
    a.store.add(small_task("one", seed=1))
    a.store.add(small_task("two", seed=2))
    a.push()
    b = team.client()
    b.pull("one")
    (name,) = packs(team)
    objects(team)[name] = bytes(len(objects(team)[name]))
    repaired = b.repair()
    assert repaired.healed == 4 and not repaired.dropped
    assert [fault.versions for fault in repaired.missing] == [[("two", 1)]]
    c = team.client()
    c.pull("one")
    assert set(c.contents()) == {"one@1"}
    assert b.repair().sent_bytes == 0
    assert b.repair(a).dropped == [Path(name).stem]
    assert team.clone().contents() == a.contents()


def test_a_tensor_that_no_pack_lists_is_named_and_sent_again(team: Team) -> None:
    a = three_pushes(team)
    name = pack_of_task(team, "one")
    append_to(team.medium, LogIndex(drop=[bytes.fromhex(Path(name).stem)]))
    report = a.verify()
    assert len(report.faults) == 4
    assert {fault.problem for fault in report.faults} == {"no pack has it"}
    assert all(fault.versions == [("one", 1)] for fault in report.faults)
    assert a.repair().healed == 4
    assert a.verify().ok and team.clone().contents() == a.contents()


# ---- the log


def test_an_object_of_the_log_is_put_back_as_it_was(team: Team) -> None:
    a = three_pushes(team)
    good = dict(objects(team))
    for number, task in ((1, "one"), (2, "two"), (3, "three")):
        for name in (entry_name(number), index_of(team, number)):
            flipped = good[name][:-9] + bytes([good[name][-9] ^ 64]) + good[name][-8:]
            for data in (None, flipped, b"", bytes(17 << 20)):
                if data is None:
                    del objects(team)[name]
                else:
                    objects(team)[name] = data
                (fault,) = a.verify().faults
                assert fault.what == name and fault.versions == [(task, 1)]
                repaired = a.repair()
                assert repaired.restored == [name] and not repaired.missing
                assert objects(team) == good
    assert team.clone().contents() == a.contents()


def test_an_entry_that_can_be_read_and_is_not_what_it_was(team: Team) -> None:
    a, stranger = three_pushes(team), team.client()
    good = dict(objects(team))
    for number in (1, 2, 3):
        for field in (b'"host":"', b'"time_ns":', b'"id":"', b'"index":"', b'"previous":'):
            name = entry_name(number)
            data = bytearray(good[name])
            at = data.index(field) + len(field) + (field == b'"previous":' and number > 1)
            data[at] ^= 1 if chr(data[at] ^ 1) in "0123456789abcdef" else 2
            objects(team)[name] = bytes(data)
            (fault,) = a.verify().faults
            assert fault.what == name
            if number < 3 or field in (b'"index":"', b'"previous":'):
                assert not stranger.verify().ok, "who knows nothing sees it, too, by the entry after it"
            (stranger.folder / "mirror").unlink(missing_ok=True)
            assert a.repair().restored == [name]
            assert objects(team) == good


def test_what_another_store_knows_of_the_log_is_believed_if_hashes_say_so(team: Team) -> None:
    a = three_pushes(team)
    b = team.client()
    good = dict(objects(team))
    flip(team, index_of(team, 2))
    flip(team, entry_name(1))
    lost = b.repair()
    assert not lost.restored and lost.missing[0].what == entry_name(1)
    assert "what comes after it cannot be read" in lost.missing[0].problem
    assert b.repair(a).restored == [entry_name(1), index_of_good(good, 2)]
    assert objects(team) == good


def index_of_good(good: dict[str, bytes], number: int) -> str:
    return index_name(parse_entry(good[entry_name(number)], "", number).index)


@pytest.mark.parametrize("data", [None, b"", b"{}", encode_settings("0" * 31 + "1")])
def test_the_remotes_own_file_is_put_back(team: Team, data: bytes | None) -> None:
    a = three_pushes(team)
    good = dict(objects(team))
    if data is None:
        del objects(team)[SETTINGS_NAME]
    else:
        objects(team)[SETTINGS_NAME] = data
    assert [fault.what for fault in a.verify().faults] == [SETTINGS_NAME]
    assert a.repair().restored == [SETTINGS_NAME]
    assert objects(team) == good


def test_another_remote_in_its_place_is_not_written_to(team: Team, tmp_path: Path) -> None:
    a = three_pushes(team)
    other = Team(tmp_path / "other")
    three_pushes(other)
    good = dict(objects(team))

    def pushed_on_after_a_backup() -> None:
        del objects(team)[entry_name(3)]
        append_to(team.medium, LogIndex(highest={"dtd": 9}))

    for change in (partial(objects(team).update, objects(other)), pushed_on_after_a_backup):
        change()
        changed = dict(objects(team))
        for act in (a.verify, a.repair):
            with pytest.raises(DamagedRemoteError, match="not the one that this store knows"):
                act()
        assert objects(team) == changed
        objects(team).clear()
        objects(team).update(good)
    other.close()


def test_a_newer_format_is_no_damage(team: Team) -> None:
    a, b = three_pushes(team), team.client()
    objects(team)[entry_name(4)] = objects(team)[entry_name(3)].replace(b"pear-log/1", b"pear-log/2")
    for client in (a, b):
        with pytest.raises(FormatError, match="newer Pear"):
            client.verify()


def test_a_place_without_a_remote_is_one_line(team: Team) -> None:
    objects(team).clear()
    with pytest.raises(NotFoundError, match="no pear-remote.json"):
        team.client().verify()


def test_a_gap_is_seen_by_the_entries_after_it(team: Team) -> None:
    three_pushes(team)
    for number in (1, 2):
        del objects(team)[entry_name(number)]
    (fault,) = team.client().verify().faults
    assert fault.what == entry_name(1) and "it is missing" in fault.problem


# ---- others meanwhile


def test_a_push_that_counts_on_a_damaged_pack_is_mended_with_it(team: Team) -> None:
    a = three_pushes(team)
    a.store.remove("one")
    a.push()
    flip(team, next(name for name in packs(team) if name == pack_of_removed(team)))
    b = team.client()
    b.store.add(small_task("again", seed=0))
    team.place.before["create log"] = [lambda: did(not b.push().sent_bytes)]
    repaired = a.repair(b)
    assert repaired.healed <= 1
    a.repair(b)
    assert a.verify().ok
    a.pull()
    assert team.clone().contents() == a.contents()


def pack_of_removed(team: Team) -> str:
    with whole_mirror("place") as whole:
        read_on(whole, team.medium)
        return pack_name(next(use.pack for use in whole.uses() if not use.needed))


def test_packs_that_a_gc_drops_meanwhile_are_no_fault(team: Team) -> None:
    a = shared_pack(team)
    team.place.before["get_ranges packs"] = [lambda: did(a.gc().deleted)]
    b = team.client()
    assert b.verify().ok
    assert b.verify().packs == 1


@pytest.mark.parametrize("request_", ["put packs", "put index", "create log", "put log"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_repair_that_was_cut_off_goes_on(team: Team, request_: str, when: str) -> None:
    a = three_pushes(team)
    flip(team, pack_of_task(team, "one"))
    flip(team, entry_name(1))
    flip(team, index_of(team, 2))
    getattr(team.place, when)[request_] = [no_connection]
    with pytest.raises(PlaceError):
        a.repair()
    a.repair()
    assert a.verify().ok and team.clone().contents() == a.contents()
    a.gc()
    assert len(packs(team)) == 3 and team.clone().contents() == a.contents()


def test_all_places_are_verified_and_mended(place: Place, tmp_path: Path) -> None:
    team = Team(tmp_path / "team", place)
    a = three_pushes(team)
    assert a.verify().ok
    name = packs(team)[0]
    data = place.get(name, 1 << 20)
    place.delete(name)
    place.put(name, data[:-1] + bytes([data[-1] ^ 1]))
    assert [fault.what for fault in a.verify().faults] == [name]
    place.delete(packs(team)[1])
    place.delete(entry_name(3))
    assert len(a.verify().faults) == 3
    assert not a.repair().missing
    assert a.verify().ok and team.clone().contents() == a.contents()
    team.close()
