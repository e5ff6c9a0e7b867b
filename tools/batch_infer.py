#!/usr/bin/env python3
"""Predict for a list of images, each with its own task, in mixed batches on one backbone.

The list is CSV, JSON lines or Parquet (by its file's ending: .csv, .jsonl, .parquet) with columns `image` (a path or
any fsspec URL) and `task` (a task's name, or name@version). The output has the list's columns, then `label`,
`probability`, `topk` (JSON: [[label, probability], ...]) and `error`. A row that cannot be served, because its image is
unreadable or its task unknown, gets its `error` and costs no other row anything.

    python tools/batch_infer.py list.csv predictions.parquet --store pear.store --backbone pear_tiny
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm

from pear_store import PearStoreError
from router import Router, RouterError, open_image

FORMATS = (".csv", ".jsonl", ".parquet")


def read_list(path: Path) -> pd.DataFrame:
    """The list's rows, all columns kept; image and task as text."""
    if not path.is_file():
        raise click.ClickException(f"{path}: no such file")
    try:
        if path.suffix == ".csv":
            rows = pd.read_csv(path, dtype={"image": str, "task": str}, keep_default_na=False)
        elif path.suffix == ".jsonl":
            rows = pd.read_json(path, lines=True, dtype={"image": str, "task": str})
        else:
            rows = pd.read_parquet(path)
    except (ValueError, OSError, UnicodeDecodeError) as error:
        raise click.ClickException(f"{path}: cannot be read as {path.suffix}: {error}") from None
    if missing := {"image", "task"} - set(rows.columns):
        found = ", ".join(map(str, rows.columns)) or "none"
        raise click.ClickException(
            f"{path}: column {min(missing)!r} is missing: expected image and task, found {found}"
        )
    return rows


def write_list(path: Path, rows: pd.DataFrame) -> None:
    if path.suffix == ".csv":
        rows.to_csv(path, index=False)
    elif path.suffix == ".jsonl":
        rows.to_json(path, orient="records", lines=True, force_ascii=False)
    else:
        rows.to_parquet(path, index=False)


def load(path: str) -> Image.Image | str:
    """The image, or why there is none."""
    try:
        return open_image(path)
    except RouterError as error:
        return str(error)


def predict(
    router: Router, images: list[str], tasks: list[str], top: int, workers: ThreadPoolExecutor
) -> list[dict[str, Any]]:
    """One output row for each image of a batch."""
    results: list[dict[str, Any]] = [{"label": None, "probability": None, "topk": None, "error": None} for _ in images]
    loaded = list(workers.map(load, images))
    known: dict[str, str | None] = {}
    for task in dict.fromkeys(tasks):
        try:
            router.check(task)
            known[task] = None
        except (RouterError, PearStoreError) as error:
            known[task] = str(error)
    good = []
    for i, (image, task) in enumerate(zip(loaded, tasks, strict=True)):
        problem = known[task] or (image if isinstance(image, str) else None)
        if problem is None:
            good.append(i)
        else:
            results[i]["error"] = problem
    if good:
        predictions = router.run([loaded[i] for i in good], [tasks[i] for i in good])
        for i, best in zip(good, predictions.topk(top), strict=True):
            best = [(label, round(probability, 6)) for label, probability in best]
            if best:
                results[i].update(label=best[0][0], probability=best[0][1], topk=json.dumps(best, ensure_ascii=False))
            else:
                results[i]["error"] = f"task {tasks[i]!r} has no head: it gives features, not classes"
    return results


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--store", required=True, type=click.Path(), help="The store that holds the tasks.")
@click.option("--backbone", default="pear_tiny", show_default=True, help="A timm model's name.")
@click.option("--weights", type=click.Path(), help="Local safetensors file of the backbone's weights.")
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(1))
@click.option("--top", default=5, show_default=True, type=click.IntRange(1), help="Classes in `topk`.")
@click.option("--device", help="Such as cpu or cuda [default: cuda where there is one].")
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16", "float16"]))
def main(
    source: Path, out: Path, store: str, backbone: str, weights: str | None, batch_size: int, top: int,
    device: str | None, dtype: str,
) -> None:  # fmt: skip
    for path in (source, out):
        if path.suffix not in FORMATS:
            raise click.UsageError(f"{path}: expected a file ending in {', '.join(FORMATS)}")
    if not out.parent.is_dir():
        raise click.ClickException(f"{out}: folder {out.parent} does not exist; make it first")
    if source.exists() and out.exists() and out.samefile(source):
        raise click.UsageError(f"{out}: is the list itself; choose another output")
    rows = read_list(source)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    results: list[dict[str, Any]] = []
    try:
        router = Router(backbone, store, weights=weights, device=device, dtype=getattr(torch, dtype))
        images, tasks = rows["image"].astype(str).tolist(), rows["task"].astype(str).tolist()
        with ThreadPoolExecutor() as workers, tqdm(total=len(rows), unit="image", file=sys.stderr) as bar:
            for i in range(0, len(rows), batch_size):
                part = slice(i, i + batch_size)
                results += predict(router, images[part], tasks[part], top, workers)
                bar.update(len(results) - i)
    except (RouterError, PearStoreError) as error:
        raise click.ClickException(str(error)) from None
    columns = ["label", "probability", "topk", "error"]
    found = pd.DataFrame(results, columns=columns, index=rows.index)
    write_list(out, pd.concat([rows.drop(columns=columns, errors="ignore"), found], axis=1))
    failed = int(found["error"].notna().sum())
    click.echo(f"{len(rows) - failed} predictions, {failed} errors: {out}")


if __name__ == "__main__":
    main()
