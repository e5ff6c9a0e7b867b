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

    pear-infer list.csv predictions.parquet --store pear.store --backbone pear_tiny
"""

import codecs
import errno
import json
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import torch
from platformdirs import user_data_path

from pear_store import PearStoreError, Store
from pear_store.local.sources import Access
from pear_store.terminal import allow_option, echo, printable
from router import Router, RouterError
from router.infer.lists import FORMATS, ImageList
from router.infer.work import infer
from router.pictures import MAX_PIXELS


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
    echo(f"{report['predictions']} predictions, {report['errors']} errors: {report['out']}")


if __name__ == "__main__":
    main()
