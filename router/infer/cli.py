"""Run tasks on lists of images of any length: each image through its own task, or through several.

The list is CSV, JSON lines or Parquet (by its file's ending: .csv, .tsv, .jsonl, .parquet, or .CSV and so on). A CSV
may have commas, semicolons or tabs. Its column `image` holds paths or URLs, and in Parquet also encoded images, or
structs of bytes and path as Hugging Face writes them. Its column `task` holds tasks' names, or name@version. The output
has the list's rows in its order, with all its columns, then `version`, `label`, `known`, `probability`, `topk` (the
likeliest classes, each with `label` and `probability`; in CSV as JSON) and `error`. Images that the list holds are not
written again: the output's `image` is their path.

A task may have a threshold stored (pear-train --threshold-accuracy). If the likeliest class has a lower probability,
the answer is unknown: `known` is false and `label` is empty. `probability` and `topk` still say what was likeliest.
--threshold 0.8 asks the same of all tasks, --threshold none of no task.

A relative path begins in the list's folder, or in --root DIR. With --root, nothing outside of DIR is opened.

Several lists are read as one: give their folder, or a pattern in quotes ('lists/*.parquet'). They are read in natural
order, part-2 before part-10, and rows are counted through all of them. They have one format and the same columns. (In
JSON lines, what a row does not name is empty.) Each relative path begins in the folder of its own list.

A list, a folder or a pattern may be a URL, such as s3://bucket/lists/*.parquet or https://host/list.csv. Each file is
copied to $TMPDIR while it is read.

In place of lists, give a folder of pictures with all its sub-folders, or a pattern in quotes ('pictures/*.jpg'), and
the task with --task. The output then has a row for each picture; below a folder its path in the folder. A folder that
has any picture is one of pictures. Of a folder of lists, those of its sub-folders are not read.

If a row cannot be served, only that row fails: `error` says why. A line of the list that cannot be read is such a row.
If no row at all could be served, or if more fail than --max-errors allows, the exit code is 1. The output is written
all the same.

A list's own columns are never replaced. If one has the name of a result, the list is refused: --prefix pear_ then names
the results `pear_label`, `pear_error` and so on.

With --task a (or --tasks a,b,c, or --tasks all), the list needs no column `task`: every image goes through all these
tasks, and the output has a row for each image and task, which the column `task` names. `all` are the tasks that the
store has for this backbone.

With --embeddings the output has `embedding` in place of classes: the features that a task's head would take, with the
task's adapters and preprocessing. Without a column `task` and without --task, they are those of the backbone alone, and
no store is needed.

The list is worked off in parts, kept in OUT.parts until OUT is written whole. If a run is interrupted, the same command
goes on after the last finished part, with the tasks' versions that it began with. OUT.run.json says which run wrote
OUT. If that was the same run (the same lists, options, store and backbone), there is nothing to do. If it was another,
OUT is replaced only with --overwrite. A file that no run wrote, or that was changed since, is never replaced.

OUT without an ending is a folder of Parquet files. Their rows are in the list's order; the column `row` numbers them.

With --ray, the workers of a Ray cluster do the work (docs/cluster.md), and the output is the same. --ray alone starts
Ray on this machine, until the run ends.

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
from pear_store.files import ending
from pear_store.local.sources import Access
from pear_store.remote.cache import CacheSettings
from pear_store.terminal import NamedPath, allow_option, echo, printable, version_option
from router import Router, RouterError
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
        raise click.BadParameter(f"{name!r} is no text encoding: expected such as utf-8, latin-1 or cp1252") from None
    return "utf-8-sig" if name == "utf-8" else name


def _threshold(_: click.Context, __: click.Parameter, text: str | None) -> Threshold:
    try:
        return "stored" if text is None else read_threshold(text)
    except RouterError as error:
        raise click.BadParameter(str(error)) from None


def _address(_: click.Context, __: click.Parameter, address: str | None) -> str | None:
    if address is not None and ending(address) in FORMATS:
        raise click.BadParameter(f"{address!r} is no address: write --ray after LIST and OUT, or --ray=ADDRESS")
    return address


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@version_option
@click.argument("source", type=NamedPath())
@click.argument("out", type=NamedPath(path_type=Path))
@click.option(
    "--store", "where", type=click.Path(), envvar="PEAR_STORE", default=str(user_data_path("pear") / "store"),
    help="The store that holds the tasks: a directory, or a remote's URL, which is read through a cache "
    "[default: $PEAR_STORE, else the user's data directory].",
)  # fmt: skip
@click.option(
    "--cache-bytes", type=click.IntRange(1), envvar="PEAR_CACHE_BYTES", show_default="$PEAR_CACHE_BYTES, else 10 GiB",
    help="The most bytes of a remote that are cached here, in $PEAR_CACHE_DIR or the user's cache directory.",
)  # fmt: skip
@click.option(
    "--task",
    "--tasks",
    "tasks",
    metavar="TASKS",
    help="Tasks that every image goes through: all, or names with commas between them.",
)  # fmt: skip
@click.option("--backbone", default="pear_tiny", show_default=True, help="A timm model's name.")
@click.option("--weights", type=click.Path(), help="Local safetensors file of the backbone's weights.")
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(1), help="Images in a forward.")
@click.option("--top", default=5, show_default=True, type=click.IntRange(1), help="Classes in `topk`.")
@click.option(
    "--threshold", metavar="X|none", callback=_threshold,
    help="The probability below which the likeliest class counts as unknown, for all tasks, or none "
    "[default: what each task has stored, if anything].",
)  # fmt: skip
@click.option(
    "--embeddings",
    is_flag=True,
    help="Write features instead of classes: those of a task, or without a task those of the backbone.",
)
@click.option("--device", help="Device to compute on, such as cpu [default: cuda where there is one].")
@click.option(
    "--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Precision of the forward.",
)  # fmt: skip
@click.option("--prefix", default="", help="What the results' names begin with, such as pear_.")
@click.option("--slot-bytes", type=click.IntRange(1), help="Most bytes that loaded tasks may take [default: no limit].")
@click.option(
    "--root", type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Relative paths begin here, and nothing outside is opened [default: the list's folder, without a limit].",
)  # fmt: skip
@click.option(
    "--encoding", default="utf-8", show_default=True, callback=_encoding,
    help="Encoding of a list in CSV or JSON lines, such as latin-1.",
)  # fmt: skip
@click.option(
    "--max-pixels", default=MAX_PIXELS, show_default=True, type=click.IntRange(1), help="Larger pictures are refused."
)
@click.option("--max-errors", type=click.IntRange(0), help="Exit code 1 if more rows fail [default: if all fail].")
@allow_option
@click.option(
    "--ray", "address", metavar="[ADDRESS]", is_flag=False, flag_value="local", callback=_address,
    help="Let a Ray cluster do the work: the one at ADDRESS, such as auto or 10.0.0.1:6379. Without ADDRESS, this "
    "machine alone.",
)  # fmt: skip
@click.option(
    "--workers", type=click.IntRange(1), show_default="as many as the cluster has room for",
    help="With --ray: how many workers, each with a router of its own.",
)  # fmt: skip
@click.option(
    "--cpus-per-worker", type=click.IntRange(1), show_default="4, or what the smallest machine has; 1 beside a GPU",
    help="With --ray: the cores that each worker takes.",
)  # fmt: skip
@click.option(
    "--decode", type=click.Choice(["auto", "apart", "beside"]), default="auto", show_default=True,
    help="With --ray: where images are decoded. apart: on any core of the cluster. beside: in the workers, beside the "
    "forwards. auto: apart if workers have GPUs.",
)  # fmt: skip
@click.option("--restart", is_flag=True, help="Begin again: drop what an unfinished run of this output has done.")
@click.option("--overwrite", is_flag=True, help="Replace the output of a finished run.")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
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
        raise click.UsageError("--threshold: embeddings are no classes: without --embeddings")
    if embeddings and address is not None:
        raise click.UsageError("--embeddings: not with --ray yet")
    if address is None and (workers or cpus_per_worker or decode != "auto"):
        raise click.UsageError("--workers, --cpus-per-worker and --decode are for a cluster: give --ray, too")
    try:
        if not out.parent.is_dir():
            raise click.ClickException(f"{out}: folder {out.parent} does not exist; make it first")
        if os.path.exists(source) and out.exists() and out.samefile(source):
            raise click.UsageError(f"{out}: is the list itself; choose another output")
        found = find(source, out, Access(allowed=frozenset(allowed)))
        for note in found.notes:
            echo(note, err=True)
        if found.kind == "pictures" and not tasks and not embeddings:
            raise click.UsageError(f"{source}: pictures without a list: say their task with --task NAME")
        if found.kind == "pictures" and root is not None:
            raise click.UsageError(f"{source}: pictures without a list: --root is for lists")
        listed = _scan(found, ["image"] if tasks or embeddings else ["image", "task"], encoding, allowed)
        alone = embeddings and not tasks and "task" not in listed.schema.names
        with ExitStack() as stack:
            if address is not None:
                cluster = _cluster()
                stack.enter_context(redirect_stdout(sys.stderr))  # Ray prints there what happens to workers
                stack.enter_context(cluster.session(address))
                device = device or ("cuda" if cluster.has_gpus() else "cpu")
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            options = {
                "batch_size": batch_size, "top": None if embeddings else top, "dtype": dtype, "device": device,
                "threshold": threshold, "tasks": tasks, "prefix": prefix, "max_pixels": max_pixels,
            }  # fmt: skip
            store = None
            if not alone:
                store = stack.enter_context(Store.open(where, cache=CacheSettings(limit_bytes=cache_bytes)))
            work_off: Callable[[Job], dict[str, Any]] | None = None
            if address is None:
                precision = getattr(torch, dtype)
                router = Router(backbone, store, weights=weights, device=device, dtype=precision, slot_bytes=slot_bytes)
            else:
                router = Router(backbone, store, weights=weights, device="cpu")  # plans, and computes nothing
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
    if max_errors is not None and report["errors"] > max_errors:
        raise _failure(
            f"{report['errors']} errors, --max-errors allows {max_errors}; the first: {report['first_error']}"
        )


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
        echo("finished before: the same list, options, store and backbone; --overwrite runs it again", err=True)
    else:
        resumed = f", {report['resumed_images']} were done before" if report["resumed_images"] else ""
        speed = f"{report['images_per_s']:.1f} images/s"
        echo(f"{report['images']} images in {report['seconds']:.1f} s, {speed}{resumed}", err=True)
        if "workers" in report:
            count = "1 worker" if report["workers"] == 1 else f"{report['workers']} workers"
            echo(
                f"{count}, {report['retries']} batches tried again. Until the first answer {report['start_s']:.1f} s; "
                f"waiting for the list {report['read_s']:.1f} s; writing {report['write_s']:.1f} s. Of all workers "
                f"together: decoding {report['decode_s']:.1f} s, forwards {report['device_s']:.1f} s",
                err=True,
            )
        elif report["images"]:
            echo(
                f"forwards {report['device_s']:.1f} s; waiting for images {report['wait_s']:.1f} s; writing "
                f"{report['write_s']:.1f} s. Beside that, in other threads: the list {report['list_s']:.1f} s, reading "
                f"files {report['read_s']:.1f} s, decoding {report['decode_s']:.1f} s, taking images to the device "
                f"{report['transfer_s']:.1f} s",
                err=True,
            )
    unknown = f" ({report['unknown']} unknown)" if report["unknown"] else ""
    echo(f"{report['predictions']} predictions{unknown}, {report['errors']} errors, finished: {report['out']}")


if __name__ == "__main__":
    main()
