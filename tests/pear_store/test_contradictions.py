"""Rows that contradict one another, or the packs: verify names each, and gc deletes nothing by them."""

import shutil
from array import array
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path
from typing import Any

import pytest

from pear_store import DamagedError, DamagedIndexError, PearStoreError, Store, rebuild, verify
from pear_store.local.index import INDEX_FORMAT, View, open_index, release_index
from pear_store.local.packs import WrittenPack, place_pack
from pear_store.local.rows import (
    NO_PACK,
    ContentsRow,
    ManifestRow,
    NameRow,
    PackRow,
    RemovedRow,
    TagRow,
    TensorRow,
    VersionRow,
    tag_key,
    version_key,
)
from tests.helpers.makers import small_task
from tests.pear_store.test_integrity import everything
from tests.pear_store.test_store import contents, packs

pytestmark = pytest.mark.slow

Rows = list[tuple[bytes, bytes]]


def change(path: Path, do: Callable[[View], object]) -> None:
    """Changes the index, rows' checksums included, as only a fault of ours could."""
    index = open_index(path / "index")
    try:
        index.write(do)
    finally:
        release_index(index)


def rows(view: View, table: str) -> Rows:
    return list(view.rows(table))


def number_used_twice_by_tensors(view: View) -> None:
    (_, one), (key, two), *_ = rows(view, "tensors")
    row = TensorRow.peek(two)._replace(number=TensorRow.number_of(one))
    view.put("tensors", key, row.encode(key))


def number_of_a_tensor_and_a_manifest(view: View) -> None:
    number = TensorRow.number_of(rows(view, "tensors")[0][1])
    renumber_manifest(view, number)


def renumber_manifest(view: View, number: int) -> None:
    key, row = rows(view, "manifests")[0]
    names = sorted(digest for digest, _ in rows(view, "tensors"))
    numbers = set(ManifestRow.decode(key, row).tensors)
    tensors = [view.get("tensors", name) or b"" for name in names]
    used = [tensor for tensor in tensors if TensorRow.number_of(tensor) in numbers]
    view.put("manifests", key, ManifestRow.encode(key, number, used, ManifestRow.manifest_of(row)))


def number_used_twice_by_manifests(view: View) -> None:
    renumber_manifest(view, ManifestRow.number_of(rows(view, "manifests")[1][1]))


def number_beyond_the_count(view: View) -> None:
    view.put_meta(b"next_number", (3).to_bytes(8, "little"))


def manifest_number_beyond_the_count(view: View) -> None:
    renumber_manifest(view, view.next_number())


def next_number_is_gone(view: View) -> None:
    view.delete("meta", b"next_number")


def a_manifest_lacks_a_tensor(view: View) -> None:
    key, row = rows(view, "manifests")[0]
    numbers = set(ManifestRow.decode(key, row).tensors)
    used = [value for _, value in rows(view, "tensors") if TensorRow.number_of(value) in numbers]
    view.put(
        "manifests", key, ManifestRow.encode(key, ManifestRow.number_of(row), used[1:], ManifestRow.manifest_of(row))
    )


def contents_list_what_lies_elsewhere(view: View) -> None:
    """One number moves from its pack's contents to another's; the tensors' rows say otherwise."""
    (one, _), (two, _), *_ = (pair for pair in rows(view, "contents") if view.contents.get(pair[0]).numbers)
    a, b = view.contents.get(one), view.contents.get(two)
    number, length = a.numbers[-1], a.lengths[-1]
    view.put("contents", one, a.without({number}).encode(one))
    more = ContentsRow(array("I", [*b.numbers, number]), array("Q", [*b.lengths, length]), b.removed + b"\0")
    view.put("contents", two, more.encode(two))


def a_tensor_lies_elsewhere(view: View) -> None:
    key, value = rows(view, "tensors")[0]
    row = TensorRow.peek(value)
    other = next(pack for pack, _ in rows(view, "packs") if pack != row.pack)
    view.put("tensors", key, row._replace(pack=other).encode(key))


def contents_list_a_tensor_twice(view: View) -> None:
    pack = next(pack for pack, _ in rows(view, "contents") if view.contents.get(pack).numbers)
    row = view.contents.get(pack)
    twice = ContentsRow(array("I", [*row.numbers, row.numbers[0]]), array("Q", [*row.lengths, 8]), row.removed + b"\0")
    view.put("contents", pack, twice.encode(pack))


