"""The task checkpoint: what is written comes back, and everything else is refused by name."""

import copy
import json
import struct
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from pear_store import (
    CheckpointError,
    NotFoundError,
    RawTensor,
    SourceError,
    Store,
    Task,
    make_task,
    read_checkpoint,
    verify,
    write_checkpoint,
)
from pear_store.exchange.peft import export_peft
from pear_store.format import checkpoint
from pear_store.format.codes import matrix_values, up_values
from pear_store.format.container import lay_out, read_container
from pear_store.format.digest import tensor_digest
from pear_store.format.manifest import to_manifest
from pear_store.format.record import with_core, without_core
from tests.helpers.makers import container, floats, record, replace_at, small_task, tensors


def test_round_trip(tmp_path: Path) -> None:
    task = small_task()
    size = write_checkpoint(tmp_path / "t.safetensors", task)
    back = read_checkpoint(tmp_path / "t.safetensors")
    assert back.record == task.record
    assert {n: (t.dtype, t.shape, bytes(t.data)) for n, t in back.tensors.items()} == {
        n: (t.dtype, t.shape, t.data) for n, t in task.tensors.items()
    }
    assert size == (tmp_path / "t.safetensors").stat().st_size
    assert list(tmp_path.iterdir()) == [tmp_path / "t.safetensors"]


def test_the_safetensors_package_reads_it(tmp_path: Path) -> None:
    task = small_task()
    write_checkpoint(tmp_path / "t.safetensors", task)
    loaded = safetensors.numpy.load_file(tmp_path / "t.safetensors")
    assert {n: a.tobytes() for n, a in loaded.items()} == {n: t.data for n, t in task.tensors.items()}


def test_equal_tasks_give_equal_files(tmp_path: Path) -> None:
    shuffled = dict(reversed(tensors().items()))
    write_checkpoint(tmp_path / "a", make_task(record(), tensors()))
    write_checkpoint(tmp_path / "b", make_task(dict(reversed(record().items())), shuffled))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_tensor_digest_is_as_defined() -> None:
    import hashlib

    data = np.arange(4, dtype="<f4").tobytes()
    expected = "sha256:" + hashlib.sha256(b"F32 2,2\n" + data).hexdigest()
    assert tensor_digest("F32", (2, 2), data) == expected
    assert tensor_digest("F32", (), data[:4]) == "sha256:" + hashlib.sha256(b"F32 \n" + data[:4]).hexdigest()


def change(path: str, value: Any) -> dict[str, Any]:
    """The valid record with the field at a slash-separated path replaced, or removed if value is Ellipsis."""
    changed = copy.deepcopy(record())
    replace_at(changed, path, value)
    return changed


