"""Tasks whose small tensors are one tensor in files and stores, and by themselves in memory."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pear_store import CheckpointError, RawTensor, Store, Task, make_task, read_checkpoint, rebuild, repair, verify
from pear_store import write_checkpoint as write
from pear_store.format.checkpoint import ReadBefore, check_record
from pear_store.format.container import container_chunks, read_container
from pear_store.format.digest import tensor_digest
from pear_store.format.joined import join, split_shapes
from pear_store.format.manifest import as_stored, dump_manifest, from_stored, to_manifest
from pear_store.local import loading
from pear_store.local.loading import load_groups
from pear_store.remote.cache import CacheSettings
from pear_store.remote.lazy import RemoteStore
from pear_store.remote.remotes import Remote, add_remote, clone_store, init_remote
from tests.helpers.makers import floats, record, replace_at
from tests.pear_store.test_cli import run
from tests.pear_store.test_loading import outcome
from tests.pear_store.test_loading import small_groups as small_groups
from tests.pear_store.test_store import packs

Json = dict[str, Any]
OWN_BYTES = 4 * (3 * 2 + 2 * 6 + 2 * 6 + 2) + 2 * 2 + (3 * 2 + 6)
"""Scales, an adapter's two sides and the bias in 4 bytes, the head's scales in 2, and codes"""


def on_bases(name: str = "dtd", seed: int = 0, bases: int = 7, **changes: Any) -> Task:
    """3 cores of codes on bases, 2 adapters of the task's own, and a head of codes."""
    rng, common = np.random.default_rng(seed), np.random.default_rng(bases)
    made = {
        "b.down": floats(common.normal(size=(3, 6, 2))), "b.up": floats(common.normal(size=(3, 2, 6))),
        "c.up": RawTensor("U8", (3, 2), rng.bytes(6)), "c.scale": floats(rng.normal(size=(3, 2))),
        "a.down": floats(rng.normal(size=(2, 6, 1))), "a.up": floats(rng.normal(size=(2, 1, 6))),
        "weight": RawTensor("U8", (6,), rng.bytes(6)), "bias": floats(rng.normal(size=2)),
        "rows": RawTensor("F16", (2,), rng.normal(size=2).astype("<f2").tobytes()),
    }  # fmt: skip
    codes = {"bits": 4, "up": {"shape": [2, 2], "scale": "c.scale"}}
    told: Json = {
        "format": "pear-task/3",
        "adapters": {
            "c": {"down": "b.down", "up": "c.up", "basis": "b.up", "quant": codes, "stack": 3},
            "a": {"down": "a.down", "up": "a.up", "stack": 2},
        },
        "positions": {"blocks.0.attn": [["c", 1.0, 0], ["a", 0.5, 1]], "blocks.1.attn": [["c", 1.0, 2], ["a", 1.0, 0]]},
        "head": {
            "weight": "weight", "bias": "bias", "quant": {"bits": 4, "weight": {"shape": [2, 6], "scale": "rows"}},
        },
        "threshold": 0.5,
    }  # fmt: skip
    return make_task(record(name, **{**told, **changes}), made)


def in_file(path: Path) -> tuple[Json, Mapping[str, RawTensor]]:
    """What a file has, as it lies there."""
    metadata, tensors = read_container(path)
    return json.loads(metadata["pear"]), tensors


def put(path: Path, record: Json, tensors: Mapping[str, RawTensor]) -> Path:
    digests = {name: tensor.digest for name, tensor in tensors.items()}
    path.write_bytes(b"".join(container_chunks(tensors, {"pear": json.dumps({**record, "digests": digests})})))
    return path


