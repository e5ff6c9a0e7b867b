"""Lists and their formats, and writing.py: lists as users have them, with every kind of damage, and what is written."""

import json
import os
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from router import RouterError
from router.infer.formats import json_lines
from router.infer.formats import parquet as parquet_lists
from router.infer.formats import text as text_lines
from router.infer.lists import FORMATS, ImageList
from router.infer.writing import check_writable, write_list

NEEDED = ["image", "task"]


def scan(path: Path, content: bytes | str, encoding: str = "utf-8-sig") -> ImageList:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return ImageList.scan(path, NEEDED, encoding)


def rows(listed: ImageList) -> list[tuple[Any, str | None, str | None]]:
    found = list(listed.parts(1000))
    assert sum(part.table.num_rows for part in found) == listed.rows
    return [row for part in found for row in zip(part.images, part.tasks, part.faults, strict=True)]


def written(listed: ImageList, out: Path) -> Path:
    check_writable(out, listed.schema)
    write_list(out, out.suffix, listed.schema, (part.table for part in listed.parts(1000)))
    return out


# ---- CSV ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_csv_in_its_encoding(tmp_path: Path, encoding: str, end: str) -> None:
    text = end.join(["image,task,note", "é.png,a,Zürich", 'b.png,a,"ü, x"', ""])
    given = "utf-8-sig" if encoding == "utf-8" else encoding
    listed = scan(tmp_path / "l.csv", text.encode(encoding), given)
    assert listed.schema.names == ["image", "task", "note"]
    assert rows(listed) == [("é.png", "a", None), ("b.png", "a", None)]
    out = written(listed, tmp_path / "o.csv").read_text()
    assert out == 'image,task,note\né.png,a,Zürich\nb.png,a,"ü, x"\n'


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", ["l.csv", "l.tsv"])
def test_what_stands_between_the_fields_of_a_csv(tmp_path: Path, name: str, mark: str, delimiter: str) -> None:
    lines = ["task,image,price,note", "a,x;y.png,1.5,plain", 'b,"p,q.png",2.5,"a ""word"" of, or; two"', "c,z.png"]
    text = "\n".join(lines)
    if delimiter != ",":
        text = "\n".join(
            [
                delimiter.join(["task", "image", "price", "note"]), delimiter.join(["a", '"x;y.png"', "1.5", "plain"]),
                delimiter.join(["b", '"p,q.png"', "2.5", '"a ""word"" of, or; two"']), delimiter.join(["c", "z.png"]),
            ]
        )  # fmt: skip
    listed = scan(tmp_path / name, mark + text)
    assert listed.schema.names == ["task", "image", "price", "note"]
    found = rows(listed)
    assert found[:2] == [("x;y.png", "a", None), ("p,q.png", "b", None)]
    assert found[2][2] == "line 4 of the list: expected 4 fields, as in the header, found 2"
    assert listed.schema.field("price").type == pa.float64()
    assert 'b,"p,q.png",2.5,"a ""word"" of, or; two"' in written(listed, tmp_path / "o.csv").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,task\na.png,a\né.png,a\n".encode("latin-1"), "line 3 is not UTF-8: byte 0xe9 at character 1: save the "
         "list as UTF-8 (pear-infer also takes --encoding latin-1)"),
        ("image,task\n".encode("utf-16"), "line 1 is not UTF-8: byte 0xff at character 1: save the list as UTF-8 "
         "(pear-infer also takes --encoding utf-16)"),
        ("image,task\n".encode("utf-16-le"), "line 1 holds NUL bytes"),
        (b"image,task\n" + bytes(range(256)), "line 4 is not UTF-8"),
        (b'image,task\na,a\nb,"a\nc,a\nd,a\n', "line 3: a quote never closes, or a field has more than 131072"),
        (b'image,task\nb,"' + b"x\n" * 100_000, "line 2: a quote never closes, or a field has more than 131072"),
        (b"image,task\na,a\nb," + b"x" * 200_000 + b"\n", "line 3: a quote never closes, or a field has more than"),
        (b'image,task\na,"b"c\n', "line 2: ',' expected after '\"'"),
        (b"image,task,task\n", "two columns are named 'task': rename one"),
        (b"picture;task\na;b\n", "column 'image' is missing: expected image and task, found picture;task"),
        (b"image;task\na;\"b\n", "line 2: a quote never closes"),
        (b"", "column 'image' is missing: expected image and task, found none"),
        (b"\xef\xbb\xbf", "column 'image' is missing"),
        (b"\x1b[2Jx,y\n", "found '\\x1b[2Jx', y"),
        (b",".join(b"c%d" % i for i in range(100)), "c18, c19 and 80 more"),
    ],
)  # fmt: skip
def test_a_csv_that_cannot_be_read(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(RouterError) as refused:
        scan(tmp_path / "l.csv", content)
    assert str(refused.value).startswith(f"{tmp_path / 'l.csv'}: ")
    assert message in str(refused.value)
    assert str(refused.value).isprintable()


def test_a_line_of_csv_that_cannot_be_read_fails_alone(tmp_path: Path) -> None:
    text = 'image,task,n\na.png,a,1\nb.png,a\n"c\nc.png",a,3,x\n\nd\0.png,a,4\ne.png,a,5\n' + "\0" * 50 + "\n"
    listed = scan(tmp_path / "l.csv", text)
    assert [fault for _, _, fault in rows(listed)] == [
        None,
        "line 3 of the list: expected 3 fields, as in the header, found 2",
        "line 4 of the list: expected 3 fields, as in the header, found 4",
        "line 7 of the list holds NUL bytes",
        None,
        "line 9 of the list: expected 3 fields, as in the header, found 1",
    ]
    assert listed.schema.field("n").type == pa.int64()
    assert written(listed, tmp_path / "o.csv").read_text() == "image,task,n\na.png,a,1\n,,\n,,\n,,\ne.png,a,5\n,,\n"


@pytest.mark.slow
def test_a_line_without_end_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_lines, "LINE_CHARACTERS", 1 << 16)
    for suffix in (".csv", ".jsonl"):
        with (tmp_path / f"l{suffix}").open("wb") as file:
            file.truncate(1 << 28)
        tracemalloc.start()
        with pytest.raises(RouterError, match="65536 characters"):
            ImageList.scan(tmp_path / f"l{suffix}", NEEDED)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
        tracemalloc.stop()


