"""Run tasks on lists of images of any length. Each image goes through its own task, or through several.

The list is CSV, JSON lines or Parquet, by its file's ending: .csv, .tsv, .jsonl, .parquet, in any case. A CSV may have
commas, semicolons or tabs. The column `image` holds paths or URLs. In Parquet it may also hold encoded images, or
structs of bytes and path as Hugging Face writes them. The column `task` holds tasks' names, or name@version.

The output has the list's rows in its order, with all its columns. Then come `version`, `label`, `known`, `probability`,
`topk` and `error`. `topk` has the likeliest classes, each with `label` and `probability`; in CSV it is JSON. Images
that the list holds are not written again: the output's `image` is their path.

A task may have a stored threshold (pear-train --threshold-accuracy). If the likeliest class has a lower probability,
the answer is unknown: `known` is false and `label` is empty. `probability` and `topk` still show the likeliest classes.
--threshold 0.8 sets one threshold for all tasks, --threshold none uses none.

A relative path starts in the folder of its list, or in --root DIR. With --root, nothing outside of DIR is opened.

Several lists are read as one: give their folder, or a pattern in quotes ('lists/*.parquet'). All have the same format
and the same columns; only in JSON lines may a row leave some out. They are read in natural order, part-2 before
part-10, and rows are numbered through all lists. Sub-folders are only read if a pattern says so ('lists/**/*.csv').

A list, a folder of lists or a pattern may be a URL, such as s3://bucket/lists/*.parquet or https://host/list.csv. Each
file is copied to $TMPDIR while it is read.

Instead of lists, give a folder of pictures, or a pattern in quotes ('pictures/*.jpg'), and the task with --task. All
sub-folders are read. The output then has a row for each picture. For a folder, `image` is the path within it. A folder
with both pictures and lists counts as a folder of pictures.

If a row cannot be served, only that row fails: `error` says why. A line of the list that cannot be read is such a row.
If no row could be served, or if more fail than --max-errors allows, the exit code is 1. The output is still written.

A list's own columns are never replaced. If one has the name of a result, the list is refused. Then use --prefix pear_:
it names the results `pear_label`, `pear_error` and so on.

With --task a (or --tasks a,b,c, or --tasks all), the list needs no column `task`: every image goes through all these
tasks. The output has a row for each image and task; its column `task` has the task's name. `all` means all tasks of the
store for this backbone.

With --embeddings the output has `embedding` instead of classes: the features that a task's head would take, with the
task's adapters and preprocessing. Without a column `task` and without --task, they are the bare backbone's features.
Then no store is needed.

The lists are processed in parts, which are kept in OUT.parts until the whole OUT is written. If a run is interrupted,
the same command resumes after the last finished part, with the same versions of tasks. OUT.run.json says which run
wrote OUT. If it was the same run (the same lists, options, store and backbone), there is nothing to do. If it was
another, OUT is only replaced with --overwrite. A file that no run wrote, or that was changed since, is never replaced.

OUT without an ending is a folder of Parquet files. Their rows are in the list's order; the column `row` numbers them.

With --ray, the workers of a Ray cluster do the work (docs/cluster.md), and the output is the same. --ray alone starts
Ray on this machine until the run ends.

    pear-infer list.csv predictions.parquet --store pear.store --backbone pear_tiny

    pear-infer 's3://bucket/lists/*.parquet' predictions --store s3://bucket/pear

    pear-infer pictures/ predictions.csv --task dtd
"""

import codecs
import errno
import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pyarrow as pa
import torch
from platformdirs import user_data_path
from tqdm import tqdm

from pear_store import PearStoreError, Store
from pear_store.counted import counted
from pear_store.files import ending
from pear_store.local.sources import Access
from pear_store.remote.cache import CacheSettings
from pear_store.terminal import NamedPath, allow_option, echo, printable, version_option
from router import JpegDecoder, Router, RouterError
from router.infer.folder import ImageFolder
from router.infer.lists import FORMATS, ImageList
from router.infer.source import Source, find
from router.infer.work import Job, infer
from router.pictures import MAX_PIXELS
from router.predictions import Threshold, read_threshold


