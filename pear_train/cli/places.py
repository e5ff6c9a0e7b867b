"""Checks that all files that the command reads and writes are different."""

import os
from collections.abc import Iterator
from pathlib import Path

import click

from pear_train.cli.request import Request, Work
from pear_train.errors import ConfigError
from pear_train.output import files_beside
from pear_train.plot import plot_path
from pear_train.source_tasks import source_paths
from pear_train.targets import Named, check_apart


def check_places(request: Request, work: Work) -> None:
    """Raises a UsageError if two outputs are one file, or if an output is also an input."""
    said = ["data", "weights", "tasks_file", "base", "bank", "from_store"]
    said += ["bases", "rebase", "round"] if request.from_store is None else []  # else they are names
    named = [(f"--{name.removesuffix('_file').replace('_', '-')}", getattr(request, name)) for name in said]
    inputs = [(option, Path(path)) for option, path in named if path is not None]
    if request.tasks_file is not None:
        inputs += [(f"data of task {entry.config.task}", Path(entry.data)) for entry in work.entries]
    outputs = list(_outputs(request, work))
    try:
        check_apart(outputs, inputs)
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    folders = {Path(os.path.realpath(entry.data)) for entry in work.entries if os.path.isdir(entry.data)}
    for option, path in outputs:
        if option in ("--plot", "--preview") and (
            of := folders.intersection(Path(os.path.realpath(path)).parent.parents)
        ):
            raise click.UsageError(
                f"{option} {path}: would become a picture of the data in {of.pop()}: name a place outside of it"
            )


def _outputs(request: Request, work: Work) -> Iterator[Named]:
    """All files to write, and each task's folder for TensorBoard."""
    for task, out in (work.paths if request.many else {str(request.task): request.out}).items():
        yield "--out", out
        yield from (("--out (meanwhile)", path) for path in files_beside(out))
        if request.make_bases and request.from_store is None and not request.from_backbone:
            yield from (("--out (meanwhile)", path) for path in source_paths([e.config for e in work.entries], out))
        if request.plot:
            yield "--plot", plot_path(out)
        if request.tensorboard is not None:
            yield "--tensorboard", request.tensorboard / task
    for option in ("html", "preview", "curves"):
        if (path := getattr(request, option)) is not None:
            yield f"--{option}", path
