"""Processes a list, part by part."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Never

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from pear_store import ReadableStore
from pear_store.local.sources import Access
from router import Batch, Limits, Predictions, Router
from router.infer.folder import ImageFolder
from router.infer.formats.columns import Image, ListError
from router.infer.lists import ImageList, OutputError, Rows
from router.infer.parts import Parts, is_folder
from router.infer.plan import (
    AHEAD,
    EMBEDDINGS,
    LAYOUT,
    PART_BATCHES,
    RESULTS,
    ROW,
    TASK,
    Part,
    Result,
    Tasks,
    Times,
    Work,
    ahead,
    batches,
    find_image,
)
from router.infer.writing import check_writable
from router.pictures import ImageLike
from router.predictions import Threshold


def serve(router: Router, work: Work, top: int | None, threshold: Threshold) -> None:
    """Runs a batch, each image through all tasks of its row, and fills in their results.

    Args:
        top: number of classes of a result; None: features.
        threshold: as for `Router.run`.
    """
    counts = [len(ask.tasks) for ask in work.asks]
    image_of = np.repeat(work.batch.image_of, counts)
    rows = Batch(work.batch.images, np.arange(len(image_of)), image_of)
    tasks = [task for ask in work.asks for task in ask.tasks]
    found = router.run_batch(rows, tasks, on_error="return", without_heads=top is None, threshold=threshold)
    fill([result for ask in work.asks for result in ask.results], found, top)


def fill(results: list[Result], predictions: Predictions, top: int | None) -> None:
    """Fills in the results of one batch."""
    for row, (result, found) in enumerate(zip(results, predictions, strict=True)):
        name = found.task.partition("@")[0]
        if row in predictions.failures:
            result["error"] = found.error
        elif found.error is not None:
            what = "features" if top is None else "logits"
            result["error"] = f"task {name!r} gave {what} that are not finite numbers: try --dtype float32"
        elif top is None:
            result["embedding"] = found.logits.numpy()
        elif not found.classes:
            result["error"] = f"task {name!r} has no head, so it gives features, not classes: use --embeddings"
        else:
            best = [{"label": label, "probability": round(share, 6)} for label, share in found.topk(top)]
            result.update(best[0], label=found.label, known=found.known, topk=best)


def output_schema(
    listed: ImageList | ImageFolder, of: pa.Schema, with_task: bool, prefix: str, with_row: bool = False
) -> pa.Schema:
    """The schema of the output: the list's columns, then the results'.

    Args:
        of: the results of a row.
        with_task, with_row: whether there are columns for the task's name and for the row's number.
    Raises:
        OutputError: the list has a column with the name of a result.
    """
    results = [*([ROW] if with_row else []), *([TASK] if with_task else []), *of]
    added = [field.with_name(prefix + field.name) for field in results]
    taken = [field.name for field in added if field.name in listed.schema.names]
    if taken:
        raise OutputError(
            f"{listed.path}: has own columns with names of results, which are never replaced: {', '.join(taken)}: "
            f"rename them, or give {'another --prefix' if prefix else '--prefix pear_'}"
        )
    return pa.schema([*listed.schema, *added])


def output(part: Part, schema: pa.Schema, of: pa.Schema, every: list[str], first: int | None = None) -> pa.Table:
    """A part's rows of the output.

    Args:
        of: the results of a row.
        every: the tasks that every image goes through; empty if each row has its own.
        first: the number of the part's first row in the list, if the output numbers its rows.
    """
    rows, each = part.rows.table.num_rows, len(every) or 1
    results = pa.Table.from_pylist(part.results, of).columns
    if every:
        results.insert(0, pa.array([task.partition("@")[0] for task in every] * rows, pa.string()))
    if first is not None:
        results.insert(0, pa.array([first + row for row in range(rows) for _ in range(each)], pa.int64()))
    listed = part.rows.table.take(pa.array([row for row in range(rows) for _ in range(each)], pa.int64()))
    return pa.Table.from_arrays([*listed.columns, *results], schema=schema)


@dataclass(frozen=True)
class Job:
    """A list that is being processed."""

    router: Router
    listed: ImageList | ImageFolder
    parts: Parts
    tasks: Tasks
    schema: pa.Schema
    """Schema of the output."""
    place: Callable[[str, Image], ImageLike]
    """Gives the path, URL or bytes of an image of the list. It takes the folder where its path starts."""
    options: dict[str, Any]
    resumed: int
    """Number of the list's rows that an earlier run has done."""

    @property
    def each(self) -> int:
        """Rows of the output for each row of the list."""
        return len(self.parts.chosen) or 1

    @property
    def part_rows(self) -> int:
        batch_size: int = self.options["batch_size"]
        return min(PART_BATCHES * batch_size, self.listed.most_rows)

    def left(self) -> Iterator[tuple[int, Rows]]:
        """The unfinished parts, with their numbers."""
        numbered = enumerate(self.listed.parts(self.part_rows))
        return ((number, rows) for number, rows in numbered if not self.parts.has(number))

    def write(self, part: Part) -> None:
        """Writes a part whose results are all filled in."""
        first = part.number * self.part_rows if self.parts.is_folder else None
        self.parts.write(part.number, output(part, self.schema, self.tasks.results, self.parts.chosen, first))

    def bar(self) -> "tqdm[Never]":
        total, done = self.listed.rows * self.each, self.resumed * self.each
        return tqdm(total=total, initial=done, unit="row", file=sys.stderr)


