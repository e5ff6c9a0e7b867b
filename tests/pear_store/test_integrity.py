"""Verify, repair and rebuild; every damage is done to real files."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pear_store import (
    DamagedError,
    DamagedIndexError,
    NotFoundError,
    PearStoreError,
    Store,
    rebuild,
    repair,
    verify,
    write_checkpoint,
)
from pear_store.local import gc, opened, repack
from pear_store.local import verify as integrity
from tests.helpers.log import keep_log
from tests.helpers.makers import small_task
from tests.pear_store.test_store import contents, flip, packs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def everything(path: Path) -> dict[str, tuple[int, tuple[str, ...], dict[str, bytes]]]:
    """All that a store hands out."""
    with Store(path) as store:
        return {
            f"{v.task}@{v.version}": (v.time_ns, v.tags, contents(store.get(f"{v.task}@{v.version}")))
            for v in store.versions()
        }


def test_a_sound_store_is_all_good(filled: Path) -> None:
    report = verify(filled)
    assert report.ok, report
    with Store(filled) as store:
        store.gc()
        unique = store.stats().unique_bytes
    report = verify(filled)
    assert (report.tensors, report.bytes, report.index, report.advice) == (13, unique, None, [])
    parts = [verify(filled, (n, 3)) for n in (1, 2, 3)]
    assert sum(part.tensors for part in parts) == 13
    with pytest.raises(PearStoreError, match="subset 4/3: expected n/t"):
        verify(filled, (4, 3))
    with pytest.raises(NotFoundError, match="no store there"):
        verify(filled / "nothing")


def test_parts_of_a_verify_have_packs_however_many_parts_there_are(store: Store) -> None:
    for i in range(12):
        store.add(small_task(f"t{i}", seed=i))
    numbers = [
        next(n for n in range(1, 3001) if integrity._is_in(bytes.fromhex(p.stem), (n, 3000))) for p in packs(store)
    ]
    assert max(numbers) > 256
    found = [integrity.check_packs(store.path, (n, 3000))[0].packs for n in numbers]
    assert found == [numbers.count(n) for n in numbers]  # two may fall into one part


@pytest.mark.parametrize("forks", [True, False])
def test_a_killed_verify_leaves_no_process(filled: Path, forks: bool) -> None:
    """It waits for one byte of a pack, as a slow disk would have it; in a fork, or in a process of its own."""
    code = (
        "import sys, time\n"
        "import pear_store.local.verify as integrity\n"
        f"integrity.can_fork = lambda: {forks}\n"
        "integrity.PackReader.digest = lambda *_: time.sleep(60)\n"
        f"integrity.verify({str(filled)!r})\n"
    )
    if not forks:  # the process of its own is slow, too
        (filled / "sitecustomize.py").write_text(
            "import sys\nif 'end_with' in ' '.join(sys.orig_argv):\n    import time\n"
            "    import pear_store.local.verify as integrity\n    integrity.check = lambda *_: time.sleep(60)\n"
        )
    environment = {**os.environ, "PYTHONPATH": f"{filled}:{ROOT}"}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment)
    try:
        wait_until(lambda: len(family(process.pid)) > (2 if forks else 1))
        children = family(process.pid)
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not any(Path("/proc", str(child)).exists() for child in children))


def family(process: int) -> list[int]:
    """All that came from a process, itself included."""
    found = [process]
    for one in found:
        found += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
    return found


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("unlinks", [True, False], ids=["unlinked", "not yet unlinked"])
@pytest.mark.parametrize("step", ["check_index", "_check_pack", "read_records", "open_pack", "_hit"])
def test_a_gc_in_a_verify_is_no_damage(filled: Path, monkeypatch: pytest.MonkeyPatch, step: str, unlinks: bool) -> None:
    """It moves every tensor and drops every pack that verify is about to read."""
    plain = getattr(integrity, step)
    moved: list[Any] = []

    def move_first(*arguments: Any) -> Any:
        if not moved:
            with Store(filled) as store:
                store.add(small_task("late", seed=9))
                moved.append(store.gc(repack_all=True))
        return plain(*arguments)

    with Store(filled) as store:
        store.gc(repack_all=True)
    monkeypatch.setattr(integrity, step, move_first)
    monkeypatch.setattr(integrity, "can_fork", lambda: False)
    if not unlinks:
        monkeypatch.setattr(opened.OpenStore, "unlink_doomed", lambda _: None)
    assert integrity.check(filled).ok
    assert moved


def test_a_damaged_tensor_is_named_with_the_tasks_it_hits_and_mended_from_another_store(
    filled: Path, tmp_path: Path
) -> None:
    shutil.copytree(filled, tmp_path / "copy")
    before = everything(filled)
    shared = small_task("one").tensors["head.weight"]
    hit = [pack for pack in packs_of(filled) if bytes(shared.data) in pack.read_bytes()]
    assert len(hit) == 1
    flip(hit[0], 8 * hit[0].read_bytes().index(bytes(shared.data)))
    report = verify(filled)
    assert [(d.digest, d.tasks, d.versions) for d in report.damaged] == [
        (shared.digest, ["one", "two"], ["one@1", "two@1"])
    ]
    assert "verify --repair FROM" in report.advice[0]
    alone = repair(filled)
    assert [damage.digest for damage in alone.missing] == [shared.digest]
    assert [damage.digest for damage in verify(filled).damaged] == [shared.digest]
    mended = repair(filled, [tmp_path / "copy"])
    assert (mended.healed, mended.missing) == ([shared.digest], [])
    assert verify(filled).ok
    assert everything(filled) == before


def test_a_lost_pack_is_mended_from_checkpoints(filled: Path, tmp_path: Path) -> None:
    before = everything(filled)
    write_checkpoint(tmp_path / "one.safetensors", small_task("one"))
    shared = small_task("one").tensors["head.weight"]
    for pack in packs_of(filled):
        if bytes(shared.data) in pack.read_bytes():
            pack.unlink()
    assert len(verify(filled).damaged) == 4
    assert repair(filled, [tmp_path / "one.safetensors"]).missing == []
    assert verify(filled).ok
    assert everything(filled) == before
    rebuild(filled)
    assert everything(filled) == before


def packs_of(path: Path) -> list[Path]:
    return sorted((path / "packs").rglob("*.safetensors"))


@pytest.mark.parametrize("way", ["intact", "lost", "garbage", "truncated", "empty"])
def test_rebuild_brings_everything_back_from_the_packs_alone(filled: Path, way: str) -> None:
    before = everything(filled)
    index = filled / "index"
    if way == "lost":
        shutil.rmtree(index)
        with pytest.raises(NotFoundError):
            Store(filled)
    elif way == "garbage":
        (index / "data.mdb").write_bytes(random.Random(0).randbytes(40960))
    elif way == "truncated":
        os.truncate(index / "data.mdb", 9000)
    elif way == "empty":
        os.truncate(index / "data.mdb", 0)
    if way not in ("intact", "empty"):
        report = verify(filled)
        assert report.index
        assert "pear-store rebuild" in report.advice[0]
        assert report.damaged == []
    found = rebuild(filled)
    assert (found.tasks, found.versions, found.problems) == (3, 4, [])
    assert everything(filled) == before
    assert verify(filled).ok
    with Store(filled) as store:
        assert store.get("three@prod").record == store.get("three@1").record
        with pytest.raises(NotFoundError, match="no version 2 of task 'three'"):
            store.get("three@2")
        assert store.add(small_task("three", seed=9)).version == 4  # numbers are not used twice, nor after this
        store.gc(repack_all=True)
        shutil.rmtree(filled / "index")
    rebuild(filled)
    with Store(filled) as store:
        assert [v.version for v in store.versions("three")] == [1, 3, 4]
        assert not store.add(small_task("three", seed=9)).changed


def test_numbers_and_removals_outlive_everything_else_of_a_task(store: Store) -> None:
    for seed in range(3):
        store.add(small_task(seed=seed))
    store.add(small_task("other", seed=8))
    store.remove("dtd")
    for _ in range(3):
        store.gc(repack_all=True)
    assert len(packs(store)) == 1
    rebuild(store.path)
    assert [v.task for v in store.tasks()] == ["other"]
    assert store.add(small_task()).version == 4


def test_an_open_store_changes_over_to_a_rebuilt_index(filled: Path) -> None:
    with Store(filled) as reader, Store(filled) as writer:
        held = reader.get("one", copy=False)
        rebuild(filled)
        assert writer.add(small_task("four", seed=44)).changed
        assert contents(reader.get("four")) == contents(small_task("four", seed=44))
        assert contents(held) == contents(small_task("one"))
    assert verify(filled).ok


def test_a_rebuild_cut_off_between_its_renames_is_finished_by_the_next_open(filled: Path) -> None:
    before = everything(filled)
    (filled / "index").rename(filled / "index.new")
    assert everything(filled) == before
    assert (filled / "index").exists()


def test_a_pack_of_a_commit_that_never_came_is_not_resurrected(filled: Path) -> None:
    """A process that dies between rename and commit leaves a pack that records a version nobody was promised."""
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
        f"Store({str(filled)!r}).add(small_task('one', seed=77))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    with Store(filled) as store:
        assert store.add(small_task("one", seed=78)).version == 2
    assert list((filled / "tmp").iterdir()) == []
    before = everything(filled)
    rebuild(filled)
    assert everything(filled) == before
    with Store(filled) as store:
        assert contents(store.get("one@2")) == contents(small_task("one", seed=78))


def test_a_pack_with_a_damaged_header_costs_only_what_it_recorded(filled: Path) -> None:
    before = everything(filled)
    (pack,) = [p for p in packs_of(filled) if b'"task\\":\\"one' in p.read_bytes()]
    content = pack.read_bytes()
    flip(pack, 8 * content.index(b"pear-pack/"))
    report = verify(filled)
    assert report.damaged_packs == [pack.stem]
    assert report.damaged == []
    assert repair(filled).missing == []
    assert verify(filled).ok
    assert everything(filled) == before
    assert rebuild(filled).problems == []
    assert everything(filled) == before


def test_what_a_rebuild_cannot_read_is_set_aside_not_collected(filled: Path) -> None:
    (pack,) = [p for p in packs_of(filled) if b'"task\\":\\"one' in p.read_bytes()]
    flip(pack, 8 * 9 + 3)
    assert verify(filled).damaged_packs == [pack.stem]
    found = rebuild(filled)
    assert "moved to" in found.problems[0]
    with Store(filled) as store:
        store.gc(repack_all=True)
        assert (filled / "damaged" / pack.name).exists()
        with pytest.raises(DamagedError):
            store.get("two")  # shared its tensors
        assert contents(store.get("three")) == contents(small_task("three", seed=5))
        assert store.add(small_task("one")).version == 1
        assert contents(store.get("two"))["" or next(iter(contents(small_task("one"))))]
        store.gc(repack_all=True)
        store.get("two")
    assert verify(filled).ok


def test_repair_of_a_damaged_index_asks_for_a_rebuild(filled: Path) -> None:
    (filled / "index" / "data.mdb").write_bytes(b"\0" * 40960)
    with pytest.raises(DamagedIndexError, match="'pear-store rebuild' makes it anew from the packs"):
        repair(filled)


FLIPS = int(os.environ.get("PEAR_FLIPS", "60"))


def test_a_tag_that_damage_hides_is_missed(filled: Path) -> None:
    """Its key now lies where nobody looks for the task's tags."""
    index = filled / "index" / "data.mdb"
    data = index.read_bytes()
    assert b"three\0prod" in data
    index.write_bytes(data.replace(b"three\0prod", b"three\1prod"))
    with Store(filled) as store, pytest.raises(DamagedError):
        store.resolve("three@1")