BAD_RECORDS = [
    ("format", "pear-task/9", "field 'format': expected 'pear-task/1'"),
    ("task", "../x", "field 'task': '../x': expected a letter or digit"),
    ("task", "a" * 101, "field 'task'"),
    ("task", 7, "field 'task': 7"),
    ("labels", ..., "field 'labels' is missing"),
    ("backbone", {"model": "m", "digest": "sha256:12"}, "field 'backbone': expected a model name and a digest"),
    ("activation", "tanh", "field 'activation': expected one of identity, relu, gelu, found 'tanh'"),
    ("adapters", [], "field 'adapters': expected an object"),
    ("adapters/a0", {"down": "a0.down"}, "'a0': expected the tensor names 'down' and 'up'"),
    ("adapters/a0/up", "nowhere", "names tensor 'nowhere', which the file lacks"),
    ("adapters/a0/up", "a0.down", "do not chain: expected [d_in, r] and [r, d_out]"),
    ("adapters/a0/up", ["x"], "names tensor ['x']"),
    ("positions/blocks.0.attn", [], "names no adapter"),
    ("positions/blocks.0.attn", [["b7", 1.0]], "names adapter 'b7', which field 'adapters' lacks"),
    ("positions/blocks.0.attn", [["a0", "1"]], "scale '1': expected a finite number"),
    ("positions/blocks.0.attn", [["a0", True]], "scale True: expected a finite number"),
    ("positions/blocks.0.attn", ["a0"], "expected [adapter, scale]"),
    ("head/weight", "nowhere", "field 'head': names tensor 'nowhere'"),
    ("head", {"weight": "head.bias", "bias": "head.weight"}, "expected [classes, d] and [classes]"),
    ("head", None, "field 'labels': 2 labels without a head: expected none"),
    ("labels", ["one"], "field 'labels': 1 label, the head has 2 rows: expected one label a row"),
    ("labels", ["a\nb", "c"], "field 'labels': expected a list of texts without control characters"),
    ("preprocess/std", [0.5, 0.5, 0], "'std': expected 3 numbers above 0"),
    ("preprocess/input_size", [1, 48, 48], "'input_size': expected [3, height, width]"),
    ("preprocess/crop_mode", ..., "'crop_mode': expected one of center"),
    ("metrics", None, "field 'metrics': expected an object"),
    ("metrics", {"x": float("inf")}, "record: inf is not a JSON number"),
    ("training", {"x": "\ud800"}, "record: 'utf-8' codec can't encode"),
    ("adapters/a0/quant", None, "field 'quant': expected 'bits' 1 or 2 or 4 or 8"),
    ("preprocess/crop_pct", 1e-6, "'crop_pct': expected a number from 0.05 to 4"),
    ("preprocess/std", [1e-300, 1, 1], "'std': expected 3 numbers above 0"),
    ("threshold", -0.01, "field 'threshold': expected a number from 0 to 1, found -0.01"),
    ("threshold", 1.01, "field 'threshold': expected a number from 0 to 1, found 1.01"),
    ("threshold", 10**400, "field 'threshold': expected a number from 0 to 1, found 1000"),
    ("threshold", True, "field 'threshold': expected a number from 0 to 1, found True"),
    ("threshold", None, "field 'threshold': expected a number from 0 to 1, found None"),
    ("threshold", "0.5\x1b[2J" * 40, "field 'threshold': expected a number from 0 to 1, found '0.5"),
    ("threshold", [0.5], "field 'threshold': expected a number from 0 to 1, found [0.5]"),
    ("threshold", float("nan"), "record: nan is not a JSON number"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD_RECORDS)
def test_bad_records_are_refused_by_field(tmp_path: Path, path: str, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        make_task(change(path, value), tensors(), "file.safetensors")
    assert str(caught.value).startswith("file.safetensors: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tensors_that_nothing_names_are_refused() -> None:
    with pytest.raises(CheckpointError, match="tensor 'extra': nothing in the record names it"):
        make_task(record(), {**tensors(), "extra": floats([1.0])})


@pytest.mark.parametrize("threshold", [0, 1, 0.0, 1.0, 0.7])
def test_a_task_may_have_a_threshold(tmp_path: Path, threshold: float) -> None:
    task = make_task(record(threshold=threshold), tensors())
    write_checkpoint(tmp_path / "t", task)
    assert read_checkpoint(tmp_path / "t").threshold == task.threshold == threshold
    assert small_task().threshold is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("dtype", "numpy_dtype"), [("F32", "<f4"), ("F16", "<f2"), ("BF16", None)])
def test_non_finite_values_are_refused(bad: float, dtype: str, numpy_dtype: str | None) -> None:
    if numpy_dtype is None:
        data = (np.array([1.0, bad], "<f4").view("<u4") >> 16).astype("<u2").tobytes()
    else:
        data = np.array([1.0, bad], numpy_dtype).tobytes()
    with pytest.raises(CheckpointError, match="tensor 'head.bias': holds NaN or infinity"):
        make_task(record(), {**tensors(), "head.bias": RawTensor(dtype, (2,), data)})


def test_quantised_adapters_are_checked() -> None:
    made = change("adapters/a0/quant", {
        "bits": 1,
        "down": {"shape": [6, 2], "scale": "ds"},
        "up": {"shape": [2, 6], "scale": "us"},
    })  # fmt: skip
    packed = {
        **{name: t for name, t in tensors().items() if name.startswith("head")},
        "a0.down": RawTensor("U8", (2,), b"\1\2"),
        "a0.up": RawTensor("U8", (2,), b"\3\4"),
        "ds": floats([1.0, 2.0]),
        "us": floats([1.0, 2.0]),
    }
    make_task(made, packed)
    with pytest.raises(CheckpointError, match=r"down: 1-bit \[6, 2\] is U8 \[2\], found \[3\]"):
        make_task(made, {**packed, "a0.down": RawTensor("U8", (3,), b"\1\2\3")})
    with pytest.raises(CheckpointError, match=r"scale of up: expected \[2\], found \[1\]"):
        make_task(made, {**packed, "us": floats([1.0])})
    with pytest.raises(CheckpointError, match="'bits' 1 or 2 or 4 or 8"):
        make_task({**made, "adapters": {"a0": {**made["adapters"]["a0"], "quant": {"bits": 3}}}}, packed)


def cored(**changes: Any) -> tuple[dict[str, Any], dict[str, RawTensor]]:
    """One position borrows with a core, and the head is quantised."""
    made = record(
        adapters={
            "a0": {"down": "a0.down", "up": "a0.up"},
            "c1": {"down": "a0.down", "up": "c1.up", "basis": "a0.up"},
        },
        positions={"blocks.0.attn": [["a0", 1.0]], "blocks.1.attn": [["c1", 1.0]]},
        head={"weight": "head.weight", "bias": "head.bias",
              "quant": {"bits": 8, "weight": {"shape": [2, 6], "scale": "head.s"}}},
    )  # fmt: skip
    found = {
        **tensors(), "c1.up": floats(np.eye(2)), "head.weight": RawTensor("U8", (12,), bytes(range(12))),
        "head.s": floats([1.0, 0.5]),
    }  # fmt: skip
    return {**made, **changes}, found


def test_cores_and_quantised_heads_are_stored_and_exported(tmp_path: Path) -> None:
    made, found = cored()
    write_checkpoint(tmp_path / "t", make_task(made, found))
    assert read_checkpoint(tmp_path / "t").record == made
    with Store.create(tmp_path / "s") as store:
        store.add(tmp_path / "t")
        assert not store.add(tmp_path / "t").changed
        store.export("dtd", tmp_path / "again")
    again = read_checkpoint(tmp_path / "again")
    form = {"bits": 8, "weight": {"shape": [2, 6], "scale": "head.weight.scale"}}
    assert again.record == {**made, "head": {**made["head"], "quant": form}}
    assert again.tensors.keys() == found.keys() - {"head.s"} | {"head.weight.scale"}


CODED_CORE = {
    "c1": {"down": "a0.down", "up": "c1.up", "basis": "a0.up",
           "quant": {"bits": 2, "up": {"shape": [2, 2], "scale": "c1.s"}}},
    "c2": {"down": "q.down", "up": "c2.up", "basis": "q.up",
           "quant": {"bits": 1, "down": {"shape": [6, 2], "scale": "ds"}, "basis": {"shape": [2, 6], "scale": "us"},
                     "up": {"shape": [2, 2], "scale": "c2.s", "bits": 8}}},
}  # fmt: skip
"""Codes of a core alone, and of all, with other bits."""


def coded() -> tuple[dict[str, Any], dict[str, RawTensor]]:
    made = record(adapters=CODED_CORE, positions={"blocks.0.attn": [["c1", 1.0]], "blocks.1.attn": [["c2", 1.0]]})
    found = {
        **tensors(), "c1.up": RawTensor("U8", (1,), b"\xe4"), "c1.s": floats([3.0, 6.0]),
        "q.down": RawTensor("U8", (2,), b"\1\2"), "q.up": RawTensor("U8", (2,), b"\3\4"), "ds": floats([1.0, 2.0]),
        "us": floats([1.0, 2.5]), "c2.up": RawTensor("U8", (4,), b"\0\xff\x80\1"), "c2.s": floats([1.0, 7.0]),
    }  # fmt: skip
    return made, found


def test_cores_of_codes_are_read_stored_and_exported(tmp_path: Path) -> None:
    made, found = coded()
    task = make_task(made, found)
    write_checkpoint(tmp_path / "t", task)
    assert read_checkpoint(tmp_path / "t").record == made
    one, other = (task.adapters[name] for name in ("c1", "c2"))
    assert one.core is not None and (one.core.bits, one.down.bits, one.up.bits) == (2, None, None)
    assert other.core is not None and (other.core.bits, other.down.bits, other.up.bits) == (8, 1, 1)
    # codes 0, 1, 2, 3 of two bits: -1, -1/3, 1/3, 1 times the row's scale
    core = np.array([[-3.0, -1.0], [2.0, 6.0]], "f4")
    np.testing.assert_allclose(matrix_values(one.core, task.tensors), core, rtol=1e-6)
    up = matrix_values(one.up, task.tensors)
    np.testing.assert_allclose(up_values(one, task.tensors), core @ up, rtol=1e-6)
    changed = {**found, "c1.s": floats([3.0, 5.0])}
    assert one.keys(found)[1] != make_task(made, changed).adapters["c1"].keys(changed)[1], "another scale, another key"
    with Store.create(tmp_path / "s") as store:
        store.add(tmp_path / "t")
        assert not store.add(tmp_path / "t").changed
        stored = store.get("dtd")
        np.testing.assert_allclose(up_values(stored.adapters["c1"], stored.tensors), core @ up, rtol=1e-6)
        store.gc()
        store.export("dtd", tmp_path / "again")
    again = read_checkpoint(tmp_path / "again")
    assert again.record["adapters"]["c1"]["quant"] == {"bits": 2, "up": {"shape": [2, 2], "scale": "c1.up.scale"}}
    for name, adapter in again.adapters.items():
        values = up_values(task.adapters[name], task.tensors)
        np.testing.assert_array_equal(up_values(adapter, again.tensors), values)
    bare = without_core(CODED_CORE["c1"])
    assert bare == {"down": "a0.down", "up": "a0.up"}
    assert with_core(bare, "c1.up", {"bits": 2, "shape": [2, 2], "scale": "c1.s"}) == CODED_CORE["c1"]
    bare = without_core(CODED_CORE["c2"])
    assert bare["quant"].keys() == {"bits", "down", "up"}
    assert with_core(bare, "c2.up", {"bits": 8, "shape": [2, 2], "scale": "c2.s"}) == CODED_CORE["c2"]


@pytest.mark.parametrize(
    ("adapter", "quant", "message"),
    [
        ("c1", {"bits": 3, "up": {}}, "'bits' 1 or 2 or 4 or 8"),
        ("c1", {"bits": 2, "up": {"shape": [2, 2], "scale": "c1.s", "bits": 3}}, "'bits' 1 or 2 or 4 or 8"),
        ("c1", {"bits": 8, "up": {"shape": [2, 2], "scale": "c1.s"}}, "up: 8-bit [2, 2] is U8 [4], found [1]"),
        ("c1", {"bits": 2, "up": {"shape": [3, 1], "scale": "c1.s"}}, "scale of up: expected [3], found [2]"),
        ("c1", {"bits": 2, "up": 7}, "expected 'shape' and 'scale' for 'up'"),
        ("c1", {"bits": 2}, "tensor 'c1.up' is U8: expected F32 or F16 or BF16"),
        ("c1", None, "'bits' 1 or 2 or 4 or 8"),
    ],
)
def test_bad_codes_of_cores_are_refused(adapter: str, quant: Any, message: str) -> None:
    made, found = coded()
    entry = {**made["adapters"][adapter], "quant": quant}
    with pytest.raises(CheckpointError) as caught:
        make_task({**made, "adapters": {**made["adapters"], adapter: entry}}, found)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# ---- stacks ---------------------------------------------------------------------------------------------------------


def stacked(seed: int = 0, **changes: Any) -> tuple[dict[str, Any], dict[str, RawTensor]]:
    """A record and tensors: 3 cores of codes on bases, and 2 adapters of the task's own."""
    rng = np.random.default_rng(seed)
    bases = np.random.default_rng(7)
    codes = {"bits": 4, "up": {"shape": [2, 2], "scale": "c.scale"}}
    made = {
        "b.down": floats(bases.normal(size=(3, 6, 2))),
        "b.up": floats(bases.normal(size=(3, 2, 6))),
        "c.up": RawTensor("U8", (3, 2), rng.integers(0, 256, 6, np.uint8).tobytes()),
        "c.scale": floats(rng.normal(size=(3, 2))),
        "a.down": floats(rng.normal(size=(2, 6, 1))),
        "a.up": floats(rng.normal(size=(2, 1, 6))),
    }
    adapters = {
        "c": {"down": "b.down", "up": "c.up", "basis": "b.up", "quant": codes, "stack": 3},
        "a": {"down": "a.down", "up": "a.up", "stack": 2},
    }
    positions = {
        "blocks.0.attn": [["c", 1.0, 0], ["a", 0.5, 1]],
        "blocks.1.attn": [["c", 1.0, 2]],
        "blocks.2.attn": [["c", 1.0, 1], ["a", 1.0, 0]],
    }
    told: dict[str, Any] = {
        "format": "pear-task/2",
        "adapters": adapters,
        "positions": positions,
        "head": None,
        "labels": [],
    }
    return record(**{**told, **changes}), made


def unstacked(task: Task) -> Task:
    """The same task without stacks, each adapter with tensors of its own."""
    adapters: dict[str, Any] = {}
    made: dict[str, RawTensor] = {}
    for name, adapter in task.adapters.items():
        down, up = (
            floats(values) for values in (matrix_values(adapter.down, task.tensors), up_values(adapter, task.tensors))
        )
        made |= {f"{name}.down": down, f"{name}.up": up}
        adapters[name] = {"down": f"{name}.down", "up": f"{name}.up"}
    positions = {p: [[b.adapter, b.scale] for b in branches] for p, branches in task.positions.items()}
    return make_task({**task.record, "format": "pear-task/1", "adapters": adapters, "positions": positions}, made)


def test_stacks_are_what_their_adapters_are_one_by_one(tmp_path: Path) -> None:
    """In a file, in a store, shown, compared, drawn and exported."""
    task = make_task(*stacked())
    assert sorted(task.adapters) == ["a#0", "a#1", "c#0", "c#1", "c#2"]
    plain = unstacked(task)
    for i in range(3):  # the numbers, from the tensors' bytes
        adapter = task.adapters[f"c#{i}"]
        down = np.frombuffer(bytes(task.tensors["b.down"].data), "<f4").reshape(3, 6, 2)[i]
        np.testing.assert_array_equal(matrix_values(adapter.down, task.tensors), down)
        packed = np.frombuffer(bytes(task.tensors["c.up"].data), np.uint8).reshape(3, 2)[i]
        scale = np.frombuffer(bytes(task.tensors["c.scale"].data), "<f4").reshape(3, 2)[i]
        codes = np.array([packed & 15, packed >> 4]).T  # [row, column]: two codes a byte
        assert adapter.core is not None
        core = matrix_values(adapter.core, task.tensors)
        np.testing.assert_allclose(core, scale[:, None] * (2 * codes.astype("f4") - 15) / 15, rtol=1e-6)
    path = tmp_path / "t.safetensors"
    write_checkpoint(path, task)
    assert read_checkpoint(path).record == task.record
    with Store.create(tmp_path / "s") as store:
        store.add(path)
        other = make_task(*stacked(seed=1))
        assert store.add(Task({**other.record, "task": "other"}, other.tensors)).shared_bytes == 2 * 3 * 12 * 4
        kept = store.get("dtd")
        assert set(kept.tensors) == {tensor.digest for tensor in task.tensors.values()}
        for name, adapter in task.adapters.items():
            for mine, found in zip(adapter.matrices, kept.adapters[name].matrices, strict=True):
                np.testing.assert_array_equal(matrix_values(mine, task.tensors), matrix_values(found, kept.tensors))
        changed = dict(task.tensors)
        changed["b.down"] = floats(
            np.concatenate(
                [np.zeros((1, 6, 2)), np.frombuffer(bytes(task.tensors["b.down"].data), "<f4").reshape(3, 6, 2)[1:]]
            )
        )
        store.add(Task(task.record, changed))
        diff = store.diff("dtd@1", "dtd@2")
        assert {one.position: one.change for one in diff.positions} == {
            "blocks.0.attn": "changed", "blocks.1.attn": "equal", "blocks.2.attn": "equal",
        }, "of a stack, each position is told by its own part"  # fmt: skip
        assert verify(tmp_path / "s").ok
        write_checkpoint(tmp_path / "out.safetensors", store.get("dtd@1"))
    assert {t.digest for t in read_checkpoint(tmp_path / "out.safetensors").tensors.values()} == {
        t.digest for t in task.tensors.values()
    }
    linears = {f"blocks.{i}.attn": (6, 6) for i in range(3)}
    for name, one in (("stacks", task), ("plain", plain)):
        export_peft(one, tmp_path / name, linears=linears)
    files = [(tmp_path / name / "adapter_model.safetensors") for name in ("stacks", "plain")]
    exported, expected = map(safetensors.numpy.load_file, files)
    assert exported.keys() == expected.keys()
    for name, array in exported.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-6)


@pytest.mark.parametrize("quant", [5, None, "down", ["down"], {"down": 5}, {"down": {}}, {"down": {"scale": 5}}])
def test_forms_of_a_stack_that_are_none_are_refused(quant: Any) -> None:
    record, tensors = stacked()
    record["adapters"]["a"]["quant"] = quant
    with pytest.raises(CheckpointError, match="quant"):
        make_task(record, tensors)


@pytest.mark.parametrize("stray", [5, {}, {"scale": "nowhere"}, {"scale": ["x"]}])
def test_forms_of_no_part_name_no_tensor(stray: Any) -> None:
    """An adapter has no `weight`: what a stranger says of one is kept, and never looked at."""
    record, tensors = stacked()
    record["adapters"]["c"] |= {"weight": "b.down", "quant": {**record["adapters"]["c"]["quant"], "weight": stray}}
    task = make_task(record, tensors)
    assert to_manifest(task)


def on_bases(number: int, is_stacked: bool) -> Task:
    """A task of 24 positions on common bases, with cores and a head of 4 bits; `number` says which."""
    bases, own = np.random.default_rng(0), np.random.default_rng(number + 1)
    codes = {"bits": 4, "up": {"shape": [4, 4], "scale": "c.scale"}}
    made = {
        "b.down": floats(bases.normal(size=(24, 8, 4))),
        "b.up": floats(bases.normal(size=(24, 4, 8))),
        "c.up": RawTensor("U8", (24, 8), own.bytes(24 * 8)),
        "c.scale": floats(own.normal(size=(24, 4))),
    }
    entry = {"down": "b.down", "up": "c.up", "basis": "b.up", "quant": codes}
    adapters: dict[str, Any] = {"c": {**entry, "stack": 24}}
    positions: dict[str, Any] = {f"blocks.{i}.mlp": [["c", 1.0, i]] for i in range(24)}
    if not is_stacked:
        adapters = {
            f"c{i}": json.loads(json.dumps(entry).replace('"b.', f'"b{i}.').replace('"c.', f'"c{i}.'))
            for i in range(24)
        }
        positions = {f"blocks.{i}.mlp": [[f"c{i}", 1.0]] for i in range(24)}
        made = {
            name.replace(".", f"{i}.", 1): RawTensor(raw.dtype, raw.shape[1:], bytes(raw.data)[i * n : (i + 1) * n])
            for name, raw in made.items() for i in range(24) for n in [raw.size_bytes // 24]
        }  # fmt: skip
    told: dict[str, Any] = {"format": f"pear-task/{1 + is_stacked}", "adapters": adapters, "positions": positions}
    return make_task(record(f"t{number}", **told, head=None, labels=[]), made)


@pytest.mark.slow
def test_records_of_stacks_are_small(tmp_path: Path) -> None:
    """A thousand tasks of other cores: what is stored of each beside its tensors, in packs and index."""
    taken = {}
    for is_stacked in (True, False):
        tasks = [on_bases(number, is_stacked) for number in range(1000)]
        header = write_checkpoint(tmp_path / "one", tasks[0]) - tasks[0].size_bytes
        with Store.create(tmp_path / f"s{is_stacked}") as store:
            assert len(list(store.add_many(tasks))) == 1000
            stats = store.stats()
        assert stats.unique_bytes == 24 * 8 * 4 * 4 * 2 + 1000 * 24 * (8 + 4 * 4), "bases are there once"
        assert stats.tensors == (2 if is_stacked else 48) + 1000 * (2 if is_stacked else 48)
        taken[is_stacked] = (stats.stored_bytes - stats.unique_bytes) / 1000, header
    (stacks, header), (each, header_each) = taken[True], taken[False]
    assert stacks < 6_000 and header < 3_500
    assert stacks < each / 5 and header < header_each / 5


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", "pear-task/1", "a stack: expected format 'pear-task/2', found 'pear-task/1'"),
        ("adapters/c/stack", 4, r"field 'adapters', 'c': down \[3, 6, 2\]: expected a stack of 4"),
        ("adapters/c/stack", 0, "field 'stack': expected a count of adapters, found 0"),
        ("adapters/c/stack", True, "field 'stack': expected a count of adapters, found True"),
        ("adapters/c/stack", "3", "field 'stack': expected a count of adapters, found '3'"),
        ("adapters/c/stack", ..., r"field 'adapters', 'c': down"),
        ("adapters/c/down", "c.scale", r"down \[2\]: expected \[d_in, r\]"),
        ("adapters/c/down", "a.down", r"down \[2, 6, 1\]: expected a stack of 3"),
        ("adapters/c/quant/up/scale", "none", "names tensor 'none', which the file lacks"),
        ("adapters/c/quant/up/shape", [2, 4], r"4-bit \[2, 4\] is U8 \[4\], found \[2\]"),
        ("adapters/x#1", {"down": "a.down", "up": "a.up", "stack": 2}, "'x#1': expected no '#' in names"),
        ("positions/blocks.0.attn", [["c", 1.0]], r"a stack of 3: expected \[adapter, scale, place in the stack\]"),
        ("positions/blocks.0.attn", [["c", 1.0, 3]], r"a stack of 3: expected \[adapter, scale, place in the stack\]"),
        ("positions/blocks.0.attn", [["c", 1.0, -1]], r"a stack of 3: expected \[adapter, scale, place in the stack\]"),
        ("positions/blocks.0.attn", [["c", 1.0, True]], r"a stack of 3: expected"),
        ("positions/blocks.0.attn", [["c", 1.0, 1, 1]], r"expected \[adapter, scale\], or \[adapter, scale, place"),
        ("positions/blocks.0.attn", [["c", None, 1]], "scale None: expected a finite number"),
    ],
)  # fmt: skip
def test_bad_stacks_are_refused(path: str, value: Any, message: str) -> None:
    made, tensors = stacked()
    *parents, last = path.split("/")
    node: Any = made
    for part in parents:
        node = node[part]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    with pytest.raises(CheckpointError, match=message) as raised:
        make_task(made, tensors)
    assert "\n" not in str(raised.value)


