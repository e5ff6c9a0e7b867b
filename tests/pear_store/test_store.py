"""The store's promises (docs/promises.md)."""

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open

from pear_store import (
    CheckpointError,
    DamagedError,
    DiskFullError,
    FormatError,
    NameTakenError,
    NotFoundError,
    PearStoreError,
    Refused,
    Store,
    Task,
    make_task,
    rebuild,
    repair,
    verify,
    write_checkpoint,
)
from pear_store.cli import main
from pear_store.format.deflate import inflated
from pear_store.format.manifest import to_manifest
from pear_store.local import repack
from pear_store.local.index import open_index, release_index
from tests.helpers.log import keep_log
from tests.helpers.makers import floats, record, small_task, tensors
from tests.helpers.workers import add_file


def contents(task: Task) -> dict[str, bytes]:
    return {tensor.digest: bytes(tensor.data) for tensor in task.tensors.values()}


def packs(store: Store) -> list[Path]:
    return sorted((store.path / "packs").rglob("*.safetensors"))


def test_what_is_added_comes_back(store: Store) -> None:
    task = small_task()
    added = store.add(task)
    assert (added.task, added.version, added.changed, added.shared_bytes) == ("dtd", 1, True, 0)
    assert added.new_bytes == task.size_bytes
    back = store.get("dtd")
    assert contents(back) == contents(task)
    assert to_manifest(back) == to_manifest(task)
    assert back.record["positions"] == task.record["positions"]


def test_identical_tensors_are_kept_once_across_tasks_and_versions(store: Store) -> None:
    one = small_task("one")
    store.add(one)
    two = store.add(small_task("two", head__bias=floats([7.0, 7.0])))
    assert two.new_bytes == 8
    assert two.shared_bytes == one.size_bytes - 8
    assert store.stats().tensors == 5
    assert store.stats().unique_bytes == one.size_bytes + 8
    assert store.stats().logical_bytes == 2 * one.size_bytes


def test_adding_again_changes_nothing(store: Store) -> None:
    for name in "abcd":
        store.add(small_task(name, seed=ord(name)))
    before = {file: file.stat().st_mtime_ns for file in packs(store)}
    versions = store.versions()
    for name in "abcd":
        added = store.add(small_task(name, seed=ord(name)))
        assert (added.version, added.changed, added.new_bytes) == (1, False, 0)
    assert {file: file.stat().st_mtime_ns for file in packs(store)} == before
    assert store.versions() == versions


def test_versions_count_up_and_are_never_used_twice(store: Store) -> None:
    assert store.add(small_task(seed=1)).version == 1
    assert store.add(small_task(seed=2)).version == 2
    assert store.add(small_task(seed=1)).version == 3  # equal to an older one, not the newest
    store.remove("dtd@3")
    assert store.get("dtd").record == store.get("dtd@2").record
    assert store.add(small_task(seed=4)).version == 4
    store.remove("dtd")
    store.gc()
    assert store.add(small_task(seed=1)).version == 5
    assert [v.version for v in store.versions("dtd")] == [5]


def test_names(store: Store) -> None:
    store.add(small_task("dtd"))
    with pytest.raises(NameTakenError, match="'DTD' differs only in case from the stored 'dtd'"):
        store.add(small_task("DTD"))
    assert store.add(small_task("dtd"), name="dtd.v-2_x").task == "dtd.v-2_x"
    with pytest.raises(CheckpointError, match=r"task name '\.\./x'"):
        store.add(small_task(), name="../x")
    store.remove("dtd")
    assert store.add(small_task("DTD")).version == 2  # free again, its numbers are not


def test_prefixes_of_names_are_other_tasks(store: Store) -> None:
    store.add(small_task("a", seed=1))
    store.add(small_task("a.b", seed=2))
    store.add(small_task("a-b", seed=3))
    assert [v.task for v in store.tasks()] == ["a", "a-b", "a.b"]
    store.remove("a")
    assert [v.task for v in store.tasks()] == ["a-b", "a.b"]
    with pytest.raises(NotFoundError, match="no task 'a' in"):
        store.get("a")


