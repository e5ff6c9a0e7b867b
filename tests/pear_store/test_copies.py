"""Packs of two copies of a store put together, and of commits that never came."""

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pear_store.local.rebuild as recovery
from pear_store import NotFoundError, Store, Task, rebuild, verify
from pear_store.local.packs import read_records
from tests.helpers.makers import small_task
from tests.pear_store.test_integrity import ROOT, everything
from tests.pear_store.test_store import contents, packs

pytestmark = pytest.mark.slow

Content = dict[str, bytes]


def held(path: Path) -> dict[str, Content]:
    return {name: found for name, (_, _, found) in everything(path).items()}


def put_together(path: Path, other: Path) -> None:
    shutil.copytree(other / "packs", path / "packs", dirs_exist_ok=True)


@pytest.fixture
def copies(store: Store, tmp_path: Path) -> tuple[Path, Path]:
    store.add(small_task(seed=1))
    store.close()
    shutil.copytree(store.path, tmp_path / "copy")
    return store.path, tmp_path / "copy"


def test_two_copies_that_add_the_same_number_keep_both(copies: tuple[Path, Path]) -> None:
    ours, theirs = copies
    with Store(ours) as store:
        store.add(small_task(seed=2))
    with Store(theirs) as store:
        store.add(small_task(seed=3))
    put_together(ours, theirs)
    assert verify(ours).unknown_packs
    found = rebuild(ours)
    assert "dtd@2: two are recorded, as in copies of one store" in found.problems[0]
    kept = held(ours)
    assert kept.keys() == {"dtd@1", "dtd@2", "dtd@3"}
    assert sorted(map(sorted, (kept["dtd@2"], kept["dtd@3"]))) == sorted(
        sorted(contents(small_task(seed=seed))) for seed in (2, 3)
    )
    assert verify(ours).ok
    with Store(ours) as store:
        assert store.add(small_task(seed=4)).version == 4
        store.gc(repack_all=True)
    for _ in range(2):
        assert rebuild(ours).problems == []
        assert held(ours) == {**kept, "dtd@4": contents(small_task(seed=4))}
        assert verify(ours).ok


def test_what_one_copy_removed_costs_the_other_copy_nothing(copies: tuple[Path, Path]) -> None:
    ours, theirs = copies
    with Store(ours) as store:
        store.add(small_task(seed=2))
        store.remove("dtd@2")
    with Store(theirs) as store:
        store.add(small_task(seed=3))
    put_together(ours, theirs)
    rebuild(ours)
    assert held(ours) == {"dtd@1": contents(small_task(seed=1)), "dtd@3": contents(small_task(seed=3))}
    assert verify(ours).ok
    assert rebuild(ours).problems == []


def test_names_that_differ_in_case_keep_all_versions(copies: tuple[Path, Path]) -> None:
    ours, theirs = copies
    for path, name, seed in ((ours, "svhn", 5), (theirs, "SVHN", 6), (theirs, "SVHN", 7)):
        with Store(path) as store:
            store.add(small_task(name, seed=seed))
    put_together(ours, theirs)
    assert len(rebuild(ours).problems) == 1
    kept = held(ours)
    with Store(ours) as store:
        (name,) = {version.task for version in store.tasks()} - {"dtd"}
        assert {store.get(f"{name}@{n}").name for n in (1, 2, 3)} == {name}
    found = [sorted(kept[f"{name}@{number}"]) for number in (1, 2, 3)]
    assert sorted(found) == sorted(sorted(contents(small_task(seed=seed))) for seed in (5, 6, 7))
    assert verify(ours).ok
    assert rebuild(ours).problems == []
    assert held(ours) == kept