def test_a_place_in_what_is_no_stack_is_refused() -> None:
    with pytest.raises(
        CheckpointError, match=r"\['a0', 1.0, 0\]: this adapter is no stack: expected \[adapter, scale\]"
    ):
        make_task(change("positions/blocks.0.attn", [["a0", 1.0, 0]]), tensors())


def test_strange_keys_beside_codes_are_kept_and_do_no_harm(tmp_path: Path) -> None:
    made = change("adapters/a0/quant", {
        "bits": 1, "down": {"shape": [6, 2], "scale": "ds"}, "up": {"shape": [2, 6], "scale": "us"}, "basis": 7,
    })  # fmt: skip
    found = {
        **{name: t for name, t in tensors().items() if name.startswith("head")},
        "a0.down": RawTensor("U8", (2,), b"\1\2"), "a0.up": RawTensor("U8", (2,), b"\3\4"),
        "ds": floats([1.0, 2.0]), "us": floats([1.0, 2.0]),
    }  # fmt: skip
    with Store.create(tmp_path / "s") as store:
        store.add(write_and_name(tmp_path / "t", make_task(made, found)))
        store.export("dtd", tmp_path / "again")
    assert read_checkpoint(tmp_path / "again").record["adapters"]["a0"]["quant"]["basis"] == 7


