#!/usr/bin/env python3
"""Predict for a list of images of any length, each with its own task or each through many, on one backbone.

The list is CSV, JSON lines or Parquet (by its file's ending: .csv, .jsonl, .parquet). Its column `image` holds paths or
URLs, and in Parquet also encoded images, or structs of bytes and path as Hugging Face writes them. Its column `task`
holds tasks' names, or name@version. The output has the list's rows in its order, with all its columns, then `version`,
`label`, `probability`, `topk` (JSON: [[label, probability], ...]) and `error`. Images that the list holds are not
written again: the output's `image` is their path.

A relative path begins in the list's folder, or in --root DIR. With --root, nothing outside of DIR is opened.

If a row cannot be served, only that row fails: `error` says why. A line of the list that cannot be read is such a row.
If no row at all could be served, the exit code is 1.

A list's own columns are never replaced. If one has the name of a result, the list is refused: --prefix pear_ then names
the results `pear_label`, `pear_error` and so on.

With --tasks all, or --tasks a,b,c, the list needs no column `task`: every image goes through all these tasks, and
the output has a row for each image and task, which the column `task` names. `all` are the tasks that the store has for
this backbone.

The list is worked off in parts, kept in OUT.parts until OUT is written whole. If a run is interrupted, the same command
goes on after the last finished part, with the tasks' versions that it began with. OUT.run.json says which run wrote
OUT. If that was the same run (the same list, options, store and backbone), there is nothing to do. If it was another,
OUT is replaced only with --overwrite. A file that no run wrote, or that was changed since, is never replaced.

    python tools/batch_infer.py list.csv predictions.parquet --store pear.store --backbone pear_tiny
"""

import codecs
import errno
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import click
import pyarrow as pa
import torch
from platformdirs import user_data_path
from torch import Tensor
from tqdm import tqdm

from pear_store import PearStoreError, Store
from pear_store.local.sources import Access
from pear_store.terminal import allow_option, echo, printable
from router import ImageError, Limits, Predictions, Preprocess, Router, RouterError, decode
from router.pictures import LIMITS, MAX_PIXELS, ImageLike

sys.path.insert(0, str(Path(__file__).parents[1]))  # its neighbours, also where it is run as a file
from tools.lists import FORMATS, Image, ImageList, ListError, Rows, check_writable
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
    rows: Rows
    results: list[Result]
    """One for each row, or one for each row and task."""


@dataclass(frozen=True)
class Ask:
    """What a row asks of an image in one preprocessing."""

    image: ImageLike
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
    """What the names of tasks mean, looked up once: a task is run in the version it had then.

    Args:
        versions: those of an earlier run with the same options.
        limits: what may be opened as a picture.
    """

    def __init__(self, router: Router, store: Store, versions: dict[str, int], limits: Limits = LIMITS) -> None:
        self._router, self._store, self._versions, self._limits = router, store, versions, limits
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
            return task, version, Preprocess(self._store.get(task, copy=False).preprocess, self._limits)
        except (RouterError, PearStoreError) as error:
            return str(error)


def batches(
    numbered: Iterable[tuple[int, Rows]],
    tasks: Tasks,
    every: list[str],
    size: int,
    device: torch.device,
    place: Callable[[Image], ImageLike],
) -> Iterator[Batch | Part]:
    """Of each numbered part of a list: batches filled with rows of the same preprocessings, then the part they make up.

    `place` says where an image of the list is.
    """
    for number, rows in numbered:
        part = Part(number, rows, [])
        groups: dict[tuple[object, ...], list[list[Ask]]] = {}
        for image, name, fault in zip(rows.images, rows.tasks, rows.faults, strict=True):
            asks: dict[object, Ask] = {}
            for asked in every or (name,):
                part.results.append(result := dict.fromkeys(RESULTS.names))
                known = fault or tasks.find(asked)
                if isinstance(known, str):
                    result["error"] = known
                    continue
                task, result["version"], way = known
                if not image:
                    result["error"] = "no image is named"
                    continue
                ask = asks.setdefault(way.key, Ask(place(image), way, [], []))
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


def find_image(folder: Path, access: Access, image: Image) -> ImageLike:
    """The image as it can be opened from here: relative paths begin in the folder."""
    if isinstance(image, bytes) or access.root is not None:
        return image  # with a root, `access` lets them begin there
    here = os.path.join(folder, image)
    return image if ("://" in image or "::" in image) and not os.path.lexists(here) else here


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
    """Runs a batch and fills its results in. If it cannot be run as one, each task's rows are run by themselves."""
    try:
        predictions = run(router, batch, every)
    except (RouterError, PearStoreError) as error:
        alone = list(by_task(batch))
        if len(alone) > 1:
            for one in alone:
                serve(router, one, every, top)
        else:
            for ask in batch.asks:
                for result in ask.results:
                    result["error"] = str(error)
        return
    for column, found in enumerate(predictions):
        fill([ask.results[column] for ask in batch.asks], found, top)