def values(task: Task) -> Json:
    """What adapters and head are, whatever tensors are called."""
    matrices = {
        f"{name} {matrix.shape} {matrix.rank_axis}": matrix
        for name, adapter in task.adapters.items()
        for matrix in adapter.matrices
    }
    assert task.head is not None
    matrices["head"] = task.head.weight
    found: Json = {
        name: (bytes(matrix.tensor(task.tensors).data), bytes(getattr(matrix.scales(task.tensors), "data", b"")))
        for name, matrix in matrices.items()
    }
    return {**found, "bias": bytes(task.tensors[task.head.bias].data)}


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_file_has_one_tensor_beside_the_bases_and_memory_has_each(tmp_path: Path) -> None:
    task, path = on_bases(), tmp_path / "t.safetensors"
    write(path, task)
    told, tensors = in_file(path)
    assert {name: (raw.dtype, raw.shape) for name, raw in tensors.items()} == {
        "b.down": ("F32", (3, 6, 2)), "b.up": ("F32", (3, 2, 6)), "own": ("U8", (OWN_BYTES,)),
    }  # fmt: skip
    assert told["adapters"]["c"] == {
        "down": "b.down", "up": "own", "basis": "b.up", "stack": 3,
        "quant": {"bits": 4, "up": {"shape": [2, 2], "scale": "own"}},
        "slices": {"up": ["U8", [3, 2], 132], "up.scale": ["F32", [3, 2], 96]},
    }  # fmt: skip
    assert told["head"]["slices"] == {
        "weight": ["U8", [6], 138], "bias": ["F32", [2], 120], "weight.scale": ["F16", [2], 128],
    }  # fmt: skip
    back = read_checkpoint(path)
    assert "slices" not in json.dumps(dict(back.record))
    assert sorted(back.tensors) == [
        "a.down", "a.up", "b.down", "b.up", "c.up", "c.up.scale", "head.bias", "head.weight", "head.weight.scale",
    ]  # fmt: skip
    assert values(back) == values(task)
    assert to_manifest(back) == to_manifest(task)
    write(tmp_path / "again", back)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_equal_tasks_are_stored_alike_whatever_their_tensors_are_called(tmp_path: Path) -> None:
    """Also where two of a task's own tensors are equal, which a store's names tell, and a file's do not."""
    task = on_bases()
    same = {**task.tensors, "a.up": RawTensor("F32", (2, 1, 6), bytes(task.tensors["a.down"].data)),
            "a.down": task.tensors["a.down"]}  # fmt: skip
    equal = {**same, "bias": RawTensor("F32", (2,), bytes(8)), "rows": RawTensor("F16", (2,), bytes(4))}
    twice = make_task({**task.record, "head": {"weight": "weight", "bias": "bias"}, "activation": "identity"}, {
        **{name: raw for name, raw in equal.items() if name not in ("weight", "rows")},
        "weight": RawTensor("F32", (2, 6), bytes(48)),
    })  # fmt: skip
    other = json.loads(json.dumps(dict(twice.record)).replace('"c.', '"zz.').replace('"bias"}', '"0"}'))
    renamed = {{"bias": "0"}.get(name, name.replace("c.", "zz.")): raw for name, raw in twice.tensors.items()}
    assert to_manifest(make_task(other, renamed)) == to_manifest(twice)
    with Store.create(tmp_path / "s") as store:
        store.add(twice)
        got = store.get("dtd")
        assert to_manifest(got) == to_manifest(twice)
        assert store.add(got).changed is False
        write(tmp_path / "out", got)
        assert store.add(tmp_path / "out").changed is False
        assert values(got) == values(twice)


def test_equal_tensors_of_a_task_lie_in_the_joined_one_once(tmp_path: Path) -> None:
    task = on_bases()
    alike = {**task.tensors, "a.up": RawTensor("F32", (2, 6, 1), bytes(task.tensors["a.down"].data))}
    square = {"a": {"down": "a.down", "up": "b", "stack": 2}}
    del alike["a.up"]
    alike["b"] = RawTensor("F32", (2, 1, 6), bytes(48))
    one = make_task({**task.record, "adapters": {**task.record["adapters"], **square}}, alike)
    two = make_task(
        {**one.record, "adapters": {**one.record["adapters"], "d": {"down": "d", "up": "b", "stack": 2}}},
        {**alike, "d": RawTensor("F32", (2, 6, 1), bytes(alike["a.down"].data))},
    )
    for name, made in (("one", one), ("two", two)):
        write(tmp_path / name, made)
    assert in_file(tmp_path / "two")[1]["own"].digest == in_file(tmp_path / "one")[1]["own"].digest
    assert values(read_checkpoint(tmp_path / "two")) == values(two)


