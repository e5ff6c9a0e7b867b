"""tools/batch_infer.py: every format in and out, mixed tasks, and rows that cannot be served."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from pear_store import Store, Task, make_task
from router import Backbone, Router
from tools.batch_infer import main


@pytest.fixture
def work(tmp_path: Path, task_maker: Callable[..., Task]) -> Path:
    with Store.create(tmp_path / "s") as store:
        good = task_maker("a", seed=1)
        store.add(good)
        store.add(task_maker("b", seed=2, classes=5, size=64))
        store.add(task_maker("features", seed=3, headless=True))
        other = {**good.record, "task": "foreign", "backbone": {"model": "vit_huge", "digest": "sha256:" + "a" * 64}}
        store.add(make_task(other, good.tensors))
    rng = np.random.default_rng(0)
    for i in range(6):
        shape = (20 + i, 30) if i % 2 else (30, 20 + i, 3)
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"not an image")
    return tmp_path


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)


def write(path: Path, rows: pd.DataFrame) -> Path:
    if path.suffix == ".csv":
        rows.to_csv(path, index=False)
    elif path.suffix == ".jsonl":
        rows.to_json(path, orient="records", lines=True)
    else:
        rows.to_parquet(path)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".csv":
        frame = pd.read_csv(path)
    elif path.suffix == ".jsonl":
        frame = pd.read_json(path, lines=True, dtype={"label": str})
    else:
        frame = pd.read_parquet(path)
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


@pytest.mark.parametrize("source", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("out", [".csv", ".jsonl", ".parquet"])
def test_formats_and_mixed_tasks(work: Path, backbone: Backbone, source: str, out: str) -> None:
    names = ["a", "b", "a@1", "b", "a", "b"]
    rows = pd.DataFrame({"id": range(6), "image": [str(work / f"{i}.png") for i in range(6)], "task": names})
    listed = write(work / f"list{source}", rows)
    done = run(listed, work / f"out{out}", "--store", work / "s", "--batch-size", 4, "--top", 2)
    assert (done.exit_code, done.stdout) == (0, f"6 predictions, 0 errors: {work / f'out{out}'}\n"), done.stderr
    found = read(work / f"out{out}")
    assert [row["id"] for row in found] == list(range(6))
    expected = Router(backbone, work / "s").run(rows["image"].tolist(), names)
    assert [row["label"] for row in found] == expected.labels
    for row, probs, top in zip(found, expected.probs, expected.topk(2), strict=True):
        assert row["probability"] == pytest.approx(float(probs.max()), abs=1e-4)
        assert [label for label, _ in json.loads(row["topk"])] == [label for label, _ in top]
        assert row["error"] is None


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
        (["list.csv", "o.xlsx"], "o.xlsx: expected a file ending in .csv, .jsonl, .parquet"),
        (["list.csv", "nowhere/o.csv"], "folder nowhere does not exist"),
        (["list.csv", "list.csv"], "is the list itself"),
        (["list.csv", "o.csv", "--device", "gpu"], "device 'gpu' cannot be used"),
        (["bad.csv", "o.csv"], "column 'task' is missing"),
        (["broken.parquet", "o.csv"], "cannot be read as .parquet"),
        (["list.csv", "o.csv", "--store", "nowhere"], "nowhere: no store there"),
        (["list.csv", "o.csv", "--backbone", "vit_none"], "timm has no model of that name"),
    ],
)
def test_mistakes(work: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str) -> None:
    monkeypatch.chdir(work)
    write(work / "list.csv", pd.DataFrame({"image": ["0.png"], "task": ["a"]}))
    write(work / "bad.csv", pd.DataFrame({"image": ["0.png"]}))
    (work / "broken.parquet").write_bytes(b"nope")
    done = run(*(["--store", "s", *args]))
    assert done.exit_code != 0
    assert message in done.stderr
    assert "Traceback" not in done.output
    assert not (work / "o.csv").exists()
