"""Manifests take few bytes, whatever they hold, and what earlier versions wrote is read."""

import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pear_store import Store, verify
from pear_store.format.deflate import deflated, inflated
from pear_store.format.dictionaries import EARLIER, LATEST
from pear_store.format.manifest import to_manifest
from pear_store.local import repack
from pear_store.local.packs import read_records
from tests.helpers.makers import small_task
from tests.pear_store.test_store import contents, packs


@given(st.binary(max_size=2000) | st.text(max_size=2000).map(str.encode))
def test_what_was_deflated_inflates(data: bytes) -> None:
    assert inflated(deflated(data), 1 << 20) == data
    assert inflated(deflated(data), max(1, len(data) // 2)) == data[: max(1, len(data) // 2)]


@pytest.mark.parametrize("dictionary", [*EARLIER, LATEST], ids=["of indexes 3 and 4", "latest"])
def test_streams_of_every_dictionary_are_read(dictionary: bytes) -> None:
    stream = zlib.compressobj(1, zdict=dictionary)
    data = to_manifest(small_task())
    assert inflated(stream.compress(data) + stream.flush(), 1 << 20) == data


def test_a_stream_of_an_unknown_dictionary_is_refused() -> None:
    stream = zlib.compressobj(zdict=b"something else")
    with pytest.raises(zlib.error):
        inflated(stream.compress(b"{}") + stream.flush(), 1 << 20)


def test_a_record_is_smaller_than_its_json() -> None:
    manifest = to_manifest(small_task())
    digests = manifest.count(b"sha256:")
    assert len(deflated(manifest)) < 40 * digests + 0.25 * (len(manifest) - 71 * digests)


def test_a_pack_of_a_repack_has_no_more_manifests_than_a_reader_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader bounds what a pack's manifests inflate to, so what a repack writes is bounded, too."""
    tasks = [small_task(f"t{i}", seed=i) for i in range(9)]
    longest = max(len(to_manifest(task)) for task in tasks)
    monkeypatch.setattr(repack, "REPACK_MANIFEST_BYTES", 2 * longest)
    with Store.create(tmp_path / "s") as store:
        for task in tasks:
            store.add(task)
        store.remove("t4")
        store.gc(repack_all=True)
        written = [read_records(path)[1].versions for path in packs(store)]
        assert sorted(map(len, written)) == [2, 2, 2, 2]
        for task in (*tasks[:4], *tasks[5:]):
            assert contents(store.get(task.name)) == contents(task)
    assert verify(tmp_path / "s").ok
