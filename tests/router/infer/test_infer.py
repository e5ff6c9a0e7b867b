"""pear-infer: every format in and out, mixed tasks, rows that cannot be served, interruptions, bounds."""

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from tqdm import tqdm

import router.infer.parts
import router.infer.plan
import router.infer.work
import router.infer.writing
from pear_store import Store, Task, make_task
from router import Backbone, Batch, Predictions, Preprocess, Router, RouterError, decode
from router.engine import Engine
from router.infer.lists import ImageList
from router.infer.plan import ahead
from router.infer.work import infer
from router.tensors import to_torch
from tests.helpers.lists import read, run, write
from tests.helpers.makers import floats

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("source", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("out", [".csv", ".jsonl", ".parquet"])
def test_formats_and_mixed_tasks(work: Path, backbone: Backbone, source: str, out: str) -> None:
    names = ["a", "b", "a@1", "b", "a", "b"]
    rows = pd.DataFrame({"id": range(6), "image": [str(work / f"{i}.png") for i in range(6)], "task": names})
    listed = write(work / f"list{source}", rows)
    done = run(listed, work / f"out{out}", "--store", work / "s", "--batch-size", 4, "--top", 2)
    assert (done.exit_code, done.stdout) == (0, f"6 predictions, 0 errors, finished: {work / f'out{out}'}\n"), (
        done.stderr
    )
    found = read(work / f"out{out}")
    assert [row["id"] for row in found] == list(range(6))
    expected = Router(backbone, work / "s").run(rows["image"].tolist(), names)
    assert [row["label"] for row in found] == expected.labels
    for row, probs, top in zip(found, expected.probs, expected.topk(2), strict=True):
        assert row["probability"] == pytest.approx(float(probs.max()), abs=1e-4)
        classes = json.loads(row["topk"]) if out == ".csv" else row["topk"]
        assert [one["label"] for one in classes] == [label for label, _ in top]
        assert [one["probability"] for one in classes] == pytest.approx([share for _, share in top], abs=1e-4)
        assert row["error"] is None


@pytest.fixture
def judged(work: Path, backbone: Backbone) -> Path:
    """A list of four images for task a, of which threshold `lax` is reached by all and `strict` by none."""
    with Store(work / "s") as store, Router(backbone, work / "s") as router:
        task = store.get("a")
        found = router.run([work / f"{i}.png" for i in range(4)], "a")
        best = [one.topk(1)[0][1] for one in found]
        for name, threshold in (("lax", min(best) / 2), ("strict", (1 + max(best)) / 2)):
            store.add(make_task({**task.record, "task": name, "threshold": threshold}, task.tensors))
    images = [f"{i}.png" for i in range(4)] + ["broken.png"]
    return write(work / "list.csv", pd.DataFrame({"image": images, "task": ["a", "strict", "lax", "b", "strict"]}))


@pytest.mark.parametrize("out", [".csv", ".jsonl", ".parquet"])
def test_answers_below_their_task_s_threshold_are_unknown(
    work: Path, judged: Path, backbone: Backbone, out: str
) -> None:
    done = run(judged, work / f"out{out}", "--store", work / "s")
    assert f"4 predictions (1 unknown), 1 error, finished: {work / f'out{out}'}\n" == done.stdout
    found = read(work / f"out{out}")
    assert list(found[0])[2:] == ["version", "label", "known", "probability", "topk", "error"]
    known = [None if row["known"] is None else bool(row["known"]) for row in found]
    assert known == [True, False, True, True, None]
    expected = Router(backbone, work / "s").run([work / f"{i}.png" for i in range(4)], ["a", "strict", "lax", "b"])
    assert [row["label"] for row in found] == [*expected.labels, None]
    for row, top in zip(found, expected.topk(5), strict=False):
        assert row["probability"] == pytest.approx(top[0][1], abs=1e-4), "also of an unknown"
        classes = json.loads(row["topk"]) if out == ".csv" else row["topk"]
        assert [one["label"] for one in classes] == [label for label, _ in top]


def test_a_threshold_for_all_tasks_or_for_none(work: Path, judged: Path) -> None:
    for threshold, known in (("none", [True] * 4), ("0", [True] * 4), ("1", [False] * 4), ("1.0", [False] * 4)):
        done = run(judged, work / "out.jsonl", "--store", work / "s", "--threshold", threshold, "--overwrite", "--json")
        assert [row["known"] for row in read(work / "out.jsonl")] == [*known, None]
        assert json.loads(done.stdout)["unknown"] == known.count(False)
    other = run(judged, work / "out.jsonl", "--store", work / "s")
    assert (other.exit_code, "threshold was 1.0, is stored" in other.stderr) == (1, True)
    every = run(judged, work / "all.jsonl", "--store", work / "s", "--tasks", "a,strict", "--prefix", "p_")
    assert "8 predictions (4 unknown), 2 errors" in every.stdout, every.output
    assert [row["p_known"] for row in read(work / "all.jsonl")] == [True, False] * 4 + [None] * 2


@pytest.mark.parametrize("out", [".CSV", ".Jsonl", ".PARQUET"])
@pytest.mark.parametrize("source", [".CSV", ".TSV", ".JsonL", ".Parquet"])
def test_an_ending_may_have_capital_letters(work: Path, source: str, out: str) -> None:
    small = write(work / f"list{source.lower()}", pd.DataFrame({"image": ["0.png", "1.png"], "task": ["a", "b"]}))
    done = run(small.rename(work / f"LIST{source}"), work / f"OUT{out}", "--store", work / "s")
    assert (done.exit_code, "2 predictions, 0 errors" in done.stdout) == (0, True), done.output
    found = read((work / f"OUT{out}").rename(work / f"out{out.lower()}"))
    assert [row["task"] for row in found] == ["a", "b"]


def test_outputs_have_the_mode_that_the_user_s_mask_gives(work: Path, mask: int) -> None:
    listed = write(work / "list.csv", pd.DataFrame({"image": ["0.png", "1.png"], "task": ["a", "b"]}))
    for name in ("out.csv", "out.jsonl", "out.parquet", "folder"):
        assert run(listed, work / name, "--store", work / "s").exit_code == 0
    files = [*work.glob("out.*"), *work.glob("folder/*"), work / "folder.run.json"]
    assert len(files) == 8
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~mask}


@pytest.mark.parametrize("out", [".csv", ".jsonl", ".parquet"])
def test_embeddings_are_what_the_head_would_take(work: Path, backbone: Backbone, out: str) -> None:
    names = ["a", "b", "features", "zebra"]
    rows = pd.DataFrame({"image": [str(work / f"{i}.png") for i in range(4)], "task": names})
    listed = write(work / "list.csv", rows)
    done = run(listed, work / f"out{out}", "--store", work / "s", "--embeddings", "--batch-size", 2)
    assert done.exit_code == 0 and "3 predictions, 1 error, finished" in done.stdout, done.stderr
    found = read(work / f"out{out}")
    assert "label" not in found[0] and "topk" not in found[0] and "zebra" in found[3]["error"]
    router = Router(backbone, work / "s")
    expected = router.features(rows["image"].tolist()[:3], names[:3])
    assert expected.shape == (3, 192)
    for row, features in zip(found, expected, strict=False):
        values = json.loads(row["embedding"]) if out == ".csv" else list(row["embedding"])
        assert values == pytest.approx(features.tolist(), abs=1e-4) and row["version"] == 1
    # of a task, its head makes its logits of them
    head = router.lookup("a").use.read().head
    assert head is not None
    logits = router.run([str(work / "0.png")], "a").logits
    weight, bias = (to_torch(router.lookup("a").use.read().tensors[name]) for name in (head.weight.names[0], head.bias))
    torch.testing.assert_close(router.features([str(work / "0.png")], "a") @ weight.t() + bias, logits)