def infer(
    router: Router,
    store: ReadableStore | None,
    listed: ImageList | ImageFolder,
    out: Path,
    options: dict[str, Any],
    *,
    access: Access | None = None,
    restart: bool = False,
    overwrite: bool = False,
    work_off: Callable[[Job], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Processes a list. It resumes an interrupted run with the same options.

    Args:
        store: None for the bare backbone's features.
        out: a file, or a folder for Parquet files.
        options: the options of pear-infer, by name.
        access: which paths and URLs may be opened.
        restart, overwrite: as for :class:`Parts`.
        work_off: serves all rows of unfinished parts, and returns figures for the report; None: with this router.
    Returns:
        The report, such as the numbers of predictions and errors.
    Raises:
        OutputError: the output may not be replaced, another run is writing it, an unfinished run has other options,
            the list has a column with the name of a result, or it cannot be read to its end.
        RouterError, PearStoreError: a task for all images cannot be run.
    """
    prefix: str = options["prefix"]
    results = EMBEDDINGS if options["top"] is None else RESULTS
    schema = output_schema(listed, results, options["tasks"] is not None, prefix, with_row=is_folder(out))
    check_writable(out, schema)
    access = access or Access()
    place = partial(find_image, access)
    limits = Limits(options["max_pixels"], access)
    plan = {
        **options, "layout": LAYOUT, "list": listed.digest, "encoding": listed.encoding,
        "root": access.root is not None,
        "allowed": sorted(access.allowed), "folder": str(access.root.resolve()) if access.root else listed.folder,
        "store": None if store is None else store.where,
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
            if not every and "task" in listed.schema.names:
                asked = zip(listed.tasks(table), table[f"{prefix}version"].to_pylist(), strict=True)
                versions |= {name: version for name, version in asked if name and version}
        try:
            began = time.perf_counter()
            bare = options["tasks"] is None and "task" not in listed.schema.names
            tasks = Tasks(router, store, versions, limits, results, bare)
            job = Job(router, listed, parts, tasks, schema, place, options, resumed)
            found = (work_off or work_off_here)(job)
            seconds = time.perf_counter() - began
            errors = unknown = total = 0
            first = None
            for table in parts.tables():
                total += table.num_rows
                failed = table[f"{prefix}error"].drop_null()
                errors += len(failed)
                if f"{prefix}known" in table.column_names:
                    unknown += pc.sum(pc.invert(table[f"{prefix}known"])).as_py() or 0
                first = first or (failed[0].as_py() if len(failed) else None)
            images = listed.rows - resumed
            report = {
                "predictions": total - errors,
                "unknown": unknown,
                "errors": errors,
                "first_error": first,
                "images": images,
                "resumed_images": resumed,
                "seconds": round(seconds, 3),
                "images_per_s": round(images / seconds, 2),
                **found,
                "finished_before": False,
                "out": str(out),
            }
            parts.finish(schema, parts.tables(), report)
        except ListError:  # the corrected list must not count as other options
            parts.give_up()
            raise
    return report


def work_off_here(job: Job) -> dict[str, Any]:
    """Serves all rows of unfinished parts with the job's router. Returns times in seconds."""
    size, top, threshold = (job.options[name] for name in ("batch_size", "top", "threshold"))
    times = Times()
    work = batches(job.left(), job.tasks, job.parts.chosen, size, job.router.device, job.place, times)
    items, served = ahead(work, AHEAD), 0
    with job.bar() as bar:
        while (item := times.timed("wait_s", next, items, None)) is not None:
            if isinstance(item, Work):
                times.timed("device_s", serve, job.router, item, top, threshold)
                done = sum(len(ask.results) for ask in item.asks)
                served += done
                bar.update(done)
            else:
                times.timed("write_s", job.write, item)
                bar.update(len(item.results) - served)  # rows that cannot be served
                served = 0
    return {**times.report(), **({"by_gpu": times.spent.by_jpegs} if job.router.jpegs else {})}


def choose_tasks(router: Router, store: ReadableStore | None, wanted: str | None) -> list[str]:
    """The tasks for every image, as name@version. Empty if each row has its own.

    Raises:
        OutputError: the store has no task for this backbone.
        RouterError, PearStoreError: this router cannot run a named task.
    """
    if wanted is None or store is None:
        return []
    if wanted == "all":
        found = [f"{version.task}@{version.version}" for version in store.iter_tasks()]
        chosen = [t for t in found if store.record(t)["backbone"]["digest"] == router.backbone.digest]
        if not chosen:
            raise OutputError(
                f"{store.where}: holds no task for backbone {router.backbone.name}: choose another --store or "
                "--backbone"
            )
    else:
        versions = [store.resolve(name.strip()) for name in wanted.split(",")]
        chosen = list(dict.fromkeys(f"{version.task}@{version.version}" for version in versions))
    for task in chosen:
        router.check(task)
    return chosen