# ---- JSON lines ---------------------------------------------------------------------------------


def test_a_malformed_line_of_json_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_lines, "LINE_CHARACTERS", 100_000)
    good = b'{"image": "a.png", "task": "a", "n": 1}'
    bad = [
        b'{"image": ', b"[1, 2]", b"5", b'"text"', b"null", b'{"image": "a", "image": "b"}', b"\xff\xfe",
        b'{"image": "caf\xe9"}', b'{"image": "\\ud800"}', b'{"n": ' + b"9" * 5000 + b"}", b"[" * 90_000,
        b'{"a":' * 15_000, b'{"image": "' + b"x" * 250_000 + b'"}', b"\0\0\0",
    ]  # fmt: skip
    listed = scan(tmp_path / "l.jsonl", b"\n".join([good, *bad, b"", good]) + b"\n")
    found = rows(listed)
    assert [row for row in found if row[2] is None] == [("a.png", "a", None)] * 2
    assert [row[:2] for row in found[1:-1]] == [(None, None)] * len(bad)
    for number, ((_, _, fault), part) in enumerate(
        zip(
            found[1:-1],
            ["Expecting value at character", "found a list", "found 5", "found 'text'", "found None", "comes twice",
             "byte 0xff at character 1 is not UTF-8", "byte 0xe9 at character 15", "surrogates",
             "object: a number has more than 4,300 digits",
             "recursion", "recursion", "more than 100000 characters", "Expecting value"],
            strict=True,
        ),
        2,
    ):  # fmt: skip
        assert fault is not None
        assert fault.startswith(f"line {number} of the list")
        assert part in fault
        assert fault.isprintable()
        assert len(fault) < 250


def test_values_of_unlike_types_come_through(tmp_path: Path) -> None:
    given = [
        {"image": "a", "task": 5, "id": 1, "box": {"x": 1}, "n": 2**53 + 1, "big": 2**80, "tags": [], "e": {}},
        {"image": "b", "task": "a", "id": [], "box": 7, "n": 2.5, "big": None, "tags": ["x"], "e": {"y": [{}]}},
        {"image": 7, "task": {"x": 1}, "id": "1", "box": None, "n": None, "big": 1, "tags": None, "e": None},
        {"image": [1], "task": None, "id": True, "box": "s", "n": 1, "big": 2, "tags": [None], "e": {"z": 1.5}},
    ]
    listed = scan(tmp_path / "l.jsonl", "".join(json.dumps(row) + "\n" for row in given))
    assert rows(listed) == [
        ("a", "5", None),
        ("b", "a", None),
        ("7", None, "task is an object: expected text"),
        (None, None, "image is a list: expected text"),
    ]
    out = written(listed, tmp_path / "o.jsonl").read_text()
    assert [json.loads(line) for line in out.splitlines()] == given
    table = pq.read_table(written(listed, tmp_path / "o.parquet"))
    assert table["id"].to_pylist() == ["1", "[]", "1", "true"]
    assert table.schema.field("id").metadata is None
    lines = written(listed, tmp_path / "o.csv").read_text().splitlines()
    assert lines[:2] == ["image,task,id,box,n,big,tags,e", f'a,5,1,"{{""x"": 1}}",{2**53 + 1},{2**80},[],{{}}']