def _encoding(_: click.Context, __: click.Parameter, name: str) -> str:
    try:
        "".encode(name)
        name = codecs.lookup(name).name
    except LookupError:
        raise click.BadParameter(f"{name!r}: expected a text encoding, such as utf-8, latin-1 or cp1252") from None
    return "utf-8-sig" if name == "utf-8" else name


def _threshold(_: click.Context, __: click.Parameter, text: str | None) -> Threshold:
    try:
        return "stored" if text is None else read_threshold(text)
    except RouterError as error:
        raise click.BadParameter(str(error)) from None


def _tasks(_: click.Context, __: click.Parameter, names: str | None) -> str | None:
    if names is not None and not all(name.strip() for name in names.split(",")):
        raise click.BadParameter(f"{names!r}: expected all, or names of tasks with commas between them")
    return names


def _address(_: click.Context, __: click.Parameter, address: str | None) -> str | None:
    if address is not None and ending(address) in FORMATS:
        raise click.BadParameter(
            f"{address!r}: expected an address, found a list: write --ray after LIST and OUT, or --ray=ADDRESS"
        )
    return address


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@version_option
@click.argument("source", type=NamedPath())
@click.argument("out", type=NamedPath(path_type=Path))
@click.option(
    "--store", "where", type=click.Path(), envvar="PEAR_STORE", default=str(user_data_path("pear") / "store"),
    help="Store of the tasks: a directory, or a remote's URL, which is read through a cache [default: $PEAR_STORE, "
    "else the user's data directory].",
)  # fmt: skip
@click.option(
    "--cache-bytes", type=click.IntRange(1), envvar="PEAR_CACHE_BYTES", show_default="$PEAR_CACHE_BYTES, else 10 GiB",
    help="The most bytes of a remote to cache on this machine, in $PEAR_CACHE_DIR or the user's cache directory.",
)  # fmt: skip
@click.option(
    "--task",
    "--tasks",
    "tasks",
    metavar="TASKS",
    callback=_tasks,
    help="Tasks that every image goes through: all, or comma-separated names.",
)  # fmt: skip
@click.option("--backbone", default="pear_tiny", show_default=True, help="A timm model's name.")
@click.option("--weights", type=click.Path(), help="Local safetensors file of the backbone's weights.")
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(1), help="Images per forward.")
@click.option("--top", default=5, show_default=True, type=click.IntRange(1), help="Number of classes in `topk`.")
@click.option(
    "--threshold", metavar="X|none", callback=_threshold,
    help="Probability below which the likeliest class counts as unknown, for all tasks; or none "
    "[default: each task's stored threshold, if it has one].",
)  # fmt: skip
@click.option(
    "--embeddings",
    is_flag=True,
    help="Write features instead of classes: a task's, or without a task the bare backbone's. Not with --ray.",
)
@click.option("--device", help="Device to compute on, such as cpu [default: cuda if there is one].")
@click.option(
    "--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Precision of the forward.",
)  # fmt: skip
@click.option("--prefix", default="", help="Prefix of the results' column names, such as pear_.")
@click.option("--slot-bytes", type=click.IntRange(1), help="Most bytes that loaded tasks may take [default: no limit].")
@click.option(
    "--root", type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder where relative paths start. Nothing outside of it is opened [default: the list's folder, no limit].",
)  # fmt: skip
@click.option(
    "--encoding", default="utf-8", show_default=True, callback=_encoding,
    help="Encoding of a list in CSV or JSON lines, such as latin-1.",
)  # fmt: skip
@click.option(
    "--max-pixels", default=MAX_PIXELS, show_default=True, type=click.IntRange(1),
    help="Refuse pictures with more pixels, before they are decoded.",
)  # fmt: skip
@click.option("--max-errors", type=click.IntRange(0), help="Exit with 1 if more rows fail [default: if all fail].")
@allow_option
@click.option(
    "--ray", "address", metavar="[ADDRESS]", is_flag=False, flag_value="local", callback=_address,
    help="Run on the Ray cluster at ADDRESS, such as auto or 10.0.0.1:6379. Without ADDRESS: on this machine alone.",
)  # fmt: skip
@click.option(
    "--workers", type=click.IntRange(1), show_default="as many as the cluster has room for",
    help="With --ray: number of workers, each with its own router.",
)  # fmt: skip
@click.option(
    "--cpus-per-worker", type=click.IntRange(1),
    show_default="4, or as many as the smallest machine has; 1 with a GPU", help="With --ray: cores of each worker.",
)  # fmt: skip
@click.option(
    "--decode", type=click.Choice(["auto", "gpu", "apart", "beside"]), default="auto", show_default=True,
    help="Where images are decoded. auto: on the CPU. gpu: large JPEGs on the GPU, where levels differ a little "
    "(docs/pictures.md); not with --ray. With --ray: apart: on any core of the cluster. beside: in the workers, "
    "during forwards. auto: apart if workers have GPUs.",
)  # fmt: skip
@click.option("--restart", is_flag=True, help="Drop the finished parts of an unfinished run, and start again.")
@click.option("--overwrite", is_flag=True, help="Replace the output of a finished run.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def main(
    source: str, out: Path, where: str, cache_bytes: int | None, tasks: str | None, backbone: str,
    weights: str | None, batch_size: int, top: int, threshold: Threshold, embeddings: bool, device: str | None,
    dtype: str, prefix: str, slot_bytes: int | None, root: Path | None, encoding: str, max_pixels: int,
    max_errors: int | None, allowed: tuple[str, ...], address: str | None, workers: int | None,
    cpus_per_worker: int | None, decode: str, restart: bool, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    if ending(out) not in ("", *FORMATS):
        raise click.UsageError(f"{out}: expected a file ending in {', '.join(FORMATS)}, or a folder without an ending")
    if not out.name:
        raise click.UsageError(f"{out}: expected the name of a file or of a new folder")
    if embeddings and threshold != "stored":
        raise click.UsageError("--threshold is for classes, --embeddings gives none: leave one of them out")
    if embeddings and address is not None:
        raise click.UsageError("--embeddings does not work with --ray yet: leave one of them out")
    if address is None and (workers or cpus_per_worker or decode in ("apart", "beside")):
        raise click.UsageError(
            "--workers, --cpus-per-worker, --decode apart and --decode beside are for a cluster: give --ray, too"
        )
    if address is not None and decode == "gpu":
        raise click.UsageError("--decode gpu does not work with --ray yet: leave one of them out")
    try:
        if not out.parent.is_dir():
            raise click.ClickException(f"{out}: folder {out.parent} does not exist; make it first")
        if os.path.exists(source) and out.exists() and out.samefile(source):
            raise click.UsageError(f"{out}: is the list itself: choose another output")
        found = find(source, out, Access(allowed=frozenset(allowed)))
        for note in found.notes:
            echo(note, err=True)
        if found.kind == "pictures" and not tasks and not embeddings:
            raise click.UsageError(f"{source}: pictures without a list: give their task with --task NAME")
        if found.kind == "pictures" and root is not None:
            raise click.UsageError(f"{source}: --root is for lists, not for pictures: leave it out")
        listed = _scan(found, ["image"] if tasks or embeddings else ["image", "task"], encoding, allowed)
        alone = embeddings and not tasks and "task" not in listed.schema.names
        with ExitStack() as stack:
            if address is not None:
                cluster = _cluster()
                stack.enter_context(redirect_stdout(sys.stderr))  # Ray prints messages about workers on stdout
                stack.enter_context(cluster.session(address))
                device = device or ("cuda" if cluster.has_gpus() else "cpu")
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            if decode == "gpu" and device.partition(":")[0] != "cuda":
                raise click.UsageError(f"--decode gpu needs a GPU, the device is {device}: leave it out")
            options = {
                "batch_size": batch_size, "top": None if embeddings else top, "dtype": dtype, "device": device,
                "threshold": threshold, "tasks": tasks, "prefix": prefix, "max_pixels": max_pixels,
            }  # fmt: skip
            if decode == "gpu":
                options["decode"] = decode  # only then, because runs before had no such option
            store = None
            if not alone:
                store = stack.enter_context(Store.open(where, cache=CacheSettings(limit_bytes=cache_bytes)))
            work_off: Callable[[Job], dict[str, Any]] | None = None
            if address is None:
                precision = getattr(torch, dtype)
                router = Router(
                    backbone, store, weights=weights, device=device, dtype=precision, slot_bytes=slot_bytes,
                    jpegs=JpegDecoder(device) if decode == "gpu" else None,
                )  # fmt: skip
            else:
                router = Router(backbone, store, weights=weights, device="cpu")  # it only plans
                root = root and root.absolute()
                settings = cluster.Settings(
                    backbone, weights and cluster.shared_path(weights), router.backbone.digest,
                    cluster.shared_path(where), cache_bytes, device, dtype, slot_bytes, top, threshold,
                )  # fmt: skip
                crew = cluster.make_crew(settings, workers, cpus_per_worker, decode)
                work_off = partial(cluster.work_off, crew)
            report = infer(
                router, store, listed, out, options, access=Access(root, frozenset(allowed)), restart=restart,
                overwrite=overwrite, work_off=work_off,
            )  # fmt: skip
    except click.ClickException as error:
        vars(error)["message"] = printable(error.message)
        raise
    except KeyboardInterrupt:
        raise _failure("interrupted; the same command resumes after the last finished part", 130) from None
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _failure(f"out of memory: try a smaller --batch-size or --slot-bytes; {error}") from None
    except OSError as error:
        hint = "; finished parts are kept: free some space and run the same command again" if _is_full(error) else ""
        raise _failure(f"{error.filename or out}: {error.strerror or error}{hint}") from None
    except (RouterError, PearStoreError, pa.ArrowException) as error:
        raise _failure(str(error), getattr(error, "exit_code", 1)) from None
    show(report, as_json)
    told = f"{counted(report['errors'], 'error')}, which {out} has; the first: {report['first_error']}"
    if listed.rows and not report["predictions"]:
        raise _failure(f"no row could be served: {told}")
    if max_errors is not None and report["errors"] > max_errors:
        raise _failure(f"--max-errors {max_errors} allows fewer: {told}")


def _scan(found: Source, needed: list[str], encoding: str, allowed: tuple[str, ...]) -> ImageList | ImageFolder:
    if found.kind == "pictures":
        return ImageFolder.scan(found)
    few = len(found.files) == 1
    with tqdm(found.files, "looking through lists", unit="list", file=sys.stderr, disable=few) as files:
        return ImageList.scan(found.name, needed, encoding, files=files, allowed=allowed)


def _cluster() -> ModuleType:
    try:
        import router.cluster
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "ray":
            raise
        raise click.UsageError("--ray needs ray: pip install 'pear-adapters[ray]'") from None
    return router.cluster


def _failure(text: str, exit_code: int = 1) -> click.ClickException:
    failure = click.ClickException(printable(text))
    vars(failure)["exit_code"] = exit_code
    return failure


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def show(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(report))
        return
    if report["finished_before"]:
        echo("finished before, with the same lists, options, store and backbone; --overwrite runs it again", err=True)
    else:
        resumed = f", {report['resumed_images']} were done before" if report["resumed_images"] else ""
        speed = f"{report['images_per_s']:.1f} images/s"
        echo(f"{counted(report['images'], 'image')} in {report['seconds']:.1f} s, {speed}{resumed}", err=True)
        if "workers" in report:
            echo(
                f"{counted(report['workers'], 'worker')}, "
                f"{counted(report['retries'], 'batch', 'batches')} tried again. "
                f"Start to first answer {report['start_s']:.1f} s; waiting for the list {report['list_s']:.1f} s; "
                f"writing {report['write_s']:.1f} s. All workers together: reading files {report['read_s']:.1f} s, "
                f"decoding {report['decode_s']:.1f} s, fetching images and copying them to the device "
                f"{report['transfer_s']:.1f} s, forwards {report['device_s']:.1f} s",
                err=True,
            )
        elif report["images"]:
            by_gpu = f" ({report['by_gpu']} images on the GPU)" if "by_gpu" in report else ""
            echo(
                f"forwards {report['device_s']:.1f} s; waiting for images {report['wait_s']:.1f} s; writing "
                f"{report['write_s']:.1f} s. In other threads, at the same time: the list {report['list_s']:.1f} s, "
                f"reading files {report['read_s']:.1f} s, decoding {report['decode_s']:.1f} s{by_gpu}, copying images "
                f"to the device {report['transfer_s']:.1f} s",
                err=True,
            )
    unknown = f" ({report['unknown']} unknown)" if report["unknown"] else ""
    found = f"{counted(report['predictions'], 'prediction')}{unknown}, {counted(report['errors'], 'error')}"
    echo(f"{found}, finished: {report['out']}")


if __name__ == "__main__":
    main()
