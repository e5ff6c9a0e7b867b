"""The store against a plain dict, whatever is done to it in whatever order."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pear_store import NotFoundError, Store, TaggedError, Task, rebuild, verify
from pear_store.local.add import Added
from tests.helpers.makers import floats, small_task

pytestmark = pytest.mark.slow

NAMES = st.sampled_from(["a", "a.b", "B", "c-1"])


class StoreMachine(RuleBasedStateMachine):
    """The model: task -> {version: content}, and the highest number each task ever had."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())

    @initialize()
    def start(self) -> None:
        self.store = Store.create(self.folder / "s")
        self.model: dict[str, dict[int, tuple[int, int]]] = {}
        self.highest: dict[str, int] = {}
        self.tags: dict[str, int] = {}

    @staticmethod
    def task(name: str, content: tuple[int, int]) -> Task:
        return small_task(name, seed=content[0], head__bias=floats([content[1], 0.0]))

    @rule(names=st.lists(NAMES, min_size=1, max_size=4), seed=st.integers(0, 3), bias=st.integers(0, 1))
    def add(self, names: list[str], seed: int, bias: int) -> None:
        results = list(self.store.add_many([self.task(name, (seed, bias)) for name in names]))
        for name, result in zip(names, results, strict=True):
            versions = self.model.setdefault(name, {})
            changed = not versions or versions[max(versions)] != (seed, bias)
            assert isinstance(result, Added)
            assert result.changed == changed
            if changed:
                self.highest[name] = self.highest.get(name, 0) + 1
                versions[self.highest[name]] = (seed, bias)
            assert result.version == max(versions)

    @rule(name=NAMES, pick=st.integers(0, 5))
    def remove(self, name: str, pick: int) -> None:
        versions = self.model.get(name, {})
        if not versions:
            try:
                self.store.remove(name)
            except NotFoundError:
                return
            raise AssertionError("removed what is not there")
        number = sorted(versions)[pick % len(versions)]
        doomed = set(versions) if pick == 0 else {number}
        if self.tags.get(name) in doomed:
            try:
                self.store.remove(name if pick == 0 else f"{name}@{number}")
            except TaggedError:
                return
            raise AssertionError("removed a tagged version")
        self.store.remove(name if pick == 0 else f"{name}@{number}")
        for number in doomed:
            del versions[number]

    @rule(name=NAMES, pick=st.integers(0, 5))
    def tag(self, name: str, pick: int) -> None:
        versions = self.model.get(name, {})
        if pick == 0 and name in self.tags:
            self.store.untag(f"{name}@prod")
            del self.tags[name]
        elif versions:
            self.tags[name] = sorted(versions)[pick % len(versions)]
            self.store.tag(f"{name}@{self.tags[name]}", "prod")

    @rule(keep=st.integers(1, 3))
    def keep(self, keep: int) -> None:
        expected = 0
        for name, versions in self.model.items():
            for number in sorted(versions)[:-keep]:
                if self.tags.get(name) != number:
                    del versions[number]
                    expected += 1
        assert self.store.gc(keep=keep).removed_versions == expected

    @rule()
    def rebuild(self) -> None:
        assert rebuild(self.folder / "s").problems == []

    @rule()
    def verify(self) -> None:
        assert verify(self.folder / "s").ok

    @rule(repack_all=st.booleans())
    def gc(self, repack_all: bool) -> None:
        plan = self.store.gc(dry_run=True, repack_all=repack_all)
        done = self.store.gc(repack_all=repack_all)
        assert {**vars(plan), "dry_run": False} == vars(done)
        needed = {
            tensor.digest: tensor.size_bytes
            for name, versions in self.model.items()
            for content in versions.values()
            for tensor in self.task(name, content).tensors.values()
        }
        assert (done.kept_tensors, done.kept_bytes) == (len(needed), sum(needed.values()))
        assert self.store.stats().tensors == len(needed)
        if repack_all:
            assert done.dead_bytes == 0
            assert len(list((self.folder / "s" / "packs").rglob("*.safetensors"))) <= 1

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = Store(self.folder / "s")

    @invariant()
    def everything_is_there(self) -> None:
        held = {(v.task, v.version) for v in self.store.versions()}
        assert held == {(name, number) for name, versions in self.model.items() for number in versions}
        assert {v.task: v.version for v in self.store.versions() if v.tags} == self.tags
        assert {v.task: v.version for v in self.store.tasks()} == {n: max(v) for n, v in self.model.items() if v}
        for name, versions in self.model.items():
            for number, content in versions.items():
                task = self.store.get(f"{name}@{number}")
                expected = {t.digest: t.data for t in self.task(name, content).tensors.values()}
                assert {t.digest: t.data for t in task.tensors.values()} == expected

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)


StoreMachine.TestCase.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
TestStoreAgainstADict = StoreMachine.TestCase
