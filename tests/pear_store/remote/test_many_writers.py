"""Several stores and one remote: in any order, with faults, at once, and killed."""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from itertools import chain, count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pear_store import Store, verify
from pear_store.errors import ClashError, NotFoundError, PlaceError, TaggedError
from pear_store.format.manifest import to_manifest
from pear_store.remote import pull as pulling
from pear_store.remote import push as pushing
from pear_store.remote import repair as mending
from pear_store.remote.directory import DirectoryPlace
from pear_store.remote.log import entry_name
from pear_store.remote.memory import MemoryPlace
from pear_store.remote.mirror import opened_mirror
from pear_store.remote.opening import open_place
from pear_store.remote.place import Place
from pear_store.remote.reading import read_on
from pear_store.remote.remotes import Remote
from tests.helpers.log import keep_log
from tests.helpers.makers import small_task
from tests.pear_store.remote.faults import Client, Team

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
TASKS = st.sampled_from(["a", "b"])
CLIENTS = st.integers(0, 2)
SEEDS = st.integers(0, 5)


def check_log(place: Place) -> None:
    """No entry is missing."""
    entries = sorted(place.list("log/"))
    assert entries == [entry_name(number) for number in range(1, len(entries) + 1)]


class SharedRemote(RuleBasedStateMachine):
    """Three stores share a place that fails, and that lets another store push just before an entry is created."""

    @initialize(seed=st.integers(0, 1000))
    def begin(self, seed: int) -> None:
        shared_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.folder = Path(tempfile.mkdtemp(dir=shared_memory))
        self.team = Team(self.folder)
        self.team.place._random = random.Random(seed)
        self.team.place.rate = 0.15
        for _ in range(3):
            self.team.client()
        self.acknowledged: dict[str, bytes] = {}
        """What pushes returned, and what it was"""
        self.may_be_removed: set[str] = set()

    def teardown(self) -> None:
        if not hasattr(self, "folder"):
            return
        self.team.place.rate = 0.0
        fresh = self.team.clone()
        contents = fresh.contents()
        for reference, manifest in self.acknowledged.items():
            is_gone = reference in self.may_be_removed and reference not in contents
            assert is_gone or contents.get(reference) == manifest
        for client in self.team.clients[:3]:
            mine = {one: manifest for one, manifest in client.contents().items() if one in self.acknowledged}
            if any(contents.get(reference, manifest) != manifest for reference, manifest in mine.items()):
                assert client.pull().renumbered
            report = verify(client.store.path)
            assert report.ok, report
            client.store.gc()
        fresh.gc()
        assert fresh.verify().ok
        assert self.team.clone().contents() == contents
        self.team.close()
        shutil.rmtree(self.folder)

    @rule(client=CLIENTS, task=TASKS, seed=SEEDS)
    def add(self, client: int, task: str, seed: int) -> None:
        self.team.clients[client].store.add(small_task(task, seed=seed))

    @rule(client=CLIENTS, task=TASKS, number=st.integers(1, 4))
    def remove(self, client: int, task: str, number: int) -> None:
        try:
            self.team.clients[client].store.remove(f"{task}@{number}")
            self.may_be_removed.add(f"{task}@{number}")
        except (NotFoundError, TaggedError):
            pass

    @rule(client=CLIENTS, task=TASKS, number=st.integers(1, 4))
    def tag(self, client: int, task: str, number: int) -> None:
        with suppress(NotFoundError):
            self.team.clients[client].store.tag(f"{task}@{number}", "prod")

    @rule(client=CLIENTS)
    def gc(self, client: int) -> None:
        self.team.clients[client].store.gc(repack_all=True)

    @rule(client=CLIENTS, other=CLIENTS)
    def push(self, client: int, other: int) -> None:
        def meanwhile() -> None:
            if other != client:
                self._push(self.team.clients[other])

        self.team.place.before["create log"] = [meanwhile]
        self._push(self.team.clients[client])
        self.team.place.before.clear()

    def _push(self, client: Client) -> None:
        before = client.contents()
        try:
            for task, number in client.push().versions:
                reference = f"{task}@{number}"
                assert reference not in self.acknowledged, "a number was used twice"
                self.acknowledged[reference] = before[reference]
        except (ClashError, PlaceError):
            pass

    @rule(client=CLIENTS, keep=st.sampled_from([None, None, 1, 2]), other=CLIENTS)
    def remote_gc(self, client: int, keep: int | None, other: int) -> None:
        """Which drops and deletes at once what it may, also while another one pushes."""
        if other != client:
            self.team.place.before["create log"] = [lambda: self._push(self.team.clients[other])]
        with suppress(PlaceError):
            self.team.clients[client].gc(keep)
        self.team.place.before.clear()
        if keep is not None:  # whatever it said: an answer may be lost
            self.team.place.rate, rate = 0.0, self.team.place.rate
            with opened_mirror(None, "remote") as mirror:
                read_on(mirror, self.team.medium)
                self.may_be_removed |= {f"{version.task}@{version.number}" for version in mirror.removed()}
            self.team.place.rate = rate

    @rule(client=CLIENTS, other=CLIENTS)
    def push_while_a_gc_runs(self, client: int, other: int) -> None:
        def meanwhile() -> None:
            with suppress(PlaceError):
                self.team.clients[other].gc()

        self.team.place.before["create log"] = [meanwhile]
        self._push(self.team.clients[client])
        self.team.place.before.clear()

    @rule(client=CLIENTS, other=CLIENTS)
    def pull_while_a_gc_runs(self, client: int, other: int) -> None:
        def meanwhile() -> None:
            with suppress(PlaceError):
                self.team.clients[other].gc()

        self.team.place.before["get_ranges packs"] = [meanwhile]
        with suppress(PlaceError):
            self.team.clients[client].pull()
        self.team.place.before.clear()

    @rule(client=CLIENTS)
    def verify(self, client: int) -> None:
        try:
            report = self.team.clients[client].verify()
        except PlaceError:
            return
        assert report.ok, report

    @rule(client=CLIENTS, seed=SEEDS, how=st.sampled_from(["flip", "delete"]))
    def damage_and_repair(self, client: int, seed: int, how: str) -> None:
        """Some object is damaged; the stores that have good copies mend it, before anybody else looks."""
        self.team.place.rate, rate = 0.0, self.team.place.rate
        healer = self.team.client(f"healer{len(self.team.clients)}")
        healer.pull()
        assert isinstance(self.team.medium, MemoryPlace)
        objects = self.team.medium.objects
        names = sorted(name for name in objects if name.split("/")[0] in ("packs", "log", "index"))
        if names:
            name = names[seed * 7 % len(names)]
            if how == "delete":
                del objects[name]
            else:
                data = bytearray(objects[name])
                data[seed * 13 % len(data)] ^= 4
                objects[name] = bytes(data)
            self.team.place.rate = rate
            with suppress(PlaceError):
                healer.repair()
            self.team.place.rate = 0.0
            assert not healer.repair().missing
            assert healer.verify().ok
        self.team.place.rate = rate

    @rule(client=CLIENTS)
    def pull(self, client: int) -> None:
        try:
            self.team.clients[client].pull()
        except PlaceError:
            return
        self.team.place.rate, rate = 0.0, self.team.place.rate
        found = self.team.clients[client].pull()
        assert not found.versions and not found.renumbered, "it had all"
        self.team.place.rate = rate

    @invariant()
    def no_gap(self) -> None:
        if hasattr(self, "team"):
            check_log(self.team.medium)


