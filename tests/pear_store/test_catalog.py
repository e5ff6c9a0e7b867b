"""What packs say together is the same index, in whatever order and in however many transactions they come."""

import random
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise, permutations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pear_store.local.tags
from pear_store import DamagedError, NotFoundError, Refused, Store, TaggedError, Task, rebuild, verify
from pear_store.format.pack import PackedTag
from pear_store.local.applying import Applying
from pear_store.local.index import Index, View, open_index, release_index
from pear_store.local.packs import pack_path, read_records
from pear_store.local.verify import check_index
from tests.helpers.makers import floats, small_task

Row = dict[Any, Any]


def normal_form(view: View) -> dict[str, Row]:
    """What the rows say. Left out: numbers, which copy of a tensor is used, manifests that no version needs, and heads
    (a new index may have the next commit follow more packs than it has to)."""
    check_index(view)  # rows, numbers and contents agree
    versions = {(task, number): row for task, number, row in view.versions.every()}
    needed = {row.manifest for row in versions.values()}
    tensors: dict[int, str] = {row.number: digest for digest, row in view.tensors.rows()}
    return {
        "versions": versions,
        "names": {row.name.casefold(): row for row in view.names.every()},
        "tags": {(task, tag): row for task, tag, row in view.tags.every()},
        "removed": {(task, number): row for task, number, row in view.removed.every()},
        "packs": dict(view.packs.every()),
        "tensors": {digest: (row.dtype, row.shape, row.length) for digest, row in view.tensors.every()},
        "manifests": {
            key: (view.manifests.text(key), {tensors[number] for number in row.tensors})
            for key, row in view.manifests.every()
            if key in needed
        },
    }


MEMORY = Path("/dev/shm")


@contextmanager
def folder_in_memory() -> Iterator[Path]:
    """A folder whose syncs take no time, where the system has one."""
    with TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        yield Path(folder)


@contextmanager
def empty_index() -> Iterator[Index]:
    with folder_in_memory() as folder:
        index = open_index(folder / "index", create=True)
        try:
            yield index
        finally:
            release_index(index)


def apply_to(index: Index, path: Path, packs: Sequence[bytes]) -> None:
    """Applies packs of a store, in one transaction."""

    def change(view: View) -> None:
        applying = Applying(path, view)
        for pack in packs:
            header, records, problems = read_records(pack_path(path, pack))
            assert not problems
            applying.apply(pack, header, records)
        applying.settle()

    index.fill(change)


def apply(path: Path, batches: Iterable[Sequence[bytes]]) -> dict[str, Row]:
    """What an empty index comes to say, to which these packs of a store are applied."""
    with empty_index() as index:
        for packs in batches:
            apply_to(index, path, packs)
        with index.read() as view:
            return normal_form(view)


@dataclass
class Histories:
    """Stores that go their own ways, some of them copies of one another; and all packs that they ever had."""

    folder: Path
    stores: list[Path] = field(default_factory=list)
    now: int = 1
    """The time: it stands still unless it is moved, also backwards"""

    def __post_init__(self) -> None:
        (self.folder / "all").mkdir()
        for name in "ab":
            Store.create(self.folder / name).close()
            self.stores.append(self.folder / name)

    def do(self, what: str, which: int, number: int, content: int) -> None:
        path = self.stores[which % len(self.stores)]
        if what == "copy":
            self.stores.append(self.folder / str(len(self.stores)))
            shutil.copytree(path, self.stores[-1])
            return
        if what == "time":
            self.now = number
            return
        if what == "join":
            other = self.stores[content % len(self.stores)]
            if other != path:
                shutil.copytree(other / "packs", path / "packs", dirs_exist_ok=True)
            rebuild(path)
            self._keep(path)
            return
        with Store(path) as store, patch("time.time_ns", lambda: self.now):
            try:
                if what in ("add", "Add"):
                    name = "dtd" if what == "add" else "Svhn" if number > 1 else "svhn"
                    list(store.add_many([small_task(name, seed=content, head__bias=floats([number % 2, 0.0]))]))
                elif what == "rm":
                    store.remove(f"dtd@{number}")
                elif what == "tag":
                    store.tag(f"dtd@{number}", "prod")
                elif what == "untag":
                    store.untag("dtd@prod")
                else:
                    store.gc(repack_all=content > 1)
            except (NotFoundError, TaggedError):
                pass
        self._keep(path)

    def _keep(self, path: Path) -> None:
        shutil.copytree(path / "packs", self.folder / "all" / "packs", dirs_exist_ok=True)

    @property
    def packs(self) -> list[bytes]:
        return sorted(bytes.fromhex(file.stem) for file in (self.folder / "all").rglob("*.safetensors"))


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "Add", "rm", "tag", "untag", "gc", "copy", "time", "join"]),
        st.integers(0, 3), st.integers(1, 3), st.integers(0, 3),
    ),
    min_size=2, max_size=12,
)  # fmt: skip