def test_large_tensors_stay_by_themselves(tmp_path: Path) -> None:
    task, wide = on_bases(), np.zeros((1 << 14, 1))
    large = {"down": "l.down", "up": "l.up", "stack": 1}
    made = make_task(
        {**task.record, "adapters": {**task.record["adapters"], "l": large},
         "positions": {"blocks.2.attn": [["l", 1.0, 0]]}},
        {**task.tensors, "l.down": floats([wide]), "l.up": floats([np.zeros((1, (1 << 14) + 1))])},
    )  # fmt: skip
    write(tmp_path / "t", made)
    sizes = {name: raw.size_bytes for name, raw in in_file(tmp_path / "t")[1].items()}
    assert sizes.keys() == {"b.down", "b.up", "l.up", "own"}
    assert sizes["own"] == OWN_BYTES + (1 << 16)


def test_names_in_a_file_never_clash(tmp_path: Path) -> None:
    """Of a tensor that is called as the joined one would be, and one as a part of it."""
    task = on_bases()
    swap = {"b.down": "own", "b.up": "c.up", "c.up": "x"}
    record = json.loads(json.dumps(dict(task.record)))
    record["adapters"]["c"] |= {"down": "own", "basis": "c.up", "up": "x"}
    made = make_task(record, {swap.get(name, name): raw for name, raw in task.tensors.items()})
    write(tmp_path / "t", made)
    assert sorted(in_file(tmp_path / "t")[1]) == ["c.up", "own", "own_"]
    back = read_checkpoint(tmp_path / "t")
    assert values(back) == values(task) and "c.up_" in back.tensors


def on_plain_bases(down: RawTensor, **more: Any) -> Task:
    """One core of 32 bytes on bases; more adapters and their tensors."""
    core = {"down": "D", "up": "C", "basis": "B", **({} if down.dtype == "F32" else {"quant": CODES})}
    tensors = {"D": down, "C": floats(np.arange(8).reshape(2, 4)), "B": floats(np.ones((4, 16))), **more}
    if down.dtype == "U8":
        tensors["S"] = floats([1.0, 2.0])
    adapters = {"c": core, **({"a": {"down": "x", "up": "y"}} if more else {})}
    positions = {"p": [[name, 1.0] for name in adapters]}
    told: Json = {"format": "pear-task/3", "adapters": adapters, "positions": positions, "head": None, "labels": []}
    return make_task(record("plain", **told), tensors)


CODES = {"bits": 8, "down": {"shape": [16, 2], "scale": "S"}}


def test_a_tensor_that_is_equal_to_the_joined_one_is_not_lost(tmp_path: Path) -> None:
    """A store names both by one digest, so there nothing is joined."""
    core = floats(np.arange(8).reshape(2, 4))
    task = on_plain_bases(RawTensor("U8", (32,), bytes(core.data)))
    with Store.create(tmp_path / "s") as store:
        store.add(task)
        assert to_manifest(store.get("plain")) == to_manifest(task)
    assert rebuild(tmp_path / "s").problems == []
    with Store.open(tmp_path / "s") as store:
        assert set(store.get("plain").tensors) == {tensor.digest for tensor in task.tensors.values()}


def test_a_tensor_that_is_equal_to_one_of_the_bases_stays_with_it(tmp_path: Path) -> None:
    down = floats(np.arange(32).reshape(16, 2))
    task = on_plain_bases(down, x=floats(np.arange(32).reshape(16, 2)), y=floats(np.ones((2, 16))))
    with Store.create(tmp_path / "s") as store:
        store.add(task)
        got = store.get("plain")
        assert to_manifest(got) == to_manifest(task)
        write(tmp_path / "out", got)
        assert store.add(tmp_path / "out").changed is False