def test_types_may_differ_between_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "CHUNK_ROWS", 1)
    given = [
        {"image": "a", "task": "a", "n": 1, "m": 2**53 + 1, "s": {"x": 1}, "t": 1},
        {"image": "b", "task": "a", "n": 2.5, "m": 0.5, "s": {"y": "z"}, "t": "1"},
    ]
    listed = scan(tmp_path / "l.jsonl", "".join(json.dumps(row) + "\n" for row in given))
    assert listed.schema.field("n").type == pa.float64()
    first, second = map(json.loads, written(listed, tmp_path / "o.jsonl").read_text().splitlines())
    assert first == {**given[0], "s": {"x": 1, "y": None}}
    assert second == {**given[1], "s": {"x": None, "y": "z"}}


def test_an_empty_list_of_json_lines(tmp_path: Path) -> None:
    for content in ("", "\n\n", "\ufeff"):
        listed = scan(tmp_path / "l.jsonl", content)
        assert (listed.rows, listed.schema.names, rows(listed)) == (0, NEEDED, [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"image": {"a": 1}, "task": "a"}\n', "column 'image' holds struct<a: int64>: expected text"),
        ('{"image": "a", "task": ["a"]}\n', "column 'task' holds list<item: string>: expected text"),
        ('{"image": "a"}\n', "column 'task' is missing"),
        ("[]\n5\n", "none of 2 lines can be read; line 1 of the list: expected a JSON object: found a list"),
        ("".join(json.dumps({f"c{i}": 1}) + "\n" for i in range(10_001)), "more than 10000 names"),
    ],
)
def test_json_lines_that_cannot_be_read(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(RouterError) as refused:
        scan(tmp_path / "l.jsonl", content)
    assert message in str(refused.value)


def test_what_json_cannot_hold_is_written_as_what_it_can(tmp_path: Path) -> None:
    values = {
        "image": pa.array(["a"]), "task": pa.array(["a"]), "nan": pa.array([float("nan")]),
        "deep": pa.array([{"a": [float("inf"), 1.5], "b": b"\xff"}]), "bytes": pa.array([b"\x00\xff"]),
        "day": pa.array([0], pa.date32()), "far": pa.array([2**40], pa.timestamp("s")),
        "sum": pa.array([1], pa.decimal128(5, 2)),
    }  # fmt: skip
    pq.write_table(pa.table(values), tmp_path / "l.parquet")
    listed = ImageList.scan(tmp_path / "l.parquet", NEEDED)
    row = json.loads(written(listed, tmp_path / "o.jsonl").read_text(), parse_constant=pytest.fail)
    assert (row["nan"], row["deep"], row["bytes"]) == (None, {"a": [None, 1.5], "b": "/w=="}, "AP8=")
    assert (row["day"], row["sum"]) == ("1970-01-01", "1.00")
    assert written(listed, tmp_path / "o.csv").read_text().splitlines()[1].startswith('a,a,nan,"{""a"": [null, 1.5]')


# ---- Parquet ------------------------------------------------------------------------------------

TEXTS = ["x.png", "y.png", None]


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()),
     pa.dictionary(pa.int8(), pa.large_string())],
    ids=str,
)  # fmt: skip
def test_texts_of_every_kind_in_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    texts = pa.array(TEXTS)
    texts = texts.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else texts.cast(kind)
    nested = pa.StructArray.from_arrays([texts], names=["inner"])
    pq.write_table(pa.table({"image": texts, "task": texts, "own": texts, "s": nested}), tmp_path / "l.parquet")
    listed = ImageList.scan(tmp_path / "l.parquet", NEEDED)
    assert rows(listed) == [(text, text, None) for text in TEXTS]
    for out in ("o.parquet", "o.jsonl", "o.csv"):
        written(listed, tmp_path / out)
    assert pq.read_table(tmp_path / "o.parquet")["own"].to_pylist() == TEXTS
    own = [json.loads(line)["own"] for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert own == TEXTS
    table = pa.concat_tables([part.table for part in listed.parts(1)])
    assert table.take([2, 0])["own"].to_pylist() == [None, "x.png"]  # as pear-infer does


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(4)], ids=str)
def test_images_in_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    images = [b"one1", b"two2", None]
    tasks = pa.array(["a"] * 3)
    pq.write_table(pa.table({"image": pa.array(images, pa.binary()).cast(kind), "task": tasks}), tmp_path / "l.parquet")
    listed = ImageList.scan(tmp_path / "l.parquet", NEEDED)
    assert [image for image, _, _ in rows(listed)] == images
    assert listed.schema.field("image").type == pa.string()
    assert pq.read_table(written(listed, tmp_path / "o.parquet"))["image"].to_pylist() == [None] * 3
    if kind in (pa.binary(), pa.binary_view()):
        structs = pa.StructArray.from_arrays(
            [pa.array(images, pa.binary()).cast(kind), pa.array(["1.png", None, "3.png"])],
            names=["bytes", "path"], mask=pa.array([False, False, False]),
        )  # fmt: skip
        table = pa.table({"image": structs, "task": tasks})
        pq.write_table(table.slice(0, 3), tmp_path / "l.parquet")
        listed = ImageList.scan(tmp_path / "l.parquet", NEEDED)
        assert [image for image, _, _ in rows(listed)] == [b"one1", b"two2", "3.png"]
        assert written(listed, tmp_path / "o.csv").read_text() == "image,task\n1.png,a\n,a\n3.png,a\n"