def contents_say_another_length(view: View) -> None:
    pack = next(pack for pack, _ in rows(view, "contents") if view.contents.get(pack).numbers)
    row = view.contents.get(pack)
    row.lengths[0] += 8
    view.put("contents", pack, row.encode(pack))


def contents_are_gone(view: View) -> None:
    view.delete("contents", rows(view, "contents")[0][0])


def contents_of_no_pack(view: View) -> None:
    view.put("contents", b"x" * 32, ContentsRow(array("I"), array("Q"), b"").encode(b"x" * 32))


def a_name_is_gone(view: View) -> None:
    view.delete("names", b"one")


def a_name_without_versions(view: View) -> None:
    view.put("names", b"none", NameRow("none", 1, 1, rows(view, "packs")[0][0]).encode(b"none"))


def name(view: View, newest: int, highest: int, key: bytes = b"three", pack: bytes | None = None) -> None:
    row = NameRow.decode(key, view.get("names", key) or b"")
    view.put("names", key, NameRow(row.name, newest, highest, pack or row.pack).encode(key))


def newest_is_wrong(view: View) -> None:
    name(view, 1, 3)


def newest_is_none(view: View) -> None:
    name(view, 0, 3)


def highest_is_below_a_version(view: View) -> None:
    name(view, 3, 2)


def highest_is_not_what_its_pack_records(view: View) -> None:
    name(view, 3, 9)


def a_name_under_another_key(view: View) -> None:
    row = view.get("names", b"one") or b""
    view.delete("names", b"one")
    view.put("names", b"uno", NameRow.decode(b"one", row).encode(b"uno"))


def a_version_is_gone(view: View) -> None:
    view.delete("versions", version_key("three", 1))


def a_version_is_gone_and_its_name_agrees(view: View) -> None:
    view.delete("versions", version_key("three", 3))
    name(view, 1, 3)


def version(view: View, **changes: Any) -> None:
    key = version_key("one", 1)
    row = VersionRow.decode(key, view.get("versions", key) or b"")
    view.put("versions", key, row._replace(**changes).encode(key))


def a_version_has_anothers_manifest(view: View) -> None:
    key = version_key("two", 1)
    version(view, manifest=VersionRow.decode(key, view.get("versions", key) or b"").manifest)


def a_version_has_no_manifest(view: View) -> None:
    version(view, manifest=b"m" * 32)


def a_version_is_recorded_elsewhere(view: View) -> None:
    key = version_key("two", 1)
    version(view, pack=VersionRow.decode(key, view.get("versions", key) or b"").pack)


def a_version_is_recorded_nowhere(view: View) -> None:
    version(view, pack=NO_PACK)


def a_version_has_another_time(view: View) -> None:
    version(view, time_ns=5)


def a_version_has_more_bytes(view: View) -> None:
    version(view, size_bytes=1 << 40)


def a_tag_of_no_version(view: View) -> None:
    key = tag_key("three", "prod")
    row = TagRow.decode(key, view.get("tags", key) or b"")
    view.put("tags", key, TagRow(7, row.time_ns, row.pack).encode(key))


def a_tag_that_no_pack_records(view: View) -> None:
    key = tag_key("three", "prod")
    row = TagRow.decode(key, view.get("tags", key) or b"")
    view.put("tags", key, TagRow(3, row.time_ns, row.pack).encode(key))


def a_tag_is_gone(view: View) -> None:
    view.delete("tags", tag_key("three", "prod"))


def removed_and_there(view: View) -> None:
    key = version_key("three", 1)
    pack = VersionRow.decode(key, view.get("versions", key) or b"").pack
    view.put("removed", key, RemovedRow(pack, pack).encode(key))


def a_removal_is_gone(view: View) -> None:
    view.delete("removed", version_key("three", 2))


def a_removal_that_no_pack_records(view: View) -> None:
    key = version_key("three", 2)
    row = RemovedRow.decode(key, view.get("removed", key) or b"")
    view.put("removed", key, RemovedRow(row.recorded_in, row.recorded_in).encode(key))


def a_pack_without_a_file(view: View) -> None:
    view.put("packs", b"p" * 32, PackRow(8, 0).encode(b"p" * 32))
    view.contents.enter(b"p" * 32, [], [])


