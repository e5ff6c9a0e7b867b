"""Stores that this process may only read, or not even that; disks that cannot read."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from pear_store import Store, rebuild, repair, verify
from pear_store.cli import main
from pear_store.errors import AccessError
from pear_store.local import verify as integrity
from tests.helpers.makers import floats, small_task
from tests.helpers.users import NOBODY, as_nobody
from tests.pear_store.test_store import contents, packs

pytestmark = pytest.mark.slow


def read_everything(path: Path) -> None:
    with Store(path) as store:
        assert [version.task for version in store.tasks()] == [f"t{i}" for i in range(5)]
        assert [version.task for version in store.iter_tasks()] == [f"t{i}" for i in range(5)]
        for i in range(5):
            assert contents(store.get(f"t{i}", copy=i % 2 == 0)) == contents(small_task(f"t{i}", seed=i))
        assert store.get("t1@prod").name == "t1"
        assert store.resolve("t2").version == 1
        assert len(store.versions()) == 5
        assert store.stats().tasks == 5
        assert store.diff("t1", "t2").head
        assert store.gc(dry_run=True).removed_tensors == 0
        assert len(store.remove("t2", dry_run=True)) == 1
    report = verify(path)
    assert report.ok
    assert report.tensors == 20
    with Store.create(path) as store:  # init of a store that is there
        assert len(store.tasks()) == 5


def refuse_changes(path: Path) -> None:
    acts: list[Callable[[Store], object]] = [
        lambda store: store.add(small_task("new", seed=9)), lambda store: store.tag("t1", "x"),
        lambda store: store.remove("t2"), lambda store: store.gc(), lambda store: rebuild(path),
    ]  # fmt: skip
    with Store(path) as store:
        for act in acts:
            with pytest.raises(AccessError, match=r"(permission denied|read-only file system); to read a store, all"):
                act(store)


@pytest.mark.parametrize("how", ["another user's", "chmod a-w"])
def test_a_store_that_one_may_only_read_is_read(public: Path, how: str) -> None:
    if how == "chmod a-w":
        for file in [public, *public.rglob("*")]:
            os.chown(file, NOBODY, NOBODY)
            file.chmod(file.stat().st_mode & ~0o222)

    def act() -> None:
        read_everything(public)
        refuse_changes(public)

    as_nobody(act)
    assert not list((public / "tmp").iterdir())


def test_a_store_on_a_read_only_mount_is_read(small_disk: Path) -> None:
    with Store.create(small_disk / "s") as store:
        list(store.add_many([small_task(f"t{i}", seed=i) for i in range(5)]))
        store.tag("t1", "prod")
    for lock in (True, False):
        if not lock:
            (small_disk / "s" / "index" / "lock.mdb").unlink()
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        read_everything(small_disk / "s")
        refuse_changes(small_disk / "s")
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)


def test_a_reader_that_may_not_lock_is_right_beside_writers(public: Path) -> None:
    """Writers do not see it, so what it reads is overwritten: it notices, and looks again."""
    for file in public.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    ready, done = os.pipe(), os.pipe()
    writer = os.fork()
    if writer == 0:
        try:
            os.close(done[1])
            with Store(public) as store:
                os.write(ready[1], b"!")
                os.set_blocking(done[0], False)
                i = 0
                while True:
                    try:
                        os.read(done[0], 1)
                        break
                    except BlockingIOError:
                        pass
                    store.add(small_task(f"new{i % 30}", seed=100 + i))
                    if i % 10 == 9:
                        store.remove(f"new{i % 30}")
                        store.gc(repack_all=True)
                    i += 1
            os._exit(0)
        except BaseException:
            os._exit(1)
    os.read(ready[0], 1)

    def act() -> None:
        with Store(public) as store:
            assert store._open.index.is_lockless
            for i in range(100):
                name = f"t{i % 5}"
                assert contents(store.get(name)) == contents(small_task(name, seed=i % 5))
                assert {f"t{k}" for k in range(5)} <= {version.task for version in store.iter_tasks()}

    try:
        as_nobody(act)
    finally:
        os.close(done[1])
        os.close(ready[0])
    assert os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) == 0
    for end in (ready[1], done[0]):
        os.close(end)


def test_what_was_overwritten_under_a_reader_is_looked_up_again(public: Path) -> None:
    def act() -> None:
        with Store(public) as store:
            looks = []

            def look(view: object) -> int:
                looks.append(view)
                if len(looks) < 3:
                    os.write(ask[1], b"!")
                    os.read(answer[0], 1)
                return len(looks)

            assert store._open.look(look) == 3
            iteration = store.iter_tasks()
            assert next(iteration).task == "t0"
            os.write(ask[1], b"!")
            os.read(answer[0], 1)
            assert [version.task for version in iteration] == ["t1", "t2", "t3", "t4"]

    ask, answer = os.pipe(), os.pipe()
    writer = os.fork()
    if writer == 0:
        try:
            with Store(public) as store:
                for round_ in range(3):
                    os.read(ask[0], 1)
                    for i in range(3):
                        store.tag("t1", f"x{round_}{i}")
                    os.write(answer[1], b"!")
            os._exit(0)
        except BaseException:
            os._exit(1)
    as_nobody(act)
    assert os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) == 0
    for end in (*ask, *answer):
        os.close(end)


@pytest.mark.parametrize("part", [".", "index", "index/data.mdb", "packs"])
def test_a_store_that_may_not_be_read_says_so(public: Path, part: str) -> None:
    (public / part).chmod(0)

    def act() -> None:
        acts: dict[str, Callable[[], object]] = {
            "open": lambda: Store(public).get("t1"), "verify": lambda: verify(public), "repair": lambda: repair(public),
            "create": lambda: Store.create(public).get("t1"), "rebuild": lambda: rebuild(public),
        }  # fmt: skip
        for name, do in acts.items():
            with pytest.raises(AccessError, match="permission denied"):
                do()
            assert name
        for command in (["ls"], ["verify"], ["init"], ["show", "t1"]):
            if part == "packs" and command in (["ls"], ["init"]):
                continue  # reads no pack
            found = CliRunner().invoke(main, ["--store", str(public), *command])
            assert found.exit_code == 11, (command, found.output)
            assert "permission denied" in found.output
            assert "no store there" not in found.output

    as_nobody(act)


def test_a_pack_that_may_not_be_read_is_not_called_damaged(public: Path) -> None:
    with Store(public) as store:
        packs(store)[0].chmod(0)

    def act() -> None:
        with pytest.raises(AccessError, match=r"safetensors: permission denied"):
            verify(public)

    as_nobody(act)


def test_a_store_that_may_not_be_made_says_so(public: Path) -> None:
    as_nobody(lambda: _raises_access(lambda: Store.create(public.parent / "new")))


def _raises_access(act: Callable[[], object]) -> None:
    with pytest.raises(AccessError, match="permission denied"):
        act()


# ---- disks that cannot read -----------------------------------------------------------------------------------------


@pytest.fixture
def read_in_here(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Has verify read in this process, where faults are planted."""
    monkeypatch.setattr(integrity, "can_fork", lambda: False)
    checked = integrity._checked
    monkeypatch.setattr(integrity, "_in_child", lambda path, subset: (json.loads(checked(path, subset)), ""))
    return monkeypatch


