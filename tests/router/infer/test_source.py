"""router/infer/source.py: what LIST names, and runs on many lists, on this machine and at URLs."""

import json
import os
import random
import shutil
import sys
import tempfile
import threading
import tracemalloc
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import router.infer.parts
from pear_store import PearStoreError
from pear_store.local.sources import Access, open_copy, path_in_url, url_below, url_folder
from router import RouterError
from router.infer.lists import ImageList
from router.infer.source import find, natural_key
from router.infer.writing import write_list
from tests.helpers.lists import read, run, write

NEEDED = ["image", "task"]
OUT = Path("elsewhere.csv")


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's file system in memory, empty."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The address of a web server for the folder of the test. Like many, it knows no ranges of bytes."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


# ---- what is named ------------------------------------------------------------------------------


def test_lists_are_read_in_natural_order(tmp_path: Path) -> None:
    names = ["a.csv", "part-2.csv", "part-02.csv", "part-10.csv", "part-100.csv", "part-x.csv"]
    expected = ["a.csv", "part-02.csv", "part-2.csv", "part-10.csv", "part-100.csv", "part-x.csv"]
    for seed in range(5):
        random.Random(seed).shuffle(names)
        assert sorted(names, key=natural_key) == expected
    touch(tmp_path, *names)
    for named in (f"{tmp_path}", f"{tmp_path}/", f"{tmp_path}/*.csv", f"file://{tmp_path}"):
        found = find(named, OUT)
        assert (found.kind, [Path(file).name for file in found.files], found.notes) == ("lists", expected, ())
        assert all(Path(file).parent == tmp_path for file in found.files)


@pytest.mark.parametrize(
    ("files", "kind", "read", "note"),
    [
        (["a.csv", "b.TSV", "notes.txt"], "lists", ["a.csv", "b.TSV"], None),
        (["a.parquet", "_SUCCESS", "_old.parquet", ".b.parquet", "_delta_log/c.parquet"], "lists", ["a.parquet"], None),
        (["a.jsonl", "deep/b.jsonl"], "lists", ["a.jsonl"],
         "{}: 1 list in sub-folders left out: to read all, use '{}/**/*.jsonl'"),
        (["a.png", "a.csv", "b.csv", "notes.txt"], "pictures", ["a.png"],
         "{}: 3 files are left out, because they do not end like pictures. 2 lists among them: to read lists "
         "instead of pictures, use '{}/*.csv'"),
        (["deep/a.png", "b.csv"], "pictures", ["deep/a.png"], "{}: 1 file is left out, because it does not end "
         "like pictures. 1 list among them: to read lists instead of pictures, use '{}/*.csv'"),
        (["a.png"], "pictures", ["a.png"], None),
    ],
)  # fmt: skip
def test_a_folder_is_one_of_pictures_or_of_lists(
    tmp_path: Path, files: list[str], kind: str, read: list[str], note: str | None
) -> None:
    found = find(str(touch(tmp_path, *files)), OUT)
    assert found.kind == kind
    assert [os.path.relpath(os.path.join(found.folder, file), tmp_path if kind == "lists" else found.folder)
            for file in found.files] == read  # fmt: skip
    assert found.notes == (() if note is None else (note.replace("{}", str(tmp_path)),))


@pytest.mark.parametrize(
    ("files", "named", "message"),
    [
        ([], "", "{}: expected lists or pictures, found nothing"),
        (["a.txt", "_a.csv"], "", "{}: expected lists or pictures, found 2 files of other kinds"),
        (["deep/a.csv", "deep/b.csv"], "", "{}: no list in it, 2 lists in its sub-folders: use the "
         "pattern '{}/**/*.csv'"),
        (["a.csv", "b.csv", "c.parquet"], "", "{}: expected lists of one format, found 2 .csv, 1 .parquet: use a "
         "pattern for one format, such as '{}/*.csv'"),
        (["a.csv", "c.parquet"], "/*", "{}/*: expected lists of one format, found 1 .csv, 1 .parquet"),
        (["a.csv", "a.png", "a.txt"], "/*", "{}/*: matches 1 list and 2 files of other kinds: expected one kind"),
        (["a.csv"], "/*.jsonl", "{}/*.jsonl: expected lists or pictures, found nothing"),
        (["a.csv.gz"], "/a.csv.gz", "{}/a.csv.gz: expected a folder, or a file ending in .csv, .jsonl, .parquet, .tsv"),
    ],
)  # fmt: skip
def test_what_names_no_lists_is_one_line(tmp_path: Path, files: list[str], named: str, message: str) -> None:
    with pytest.raises(RouterError) as refused:
        find(f"{touch(tmp_path, *files)}{named}", OUT)
    assert str(refused.value) == message.replace("{}", str(tmp_path))