def in_batches(packs: list[bytes], draw: random.Random) -> list[list[bytes]]:
    """The packs in some order and some parts."""
    packs = draw.sample(packs, len(packs))
    cuts = sorted({0, len(packs), *draw.choices(range(len(packs) + 1), k=draw.randint(0, 3))})
    return [packs[a:b] for a, b in pairwise(cuts)]


@settings(max_examples=25, deadline=None)
@given(steps=STEPS, draw=st.randoms(use_true_random=False))
def test_packs_give_the_same_index_in_any_order_and_any_batches(
    steps: list[tuple[str, int, int, int]], draw: random.Random
) -> None:
    with folder_in_memory() as folder:
        histories = Histories(folder)
        for step in steps:
            histories.do(*step)
        packs = histories.packs
        expected = apply(folder / "all", [packs])
        for batches in ([packs[::-1]], [[pack] for pack in packs], *(in_batches(packs, draw) for _ in range(3))):
            assert apply(folder / "all", batches) == expected


@settings(max_examples=25, deadline=None)
@given(steps=STEPS)
def test_an_index_says_what_its_packs_say_whatever_was_done(steps: list[tuple[str, int, int, int]]) -> None:
    """What add, remove, tag and gc enter and take out, one after another, is what the packs left give at once."""
    with folder_in_memory() as folder:
        histories = Histories(folder)
        for step in steps:
            histories.do(*step)
        for path in histories.stores:
            index = open_index(path / "index")
            with index.read() as view:
                found = normal_form(view)
            release_index(index)
            packs = sorted(bytes.fromhex(file.stem) for file in (path / "packs").rglob("*.safetensors"))
            expected = apply(path, [packs])
            removed, recorded = found.pop("removed"), expected.pop("removed")
            for rows in (found, expected):  # several packs may record a task's highest number
                rows["names"] = {key: row[:3] for key, row in rows["names"].items()}
            assert found == expected
            assert removed.keys() <= recorded.keys()  # gc forgets what no file can bring back


def added_at(path: Path, now: int, *tasks: Task) -> None:
    """Adds tasks in one commit, at a time."""
    with Store(path) as store, patch("time.time_ns", lambda: now):
        assert not [one for one in store.add_many(list(tasks)) if isinstance(one, Refused)]


def copies(store: Store, count: int) -> list[Path]:
    store.close()
    found = [store.path.parent / f"copy{number}" for number in range(count)]
    for path in found:
        shutil.copytree(store.path, path)
    return found


def put_together(path: Path, others: Iterable[Path]) -> list[bytes]:
    for other in others:
        shutil.copytree(other / "packs", path / "packs", dirs_exist_ok=True)
    return sorted(bytes.fromhex(file.stem) for file in (path / "packs").rglob("*.safetensors"))


def test_one_version_that_two_copies_added_is_one_whatever_a_third_one_added(store: Store) -> None:
    """It was two, if the third one's pack was read between theirs."""
    store.add(small_task(seed=1))
    others = copies(store, 3)
    for path, now, seed in zip(others, (1, 2, 3), (2, 2, 3), strict=True):
        added_at(path, now, small_task(seed=seed))
    packs = put_together(store.path, others)
    found = [apply(store.path, [list(order)]) for order in permutations(packs)]
    assert [len(rows["versions"]) for rows in found] == [3] * len(found)
    assert all(rows == found[0] for rows in found)


def test_a_removal_that_two_copies_record_is_one(store: Store) -> None:
    added_at(store.path, 1, small_task(seed=1))
    added_at(store.path, 1, small_task(seed=2))
    others = copies(store, 2)
    for path in others:
        with Store(path) as copy:
            copy.remove("dtd@1")
    packs = put_together(store.path, others)
    found = [apply(store.path, [list(order)]) for order in permutations(packs)]
    assert all(rows == found[0] for rows in found)