@pytest.mark.parametrize(
    "reference", ["nope", "dtd@2", "dtd@0", "dtd@99999999999", "dtd@x", "dtd@", "../etc", "a b", ""]
)
def test_unknown_references(store: Store, reference: str) -> None:
    store.add(small_task())
    for act in (store.get, store.resolve, store.remove):
        with pytest.raises(NotFoundError):
            act(reference)
    assert len(store.versions()) == 1


def test_one_add_writes_one_pack_named_by_its_hash_that_safetensors_reads(store: Store) -> None:
    store.add(small_task("zero", seed=9))
    before = set(packs(store))
    results = list(store.add_many([small_task(name, seed=ord(name)) for name in "abc"]))
    assert all(not isinstance(result, Refused) for result in results)
    (pack,) = set(packs(store)) - before
    assert hashlib.sha256(pack.read_bytes()).hexdigest() == pack.stem
    assert pack.parent.name == pack.stem[:2]
    with safe_open(pack, "numpy") as opened:
        assert all(name.startswith("sha256:") for name in opened.keys())  # noqa: SIM118 (no mapping)
        metadata = opened.metadata()
    versions = json.loads(metadata["pear"])["versions"]
    assert metadata["pear.sha256"] == hashlib.sha256(metadata["pear"].encode()).hexdigest()
    assert [(v["task"], v["version"]) for v in versions] == [("a", 1), ("b", 1), ("c", 1)]
    manifest = inflated(b64decode(metadata[versions[0]["manifest"]]), 1 << 20)
    assert manifest == to_manifest(small_task("a", seed=ord("a")))
    assert hashlib.sha256(manifest).hexdigest() == versions[0]["manifest"]


def test_many_adds_are_grouped_and_a_bad_one_costs_only_itself(store: Store, tmp_path: Path) -> None:
    sources: list[Task | Path] = [small_task(f"t{i}", seed=i) for i in range(250)]
    sources.insert(70, tmp_path / "missing.safetensors")
    results = list(store.add_many(sources))
    assert [i for i, r in enumerate(results) if isinstance(r, Refused)] == [70]
    assert len(store.tasks()) == 250
    assert len(packs(store)) == 2


def test_gc_removes_exactly_what_only_the_removed_task_needed(store: Store) -> None:
    shared = {"a0.down": tensors(5)["a0.down"]}
    kept = [make_task(record(name), {**tensors(i), **shared}) for i, name in enumerate(["one", "two", "three"])]
    lost = make_task(record("lost"), {**tensors(9), **shared})
    list(store.add_many([*kept, lost]))
    before = {task.name: contents(store.get(task.name)) for task in kept}
    store.remove("lost")
    plan = store.gc(dry_run=True)
    assert len(store.versions()) == 3
    assert store.stats().tensors == 10
    done = store.gc()
    only = {digest: data for digest, data in contents(lost).items() if digest not in set().union(*before.values())}
    assert len(only) == 3
    assert (done.removed_tensors, done.removed_bytes) == (3, sum(map(len, only.values())))
    assert (done.kept_tensors, done.removed_versions) == (10, 0)
    assert {**vars(plan), "dry_run": False} == vars(done)
    assert store.stats().tensors == 10
    assert {task.name: contents(store.get(task.name)) for task in kept} == before
    assert store.gc().removed_tensors == 0


def test_gc_repacks_what_is_mostly_dead(store: Store) -> None:
    list(store.add_many([*(small_task(f"dead{i}", seed=i + 10) for i in range(9)), small_task("live", seed=2)]))
    before = contents(store.get("live"))
    for version in store.tasks():
        if version.task != "live":
            store.remove(version.task)
    done = store.gc()
    assert done.dead_bytes == 0
    (pack,) = packs(store)
    with safe_open(pack, "numpy") as opened:
        assert set(opened.keys()) == set(before)
        assert [v["task"] for v in json.loads(opened.metadata()["pear"])["versions"]] == ["live"]
    assert contents(store.get("live")) == before


def test_gc_leaves_what_is_mostly_alive_unless_told(store: Store) -> None:
    list(store.add_many([small_task(f"t{i}", seed=i) for i in range(4)]))
    store.add(small_task("other", seed=77))
    store.remove("t0")
    done = store.gc()
    assert done.dead_bytes == small_task().size_bytes
    assert len(packs(store)) == 3  # and one that records the removal
    done = store.gc(repack_all=True)
    assert done.dead_bytes == 0
    assert len(packs(store)) == 1
    for i in range(1, 4):
        assert contents(store.get(f"t{i}")) == contents(small_task(f"t{i}", seed=i))


