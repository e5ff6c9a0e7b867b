"""A remote read through a cache: what is fetched and when, what is kept, what becomes of damage and outages."""

import copy
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from pear_store import Store, Task, verify
from pear_store.errors import CheckpointError, DamagedRemoteError, NotFoundError, PearStoreError, PlaceError
from pear_store.format.manifest import to_manifest
from pear_store.local import sync
from pear_store.local.loading import Loaded, load_groups
from pear_store.local.packs import write_pack
from pear_store.local.sync import Incoming, receive
from pear_store.remote import lazy
from pear_store.remote.cache import Cache, CacheSettings
from pear_store.remote.lazy import RemoteStore
from pear_store.remote.log import SETTINGS_NAME, encode_settings
from pear_store.remote.memory import MemoryPlace
from pear_store.remote.place import Place
from pear_store.remote.remotes import Remote, add_remote, init_remote
from tests.helpers.makers import floats, small_task
from tests.pear_store.remote.faults import Client, StalledPlace, Team, no_connection
from tests.pear_store.test_cli import run

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("PEAR_REMOTE_KILLS", "8"))
URL = "memory://team"
Opener = Callable[..., RemoteStore]


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> dict[str, Place]:
    """Places by URL, as `Store.open` finds them."""
    made: dict[str, Place] = {}
    monkeypatch.setattr(lazy, "open_place", lambda url, options=None: made[url])
    return made


@pytest.fixture
def client(team: Team, places: dict[str, Place]) -> Client:
    """A store with three tasks, one of them in two versions and tagged, which were pushed."""
    places[URL] = team.place
    made = team.client()
    for number, name in enumerate(("dtd", "flowers", "svhn")):
        made.store.add(small_task(name, seed=number))
    made.store.add(small_task("dtd", seed=7))
    made.store.tag("dtd@1", "prod")
    made.push()
    team.place.asked.clear()
    return made


@pytest.fixture
def opener(tmp_path: Path) -> Iterator[Opener]:
    """Opens the remote; of the same folder unless another is named."""
    opened: list[RemoteStore] = []

    def make(url: str = URL, **settings: Any) -> RemoteStore:
        chosen = CacheSettings(**{"folder": tmp_path / "cache", "ttl_s": 1000.0, "timeout_s": 20.0, **settings})
        opened.append(RemoteStore(url, {}, chosen))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


def same(found: Task, expected: Task) -> bool:
    """Whether both are the same to the bit."""
    return to_manifest(found) == to_manifest(expected) and {
        digest: bytes(tensor.data) for digest, tensor in found.tensors.items()
    } == {tensor.digest: bytes(tensor.data) for tensor in expected.tensors.values()}


def test_what_is_read_is_what_was_pushed(client: Client, opener: Opener) -> None:
    with opener() as store:
        assert store.versions() == client.store.versions()
        assert store.versions("dtd") == client.store.versions("dtd")
        assert store.tasks() == client.store.tasks()
        assert store.tags() == client.store.tags() == {"dtd": {"prod": 1}}
        for reference in ("dtd", "dtd@1", "dtd@prod", "dtd@2", "flowers", "svhn"):
            assert store.resolve(reference) == client.store.resolve(reference)
            assert same(store.get(reference), client.store.get(reference))
            assert store.record(reference) == client.store.record(reference) == store.get(reference).record
        assert store.diff("dtd@1", "dtd") == client.store.diff("dtd@1", "dtd")
        store._flights.finish(20)  # what was handed out is kept
        stats = store.stats()
        assert (stats.tasks, stats.versions, stats.cached_versions) == (3, 4, 4)
    with pytest.raises(PearStoreError, match="was closed"):
        store.get("dtd")


def test_errors_of_names_are_those_of_a_store(client: Client, opener: Opener) -> None:
    with opener() as store:
        for reference in ("nobody", "dtd@9", "dtd@other", "no name!", "nobody@1", "dtd@0"):
            with pytest.raises(NotFoundError) as expected:
                client.store.resolve(reference)
            for ask in (store.resolve, store.get, store.record):
                with pytest.raises(NotFoundError) as found:
                    ask(reference)
                here, there = str(client.store.path), "memory://"
                assert str(found.value) == str(expected.value).replace(here, there)
        with pytest.raises(NotFoundError, match="no task 'nobody' in memory://"):
            store.versions("nobody")


