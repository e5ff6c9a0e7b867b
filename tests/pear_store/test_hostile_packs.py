"""Whatever bytes lie in packs/ or in index rows: our own errors, bounded memory, the good is kept, the bad is named."""

import base64
import copy
import hashlib
import json
import os
import resource
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_store import PearStoreError, Store, rebuild, verify
from pear_store.format.deflate import deflated
from pear_store.local.index import TABLES, View
from pear_store.local.packs import read_records
from tests.helpers.makers import container, small_task
from tests.pear_store.test_contradictions import change
from tests.pear_store.test_store import contents

pytestmark = pytest.mark.slow

GOOD = contents(small_task())
MOST_BYTES = 1 << 30


def pack(record: Any, metadata: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None) -> bytes:
    """A pack around any record, its checksum right."""
    text = record if isinstance(record, str) else json.dumps(record)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    head = {"__metadata__": {"pear": text, "pear.sha256": digest, **(metadata or {})}, **(tensors or {})}
    return container(json.dumps(head))


def record(**changes: Any) -> dict[str, Any]:
    return {"format": "pear-pack/1", "id": "0" * 32, "versions": [], **changes}


def version(manifest: Any = None, **changes: Any) -> dict[str, Any]:
    return {"task": "bad", "version": 1, "time_ns": 5, "manifest": manifest or "0" * 64, **changes}


def with_manifest(text: str, **changes: Any) -> bytes:
    name = hashlib.sha256(text.encode()).hexdigest()
    return pack(record(versions=[version(name, **changes)]), {name: text})


def deflated_as(value: bytes | str, text: bytes = b"{}", versions: int = 1) -> bytes:
    """A pack of format 2 that has such a value as the manifest of `text`."""
    name = hashlib.sha256(text).hexdigest()
    value = value if isinstance(value, str) else base64.b64encode(value).decode()
    listed = [version(name, version=n + 1) for n in range(versions)]
    return pack(record(format="pear-pack/2", versions=listed), {name: value})


def many_that_inflate() -> bytes:
    """1,000 manifests of 64 KB each that say that they stand for 64 MB."""
    bomb = base64.b64encode(deflated(b" " * (64 << 20))).decode()
    names = ["%064x" % n for n in range(1000)]
    listed = [version(name, version=n + 1) for n, name in enumerate(names)]
    return pack(record(format="pear-pack/2", versions=listed), dict.fromkeys(names, bomb))


def many(count: int) -> bytes:
    name = hashlib.sha256(b"{}").hexdigest()
    return pack(record(versions=[version(name, version=n + 1) for n in range(count)]), {name: "{}"})


def one_long_manifest_many_times() -> bytes:
    """Each version's manifest is the same 1 MB: copied for each, they would be 20 GB."""
    text = json.dumps({"adapters": {}, "head": None, "notes": "x" * 1_000_000})
    name = hashlib.sha256(text.encode()).hexdigest()
    return pack(record(versions=[version(name, version=n + 1) for n in range(20_000)]), {name: text})