def test_what_a_run_writes_is_no_list_of_it(tmp_path: Path) -> None:
    touch(tmp_path, "a.parquet", "out.parquet", "out.parquet.parts/00000000.parquet", "made/00000000.parquet")
    os.link(tmp_path / "a.parquet", tmp_path / "b.parquet")
    for named, out, expected in (
        ("", "out.parquet", ["a.parquet", "b.parquet"]),
        ("/*.parquet", "out.parquet", ["a.parquet", "b.parquet"]),
        ("/**/*.parquet", "out.parquet", ["a.parquet", "b.parquet", "made/00000000.parquet"]),
        ("/**/*.parquet", "made", ["a.parquet", "b.parquet", "out.parquet", "out.parquet.parts/00000000.parquet"]),
        ("", "made", ["a.parquet", "b.parquet", "out.parquet"]),
    ):
        found = find(f"{tmp_path}{named}", tmp_path / "x" / ".." / out)
        assert [os.path.relpath(file, tmp_path) for file in found.files] == expected


def test_a_file_of_that_very_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: Any) -> None:
    monkeypatch.chdir(touch(tmp_path, "a[1].csv", "a1.csv", "memory:/b.csv"))
    assert find("a[1].csv", OUT).files == ("a[1].csv",)
    assert find("memory://b.csv", OUT).files == ("memory://b.csv",)
    memory.pipe("/lists/c[1].csv", b"")
    memory.pipe("/lists/c1.csv", b"")
    assert find("memory://lists/c[1].csv", OUT).files == ("memory://lists/c[1].csv",)


def test_urls_of_lists_folders_and_patterns(memory: Any, tmp_path: Path) -> None:
    for name in ("part-10.csv", "part-9.csv", "_x.csv", "notes.txt", "deep/part-1.csv"):
        memory.pipe(f"/lists/{name}", b"")
    folder = "memory://lists/part-9.csv", "memory://lists/part-10.csv"
    assert find("memory://lists/part-9.csv", OUT).files == ("memory://lists/part-9.csv",)
    assert find("memory://lists", OUT).files == find("memory://lists/", OUT).files == folder
    assert find("memory://lists/part-*.csv", OUT).files == folder
    assert find("memory://*/part-?.csv", OUT).files == ("memory://lists/part-9.csv",)
    assert find("memory://lists/**/part-*.csv", OUT).files == ("memory://lists/deep/part-1.csv", *folder)
    with pytest.raises(PearStoreError, match=r"^memory://nowhere: no such file$"):
        find("memory://nowhere", OUT)
    with pytest.raises(RouterError, match=r"^memory://lists/\*.gif: expected lists, found nothing$"):
        find("memory://lists/*.gif", OUT)
    with pytest.raises(RouterError, match=r"matches 3 lists and 1 file of other kinds"):
        find("memory://lists/*", OUT)