def write_and_name(path: Path, task: Any) -> Path:
    write_checkpoint(path, task)
    return path


@pytest.mark.parametrize(
    ("changes", "tensor", "message"),
    [
        ({}, {"c1.up": floats(np.eye(3))}, "up [3, 3] and basis [2, 6] do not chain: expected [d_in, r], [r, s]"),
        ({}, {"c1.up": RawTensor("U8", (4,), b"1234")}, "'c1': tensor 'c1.up' is U8"),
        ({}, {"head.s": floats([1.0])}, "field 'head': scale of weight: expected [2], found [1]"),
        ({}, {"head.weight": RawTensor("U8", (11,), bytes(11))}, "weight: 8-bit [2, 6] is U8 [12], found [11]"),
        ({"head": {"weight": "head.weight", "bias": "head.bias", "quant": {"bits": 1}}}, {}, "'bits' 2 or 4 or 8"),
    ],
)
def test_bad_cores_and_heads_are_refused(changes: dict[str, Any], tensor: dict[str, RawTensor], message: str) -> None:
    made, found = cored(**changes)
    with pytest.raises(CheckpointError) as caught:
        make_task(made, {**found, **tensor})
    assert message in str(caught.value)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


TENSOR = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
BAD_FILES = {
    "empty": (b"", "0 bytes: too short for a safetensors file; copy or download the file again"),
    "pickle": (b"PK\x03\x04" + b"\0" * 100, "a pickle"),
    "old pickle": (b"\x80\x02}q\x00." + b"\0" * 100, "a pickle"),
    "oversized header": (struct.pack("<Q", 2**62) + b"{}", "header of 4611686018427387904 bytes: at most"),
    "header beyond the end": (
        struct.pack("<Q", 1000) + b"{}",
        "truncated: the header needs 1008 bytes, the file has 10; copy or download the file again",
    ),
    "no JSON": (container("{nope"), "header is not valid JSON"),
    "endless number": (container('{"a": %s}' % ("9" * 5000)), "header is not valid JSON: a number has more than 4,300"),
    "bad UTF-8": (container(b'{"\xff": 1}'), "header is not valid JSON"),
    "deep JSON": (container("[" * 100_000 + "]" * 100_000), "nested too deeply"),
    "a list": (container("[]"), "header: expected a JSON object, found list"),
    "duplicate tensor": (container('{"a":%s,"a":%s}' % (TENSOR, TENSOR), b"\0" * 4), "duplicate key 'a'"),
    "overlap": (container('{"a":%s,"b":%s}' % (TENSOR, TENSOR), b"\0" * 4), "starts at byte"),
    "gap": (container('{"a":%s}' % TENSOR.replace("[0,4]", "[4,8]"), b"\0" * 8), "starts at byte"),
    "length and shape differ": (container('{"a":%s}' % TENSOR.replace("[1]", "[2]"), b"\0" * 4), "is 8 bytes"),
    "unknown dtype": (container('{"a":%s}' % TENSOR.replace("F32", "F99"), b"\0" * 4), "dtype 'F99'"),
    "dtype of a wrong type": (container('{"a":%s}' % TENSOR.replace('"F32"', "[1]"), b"\0" * 4), "dtype [1]"),
    "negative shape": (container('{"a":%s}' % TENSOR.replace("[1]", "[-1]"), b"\0" * 4), "shape [-1]"),
    "huge shape": (container('{"a":%s}' % TENSOR.replace("[1]", "[99999999999999999999]"), b""), "shape"),
    "truncated data": (
        container('{"a":%s}' % TENSOR, b"\0\0"),
        "bytes, the file has 64; copy or download the file again",
    ),
    "trailing data": (container('{"a":%s}' % TENSOR, b"\0" * 9), "5 bytes after the last tensor"),
    "overflowing number": (container('{"__metadata__":{"pear":"{\\"a\\":1e400}"}}'), "inf is not a JSON number"),
    "lone surrogate": (container('{"__metadata__":{"pear":"{\\"a\\":\\"\\\\ud800\\"}"}}'), "surrogates not allowed"),
    "metadata of numbers": (container('{"__metadata__":{"a":1}}'), "'__metadata__': expected an object of strings"),
    "no pear": (container("{}"), "metadata key 'pear' is missing"),
    "pear is no JSON": (container('{"__metadata__":{"pear":"{"}}'), "'pear' is not valid JSON"),
    "pear is a number": (container('{"__metadata__":{"pear":"1"}}'), "'pear': expected an object, found int"),
    "NaN in pear": (container('{"__metadata__":{"pear":"{\\"a\\":NaN}"}}'), "NaN is not a JSON number"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    content, message = BAD_FILES[kind]
    path = write(tmp_path / "bad.safetensors", content)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_depth_and_size_are_bounded_whatever_the_stack(tmp_path: Path) -> None:
    deep: object = []
    for _ in range(70):
        deep = [deep]
    with pytest.raises(CheckpointError, match="record: nested too deeply"):
        make_task(record(training={"x": deep}), tensors())
    with open(tmp_path / "sparse", "wb") as file:
        header = '{"a":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (2**42, 2**42)
        file.write(container(header))
        file.truncate(8 + len(header) + 2**42)
    with pytest.raises(CheckpointError, match="more than 4294967296 bytes: larger files are not read"):
        read_checkpoint(tmp_path / "sparse")


def test_a_duplicate_among_many_keys_is_found_at_once(tmp_path: Path) -> None:
    keys = ",".join(f'"k{i}":0' for i in range(300_000))
    path = write(tmp_path / "many", container("{" + keys + ',"k299999":0}'))
    with pytest.raises(CheckpointError, match="duplicate key 'k299999'"):
        read_checkpoint(path)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        read_checkpoint(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="a directory"):
        read_checkpoint(tmp_path)


def test_every_flipped_bit_in_tensors_is_found(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_checkpoint(path, small_task())
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    rng = np.random.default_rng(0)
    for bit in rng.choice((len(content) - start) * 8, 60, replace=False):
        damaged = bytearray(content)
        damaged[start + bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(
            CheckpointError, match="is damaged: its bytes do not hash to its digest; copy or download the file again"
        ):
            read_checkpoint(write(tmp_path / "bad", bytes(damaged)))


def test_a_file_without_digests_is_accepted(tmp_path: Path) -> None:
    from pear_store.format.container import container_chunks

    text = json.dumps(record())
    path = write(tmp_path / "t", b"".join(map(bytes, container_chunks(tensors(), {"pear": text}))))
    assert read_checkpoint(path).record == record()


@pytest.mark.slow
@given(st.binary(max_size=400))
def test_random_bytes_give_only_our_errors(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = write(tmp_path_factory.getbasetemp() / "random", content)
    with pytest.raises(CheckpointError):
        read_checkpoint(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.slow
@given(st.sampled_from(sorted({path for path, _, _ in BAD_RECORDS})), json_values)
def test_any_value_in_any_field_is_accepted_or_refused(path: str, value: Any) -> None:
    try:
        make_task(change(path, value), tensors())
    except CheckpointError as error:
        assert "\n" not in str(error)


@given(st.dictionaries(st.text(min_size=1, max_size=8), json_values, max_size=3))
def test_any_header_gives_only_our_errors(tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any]) -> None:
    path = write(tmp_path_factory.getbasetemp() / "header", container(json.dumps(header), b"\0" * 4))
    with pytest.raises(CheckpointError):
        read_container(path)


def test_choices_are_judged_by_the_types_that_name_them() -> None:
    """One place says what may be chosen: the type. What is not among it is refused with all of it named."""
    task = small_task()
    for field, choice in (("interpolation", checkpoint.Interpolation), ("crop_mode", checkpoint.CropMode)):
        for value in get_args(choice):
            make_task({**task.record, "preprocess": {**task.preprocess, field: value}}, task.tensors)
        with pytest.raises(CheckpointError, match=f"expected one of {', '.join(get_args(choice))}, found 'no'"):
            make_task({**task.record, "preprocess": {**task.preprocess, field: "no"}}, task.tensors)
    for value in get_args(checkpoint.Activation):
        assert make_task({**task.record, "activation": value}, task.tensors).activation == value
    with pytest.raises(CheckpointError, match=f"expected one of {', '.join(get_args(checkpoint.Activation))}, found"):
        make_task({**task.record, "activation": "no"}, task.tensors)


@pytest.mark.parametrize("header_bytes", [640, 896, 1152, 1408, 0x10280, 0x14B50])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path, header_bytes: int) -> None:
    head, _ = lay_out({"a": floats([1.0])}, {"x": ""})
    head, places = lay_out({"a": floats([1.0])}, {"x": "." * (header_bytes - (len(head) - 8))})
    assert int.from_bytes(head[:8], "little") == header_bytes
    assert head[:2] in (b"PK", *(bytes([0x80, n]) for n in range(2, 6)))
    path = tmp_path / "t.safetensors"
    path.write_bytes(head + floats([1.0]).data)
    _, found = read_container(path)
    assert found.keys() == places.keys() and found["a"].data == floats([1.0]).data