def test_a_tensor_that_the_file_lacks_is_never_a_slice() -> None:
    """Though a slice could be called so in memory."""
    task = on_bases()
    told, tensors = join(task.record, task.tensors)
    told = {**told, "adapters": {**told["adapters"], "z": {"down": "a.down", "up": "c.up", "stack": 2}}}
    with pytest.raises(CheckpointError, match=r"names tensor '(a\.down|c\.up)'"):
        make_task(told, dict(tensors))


@pytest.mark.parametrize("format", ["pear-task/1", "pear-task/2"])
def test_other_formats_know_no_slices(tmp_path: Path, format: str) -> None:
    """There it is a key like others: it is kept. And nothing is joined."""
    changed: Json = {"format": format, "adapters": {"a": {"down": "a.down", "up": "a.up", "slices": {"up": 5}}}}
    task = make_task(
        record(**changed, positions={}),
        {"a.down": floats([[1.0]]), "a.up": floats([[2.0]]), "head.weight": floats([[1.0], [2.0]]),
         "head.bias": floats([1.0, 2.0])},
    )  # fmt: skip
    write(tmp_path / "t", task)
    assert in_file(tmp_path / "t")[0]["adapters"] == changed["adapters"]
    assert sorted(in_file(tmp_path / "t")[1]) == ["a.down", "a.up", "head.bias", "head.weight"]
    assert read_checkpoint(tmp_path / "t").record == task.record


# ---- what is refused ------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, Any, str]] = [
    ("adapters/c/slices", 5, "field 'slices' of 'c': expected some of down, up, basis, up.scale"),
    ("adapters/c/slices/x", ["U8", [1], 0], "field 'slices' of 'c': expected some of"),
    ("head/slices/shape", ["U8", [1], 0], "field 'slices' of 'head': expected some of weight, bias, weight.scale"),
    ("adapters/c/slices/up", ["U8", [3, 2]], "slice 'c.up': expected [dtype, sizes, first byte], found ['U8', [3, 2]]"),
    ("adapters/c/slices/up", None, "slice 'c.up': expected [dtype, sizes, first byte], found None"),
    ("adapters/c/slices/up/0", "F8", "slice 'c.up': expected a dtype of F32, F16, BF16, I8, U8, found 'F8'"),
    ("adapters/c/slices/up/0", [], "slice 'c.up': expected a dtype of"),
    ("adapters/c/slices/up/1", [6, True], "slice 'c.up': expected at most 8 sizes above 0, found [6, True]"),
    ("adapters/c/slices/up/1", [6, 0], "slice 'c.up': expected at most 8 sizes above 0, found [6, 0]"),
    ("adapters/c/slices/up/1", [1] * 9, "slice 'c.up': expected at most 8 sizes above 0, found [1,"),
    ("adapters/c/slices/up/1", 6, "slice 'c.up': expected at most 8 sizes above 0, found 6"),
    ("adapters/c/slices/up/2", -1, "slice 'c.up': [U8, [3, 2], -1] is not in the 144 bytes of 'own'"),
    ("adapters/c/slices/up/2", 1.0, "slice 'c.up': [U8, [3, 2], 1.0] is not in the 144 bytes of 'own'"),
    ("adapters/c/slices/up/2", 139, "slice 'c.up': [U8, [3, 2], 139] is not in the 144 bytes of 'own'"),
    ("adapters/c/slices/up/1", [2**31 - 1] * 8, "is not in the 144 bytes of 'own'"),
    ("adapters/c/slices/up/1", [3, 1], "tensor 'own': its slices overlap, or leave bytes out, at 138"),
    ("adapters/c/slices/up/2", 131, "tensor 'own': its slices overlap, or leave bytes out, at 131"),
    ("head/slices/weight/1", [5], "tensor 'own': its slices end at 143: expected 144"),
    ("adapters/c/slices/up", ..., "tensor 'own': its slices overlap, or leave bytes out, at 138"),
    ("adapters/c/up", "b.down", "slice 'c.up': tensor 'b.down': expected U8 of one axis, found F32 [3, 6, 2]"),
    ("adapters/c/up", "none", "slice 'c.up': names tensor 'none', which the file lacks"),
    ("adapters/c/up", ["own"], "slice 'c.up': names tensor ['own'], which the file lacks"),
    ("adapters/c/quant", 5, "field 'quant' of 'c': expected forms that name a 'scale'"),
    ("adapters/c/quant/up", {}, "field 'quant' of 'c': expected forms that name a 'scale'"),
    ("adapters/c/slices/up/0", "I8", "field 'adapters', 'c': tensor 'c.up' is I8: expected U8"),
    ("adapters/c/slices/up/1", [2, 3], "field 'adapters', 'c': up [2, 3]: expected a stack of 3"),
    ("adapters/x", {"down": "own", "up": "own"}, "field 'adapters', 'x': names tensor 'own', which the file lacks"),
    ("adapters", 5, "tensor 'own': its slices overlap, or leave bytes out, at 120"),
    ("adapters/x", 5, "field 'adapters', 'x': expected the tensor names 'down' and 'up'"),
    ("head", 5, "tensor 'own': its slices overlap, or leave bytes out, at 132"),
    ("format", "pear-task/2", "field 'adapters', 'a': down [144]: expected a stack of 2"),
    ("format", "pear-task/4", "field 'format': expected 'pear-task/1', 'pear-task/2' or 'pear-task/3', found 'pear-ta"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "message"), REFUSED)
