#!/usr/bin/env python3
"""Predict for a list of images of any length, each with its own task or each through many, on one backbone.

The list is CSV, JSON lines or Parquet (by its file's ending: .csv, .jsonl, .parquet) with columns `image` (a path or
any fsspec URL) and `task` (a task's name, or name@version). The output has the list's rows in its order, with all its
columns, then `version`, `label`, `probability`, `topk` (JSON: [[label, probability], ...]) and `error`. If an image is
unreadable or a task unknown, only that row fails: `error` says why.

A list's own columns are never replaced. If one has the name of a result, the list is refused: --prefix pear_ then names
the results `pear_label`, `pear_error` and so on.

With --tasks all, or --tasks a,b,c, the list needs no column `task`: every image goes through all these tasks, and
the output has a row for each image and task, which the column `task` names. `all` are the tasks that the store has for
this backbone.

The list is worked off in parts, kept in OUT.parts until OUT is written whole. If a run is interrupted, the same command
goes on after the last finished part, with the tasks' versions that it began with.

    python tools/batch_infer.py list.csv predictions.parquet --store pear.store --backbone pear_tiny
"""

import json
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import click
import pyarrow as pa
import torch
from platformdirs import user_data_path
from torch import Tensor
from tqdm import tqdm

from pear_store import PearStoreError, Store
from router import ImageError, Predictions, Preprocess, Router, RouterError, decode

sys.path.insert(0, str(Path(__file__).parents[1]))  # its neighbours, also where it is run as a file
from tools.lists import FORMATS, ImageList
from tools.parts import Parts

PART_BATCHES = 16
"""Batches in a part: what an interruption costs, and the window in which rows of one preprocessing meet."""
AHEAD = 2
"""Batches that are decoded and on the device before their turn."""
TASK = pa.field("task", pa.string())
"""A result, too, where every image goes through many tasks."""
RESULTS = pa.schema(
    [
        ("version", pa.int64()),
        ("label", pa.string()),
        ("probability", pa.float64()),
        ("topk", pa.string()),
        ("error", pa.string()),
    ]
)
Result = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """Rows of the list that are worked off and written together."""

    number: int
    table: pa.Table
    results: list[Result]
    """One for each row, or one for each row and task."""


@dataclass(frozen=True)
class Ask:
    """What a row asks of an image in one preprocessing."""

    image: str
    way: Preprocess
    tasks: list[str]
    results: list[Result]
    """One for each task, to be filled in."""


@dataclass(frozen=True)
class Batch:
    """Asks of one preprocessing, with their images on the device: float32 [batch, 3, h, w], normalised."""

    asks: list[Ask]
    images: Tensor


class Tasks:
    """What the names of tasks mean, looked up once: a task is run in the version it had then."""

    def __init__(self, router: Router, store: Store, versions: dict[str, int]) -> None:
        self._router, self._store, self._versions = router, store, versions
        self.find = lru_cache(65_536)(self._find)

    def _find(self, name: str | None) -> tuple[str, int, Preprocess] | str:
        """The task as ``name@version``, its version and preprocessing; or why it cannot be run."""
        if not name:
            return "no task is named"
        try:
            if name not in self._versions:
                self._versions[name] = self._store.resolve(name).version
            version = self._versions[name]
            task = f"{name.partition('@')[0]}@{version}"
            self._router.check(task)
            return task, version, Preprocess(self._store.get(task, copy=False).preprocess)
        except (RouterError, PearStoreError) as error:
            return str(error)


def batches(
    tables: Iterable[tuple[int, pa.Table]], tasks: Tasks, every: list[str], size: int, device: torch.device
) -> Iterator[Batch | Part]:
    """Of each numbered table: its batches, filled with rows of the same preprocessings, then the part they make up."""
    for number, table in tables:
        images = table["image"].cast(pa.string()).to_pylist()
        names = [every] * len(images) if every else [[name] for name in table["task"].cast(pa.string()).to_pylist()]
        part = Part(number, table, [])
        groups: dict[tuple[object, ...], list[list[Ask]]] = {}
        for image, row in zip(images, names, strict=True):
            asks: dict[object, Ask] = {}
            for name in row:
                part.results.append(result := dict.fromkeys(RESULTS.names))
                known = tasks.find(name)
                if isinstance(known, str):
                    result["error"] = known
                    continue
                task, result["version"], way = known
                if not image:
                    result["error"] = "no image is named"
                    continue
                ask = asks.setdefault(way.key, Ask(image, way, [], []))
                ask.tasks.append(task)
                ask.results.append(result)
            if asks:
                groups.setdefault(tuple(asks), []).append(list(asks.values()))
        for group in groups.values():
            for start in range(0, len(group), size):
                yield from load([ask for row in group[start : start + size] for ask in row], device)
        yield part