def test_embeddings_of_the_backbone_alone_need_no_store(work: Path, backbone: Backbone) -> None:
    done = run(work, work / "out.parquet", "--embeddings", "--store", work / "nowhere")
    assert (done.exit_code, "6 predictions, 1 error, finished" in done.stdout) == (0, True), done.stderr
    found = [row for row in read(work / "out.parquet") if row["error"] is None]
    assert len(found) == 6 and found[0]["version"] is None
    names = [str(work / row["image"]) for row in found]
    features = Router(backbone).features(names)
    for row, expected in zip(found, features, strict=True):
        assert list(row["embedding"]) == pytest.approx(expected.tolist(), abs=1e-4)
    transform = create_transform(**resolve_data_config({}, model=backbone.module))
    with torch.inference_mode():
        as_timm = backbone.module(transform(Image.open(names[0]).convert("RGB")).unsqueeze(0))
    torch.testing.assert_close(features[:1], as_timm, atol=1e-4, rtol=1e-4)
    refused = run(work, work / "other.csv", "--embeddings", "--ray", "--store", work / "s")
    assert refused.exit_code == 2 and "--embeddings does not work with --ray yet" in refused.stderr


def test_a_run_says_where_its_time_went(work: Path) -> None:
    listed = write(work / "list.csv", pd.DataFrame({"image": ["0.png", "1.png"], "task": ["a", "b"]}))
    done = run(listed, work / "out.csv", "--store", work / "s")
    stages = r"forwards [\d.]+ s; waiting for images [\d.]+ s; writing [\d.]+ s\..*decoding [\d.]+ s"
    assert re.search(stages, done.stderr), done.stderr
    report = json.loads(run(listed, work / "other.csv", "--store", work / "s", "--json").stdout)
    parts = ("list_s", "read_s", "decode_s", "transfer_s", "device_s", "wait_s", "write_s")
    assert all(report[name] >= 0 for name in parts) and report["device_s"] > 0 < report["decode_s"]
    assert report["device_s"] + report["wait_s"] + report["write_s"] <= report["seconds"] + 0.01


def test_a_bad_row_costs_only_itself(work: Path) -> None:
    rows = [("0.png", "a"), ("broken.png", "a"), ("nowhere.png", "b"), ("1.png", "zebra"), ("1.png", "foreign"),
            ("2.png", "features"), ("3.png", "b")]  # fmt: skip
    frame = pd.DataFrame([(str(work / image), task) for image, task in rows], columns=["image", "task"])
    done = run(write(work / "list.csv", frame), work / "out.jsonl", "--store", work / "s")
    assert done.exit_code == 0
    assert "2 predictions, 5 errors" in done.stdout
    errors = [row["error"] for row in read(work / "out.jsonl")]
    for error, part in zip(
        errors,
        [
            None,
            "not an image",
            "no such file",
            "no task 'zebra'",
            "was made for backbone vit_huge",
            "has no head",
            None,
        ],
        strict=True,
    ):
        assert (error is None) if part is None else (part in error and "\n" not in error)
    assert all((row["label"] is None) == (row["error"] is not None) for row in read(work / "out.jsonl"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere.csv", "o.csv"], "nowhere.csv: no such file"),
        (["p", "o.csv"], "p: pictures without a list: give their task with --task NAME"),
        (["p", "o.csv", "--task", "a", "--root", "."], "--root is for lists"),
        (["p", "o.csv", "--task", ""], "'': expected all, or names of tasks with commas between them"),
        (["p", "o.csv", "--tasks", "a,,b"], "'a,,b': expected all, or names of tasks"),
        (["empty", "o.csv", "--task", "a"], "empty: expected lists or pictures, found "),
        (["*.gif", "o.csv", "--task", "a"], "*.gif: expected lists or pictures, found nothing"),
        (["list.txt", "o.csv"], "list.txt: expected a folder, or a file ending in .csv, .jsonl, .parquet, .tsv"),
        (["list.csv", "o.xlsx"], "o.xlsx: expected a file ending in .csv, .jsonl, .parquet"),
        (["list.csv", "o.csv", "--threshold", "nan"], "threshold 'nan': expected a number from 0 to 1, or none"),
        (["list.csv", "o.csv", "--threshold", "1.5"], "threshold '1.5': expected a number from 0 to 1, or none"),
        (["list.csv", "o.csv", "--threshold", "high"], "threshold 'high': expected a number from 0 to 1, or none"),
        (["list.csv", "o.csv", "--embeddings", "--threshold", "1"], "--threshold is for classes, --embeddings"),
        (["list.csv", ""], "Invalid value for 'OUT': expected a path, found an empty text"),
        (["", "o.csv"], "Invalid value for 'SOURCE': expected a path, found an empty text"),
        (["list.csv", "."], ".: expected the name of a file or of a new folder"),
        (["list.csv", "/"], "/: expected the name of a file or of a new folder"),
        (["list.csv", "nowhere/o.csv"], "folder nowhere does not exist"),
        (["list.csv", "list.csv"], "is the list itself"),
        ([f"{'x' * 300}.csv", "o.csv"], "File name too long"),
        (["list.csv", f"{'x' * 300}.csv"], "File name too long"),
        (["list.csv", f"{'x' * 300}/o.csv"], "File name too long"),
        (["list.csv", f"{'x' * 244}.csv"], "x.csv.run.json: File name too long"),
        (["list.csv", "o.csv", "--device", "gpu"], "device 'gpu' cannot be used"),
        (["bad.csv", "o.csv"], "column 'task' is missing"),
        (["broken.parquet", "o.csv"], "cannot be read as .parquet"),
        (["double.csv", "o.csv"], "double.csv: cannot be read as .csv: two columns are named 'task': rename one"),
        (["array.jsonl", "o.csv"], "line 1 of the list: expected a JSON object: found a list"),
        (["nested.jsonl", "o.csv"], "nested.jsonl: column 'image' holds struct<a: int64>: expected text"),
        (["bad.csv", "o.csv", "--tasks", "a,zebra"], "no task 'zebra'"),
        (["bad.csv", "o.csv", "--tasks", "foreign"], "was made for backbone vit_huge"),
        (["bad.csv", "o.csv", "--tasks", "all", "--store", "empty"], "empty: holds no task for backbone pear_tiny"),
        (["list.csv", "o.csv", "--store", "nowhere"], "nowhere: no store there"),
        (["list.csv", "o.csv", "--backbone", "vit_none"], "timm has no model of that name"),
    ],
)
def test_mistakes(work: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str) -> None:
    monkeypatch.chdir(work)
    write(work / "list.csv", pd.DataFrame({"image": ["0.png"], "task": ["a"]}))
    write(work / "bad.csv", pd.DataFrame({"image": ["0.png"]}))
    (work / "broken.parquet").write_bytes(b"nope")
    (work / "double.csv").write_text("image,task,task\n0.png,a,a\n")
    (work / "array.jsonl").write_text("[1]\n")
    (work / "nested.jsonl").write_text('{"image": {"a": 1}, "task": "a"}\n')
    Store.create(work / "empty").close()
    (work / "p").mkdir()
    (work / "0.png").rename(work / "p" / "0.png")
    done = run(*(["--store", "s", *args]))
    assert done.exit_code != 0
    assert message in done.stderr
    assert "Traceback" not in done.output
    assert not (work / "o.csv").exists()
    assert not (work / "o.csv.parts").exists()


# ---- lists --------------------------------------------------------------------------------------