@pytest.mark.parametrize("where", ["index", "packs"])
def test_flipped_bits_are_never_handed_out_are_named_and_are_mended(filled: Path, tmp_path: Path, where: str) -> None:
    """One bit at a time, anywhere; a reader in a process of its own, since a damaged LMDB page can kill it."""
    before = everything(filled)
    shutil.rmtree(str(rebuild(filled).old_index))  # few stale pages are left in a fresh index
    shutil.copytree(filled, tmp_path / "good")
    files = [filled / "index" / "data.mdb"] if where == "index" else packs_of(filled)
    rng = random.Random(7 if where == "index" else 8)
    expected = json.loads(json.dumps(describe(before)))
    named = 0
    for _ in range(FLIPS // 2):
        file = rng.choice(files)
        used = [at for at, byte in enumerate(file.read_bytes()) if byte]  # most of LMDB's pages are empty
        flip(file, 8 * rng.choice(used) + rng.randrange(8))
        reader = subprocess.run(
            [sys.executable, "-m", "tests.helpers.reader", str(filled)],
            cwd=ROOT, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        if reader.returncode == 0:
            found = json.loads(reader.stdout)
            assert found.pop("three@2") == "error"  # it was removed
            for key, value in found.items():
                assert value in ("error", expected.get(key)), (key, file)
            wrong = "error" in found.values()
        else:
            assert reader.returncode < 0, reader.stderr  # killed by LMDB; our own errors are caught in there
            wrong = True
        report = verify(filled)
        named += not report.ok
        assert not (wrong and report.ok), (file, reader.stdout)
        if report.index:
            rebuild(filled)
        elif not report.ok:
            assert repair(filled, [tmp_path / "good"]).missing == []
        assert everything(filled) == before
        assert verify(filled).ok
        shutil.rmtree(filled)
        shutil.copytree(tmp_path / "good", filled)
    assert named > FLIPS // 10
    keep_log(f"{FLIPS // 2} flipped bits in the {where}: 0 wrong, {named} named by verify, all mended")


def describe(found: dict[str, tuple[int, tuple[str, ...], dict[str, bytes]]]) -> dict[str, object]:
    return {key: [time_ns, list(tags), sorted(held)] for key, (time_ns, tags, held) in found.items()}


def test_a_kill_in_a_rebuild_leaves_the_old_index_or_the_new(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = everything(filled)

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pear_store.local.contests.Contests._settle_names", stop)
    with pytest.raises(KeyboardInterrupt):
        rebuild(filled)
    monkeypatch.undo()
    assert everything(filled) == before
    rebuild(filled)
    assert everything(filled) == before


def test_what_is_added_after_a_sweep_that_found_nothing_is_not_repacked_away(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a sweep commits nothing, and the next writer has its number."""
    list(store.add_many([small_task(name, seed=ord(name)) for name in "ab"]))
    store.remove("a")
    assert store.gc().dead_bytes > 0
    steps = repack.steps

    def steps_after_another_added(*args: Any) -> Any:
        with Store(store.path) as other:
            assert other.add(small_task("new", seed=ord("a"))).new_bytes == 0  # the dead tensors serve again
        return steps(*args)

    monkeypatch.setattr(gc, "steps", steps_after_another_added)
    store.gc(repack_all=True)
    monkeypatch.undo()
    with Store(store.path) as fresh:
        for name, seed in (("new", "a"), ("b", "b")):
            assert contents(fresh.get(name)) == contents(small_task(name, seed=ord(seed)))
    assert verify(store.path).ok


def test_a_rebuild_between_a_repack_and_its_unlinking_loses_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rebuilt index may name the old packs again."""
    for name in "abcd":
        store.add(small_task(name, seed=ord(name)))
    store.remove("d")
    unlink = opened.OpenStore.unlink_doomed

    def unlink_after_a_rebuild(self: opened.OpenStore) -> None:
        rebuild(store.path)
        unlink(self)

    monkeypatch.setattr(opened.OpenStore, "unlink_doomed", unlink_after_a_rebuild)
    store.gc(repack_all=True)
    monkeypatch.undo()
    store.gc(repack_all=True)
    with Store(store.path) as fresh:
        for name in "abc":
            assert contents(fresh.get(name)) == contents(small_task(name, seed=ord(name)))
    assert verify(store.path).ok


def test_a_number_is_not_used_twice_after_removal_rebuild_and_repack(store: Store) -> None:
    """The pack that records the removal is then the one that tells the highest number."""
    store.add(small_task("a"))
    store.add(small_task("b", seed=1))
    store.remove("a")
    rebuild(store.path)
    with Store(store.path) as fresh:
        fresh.gc()
        fresh.gc(repack_all=True)
        assert verify(store.path).ok
        rebuild(store.path)
        assert fresh.add(small_task("a")).version == 2


def test_a_copy_of_a_pack_under_another_folder_is_passed_over(store: Store) -> None:
    store.add(small_task())
    (pack,) = (store.path / "packs").glob("*/*.safetensors")
    shutil.copytree(pack.parent, pack.parent.with_name("copy"))
    rebuild(store.path)
    assert verify(store.path).ok
    with Store(store.path) as fresh:
        fresh.gc()
        assert contents(fresh.get("dtd")) == contents(small_task())


def test_verify_sees_a_tensor_that_its_pack_no_longer_names(store: Store) -> None:
    """One digit of a digest in the pack's header differs: the index finds the bytes, a rebuild would not."""
    store.add(small_task())
    (pack,) = (store.path / "packs").glob("*/*.safetensors")
    content = pack.read_bytes()
    at = content.index(b'"sha256:') + 8
    pack.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    report = verify(store.path)
    assert report.damaged_packs == [pack.stem]
    assert report.damaged == []
    repair(store.path)
    assert verify(store.path).ok
    assert rebuild(store.path).problems == []
    with Store(store.path) as fresh:
        assert contents(fresh.get("dtd")) == contents(small_task())


def test_an_emptied_pack_is_named(store: Store) -> None:
    store.add(small_task())
    (pack,) = (store.path / "packs").glob("*/*.safetensors")
    pack.write_bytes(b"")
    with Store(store.path) as fresh, pytest.raises(DamagedError, match="0 bytes on disk"):
        fresh.get("dtd")


def test_repair_from_a_place_that_is_not_there_is_refused_first(store: Store, tmp_path: Path) -> None:
    store.add(small_task())
    with pytest.raises(NotFoundError, match="nowhere: no such store, file or directory; nothing was repaired"):
        repair(store.path, [tmp_path / "nowhere"])
