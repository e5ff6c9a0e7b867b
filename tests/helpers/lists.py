"""What tests of lists of images need."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from click.testing import CliRunner, Result
from PIL import Image

from pear_store import Store, Task, make_task
from router.infer.cli import main


def make_list_folder(folder: Path, task_maker: Callable[..., Task], shapes: Iterable[tuple[int, ...]]) -> None:
    """A store `s` with tasks that run (a, b) and some that do not, images `0.png` and on, and `broken.png`."""
    with Store.create(folder / "s") as store:
        good = task_maker("a", seed=1)
        store.add(good)
        store.add(task_maker("b", seed=2, classes=5, size=64))
        store.add(task_maker("features", seed=3, headless=True))
        other = {**good.record, "task": "foreign", "backbone": {"model": "vit_huge", "digest": "sha256:" + "a" * 64}}
        store.add(make_task(other, good.tensors))
    rng = np.random.default_rng(0)
    for i, shape in enumerate(shapes):
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"not an image")


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)


def write(path: Path, rows: pd.DataFrame) -> Path:
    if path.suffix in (".csv", ".tsv"):
        rows.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
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
    rows: list[dict[str, Any]] = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return rows