def test_what_a_csv_says_is_kept_to_the_letter(work: Path) -> None:
    text = (
        'code,"a, b",image,share,task,count,note\n'
        f'007,"x ""y""",{work / "0.png"},0.10,a,1,"two\nlines"\n'
        f"042,z,{work / '1.png'},0.25,b,2,\n"
    )
    (work / "list.csv").write_text("\ufeff" + text, encoding="utf-8")
    assert run(work / "list.csv", work / "out.csv", "--store", work / "s").exit_code == 0
    kept = pd.read_csv(work / "out.csv", dtype=str, keep_default_na=False)
    listed = pd.read_csv(work / "list.csv", dtype=str, keep_default_na=False)
    pd.testing.assert_frame_equal(kept[list(listed.columns)], listed)
    assert run(work / "list.csv", work / "out.parquet", "--store", work / "s").exit_code == 0
    types = pd.read_parquet(work / "out.parquet").dtypes
    assert (types["count"], pd.api.types.is_string_dtype(types["code"])) == (np.int64, True)
    assert pd.api.types.is_string_dtype(types["share"])  # 0.10 is no number's own text


def test_values_of_every_kind_come_through(work: Path) -> None:
    rows = [{"image": str(work / "0.png"), "task": "a", "tags": ["x", "é"], "box": {"x": 1.5}, "n": 1, "seen": True},
            {"image": str(work / "1.png"), "task": "b", "n": 2.5, "note": "late"}]  # fmt: skip
    (work / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for suffix in (".jsonl", ".parquet", ".csv"):
        assert run(work / "list.jsonl", work / f"out{suffix}", "--store", work / "s").exit_code == 0
    first, second = map(json.loads, (work / "out.jsonl").read_text().splitlines())
    assert (first["tags"], first["box"], first["n"], first["note"]) == (["x", "é"], {"x": 1.5}, 1, None)
    assert (second["tags"], second["n"], second["seen"], second["note"]) == (None, 2.5, None, "late")
    assert read(work / "out.csv")[0]["tags"] == '["x", "é"]'
    again = run(work / "out.parquet", work / "again.jsonl", "--store", work / "s", "--prefix", "pear_")
    assert again.exit_code == 0
    for before, after in zip(*((work / f).read_text().splitlines() for f in ("out.jsonl", "again.jsonl")), strict=True):
        row = json.loads(after)
        assert json.loads(before) == {name: value for name, value in row.items() if not name.startswith("pear_")}
        assert (row["pear_label"], row["pear_topk"]) == (row["label"], row["topk"])


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_list_s_own_columns_are_never_replaced(work: Path, suffix: str) -> None:
    own = {name: [f"my {name}", ""] for name in ("version", "label", "known", "probability", "topk", "error")}
    rows = pd.DataFrame({"image": [str(work / "0.png")] * 2, "task": ["a", "zebra"], **own})
    for name in own:
        listed = write(work / f"list{suffix}", rows[["image", "task", name]])
        done = run(listed, work / f"out{suffix}", "--store", work / "s")
        assert done.exit_code == 1
        assert f"own columns with names of results, which are never replaced: {name}:" in done.stderr
        assert "rename them, or give --prefix pear_" in done.stderr
        assert not (work / f"out{suffix}").exists()
        assert not (work / f"out{suffix}.parts").exists()
    listed = write(work / f"list{suffix}", rows)
    done = run(listed, work / f"many{suffix}", "--store", work / "s", "--tasks", "a,b")
    assert "never replaced: task, version, label, known, probability, topk, error:" in done.stderr
    for out, wanted, more in (("out", [], []), ("many", ["--tasks", "a,b"], ["task"])):
        assert run(listed, work / f"{out}{suffix}", "--store", work / "s", "--prefix", "pear_", *wanted).exit_code == 0
        found = read(work / f"{out}{suffix}")
        assert list(found[0]) == [*rows.columns, *(f"pear_{name}" for name in (*more, *own))]
        assert (found[0]["label"], found[0]["error"]) == ("my label", "my error")
        assert found[0]["pear_label"].startswith("a-")
        assert found[0]["pear_error"] is None
    assert "no task 'zebra'" in read(work / f"out{suffix}")[1]["pear_error"]
    done = run(work / f"out{suffix}", work / f"third{suffix}", "--store", work / "s", "--prefix", "pear_")
    assert "give another --prefix" in done.stderr


def test_the_store_comes_from_the_environment_too(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(work))
    listed = write(work / "list.csv", pd.DataFrame({"image": [str(work / "0.png")], "task": ["a"]}))
    for number, where in enumerate((str(work / "s"), "~/s", "s")):
        monkeypatch.setenv("PEAR_STORE", where)
        assert run(listed, work / f"{number}.csv").exit_code == 0
    assert run(listed, work / "3.csv", "--store=~/s").exit_code == 0
    assert not (work / "~").exists()
    monkeypatch.setenv("PEAR_STORE", str(work / "nowhere"))
    assert "nowhere: no store there" in run(listed, work / "4.csv").stderr
    assert run(listed, work / "4.csv", "--store", work / "s").exit_code == 0


def test_a_folder_or_a_pattern_in_place_of_a_list(
    work: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    (work / "p" / "deep").mkdir(parents=True)
    for number, place in enumerate(("b.png", "a.PNG", "deep/c.png")):
        (work / "p" / place).write_bytes((work / f"{number}.png").read_bytes())
    (work / "p" / "notes.txt").write_text("x")
    (work / "p" / ".hidden.png").write_bytes(b"x")
    (work / "p" / "z.png").write_bytes(b"no picture")
    done = run(work / "p", work / "o.csv", "--task", "a", "--store", work / "s", "--max-errors", 1)
    assert done.exit_code == 0, done.stderr
    assert "1 file is left out, because it does not end like pictures" in done.stderr
    found = read(work / "o.csv")
    assert [row["image"] for row in found] == ["a.PNG", "b.png", "deep/c.png", "z.png"]
    files = [work / "p" / name for name in ("a.PNG", "b.png", "deep/c.png")]
    assert [row["label"] for row in found[:3]] == Router(backbone, work / "s").run(files, "a").labels
    assert found[0]["task"] == "a" and "not an image" in found[3]["error"]
    monkeypatch.chdir(work)
    done = run("p/**/*.png", "g.jsonl", "--task", "a", "--store", "s")
    assert done.exit_code == 0, done.stderr
    assert [row["image"] for row in read(work / "g.jsonl")] == ["p/b.png", "p/deep/c.png", "p/z.png"]
    assert "finished before" in run("p/**/*.png", "g.jsonl", "--task", "a", "--store", "s").stderr
    (work / "p" / "new.png").write_bytes((work / "3.png").read_bytes())
    assert run("p/**/*.png", "g.jsonl", "--task", "a", "--store", "s", "--overwrite").exit_code == 0
    assert len(read(work / "g.jsonl")) == 4


def test_more_errors_than_are_allowed_are_an_exit_code(work: Path) -> None:
    frame = pd.DataFrame({"image": ["0.png", "broken.png", "nowhere.png"]})
    listed = write(work / "list.csv", frame)
    for allowed, code in ((2, 0), (1, 1), (0, 1)):
        done = run(listed, work / "o.csv", "--task", "a", "--store", work / "s", "--max-errors", allowed, "--overwrite")
        assert done.exit_code == code, done.stderr
        *_, summary, last = done.output.splitlines()
        finished = f"1 prediction, 2 errors, finished: {work / 'o.csv'}"
        if code:
            told = f"Error: --max-errors {allowed} allows fewer: 2 errors, which {work / 'o.csv'} has; the first: "
            assert (summary, last.startswith(told)) == (finished, True), done.output
        else:
            assert last == finished
        assert len(read(work / "o.csv")) == 3


def test_rows_without_image_or_task_cost_only_themselves(work: Path) -> None:
    (work / "list.jsonl").write_text(
        f'{{"image": "{work}/0.png", "task": "a"}}\n{{"image": null, "task": "a"}}\n{{"image": "x"}}\n'
    )
    done = run(work / "list.jsonl", work / "out.jsonl", "--store", work / "s")
    assert "1 prediction, 2 errors" in done.stdout
    errors = [row["error"] for row in read(work / "out.jsonl")]
    assert errors == [None, "the row names no image", "the row names no task"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_an_empty_list_gives_an_empty_output(work: Path, suffix: str) -> None:
    write(work / "list.parquet", pd.DataFrame({"image": pd.Series([], dtype=str), "task": pd.Series([], dtype=str)}))
    done = run(work / "list.parquet", work / f"out{suffix}", "--store", work / "s")
    assert (done.exit_code, "0 predictions, 0 errors" in done.stdout) == (0, True)
    assert (work / f"out{suffix}").exists()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_malformed_line_fails_alone(work: Path, suffix: str) -> None:
    line = {".csv": "{},{}\n", ".jsonl": '{{"image": "{}", "task": "{}"}}\n'}[suffix]
    broken = {".csv": "2.png\n", ".jsonl": '{"image": "2.png"\n'}[suffix]
    text = line.format("0.png", "a") + broken + line.format("1.png", "b")
    (work / f"list{suffix}").write_text(text if suffix == ".jsonl" else "image,task\n" + text)
    done = run(work / f"list{suffix}", work / "out.jsonl", "--store", work / "s")
    assert (done.exit_code, "2 predictions, 1 error" in done.stdout) == (0, True)
    found = read(work / "out.jsonl")
    assert found[1]["error"].startswith(f"line {3 if suffix == '.csv' else 2} of the list: expected")
    assert [row["image"] for row in found] == ["0.png", None, "1.png"]


def test_a_latin_1_list_is_read_when_told_so(work: Path) -> None:
    (work / "é.png").write_bytes((work / "0.png").read_bytes())
    (work / "list.csv").write_bytes("image,task\né.png,a\n".encode("latin-1"))
    given = [work / "list.csv", work / "out.jsonl", "--store", work / "s"]
    done = run(*given)
    assert (done.exit_code, "line 2 is not UTF-8" in done.stderr) == (1, True)
    assert "1 prediction, 0 errors" in run(*given, "--encoding", "latin-1").stdout
    for name in ("nonsense", "base64"):
        done = run(*given, "--encoding", name)
        assert (done.exit_code, f"{name!r}: expected a text encoding" in done.stderr) == (2, True)


# ---- where images are ---------------------------------------------------------------------------


def test_relative_paths_begin_in_the_list_s_folder(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / "lists").mkdir()
    (work / "elsewhere").mkdir()
    monkeypatch.chdir(work / "elsewhere")
    rows = pd.DataFrame({"image": ["../0.png", str(work / "1.png"), (work / "2.png").as_uri()], "task": ["a"] * 3})
    write(work / "lists" / "list.csv", rows)
    for number, listed in enumerate(("../lists/list.csv", work / "lists" / "list.csv")):
        done = run(listed, f"{number}.jsonl", "--store", work / "s")
        assert (done.exit_code, "3 predictions, 0 errors" in done.stdout) == (0, True), done.output
    assert [row["image"] for row in read(Path("0.jsonl"))] == rows["image"].tolist()
    write(work / "lists" / "list.csv", pd.DataFrame({"image": ["0.png"], "task": ["a"]}))
    assert "1 prediction" in run("../lists/list.csv", "2.jsonl", "--store", work / "s", "--root", work).stdout


def test_root_confines_a_list_to_a_directory(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    inside = work / "inside"
    inside.mkdir()
    (inside / "good.png").write_bytes((work / "0.png").read_bytes())
    (inside / "link.png").symlink_to(work / "0.png")
    (inside / "up").symlink_to(work)
    (inside / "near.png").symlink_to("good.png")
    os.mkfifo(inside / "pipe.png")
    good = ["good.png", "near.png", str(inside / "good.png"), "../inside/good.png", (inside / "good.png").as_uri()]
    bad = [
        "../0.png",
        str(work / "0.png"),
        "link.png",
        "up/0.png",
        (work / "0.png").as_uri(),
        "/etc/passwd",
        "pipe.png",
        "http://localhost:1/x.png",
        "memory://x",
        "reference://::data:,{}",
        "zip://good.png::../x.zip",
        ".",
        "a\0b",
    ]
    listed = work / "list.jsonl"
    listed.write_text("".join(json.dumps({"image": image, "task": "a"}) + "\n" for image in good + bad))
    done = run(listed, work / "out.jsonl", "--store", work / "s", "--root", inside)
    assert f"{len(good)} predictions, {len(bad)} errors" in done.stdout, done.output
    found = read(work / "out.jsonl")
    assert [row["label"] is not None for row in found] == [True] * len(good) + [False] * len(bad)
    assert all("outside" in row["error"] for row in found[len(good) :][:6])
    done = run(listed, work / "out.jsonl", "--store", work / "s", "--root", work / "nowhere")
    assert (done.exit_code, "does not exist" in done.stderr) == (2, True)


@pytest.mark.slow
def test_large_pictures_and_unlisted_protocols_are_opened_only_when_told_so(work: Path) -> None:
    for column, options, problem in (
        ("0.png", ["--max-pixels", 599], "set max_pixels (--max-pixels) to at least 600"),
        (f"filecache::{(work / '0.png').as_uri()}", [], "say --allow filecache"),
    ):
        listed = write(work / "list.csv", pd.DataFrame({"image": [column, str(work / "1.png")], "task": ["a", "a"]}))
        done = run(listed, work / "out.jsonl", "--store", work / "s", "--overwrite", *options)
        assert ", finished: " in done.stdout
        assert problem in read(work / "out.jsonl")[0]["error"]
    done = run(
        listed, work / "out.jsonl", "--store", work / "s", "--overwrite", "--allow", "filecache", "--allow", "file"
    )
    assert "2 predictions, 0 errors" in done.stdout


def test_what_a_list_holds_does_not_reach_the_terminal(work: Path) -> None:
    text = json.dumps({"image": "\x1b[2J.png", "task": "a\n\x1b]0;x"})
    (work / "list.jsonl").write_text(text + "\n")
    (work / "odd.jsonl").write_text(json.dumps({"\x1b[2J": 1}) + "\n")
    for name in ("list", "odd"):
        done = run(work / f"{name}.jsonl", work / "out.csv", "--store", work / "s")
        assert done.exit_code == 1
        assert "\x1b" not in done.output


def test_a_run_that_serves_nothing_says_so(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    (work / "far").mkdir()
    write(work / "far" / "list.csv", pd.DataFrame({"image": ["0.png", "1.png"], "task": ["a", "a"]}))
    given = ["far/list.csv", "out.csv", "--store", "s"]
    done = run(*given)
    assert done.exit_code == 1
    assert "0 predictions, 2 errors, finished: out.csv" in done.stdout
    assert "Error: no row could be served: 2 errors, which out.csv has; the first: " in done.stderr
    assert "0.png: no such file" in done.stderr
    assert len(read(work / "out.csv")) == 2
    assert json.loads(run(*given, "--json").stdout)["predictions"] == 0
    for name in ("0.png", "1.png"):  # the same command, once the images are there
        (work / "far" / name).write_bytes((work / name).read_bytes())
    assert "2 predictions, 0 errors" in run(*given).stdout


@pytest.mark.slow
def test_the_corrected_list_of_a_failed_run_is_taken(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    for first, second in ((".csv", ".csv"), (".parquet", ".parquet")):
        write(work / f"list{first}", pd.DataFrame({"image": ["nowhere.png"] * 2, "task": ["a"] * 2}))
        assert run(f"list{first}", f"out{second}", "--store", "s").exit_code == 1
        write(work / f"list{first}", pd.DataFrame({"image": ["0.png"] * 2, "task": ["a"] * 2}))
        done = run(f"list{first}", f"out{second}", "--store", "s")
        assert (done.exit_code, "2 predictions" in done.stdout) == (0, True), done.output
    rows = pd.DataFrame({"image": [f"{i % 6}.png" for i in range(300)], "task": "a", "x": np.arange(300.0)})
    pq.write_table(pa.table(rows), "list.parquet", row_group_size=100)
    whole = Path("list.parquet").read_bytes()
    place = pq.ParquetFile("list.parquet").metadata.row_group(2).column(2).data_page_offset
    Path("list.parquet").write_bytes(whole[:place] + bytes(40) + whole[place + 40 :])
    given = ["list.parquet", "late.csv", "--store", "s", "--batch-size", 1]
    done = run(*given)
    assert (done.exit_code, "list.parquet: cannot be read as .parquet" in done.stderr) == (1, True), done.output
    assert not Path("late.csv.parts").exists()
    Path("list.parquet").write_bytes(whole)
    done = run(*given)
    assert (done.exit_code, "300 predictions" in done.stdout) == (0, True), done.output


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [(), ("--tasks", "a,b", "--prefix", "p_")])
def test_images_that_a_parquet_list_holds(work: Path, backbone: Backbone, wanted: tuple[str, ...]) -> None:
    names = ["0.png", "1.png", "broken.png", "2.png"]
    data: list[bytes | None] = [(work / name).read_bytes() for name in names]
    data[3] = None
    tasks = pa.array(["a", "b", "a", "b"])
    structs = pa.StructArray.from_arrays([pa.array(data), pa.array(names)], names=["bytes", "path"])
    for images, paths in ((structs, names), (pa.array(data), [None] * 4)):
        pq.write_table(pa.table({"image": images, "task": tasks}), work / "list.parquet")
        given = [work / "list.parquet", work / "out.jsonl", "--store", work / "s", *wanted]
        done = run(*given, "--overwrite")
        assert done.exit_code == 0, done.output
        found = read(work / "out.jsonl")
        assert [row["image"] for row in found] == (paths if not wanted else [path for path in paths for _ in "ab"])
        errors = [row["p_error" if wanted else "error"] for row in found]
        assert "not an image" in errors[4 if wanted else 2]
        assert (errors[-1] is None) == (paths == names) or "the row names no image" in errors[-1]
        if not wanted:
            expected = Router(backbone, work / "s").run([str(work / "0.png"), str(work / "1.png")], ["a", "b"])
            assert [row["label"] for row in found[:2]] == expected.labels


# ---- every image through many tasks -------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("wanted", "names"), [("all", ["a", "b", "features"]), ("b, a@1,b@1", ["b", "a"])])
def test_every_image_through_many_tasks(work: Path, backbone: Backbone, wanted: str, names: list[str]) -> None:
    images = [str(work / f"{i}.png") for i in range(3)] + [str(work / "broken.png"), str(work / "4.png")]
    listed = write(work / "list.csv", pd.DataFrame({"image": images, "id": [5, 6, 7, 8, 9]}))
    done = run(listed, work / "out.jsonl", "--store", work / "s", "--tasks", wanted, "--batch-size", 2)
    assert done.exit_code == 0, done.output
    found = [json.loads(line) for line in (work / "out.jsonl").read_text().splitlines()]
    assert [(row["id"], row["task"]) for row in found] == [(i, name) for i in (5, 6, 7, 8, 9) for name in names]
    assert all(row["version"] == 1 for row in found)
    for row in found:
        if row["id"] == 8:
            assert "not an image" in row["error"]
        elif row["task"] == "features":
            assert "has no head" in row["error"]
        else:
            expected = Router(backbone, work / "s").run([row["image"]], row["task"])
            assert row["label"] == expected.labels[0]
            assert row["probability"] == pytest.approx(float(expected.probs[0].max()), abs=1e-4)


def test_logits_that_are_not_finite_are_an_error(work: Path, task_maker: Callable[..., Task]) -> None:
    made = task_maker("nan", seed=9)
    tensors = {**made.tensors, made.record["head"]["weight"]: floats(np.full((3, 192), 3e38))}  # its sums overflow
    with Store(work / "s") as store:
        store.add(make_task(made.record, tensors))
    rows = pd.DataFrame({"image": ["0.png", "1.png", "2.png"], "task": ["a", "nan", "b"]})
    done = run(write(work / "list.csv", rows), work / "out.jsonl", "--store", work / "s")
    assert "2 predictions, 1 error" in done.stdout
    row = read(work / "out.jsonl")[1]
    assert (row["label"], row["probability"], row["topk"]) == (None, None, None)
    assert "not finite" in row["error"]


def test_a_task_that_cannot_be_run_fails_only_its_own_rows(
    work: Path, monkeypatch: pytest.MonkeyPatch, task_maker: Callable[..., Task]
) -> None:
    with Store(work / "s") as store:
        store.add(task_maker("c", seed=5))
    run_engine = Engine.run

    def failing(self: Engine, images: Any, image_of: Any, uses: Any, *others: Any) -> Any:
        if any(use.task.name == "c" for use in uses):
            raise RouterError("task 'c' is broken")
        return run_engine(self, images, image_of, uses, *others)

    monkeypatch.setattr(Engine, "run", failing)
    rows = pd.DataFrame({"image": [f"{i}.png" for i in range(4)], "task": ["a", "c", "a", "c"]})
    listed = write(work / "list.csv", rows)
    done = run(listed, work / "out.jsonl", "--store", work / "s")
    assert "2 predictions, 2 errors" in done.stdout
    assert [row["error"] for row in read(work / "out.jsonl")] == [None, "task 'c' is broken"] * 2
    done = run(listed, work / "many.jsonl", "--store", work / "s", "--tasks", "c,a,b", "--prefix", "p_")
    assert "8 predictions, 4 errors" in done.stdout
    found = read(work / "many.jsonl")
    assert [(row["p_task"], row["p_error"]) for row in found[:3]] == [
        ("c", "task 'c' is broken"),
        ("a", None),
        ("b", None),
    ]


# ---- batches and bounds -------------------------------------------------------------------------


class Idle:
    """A router that answers at once, and notes what it was asked."""

    def __init__(self, backbone: Backbone, meanwhile: Callable[[int], None] = lambda batch: None) -> None:
        self.backbone, self.device, self.jpegs = backbone, torch.device("cpu"), None
        self.meanwhile = meanwhile
        self.asked: list[tuple[int, list[str]]] = []

    def check(self, task: str) -> None:
        pass

    def run_batch(self, batch: Batch, tasks: list[str], **_: object) -> Predictions:
        self.asked.append((batch.images.shape[2], tasks))
        self.meanwhile(len(self.asked))
        count = len(tasks)
        return Predictions(torch.zeros(count, 2), tasks, [("x", "y")] * count, [1] * count)


def options(size: int) -> dict[str, Any]:
    return {
        "batch_size": size,
        "top": 1,
        "threshold": "stored",
        "dtype": "float32",
        "device": "cpu",
        "tasks": None,
        "prefix": "",
        "max_pixels": 10**6,
    }


def test_rows_of_one_preprocessing_fill_batches(work: Path, backbone: Backbone) -> None:
    names = ["a", "b", "b", "a", "a"] * 20
    rows = pd.DataFrame({"image": [str(work / f"{i % 6}.png") for i in range(100)], "task": names})
    listed = ImageList.scan(write(work / "list.csv", rows), ["image", "task"])
    router: Any = Idle(backbone)
    with Store(work / "s") as store:
        infer(router, store, listed, work / "out.csv", options(8))
    assert [len(tasks) for side, tasks in router.asked if side == 48] == [8] * 7 + [4]
    assert [len(tasks) for side, tasks in router.asked if side == 64] == [8] * 5
    assert all(len(set(tasks)) == 1 for _, tasks in router.asked)
    assert [row["task"] for row in read(work / "out.csv")] == names


@pytest.mark.slow
def test_memory_does_not_grow_with_the_list(work: Path, backbone: Backbone) -> None:
    router: Any = Idle(backbone)
    peaks = []
    with Store(work / "s") as store:
        for suffix in (".csv", ".jsonl", ".parquet"):
            for rows in (2_000, 8_000):
                image = str(work / "0.png")
                frame = pd.DataFrame({"image": [image] * rows, "task": ["a"] * rows, "n": range(rows)})
                write(work / f"list{suffix}", frame)
                del frame
                held: list[int] = []
                router.meanwhile = lambda _, held=held: held.append(pa.total_allocated_bytes())
                tracemalloc.start()
                listed = ImageList.scan(work / f"list{suffix}", ["image", "task"])
                infer(router, store, listed, work / f"out{suffix}", options(64), overwrite=True)
                peaks.append(tracemalloc.get_traced_memory()[1] + max(held))
                tracemalloc.stop()
                assert sum(len(tasks) for _, tasks in router.asked) == rows
                router.asked.clear()
            short, long = peaks[-2:]
            assert long < 1.5 * short + 2**20, (suffix, peaks)


def test_no_more_images_are_held_than_the_batches_ahead() -> None:
    alive = most = 0

    def made() -> Iterator[int]:
        nonlocal alive, most
        for number in range(50):
            alive += 1
            most = max(most, alive)
            yield number

    for number in ahead(made(), 2):
        time.sleep(0.001)
        if number % 10 == 0:
            time.sleep(0.02)  # time enough for a feeder without bounds
        alive -= 1
    assert most <= 2 + 1  # two ahead and the one in work


def test_decoding_goes_on_while_the_router_runs(
    work: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = [threading.Event() for _ in range(6)]

    def watched(images: list[str], ways: list[Preprocess], spent: Any) -> list[Any]:
        found = decode(images, ways, spent)
        decoded[int(Path(images[0]).stem)].set()
        return found

    monkeypatch.setattr("router.infer.plan.decode", watched)
    seen = []
    router: Any = Idle(backbone, lambda batch: seen.append(batch == 6 or decoded[batch].wait(30)))
    rows = pd.DataFrame({"image": [str(work / f"{i}.png") for i in range(6)], "task": "a"})
    listed = ImageList.scan(write(work / "list.csv", rows), ["image", "task"])
    with Store(work / "s") as store:
        infer(router, store, listed, work / "out.csv", options(1))
    assert seen == [True] * 6  # the next image was there before this one's run was over


def test_an_error_of_the_reader_ends_the_run() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise OSError("gone")

    items = ahead(broken(), 2)
    assert next(items) == 1
    with pytest.raises(OSError, match="gone"):
        next(items)


# ---- folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [(), ("--tasks", "a,b")])
def test_a_folder_has_the_rows_of_a_file_and_numbers_them(work: Path, wanted: tuple[str, ...]) -> None:
    listed = long_list(work, 40)
    if wanted:
        write(listed, pd.read_csv(listed).drop(columns="task"))
    args = ["--store", work / "s", "--batch-size", 1, *wanted]
    assert run(listed, work / "out.parquet", *args).exit_code == 0
    assert run(listed, work / "out", *args).exit_code == 0
    found = pq.read_table(work / "out")
    each = len(wanted) or 1
    assert found["row"].to_pylist() == [row for row in range(40) for _ in range(each)]
    assert found.drop_columns("row") == pq.read_table(work / "out.parquet")
    assert [path.name for path in (work / "out").iterdir()] == ["00000000.parquet"]
    assert "finished before" in run(listed, work / "out", *args).stderr
    assert run(listed, work / "out", *args, "--overwrite").exit_code == 0
    assert pq.read_table(work / "out") == found
    assert sorted(path.name for path in work.glob("out*")) == sorted(
        ["out", "out.run.json", "out.parquet", "out.parquet.run.json"]
    )


def test_a_folder_that_no_run_wrote_or_that_was_changed_is_never_replaced(work: Path) -> None:
    listed = long_list(work, 4)
    args = ["--store", work / "s"]
    (work / "out").mkdir()
    assert "no run wrote it" in run(listed, work / "out", *args, "--overwrite").stderr
    (work / "out").rmdir()
    assert run(listed, work / "out", *args).exit_code == 0
    (work / "out" / "more.txt").write_text("mine")
    assert "was changed since a run wrote it" in run(listed, work / "out", *args, "--overwrite").stderr
    assert (work / "out" / "more.txt").read_text() == "mine"


def test_parts_that_are_missing_in_the_middle_are_done(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a cluster, parts are finished in any order."""
    listed = long_list(work, 60)
    args = ["--store", work / "s", "--batch-size", 1]
    assert run(listed, work / "whole", *args).exit_code == 0
    with monkeypatch.context() as patched:
        patched.setattr(router.infer.parts.Parts, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(listed, work / "out", *args).exit_code != 0
    (work / "out.parts" / "00000001.parquet").unlink()
    done = run(listed, work / "out", *args, "--json")
    assert json.loads(done.stdout)["resumed_images"] == 44
    assert pq.read_table(work / "out") == pq.read_table(work / "whole")


# ---- clusters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--ray", "list.csv", "out"], "'list.csv': expected an address, found a list: write --ray after LIST"),
        (["list.csv", "out", "--workers", 2], "are for a cluster: give --ray, too"),
        (["list.csv", "out.d", "--ray"], "expected a file ending in .csv, .jsonl, .parquet, or a folder"),
    ],
)
def test_mistakes_about_clusters(work: Path, monkeypatch: pytest.MonkeyPatch, args: list[object], message: str) -> None:
    monkeypatch.chdir(work)
    long_list(work, 4)
    done = run(*args, "--store", "s")
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())


def test_without_ray_one_line_says_what_to_install(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "ray" or name.startswith("router.cluster")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    done = run(long_list(work, 4), work / "out", "--store", work / "s", "--ray")
    assert (done.exit_code, "--ray needs ray: pip install 'pear-adapters[ray]'" in done.stderr) == (2, True)


# ---- interruptions ------------------------------------------------------------------------------


def long_list(work: Path, rows: int, suffix: str = ".csv") -> Path:
    images = [str(work / ("broken.png" if i % 41 == 7 else f"{i % 6}.png")) for i in range(rows)]
    tasks = ["zebra" if i % 53 == 9 else "ab"[i % 3 == 0] for i in range(rows)]
    return write(work / f"list{suffix}", pd.DataFrame({"image": images, "task": tasks, "id": range(rows)}))


@pytest.mark.slow
def test_kill_9_and_the_same_command_give_what_an_uninterrupted_run_gives(work: Path) -> None:
    listed, suffix = long_list(work, 320), ".jsonl"
    args = ["--store", work / "s", "--batch-size", 4]
    assert run(listed, work / f"whole{suffix}", *args).exit_code == 0
    out, parts = work / f"out{suffix}", work / f"out{suffix}.parts"
    command = [sys.executable, ROOT / "tools" / "batch_infer.py", listed, out, *args]
    process = subprocess.Popen([str(a) for a in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=work)
    while len(list(parts.glob("*.parquet"))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = len(list(parts.glob("*.parquet")))
    assert 2 <= kept < 5
    assert not out.exists()
    done = run(listed, out, *args, "--json")
    assert (done.exit_code, json.loads(done.stdout)["resumed_images"]) == (0, 64 * kept)
    assert out.read_bytes() == (work / f"whole{suffix}").read_bytes()
    assert not parts.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("after", "suffix", "wanted"),
    [
        (0, ".csv", ()),
        (1, ".csv", ()),
        (3, ".csv", ("--tasks", "b,a", "--prefix", "p_")),
        (4, ".jsonl", ()),
        (5, ".parquet", ()),
        (5, ".csv", ()),
        (6, ".csv", ()),
        (7, ".csv", ()),
        (8, ".csv", ()),
        (10, ".csv", ()),
    ],
)
def test_a_run_that_dies_at_any_step_goes_on(
    work: Path, monkeypatch: pytest.MonkeyPatch, after: int, suffix: str, wanted: tuple[str, ...]
) -> None:
    """Dies before the n-th file gets its name: the plan, parts 0 to 3, record, output; or as the folder is given up."""
    listed = long_list(work, 50)
    args = ["--store", work / "s", "--batch-size", 1, *wanted]
    assert run(listed, work / f"whole{suffix}", *args).exit_code == 0
    steps = 0

    def dying(call: Callable[..., None]) -> Callable[..., None]:
        def step(*given: Any) -> None:
            nonlocal steps
            steps += 1
            if steps > after:
                raise KeyboardInterrupt
            call(*given)

        return step

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", dying(os.replace))
        patched.setattr(Path, "unlink", dying(Path.unlink))
        assert run(listed, work / f"out{suffix}", *args).exit_code != 0
    done = run(listed, work / f"out{suffix}", *args, "--json")
    assert done.exit_code == 0, done.output
    assert (work / f"out{suffix}").read_bytes() == (work / f"whole{suffix}").read_bytes()
    assert not (work / f"out{suffix}.parts").exists()
    assert (work / f"out{suffix}.run.json").exists()
    assert json.loads(done.stdout)["finished_before"] == (after > 6)
    if after < 6:
        assert json.loads(done.stdout)["resumed_images"] == min(50, 16 * max(0, after - 1))


def interrupted(work: Path, monkeypatch: pytest.MonkeyPatch, *args: object) -> list[object]:
    """Leaves a run after its first part; returns its arguments."""
    given = [long_list(work, 40), work / "out.csv", "--store", work / "s", "--batch-size", 1, *args]
    with monkeypatch.context() as patched:
        write_part = router.infer.parts.Parts.write
        patched.setattr(router.infer.parts.Parts, "write", lambda self, number, table: (
            write_part(self, number, table) if number == 0 else (_ for _ in ()).throw(KeyboardInterrupt)))  # fmt: skip
        assert run(*given).exit_code != 0
    assert len(list((work / "out.csv.parts").glob("*.parquet"))) == 1
    return given


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [(), ("--tasks", "all", "--prefix", "p_")])
def test_a_resumed_run_keeps_the_versions_it_began_with(
    work: Path, monkeypatch: pytest.MonkeyPatch, task_maker: Callable[..., Task], wanted: tuple[str, ...]
) -> None:
    given = interrupted(work, monkeypatch, *wanted)
    with Store(work / "s") as store:
        store.add(task_maker("a", seed=77))
        store.add(task_maker("c", seed=78))
    assert run(*given).exit_code == 0
    p = "p_" if wanted else ""
    found = read(work / "out.csv")
    assert {row[f"{p}version"] for row in found if row[f"{p}task"] == "a"} == {1}
    assert "c" not in {row[f"{p}task"] for row in found}
    done = run(*given)
    assert (done.exit_code, "finished before" in done.stderr) == (0, True)
    assert run(*given, "--overwrite").exit_code == 0  # a new run
    assert {row[f"{p}version"] for row in read(work / "out.csv") if row[f"{p}task"] == "a"} == {2}


@pytest.mark.slow
def test_an_unfinished_run_is_not_mixed_with_another(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = interrupted(work, monkeypatch)
    other = [*given[:-1], 2]
    done = run(*other)
    assert done.exit_code == 1
    assert "holds an unfinished run with other options (batch_size was 1, is 2): repeat" in done.stderr
    with (work / "list.csv").open("a") as file:
        file.write(f"{work / '0.png'},a,40\n")
    done = run(*given)
    assert (done.exit_code, "other options (list was" in done.stderr) == (1, True)
    done = run(*given, "--restart", "--json")
    assert (done.exit_code, json.loads(done.stdout)["resumed_images"], len(read(work / "out.csv"))) == (0, 0, 41)


@pytest.mark.slow
def test_two_runs_never_write_one_output(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = interrupted(work, monkeypatch)
    holder = os.open(work / "out.csv.parts", os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    done = run(*given)
    assert (done.exit_code, "out.csv: another run is writing it" in done.stderr) == (1, True)
    os.close(holder)
    assert run(*given).exit_code == 0


def test_a_folder_of_something_else_is_left_alone(work: Path) -> None:
    (work / "out.csv.parts").mkdir()
    (work / "out.csv.parts" / "mine.txt").write_text("mine")
    for more in ([], ["--restart"]):
        done = run(long_list(work, 3), work / "out.csv", "--store", work / "s", *more)
        assert (done.exit_code, "holds mine.txt, which no run wrote: move it" in done.stderr) == (1, True)
    assert (work / "out.csv.parts" / "mine.txt").read_text() == "mine"


@pytest.mark.slow
def test_an_output_is_replaced_only_by_a_whole_one(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(long_list(work, 3), work / "out.csv", "--store", work / "s").exit_code == 0
    given = interrupted(work, monkeypatch, "--overwrite")
    assert len(read(work / "out.csv")) == 3
    assert run(*given).exit_code == 0
    assert len(read(work / "out.csv")) == 40


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [long_list(work, 20), work / "out.csv", "--store", work / "s", "--batch-size", 1]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(router.infer.parts, "write_list", full)
        done = run(*given)
    assert done.exit_code == 1
    assert "out.csv: No space left on device; finished parts are kept: free some space" in done.stderr.splitlines()[-1]
    assert json.loads(run(*given, "--json").stdout)["resumed_images"] == 20


@pytest.mark.slow
def test_the_bar_counts_every_row(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []

    def kept(**given: Any) -> Any:
        bars.append(tqdm(**given))
        return bars[-1]

    monkeypatch.setattr(router.infer.work, "tqdm", kept)
    given = [long_list(work, 60), work / "out.csv", "--store", work / "s", "--batch-size", 2]
    for more in ([], ["--tasks", "a,b,features", "--prefix", "p_", "--overwrite"]):
        assert run(*given, *more).exit_code == 0
    assert [(one.n, one.total) for one in bars] == [(60, 60), (180, 180)]


def test_the_throughput_is_reported(work: Path) -> None:
    given = [long_list(work, 10), work / "out.csv", "--store", work / "s"]
    done = run(*given)
    assert " images in " in done.stderr
    assert " images/s" in done.stderr
    report = json.loads(run(*given, "--overwrite", "--json").stdout)
    assert report["images_per_s"] == pytest.approx(10 / report["seconds"], rel=0.05)
    assert (report["images"], report["predictions"] + report["errors"]) == (10, 10)


# ---- outputs ------------------------------------------------------------------------------------


def small_list(work: Path, **more: Any) -> Path:
    return write(work / "list.csv", pd.DataFrame({"image": ["0.png", "broken.png"], "task": ["a", "b"], **more}))


@pytest.mark.slow
def test_a_finished_run_is_not_run_again(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [small_list(work), work / "out.csv", "--store", work / "s"]
    report = json.loads(run(*given, "--json").stdout)
    assert report["finished_before"] is False
    before = (work / "out.csv").stat().st_mtime_ns
    with monkeypatch.context() as patched:
        patched.setattr(Router, "run", None)
        done = run(*given)
        assert (done.exit_code, done.stdout) == (0, f"1 prediction, 1 error, finished: {work / 'out.csv'}\n")
        assert "finished before, with the same lists, options, store and backbone; --overwrite" in done.stderr
        again = json.loads(run(*given, "--json").stdout)
    assert again == {**report, "images": 0, "resumed_images": 2, "seconds": 0.0, "images_per_s": 0.0,
                     "finished_before": True}  # fmt: skip
    assert (work / "out.csv").stat().st_mtime_ns == before
    assert not (work / "out.csv.parts").exists()
    for more in (["--top", 1], ["--tasks", "a", "--prefix", "p_"], ["--batch-size", 1], ["--root", work]):
        done = run(*given, *more)
        assert (done.exit_code, "out.csv: was written with other options (" in done.stderr) == (1, True)
        assert "choose another output, or replace it with --overwrite" in done.stderr
    small_list(work, more=[1, 2])
    done = run(*given)
    assert (done.exit_code, "with other options (list was " in done.stderr) == (1, True)
    assert (work / "out.csv").stat().st_mtime_ns == before
    assert run(*given, "--overwrite").exit_code == 0
    assert "more" in read(work / "out.csv")[0]


@pytest.mark.slow
def test_what_no_run_wrote_is_never_replaced(work: Path) -> None:
    given = [small_list(work), work / "out.csv", "--store", work / "s", "--overwrite"]
    out, record = work / "out.csv", work / "out.csv.run.json"

    def refused(message: str) -> None:
        done = run(*given)
        assert (done.exit_code, message in done.stderr) == (1, True), done.output
        assert not (work / "out.csv.parts").exists()

    out.write_text("mine")
    refused("out.csv: no run wrote it, so it is not replaced: move it away, or choose another output")
    assert out.read_text() == "mine"
    out.unlink()
    for link in (work / "0.png", work / "nowhere"):
        out.symlink_to(link)
        refused("out.csv: is a link")
        out.unlink()
    os.mkfifo(out)
    refused("out.csv: is not a regular file")
    out.unlink()
    for text in ("mine", "{}", "[]", '{"plan": 1}'):
        record.write_text(text)
        refused("out.csv.run.json: no run wrote this file")
        assert record.read_text() == text
        record.unlink()
    assert run(*given).exit_code == 0
    with out.open("a") as file:
        file.write("mine\n")
    refused("out.csv: it was changed since a run wrote it")
    assert out.read_text().endswith("mine\n")
    out.unlink()
    assert run(*given[:-1]).exit_code == 0  # what was moved away can be made again
    record.unlink()
    refused("out.csv: no run wrote it")


@pytest.mark.slow
def test_what_is_put_in_the_way_during_a_run_is_not_replaced(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = interrupted(work, monkeypatch)
    (work / "out.csv.parts" / "notes.txt").write_text("mine")
    for more in ([], ["--restart"]):
        done = run(*given, *more)
        assert (done.exit_code, "holds notes.txt, which no run wrote" in done.stderr) == (1, True)
    (work / "out.csv.parts" / "notes.txt").unlink()
    write_list = router.infer.writing.write_list

    def late(*args: Any) -> None:
        write_list(*args)
        (work / "out.csv").write_text("mine")

    with monkeypatch.context() as patched:
        patched.setattr(router.infer.parts, "write_list", late)
        done = run(*given)
    assert (done.exit_code, "out.csv: no run wrote it" in done.stderr) == (1, True)
    assert (work / "out.csv").read_text() == "mine"
    (work / "out.csv").unlink()
    assert json.loads(run(*given, "--json").stdout)["resumed_images"] == 40


@pytest.mark.slow
def test_an_unfinished_run_that_had_done_nothing_is_forgotten(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [long_list(work, 20), work / "out.csv", "--store", work / "s", "--batch-size", 1]
    with monkeypatch.context() as patched:
        patched.setattr(router.infer.parts.Parts, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(*given).exit_code == 130
    assert (work / "out.csv.parts" / "plan.json").exists()
    long_list(work, 21)
    assert run(*given).exit_code == 0
    assert len(read(work / "out.csv")) == 21


def test_a_parts_folder_that_is_a_link_is_not_followed(work: Path) -> None:
    (work / "mine").mkdir()
    (work / "mine" / "00000000.parquet").write_text("mine")
    (work / "out.csv.parts").symlink_to(work / "mine")
    done = run(small_list(work), work / "out.csv", "--store", work / "s", "--restart")
    assert (done.exit_code, "out.csv.parts" in done.stderr) == (1, True)
    assert (work / "mine" / "00000000.parquet").read_text() == "mine"


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_the_run_goes_on_later(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [long_list(work, 120), work / "out.csv", "--store", work / "s", "--batch-size", 2]
    run_router, calls = Router.run_batch, 0

    def interrupted_run(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 40:
            signal.raise_signal(signal.SIGINT)
        return run_router(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Router, "run_batch", interrupted_run)
        done = run(*given)
    assert done.exit_code == 130
    last = done.stderr.splitlines()[-1]
    assert last == "Error: interrupted; the same command resumes after the last finished part"
    report = json.loads(run(*given, "--json").stdout)
    assert 32 <= report["resumed_images"] < 120
    assert report["predictions"] + report["errors"] == 120


@pytest.mark.slow
def test_a_disk_that_is_full_indeed(work: Path, small_disk: Path) -> None:
    given: list[object] = ["--store", work / "s", "--batch-size", 2]
    for suffix in (".csv", ".jsonl", ".parquet"):
        out = small_disk / f"out{suffix}"
        for size in (12_000, 1_000):
            rows = pd.DataFrame(
                {"image": ["0.png"] * 50, "task": "a", "own": [os.urandom(size).hex() for _ in range(50)]}
            )
            done = run(write(work / "list.csv", rows), out, *given, "--restart")
            if size == 1_000:
                assert (done.exit_code, len(read(out))) == (0, 50)
                continue
            assert (done.exit_code, "Traceback" in done.stderr, out.exists()) == (1, False, False)
            assert "o space left on device" in done.stderr.splitlines()[-1]
            assert "free some space and run the same command" in done.stderr.splitlines()[-1]
        for path in small_disk.iterdir():
            path.unlink()


def test_what_may_not_be_read_or_written_is_said_in_one_line(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "".encode("utf-8-sig")  # loads the codec: the other user may not read where Python lies
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        monkeypatch.chdir(folder)
        Path("locked").mkdir(mode=0o700)
        for name in ("list.csv", "shut.csv", "locked/list.csv"):
            Path(name).write_text("image,task\n0.png,a\n")
        Path("shut.csv").chmod(0)
        for listed, out in (
            ("locked/list.csv", "o.csv"), ("shut.csv", "o.csv"), ("list.csv", "o.csv"), ("list.csv", "locked/o.csv"),
            ("list.csv", "shut.csv/o.csv"), ("list.csv", "locked"),
        ):  # fmt: skip
            os.seteuid(65534)
            try:
                done = run(listed, out, "--store", work / "s")
            finally:
                os.seteuid(0)
            assert done.exit_code in (1, 2, 3, 11), done.output
            assert done.stderr.splitlines()[-1].startswith("Error: "), done.stderr