TestRemote = SharedRemote.TestCase
TestRemote.settings = settings(
    max_examples=int(os.environ.get("PEAR_REMOTE_EXAMPLES", "8")),
    stateful_step_count=25,
    suppress_health_check=list(HealthCheck),
)


def test_pushers_at_once_lose_nothing(tmp_path: Path) -> None:
    (tmp_path / "remote").mkdir()
    team = Team(tmp_path / "team", DirectoryPlace(tmp_path / "remote"))
    team.place.rate = 0.05

    def work(number: int) -> list[str]:
        client = team.clients[number]
        acknowledged = []
        for round_ in range(4):
            client.store.add(small_task(f"own{number}", seed=number * 10 + round_))
            client.store.add(small_task("shared", seed=number * 10 + round_))
            for _ in range(20):
                try:
                    acknowledged += [f"{task}@{n}" for task, n in client.push().versions]
                    break
                except ClashError:
                    client.pull()
                except PlaceError:
                    continue
        return acknowledged

    for _ in range(4):
        team.client()
    with ThreadPoolExecutor(4) as pool:
        acknowledged = list(chain.from_iterable(pool.map(work, range(4))))
    team.place.rate = 0.0
    check_log(team.medium)
    assert len(set(acknowledged)) == len(acknowledged)
    contents = team.clone().contents()
    assert set(acknowledged) <= contents.keys()
    assert len(contents) == 32
    for client in team.clients[:4]:
        client.push()
        client.pull()
        assert client.contents() == contents
        assert verify(client.store.path).ok
    team.close()