def test_copies_are_the_callers_own(client: Client, opener: Opener) -> None:
    store = opener()
    for _ in range(2):  # fetched, then cached
        mine = store.get("dtd")
        for tensor in mine.tensors.values():
            memoryview(tensor.data)[:] = bytes(tensor.size_bytes)
        assert same(store.get("dtd", copy=False), client.store.get("dtd"))


def test_a_cold_task_costs_one_request_and_three_if_the_log_is_due(client: Client, opener: Opener, team: Team) -> None:
    opener().tasks()
    store = opener()
    team.place.asked.clear()
    store.tasks()
    assert team.place.asked == {"get log": 2}  # the last entry that is known, and the next
    team.place.asked.clear()
    store.get("dtd")
    assert team.place.asked == {"get_ranges packs": 1}
    store.close()
    store = opener(ttl_s=0.0)
    team.place.asked.clear()
    store.get("svhn")
    assert team.place.asked == {"get log": 2, "get_ranges packs": 1}
    team.place.asked.clear()
    store.get("svhn")
    assert team.place.asked == {"get log": 2}
    team.place.asked.clear()
    store.get("dtd@2")  # a version by its number is not asked for
    assert not team.place.asked


def test_lists_and_records_fetch_no_task(client: Client, opener: Opener, team: Team) -> None:
    store = opener()
    store.tasks(), store.versions(), store.tags(), store.record("dtd"), store.resolve("dtd"), store.stats()
    assert not team.place.asked["get_ranges packs"]


def test_what_tasks_share_is_read_once(team: Team, places: dict[str, Place], opener: Opener) -> None:
    places[URL] = team.place
    client = team.client()
    for number in range(3):
        client.store.add(small_task(f"t{number}", head__bias=floats([number, number])))
    client.push()
    store = opener()
    store.get("t0")
    team.place.read_bytes = 0
    store.close()  # it is on disk now
    store = opener()
    assert same(store.get("t1"), client.store.get("t1"))
    assert team.place.read_bytes == 8


# ---- many who ask


def test_many_threads_make_one_fetch(client: Client, opener: Opener, team: Team) -> None:
    store = opener()
    team.place.before["get_ranges packs"] = [lambda: time.sleep(0.3)]
    began = threading.Barrier(16)

    def ask(number: int) -> Task:
        began.wait()
        return store.get("dtd", copy=number % 2 == 0)

    with ThreadPoolExecutor(16) as pool:
        assert all(same(task, client.store.get("dtd")) for task in pool.map(ask, range(16)))
    assert team.place.asked["get_ranges packs"] == 1


@pytest.fixture
def directory(tmp_path: Path) -> str:
    """The URL of a remote in a directory, with t0 to t19, which share three of four tensors in pairs."""
    (tmp_path / "remote").mkdir()
    with Store.create(tmp_path / "pushed") as store:
        for number in range(20):
            store.add(small_task(f"t{number}", seed=number))
        init_remote(str(tmp_path / "remote"))
        add_remote(store.path, Remote("origin", str(tmp_path / "remote")))
        store.push()
    return f"file://{tmp_path / 'remote'}"


def start(verb: str, url: str, cache: Path, limit: int, seed: int) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "tests.pear_store.remote.lazy_worker",
        verb,
        url,
        str(cache),
        str(limit),
        str(seed),
    ]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def finish(process: subprocess.Popen[str]) -> list[str]:
    lines = process.communicate()[0].splitlines()
    return lines


def test_many_processes_make_one_fetch(directory: str, tmp_path: Path) -> None:
    processes = [start("once", directory, tmp_path / "cache", 1 << 30, 0) for _ in range(3)]
    assert [answer(process) for process in processes] == ["ready\n"] * 3
    for process in processes:
        go(process)
    assert sorted(finish(process) for process in processes) == [["reads 0"], ["reads 0"], ["reads 1"]]