@pytest.mark.parametrize("known", [None, ReadBefore()], ids=["first", "again"])
def test_bad_slices_are_refused(path: str, value: Any, message: str, known: ReadBefore | None, tmp_path: Path) -> None:
    write(tmp_path / "good", on_bases())
    if known is not None:
        read_checkpoint(tmp_path / "good", known)
    told, tensors = in_file(tmp_path / "good")
    replace_at(told, path, value)
    for read in (
        lambda: read_checkpoint(put(tmp_path / "bad", told, tensors), known),
        lambda: make_task({k: v for k, v in told.items() if k != "digests"}, tensors),
        lambda: check_record(told, {name: (raw.dtype, raw.shape) for name, raw in tensors.items()}, "here"),
    ):
        with pytest.raises(CheckpointError) as raised:
            read()
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)


def test_numbers_that_are_none_are_found_in_a_slice(tmp_path: Path) -> None:
    write(tmp_path / "good", on_bases())
    told, tensors = in_file(tmp_path / "good")
    data = bytearray(tensors["own"].data)
    begin = told["head"]["slices"]["bias"][2]
    data[begin : begin + 4] = np.float32("nan").tobytes()
    bad = {**tensors, "own": RawTensor("U8", tensors["own"].shape, bytes(data))}
    with pytest.raises(CheckpointError, match=r"tensor 'head\.bias': holds NaN or infinity"):
        read_checkpoint(put(tmp_path / "bad", told, bad))
    with pytest.raises(CheckpointError, match="tensor 'own' is damaged: its bytes do not hash to its digest"):
        changed = {**bad, "own": RawTensor.checked("U8", bad["own"].shape, bytes(data), tensors["own"].digest)}
        read_checkpoint(put(tmp_path / "bad", told, changed))


# ---- stores ---------------------------------------------------------------------------------------------------------


def all_of(store: Store) -> Json:
    return {
        f"{v.task}@{v.version}": (values(store.get(f"{v.task}@{v.version}")), v.size_bytes, v.time_ns)
        for v in store.versions()
    }


