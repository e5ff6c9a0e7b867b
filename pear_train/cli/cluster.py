"""Trains the tasks of a request on a Ray cluster."""

import os
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import click

from pear_train.cli.progress import Table
from pear_train.cli.request import Given, Request, Work
from pear_train.tasks import TaskEntry
from router import Backbone


def train_on_cluster(request: Request, work: Work, loaded: Backbone, given: Given) -> None:
    """Trains the work's jobs on a Ray cluster. Paths that are read or written must be the same on all machines."""
    cluster = find_cluster()
    if not work.jobs:
        return
    assert request.address is not None
    entries = {entry.config.task: entry for entry in work.entries}
    assignments = [cluster.Assignment(_absolute(entries[job.config.task]), job.out.absolute()) for job in work.jobs]
    epochs = {job.config.task: job.config.epochs for job in work.jobs}
    with redirect_stdout(sys.stderr), cluster.session(request.address):  # Ray prints messages about workers on stdout
        device = work.jobs[0].config.device
        on_gpus = cluster.has_gpus() if device is None else device.startswith("cuda")
        weights = None if request.weights is None else str(Path(request.weights).absolute())
        root = None if request.data_root is None else request.data_root.absolute()
        setup = cluster.Setup(
            request.backbone, weights, loaded.digest, root, on_gpus, given.base, given.bank, given.bases
        )
        with Table(str(request.tasks_file), epochs) as table:
            party = cluster.Party(
                setup, table, request.together or (8 if on_gpus else 1), request.workers, request.cpus_per_worker
            )
            for result in party.train(assignments):
                table.ended(result.task)
                work.keep(result, table.say)


def _absolute(entry: TaskEntry) -> TaskEntry:
    """The entry with an absolute path of its data. A name, such as torch/cifar10, stays the same."""
    path = Path(entry.data)
    return replace(entry, data=str(path.absolute())) if os.path.exists(path) else entry


def find_cluster() -> ModuleType:
    """Imports pear_train.cluster, which needs ray.

    Raises:
        click.UsageError: ray is not installed.
    """
    try:
        import pear_train.cluster
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("ray", "pyarrow"):
            raise
        raise click.UsageError("--ray needs ray: pip install 'pear-adapters[ray]'") from None
    return pear_train.cluster