def test_gc_unlinks_orphans_but_no_foreign_files(store: Store) -> None:
    store.add(small_task())
    orphan = store.path / "packs" / "ab" / ("ab" + "0" * 62 + ".safetensors")
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"left by a crashed add")
    note = store.path / "packs" / "ab" / "README.safetensors"
    note.write_text("not ours")
    store.gc()
    assert not orphan.exists()
    assert note.exists()
    assert contents(store.get("dtd")) == contents(small_task())


def test_export_is_bit_identical_and_adds_back_unchanged(store: Store, tmp_path: Path) -> None:
    store.add(small_task())
    size = store.export("dtd", tmp_path / "out.safetensors")
    assert size == (tmp_path / "out.safetensors").stat().st_size
    assert not store.add(tmp_path / "out.safetensors").changed


def test_zero_copy_is_read_only_and_outlives_gc_and_close(tmp_path: Path) -> None:
    with Store.create(tmp_path / "s") as store:
        store.add(small_task())
        task = store.get("dtd", copy=False)
        expected = contents(small_task())
        buffer = next(iter(task.tensors.values())).data
        assert isinstance(buffer, memoryview)
        assert buffer.readonly
        store.remove("dtd")
        store.gc()
        for pack in packs(store):  # what is left records that the version was there, and was removed
            with safe_open(pack, "numpy") as opened:
                assert not opened.keys()
    assert contents(task) == expected


def test_a_held_reader_sees_its_version_through_a_repack(store: Store) -> None:
    """A pack that went away between two look-ups is looked up again."""
    list(store.add_many([small_task(f"t{i}", seed=i) for i in range(3)]))
    with Store(store.path) as other:
        for name in ("t1", "t2"):
            other.remove(name)
        other.gc(repack_all=True)
    store._open.forget_maps()
    assert contents(store.get("t0")) == contents(small_task("t0"))


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << (bit % 8)
    path.chmod(0o644)
    path.write_bytes(content)


def test_flipped_bits_in_packs_are_never_handed_out(tmp_path: Path) -> None:
    with Store.create(tmp_path / "s") as store:
        store.add(small_task())
        (pack,) = packs(store)
    good, expected = pack.read_bytes(), contents(small_task())
    rng = random.Random(0)
    found = 0
    for bit in rng.sample(range(len(good) * 8), 150):
        flip(pack, bit)
        with Store(tmp_path / "s") as store:
            try:
                assert contents(store.get("dtd")) == expected
            except DamagedError as error:
                assert "tensor sha256:" in str(error)
                assert "dtd@1" in str(error)
                found += 1
        pack.write_bytes(good)
    assert found > 5


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_adding_a_good_file_heals_a_damaged_tensor(tmp_path: Path, damage: str) -> None:
    with Store.create(tmp_path / "s") as store:
        store.add(small_task())
        (pack,) = packs(store)
        size = pack.stat().st_size
    if damage == "flip":
        flip(pack, (size - 3) * 8)
    elif damage == "truncate":
        os.truncate(pack, size - 10)
    else:
        pack.unlink()
    with Store(tmp_path / "s") as store:
        with pytest.raises(DamagedError, match="'pear-store verify' says what is hit and how to mend it"):
            store.get("dtd")
        added = store.add(small_task())
        assert (added.version, added.changed) == (1, False)
        assert added.new_bytes > 0
        assert contents(store.get("dtd")) == contents(small_task())
    with Store(tmp_path / "s") as store:
        assert contents(store.get("dtd")) == contents(small_task())