def test_every_command_on_a_store_of_such_tasks(tmp_path: Path) -> None:
    for i, name in enumerate(("one", "two", "three")):
        write(tmp_path / f"{name}.safetensors", on_bases(name, i))
    with Store.create(tmp_path / "s") as store:
        added = [store.add(tmp_path / f"{name}.safetensors") for name in ("one", "two", "three")]
        assert [(one.new_bytes, one.shared_bytes) for one in added] == [
            (OWN_BYTES + 288, 0), (OWN_BYTES, 288), (OWN_BYTES, 288),
        ]  # fmt: skip
        assert store.add(on_bases("one")).changed is False
        assert store.add(on_bases("one", seed=9)).new_bytes == OWN_BYTES
        stats = store.stats()
        assert (stats.tensors, stats.unique_bytes) == (2 + 4, 288 + 4 * OWN_BYTES)
        got = store.get("two")
        assert values(got) == values(on_bases("two", 1)) and got.size_bytes == OWN_BYTES + 288
        assert all(name == tensor.digest for name, tensor in got.tensors.items())
        assert all(memoryview(tensor.data).readonly for tensor in store.get("two", copy=False).tensors.values())
        diff = store.diff("one@1", "one@2")
        assert {one.change for one in diff.positions} == {"changed"} and diff.head == "changed"
        assert (diff.shared_bytes, diff.only_a_bytes, diff.only_b_bytes) == (288, OWN_BYTES, OWN_BYTES)
        before = all_of(store)

    shown = json.loads(run("--store", tmp_path / "s", "show", "two", "--json").stdout)
    text = dump_manifest(shown["manifest"])
    assert text == to_manifest(on_bases("two", 1)), "the manifest as it is stored"
    told = run("--store", tmp_path / "s", "show", "two").stdout.splitlines()
    rows = [line.split() for line in told if line.startswith("blocks.1.attn")]
    core, own = ["blocks.1.attn", "c#2", "1.0", "32,", "4", "106"], ["blocks.1.attn", "a#0", "1.0", "32", "48"]
    assert rows == [core, own], "the bits of bases and of the core, and bytes with those of scales"
    ran = run("--store", tmp_path / "s", "export", "two", tmp_path / "out.safetensors")
    assert ran.exit_code == 0, ran.output
    assert values(read_checkpoint(tmp_path / "out.safetensors")) == values(on_bases("two", 1))
    assert len(in_file(tmp_path / "out.safetensors")[1]) == 3
    assert verify(tmp_path / "s").ok
    rebuild(tmp_path / "s")
    with Store(tmp_path / "s") as store:
        assert all_of(store) == before
        assert store.add(tmp_path / "out.safetensors").changed is False
        store.remove("one@1")
        store.gc(repack_all=True)
        assert store.stats().tensors == 2 + 3
        del before["one@1"]
        assert all_of(store) == before
    assert verify(tmp_path / "s").ok

    url, settings = str(tmp_path / "remote"), CacheSettings(tmp_path / "cache")
    init_remote(url)
    add_remote(tmp_path / "s", Remote("origin", url))
    with Store(tmp_path / "s") as store:
        store.push()
    clone_store(tmp_path / "clone", Remote("origin", url))
    with Store(tmp_path / "clone") as clone, RemoteStore(url, {}, settings) as remote:
        assert all_of(clone) == before
        assert dump_manifest(remote.record("two")) == text
        assert values(remote.get("two")) == values(on_bases("two", 1)) == values(remote.get("two"))
    assert verify(tmp_path / "clone").ok


def test_a_damaged_tensor_is_mended_from_a_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "t.safetensors", on_bases())
    with Store.create(tmp_path / "s") as store:
        store.add(tmp_path / "t.safetensors")
        before = all_of(store)
        (pack,) = packs(store)
    own = in_file(tmp_path / "t.safetensors")[1]["own"]
    data = bytearray(pack.read_bytes())
    data[data.index(bytes(own.data))] ^= 1
    pack.write_bytes(data)
    assert [damage.digest for damage in verify(tmp_path / "s").damaged] == [own.digest]
    assert repair(tmp_path / "s", [tmp_path / "t.safetensors"]).missing == []
    with Store(tmp_path / "s") as store:
        assert all_of(store) == before