@pytest.mark.slow
def test_kill_9_among_processes_that_fetch_and_evict(directory: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    chosen = random.Random(1)
    processes: list[subprocess.Popen[str]] = []
    read = 0
    for number in range(KILLS):
        while len(processes) < 3:
            processes.append(start("loop", directory, cache, 12_000, number * 10 + len(processes)))
            assert answer(processes[-1]) == "ready\n"
            go(processes[-1])
        time.sleep(chosen.random() * 0.6)
        victim = processes.pop(chosen.randrange(3))
        victim.kill()
        lines = finish(victim)
        assert not [line for line in lines if not line.startswith("read")]
        read += len(lines)
    for process in processes:
        process.kill()
        assert not [line for line in finish(process) if not line.startswith("read")]
    assert read > KILLS
    with RemoteStore(directory, {}, CacheSettings(cache, 12_000)) as store:
        for number in range(20):
            assert same(store.get(f"t{number}"), small_task(f"t{number}", seed=number))
        folder = store.cache_folder
    assert verify(folder / "store").ok


# ---- what is new


def test_new_versions_appear_when_the_log_is_asked_again(client: Client, opener: Opener, team: Team) -> None:
    patient, eager = opener(), opener(ttl_s=0.0)
    assert patient.resolve("dtd").version == eager.resolve("dtd").version == 2
    client.store.add(small_task("dtd", seed=8))
    client.store.tag("dtd@3", "prod")
    client.store.remove("svhn")
    client.push()
    assert (patient.resolve("dtd").version, patient.resolve("dtd@prod").version) == (2, 1)
    assert (eager.resolve("dtd").version, eager.resolve("dtd@prod").version) == (3, 3)
    patient.refresh()
    assert (patient.resolve("dtd").version, patient.resolve("dtd@prod").version) == (3, 3)
    assert same(patient.get("dtd"), client.store.get("dtd@3"))
    with pytest.raises(NotFoundError):
        patient.get("svhn")


def test_that_there_is_no_such_task_is_kept_for_a_while(client: Client, opener: Opener, team: Team) -> None:
    store = opener()
    store.tasks()
    asked = team.place.asked.total()
    for _ in range(3):
        with pytest.raises(NotFoundError):
            store.get("nobody")
        with pytest.raises(NotFoundError):
            store.get("dtd@5")
    assert team.place.asked.total() == asked
    client.store.add(small_task("nobody"))
    client.push()
    with pytest.raises(NotFoundError):
        store.get("nobody")
    store.refresh()
    assert same(store.get("nobody"), small_task("nobody"))


# ---- outages


def test_without_a_network_what_is_cached_is_served(client: Client, opener: Opener, team: Team) -> None:
    with opener() as store:
        store.get("dtd")
    team.place.rate = 2.0  # every request fails
    store = opener(ttl_s=0.0)
    with pytest.warns(UserWarning, match="what was known before is used") as warned:
        for _ in range(3):
            assert same(store.get("dtd"), client.store.get("dtd"))
            assert store.resolve("dtd@prod").version == 1
            assert [version.task for version in store.iter_tasks()] == ["dtd", "flowers", "svhn"]
    assert len(warned) == 1
    with pytest.raises(PlaceError, match="svhn@1 is not cached, and cannot be fetched: a fault"):
        store.get("svhn@1")
    with pytest.raises(PlaceError):
        store.refresh()
    asked = team.place.asked.total()
    with pytest.raises(PlaceError, match="svhn@1 is not cached"):  # known just now
        store.get("svhn")
    assert team.place.asked.total() == asked
    team.place.rate = 0.0
    client.store.add(small_task("dtd", seed=8))
    client.push()
    store.refresh()
    assert store.resolve("dtd").version == 3


def test_a_remote_that_was_never_reached_is_an_error(client: Client, opener: Opener, team: Team) -> None:
    team.place.rate = 2.0
    with pytest.raises(PlaceError):
        opener()
    team.place.rate = 0.0
    store = opener()
    team.place.rate = 2.0
    with pytest.raises(PlaceError):
        store.get("dtd")


def test_a_log_that_is_another_one_is_said_and_not_taken(client: Client, opener: Opener, team: Team) -> None:
    assert isinstance(team.medium, MemoryPlace)
    with opener() as store:
        assert store.resolve("dtd").version == 2
    team.medium.objects[team.log()[-1]] = team.medium.objects[team.log()[-1]].replace(b'"host"', b' "host"')
    store = opener(ttl_s=0.0)
    with pytest.warns(UserWarning, match="not the one that this store knows"):
        assert store.resolve("dtd").version == 2


def test_a_remote_that_was_made_anew_has_a_cache_of_its_own(client: Client, opener: Opener, team: Team) -> None:
    assert isinstance(team.medium, MemoryPlace)
    with opener() as store:
        store.get("dtd")
    team.medium.objects.clear()
    team.medium.create(SETTINGS_NAME, encode_settings("1" * 32))
    other = team.client("other")
    other.store.add(small_task("dtd", seed=50))
    other.push()
    assert same(opener().get("dtd"), small_task("dtd", seed=50))


def test_a_stalled_task_fails_in_bounded_time_and_no_other(
    team: Team, places: dict[str, Place], opener: Opener
) -> None:
    client = team.client()
    packs: list[set[str]] = [set()]
    for number, name in enumerate(("slow", "other")):
        client.store.add(small_task(name, seed=number))
        client.push()
        packs.append(set(team.medium.list("packs/")))
    slow = packs[1]
    places[URL] = place = StalledPlace(team.medium, slow.__contains__)
    store = opener(timeout_s=0.5)
    began = time.monotonic()
    with pytest.raises(PlaceError, match=r"slow@1 is not cached, and did not come within 0\.5 s"):
        store.get("slow")
    assert same(store.get("other"), client.store.get("other"))
    with pytest.raises(PlaceError, match="did not come"):  # at once
        store.get("slow")
    assert time.monotonic() - began < 15
    place.go.set()
    for _ in range(500):  # it goes on without those who asked
        if store.stats().cached_versions == 2:
            break
        time.sleep(0.02)
    assert same(store.get("slow"), client.store.get("slow"))
    assert place.asked["get_ranges packs"] == 2


def test_connections_are_used_again(
    team: Team, tmp_path: Path, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fetch is a thread of its own, and a connection of a web server belongs to a thread."""
    from pear_store.remote.directory import DirectoryPlace
    from pear_store.remote.web import WebPlace

    (tmp_path / "served").mkdir()
    shared = Team(tmp_path / "pushers", DirectoryPlace(tmp_path / "served"))
    client = shared.client()
    for number in range(30):
        client.store.add(small_task(f"t{number}", seed=number))
    client.push()
    made: list[WebPlace] = []

    def open_web(url: str, options: object = None) -> Place:
        made.append(WebPlace(url))
        return made[-1]

    monkeypatch.setattr(lazy, "open_place", open_web)
    with RemoteStore(serve(tmp_path / "served"), {}, CacheSettings(tmp_path / "cache")) as store:
        for number in range(30):
            assert same(store.get(f"t{number}"), client.store.get(f"t{number}"))
        transport = made[-1]._client._transport
        assert isinstance(transport, httpx.HTTPTransport)
        assert len(transport._pool.connections) < 10
    shared.close()


def test_closing_does_not_wait_for_a_stalled_remote(
    client: Client, opener: Opener, team: Team, places: dict[str, Place]
) -> None:
    places[URL] = place = StalledPlace(team.medium, lambda name: True)
    store = opener()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(store.get, "dtd")
        while not place.asked_of_stalled:
            time.sleep(0.002)
        store.close()
        with pytest.raises(PlaceError, match="was closed"):
            asked.result(15)  # less than its time limit
    place.go.set()


# ---- damage


def pack_of(cache: Path) -> Path:
    (found,) = sorted(cache.glob("*/store/packs/*/*.safetensors"))
    return found


def flip(cache: Path) -> None:
    file = pack_of(cache)
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)


def truncate(cache: Path) -> None:
    with pack_of(cache).open("r+b") as file:
        file.truncate(os.path.getsize(file.name) - 40)


def delete_pack(cache: Path) -> None:
    pack_of(cache).unlink()


def delete_index(cache: Path) -> None:
    (folder,) = cache.glob("*/store/index")
    shutil.rmtree(folder)


def garbage_index(cache: Path) -> None:
    (file,) = cache.glob("*/store/index/data.mdb")
    file.write_bytes(b"\x07" * 40_000)


def empty_index(cache: Path) -> None:
    (file,) = cache.glob("*/store/index/data.mdb")
    file.write_bytes(b"")


def delete_store(cache: Path) -> None:
    (folder,) = cache.glob("*/store")
    shutil.rmtree(folder)


def delete_all(cache: Path) -> None:
    shutil.rmtree(cache)


def no_store(cache: Path) -> None:
    delete_store(cache)
    (folder,) = cache.glob("*")
    (folder / "store").mkdir()
    (folder / "store" / "letter.txt").write_text("not a store")


def garbage_mirror(cache: Path) -> None:
    (file,) = cache.glob("*/*.mirror")
    file.write_bytes(b"\x07" * 40_000)


def damage_mirror(cache: Path) -> None:
    (file,) = cache.glob("*/*.mirror")
    data = bytearray(file.read_bytes())
    data[4096:] = bytes(len(data) - 4096)
    file.write_bytes(data)


DAMAGES = [flip, truncate, delete_pack, delete_index, garbage_index, empty_index, delete_store, no_store,
           delete_all, garbage_mirror, damage_mirror]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_fetched_again(
    client: Client, opener: Opener, team: Team, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    with opener() as store:
        store.get("dtd@2")
    damage(tmp_path / "cache")
    with opener() as store:
        assert same(store.get("dtd@2"), client.store.get("dtd@2"))
    team.place.asked.clear()
    with opener() as store:
        assert same(store.get("dtd@2"), client.store.get("dtd@2"))
        assert not team.place.asked["get_ranges packs"]
        assert store.stats().cached_versions == 1
        folder = store.cache_folder
    with Store(folder / "store") as cached:
        assert same(cached.get("dtd@2"), client.store.get("dtd@2"))
    assert sorted(path.name for path in folder.glob("damaged-*")) == []


@pytest.mark.parametrize("damage", [delete_pack, delete_index, delete_store, delete_all])
def test_what_is_deleted_under_an_open_store_is_fetched_again(
    client: Client, opener: Opener, team: Team, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    store = opener()
    held = store.get("dtd", copy=False)
    store.close()
    store = opener()
    before = store.get("dtd", copy=False)
    damage(tmp_path / "cache")
    for _ in range(2):
        assert same(store.get("dtd"), client.store.get("dtd"))
        assert same(store.get("svhn"), client.store.get("svhn"))
    assert same(held, before)
    store.close()
    store = opener()
    team.place.asked.clear()
    assert same(store.get("svhn"), client.store.get("svhn"))
    assert not team.place.asked["get_ranges packs"]


# ---- size


@pytest.fixture
def twenty(team: Team, places: dict[str, Place]) -> Client:
    """Tasks t0 to t19 of some 2 KB."""
    places[URL] = team.place
    made = team.client()
    for number in range(20):
        made.store.add(small_task(f"t{number}", seed=number))
    made.push()
    return made


def test_the_least_recently_used_are_evicted(twenty: Client, opener: Opener, team: Team) -> None:
    limit = 12_000
    store = opener(limit_bytes=limit)
    held = store.get("t1", copy=False)
    for number in range(20):
        assert same(store.get(f"t{number}"), twenty.store.get(f"t{number}"))
        store.get("t0")
        store._flights.finish(20)  # what is fetched is also kept
        assert store.stats().cached_bytes <= limit + 3_000
        assert number < 6 or store.stats().cached_versions >= 4  # it evicts what it must, and not nearly all
    assert 2 <= store.stats().cached_versions < 12
    team.place.asked.clear()
    store.get("t0")
    store.get("t19")
    assert team.place.asked.total() == 0
    assert same(store.get("t5"), twenty.store.get("t5"))
    assert team.place.asked["get_ranges packs"] == 1
    assert same(held, twenty.store.get("t1"))  # evicted, and still readable
    uses = {file.name for file in (store.cache_folder / "uses").iterdir()}
    store.close()
    with Store(store.cache_folder / "store") as cached:
        assert {f"{version.task}@{version.version}" for version in cached.versions()} <= uses
    assert verify(store.cache_folder / "store").ok


def test_maps_of_evicted_tasks_stay_readable(twenty: Client, opener: Opener) -> None:
    with opener(limit_bytes=1 << 30) as store:
        for number in range(20):
            store.get(f"t{number}")
    store = opener(limit_bytes=5_000)
    held = [store.get(f"t{number}", copy=False) for number in range(19)]  # maps of the cache
    twenty.store.add(small_task("new", seed=99))
    twenty.push()
    store.refresh()
    store.get("new")
    store._flights.finish(20)
    assert store.stats().cached_versions < 5
    assert all(same(task, twenty.store.get(f"t{number}")) for number, task in enumerate(held))


def test_a_task_larger_than_the_limit_is_served(twenty: Client, opener: Opener) -> None:
    store = opener(limit_bytes=100)
    for number in (1, 2, 1):
        assert same(store.get(f"t{number}"), twenty.store.get(f"t{number}"))
    store._flights.finish(20)
    assert store.stats().cached_versions <= 2


@pytest.mark.parametrize("text", ["0", "many", "-1", "1.5", "9" * 5000])
def test_a_size_that_is_none_is_one_line(
    client: Client, opener: Opener, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("PEAR_CACHE_BYTES", text)
    with pytest.raises(PearStoreError, match="size of the cache '.*': expected a number of bytes"):
        opener()


def test_a_cache_that_cannot_be_there_is_a_temporary_one(
    client: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PEAR_CACHE_DIR", str(tmp_path / ("x" * 300)))
    with pytest.warns(UserWarning, match="a temporary one is used"), Store.open(URL) as store:
        assert store.get("dtd").name == "dtd"


def test_where_the_cache_is(client: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PEAR_CACHE_DIR", str(tmp_path / "mine"))
    with Store.open(URL) as store:
        store.get("dtd")
        assert isinstance(store, RemoteStore)
        assert store.cache_folder == tmp_path / "mine" / ("0" * 32)
    monkeypatch.delenv("PEAR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    with Store.open(URL) as store:
        assert isinstance(store, RemoteStore)
        assert store.cache_folder.is_relative_to(tmp_path / "home" / "pear")


# ---- disks


def test_a_cache_that_cannot_be_written_is_said_and_does_without(
    client: Client, opener: Opener, small_disk: Path
) -> None:
    with opener(folder=small_disk / "cache") as store:
        store.get("dtd")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.warns(UserWarning, match="the cache cannot be written .*a temporary one is used"):
        store = opener(folder=small_disk / "cache")
    assert same(store.get("dtd"), client.store.get("dtd"))
    folder = store.cache_folder
    assert folder.is_dir()
    store.close()
    assert not folder.exists()


def big(number: int) -> Task:
    return small_task(
        f"big{number}", seed=number, a0__down=floats([[number, 1.0]] * 20_000), a0__up=floats([[1.0] * 9] * 2)
    )


def test_a_full_disk_is_said_and_tasks_are_served(
    team: Team, places: dict[str, Place], opener: Opener, small_disk: Path
) -> None:
    places[URL] = team.place
    client = team.client()
    for number in range(8):
        client.store.add(big(number))  # 160 KB each, on 1 MiB
    client.push()
    store = opener(folder=small_disk / "cache")
    with pytest.warns(
        UserWarning, match="cannot be written, so tasks are read from the remote each time: .*no space"
    ) as warned:
        for _ in range(2):
            for number in range(8):
                assert same(store.get(f"big{number}"), client.store.get(f"big{number}"))
                store._flights.finish(20)
    assert len(warned) == 1


# ---- what a stranger's remote may do


def test_bytes_that_are_not_what_the_log_says_are_never_handed_out(client: Client, opener: Opener, team: Team) -> None:
    assert isinstance(team.medium, MemoryPlace)
    (pack,) = team.medium.list("packs/")
    good = team.medium.objects[pack]
    team.medium.objects[pack] = good[:600] + bytes(len(good) - 600)
    store = opener()
    for _ in range(2):
        with pytest.raises(DamagedRemoteError):
            store.get("dtd")
    assert team.place.asked["get_ranges packs"] == 1  # it was tried just now
    assert store.stats().cached_versions == 0
    team.medium.objects[pack] = good
    store.close()
    assert same(opener().get("dtd"), client.store.get("dtd"))


def test_a_manifest_of_another_task_is_refused(client: Client, opener: Opener, team: Team) -> None:
    from pear_store.remote.log import LoggedVersion, LogIndex
    from pear_store.remote.mirror import opened_mirror
    from tests.pear_store.remote.test_mirror import append

    assert isinstance(team.medium, MemoryPlace)
    with opened_mirror(client.folder / "mirror", "x") as mirror:
        manifest = mirror.versions("dtd")[0].manifest
    append(team.medium, LogIndex(versions=[LoggedVersion("liar", 1, 5, manifest)]))
    store = opener()
    with pytest.raises(CheckpointError, match="its manifest is of task 'dtd'"):
        store.get("liar")
    with pytest.raises(DamagedRemoteError, match="of another task"):
        store.record("liar")
    assert same(store.get("dtd"), client.store.get("dtd"))


def test_a_stranger_who_claims_another_remotes_id_changes_nothing_there(
    client: Client, opener: Opener, team: Team, places: dict[str, Place], tmp_path: Path
) -> None:
    """It may go on from a copy of the other's log."""
    assert isinstance(team.medium, MemoryPlace)
    with opener() as store:
        assert store.resolve("dtd").version == 2
    stranger = MemoryPlace("memory://stranger")
    stranger.objects = dict(team.medium.objects)
    places["memory://stranger"] = stranger
    evil = Team(tmp_path / "evil", stranger).client()
    evil.pull()
    evil.store.add(small_task("dtd", seed=666))
    evil.push()
    with opener("memory://stranger") as theirs:
        assert same(theirs.get("dtd"), small_task("dtd", seed=666))
        assert theirs.cache_folder == store.cache_folder
    evil.store.close()
    client.store.add(small_task("dtd", seed=9))  # a third version there, too
    client.push()
    for _ in range(2):
        ours = opener(ttl_s=0.0)
        assert same(ours.get("dtd"), client.store.get("dtd"))
        ours.close()


# ---- a store like others


def test_what_would_change_it_says_to_clone(client: Client, opener: Opener) -> None:
    store = opener()
    for act in (
        partial(store.add, small_task()), partial(store.tag, "dtd", "x"), partial(store.untag, "dtd@prod"),
        partial(store.remove, "dtd"), store.gc, store.push, store.pull,
    ):  # fmt: skip
        with pytest.raises(PearStoreError, match="a remote is only read; to change it, clone it"):
            act()
    with pytest.raises(PearStoreError, match="expected a store's directory, found a URL"):
        Store("s3://user:secret@bucket/store")


def test_a_directory_opens_as_a_store(tmp_path: Path) -> None:
    Store.create(tmp_path / "s").close()
    with Store.open(tmp_path / "s") as store:
        assert isinstance(store, Store) and store.where == str(tmp_path / "s")
        store.refresh()
        store.prefetch(["dtd"])


def test_it_goes_to_another_process(directory: str, tmp_path: Path) -> None:
    with RemoteStore(directory, {}, CacheSettings(tmp_path / "cache")) as store:
        assert pickle.dumps(store)
        again = copy.deepcopy(store)  # made of what the pickle holds
        with again:
            assert same(again.get("t3"), small_task("t3", seed=3))
        child = os.fork()
        if not child:
            good = same(store.get("t3"), small_task("t3", seed=3)) and same(store.get("t4"), small_task("t4", seed=4))
            os._exit(0 if good else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert same(store.get("t5"), small_task("t5", seed=5))


def test_tasks_that_will_be_asked_for_come_ahead(client: Client, opener: Opener, team: Team) -> None:
    store = opener()
    store.prefetch(["dtd", "svhn", "nobody", "no name!"])
    for _ in range(500):
        if store.stats().cached_versions == 2:
            break
        time.sleep(0.02)
    asked = team.place.asked["get_ranges packs"]
    store.get("dtd"), store.get("svhn")
    assert team.place.asked["get_ranges packs"] == asked


def test_commands_that_read(directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEAR_CACHE_DIR", str(tmp_path / "cache"))
    there = ("--store", directory)
    here = ("--store", str(tmp_path / "pushed"))
    for command in (("ls",), ("ls", "--all"), ("log", "t3"), ("diff", "t3", "t4")):
        assert run(*there, *command, "--json").stdout == run(*here, *command, "--json").stdout != ""
    shown = [json.loads(run(*where, "show", "t3", "--json").stdout) for where in (there, here)]
    assert [row.pop("sharing") is None for row in shown] == [True, False]  # it would take the whole log
    assert shown[0] == shown[1]
    assert run(*there, "export", "t3", tmp_path / "t3.safetensors").exit_code == 0
    assert (tmp_path / "t3.safetensors").stat().st_size > 100
    assert json.loads(run(*there, "stats", "--json").stdout)["cached_versions"] == 2
    assert "cached versions" in run(*there, "stats").stdout
    changing = (("add", str(tmp_path / "t3.safetensors")), ("rm", "t3", "--yes"), ("gc",), ("verify",), ("push",))
    for change in changing:
        refused = run(*there, *change)
        assert refused.exit_code == 1 and "found a URL; clone the remote" in refused.stderr
    assert run("--store", f"file://{tmp_path}/nowhere", "ls").exit_code == 12


def test_a_version_that_was_removed_costs_the_cache_nothing(client: Client, opener: Opener) -> None:
    client.store.add(small_task("gone", seed=77))
    client.push()
    with opener() as store:
        for name in ("dtd", "svhn"):
            store.get(name)
        store._flights.finish(20)
        assert store.resolve("gone").version == 1
        client.store.remove("gone@1")
        client.push()
        client.gc()
        with pytest.raises(NotFoundError, match="gone@1 was removed"):
            store.get("gone@1")
        assert store.stats().cached_versions == 2


def test_a_failure_that_is_told_again_holds_no_callers(client: Client, opener: Opener, team: Team) -> None:
    with opener() as store:
        store.resolve("dtd")
        team.place.before["get_ranges packs"] = [no_connection] * 50
        lengths = []
        for _ in range(4):
            with pytest.raises(PlaceError) as found:
                store.get("dtd")
            lengths.append(len(found.traceback))
        assert lengths[1] == lengths[3]
        team.place.before.clear()


def test_a_cache_is_begun_anew_when_no_one_writes_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packs of a writer would get into the new store, and its rows into the index of the old one."""
    writer, other = (Cache(tmp_path / "cache", 1 << 30) for _ in range(2))
    ((loaded,),) = load_groups([small_task()], None)
    assert isinstance(loaded, Loaded)
    writing, go_on = threading.Event(), threading.Event()
    write = write_pack

    def pause(*given: Any) -> Any:
        writing.set()
        assert go_on.wait(20)
        return write(*given)

    monkeypatch.setattr(sync, "write_pack", pause)
    with ThreadPoolExecutor(2) as pool:
        kept = pool.submit(receive, writer._opened, [Incoming(loaded, 1, 1)], {})
        assert writing.wait(20)
        begun = pool.submit(other._begin_anew, PearStoreError("as if it were damaged"), other._generation)
        with suppress(TimeoutError):
            begun.result(0.5)
        go_on.set()
        kept.result(20)
        begun.result(20)
    assert verify(other.path).ok and other.count() == 0
    writer.close()
    other.close()