def run(router: Router, batch: Batch, every: bool) -> list[Predictions]:
    """For each task that all rows have in common, or of each row's own task, what it says."""
    if every:
        return list(router.run_all(batch.images, batch.asks[0].tasks).values())
    return [router.run(batch.images, [ask.tasks[0] for ask in batch.asks])]


def by_task(batch: Batch) -> Iterator[Batch]:
    """The batch in batches of one task each."""
    rows: dict[str, list[tuple[int, Ask]]] = {}
    for row, ask in enumerate(batch.asks):
        for task, result in zip(ask.tasks, ask.results, strict=True):
            rows.setdefault(task, []).append((row, Ask(ask.image, ask.way, [task], [result])))
    for found in rows.values():
        yield Batch([ask for _, ask in found], batch.images[[row for row, _ in found]])


def fill(results: list[Result], predictions: Predictions, top: int) -> None:
    """Fills the results of one batch in."""
    rows = zip(results, predictions.tasks, predictions.finite, predictions.topk(top), strict=True)
    for result, task, finite, found in rows:
        best = [(label, round(probability, 6)) for label, probability in found]
        name = task.partition("@")[0]
        if not finite:
            result["error"] = f"task {name!r} gave logits that are not finite numbers; try --dtype float32"
        elif not best:
            result["error"] = f"task {name!r} has no head: it gives features, not classes"
        else:
            result.update(label=best[0][0], probability=best[0][1], topk=json.dumps(best, ensure_ascii=False))


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
    rows, each = part.rows.table.num_rows, len(every) or 1
    results = pa.Table.from_pylist(part.results, RESULTS).columns
    if every:
        results.insert(0, pa.array([task.partition("@")[0] for task in every] * rows, pa.string()))
    listed = part.rows.table.take(pa.array([row for row in range(rows) for _ in range(each)], pa.int64()))
    return pa.Table.from_arrays([*listed.columns, *results], schema=schema)