def load(asks: list[Ask], device: torch.device) -> Iterator[Batch]:
    """Decodes some rows' images: a batch for each preprocessing. An image that cannot be read fails its own row."""
    good: dict[object, list[tuple[Ask, Tensor]]] = {}
    for ask, pixels in zip(asks, decode([ask.image for ask in asks], [ask.way for ask in asks]), strict=True):
        if isinstance(pixels, ImageError):
            for result in ask.results:
                result["error"] = str(pixels)
        else:
            good.setdefault(ask.way.key, []).append((ask, pixels))
    for found in good.values():
        images = to_device(found[0][0].way, torch.stack([pixels for _, pixels in found]), device)
        yield Batch([ask for ask, _ in found], images)


def to_device(way: Preprocess, pixels: Tensor, device: torch.device) -> Tensor:
    """Normalised float32 [batch, 3, h, w] on the device, from uint8; on CUDA while other work runs there."""
    if device.type != "cuda":
        return way.normalise(pixels).to(device)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        images = way.normalise(pixels.pin_memory().to(device, non_blocking=True))
    stream.synchronize()  # holds up this thread only
    return images


def ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """The items, made by another thread, up to `depth` before they are asked for."""
    end: Any = object()
    feeder = ThreadPoolExecutor(1, "pear-feed")
    try:
        waiting = deque(feeder.submit(next, items, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(feeder.submit(next, items, end))
            yield item
    finally:
        feeder.shutdown(cancel_futures=True)


def serve(router: Router, batch: Batch, every: bool, top: int) -> None:
    """Runs a batch and fills its results in."""
    if not every:
        predictions = router.run(batch.images, [ask.tasks[0] for ask in batch.asks])
        fill([ask.results[0] for ask in batch.asks], predictions, top)
        return
    tasks = batch.asks[0].tasks
    for column, predictions in enumerate(router.run_all(batch.images, tasks).values()):
        fill([ask.results[column] for ask in batch.asks], predictions, top)


def fill(results: list[Result], predictions: Predictions, top: int) -> None:
    for result, task, found in zip(results, predictions.tasks, predictions.topk(top), strict=True):
        best = [(label, round(probability, 6)) for label, probability in found]
        if best:
            result.update(label=best[0][0], probability=best[0][1], topk=json.dumps(best, ensure_ascii=False))
        else:
            result["error"] = f"task {task.partition('@')[0]!r} has no head: it gives features, not classes"


def output_schema(listed: ImageList, with_task: bool, prefix: str) -> pa.Schema:
    """The list's columns, then those of the results.

    Raises:
        ClickException: the list has a column of a result's name.
    """
    added = [field.with_name(prefix + field.name) for field in ([TASK] if with_task else []) + list(RESULTS)]
    taken = [field.name for field in added if field.name in listed.schema.names]
    if taken:
        raise click.ClickException(
            f"{listed.path}: has columns of its own with names of results: {', '.join(taken)}; none is ever replaced: "
            f"rename them, or give {'another --prefix' if prefix else '--prefix pear_'}"
        )
    return pa.schema([*listed.schema, *added])


def output(part: Part, schema: pa.Schema, every: list[str]) -> pa.Table:
    """A part's rows of the output."""
    rows, each = part.table.num_rows, len(every) or 1
    results = pa.Table.from_pylist(part.results, RESULTS).columns
    if every:
        results.insert(0, pa.array([task.partition("@")[0] for task in every] * rows, pa.string()))
    listed = part.table.take(pa.array([row for row in range(rows) for _ in range(each)], pa.int64()))
    return pa.Table.from_arrays([*listed.columns, *results], schema=schema)


def infer(
    router: Router, store: Store, listed: ImageList, out: Path, options: dict[str, Any], restart: bool = False
) -> dict[str, Any]:
    """Works a list off, from where an interrupted run with the same options got to; returns what there is to report.

    Raises:
        ClickException: an unfinished run with other options, or another one now, has this output; or the list has a
            column of a result's name.
        RouterError, PearStoreError: tasks for all that cannot be run, or tasks that do not fit into the slots together.
    """
    prefix: str = options["prefix"]
    schema = output_schema(listed, options["tasks"] is not None, prefix)
    plan = {**options, "list": listed.digest, "store": str(store.path.resolve()), "backbone": router.backbone.digest}
    with closing(Parts(out, plan, lambda: choose_tasks(router, store, options["tasks"]), restart)) as parts:
        every: list[str] = parts.chosen
        versions: dict[str, int] = {}
        resumed = 0
        for table in parts.tables():
            resumed += table.num_rows // (len(every) or 1)
            if not every:
                names = table["task"].cast(pa.string()).to_pylist()
                asked = zip(names, table[f"{prefix}version"].to_pylist(), strict=True)
                versions |= {name: version for name, version in asked if version}
        tables = enumerate(listed.tables(PART_BATCHES * options["batch_size"]))
        left = ((number, table) for number, table in tables if not parts.has(number))
        work = batches(left, Tasks(router, store, versions), every, options["batch_size"], router.device)
        began = time.perf_counter()
        each, served = len(every) or 1, 0
        with tqdm(total=listed.rows * each, initial=resumed * each, unit="row", file=sys.stderr) as bar:
            for item in ahead(work, AHEAD):
                if isinstance(item, Batch):
                    serve(router, item, bool(every), options["top"])
                    rows = sum(len(ask.results) for ask in item.asks)
                    served += rows
                    bar.update(rows)
                else:
                    parts.write(item.number, output(item, schema, every))
                    bar.update(len(item.results) - served)  # those that cannot be served
                    served = 0
        seconds = time.perf_counter() - began
        errors = total = 0
        for table in parts.tables():
            total += table.num_rows
            errors += table.num_rows - table[f"{prefix}error"].null_count
        parts.finish(out, schema, parts.tables())
    images = listed.rows - resumed
    return {
        "predictions": total - errors,
        "errors": errors,
        "images": images,
        "resumed_images": resumed,
        "seconds": round(seconds, 3),
        "images_per_s": round(images / seconds, 2),
        "out": str(out),
    }


def choose_tasks(router: Router, store: Store, wanted: str | None) -> list[str]:
    """The tasks for every image, as name@version; none where each row has its own.

    Raises:
        ClickException: there is none for this backbone.
        RouterError, PearStoreError: a named one that this router cannot run.
    """
    if wanted is None:
        return []
    if wanted == "all":
        found = [f"{version.task}@{version.version}" for version in store.iter_tasks()]
        chosen = [t for t in found if store.get(t, copy=False).backbone_digest == router.backbone.digest]
        if not chosen:
            raise click.ClickException(f"{store.path}: holds no task for backbone {router.backbone.name}")
    else:
        versions = [store.resolve(name.strip()) for name in wanted.split(",")]
        chosen = list(dict.fromkeys(f"{version.task}@{version.version}" for version in versions))
    for task in chosen:
        router.check(task)
    return chosen


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--store", "where", type=click.Path(path_type=Path), envvar="PEAR_STORE", default=user_data_path("pear") / "store",
    help="The store that holds the tasks [default: $PEAR_STORE, else the user's data directory].",
)  # fmt: skip
@click.option("--tasks", help="Through which tasks every image goes: all, or names with commas.")
@click.option("--backbone", default="pear_tiny", show_default=True, help="A timm model's name.")
@click.option("--weights", type=click.Path(), help="Local safetensors file of the backbone's weights.")
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(1), help="Images in a forward.")
@click.option("--top", default=5, show_default=True, type=click.IntRange(1), help="Classes in `topk`.")
@click.option("--device", help="Such as cpu or cuda [default: cuda where there is one].")
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16", "float16"]))
@click.option("--prefix", default="", help="What the results' names begin with, such as pear_.")
@click.option("--slot-bytes", type=click.IntRange(1), help="The most bytes of loaded tasks [default: no limit].")
@click.option("--restart", is_flag=True, help="Forget what an unfinished run of this output had done.")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
def main(
    source: Path, out: Path, where: Path, tasks: str | None, backbone: str, weights: str | None, batch_size: int,
    top: int, device: str | None, dtype: str, prefix: str, slot_bytes: int | None, restart: bool, as_json: bool,
) -> None:  # fmt: skip
    for path in (source, out):
        if path.suffix not in FORMATS:
            raise click.UsageError(f"{path}: expected a file ending in {', '.join(FORMATS)}")
    if not out.parent.is_dir():
        raise click.ClickException(f"{out}: folder {out.parent} does not exist; make it first")
    if source.exists() and out.exists() and out.samefile(source):
        raise click.UsageError(f"{out}: is the list itself; choose another output")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    listed = ImageList.scan(source, ["image"] if tasks else ["image", "task"])
    options = {"batch_size": batch_size, "top": top, "dtype": dtype, "device": device, "tasks": tasks, "prefix": prefix}
    try:
        with Store(where.expanduser()) as store:
            precision = getattr(torch, dtype)
            router = Router(backbone, store, weights=weights, device=device, dtype=precision, slot_bytes=slot_bytes)
            report = infer(router, store, listed, out, options, restart)
    except (RouterError, PearStoreError, OSError, pa.ArrowException) as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(json.dumps(report))
        return
    resumed = f", {report['resumed_images']} were done before" if report["resumed_images"] else ""
    click.echo(
        f"{report['images']} images in {report['seconds']:.1f} s, {report['images_per_s']:.1f} images/s{resumed}",
        err=True,
    )
    click.echo(f"{report['predictions']} predictions, {report['errors']} errors: {out}")


if __name__ == "__main__":
    main()
