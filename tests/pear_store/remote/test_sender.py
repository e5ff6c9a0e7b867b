"""A push sends packs while it makes the next ones; entries come one after the other, each after its packs."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from pear_store import Store
from pear_store.errors import DamagedError, PearStoreError, PlaceError
from pear_store.format.digest import Digest, RawTensor
from pear_store.remote import groups, sender
from pear_store.remote.log import MAX_INDEX_BYTES, entry_name, index_name, pack_name, parse_entry, parse_index
from pear_store.remote.memory import MemoryPlace
from pear_store.remote.place import Place
from pear_store.remote.sender import PackSender
from tests.helpers.makers import floats, small_task
from tests.pear_store.remote.faults import Client, FaultyPlace, Team, no_connection

TASKS = 12


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Team":
    """Each task has a pack of its own, and two make an entry."""
    monkeypatch.setattr(groups, "PACK_BYTES", 1)
    monkeypatch.setattr(groups, "FIRST_PACK_BYTES", 1)
    monkeypatch.setattr(groups, "GROUP_VERSIONS", 2)
    return Team(tmp_path)


def filled(team: Team) -> Client:
    client = team.client()
    for number in range(TASKS):
        client.store.add(small_task(f"t{number:02d}", seed=number))
    return client


class MeetingPlace(MemoryPlace):
    """Packs arrive only when several are under way; `meet` has waited for them."""

    def __init__(self, meet: Callable[[], object]) -> None:
        super().__init__()
        self.meet = meet

    def put(self, name: str, data: bytes) -> None:
        if name.startswith("packs/"):
            self.meet()
        super().put(name, data)


def test_packs_are_sent_at_once_also_of_two_entries(team: Team, tmp_path: Path) -> None:
    together = threading.Barrier(sender.SENDERS)
    place = MeetingPlace(lambda: together.wait(60))
    other = Team(tmp_path / "other", place)
    a = filled(other)
    pushed = a.push()  # else a barrier is broken
    assert sender.SENDERS > groups.GROUP_VERSIONS and pushed.entries == TASKS // groups.GROUP_VERSIONS
    assert other.clone().contents() == a.contents()
    other.close()


class SlowPlace(MemoryPlace):
    """Packs arrive only when an index is there, and somewhat later; each entry is looked at when it is created."""

    def __init__(self) -> None:
        super().__init__()
        self.indexed, self.entries = threading.Event(), 0

    def put(self, name: str, data: bytes) -> None:
        if name.startswith("packs/"):
            assert self.indexed.wait(60)
            time.sleep(0.02)
        super().put(name, data)
        if name.startswith("index/"):
            self.indexed.set()

    def create(self, name: str, data: bytes) -> bool:
        if name.startswith("log/"):
            self.entries += 1
            assert name == entry_name(self.entries), "one after the other"
            hashed = parse_entry(data, "place", self.entries).index
            index = parse_index(self.get(index_name(hashed), MAX_INDEX_BYTES), "place", hashed)
            assert len(index.packs) == 2 and {pack_name(pack) for pack in index.packs} <= set(self.list("packs/"))
        return super().create(name, data)


def test_an_index_goes_beside_its_packs_and_an_entry_after_them(team: Team, tmp_path: Path) -> None:
    place = SlowPlace()
    other = Team(tmp_path / "other", place)
    a = filled(other)
    assert a.push().entries == place.entries == TASKS // 2
    assert other.clone().contents() == a.contents()
    other.close()


def test_what_is_under_way_takes_bounded_memory(team: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = filled(team)
    sizes = {version.size_bytes for version in a.store.versions()}
    monkeypatch.setattr(sender, "MOST_BYTES", 2 * max(sizes))
    lock, most, now = threading.Lock(), 0, 0

    class Counting(MemoryPlace):
        def put(self, name: str, data: bytes) -> None:
            nonlocal most, now
            with lock:
                now += name.startswith("packs/")
                most = max(most, now)
            super().put(name, data)
            with lock:
                now -= name.startswith("packs/")

    other = Team(tmp_path / "other", Counting())
    client = other.client()
    for reference in a.contents():
        client.store.add(a.store.get(reference))
    assert len(client.push().versions) == TASKS
    assert 1 <= most <= 2
    other.close()


def test_a_pack_larger_than_the_bound_is_sent_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "MOST_BYTES", 4)
    place, released = MemoryPlace(), []
    with PackSender(place, lambda: released.append(1)) as packs:
        raws = [floats([float(k)] * (2 + k)) for k in range(4)]
        sent = [packs.send({raw.digest: raw}) for raw in raws]
        assert {digest for one in sent for digest in one.known()[1].places} == {raw.digest for raw in raws}
    assert len(list(place.list("packs/"))) == len(released) == 4
    assert packs.sent_bytes == sum(len(data) for data in place.objects.values())


@pytest.mark.parametrize("which", range(0, TASKS, 3))
def test_a_push_that_fails_at_any_pack_keeps_its_entries_and_goes_on(team: Team, which: int) -> None:
    a = filled(team)
    team.place.before["put packs"] = [*[lambda: None] * which, no_connection]
    with pytest.raises(PlaceError, match="no connection"):
        a.push()
    acknowledged = team.clone().contents()
    assert len(acknowledged) == 2 * len(team.log()) < TASKS
    assert acknowledged.items() <= a.contents().items()
    team.place.before.clear()
    again = a.push()
    assert len(again.versions) == TASKS - len(acknowledged)
    assert team.clone().contents() == a.contents()


def test_what_comes_before_a_damaged_tensor_is_pushed(team: Team) -> None:
    a = filled(team)
    last = a.store.get(f"t{TASKS - 1:02d}")
    shared = {raw.digest for number in range(TASKS - 1) for raw in a.store.get(f"t{number:02d}").tensors.values()}
    (own, *_) = [raw for raw in last.tensors.values() if raw.digest not in shared]
    flip(a.store.path, own)
    a.store.close()
    a.store = Store(a.folder / "store")  # which has checked nothing yet
    for _ in range(2):  # and the same again does not undo it
        with pytest.raises(DamagedError, match=f"t{TASKS - 1:02d}@1"):
            a.push()
        assert len(team.clone().contents()) == TASKS - 2


def flip(store: Path, raw: RawTensor) -> None:
    data = bytes(raw.data)
    for path in store.glob("packs/*/*.safetensors"):
        whole = path.read_bytes()
        if (at := whole.find(data)) >= 0:
            path.chmod(0o644)
            with path.open("r+b") as file:
                file.seek(at)
                file.write(bytes([data[0] ^ 1]))
            return
    raise AssertionError("no pack has it")


def test_a_gc_that_drops_packs_of_entries_to_come_has_them_sent_again(team: Team) -> None:
    """Between a push's entries, from the first to the last."""
    a, b = filled(team), team.client()
    dropped: list[int] = []

    def collect() -> None:
        before = len(list(team.medium.list("packs/")))
        b.gc()
        dropped.append(before - len(list(team.medium.list("packs/"))))

    team.place.before["create log"] = [collect if number % 2 == 0 else (lambda: None) for number in range(20)]
    a.push()
    assert sum(dropped) > 0, "a gc came when packs were under way"
    assert team.clone().contents() == a.contents()


def test_two_that_push_the_same_at_once_both_end_with_all(team: Team) -> None:
    a, b = filled(team), filled(team)
    failed: list[BaseException] = []

    def push(client: Client) -> None:
        try:
            client.push()
        except PearStoreError as error:
            failed.append(error)

    threads = [threading.Thread(target=push, args=(client,)) for client in (a, b)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed
    assert team.clone().contents() == a.contents() == b.contents()


def test_an_error_leaves_no_thread_that_sends(team: Team) -> None:
    place: Place = FaultyPlace(MemoryPlace())
    assert isinstance(place, FaultyPlace)
    place.before["put packs"] = [no_connection]
    tensors: dict[Digest, RawTensor] = {raw.digest: raw for raw in (floats([1.0]),)}
    with pytest.raises(PlaceError), PackSender(place, lambda: None) as packs:
        with suppress(PlaceError):
            packs.send(tensors).await_arrival()
        packs.send(tensors)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pear-sender")]
    assert place.asked["put packs"] == 1