def a_pack_of_another_size(view: View) -> None:
    pack, value = rows(view, "packs")[0]
    row = PackRow.decode(pack, value)
    view.put("packs", pack, PackRow(row.file_bytes + 8, row.tensor_bytes).encode(pack))


def a_pack_of_more_tensor_bytes(view: View) -> None:
    pack, value = rows(view, "packs")[0]
    row = PackRow.decode(pack, value)
    view.put("packs", pack, PackRow(row.file_bytes, row.tensor_bytes + 8).encode(pack))


def a_pack_is_gone(view: View) -> None:
    view.delete("packs", rows(view, "packs")[0][0])


def a_pack_is_gone_with_its_contents(view: View) -> None:
    view.packs.drop(rows(view, "packs")[0][0])


def a_tensor_is_gone(view: View) -> None:
    view.delete("tensors", rows(view, "tensors")[0][0])


PLANTED = [
    number_used_twice_by_tensors, number_of_a_tensor_and_a_manifest, number_used_twice_by_manifests,
    number_beyond_the_count, manifest_number_beyond_the_count, next_number_is_gone, a_manifest_lacks_a_tensor,
    contents_list_what_lies_elsewhere, a_tensor_lies_elsewhere, contents_list_a_tensor_twice,
    contents_say_another_length, contents_are_gone, contents_of_no_pack, a_name_is_gone, a_name_without_versions,
    newest_is_wrong, newest_is_none, highest_is_below_a_version, highest_is_not_what_its_pack_records,
    a_name_under_another_key, a_version_is_gone, a_version_is_gone_and_its_name_agrees,
    a_version_has_anothers_manifest, a_version_has_no_manifest, a_version_is_recorded_elsewhere,
    a_version_is_recorded_nowhere, a_version_has_another_time, a_version_has_more_bytes, a_tag_of_no_version,
    a_tag_that_no_pack_records, a_tag_is_gone, removed_and_there, a_removal_is_gone, a_removal_that_no_pack_records,
    a_pack_without_a_file, a_pack_of_another_size, a_pack_of_more_tensor_bytes, a_pack_is_gone,
    a_pack_is_gone_with_its_contents, a_tensor_is_gone,
]  # fmt: skip


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_verify_finds_and_gc_survives_every_contradiction(filled: Path, plant: Callable[[View], None]) -> None:
    before = everything(filled)
    change(filled, plant)
    report = verify(filled)
    assert not report.ok
    with Store(filled) as store:
        try:
            store.gc(repack_all=True)
        except PearStoreError as error:
            assert "\n" not in str(error)
    rebuild(filled)
    assert everything(filled) == before
    assert verify(filled).ok