def test_a_list_of_large_images_is_read_in_small_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_lists, "TABLE_BYTES", 1 << 20)
    images = [os.urandom(100_000) for _ in range(100)]
    pq.write_table(pa.table({"image": images, "task": ["a"] * 100}), tmp_path / "l.parquet", use_dictionary=False)
    listed = ImageList.scan(tmp_path / "l.parquet", NEEDED)
    sizes = [len(part.images) for part in listed.parts(1024)]
    assert (sum(sizes), max(sizes)) == (100, 10)
    assert [image for image, _, _ in rows(listed)] == images


def parquet(path: Path, *columns: tuple[str, Any]) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array(v) for _, v in columns], names=[n for n, _ in columns]), path)


def test_parquet_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "l.parquet"

    def refused() -> str:
        with pytest.raises(RouterError) as error:
            list(ImageList.scan(path, NEEDED).parts(1000))
        assert str(error.value).isprintable()
        return str(error.value)

    parquet(path, ("image", ["a"]), ("task", ["a"]), ("x", [1]), ("x", [2]))
    assert "two columns are named 'x': rename one" in refused()
    parquet(path, ("image", ["a"]), ("image", ["a"]), ("task", ["a"]))
    assert "two columns are named 'image'" in refused()
    twice = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["y", "y"])
    parquet(path, ("image", ["a"]), ("task", ["a"]), ("x", twice))
    assert "column 'x' has two fields named 'y'" in refused()
    parquet(path, ("image", [["a"]]), ("task", ["a"]))
    assert (
        "column 'image' holds list<element: string>: expected text, images, or structs of bytes and path" in refused()
    )
    invalid = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    )
    parquet(path, ("image", invalid), ("task", ["a"]))
    assert "cannot be read as .parquet: " in refused()
    parquet(path, ("image", [f"{i}.png" for i in range(5000)]), ("task", ["a"] * 5000))
    whole = path.read_bytes()
    for cut in (whole[:100], b"", b"PAR1" + bytes(100) + b"PAR1", whole[:500] + bytes(500) + whole[1000:]):
        path.write_bytes(cut)
        assert "cannot be read as .parquet: " in refused()


def test_an_output_that_parquet_cannot_hold_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(RouterError, match="cannot be written as .parquet: .* choose .jsonl or .csv"):
        check_writable(tmp_path / "o.parquet", pa.schema([("x", pa.struct([]))]))


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_list_that_is_no_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"l{suffix}"
    makers: tuple[tuple[Callable[[], object], str], ...] = (
        (path.mkdir, "a directory"),
        (partial(os.mkfifo, path), "a pipe"),
        (partial(path.symlink_to, "/dev/zero"), "a device"),
        (partial(path.symlink_to, "nowhere"), "no such file"),
        (partial(path.symlink_to, path.name), "cannot be read: Too many levels of symbolic links"),
    )
    for make, message in makers:
        make()
        with pytest.raises(RouterError) as refused:
            ImageList.scan(path, NEEDED)
        assert f"{path}: {message}" in str(refused.value)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_list_that_changes_while_it_is_read_is_refused(tmp_path: Path, suffix: str) -> None:
    text = "image,task\na,a\n" if suffix == ".csv" else '{"image": "a", "task": "a"}\n'
    listed = scan(tmp_path / f"l{suffix}", text)
    (tmp_path / f"l{suffix}").write_text(text + text)
    with pytest.raises(RouterError, match="changed while it was read"):
        list(listed.parts(10))