def infer(
    router: Router,
    store: Store,
    listed: ImageList,
    out: Path,
    options: dict[str, Any],
    *,
    access: Access | None = None,
    restart: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Works a list off, from where an interrupted run with the same options got to; returns what there is to report.

    Raises:
        ClickException: the output may not be replaced; an unfinished run with other options, or another one now, has
            it; the list has a column of a result's name, or cannot be read to its end.
        RouterError, PearStoreError: tasks for all that cannot be run.
    """
    prefix: str = options["prefix"]
    schema = output_schema(listed, options["tasks"] is not None, prefix)
    check_writable(out, schema)
    access = access or Access()
    folder = (access.root or listed.path.parent).resolve()
    place = partial(find_image, folder, access)
    limits = Limits(options["max_pixels"], access)
    plan = {
        **options, "list": listed.digest, "encoding": listed.encoding, "root": access.root is not None,
        "allowed": sorted(access.allowed), "folder": str(folder), "store": str(store.path.resolve()),
        "backbone": router.backbone.digest,
    }  # fmt: skip
    with closing(Parts(out, plan, lambda: choose_tasks(router, store, options["tasks"]), restart, overwrite)) as parts:
        if parts.finished is not None:
            return {**parts.finished, "images": 0, "resumed_images": listed.rows, "seconds": 0.0, "images_per_s": 0.0,
                    "finished_before": True, "out": str(out)}  # fmt: skip
        every: list[str] = parts.chosen
        versions: dict[str, int] = {}
        resumed = 0
        for table in parts.tables():
            resumed += table.num_rows // (len(every) or 1)
            if not every:
                asked = zip(listed.tasks(table), table[f"{prefix}version"].to_pylist(), strict=True)
                versions |= {name: version for name, version in asked if name and version}
        try:
            began = time.perf_counter()
            work_off(router, listed, parts, Tasks(router, store, versions, limits), schema, resumed, place, options)
            seconds = time.perf_counter() - began
            errors = total = 0
            first = None
            for table in parts.tables():
                total += table.num_rows
                found = table[f"{prefix}error"].drop_null()
                errors += len(found)
                first = first or (found[0].as_py() if len(found) else None)
            images = listed.rows - resumed
            report = {
                "predictions": total - errors,
                "errors": errors,
                "first_error": first,
                "images": images,
                "resumed_images": resumed,
                "seconds": round(seconds, 3),
                "images_per_s": round(images / seconds, 2),
                "finished_before": False,
                "out": str(out),
            }
            parts.finish(schema, parts.tables(), report)
        except ListError:  # so the corrected list is not taken for other options
            parts.give_up()
            raise
    return report


def work_off(
    router: Router,
    listed: ImageList,
    parts: Parts,
    tasks: Tasks,
    schema: pa.Schema,
    resumed: int,
    place: Callable[[Image], ImageLike],
    options: dict[str, Any],
) -> None:
    """Serves all rows whose parts are not there yet; `resumed` is how many rows are done."""
    every: list[str] = parts.chosen
    numbered = enumerate(listed.parts(PART_BATCHES * options["batch_size"]))
    left = ((number, rows) for number, rows in numbered if not parts.has(number))
    work = batches(left, tasks, every, options["batch_size"], router.device, place)
    each, served = len(every) or 1, 0
    with tqdm(total=listed.rows * each, initial=resumed * each, unit="row", file=sys.stderr) as bar:
        for item in ahead(work, AHEAD):
            if isinstance(item, Batch):
                serve(router, item, bool(every), options["top"])
                done = sum(len(ask.results) for ask in item.asks)
                served += done
                bar.update(done)
            else:
                parts.write(item.number, output(item, schema, every))
                bar.update(len(item.results) - served)  # those that cannot be served
                served = 0


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


def _encoding(_: click.Context, __: click.Parameter, name: str) -> str:
    try:
        "".encode(name)
        name = codecs.lookup(name).name
    except LookupError:
        raise click.BadParameter(f"{name!r} is no text encoding: expected such as utf-8, latin-1 or cp1252") from None
    return "utf-8-sig" if name == "utf-8" else name


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
@click.option(
    "--root", type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Relative paths begin here, and nothing outside is opened [default: the list's folder, without a limit].",
)  # fmt: skip
@click.option(
    "--encoding", default="utf-8", show_default=True, callback=_encoding,
    help="Of a list in CSV or JSON lines, such as latin-1.",
)  # fmt: skip
@click.option(
    "--max-pixels", default=MAX_PIXELS, show_default=True, type=click.IntRange(1), help="Larger pictures are refused."
)
@allow_option
@click.option("--restart", is_flag=True, help="Forget what an unfinished run of this output had done.")
@click.option("--overwrite", is_flag=True, help="Replace the output of a finished run.")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
def main(
    source: Path, out: Path, where: Path, tasks: str | None, backbone: str, weights: str | None, batch_size: int,
    top: int, device: str | None, dtype: str, prefix: str, slot_bytes: int | None, root: Path | None, encoding: str,
    max_pixels: int, allowed: tuple[str, ...], restart: bool, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    for path in (source, out):
        if path.suffix not in FORMATS:
            raise click.UsageError(f"{path}: expected a file ending in {', '.join(FORMATS)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = {"batch_size": batch_size, "top": top, "dtype": dtype, "device": device, "tasks": tasks, "prefix": prefix,
               "max_pixels": max_pixels}  # fmt: skip
    access = Access(root, frozenset(allowed))
    try:
        if not out.parent.is_dir():
            raise click.ClickException(f"{out}: folder {out.parent} does not exist; make it first")
        if source.exists() and out.exists() and out.samefile(source):
            raise click.UsageError(f"{out}: is the list itself; choose another output")
        listed = ImageList.scan(source, ["image"] if tasks else ["image", "task"], encoding)
        with Store(where.expanduser()) as store:
            precision = getattr(torch, dtype)
            router = Router(backbone, store, weights=weights, device=device, dtype=precision, slot_bytes=slot_bytes)
            report = infer(router, store, listed, out, options, access=access, restart=restart, overwrite=overwrite)
    except click.ClickException as error:
        vars(error)["message"] = printable(error.message)
        raise
    except KeyboardInterrupt:
        raise _failure("interrupted; the same command goes on after the last finished part", 130) from None
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _failure(f"out of memory: try a smaller --batch-size or --slot-bytes; {error}") from None
    except OSError as error:
        hint = "; finished parts are kept: free some space and run the same command" if _is_full(error) else ""
        raise _failure(f"{error.filename or out}: {error.strerror or error}{hint}") from None
    except (RouterError, PearStoreError, pa.ArrowException) as error:
        raise _failure(str(error), getattr(error, "exit_code", 1)) from None
    show(report, as_json)
    if listed.rows and not report["predictions"]:
        raise _failure(f"nothing could be served: {report['errors']} errors, the first: {report['first_error']}")


def _failure(text: str, exit_code: int = 1) -> click.ClickException:
    failure = click.ClickException(printable(text))
    failure.exit_code = exit_code  # type: ignore[misc]
    return failure


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def show(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(report))
        return
    if report["finished_before"]:
        echo("finished before: the same list, options, store and backbone; --overwrite runs it again", err=True)
    else:
        resumed = f", {report['resumed_images']} were done before" if report["resumed_images"] else ""
        speed = f"{report['images_per_s']:.1f} images/s"
        echo(f"{report['images']} images in {report['seconds']:.1f} s, {speed}{resumed}", err=True)
    echo(f"{report['predictions']} predictions, {report['errors']} errors: {report['out']}")


if __name__ == "__main__":
    main()