def moved(path: Path, task: Task) -> Path:
    """The task's file as another writer may lay it out: with the codes of its head first."""
    write(path, task)
    told, tensors = in_file(path)
    data = bytes(tensors["own"].data)
    for entry in (told["head"], *told["adapters"].values()):
        for use, one in entry["slices"].items():
            one[2] = 0 if entry is told["head"] and use == "weight" else one[2] + 6
    return put(path, told, {**tensors, "own": RawTensor("U8", (len(data),), data[-6:] + data[:-6])})


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("forks", [True, False])
def test_files_of_another_layout_are_stored_alike(tmp_path: Path, forks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By worker processes, too: those tell where a file's tensors are."""
    monkeypatch.setattr(loading, "can_fork", lambda: forks)
    tasks = [on_bases(f"t{i}", i) for i in range(12)]
    files = [moved(tmp_path / task.name, task) for task in tasks]
    assert in_file(files[0])[1]["own"].digest not in json.dumps(json.loads(to_manifest(tasks[0])))
    assert outcome(load_groups(files, None)) == outcome(load_groups(tasks, None))
    with Store.create(tmp_path / "s") as store:
        assert len(list(store.add_many(files))) == 12
        assert all(values(store.get(task.name)) == values(task) for task in tasks)
        assert all(not store.add(task).changed for task in tasks)
    assert verify(tmp_path / "s").ok


def test_slices_of_a_manifest_that_was_never_checked_are_refused() -> None:
    record = json.loads(to_manifest(on_bases()))
    stored = {str(digest): tensor for digest, tensor in as_stored(on_bases())[1].items()}
    record["head"]["slices"]["bias"][2] += 4
    with pytest.raises(CheckpointError, match="version dtd@2: tensor 'sha256:[0-9a-f…\\.]+'?: its slices overlap"):
        from_stored(dump_manifest(record), stored, "version dtd@2")


def test_a_format_of_a_later_version_is_named_when_its_task_is_read() -> None:
    """A store that a later Pear wrote may hold such tasks. Without this, `show` would fail somewhere in the record."""
    record = {**json.loads(to_manifest(on_bases())), "format": "pear-task/4"}
    with pytest.raises(CheckpointError, match="^version dtd@2: field 'format': expected .*, found 'pear-task/4'$"):
        from_stored(dump_manifest(record), {}, "version dtd@2")


def test_shapes_are_told_without_bytes() -> None:
    """What a remote's log lists is enough to judge a record."""
    manifest = json.loads(to_manifest(on_bases()))
    own = manifest["head"]["bias"]
    shapes = {own: ("U8", (OWN_BYTES,)), manifest["adapters"]["c"]["down"]: ("F32", (3, 6, 2)),
              manifest["adapters"]["c"]["basis"]: ("F32", (3, 2, 6))}  # fmt: skip
    check_record(manifest, shapes, "here")
    _, found = split_shapes(manifest, shapes)
    assert own not in found and found["head.bias"] == ("F32", (2,))
    assert tensor_digest("U8", (OWN_BYTES,), b"") != own


def test_records_of_joined_tasks_are_smaller(tmp_path: Path) -> None:
    """What is stored of each of 200 tasks beside its tensors."""
    in_packs, in_index = {}, {}
    for format in ("pear-task/2", "pear-task/3"):
        folder = tmp_path / format[-1]
        with Store.create(folder) as store:
            for _ in store.add_many([on_bases(f"t{number:04}", number, format=format) for number in range(200)]):
                pass
            stats = store.stats()
        in_packs[format] = (stats.pack_bytes - stats.unique_bytes) / 200
        in_index[format] = os.stat(folder / "index" / "data.mdb").st_blocks * 512 / 200
    assert in_packs["pear-task/3"] < in_packs["pear-task/2"] - 800
    assert in_index["pear-task/3"] < in_index["pear-task/2"] - 800
