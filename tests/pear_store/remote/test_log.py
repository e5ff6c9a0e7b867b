"""What a remote's log says, as bytes; whatever those are."""

import copy
import hashlib
import json
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pear_store.errors import DamagedRemoteError, FormatError, PearStoreError
from pear_store.format.container import Place
from pear_store.format.digest import Digest
from pear_store.remote.log import (
    MAX_INDEX_BYTES,
    Entry,
    LoggedTag,
    LoggedVersion,
    LogIndex,
    PackListing,
    encode_settings,
    parse_entry,
    parse_index,
    parse_settings,
)

HASH = bytes(range(32))
ENTRY = Entry("ab" * 16, HASH, HASH[::-1], 1, "host")
MANIFEST = b"{}"
INDEX = LogIndex(
    packs={HASH: PackListing(1000, {Digest("sha256:" + "0" * 64): Place("F32", (2, 3), 100, 24)})},
    manifests={hashlib.sha256(MANIFEST).digest(): MANIFEST},
    versions=[LoggedVersion("dtd", 3, 5, hashlib.sha256(MANIFEST).digest())],
    removed=[("dtd", 2)],
    tags=[LoggedTag("dtd", "prod", 3, None), LoggedTag("dtd", "old", None, 2)],
    highest={"dtd": 4},
    drop=[HASH[::-1]],
    strays=["index/" + "0" * 64, "tmp/" + "1" * 32, "probe/" + "2" * 32],
    salt="3" * 32,
)


def packed(value: Any) -> bytes:
    return zlib.compress(json.dumps(value).encode())


def value_of(index: LogIndex) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(zlib.decompress(index.encode()))
    return value


def parsed(data: bytes) -> LogIndex:
    return parse_index(data, "place", hashlib.sha256(data).digest())


def test_what_is_written_is_read() -> None:
    assert parse_settings(encode_settings("ab" * 16), "place") == "ab" * 16
    assert parse_entry(ENTRY.encode(), "place", 7) == ENTRY
    assert len(ENTRY.encode()) < 1000
    assert parsed(INDEX.encode()) == INDEX
    assert len(INDEX) == 10
    assert not LogIndex()


def test_another_format_is_one_clear_line() -> None:
    newer = {"format": "pear-log/9", "what": "ever"}
    for parse in (
        lambda: parse_settings(json.dumps(newer).encode(), "place"),
        lambda: parse_entry(json.dumps(newer).encode(), "place", 1),
        lambda: parsed(packed(newer)),
    ):
        with pytest.raises(FormatError, match=r"is of format 'pear-log/9', this Pear reads 'pear-.*/1'") as found:
            parse()
        assert "\n" not in str(found.value)
        assert found.value.exit_code == 8


