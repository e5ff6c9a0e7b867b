"""What lies in a store's folders is not believed: links, pipes, devices, sockets, others' files."""

import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pear_store import DamagedError, FormatError, PearStoreError, Store, rebuild, repair, verify
from pear_store.local.packs import WrittenPack
from tests.helpers.makers import small_task
from tests.pear_store.test_store import contents, packs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_hang")]

OLD = time.time() - 7200


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Somebody's folder: an old file, one that looks like a pack being written, and another store's pack."""
    folder = tmp_path / "outside"
    folder.mkdir()
    with Store.create(tmp_path / "other") as other:
        other.add(small_task("other", seed=5))
        (pack,) = packs(other)
    for name, data in (("thesis.tex", b"years"), ("0" * 32 + ".safetensors", b"mine"), (pack.name, pack.read_bytes())):
        (folder / name).write_bytes(data)
        os.utime(folder / name, (OLD, OLD))
    return folder


def state(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def replace_by_link(folder: Path, target: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.unlink(missing_ok=True)
    folder.symlink_to(target)


def everything(path: Path) -> None:
    """All that changes a store; each may refuse."""
    acts: list[Callable[[Store], object]] = [
        lambda store: store.add(small_task("new", seed=9)),
        lambda store: store.tag("dtd", "prod"),
        lambda store: store.remove("dtd@1"),
        lambda store: store.gc(repack_all=True),
        lambda store: rebuild(store.path),
        lambda store: repair(store.path),
        lambda store: Store.create(store.path).close(),
    ]
    for act in acts:
        try:
            with Store(path) as store:
                act(store)
        except PearStoreError:
            continue


@pytest.mark.parametrize("name", ["tmp", "packs/FAN", "packs", "damaged", "index.build", "index.new", "index", "lock"])
def test_nothing_behind_a_link_is_created_changed_or_deleted(tmp_path: Path, outside: Path, name: str) -> None:
    with Store.create(tmp_path / "s") as store:
        store.add(small_task())
        store.add(small_task(seed=2))
        fan = next((outside / name).name[:2] for name in os.listdir(outside) if len(name) == 76)
    before = state(outside)
    replace_by_link(tmp_path / "s" / name.replace("FAN", fan), outside)
    everything(tmp_path / "s")
    assert state(outside) == before


def test_gc_names_what_is_not_pears_and_goes_on(store: Store, outside: Path) -> None:
    store.add(small_task())
    orphan = store.path / "packs" / "ab" / ("ab" + "0" * 62 + ".safetensors")
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"left by a crashed add")
    (store.path / "packs" / "ac").mkdir(exist_ok=True)
    strangers = [
        store.path / "packs" / "ab" / "README.safetensors", store.path / "packs" / "notes.txt",
        store.path / "packs" / "ac" / orphan.name, store.path / "tmp" / "results.csv",
    ]  # fmt: skip
    for file in strangers:
        file.write_text("mine")
        os.utime(file, (OLD, OLD))
    (store.path / "tmp" / "folder").mkdir()
    (store.path / "packs" / "zz").symlink_to(outside)
    link = store.path / "packs" / "ab" / ("ab" + "1" * 62 + ".safetensors")
    link.symlink_to(outside / "thesis.tex")
    left = store.path / "tmp" / ("2" * 32 + ".safetensors")
    left.write_bytes(b"left by a killed add")
    os.utime(left, (OLD, OLD))
    found = store.gc()
    assert set(found.foreign) == {
        *map(str, strangers), str(store.path / "tmp" / "folder"), str(store.path / "packs" / "zz"), str(link),
    }  # fmt: skip
    assert not orphan.exists()
    assert not left.exists()
    assert all(os.path.lexists(path) for path in found.foreign)
    assert contents(store.get("dtd")) == contents(small_task())
    assert not store.gc(dry_run=True).foreign


def test_a_rebuild_keeps_what_is_not_pears_in_the_folders_it_replaces(store: Store) -> None:
    store.add(small_task())
    (store.path / "index.build").mkdir()
    (store.path / "index.build" / "notes.txt").write_text("mine")
    with pytest.raises(PearStoreError, match="notes.txt: not a file of Pear's; move it away and run again"):
        rebuild(store.path)
    assert (store.path / "index.build" / "notes.txt").read_text() == "mine"
    assert contents(store.get("dtd")) == contents(small_task())


def make_special(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        try:
            os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero: without an end
        except PermissionError:
            pytest.skip("needs the right to make devices")
    elif kind == "folder":
        path.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as made:
            here = os.open(path.parent, os.O_RDONLY)
            made.bind(f"/proc/self/fd/{here}/{path.name}")  # a socket's own path is short
            os.close(here)


@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "folder"])
@pytest.mark.parametrize("name", ["pack", "index/data.mdb", "index/lock.mdb", "lock"])
def test_no_special_file_hangs_or_grows_anything(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / "s"
    with Store.create(path) as store:
        store.add(small_task())
        store.add(small_task("other", seed=4))
        pack = packs(store)[0]
    special = pack if name == "pack" else path / name
    make_special(special, kind)
    if name == "pack":
        with Store(path) as store:
            damaged = [task for task in ("dtd", "other") if _is_damaged(store, task)]
        assert len(damaged) == 1
        assert verify(path).damaged_packs == [pack.stem]
    elif name == "lock":
        with Store(path) as store:
            store.get("dtd")
            with pytest.raises(FormatError, match="lock: a .*, expected a file of the store's own"):
                store.add(small_task("new", seed=9))
    else:
        with pytest.raises(FormatError, match=r"\.mdb: a .*, expected a file of the store's own"):
            Store(path)
        assert "expected a file of the store's own" in str(verify(path).index)
    everything(path)
    assert os.path.lexists(special) or list(path.glob("index.old-*")) or list(path.glob("damaged/*"))


def _is_damaged(store: Store, task: str) -> bool:
    try:
        store.get(task)
    except DamagedError:
        return True
    return False


@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "folder"])
def test_adding_a_folder_passes_over_what_is_no_file(store: Store, tmp_path: Path, kind: str) -> None:
    make_special(tmp_path / "a.safetensors", kind)
    with pytest.raises(PearStoreError, match=r"a\.safetensors: a .*expected a"):
        store.add(str(tmp_path / "a.safetensors"))


def test_a_store_without_tmp_makes_it_again(store: Store) -> None:
    """Git and some archives leave out empty folders."""
    store.add(small_task())
    (store.path / "tmp").rmdir()
    store.gc()
    store.add(small_task("other", seed=3))
    assert sorted(v.task for v in store.tasks()) == ["dtd", "other"]


def test_a_store_whose_directory_is_a_link_works(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "s").symlink_to(tmp_path / "disk")
    with Store.create(tmp_path / "s") as store:
        store.add(small_task())
        store.gc(repack_all=True)
        rebuild(store.path)
        assert contents(store.get("dtd")) == contents(small_task())


def test_a_system_without_linuxs_own_calls_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has neither."""
    for name in ("posix_fallocate", "posix_fadvise", "sched_getaffinity"):
        monkeypatch.delattr(os, name, raising=False)
    with Store.create(tmp_path / "s") as store:
        for result in store.add_many([small_task(f"t{i}", seed=i) for i in range(3)]):
            assert getattr(result, "changed", False)
        assert (store.path / "index" / "lock.mdb").stat().st_blocks * 512 >= 128 << 10
        assert contents(store.get("t1")) == contents(small_task("t1", seed=1))
    assert verify(tmp_path / "s").ok


def test_a_pack_that_vanishes_from_tmp_while_it_is_added_is_an_error(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not a reason to begin again for ever."""
    import pear_store.local.catalog

    place = pear_store.local.packs.place_pack

    def empty_tmp_first(root: Path, pack: WrittenPack) -> None:
        pack.path.unlink()
        place(root, pack)

    monkeypatch.setattr(pear_store.local.catalog, "place_pack", empty_tmp_first)
    with pytest.raises(PearStoreError, match="No such file"):
        store.add(small_task())
    monkeypatch.undo()
    assert store.add(small_task()).changed