def test_what_is_in_a_zip_file_is_read_if_allowed(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        packed.writestr("lists/b.csv", "image,task\n0.png,a\n")
    url = f"zip://lists/*.csv::file://{tmp_path}/x.zip"
    with pytest.raises(PearStoreError, match="a chain of URLs is not opened unless allowed"):
        find(url, OUT)
    access = Access(allowed=frozenset({"zip", "file"}))
    (found,) = find(url, OUT, access).files
    assert found == f"zip://lists/b.csv::file://{tmp_path}/x.zip"
    listed = ImageList.scan(url, NEEDED, files=[found], allowed=access.allowed)
    assert [row.folders for row in listed.parts(9)] == [[f"zip://lists::file://{tmp_path}/x.zip"]]


def test_paths_in_urls() -> None:
    signed = "https://host/lists/list.csv?sig=a/b*c"
    assert path_in_url(signed) == "https://host/lists/list.csv"
    assert find(signed.replace("*", ""), OUT).files == (signed.replace("*", ""),)
    assert url_folder(signed) == "https://host/lists"
    assert url_folder("memory://list.csv") == "memory://"
    assert url_folder("simplecache::s3://b/k/l.csv") == "simplecache::s3://b/k"
    assert url_below("s3://b/k/lists", "../images/0.png") == "s3://b/k/images/0.png"
    assert url_below("memory://", "0.png") == "memory://0.png"
    assert url_below("zip://lists::s3://b/x.zip", "0.png") == "zip://lists/0.png::s3://b/x.zip"


# ---- lists that are read together ---------------------------------------------------------------


def scan(folder: Path, *contents: str, suffix: str = ".csv") -> ImageList:
    for number, content in enumerate(contents):
        (folder / f"l{number}{suffix}").write_text(content)
    return ImageList.scan(folder, NEEDED, files=find(str(folder), OUT).files)


def values(listed: ImageList) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = pa.concat_tables(part.table for part in listed.parts(2)).to_pydict()
    return found


def test_the_types_of_columns_are_those_of_one_long_list(tmp_path: Path) -> None:
    listed = scan(tmp_path, "image,task,n,x,t\na,a,1,1,1\n", "x,t,n,image,task\n1.5,01,2,b,b\n", "image,task,n,x,t\n")
    kinds = [pa.string(), pa.string(), pa.int64(), pa.float64(), pa.string()]
    assert (listed.rows, listed.schema.names, listed.schema.types) == (2, ["image", "task", "n", "x", "t"], kinds)
    assert values(listed) == {"image": ["a", "b"], "task": ["a", "b"], "n": [1, 2], "x": [1.0, 1.5], "t": ["1", "01"]}


def test_a_name_that_a_file_of_json_lines_lacks_has_no_value(tmp_path: Path) -> None:
    rows = '{"image": "a", "task": "a", "n": 1}\n', "", '{"image": "b", "task": "a", "n": "x", "note": 3}\n'
    listed = scan(tmp_path, *rows, suffix=".jsonl")
    assert values(listed)["note"] == [None, 3]
    write_list(tmp_path / "o.csv", ".csv", listed.schema, (part.table for part in listed.parts(9)))
    assert (tmp_path / "o.csv").read_text() == "image,task,n,note\na,a,1,\nb,a,x,3\n"
    (tmp_path / "o.csv").unlink()
    with pytest.raises(RouterError, match=r"l3\.jsonl: column 'task' is missing: expected image and task, found image"):
        scan(tmp_path, *rows, '{"image": "c", "n": 3}\n', suffix=".jsonl")


def test_types_of_parquet_files_that_hold_one_another_s_values(tmp_path: Path) -> None:
    images = pa.array(["a", "b"])
    tables = [
        {"n": pa.array([1, 2], pa.int32()), "t": pa.array(["x", None]), "x": pa.nulls(2)},
        {"n": pa.array([2**60, None]), "t": pa.array(["y", "z"]).dictionary_encode(), "x": pa.array([1.5, 2])},
        {"n": pa.array([5, 6], pa.uint8()), "t": pa.array(["y", "z"], pa.large_string()), "x": pa.nulls(2)},
    ]
    for number, table in enumerate(tables):
        columns = {"image": images, "task": images, **table}
        pq.write_table(
            pa.table(dict(reversed(columns.items())) if number == 1 else columns), tmp_path / f"{number}.parquet"
        )
    listed = ImageList.scan(tmp_path, NEEDED, files=find(str(tmp_path), OUT).files)
    found = values(listed)
    assert (found["n"], found["t"]) == ([1, 2, 2**60, None, 5, 6], ["x", None, "y", "z", "y", "z"])
    assert (found["x"], found["image"]) == ([None, None, 1.5, 2.0, None, None], ["a", "b"] * 3)


@pytest.mark.parametrize(
    ("first", "second", "problem"),
    [
        ("image,task,n\n", "image,task,m\n", "lacks n and has m, unlike {}/l0.csv: all lists of a run need the same"),
        ("image,task\n", "image,task,n\n", "has n, unlike {}/l0.csv: all lists of a run need the same columns"),
        ("image,task,n\n", "image,task\n", "lacks n, unlike {}/l0.csv: all lists of a run need the same columns"),
        ("image,task\n", "image\n", "column 'task' is missing: expected image and task, found image"),
        ("image,task\n", "", "column 'image' is missing: expected image and task, found none"),
        ("image,task\n", 'image,task\n"a', "cannot be read as .csv: line 2: a quote never closes"),
        ("image,task\n", "image,task\n\xff", "cannot be read as .csv: line 2 is not UTF-8: byte 0xff"),
    ],
)  # fmt: skip
def test_the_file_that_is_at_fault_is_named(tmp_path: Path, first: str, second: str, problem: str) -> None:
    (tmp_path / "l1.csv").write_bytes(second.encode("latin-1"))
    with pytest.raises(RouterError) as refused:
        scan(tmp_path, first)
    assert str(refused.value).startswith(f"{tmp_path}/l1.csv: {problem.replace('{}', str(tmp_path))}")


def test_a_parquet_file_that_is_at_fault_is_named(tmp_path: Path) -> None:
    first = {"image": ["a"], "task": ["a"], "n": [1]}
    for second, problem in (
        ({**first, "n": ["x"]}, "column 'n' holds string, in earlier lists int64: all lists of a run need the same"),
        ({**first, "n": [1.5]}, "column 'n' holds double, in earlier lists int64"),
        ({**first, "image": [b"a"]}, "column 'image' holds binary, in earlier lists string"),
        ({"image": ["a"], "task": ["a"]}, f"lacks n, unlike {tmp_path}/0.parquet: all lists"),
        (None, "cannot be read as .parquet: "),
    ):
        pq.write_table(pa.table(first), tmp_path / "0.parquet")
        (tmp_path / "1.parquet").write_bytes(b"no Parquet")
        if second is not None:
            pq.write_table(pa.table(second), tmp_path / "1.parquet")
        with pytest.raises(RouterError) as refused:
            ImageList.scan(tmp_path, NEEDED, files=find(str(tmp_path), OUT).files)
        assert str(refused.value).startswith(f"{tmp_path}/1.parquet: {problem}")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_file_that_changes_while_lists_are_read_is_named(tmp_path: Path, suffix: str, memory: Any) -> None:
    row = {"image": ["a"], "task": ["a"]}
    for number in range(3):
        write(tmp_path / f"{number}{suffix}", pd.DataFrame(row))
        memory.pipe(f"/{number}{suffix}", (tmp_path / f"{number}{suffix}").read_bytes())
    for place in (str(tmp_path), "memory://"):
        for changed in ({"image": ["a", "b"], "task": ["a", "b"]}, {"other": ["a"]}):
            listed = ImageList.scan(place, NEEDED, files=find(place, OUT).files)
            parts = listed.parts(1)
            next(parts)
            write(tmp_path / f"2{suffix}", pd.DataFrame(changed))
            memory.pipe(f"/2{suffix}", (tmp_path / f"2{suffix}").read_bytes())
            named = f"{place.rstrip('/')}/2{suffix}" if place == str(tmp_path) else f"{place}2{suffix}"
            with pytest.raises(RouterError, match=f"^{named}: cannot be read as {suffix}: it was changed while"):
                list(parts)
            write(tmp_path / f"2{suffix}", pd.DataFrame(row))
            memory.pipe(f"/2{suffix}", (tmp_path / f"2{suffix}").read_bytes())


def test_what_makes_it_the_same_lists(tmp_path: Path) -> None:
    contents = "image,task\na,a\n", "image,task\nb,a\n"
    digests = []
    for name, each in (("x", contents), ("y", contents), ("z", contents[::-1]), ("w", (*contents, "image,task\n"))):
        (tmp_path / name).mkdir()
        digests.append(scan(tmp_path / name, *each).digest)
    assert len(set(digests)) == 4, "of other bytes, in another order, one more, or in another folder"
    assert scan(tmp_path / "x", *contents).digest == digests[0]
    (tmp_path / "x" / "l1.csv").rename(tmp_path / "x" / "l9.csv")
    assert scan(tmp_path / "x").digest == digests[0]
    alone = ImageList.scan(tmp_path / "x" / "l0.csv", NEEDED)
    assert alone.digest == alone.files[0].digest, "as ever"


@pytest.mark.slow
def test_memory_is_that_of_one_file_however_many_there_are(tmp_path: Path, memory: Any) -> None:
    """Also of a file at a URL, which is copied to the disk: the copy goes with it."""
    frame = pd.DataFrame(
        {"image": ["0.png"] * 4000, "task": ["a"] * 4000, "n": range(4000), "text": ["x" * 200] * 4000}
    )
    for suffix in (".csv", ".jsonl", ".parquet"):
        peaks = []
        for count in (2, 12):
            for number in range(count):
                written = write(tmp_path / f"{number}{suffix}", frame)
                memory.pipe(f"/{number}{suffix}", written.read_bytes())
            for place in (f"{tmp_path}/*{suffix}", f"memory://*{suffix}"):
                tracemalloc.start()
                before = pa.total_allocated_bytes()
                listed = ImageList.scan(place, NEEDED, files=find(place, OUT).files)
                most = 0
                for _ in listed.parts(1000):
                    most = max(most, pa.total_allocated_bytes() - before)
                peaks.append(tracemalloc.get_traced_memory()[1] + most)
                tracemalloc.stop()
                assert listed.rows == 4000 * count
        assert max(peaks[2:]) < 1.5 * max(peaks[:2]) + 2**20, (suffix, peaks)


# ---- runs ---------------------------------------------------------------------------------------


def make_lists(work: Path, suffix: str) -> Path:
    """A list `data/one/one`, and its rows as three lists in `data/lists`; paths begin in the folder of each list."""
    images = ["0.png", "1.png", "broken.png", "2.png", "nowhere.png", "3.png", "4.png", None]
    tasks = ["a", "b", "a", "zebra", "b", "a", "b", "a"]
    for folder in ("one", "lists"):
        (work / "data" / folder).mkdir(parents=True)
    for image in {*images, None} - {None, "nowhere.png"}:
        (work / "data" / str(image)).write_bytes((work / str(image)).read_bytes())
    frame = pd.DataFrame({"image": [image and f"../{image}" for image in images], "task": tasks})
    write(work / "data" / "one" / f"one{suffix}", frame)
    for number, rows in ((8, frame[:3]), (9, frame[3:5]), (10, frame[5:])):
        write(work / "data" / "lists" / f"part-{number}{suffix}", rows.reset_index(drop=True))
    return work / "data" / "lists"


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_many_lists_have_the_output_of_one(work: Path, memory: Any, web: str, suffix: str) -> None:
    lists = make_lists(work, suffix)
    for path in work.glob("data/**/*.*"):
        memory.pipe(f"/{path.relative_to(work)}", path.read_bytes())
    args = ["--store", work / "s", "--batch-size", 1]
    assert run(work / "data" / "one" / f"one{suffix}", work / "one", *args).exit_code == 0
    expected = pq.read_table(work / "one")
    assert expected["row"].to_pylist() == list(range(8))
    places = [lists, lists / f"part*{suffix}", "memory://data/lists", f"memory://data/lists/*{suffix}",
              f"{web}/data/lists/", f"{web}/data/lists/part*{suffix}"]  # fmt: skip
    for number, place in enumerate(places):
        done = run(place, work / f"out{number}", *args)
        assert (done.exit_code, "4 predictions, 4 errors" in done.stdout) == (0, True), (place, done.output)
        found = pq.read_table(work / f"out{number}")
        assert found.drop_columns("error") == expected.drop_columns("error"), place
        assert found["error"].is_null() == expected["error"].is_null()
        assert "finished before" in run(place, work / f"out{number}", *args).stderr


def test_a_list_at_a_url_is_read_as_one_here(work: Path, memory: Any, web: str) -> None:
    make_lists(work, ".csv")
    for path in work.glob("data/**/*.*"):
        memory.pipe(f"/{path.relative_to(work)}", path.read_bytes())
    for number, place in enumerate(
        ("memory://data/one/one.csv", f"{web}/data/one/one.csv", f"{web}/data/one/one.csv?x=1")
    ):
        done = run(place, work / f"{number}.jsonl", "--store", work / "s")
        assert "4 predictions, 4 errors" in done.stdout, done.output
    record = json.loads((work / "0.jsonl.run.json").read_text())
    assert record["plan"]["folder"] == "memory://data/one"
    absolute = f"image,task\n{work}/0.png,a\n{web}/data/1.png,a\nmemory://data/1.png,b\n"
    memory.pipe("/absolute.csv", absolute.encode())
    assert "3 predictions" in run("memory://absolute.csv", work / "3.jsonl", "--store", work / "s").stdout
    memory.pipe("/inside.csv", b"image,task\n0.png,a\nmemory://data/1.png,b\n")
    done = run("memory://inside.csv", work / "4.jsonl", "--store", work / "s", "--root", work)
    assert "1 prediction, 1 error" in done.stdout, "relative paths begin in --root, and no URL is opened"


def test_faulty_lines_name_their_list(work: Path) -> None:
    touch(work, "lists/a.csv")
    (work / "lists" / "a.csv").write_text("image,task\n../0.png,a\n")
    (work / "lists" / "b.csv").write_text("image,task\n../1.png\n")
    assert "1 prediction, 1 error" in run(work / "lists", work / "o.jsonl", "--store", work / "s").stdout
    expected = f"line 2 of {work}/lists/b.csv: expected 2 fields, as in the header, found 1"
    assert read(work / "o.jsonl")[1]["error"] == expected


def test_an_interrupted_run_goes_on_only_with_the_same_lists(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        touch(work, "lists/0.csv")
        write(work / "lists" / f"{number}.csv", pd.DataFrame({"image": ["../0.png"] * 10, "task": ["a"] * 10}))
    given = [work / "lists", work / "out.csv", "--store", work / "s", "--batch-size", 1]
    with monkeypatch.context() as patched:
        write_part = router.infer.parts.Parts.write
        patched.setattr(router.infer.parts.Parts, "write", lambda self, number, table: (
            write_part(self, number, table) if number == 0 else (_ for _ in ()).throw(KeyboardInterrupt)))  # fmt: skip
        assert run(*given).exit_code == 130
    before = (work / "lists" / "3.csv").read_text()
    (work / "lists" / "3.csv").write_text(before.replace(",a", ",b"))
    done = run(*given)
    assert (done.exit_code, "holds an unfinished run with other options (list was " in done.stderr) == (1, True)
    (work / "lists" / "3.csv").write_text(before)
    write(work / "lists" / "4.csv", pd.DataFrame({"image": ["../0.png"], "task": ["a"]}))
    assert "holds an unfinished run with other options (list was " in run(*given).stderr
    (work / "lists" / "4.csv").unlink()
    assert json.loads(run(*given, "--json").stdout)["resumed_images"] == 16


def test_the_output_may_lie_among_the_lists(work: Path) -> None:
    lists = make_lists(work, ".parquet")
    for place, out in ((lists, lists / "out.parquet"), (f"{lists}/**/*.parquet", lists / "made")):
        given = [place, out, "--store", work / "s"]
        assert "4 predictions" in run(*given).stdout
        assert "finished before" in run(*given).stderr
        os.remove(f"{out}.run.json")
        done = run(place, work / "other.csv", "--store", work / "s")
        assert (done.exit_code, "unlike" in done.stderr or "sub-folders" in done.stderr) == (1, True), done.output
        shutil.rmtree(out) if out.is_dir() else out.unlink()


def test_what_cannot_be_read_at_a_url_is_one_line(
    work: Path, memory: Any, web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe("/b/a.csv", b"image,task\n")
    memory.pipe("/b/b.csv", b"task\n")
    (work / "link.csv").symlink_to("nowhere")
    (work / "links").mkdir()
    (work / "links" / "b.csv").symlink_to("nowhere")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    for place, message in (
        ("memory://b", "memory://b/b.csv: column 'image' is missing: expected image and task, found task"),
        ("memory://nowhere.csv", "memory://nowhere.csv: no such file"),
        (f"{web}/nowhere.csv", f"{web}/nowhere.csv: no such file"),
        (f"{web}/nowhere/", f"{web}/nowhere/: no such file"),
        ("http://127.0.0.1:1/a.csv", "http://127.0.0.1:1/a.csv: cannot be read: Cannot connect to host"),
        ("s3://b/*.csv", "s3://b/*.csv: cannot be read: Install s3fs to access S3: pip install 'fsspec[s3]'"),
        ("reference://a.csv", "reference://a.csv: protocol 'reference' is not opened unless allowed"),
        ("strange://lists", "strange://lists: protocol 'strange' is not opened unless allowed"),
        (f"{work}/links", f"{work}/links/b.csv: no such file"),
    ):
        done = run(place, work / "o.csv", "--store", work / "s")
        lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
        assert len(lines) == 1, done.output
        assert (done.exit_code > 0, lines[0].startswith(f"Error: {message}")) == (True, True), lines
        assert not (work / "o.csv.parts").exists()


def test_a_copy_without_room_is_one_line(memory: Any, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe("/a.csv", b"image,task\n" * 300_000)
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    message = f"^memory://a.csv: no space for its copy in {small_disk}: .* TMPDIR to another folder$"
    with pytest.raises(PearStoreError, match=message), open_copy("memory://a.csv"):
        pass
    assert not list(small_disk.iterdir())


def test_no_password_of_a_url_is_kept(work: Path, memory: Any) -> None:
    for name in "ab":
        memory.pipe(f"/me:secret@host/{name}.csv", b"image,task\n0.png,a\n0.png\n")
    memory.pipe("/me:secret@host/0.png", (work / "0.png").read_bytes())
    assert "2 predictions, 2 errors" in run("memory://me:secret@host", work / "o.csv", "--store", work / "s").stdout
    assert "secret" not in (work / "o.csv.run.json").read_text() + (work / "o.csv").read_text()
    assert json.loads((work / "o.csv.run.json").read_text())["plan"]["folder"] == "memory://host"