def test_what_dies_between_sweep_and_repack_is_not_counted_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that pointed into a repacked pack would make a later add of its tensors a lie."""
    list(store.add_many([small_task(name, seed=ord(name)) for name in "wxyz"]))
    store.get("x")
    store.remove("w")
    steps = repack.steps

    def steps_after_another_removed(*args: Any) -> Any:
        with Store(store.path) as other:
            other.remove("x")
        return steps(*args)

    monkeypatch.setattr("pear_store.local.gc.steps", steps_after_another_removed)
    store.gc(repack_all=True)
    monkeypatch.undo()
    store.add(small_task("x2", seed=ord("x")))
    store._open.forget_maps()
    for name, seed in (("x2", "x"), ("y", "y"), ("z", "z")):
        assert contents(store.get(name)) == contents(small_task(name, seed=ord(seed)))


def test_a_healed_tensor_can_be_damaged_and_healed_again(store: Store) -> None:
    store.add(small_task())
    for bit in range(3):
        assert contents(store.get("dtd")) == contents(small_task())
        for pack in packs(store):
            flip(pack, (pack.stat().st_size - 3) * 8 + bit)
        store._open.forget_maps()
        with pytest.raises(DamagedError):
            store.get("dtd")
        assert store.add(small_task()).new_bytes > 0
    assert contents(store.get("dtd")) == contents(small_task())
    assert store.add(small_task()).new_bytes == 0


@pytest.mark.slow
def test_a_pack_lost_while_mapped_is_replaced_and_gc_goes_on(store: Store) -> None:
    store.add(small_task())
    store.get("dtd")
    packs(store)[0].unlink()
    assert store.add(small_task()).new_bytes == small_task().size_bytes
    store.gc(repack_all=True)
    assert contents(store.get("dtd")) == contents(small_task())
    assert verify(store.path).damaged == []
    assert repair(store.path).missing == []  # what the lost pack recorded is written anew
    assert verify(store.path).ok
    assert store.gc(repack_all=True).dead_bytes == 0
    store._open.forget_maps()
    assert contents(store.get("dtd")) == contents(small_task())
    (pack,) = packs(store)
    with safe_open(pack, "numpy") as opened:
        assert [v["task"] for v in json.loads(opened.metadata()["pear"])["versions"]] == ["dtd"]


@pytest.mark.slow
def test_more_packs_are_read_and_held_than_files_may_be_open(store: Store) -> None:
    for i in range(60):
        store.add(small_task(f"t{i}", seed=i))
    code = """
