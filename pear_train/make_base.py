"""A base set: one adapter set, trained for several tasks at once. New tasks start from it and share it."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pear_store import Task, make_task, write_checkpoint
from pear_train.config import OPTIONS, TrainConfig
from pear_train.data import Dataset, preprocess_record
from pear_train.errors import ConfigError, DivergedError
from pear_train.identity import Identity, fingerprint, identity
from pear_train.machine import on_device
from pear_train.output import check_out, check_room, rehearse
from pear_train.report import Step
from pear_train.run import TaskRun
from pear_train.state import state_bytes
from pear_train.to_task import to_task
from router import AdaptedBackbone, Backbone

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """What :func:`train_base` measured."""

    val_top1: dict[str, float]
    """Top-1 on val, 0 to 1, of each task with its own head. Heads are not kept."""
    file_bytes: int
    seconds: float
    """Duration of the whole call."""


def train_base(
    configs: Sequence[TrainConfig],
    backbone: Backbone,
    datasets: Sequence[Dataset],
    out: Path,
    progress: Callable[[Step], None] | None = None,
) -> Base:
    """Trains one adapter set on all data sets, with a head for each. Writes the adapter set without heads.

    A step takes a batch of every task and follows their mean loss. An epoch has as many steps as the largest task's.
    Nothing is pruned: every position keeps its own adapter, so that tasks can start from it.

    Args:
        configs: options of each task. All but task, batch_size, seed, augment and img_size must be equal.
        datasets: data of each task, in the order of `configs`.
        out: the checkpoint to write.
        progress: is called after every step, with the task "base".
    Raises:
        ConfigError: tasks have different input sizes, or differ in options that must be equal.
        PearTrainError, RouterError, PearStoreError: as for :func:`train`.
    """
    began = time.perf_counter()
    check_configs(configs)
    check_out(out)
    runs = _start(configs, on_device(backbone, configs[0].device), datasets)
    first, config = runs[0], configs[0]
    now = base_identity(configs, backbone, datasets)
    check_room(out, state_bytes(first))
    rehearse(out, _task(first, now, {}))
    own = [run.batches for run in runs]
    first.batches = max(own)
    for epoch in range(1, config.epochs + 1):
        for batch in range(first.batches):
            first.epoch, first.batch = epoch, batch
            loss = _step(runs, [batch % batches for batches in own])
            if progress is not None:
                done = batch == first.batches - 1
                val = sum(run.accuracy(run.val_pixels) for run in runs) / len(runs) if done else None
                train_top1 = sum(run.train_top1 for run in runs) / len(runs)
                progress(Step("base", epoch, config.epochs, batch + 1, first.batches, loss, train_top1, val))
        first.check_finite()
        logger.debug("base: epoch %d of %d ended %.2f s after the start", epoch, config.epochs, _since(began))
    val_top1 = {run.config.task: run.accuracy(run.val_pixels) for run in runs}
    file_bytes = write_checkpoint(out, _task(first, now, val_top1))
    logger.debug("base: wrote %s, %d bytes", out, file_bytes)
    return Base(val_top1, file_bytes, round(_since(began), 2))


def _since(began: float) -> float:
    return time.perf_counter() - began


def _start(configs: Sequence[TrainConfig], adapted: AdaptedBackbone, datasets: Sequence[Dataset]) -> list[TaskRun]:
    """A run for each task. All use the first run's adapters; its optimiser trains them and every head."""
    runs = [  # a base set is never tested
        TaskRun(config, adapted, replace(dataset, test=None)) for config, dataset in zip(configs, datasets, strict=True)
    ]
    first = runs[0]
    for run in runs[1:]:
        if run.preprocess["input_size"] != first.preprocess["input_size"]:
            sizes = f"{run.preprocess['input_size'][1:]} and {first.preprocess['input_size'][1:]}"
            raise ConfigError(f"base set: expected tasks of one input size, found {sizes}: give all the same img_size")
        run.adapters = first.adapters
    parameters = [*first.adapters.trained().values(), *(p for run in runs for p in run.head.parameters())]
    first.optimiser = torch.optim.AdamW(parameters, lr=first.config.lr, weight_decay=first.config.weight_decay)
    return runs


def _step(runs: Sequence[TaskRun], batches: Sequence[int]) -> float:
    """Makes a step along the mean loss of one batch of each task, and returns that loss.

    Args:
        batches: number of each task's batch within its epoch.
    """
    first = runs[0]
    first.before_step()
    rows = []
    for run, batch in zip(runs, batches, strict=True):
        run.batch = batch
        rows.append(run.next_rows())
    images = torch.cat([run.images(r) for run, r in zip(runs, rows, strict=True)])
    features = first.adapted.features(images, first.step_weights(), first.autocast)
    parts = torch.split(features, [len(r) for r in rows])
    losses = [run.loss(part, r) for run, part, r in zip(runs, parts, rows, strict=True)]
    loss = torch.stack(losses).mean()
    if not bool(torch.isfinite(loss)):
        raise DivergedError("base", f"the loss became {float(loss.detach())} in epoch {first.epoch}", first.config.lr)
    loss.backward()
    first.move()
    return float(loss.detach())


def base_identity(configs: Sequence[TrainConfig], backbone: Backbone, datasets: Sequence[Dataset]) -> Identity:
    """What a base set depends on: the options of its tasks, and their data."""
    told = [
        [config.task, config.batch_size, config.seed, config.augment, dataset.fingerprint]
        for config, dataset in zip(configs, datasets, strict=True)
    ]
    data = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    common = replace(configs[0], task="base")
    preprocess = preprocess_record(backbone, common.img_size)
    return {**identity(common, backbone.digest, preprocess, data, None), "method": "base"}


def check_configs(configs: Sequence[TrainConfig], made: str = "base set") -> None:
    """Raises a ConfigError unless tasks agree in all options that what is made of them takes from the first task.

    Args:
        made: what is made of them, for messages.
    """
    apart = {"task", "batch_size", "seed", "augment", "img_size"}  # each task may have its own
    for config in configs[1:]:
        for name in OPTIONS.keys() - apart:
            one, other = getattr(configs[0], name), getattr(config, name)
            if one != other:
                raise ConfigError(
                    f"{made}: {name.replace('_', ' ')}: expected one value for all tasks, found {one} for "
                    f"{configs[0].task!r} and {other} for {config.task!r}"
                )


def _task(first: TaskRun, identity: Identity, val_top1: dict[str, float]) -> Task:
    """The base set as a task, without heads."""
    metrics = {"val_top1": sum(val_top1.values()) / len(val_top1)} if val_top1 else {}
    task = to_task(first, metrics)
    record = {**task.record, "task": "base", "head": None, "labels": []}
    record["training"] = {
        **record["training"],
        "method": "base",
        "tasks": sorted(val_top1),
        "val_top1": val_top1,
        "data_fingerprint": identity["data"],
        "fingerprint": fingerprint(identity),
    }
    tensors = {name: tensor for name, tensor in task.tensors.items() if not name.startswith("head.")}
    return make_task(record, tensors, "base set")