NAMED = hashlib.sha256(b"{}").hexdigest()
LONG = "9" * 10_000
DEEP = "[" * 5000 + "]" * 5000
FORMS: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "short": lambda: b"\x01",
    "a header of 2^63 bytes": lambda: struct.pack("<Q", 2**63) + b"{}",
    "a header that is cut off": lambda: struct.pack("<Q", 1000) + b"{",
    "a header that is not UTF-8": lambda: container(b'{"__metadata__": {"pear": "\xff\xfe"}}'),
    "a header of a list": lambda: container("[]"),
    "a deep header": lambda: container(DEEP),
    "metadata of numbers": lambda: container('{"__metadata__": {"pear": 3}}'),
    "no record": lambda: container("{}"),
    "a lone surrogate in the record": lambda: container('{"__metadata__": {"pear": "\\ud800", "pear.sha256": "0"}}'),
    "a record of a list": lambda: pack([]),
    "a record of null": lambda: pack(None),
    "a deep record": lambda: pack(DEEP),
    "a record with a key twice": lambda: pack('{"format": "pear-pack/1", "format": "pear-pack/1", "versions": []}'),
    "a record with NaN": lambda: pack('{"format": "pear-pack/1", "versions": [], "commit": NaN}'),
    "a record with a number of 10,000 digits": lambda: pack('{"format": "pear-pack/1", "commit": %s}' % LONG),
    "another format": lambda: pack(record(format="pear-pack/9")),
    "versions of an object": lambda: pack(record(versions={"a": 1})),
    "versions of a number": lambda: pack(record(versions=7)),
    "a version of a text": lambda: pack(record(versions=["x"])),
    "a version of null": lambda: pack(record(versions=[None])),
    "a version without keys": lambda: pack(record(versions=[{}])),
    "a manifest that is a list": lambda: pack(record(versions=[version([1])])),
    "a manifest that is not there": lambda: pack(record(versions=[version()])),
    "a version 0": lambda: pack(record(versions=[version(NAMED, version=0)]), {NAMED: "{}"}),
    "a version -1": lambda: pack(record(versions=[version(NAMED, version=-1)]), {NAMED: "{}"}),
    "a version 1.0": lambda: pack(record(versions=[version(NAMED, version=1.0)]), {NAMED: "{}"}),
    "a version true": lambda: pack(record(versions=[version(NAMED, version=True)]), {NAMED: "{}"}),
    "a version 2^32": lambda: pack(record(versions=[version(NAMED, version=2**32)]), {NAMED: "{}"}),
    "a time of -1": lambda: pack(record(versions=[version(NAMED, time_ns=-1)]), {NAMED: "{}"}),
    "a time of 2^64": lambda: pack(record(versions=[version(NAMED, time_ns=2**64)]), {NAMED: "{}"}),
    "a time of 10^300": lambda: pack(record(versions=[version(NAMED, time_ns=1e300)]), {NAMED: "{}"}),
    "a time that is a text": lambda: pack(record(versions=[version(NAMED, time_ns="5")]), {NAMED: "{}"}),
    "a task of a list": lambda: pack(record(versions=[version(NAMED, task=["a"])]), {NAMED: "{}"}),
    "a task that is a path": lambda: pack(record(versions=[version(NAMED, task="../x")]), {NAMED: "{}"}),
    "a task with a NUL": lambda: pack(record(versions=[version(NAMED, task="a\0b")]), {NAMED: "{}"}),
    "a task of letters that fold": lambda: pack(record(versions=[version(NAMED, task="K")]), {NAMED: "{}"}),
    "a manifest of {}": lambda: with_manifest("{}"),
    "a manifest of []": lambda: with_manifest("[]"),
    "a manifest that is no JSON": lambda: with_manifest("{"),
    "a deep manifest": lambda: with_manifest(DEEP),
    "a manifest without a head": lambda: with_manifest('{"adapters": {}}'),
    "adapters that are a text": lambda: with_manifest('{"adapters": "down", "head": null}'),
    "an adapter that is a text": lambda: with_manifest('{"adapters": {"a": "down up"}, "head": null}'),
    "an adapter of lists": lambda: with_manifest('{"adapters": {"a": {"down": [], "up": []}}, "head": null}'),
    "names that are no digests": lambda: with_manifest('{"adapters": {"a": {"down": "x", "up": "y"}}, "head": null}'),
    "a record that only names tensors": lambda: with_manifest('{"adapters": {}, "head": null}'),
    "a tensor that no pack has": lambda: with_manifest(
        json.dumps({"adapters": {"a": {"down": "sha256:" + "1" * 64, "up": "sha256:" + "1" * 64}}, "head": None})
    ),
    "a task of another version": lambda: pack(record(versions=[version(NAMED, task="dtd", version=1)]), {NAMED: "{}"}),
    "a name that differs in case": lambda: pack(record(versions=[version(NAMED, task="DTD")]), {NAMED: "{}"}),
    "removed of numbers": lambda: pack(record(removed=[1, 2])),
    "removed of three": lambda: pack(record(removed=[["other", 1, 2]])),
    "removed manifests of numbers": lambda: pack(record(removed=[["other", 1]], removed_manifests=[3])),
    "removed what never was": lambda: pack(record(removed=[["other", 2**32 - 1]])),
    "tags of numbers": lambda: pack(record(tags=[3])),
    "a tag of null": lambda: pack(record(tags=[{"task": "dtd", "tag": None, "version": 1, "time_ns": 1}])),
    "a tag of a version that is not there": lambda: pack(
        record(tags=[{"task": "dtd", "tag": "prod", "version": 9, "time_ns": 1}])
    ),
    "a tag far in the future": lambda: pack(
        record(tags=[{"task": "dtd", "tag": "prod", "version": 1, "time_ns": 2**63 - 1}])
    ),
    "highest of a list": lambda: pack(record(highest=[1])),
    "highest of 2^32": lambda: pack(record(highest={"dtd": 2**32})),
    "highest of 1.5": lambda: pack(record(highest={"dtd": 1.5})),
    "a commit of -1": lambda: pack(record(commit=-1)),
    "a commit of 2^64": lambda: pack(record(commit=2**64, store="x")),
    "a store of a list": lambda: pack(record(store=[1])),
    "after a number": lambda: pack(record(after=[5])),
    "after an object": lambda: pack(record(after={"a": 1})),
    "many packs before": lambda: pack(record(commit=2**63 - 1, after=["%064x" % n for n in range(20_000)])),
    "offsets below 0": lambda: pack(
        record(), tensors={"sha256:" + "1" * 64: {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}
    ),
    "a tensor of 2^60 numbers": lambda: pack(
        record(), tensors={"sha256:" + "1" * 64: {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}}
    ),
    "tensors without bytes": lambda: pack(
        record(),
        tensors={"sha256:%064x" % n: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(20_000)},
    ),
    "20,000 versions": lambda: many(20_000),
    "a deflated manifest of nothing": lambda: deflated_as(""),
    "a manifest that is no base 64": lambda: deflated_as("~~~~ {}"),
    "a manifest that is no stream": lambda: deflated_as(b"{}"),
    "a manifest that is cut off": lambda: deflated_as(deflated(b"{}")[:-5]),
    "a stream without a dictionary": lambda: deflated_as(zlib.compress(b"{}")),
    "a stream of another dictionary": lambda: deflated_as(b"\x78\xf9\x00\x00\x00\x01\xab"),
    "a manifest that inflates to 1 GB": lambda: deflated_as(deflated(bytes(1 << 30)), versions=20_000),
    "1,000 manifests that inflate to 64 MB": many_that_inflate,
    "20,000 versions of 1 MB": one_long_manifest_many_times,
}