import resource, sys
from pear_store import Store
from tests.helpers.makers import small_task
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
with Store(sys.argv[1]) as store:
    held = [store.get(f"t{i}", copy=False) for i in range(60)]
    for i, task in enumerate(held):
        expected = {tensor.digest: bytes(tensor.data) for tensor in small_task(f"t{i}", seed=i).tensors.values()}
        assert {tensor.digest: bytes(tensor.data) for tensor in task.tensors.values()} == expected
        assert all(tensor.data.readonly for tensor in task.tensors.values())
    store.add(small_task("new", seed=100))
    store.gc(repack_all=True)
    assert store.get("t7").name == "t7"
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(store.path)], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_maps_that_nobody_holds_are_given_back(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pear_store.local.opened._OPEN_PACKS", 8)
    monkeypatch.setattr("pear_store.local.opened._KEPT_TASKS", 8)
    for i in range(40):
        store.add(small_task(f"t{i}", seed=i))

    def maps() -> int:
        return Path("/proc/self/maps").read_text().count(str(store.path / "packs"))

    for _ in range(2):
        for i in range(40):
            store.get(f"t{i}", copy=False)
    assert 0 < maps() <= 17


def test_a_system_with_too_many_maps_is_an_error_of_ours(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add(small_task())

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("pear_store.local.opened.map_file", refuse)
    with pytest.raises(PearStoreError, match="Cannot allocate memory"):
        store.get("dtd")


@pytest.mark.slow
@pytest.mark.parametrize("as_path", [False, True])
def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_path: bool) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    path = Path("~/s") if as_path else "~/s"
    with Store.create(path) as store:
        assert store.path == tmp_path / "home" / "s"
        store.add(small_task())
    with Store(path) as store:
        assert store.tasks()[0].task == "dtd"
    assert verify(path).ok
    assert repair(path).missing == []
    assert rebuild(path).versions == 1
    for arguments, environment in ((["ls", "--json"], {"PEAR_STORE": "~/s"}), (["--store", "~/s", "ls", "--json"], {})):
        assert '"task": "dtd"' in CliRunner().invoke(main, arguments, env=environment).stdout
    with pytest.raises(PearStoreError, match=r"~nobody-here/s: no such user; a directory of that name is written \./~"):
        Store.create("~nobody-here/s")
    assert os.listdir(tmp_path) == ["home"]
    with Store.create("./~nobody-here"):
        assert sorted(os.listdir(tmp_path)) == ["home", "~nobody-here"]


def test_a_store_without_its_index_asks_for_a_rebuild(store: Store) -> None:
    store.add(small_task())
    store.close()
    shutil.rmtree(store.path / "index")
    with pytest.raises(NotFoundError, match="the store's index is gone; 'pear-store rebuild --store .*' makes it anew"):
        Store(store.path)
    rebuild(store.path)
    with Store(store.path) as again:
        assert contents(again.get("dtd")) == contents(small_task())


def damage_row(store: Store, table: str, at: int) -> None:
    with store._open.read() as view:
        (key, row), *_ = view.rows(table)
    store._open.write(lambda view: view.put(table, key, row[:at] + bytes([row[at] ^ 16]) + row[at + 1 :]))


def test_adding_heals_a_damaged_manifest(store: Store) -> None:
    store.add(small_task())
    damage_row(store, "manifests", 60)
    with pytest.raises(DamagedError, match="manifest of version dtd@1 is damaged: its hash differs"):
        store.get("dtd")
    assert not store.add(small_task()).changed
    assert contents(store.get("dtd")) == contents(small_task())
    store.gc()


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 20, 45, 60])
def test_a_damaged_tensor_row_stops_add_and_repack_until_a_rebuild(store: Store, at: int) -> None:
    """Its number is lost: counting on the row could let gc take what a version needs."""
    store.add(small_task())
    damage_row(store, "tensors", at)
    with pytest.raises(DamagedError, match="its checksum differs; 'pear-store rebuild'"):
        store.add(small_task("other"))
    (pack,) = packs(store)
    store.add(small_task("third", seed=3))
    store.remove("third")
    store.gc(repack_all=True)
    assert pack.exists()
    assert "checksum" in str(verify(store.path).index)
    rebuild(store.path)
    assert contents(store.get("dtd")) == contents(small_task())
    store.gc()
    assert not store.add(small_task()).changed


@pytest.mark.slow
def test_many_large_records_can_be_added_and_repacked(store: Store) -> None:
    notes = '"' * 1_500_000  # doubles when escaped
    for i in range(12):
        task = small_task(f"t{i}", seed=i)
        store.add(make_task({**task.record, "training": {"notes": notes}}, task.tensors))
    store.remove("t3")
    assert store.gc(repack_all=True).dead_bytes == 0
    assert contents(store.get("t11")) == contents(small_task("t11", seed=11))
    with pytest.raises(CheckpointError, match="record: expected at most 4194304 bytes, found "):
        task = small_task("huge")
        store.add(make_task({**task.record, "training": {"notes": notes * 2}}, task.tensors))


