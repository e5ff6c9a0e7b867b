"""Hostile files cost an error message, never more."""

import json
import tracemalloc
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pear_store import CheckpointError, Store, verify, write_checkpoint
from pear_store.format.checkpoint import task_from_container
from pear_store.format.container import parse_container
from tests.helpers.makers import container, record, small_task, tensors
from tests.pear_store.test_store import contents

SIZES = st.sampled_from([-1, 0, 1, 2, 6, 2**31, 2**48, 2**63, 2**64, True, 1.5, None, "6"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "U8", "F64", "", None, 3]),
        "shape": st.lists(SIZES, max_size=10) | JSON,
        "data_offsets": st.lists(SIZES | st.integers(0, 200), max_size=3) | JSON,
        "extra": JSON,
    },
)


def read(content: bytes) -> None:
    """Reads bytes as a checkpoint; anything but our own error gets through."""
    try:
        task_from_container(*parse_container(BytesIO(content), "hostile"), "hostile")
    except CheckpointError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 600


def valid(tmp: Path) -> bytes:
    write_checkpoint(tmp / "valid.safetensors", small_task())
    return (tmp / "valid.safetensors").read_bytes()


@given(
    st.dictionaries(st.text(max_size=8) | st.just("__metadata__"), ENTRIES | JSON, max_size=4), st.binary(max_size=64)
)
def test_any_header(header: dict[str, object], data: bytes) -> None:
    read(container(json.dumps(header), data))


@given(st.binary(max_size=200))
def test_any_bytes(content: bytes) -> None:
    read(content)
    read(container(content))


@given(st.sampled_from(sorted(record())), JSON)
def test_any_value_of_any_field(field: str, value: object) -> None:
    names = {name: {"dtype": t.dtype, "shape": list(t.shape)} for name, t in tensors().items()}
    end, header, data = 0, {}, b""
    for name, tensor in tensors().items():
        header[name] = {**names[name], "data_offsets": [end, end + tensor.size_bytes]}
        end, data = end + tensor.size_bytes, data + bytes(tensor.data)
    text = json.dumps({**record(), field: value})
    read(container(json.dumps({"__metadata__": {"pear": text}, **header}), data))


@given(st.data())
def test_a_valid_file_with_some_bytes_changed(data: st.DataObject) -> None:
    content = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    read(bytes(content[:cut]))


def test_a_store_is_none_the_worse(store: Store, tmp_path: Path) -> None:
    store.add(small_task("good"))
    content = valid(tmp_path)
    for at in range(0, len(content), 37):
        hostile = bytearray(content)
        hostile[at] ^= 0x41
        (tmp_path / "hostile").write_bytes(hostile)
        list(store.add_many([tmp_path / "hostile", small_task("good")]))
    assert contents(store.get("good")) == contents(small_task("good"))
    assert store.resolve("good").version == 1
    assert verify(store.path).ok


@pytest.mark.slow
def test_memory_is_bounded_by_the_file() -> None:
    """What a header claims is not allocated, and what it nests is not followed."""
    claims = [
        json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        '{"a":' * 30000 + "1" + "}" * 30000,
        json.dumps({f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(5000)}),
        "[" * 100000,
    ]
    for claim in claims:
        tracemalloc.start()
        read(container(claim))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 60 * len(claim) + 2**22, claim[:40]


def _valid() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return valid(Path(folder))


VALID = _valid()
