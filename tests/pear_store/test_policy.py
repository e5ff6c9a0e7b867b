"""Tags, what gc drops of old versions, diff and statistics."""

import time
from pathlib import Path

import pytest

from pear_store import NotFoundError, PearStoreError, Store, TaggedError, make_task, verify
from tests.helpers.makers import floats, record, small_task, tensors
from tests.pear_store.test_store import contents


def numbers(store: Store, task: str = "dtd") -> list[int]:
    return [version.version for version in store.versions(task)]


@pytest.fixture
def five(store: Store) -> Store:
    """Five versions of dtd, the second tagged."""
    for seed in range(5):
        store.add(small_task(seed=seed))
    store.tag("dtd@2", "prod")
    return store


def test_tags_name_versions_move_and_protect(five: Store) -> None:
    assert five.resolve("dtd@prod").version == 2
    assert five.resolve("dtd@prod").tags == ("prod",)
    assert contents(five.get("dtd@prod")) == contents(small_task(seed=1))
    for reference in ("dtd@2", "dtd"):
        with pytest.raises(TaggedError, match="dtd@2 is tagged 'prod' and was kept; untag it first"):
            five.remove(reference)
    assert numbers(five) == [1, 2, 3, 4, 5]
    five.tag("dtd", "prod")
    assert five.resolve("dtd@prod").version == 5
    five.remove("dtd@2")
    five.untag("dtd@prod")
    with pytest.raises(NotFoundError, match="no tag 'prod' of task 'dtd'; its tags: none"):
        five.get("dtd@prod")
    five.remove("dtd")
    assert five.tasks() == []


@pytest.mark.parametrize("tag", ["Prod", "2", "", "a_b", "x" * 33, "-a"])
def test_bad_tags_are_refused(five: Store, tag: str) -> None:
    with pytest.raises(PearStoreError, match="expected a lower-case letter"):
        five.tag("dtd", tag)
    with pytest.raises(NotFoundError):
        five.untag("dtd@3")
    with pytest.raises(NotFoundError, match="expected a task or a version, found a tag"):
        five.remove("dtd@prod")


def test_gc_keep_and_older_than(five: Store) -> None:
    plan = five.gc(dry_run=True, keep=1)
    assert numbers(five) == [1, 2, 3, 4, 5]
    assert five.gc(keep=2, older_than_s=3600).removed_versions == 0  # none is that old
    done = five.gc(keep=1)
    assert {**vars(plan), "dry_run": False, "dead_bytes": done.dead_bytes} == vars(done)
    assert (done.removed_versions, done.removed_tensors) == (3, 12)
    assert numbers(five) == [2, 5]
    assert contents(five.get("dtd@2")) == contents(small_task(seed=1))
    time.sleep(0.01)
    five.add(small_task(seed=8))
    assert five.gc(older_than_s=0.0).removed_versions == 1
    assert numbers(five) == [2, 6]
    with pytest.raises(PearStoreError, match="keep 0"):
        five.gc(keep=0)


def test_each_task_keeps_its_own(store: Store) -> None:
    for seed in range(3):
        for name in ("a", "a.b", "b"):
            store.add(small_task(name, seed=seed))
    assert store.gc(keep=2).removed_versions == 3
    assert [numbers(store, name) for name in ("a", "a.b", "b")] == [[2, 3]] * 3


def test_diff(store: Store) -> None:
    one = small_task("one")
    store.add(one)
    changed = make_task(
        record("two", positions={"blocks.0.attn": [["a0", 0.5]], "blocks.2.attn": [["a0", 1.0]]}, labels=["x", "y"]),
        {**tensors(), "head.bias": floats([1.0, 2.0])},
    )
    store.add(changed)
    found = store.diff("one", "two")
    assert {p.position: p.change for p in found.positions} == {
        "blocks.0.attn": "scale", "blocks.1.attn": "removed", "blocks.2.attn": "added",
    }  # fmt: skip
    assert (found.head, found.fields) == ("changed", ("labels", "task"))
    assert (found.shared_bytes, found.only_a_bytes, found.only_b_bytes) == (one.size_bytes - 8, 8, 8)
    assert {p.change for p in store.diff("one", "one").positions} == {"equal"}
    store.add(small_task("three", seed=3))
    assert {p.change for p in store.diff("one", "three").positions} == {"changed"}


def test_stats(five: Store) -> None:
    size = small_task().size_bytes
    five.add(small_task("other", seed=4))
    stats = five.stats()
    assert (stats.tasks, stats.versions, stats.tensors) == (2, 6, 20)
    assert (stats.logical_bytes, stats.unique_bytes, stats.dedup_ratio) == (6 * size, 5 * size, 1.2)
    assert stats.live_share == 1.0
    five.remove("dtd@1")
    assert five.stats().live_share == 0.8
    on_disk = sum(file.stat().st_size for file in (five.path / "packs").rglob("*.safetensors"))
    assert (stats.pack_bytes < on_disk, five.stats().pack_bytes) == (True, on_disk)
    assert stats.stored_bytes == stats.pack_bytes + stats.index_bytes


def test_a_network_file_system_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pear_store.local.mounts import network_file_system

    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/a / ext4 rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\n")
    assert network_file_system(tmp_path / "s", mounts) == "nfs4"
    assert network_file_system(tmp_path.parent, mounts) is None
    monkeypatch.setattr("pear_store.local.mounts.network_file_system", lambda path: "nfs4")
    with pytest.warns(UserWarning, match=r"network file system \(nfs4\)"):
        Store.create(tmp_path / "s").close()


def test_what_gc_counted_as_removed_is_used_again_where_its_pack_stayed(store: Store) -> None:
    list(store.add_many([small_task(name, seed=ord(name)) for name in "abc"]))
    store.remove("a")
    first = store.gc()
    assert first.removed_tensors == 4 and first.dead_bytes == first.removed_bytes > 0
    again = store.gc()
    assert (again.removed_tensors, again.removed_bytes, again.dead_bytes) == (0, 0, first.dead_bytes)
    added = store.add(small_task("d", seed=ord("a")))
    assert (added.changed, added.new_bytes) == (True, 0)
    assert store.gc().dead_bytes == 0
    assert verify(store.path).ok
    store.remove("d")
    assert store.gc().removed_tensors == 4  # and counts again when it goes again


def test_a_read_follows_its_tensors_to_another_pack(store: Store) -> None:
    """The index's hint of where they lay is then wrong, or the file gone."""
    list(store.add_many([small_task(name, seed=ord(name)) for name in "ab"]))
    store.remove("a")
    assert store.gc(repack_all=True).dead_bytes == 0
    with Store(store.path) as fresh:
        want = {t.digest for t in small_task("b", seed=ord("b")).tensors.values()}
        assert {t.digest for t in fresh.get("b").tensors.values()} == want


def test_small_change_is_not_worth_a_repack(store: Store) -> None:
    """A pack that is mostly dead stays while it is a small part of the store."""
    list(store.add_many([small_task(f"t{i}", seed=i) for i in range(40)]))
    store.add(small_task("small", seed=99))
    store.remove("small")
    before = store.stats().packs
    assert store.gc().dead_bytes == 0  # wholly dead goes at once, all the same
    list(
        store.add_many(
            [small_task("u", seed=100), small_task("v", seed=101), small_task("w", seed=102), small_task("x", seed=103)]
        )
    )
    store.remove("u", "v", "w")
    assert store.gc().dead_bytes > 0
    assert store.gc(repack_all=True).dead_bytes == 0
    assert store.stats().packs <= before