def test_two_creators_and_a_killed_one(tmp_path: Path) -> None:
    (tmp_path / "s" / "packs").mkdir(parents=True)
    (tmp_path / "s" / "index-0123").mkdir()  # left by a killed create
    threads_errors: list[BaseException] = []

    def make() -> None:
        try:
            Store.create(tmp_path / "s").close()
        except BaseException as error:
            threads_errors.append(error)

    threads = [threading.Thread(target=make) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert threads_errors == []
    with Store(tmp_path / "s") as store:
        assert store.add(small_task()).changed


def test_damaged_index_rows_are_found(tmp_path: Path) -> None:
    with Store.create(tmp_path / "s") as store:
        store.add(small_task())
    index = open_index(tmp_path / "s" / "index")
    with index.read() as view:
        (key, row), *_ = view.rows("versions")
    index.write(lambda view: view.put("versions", key, bytes([row[0] ^ 1]) + row[1:]))
    release_index(index)
    with Store(tmp_path / "s") as store, pytest.raises(DamagedError, match="its checksum differs"):
        store.get("dtd")


@pytest.mark.parametrize(
    ("table", "at"), [("manifests", 9), ("versions", 5), ("names", 2), ("packs", 3), ("contents", 5)]
)
def test_gc_refuses_to_judge_by_a_damaged_row(store: Store, table: str, at: int) -> None:
    store.add(small_task())
    damage_row(store, table, at)
    with pytest.raises(DamagedError, match="its checksum differs"):
        store.gc()
    assert len(packs(store)) == 1


def test_a_repack_leaves_a_pack_whose_tensor_has_no_row(store: Store) -> None:
    store.add(small_task())
    with store._open.read() as view:
        (key, _), *_ = view.rows("tensors")
    store._open.write(lambda view: view.delete("tensors", key))
    (pack,) = packs(store)
    store.add(small_task("other", seed=3))
    store.remove("other")
    store.gc(repack_all=True)
    assert pack.exists()
    assert verify(store.path).index is not None
    rebuild(store.path)
    assert contents(store.get("dtd")) == contents(small_task())
    assert verify(store.path).ok


@pytest.mark.parametrize("table", ["manifests", "versions", "contents", "packs"])
def test_gc_refuses_to_judge_by_a_row_that_is_gone(store: Store, table: str) -> None:
    store.add(small_task())
    with store._open.read() as view:
        (key, _), *_ = view.rows(table)
    store._open.write(lambda view: view.delete(table, key))
    if table == "versions":  # what is left is sound: the version counts as removed, but its name misses it
        with pytest.raises(DamagedError, match="version dtd@1 is damaged: the index does not list it"):
            store.get("dtd")
        return
    with pytest.raises(DamagedError):
        store.gc()
    assert len(packs(store)) == 1


def test_create_and_open(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no store there; make one with 'pear-store init"):
        Store(tmp_path / "s")
    Store.create(tmp_path / "s").close()
    with Store.create(tmp_path / "s") as again:
        again.add(small_task())
    with Store.create(tmp_path / "s") as again:
        assert len(again.tasks()) == 1
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(FormatError, match="expected a store or an empty directory, found other files"):
        Store.create(tmp_path / "full")


@pytest.mark.parametrize(
    ("found", "remedy"),
    [("9", "use the newer Pear that wrote it"), ("2", "'pear-store rebuild'")],
)
def test_another_index_format_is_refused(tmp_path: Path, found: str, remedy: str) -> None:
    with Store.create(tmp_path / "s") as store:
        store.add(small_task())
    index = open_index(tmp_path / "s" / "index")
    index.write(lambda view: view.put("meta", b"format", found.encode()))
    release_index(index)
    with pytest.raises(FormatError, match=f"index format '{found}': this Pear reads '5'; {remedy}"):
        Store(tmp_path / "s")
    rebuild(tmp_path / "s")
    with Store(tmp_path / "s") as store:
        assert contents(store.get("dtd")) == contents(small_task())


def test_a_closed_store_says_so(store: Store) -> None:
    store.close()
    with pytest.raises(PearStoreError, match="was closed"):
        store.tasks()


def test_the_map_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pear_store.local.index._MAP_BYTES", (256 * 1024,))
    with Store.create(tmp_path / "s") as store:
        for start in range(0, 600, 100):
            list(store.add_many([small_task(f"t{i}", seed=i) for i in range(start, start + 100)]))
        assert len(store.tasks()) == 600
        assert contents(store.get("t599")) == contents(small_task("t599", seed=599))


# ---- several threads and processes ------------------------------------------------------------


def test_threads_read_and_add_at_once(store: Store) -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(8):
                name = f"t{number}-{i}"
                store.add(small_task(name, seed=100 * number + i))
                assert contents(store.get(name)) == contents(small_task(name, seed=100 * number + i))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(store.tasks()) == 48


def test_a_forked_child_uses_the_same_store(store: Store) -> None:
    store.add(small_task("parent"))
    child = os.fork()
    if child == 0:
        try:
            store.add(small_task("child", seed=3))
            good = contents(store.get("parent")) == contents(small_task("parent"))
            os._exit(0 if good else 1)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert contents(store.get("child")) == contents(small_task("child", seed=3))


def _spawn(call: str) -> "subprocess.Popen[str]":
    code = f"from tests.helpers.workers import *; {call}"
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip


@pytest.mark.slow
def test_adders_and_gc_together_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "s"
    Store.create(path).close()
    workers = [_spawn(f"add_and_acknowledge({str(path)!r}, {n}, 3)") for n in range(2)]
    workers.append(_spawn(f"gc_loop({str(path)!r}, 3)"))
    outputs = [worker.communicate(timeout=60) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0], outputs
    names = " ".join(out for out, _ in outputs[:2]).split()
    assert names
    with Store(path) as store:
        for name in names:
            worker, i = (int(part) for part in name[1:].split("-"))
            assert contents(store.get(name)) == contents(small_task(name, seed=i % 7 + 10 * worker))


KILLS = int(os.environ.get("PEAR_KILLS", "12"))
SOAK_S = float(os.environ.get("PEAR_SOAK_S", "3"))


@pytest.mark.slow
@pytest.mark.parametrize("work", ["add", "gc", "rebuild"])
def test_kill_9_loses_nothing_acknowledged(tmp_path: Path, work: str) -> None:
    """Kills at random moments; the store opens at once and holds every acknowledged task, whole."""
    path = tmp_path / "s"
    Store.create(path).close()
    calls = {"add": "add_and_acknowledge({!r}, 0, 30)", "gc": "gc_loop({!r}, 30)", "rebuild": "rebuild_loop({!r}, 30)"}
    call = calls[work].format(str(path))
    rng = random.Random(1)
    acknowledged: set[str] = set()
    for round_ in range(KILLS // 3):
        if work != "add":  # something to collect
            with Store(path) as store:
                for i in range(4):
                    store.add(small_task(f"w0-{4 * round_ + i}", seed=(4 * round_ + i) % 7))
                acknowledged |= {f"w0-{4 * round_ + i}" for i in range(4)}
                dead = f"w0-{4 * round_}"
                store.remove(dead)
                acknowledged.discard(dead)
        process = _spawn(call)
        assert process.stdout is not None
        first = process.stdout.readline()  # it is at work
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        rest, errors = process.communicate()
        assert first, errors
        if work == "add":
            acknowledged |= set((first + rest).split())
        started = time.monotonic()
        with Store(path) as store:
            held = {version.task for version in store.tasks()}
            opened_s = time.monotonic() - started
            assert acknowledged <= held
            for name in sorted(held)[-60:] if round_ % 10 else held:
                assert contents(store.get(name)) == contents(small_task(name, seed=int(name.split("-")[1]) % 7))
        for old in path.glob("index.old-*"):
            shutil.rmtree(old)
        keep_log(f"kill {round_ + 1} in {work}: {len(acknowledged)} acknowledged, 0 lost, opened in {opened_s:.3f} s")
    assert verify(path).ok


@pytest.mark.slow
def test_kill_9_of_an_add_with_workers_loses_nothing_and_leaves_no_process(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    for i in range(120):
        write_checkpoint(tmp_path / "files" / f"{i:03}.safetensors", small_task(f"t{i}", seed=i))
    killed = 0
    for i in range(max(3, KILLS // 4)):
        path = tmp_path / f"s{i}"
        Store.create(path).close()
        worker = _spawn(f"add_files_and_acknowledge({str(path)!r}, {str(tmp_path / 'files')!r})")
        assert worker.stdout is not None
        children = worker.stdout.readline().split()
        assert len(children) == 2, worker.stderr
        time.sleep(random.Random(i).random() / 4)
        worker.kill()
        names = worker.communicate(timeout=60)[0].split()
        killed += worker.returncode == -signal.SIGKILL
        deadline = time.monotonic() + 30
        while any(Path("/proc", child).exists() for child in children):
            assert time.monotonic() < deadline, children
            time.sleep(0.01)
        with Store(path) as store:
            assert {v.task for v in store.tasks()} >= set(names)
            for version in store.tasks():
                assert contents(store.get(version.task)) == contents(
                    small_task(version.task, seed=int(version.task[1:]))
                )
        assert verify(path).ok
    assert killed
    keep_log(f"{killed} kills of adds with workers: 0 acknowledged tasks lost, no process left")


@pytest.mark.slow
def test_a_soak_loses_nothing(tmp_path: Path) -> None:
    """A writer, an adder that removes and collects, three readers and a gc loop together."""
    path = tmp_path / "s"
    Store.create(path).close()
    calls = [
        f"add_and_acknowledge({str(path)!r}, 0, {SOAK_S})", f"remove_and_gc_loop({str(path)!r}, 1, {SOAK_S})",
        f"gc_loop({str(path)!r}, {SOAK_S})", *[f"read_loop({str(path)!r}, {SOAK_S})"] * 3,
    ]  # fmt: skip
    workers = [_spawn(call) for call in calls]
    outputs = [worker.communicate(timeout=SOAK_S + 120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 6, [error for _, error in outputs]
    names = outputs[0][0].split()
    reads = [int(out) for out, _ in outputs[3:]]
    assert names
    assert sum(reads) > 0
    with Store(path) as store:
        assert {version.task for version in store.tasks()} == set(names)
        for name in names:
            assert contents(store.get(name)) == contents(small_task(name, seed=int(name.split("-")[1]) % 7))
    assert verify(path).ok
    keep_log(f"soak of {SOAK_S:.0f} s: {len(names)} tasks added, 0 lost; {sum(reads)} reads, 0 errors")


# ---- a full disk ------------------------------------------------------------------------------


def test_a_full_disk_is_named_and_harms_nothing(small_disk: Path) -> None:
    def large(i: int) -> Task:
        rng = np.random.default_rng(i)
        return make_task(record(f"t{i}"), {**tensors(i), "a0.down": floats(rng.normal(size=(4000, 2))),
                                           "head.weight": floats(rng.normal(size=(2, 6)))})  # fmt: skip

    with Store.create(small_disk / "s") as store:
        added = []
        with pytest.raises(DiskFullError, match="no space left on the device; nothing was changed"):
            for i in range(100):
                store.add(large(i))
                added.append(i)
        assert len(added) > 5
        assert [v.task for v in store.tasks()] == sorted(f"t{i}" for i in added)
        for i in added:
            assert contents(store.get(f"t{i}")) == contents(large(i))
        assert list((store.path / "tmp").iterdir()) == []
        with pytest.raises(DiskFullError):
            store.export("t0", small_disk / "out.safetensors")
        assert not (small_disk / "out.safetensors").exists()
        subprocess.run(["mount", "-o", "remount,size=2m", small_disk], check=True)  # space is freed
        store.add(large(len(added)))
        store.remove("t0")
        store.gc()
        assert contents(store.get("t1")) == contents(large(1))


def test_adding_files_from_another_process_is_seen(store: Store, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "t.safetensors", small_task("new"))
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=add_file, args=(str(store.path), str(tmp_path / "t.safetensors")))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert store.tasks()[0].task == "new"


@pytest.mark.slow
@pytest.mark.parametrize("work", ["gc", "repack", "remove", "tag", "rebuild"])
def test_a_full_disk_in_the_middle_of_other_work_loses_nothing(small_disk: Path, work: str) -> None:
    with Store.create(small_disk / "s") as store:
        for start in range(0, 60, 20):
            list(store.add_many([small_task(f"t{i}", seed=i) for i in range(start, start + 20)]))
        store.remove(*(f"t{i}" for i in range(0, 60, 2)))
        before = {v.task: contents(store.get(v.task)) for v in store.tasks()}
        acts: dict[str, Callable[[], object]] = {
            "gc": store.gc,
            "repack": lambda: store.gc(repack_all=True),
            "remove": lambda: [store.remove(f"t{i}") for i in range(1, 20, 2)],
            "tag": lambda: [store.tag(f"t{i}", "prod") for i in range(1, 60, 2)],
            "rebuild": lambda: rebuild(store.path),
        }
        with open(small_disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(b"\0" * 4096) == 4096:
                pass
        if work == "gc":  # may do with the pages that the index has
            with contextlib.suppress(DiskFullError):
                acts[work]()
        else:
            with pytest.raises(DiskFullError, match="no space left on the device; nothing was changed"):
                acts[work]()
        held = {v.task: contents(store.get(v.task)) for v in store.tasks()}
        assert held == {name: before[name] for name in held}
        if work != "remove":
            assert held == before
        (small_disk / "filler").unlink()
        acts[work]()
        if work != "remove":
            assert {name: contents(store.get(name)) for name in held} == held
        assert list((store.path / "tmp").iterdir()) == []
    assert verify(small_disk / "s").ok