def die_after_placing(path: Path, task: str) -> None:
    code = (
        "import os, signal\n"
        "from pear_store import Store\n"
        "import pear_store.local.catalog as catalog\n"
        "from tests.helpers.makers import small_task\n"
        "place = catalog.place_pack\n"
        "def place_and_die(*args):\n"
        "    place(*args)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "catalog.place_pack = place_and_die\n"
        f"Store({str(path)!r}).add({task})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_commit_that_never_came_replaces_nothing_whatever_the_clock_says(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tmp/ emptied nothing says that its pack was never committed, but a later commit says which one was."""
    store.add(small_task(seed=1))
    die_after_placing(store.path, "small_task(seed=2)")
    for file in (store.path / "tmp").iterdir():
        file.unlink()
    monkeypatch.setattr("time.time_ns", lambda: 1_000_000_000)
    assert store.add(small_task(seed=3)).version == 2
    store.add(small_task("other", seed=4))
    monkeypatch.undo()
    found = rebuild(store.path)
    assert len(found.problems) == 1
    kept = held(store.path)
    assert kept["dtd@2"] == contents(small_task(seed=3))
    assert kept["dtd@3"] == contents(small_task(seed=2))
    assert verify(store.path).ok


@pytest.mark.parametrize("links", [True, False])
def test_a_rebuild_after_a_crash_does_not_admit_what_was_never_committed(store: Store, links: bool) -> None:
    store.add(small_task(seed=1))
    before = held(store.path)
    die_after_placing(store.path, "small_task(seed=2)")
    if not links:  # as on a file system without them
        (name,) = (store.path / "tmp").glob("*.safetensors")
        name.unlink()
        name.with_suffix(".placing").touch()
    assert len(packs(store)) == 2
    found = rebuild(store.path)
    assert "the index does not list it; moved to" in found.problems[0]
    assert held(store.path) == before
    assert list((store.path / "tmp").iterdir()) == []
    assert verify(store.path).ok
    assert store.add(small_task(seed=3)).version == 2


def test_where_nothing_tells_whether_a_commit_came_it_is_kept_and_said(store: Store) -> None:
    store.add(small_task(seed=1))
    die_after_placing(store.path, "small_task(seed=2)")
    shutil.rmtree(store.path / "index")
    found = rebuild(store.path)
    assert "it may never have been committed; its records were kept" in found.problems[0]
    assert held(store.path).keys() == {"dtd@1", "dtd@2"}


def test_a_pack_names_its_store_its_commit_and_what_it_followed(store: Store) -> None:
    for seed in range(3):
        store.add(small_task(seed=seed))
    store.remove("dtd@1")
    by_number = {}
    for file in packs(store):
        _, records, _ = read_records(file)
        by_number[records.commit.number] = (records.commit, bytes.fromhex(file.stem))
    assert sorted(by_number) == [1, 2, 3, 4]
    assert len({commit.store for commit, _ in by_number.values()}) == 1
    for number in (2, 3, 4):
        assert by_number[number][0].after == (by_number[number - 1][1],)
    store.gc(repack_all=True)
    (file,) = packs(store)
    _, records, _ = read_records(file)
    assert {v.version: v.moved_from for v in records.versions} == {2: 2, 3: 3}
    rebuild(store.path)
    with Store(store.path) as fresh:
        fresh.add(small_task(seed=7))
        commits = [read_records(file)[1].commit for file in packs(fresh)]
    assert len({commit.store for commit in commits}) == 1
    assert max(commit.number for commit in commits) == records.commit.number + 1


def test_a_rebuild_syncs_the_directory_after_each_renaming(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add(small_task())
    steps: list[str] = []
    rename, fsync = os.rename, os.fsync

    def renamed(old: str, new: str, **folders: int) -> None:
        steps.append(f"{old} -> {new[:9]}")
        rename(old, new, **folders)

    def synced(descriptor: int) -> None:
        steps.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr("os.rename", renamed)
    monkeypatch.setattr("os.fsync", synced)
    rebuild(store.path)
    monkeypatch.undo()
    at = steps.index("index.build -> index.new")
    assert steps[at - 1] == "sync index.build"
    assert steps[at:] == [
        "index.build -> index.new", "sync store", "index -> index.old", "sync store",
        "index.new -> index", "sync store",
    ]  # fmt: skip


STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "Add", "rm", "tag", "gc"]), st.integers(1, 3), st.integers(0, 3)),
    min_size=1, max_size=5,
)  # fmt: skip


@settings(max_examples=5, deadline=None)
@given(ours=STEPS, theirs=STEPS, seed=st.integers(0, 99))
def test_what_packs_say_together_does_not_depend_on_their_order(
    tmp_path_factory: pytest.TempPathFactory, ours: list[tuple[str, int, int]], theirs: list[tuple[str, int, int]],
    seed: int,
) -> None:  # fmt: skip
    """Of two copies that go their own ways: every version that one of them has is there in the end."""
    folder = tmp_path_factory.mktemp("copies")
    with Store.create(folder / "a") as store:
        store.add(small_task(seed=9))
    shutil.copytree(folder / "a", folder / "b")
    expected: list[list[str]] = []
    for path, steps in ((folder / "a", ours), (folder / "b", theirs)):
        with Store(path) as store:
            for what, number, content in steps:
                do(store, what, number, content)
            expected += [sorted(found) for found in held(path).values()]
    put_together(folder / "a", folder / "b")
    shutil.copytree(folder / "a", folder / "c")
    results = []
    for path, shuffled in ((folder / "a", False), (folder / "c", True)):
        files = recovery._pack_files(path)
        if shuffled:
            random.Random(seed).shuffle(files)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recovery, "_pack_files", lambda path, files=files: files)
            rebuild(path)
        assert verify(path).ok
        results.append(everything(path))
        assert rebuild(path).problems == []
        assert everything(path) == results[-1]
    assert results[0] == results[1]
    there = [sorted(found) for _, _, found in results[0].values()]
    removed = any(what == "rm" for what, _, _ in (*ours, *theirs))
    for found in expected:
        assert found in there or removed


def do(store: Store, what: str, number: int, content: int) -> None:
    task: Task = small_task("dtd" if what == "add" else "Svhn" if number > 1 else "svhn", seed=content)
    try:
        if what in ("add", "Add"):
            list(store.add_many([task]))
        elif what == "rm":
            store.remove(f"dtd@{number}")
        elif what == "tag":
            store.tag(f"dtd@{number}", "prod")
        else:
            store.gc(repack_all=content > 1)
    except NotFoundError:
        pass
    except Exception as error:
        assert type(error).__name__ == "TaggedError", error