def test_what_a_disk_cannot_read_is_named_with_the_tasks_it_hits(
    store: Store, tmp_path: Path, read_in_here: pytest.MonkeyPatch
) -> None:
    list(store.add_many([small_task("one", seed=1), small_task("two", seed=2)]))
    shutil.copytree(store.path, tmp_path / "copy")
    (pack,) = packs(store)
    lost = small_task("two", seed=2).tensors["a0.up"]
    place = pack.read_bytes().index(bytes(lost.data))
    pread = os.pread

    def fail(descriptor: int, length: int, offset: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(pack) and offset <= place < offset + length:
            raise OSError(errno.EIO, "Input/output error")
        return pread(descriptor, length, offset)

    read_in_here.setattr(os, "pread", fail)
    report = verify(store.path)
    assert [(damage.digest, damage.tasks) for damage in report.damaged] == [(lost.digest, ["two"])]
    assert report.index is None
    assert report.tensors == 8
    mended = repair(store.path, [tmp_path / "copy"])
    assert (mended.healed, mended.missing) == ([lost.digest], [])
    assert verify(store.path).ok
    assert contents(store.get("two")) == contents(small_task("two", seed=2))


def test_a_pack_that_is_cut_while_it_is_verified_is_named(store: Store, read_in_here: pytest.MonkeyPatch) -> None:
    store.add(small_task())
    store.get("dtd")
    (pack,) = packs(store)
    pread = os.pread

    def cut(descriptor: int, length: int, offset: int) -> bytes:
        os.truncate(pack, 100)
        return pread(descriptor, length, offset)

    read_in_here.setattr(os, "pread", cut)
    report = verify(store.path)
    assert len(report.damaged) == 4
    assert report.index is None


def test_a_pack_without_an_index_is_read_the_same_way(store: Store, read_in_here: pytest.MonkeyPatch) -> None:
    store.add(small_task())
    shutil.rmtree(store.path / "index")

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    read_in_here.setattr(os, "pread", fail)
    report = verify(store.path)
    assert report.index
    assert len(report.damaged) == 4


def test_large_tensors_are_read_in_pieces(store: Store) -> None:
    large = floats(np.random.default_rng(0).normal(size=(6, 100_000)))
    up = floats(np.random.default_rng(1).normal(size=(100_000, 6)))
    store.add(small_task("large", a0__down=large, a0__up=up))
    report = verify(store.path)
    assert report.ok
    assert report.bytes > 4_000_000