@pytest.mark.parametrize("seeds", [(2, 3), (2, 2)])
def test_what_two_copies_removed_does_not_come_back(store: Store, seeds: tuple[int, int]) -> None:
    """A row of the index names one pack that records a removed version, and one that records its removal. Once a gc had
    deleted those, the other pack brought the version back in a rebuild."""
    store.add(small_task(seed=1))
    others = copies(store, 2)
    for name, path, seed in zip(("one", "two"), others, seeds, strict=True):
        added_at(path, seed, small_task(seed=seed), small_task(name, seed=seed))
        with Store(path) as copy:
            copy.remove("dtd@2")
    put_together(store.path, others)
    for _ in range(2):
        rebuild(store.path)
        with Store(store.path) as all_of_them:
            assert [version.version for version in all_of_them.versions("dtd")] == [1]
            for name in ("one", "two"):
                all_of_them.gc()
                if all_of_them.versions(name):
                    all_of_them.remove(name)
            all_of_them.gc()
            all_of_them.add(small_task("one", seed=7))
            all_of_them.add(small_task("two", seed=8))
    assert verify(store.path).ok


def test_a_good_copy_that_comes_later_takes_the_place_of_a_damaged_one(store: Store) -> None:
    store.add(small_task("one"))
    with Store.create(store.path.parent / "other") as other:
        other.add(small_task("two"))
    (first,) = put_together(store.path, ())
    packs = put_together(store.path, [other.path])
    file = pack_path(store.path, first)
    flipped = bytearray(file.read_bytes())
    flipped[-1] ^= 1
    file.write_bytes(flipped)
    expected = apply(store.path, [packs])
    for batches in ([packs[::-1]], [[first], packs], [packs[::-1], [first]]):
        assert apply(store.path, batches) == expected


def test_a_pack_that_cannot_be_read_changes_nothing(store: Store) -> None:
    """What the index knows of a task must not be forgotten because a pack that records it is damaged."""
    added_at(store.path, 1, small_task(seed=1))
    (first,) = put_together(store.path, ())
    added_at(store.path, 1, small_task(seed=2))
    second = next(pack for pack in put_together(store.path, ()) if pack != first)
    with empty_index() as index:
        apply_to(index, store.path, [first])
        with index.read() as view:
            before = normal_form(view)
        pack_path(store.path, first).write_bytes(b"")
        with pytest.raises(DamagedError):
            apply_to(index, store.path, [second])
        with index.read() as view:
            assert normal_form(view) == before


@pytest.mark.parametrize("tagged", [0, 1])
@pytest.mark.parametrize("in_turn", [False, True])
def test_a_tag_goes_with_its_version_where_two_copies_gave_one_number_to_two(
    store: Store, tagged: int, in_turn: bool
) -> None:
    store.add(small_task(seed=1))
    others = copies(store, 2)
    for path, seed in zip(others, (2, 3), strict=True):
        added_at(path, seed, small_task(seed=seed))
    with Store(others[tagged]) as copy:
        meant = copy.get("dtd@2").record
        copy.tag("dtd@2", "prod")
    for other in [[others[0]], [others[1]]] if in_turn else [others]:
        put_together(store.path, other)
        problems = rebuild(store.path).problems
    assert not [problem for problem in problems if problem.startswith("tag")]
    for _ in range(2):
        with Store(store.path) as joined:
            assert joined.get("dtd@prod").record == meant
            assert {version.version for version in joined.versions("dtd")} == {1, 2, 3}
            joined.gc(repack_all=True)
        assert verify(store.path).ok
        assert rebuild(store.path).problems == []


def test_an_older_tag_of_a_number_that_two_versions_had_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tag's record had only the number, so it may come to stand for the other copy's version."""
    store.add(small_task(seed=1))
    others = copies(store, 2)
    for path, seed in zip(others, (2, 3), strict=True):
        added_at(path, seed, small_task(seed=seed))
    with Store(others[0]) as copy:
        tagged = PackedTag("dtd", "prod", 2, 1)
        monkeypatch.setattr(pear_store.local.tags, "PackedTag", lambda *_: tagged)
        copy.tag("dtd@2", "prod")
    put_together(store.path, others)
    found = rebuild(store.path).problems
    assert [problem for problem in found if problem.startswith("tag")] == [
        "tag dtd@prod: two versions are recorded as dtd@2; check that it is on the right one"
    ]
    assert rebuild(store.path).problems == []
