"""The tasks that are trained only so that common bases can be fitted to them. They lie in ``OUT.sources`` meanwhile."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pear_store import Task, read_checkpoint
from pear_train.config import TrainConfig
from pear_train.data import Dataset
from pear_train.errors import ConfigError
from pear_train.identity import run_identity
from pear_train.job import Job
from pear_train.loop import train_many
from pear_train.output import checkpoint_at, is_finished
from pear_train.report import Step
from router import Backbone

_SOURCE_RANK = 8
"""Of tasks that are only trained to fit bases to them: as in the study."""


def sources_at(out: Path) -> Path:
    """The folder of the tasks that bases are fitted to, where there were none."""
    return out.with_name(out.name + ".sources")


def train_sources(
    rank: int,
    configs: Sequence[TrainConfig],
    backbone: Backbone,
    datasets: Sequence[Dataset],
    out: Path,
    progress: Callable[[Step], None] | None = None,
    say: Callable[[str], None] | None = None,
    overwrite: bool = False,
    force: bool = False,
) -> list[Task]:
    """An unpruned task for each data set, from its file in ``OUT.sources`` if that is there. All start from one `down`.

    Args:
        rank: of the bases. Together the tasks have at least as many directions.
        out: the checkpoint of the bases.
        overwrite: replace other runs' checkpoints there; else they are refused.
        force: train all, and replace any task checkpoint there.
    """
    jobs = _source_jobs(rank, configs, datasets, out)
    try:
        sources_at(out).mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{sources_at(out)}: the folder cannot be made: {error.strerror}: move away what is there"
        ) from None
    try:
        for job in jobs:
            checkpoint_at(job.out)  # all mistakes show before the first is trained
        todo = [job for job in jobs if force or not _is_trained(job, backbone, overwrite)]
        for _ in train_many(todo, backbone, progress, on_error="raise", say=say):
            pass
    finally:
        _remove_folder(out)  # if nothing is in it
    return [read_checkpoint(job.out) for job in jobs]


def source_paths(configs: Sequence[TrainConfig], out: Path) -> list[Path]:
    """The files of the tasks that bases are fitted to, where there were none."""
    return [sources_at(out) / f"{config.task}.safetensors" for config in configs]


def _source_jobs(rank: int, configs: Sequence[TrainConfig], datasets: Sequence[Dataset], out: Path) -> list[Job]:
    """The tasks that bases are fitted to, where there were none."""
    common: dict[str, Any] = {
        "method": "adapters", "rank": max(_SOURCE_RANK, -(-rank // len(configs))), "own_rank": 0, "own_bytes": None,
        "seed": configs[0].seed, "down": "own", "tensor_dtype": "F16", "head_dtype": "F16", "select": "last",
        "patience": None, "threshold_accuracy": None,
    }  # fmt: skip
    return [
        Job.of(replace(config, **common), dataset, path)
        for config, dataset, path in zip(configs, datasets, source_paths(configs, out), strict=True)
    ]


def _is_trained(job: Job, backbone: Backbone, overwrite: bool = False) -> bool:
    return is_finished(job.out, partial(run_identity, job.config, backbone, job.dataset(), None), overwrite)


def remove_sources(
    rank: int, configs: Sequence[TrainConfig], backbone: Backbone, datasets: Sequence[Dataset], out: Path
) -> None:
    """Removes the tasks that were trained for bases, and their folder if nothing else is in it."""
    for job in _source_jobs(rank, configs, datasets, out):
        with suppress(OSError, ConfigError):  # another run's file, or no checkpoint: it stays
            if _is_trained(job, backbone):
                job.out.unlink()
    _remove_folder(out)


def _remove_folder(out: Path) -> None:
    with suppress(OSError):  # something is in it
        sources_at(out).rmdir()