KILLS = int(os.environ.get("PEAR_REMOTE_KILLS", "8"))
"""Of processes, in each of the tests of kills"""


def kind_of(remote: Remote) -> str:
    return remote.url.partition(":")[0] if "://" in remote.url else "a directory"


def started(verb: str, folder: Path, name: str, remote: Remote, first: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.pear_store.remote.worker", verb, str(folder / name)]
    command += [str(folder / f"{name}.mirror"), remote.url, json.dumps(remote.options), str(first)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)


def killed(processes: Sequence["subprocess.Popen[str]"], after_s: float) -> list[str]:
    """Kills them, so long after all are ready. Which versions they said were pushed."""
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    time.sleep(after_s)
    lines: list[str] = []
    for process in processes:
        process.kill()
        lines += process.communicate()[0].splitlines()
    return [line.split()[1] for line in lines if line.startswith("pushed ") and line.count("@")]


@pytest.mark.parametrize("verb", ["push", "pull"])
def test_kill_9_loses_nothing_acknowledged(tmp_path: Path, reachable: Remote, verb: str) -> None:
    """Two stores push and are killed; or one does while another is killed as it pulls."""
    rng = random.Random(7)
    place = open_place(reachable.url, reachable.options)
    team = Team(tmp_path / "team", place)
    pushed: list[str] = []
    for kill in range(KILLS // 2):
        victim = started(verb, tmp_path, "a", reachable, kill * 1000)
        other = started("push", tmp_path, "b", reachable, kill * 1000 + 500)
        pushed += killed((victim, other), rng.random() * 0.4)
    check_log(team.medium)
    assert len(set(pushed)) == len(pushed), "a number was acknowledged twice"
    contents = team.clone().contents()
    assert set(pushed) <= contents.keys()
    for name in ("a", "b"):
        with Store(tmp_path / name) as store, opened_mirror(tmp_path / f"{name}.mirror", place.url) as mirror:
            pulling.pull(store._open, team.medium, mirror)
            pushing.push(store._open, team.medium, mirror)
            assert verify(store.path).ok
    last = team.clone().contents()
    assert contents.items() <= last.items()
    with Store(tmp_path / "a") as store, opened_mirror(tmp_path / "a.mirror", place.url) as mirror:
        pulling.pull(store._open, team.medium, mirror)
        assert {f"{v.task}@{v.version}" for v in store.versions()} == last.keys()
    team.close()
    place.close()
    keep_log(f"{KILLS} kills in {verb} to {kind_of(reachable)}: {len(pushed)} acknowledged, 0 lost")


def test_kill_9_of_gc_loses_nothing_acknowledged(tmp_path: Path, reachable: Remote) -> None:
    """One store pushes while another one's gc is killed, and is killed, too."""
    check_killed_upkeep(tmp_path, reachable, "gc")


@pytest.mark.parametrize("reachable", ["directory"], indirect=True)
def test_kill_9_of_repair_loses_nothing_acknowledged(tmp_path: Path, reachable: Remote) -> None:
    """So does one while another one's repair is killed."""
    check_killed_upkeep(tmp_path, reachable, "repair")


def check_killed_upkeep(tmp_path: Path, remote: Remote, verb: str) -> None:
    rng = random.Random(11)
    place = open_place(remote.url, remote.options)
    team = Team(tmp_path / "team", place)
    pushed: list[str] = []
    healer = team.client("healer")
    for kill in range(KILLS // 2):
        both = [
            started(does, tmp_path, name, remote, kill * 1000) for name, does in (("victim", verb), ("pusher", "push"))
        ]
        pushed += killed(both, 0.2 + rng.random() * 0.6)
    if verb == "repair":  # what is damaged still is mended by the two that have all
        with (
            Store(tmp_path / "victim") as victim,
            Store(tmp_path / "pusher") as pusher,
            opened_mirror(healer.folder / "mirror", place.url) as mirror,
        ):
            found = mending.repair(team.medium, mirror, [victim._open, pusher._open])
            assert not found.missing, found
    check_log(team.medium)
    assert len(set(pushed)) == len(pushed), "a number was acknowledged twice"
    fresh = team.clone()
    with opened_mirror(fresh.folder / "mirror", place.url) as mirror:
        removed = {f"{version.task}@{version.number}" for version in mirror.removed()}
    assert set(pushed) <= fresh.contents().keys() | removed
    if verb == "repair":
        assert not removed
    assert fresh.verify().ok
    fresh.gc()
    assert fresh.verify().ok and team.clone().contents() == fresh.contents()
    team.close()
    place.close()
    keep_log(f"{KILLS} kills in {verb} of {kind_of(remote)}: {len(pushed)} acknowledged, 0 lost")


SOAK_S = float(os.environ.get("PEAR_REMOTE_SOAK_S", "0"))
"""How long those of a test push, collect and clone at once; 0: until each pusher has done six rounds"""
PUSHERS, CLONERS = (8, 4) if SOAK_S else (3, 1)


@pytest.mark.parametrize("reachable", ["directory", "localbucket"], indirect=True)
def test_gcs_pushers_and_cloners_at_once_lose_nothing(tmp_path: Path, reachable: Remote) -> None:
    place = open_place(reachable.url, reachable.options)
    team = Team(tmp_path / "team", place)
    ends, begun = threading.Event(), time.monotonic()
    refused = 0

    def push(number: int) -> dict[str, bytes]:
        nonlocal refused
        client, acknowledged = team.clients[number], dict[str, bytes]()
        for round_ in count():
            if ends.is_set() or (round_ >= 6 and time.monotonic() - begun > SOAK_S):
                break
            client.store.add(small_task(f"own{number}", seed=number * 10 + round_))
            client.store.add(small_task("shared", seed=round_))  # the same tensors as others add, and remove
            if round_ % 2:
                client.store.remove(f"own{number}@{round_}")
            for _ in range(1000):
                try:
                    found = client.push().versions
                    acknowledged |= {f"{t}@{n}": to_manifest(client.store.get(f"{t}@{n}")) for t, n in found}
                    break
                except ClashError:
                    refused += 1
                    client.pull()
            else:
                raise AssertionError("refused for ever")
        return acknowledged

    def collect(number: int) -> int:
        entries = 0
        while not ends.is_set():
            entries += team.clients[number].gc().entries
        return entries

    def clone(number: int) -> int:
        clones = 0
        while not ends.is_set():
            made = team.client(f"clone{number}-{clones}")
            made.pull()
            made.contents()
            team.clients.remove(made)
            made.store.close()
            shutil.rmtree(made.folder)
            clones += 1
        return clones

    for _ in range(PUSHERS + 2):
        team.client()
    with ThreadPoolExecutor(PUSHERS + 2 + CLONERS) as pool:
        pushers = [pool.submit(push, number) for number in range(PUSHERS)]
        gcs = [pool.submit(collect, PUSHERS + number) for number in range(2)]
        cloners = [pool.submit(clone, number) for number in range(CLONERS)]
        try:
            wait(pushers, return_when=FIRST_EXCEPTION)
        finally:
            ends.set()
        pushed = [one.result() for one in pushers]
        entries, clones = (sum(one.result() for one in ones) for ones in (gcs, cloners))
    assert entries and clones
    check_log(place)
    contents = team.clone().contents()
    with opened_mirror(team.clients[-1].folder / "mirror", place.url) as mirror:
        removed = {f"{version.task}@{version.number}" for version in mirror.removed()}
    for acknowledged in pushed:
        for reference, manifest in acknowledged.items():
            assert reference in removed or contents[reference] == manifest
    assert len(set(chain.from_iterable(pushed))) == sum(map(len, pushed)), "a number was acknowledged twice"
    report = team.clients[0].verify()
    assert report.ok, report
    team.close()
    place.close()
    keep_log(
        f"{PUSHERS} pushers, 2 gcs, {CLONERS} cloners at {kind_of(reachable)}, "
        f"{time.monotonic() - begun:.0f} s: {sum(map(len, pushed))} versions acknowledged, 0 lost, {refused} pushes "
        f"refused for a clash, {entries} entries of gcs, {clones} clones"
    )
