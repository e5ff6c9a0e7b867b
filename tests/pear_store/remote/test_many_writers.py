"""Several stores and one remote: in any order, with faults, at once, and killed."""

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pear_store import Store, verify
from pear_store.errors import ClashError, NotFoundError, PlaceError, TaggedError
from pear_store.remote import pull as pulling
from pear_store.remote import push as pushing
from pear_store.remote.directory import DirectoryPlace
from pear_store.remote.log import entry_name
from pear_store.remote.mirror import opened_mirror
from pear_store.remote.place import Place
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


class Remote(RuleBasedStateMachine):
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
            for reference, manifest in client.contents().items():
                if reference in self.acknowledged:
                    assert contents.get(reference, manifest) == manifest or client.pull().renumbered
            report = verify(client.store.path)
            assert report.ok, report
            client.store.gc()
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


TestRemote = Remote.TestCase
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


KILLS = int(os.environ.get("PEAR_REMOTE_KILLS", "16"))


@pytest.mark.parametrize("verb", ["push", "pull"])
def test_kill_9_loses_nothing_acknowledged(tmp_path: Path, verb: str) -> None:
    """Two stores push and are killed; or one does while another is killed as it pulls."""
    rng = random.Random(7)
    remote = tmp_path / "remote"
    remote.mkdir()
    team = Team(tmp_path / "team", DirectoryPlace(remote))
    pushed: list[str] = []

    def start(verb: str, name: str, first: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.pear_store.remote.worker", verb]
        paths = [str(tmp_path / name), str(tmp_path / f"{name}.mirror"), str(remote)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*command, *paths, str(first)], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )

    def finish(process: subprocess.Popen[str]) -> list[str]:
        process.kill()
        lines = process.communicate()[0].splitlines()
        return [line.split()[1] for line in lines if line.startswith("pushed ") and line.count("@")]

    for kill in range(KILLS // 2):
        victim = start(verb, "a", kill * 1000)
        other = start("push", "b", kill * 1000 + 500)
        for process in (victim, other):
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        time.sleep(rng.random() * 0.4)
        pushed += [*finish(victim), *finish(other)]
    check_log(team.medium)
    assert len(set(pushed)) == len(pushed), "a number was acknowledged twice"
    contents = team.clone().contents()
    assert set(pushed) <= contents.keys()
    for name in ("a", "b"):
        with Store(tmp_path / name) as store, opened_mirror(tmp_path / f"{name}.mirror", str(remote)) as mirror:
            pulling.pull(store._open, team.medium, mirror)
            pushing.push(store._open, team.medium, mirror)
            assert verify(store.path).ok
    last = team.clone().contents()
    assert contents.items() <= last.items()
    with Store(tmp_path / "a") as store, opened_mirror(tmp_path / "a.mirror", str(remote)) as mirror:
        pulling.pull(store._open, team.medium, mirror)
        assert {f"{v.task}@{v.version}" for v in store.versions()} == last.keys()
    team.close()