def test_a_flipped_bit_in_the_count_of_numbers_removes_nothing(filled: Path) -> None:
    """One bit made the next tensors share numbers with older ones, and gc took those for dead."""
    before = everything(filled)
    with Store(filled) as store, store._open.read() as view:
        row = view.get("meta", b"next_number") or b""
    for bit in range(8 * len(row)):
        flipped = bytearray(row)
        flipped[bit // 8] ^= 1 << bit % 8
        change(filled, methodcaller("put", "meta", b"next_number", bytes(flipped)))
        with Store(filled) as store:
            with pytest.raises(DamagedError):
                store.add(small_task("four", seed=4))
            with pytest.raises(DamagedError):
                store.gc()
        if bit % 16 == 0:
            assert verify(filled).index
    rebuild(filled)
    assert everything(filled) == before


@pytest.mark.parametrize("repacked", [False, True])
def test_an_old_index_beside_newer_packs_costs_nothing(store: Store, repacked: bool) -> None:
    """As a backup brings it back: gc deletes none of the packs that it does not know, and says which."""
    store.add(small_task("first"))
    store.add(small_task("gone", seed=9))
    store.remove("gone")
    store.close()
    shutil.copytree(store.path / "index", store.path.parent / "backup")
    with Store(store.path) as newer:
        for i in range(5):
            newer.add(small_task(f"t{i}", seed=i))
        newer.add(small_task("first", seed=9))  # of the tensors that are dead in the old index
        newer.tag("first@1", "prod")
        newer.remove("t0")
        if repacked:
            newer.gc(repack_all=True)
    before = everything(store.path)
    shutil.rmtree(store.path / "index")
    shutil.copytree(store.path.parent / "backup", store.path / "index")
    report = verify(store.path)
    assert report.unknown_packs
    assert "pear-store rebuild" in report.advice[0]
    files = packs(store)
    with Store(store.path) as old:
        for options in ({}, {"repack_all": True}, {"dry_run": True}, {"keep": 1}):
            with pytest.raises(
                DamagedIndexError, match="it never had what (1 pack|8 packs) recorded, so nothing was removed"
            ):
                old.gc(**options)
    assert packs(store) == files
    assert rebuild(store.path).problems == []
    assert everything(store.path) == before
    assert verify(store.path).ok
    with Store(store.path) as again:
        again.gc(repack_all=True)
    assert everything(store.path) == before


def test_a_pack_that_the_index_knows_all_of_goes(filled: Path) -> None:
    """A gc that died after its commit leaves those."""
    before = everything(filled)
    shutil.copytree(filled / "packs", filled.parent / "packs")
    with Store(filled) as store:
        store.gc(repack_all=True)
    left = {file.name for file in (filled / "packs").rglob("*.safetensors")}
    shutil.copytree(filled.parent / "packs", filled / "packs", dirs_exist_ok=True)
    assert verify(filled).ok
    with Store(filled) as store:
        store.gc()
    assert {file.name for file in (filled / "packs").rglob("*.safetensors")} == left
    assert everything(filled) == before


def test_a_pack_that_cannot_be_read_is_set_aside(store: Store) -> None:
    store.add(small_task())
    stray = store.path / "packs" / "ab" / ("ab" + "0" * 62 + ".safetensors")
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(b"whose bytes?")
    store.gc()
    assert not stray.exists()
    assert (store.path / "damaged" / stray.name).read_bytes() == b"whose bytes?"


def as_format_3(path: Path, next_number: int | None = None) -> None:
    """An index as it was before the rows of `meta` had checksums, and one for commits."""

    def unseal(view: View) -> None:
        number = view.next_number() if next_number is None else next_number
        store = view.meta(b"id")
        view.put("meta", b"format", b"3")
        view.put("meta", b"next_number", number.to_bytes(8, "little"))
        view.put("meta", b"id", store)
        view.delete("meta", b"commit")

    change(path, unseal)


def test_an_index_of_format_3_is_read_and_sealed_at_the_first_write(filled: Path) -> None:
    before = everything(filled)
    as_format_3(filled)
    assert everything(filled) == before
    assert verify(filled).ok
    with Store(filled) as store:
        store.stats()
        with store._open.read() as view:
            assert view.get("meta", b"format") == b"3"
        store.add(small_task("four", seed=4))
        with store._open.read() as view:
            assert view.get("meta", b"format") == INDEX_FORMAT
            assert len(view.get("meta", b"next_number") or b"") == 12
        store.gc(repack_all=True)
    assert verify(filled).ok
    assert everything(filled) == {**before, **{k: v for k, v in everything(filled).items() if k == "four@1"}}


def test_an_index_of_format_3_whose_count_is_wrong_is_not_sealed(filled: Path) -> None:
    before = everything(filled)
    as_format_3(filled, next_number=4)
    with Store(filled) as store:
        with pytest.raises(DamagedIndexError, match="higher ones are in use; 'pear-store rebuild'"):
            store.add(small_task("four", seed=4))
        with pytest.raises(DamagedIndexError):
            store.gc()
    assert verify(filled).index
    rebuild(filled)
    assert everything(filled) == before


def test_gc_without_hard_links_leaves_no_trace_of_what_died(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no hard links, an empty file in tmp/ says that a pack was placed and not yet committed."""
    import pear_store.local.catalog as catalog
    import pear_store.local.opened as opened

    def no_link(*args: object, **options: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.link", no_link)

    def place_and_die(path: Path, pack: WrittenPack) -> None:
        place_pack(path, pack)
        raise SystemExit

    store.add(small_task())
    assert list((store.path / "tmp").iterdir()) == []
    monkeypatch.setattr(catalog, "place_pack", place_and_die)
    monkeypatch.setattr(opened.OpenStore, "write_packs", lambda self, change, packs: self.write(change))
    with pytest.raises(SystemExit):
        store.add(small_task(seed=5))
    monkeypatch.undo()
    assert len(packs(store)) == 2
    assert store.add(small_task(seed=6)).version == 2
    assert len(packs(store)) == 2
    assert list((store.path / "tmp").iterdir()) == []
    assert contents(store.get("dtd")) == contents(small_task(seed=6))