@pytest.mark.parametrize(
    "change",
    [
        {"id": "x"}, {"id": 5}, {"previous": "zz" * 32}, {"previous": None}, {"index": "AB" * 32}, {"index": "ab" * 31},
        {"time_ns": -1}, {"time_ns": 1 << 63}, {"time_ns": 1.5}, {"time_ns": True}, {"host": "h" * 300}, {"host": 1},
    ],
)  # fmt: skip
def test_an_entry_that_breaks_the_rules_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(DamagedRemoteError, match="log/00000000000000000002"):
        parse_entry(json.dumps({**json.loads(ENTRY.encode()), **change}).encode(), "place", 2)


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{", b'{"format":5}', b"\xff", b"[" * 10_000])
def test_what_is_no_entry_is_refused(data: bytes) -> None:
    for parse in (lambda: parse_entry(data, "place", 1), lambda: parse_settings(data, "place"), lambda: parsed(data)):
        with pytest.raises(DamagedRemoteError):
            parse()
    with pytest.raises(DamagedRemoteError):
        parsed(zlib.compress(data))


HEX = "ab" * 32
TENSOR = ["00" * 32, "F32", [2], 8, 8]


def listed(*rows: list[Any], file_bytes: int = 99) -> dict[str, Any]:
    return {"file_bytes": file_bytes, "tensors": list(rows)}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("versions", [["../dtd", 1, 0, HEX]]),
        ("versions", [["dtd", 0, 0, HEX]]),
        ("versions", [["dtd", 1 << 32, 0, HEX]]),
        ("versions", [["dtd", 1, 0, "../" + HEX]]),
        ("versions", [["dtd", 1, 0, HEX]] * 2),
        ("versions", [["a\n", 1, 0, HEX]]),
        ("versions", [["dtd", 1, 0, HEX], ["DTD", 1, 0, HEX]]),
        ("versions", [["dtd", True, 0, HEX]]),
        ("versions", {}),
        ("removed", [["dtd", -1]]),
        ("removed", [["dtd", 1, 2]]),
        ("tags", [["dtd", "PROD", 1, None]]),
        ("tags", [["dtd", "prod", 0, None]]),
        ("highest", {"dtd": 1 << 40}),
        ("highest", [["dtd", 1]]),
        ("drop", ["../x"]),
        ("drop", "ab"),
        ("strays", ["log/00000000000000000001"]),
        ("strays", ["pear-remote.json"]),
        ("strays", ["tmp/../log/00000000000000000001"]),
        ("strays", ["packs/" + HEX]),
        ("strays", "tmp/"),
        ("salt", 5),
        ("salt", "../x"),
        ("manifests", {HEX: "{}"}),
        ("manifests", {"../" + HEX: "{}"}),
        ("manifests", {HEX: 1}),
        ("packs", {"../../etc/passwd": listed()}),
        ("packs", {HEX: listed(file_bytes=1 << 50)}),
        ("packs", {HEX: listed(TENSOR, file_bytes=10)}),
        ("packs", {HEX: listed(TENSOR, TENSOR)}),
        ("packs", {HEX: listed(["00" * 32, "F32", [2], 8, 4])}),
        ("packs", {HEX: listed(["00" * 32, "F64", [1], 8, 8])}),
        ("packs", {HEX: listed(["00" * 32, "F32", [1] * 9, 8, 4])}),
        ("packs", {HEX: listed(["00" * 32, "F32", [-1, -1], 8, 4])}),
        ("packs", {HEX: listed(["00" * 32, ["F32"], [1], 8, 4])}),
    ],
)
def test_an_index_that_breaks_the_rules_is_refused(key: str, value: Any) -> None:
    assert parsed(packed({**value_of(LogIndex())})) == LogIndex()
    with pytest.raises(DamagedRemoteError, match="index/"):
        parsed(packed({**value_of(LogIndex()), key: value}))


def test_an_index_that_is_not_what_its_name_says_is_refused() -> None:
    with pytest.raises(DamagedRemoteError, match="do not hash to its name"):
        parse_index(INDEX.encode() + b"x", "place", hashlib.sha256(INDEX.encode()).digest())
    for data in (INDEX.encode() + b"x", INDEX.encode()[:-1], b"no zlib"):
        with pytest.raises(DamagedRemoteError):
            parsed(data)


def test_few_bytes_that_stand_for_many_are_refused() -> None:
    with pytest.raises(DamagedRemoteError, match="more than"):
        parsed(zlib.compress(bytes(10 * MAX_INDEX_BYTES)))


def test_no_index_is_written_that_would_not_be_read() -> None:
    with pytest.raises(ValueError, match="at most"):
        LogIndex(manifests={HASH: b"x" * (MAX_INDEX_BYTES + 1)}).encode()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=70),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=70), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
def test_any_value_in_any_place_is_an_index_or_an_error_of_ours(data: st.DataObject) -> None:
    value = copy.deepcopy(value_of(INDEX))
    at: Any = value
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if isinstance(at[key], dict | list) and at[key] and data.draw(st.booleans()):
            at = at[key]
        else:
            break
    at[key] = data.draw(JSON)
    try:
        parsed(packed(value))
    except PearStoreError as error:
        assert len(str(error)) < 500