@contextmanager
def bounded() -> Iterator[None]:
    """This process may take so much more memory, and no more."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    # LMDB reserves addresses for an index that grows: those are no memory
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES + (4 << 40), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def attempt(do: Callable[[], Any]) -> Any:
    """What it returns; None if it says in a line why it cannot."""
    try:
        return do()
    except PearStoreError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 2000
        return None


def use_all(path: Path) -> None:
    """Everything that one does with a store, each in our own errors or none."""
    attempt(lambda: verify(path))
    with Store(path) as store:
        attempt(store.stats)
        attempt(lambda: [store.get(f"{v.task}@{v.version}") for v in store.tasks()])
        attempt(lambda: store.versions("dtd"))
        attempt(lambda: store.gc(dry_run=True))
        attempt(lambda: store.gc(repack_all=True))
        attempt(lambda: store.add(small_task("bad", seed=3)))


def plant(path: Path, content: bytes) -> Path:
    name = hashlib.sha256(content).hexdigest()
    file = path / "packs" / name[:2] / f"{name}.safetensors"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("form", FORMS)
def test_a_crafted_pack_costs_nothing_but_itself(store: Store, form: str) -> None:
    store.add(small_task())
    plant(store.path, FORMS[form]())
    use_all(store.path)
    with Store(store.path) as before:
        assert contents(before.get("dtd@1")) == GOOD
    rebuild(store.path)
    rebuild(store.path)
    use_all(store.path)
    assert verify(store.path).index is None
    with Store(store.path) as after:
        kept = {v.version: contents(after.get(f"dtd@{v.version}")) for v in after.versions() if v.task.lower() == "dtd"}
        assert GOOD in kept.values()
        assert contents(after.get(f"dtd@{max(kept)}" if 1 not in kept else "dtd@1")) == GOOD


def test_a_task_whose_numbers_are_used_up_says_so(store: Store) -> None:
    store.add(small_task())
    plant(store.path, pack(record(highest={"dtd": 2**32 - 1})))
    rebuild(store.path)
    with Store(store.path) as full:
        with pytest.raises(PearStoreError, match="'dtd' has used up its version numbers, the last is 4294967295"):
            full.add(small_task(seed=2))
        assert full.add(small_task("other", seed=2)).version == 1
        assert contents(full.get("dtd")) == GOOD
    assert verify(store.path).ok


def sealed(key: bytes, body: bytes) -> bytes:
    return body + zlib.crc32(key + body).to_bytes(4, "little")


ROWS: list[Callable[[bytes, bytes], bytes]] = [
    lambda key, row: b"",
    lambda key, row: row[:3],
    lambda key, row: row[:-5],
    lambda key, row: row + b"\0",
    lambda key, row: sealed(key, b""),
    lambda key, row: sealed(key, row[:3]),
    lambda key, row: sealed(key, row[:-5]),
    lambda key, row: sealed(key, b"\xff" * len(row)),
    lambda key, row: sealed(key, bytes(len(row))),
    lambda key, row: sealed(key, row[:-4] + b"\xff" * 9),
    lambda key, row: sealed(key, b"\xff\xff\xff\xff" + zlib.compress(bytes(1 << 24))),
    lambda key, row: sealed(key, (1 << 24).to_bytes(4, "little") + zlib.compress(bytes(13 << 24))),
    lambda key, row: struct.pack("<II", zlib.crc32(key), 0) + zlib.compress(bytes(1 << 24)),
    lambda key, row: struct.pack("<IIII", zlib.crc32(key + b"\xff" * 8), 2, 2**32 - 1, 2**32 - 1),
    lambda key, row: struct.pack("<II", zlib.crc32(key), 2**32 - 1),
]


EVERY = 1 if "PEAR_CRAFTED" in os.environ else 6  # make faults tries all


@pytest.mark.parametrize(("table", "form"), [*product(TABLES, range(len(ROWS)))][::EVERY])
def test_a_crafted_row_is_an_error_of_ours_and_a_rebuild_mends_it(store: Store, table: str, form: int) -> None:
    store.add(small_task())
    store.add(small_task(seed=2))
    store.tag("dtd@1", "prod")
    store.remove("dtd@2")

    def craft(view: View) -> None:
        for key, row in list(view.rows(table)):
            if key != b"format":
                view.put(table, key, ROWS[form](key, row))

    change(store.path, craft)
    with bounded():
        use_all(store.path)
        rebuild(store.path)
    with Store(store.path) as mended:
        assert contents(mended.get("dtd@1")) == GOOD


CRAFTED_KEYS = [b"x", b"\xff" * 8, b"a\0b", b"a" * 101 + b"\0\0\0\0\1", b"\xc3\x9f\0\0\0\0\1", b"k" * 32]


@pytest.mark.parametrize(("table", "key"), [*product(TABLES, CRAFTED_KEYS)][::EVERY])
def test_a_row_under_a_crafted_key_is_an_error_of_ours(store: Store, table: str, key: bytes) -> None:
    store.add(small_task())
    change(store.path, lambda view: view.put(table, key, sealed(key, next(view.rows(table), (b"", b""))[1][:-4])))
    with bounded():
        use_all(store.path)
        rebuild(store.path)
    assert verify(store.path).ok


@pytest.mark.parametrize("number", [2**28 + 1, 2**32 - 1, 2**33, 2**62, 2**64 - 1])
def test_a_crafted_count_of_numbers_takes_no_memory(store: Store, number: int) -> None:
    store.add(small_task())
    change(store.path, lambda view: view.put_meta(b"next_number", number.to_bytes(8, "little")))
    with bounded():
        use_all(store.path)
    assert "far beyond what is stored" in str(verify(store.path).index)


VALUES = st.recursive(
    st.none() | st.booleans() | st.sampled_from([-1, 0, 1, 2, 2**32 - 1, 2**32, 2**64, 1.5, "dtd", "prod", "0" * 64]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
    max_leaves=6,
)


def sound_record() -> dict[str, Any]:
    return record(
        versions=[version("0" * 64)], removed=[["dtd", 7]], removed_manifests=[None], highest={"dtd": 9},
        tags=[{"task": "dtd", "tag": "prod", "version": 1, "time_ns": 3}], store="s", commit=3, after=["0" * 64],
    )  # fmt: skip


@settings(max_examples=150)
@given(st.sampled_from(sorted(sound_record())), VALUES, st.integers(0, 3))
def test_any_value_of_any_field_of_a_record(
    tmp_path_factory: pytest.TempPathFactory, field: str, value: object, depth: int
) -> None:
    """The reader alone: DamagedError or records."""
    changed = copy.deepcopy(sound_record())
    if depth and isinstance(changed[field], list) and changed[field]:
        inner = changed[field]
        if depth > 1 and isinstance(inner[0], dict):
            key = sorted(inner[0])[depth % len(inner[0])]
            inner[0][key] = value
        else:
            inner[0] = value
    else:
        changed[field] = value
    file = tmp_path_factory.getbasetemp() / ("0" * 64 + ".safetensors")
    file.write_bytes(pack(changed))
    attempt(lambda: read_records(file))
