"""A base set: one adapter set trained for several tasks at once, for others to start from and to share."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pear_store import Task, make_task, write_checkpoint
from pear_train.config import OPTIONS, TrainConfig
from pear_train.data import Dataset
from pear_train.errors import ConfigError, DivergedError
from pear_train.finished import Identity, check_out, check_room, fingerprint, identity, rehearse
from pear_train.loop import Step
from pear_train.partial import state_bytes
from pear_train.record import to_task
from pear_train.run import TaskRun, preprocess_record
from router import AdaptedBackbone, Backbone
from router.device import open_device


@dataclass(frozen=True)
class Base:
    """What making a base set gave: val top-1 of each of its tasks with their heads, which are not kept."""

    val_top1: dict[str, float]
    file_bytes: int
    seconds: float


def train_base(
    configs: Sequence[TrainConfig],
    backbone: Backbone,
    datasets: Sequence[Dataset],
    out: Path,
    progress: Callable[[Step], None] | None = None,
) -> Base:
    """Trains the first configuration's adapters on all data sets, each with its own head; writes them without heads.

    A step takes a batch of every task, and their mean loss; an epoch is as many steps as the largest task's. Nothing is
    pruned: every position keeps its own adapter, so that tasks may start from it.

    Raises:
        ConfigError: tasks of different input sizes, or of different options that all must have in common.
        PearTrainError, RouterError, PearStoreError: as for :func:`pear_train.train`.
    """
    began = time.perf_counter()
    check_configs(configs)
    check_out(out)
    device = open_device(configs[0].device or ("cuda" if torch.cuda.is_available() else "cpu"))
    adapted = AdaptedBackbone(backbone, device, torch.float32, for_training=True)
    # a base set is never tested
    runs = [
        TaskRun(config, adapted, replace(dataset, test=None)) for config, dataset in zip(configs, datasets, strict=True)
    ]
    first, config = runs[0], configs[0]
    for run in runs[1:]:
        if run.record["input_size"] != first.record["input_size"]:
            sizes = f"{run.record['input_size'][1:]} and {first.record['input_size'][1:]}"
            raise ConfigError(f"base set: tasks of one input size expected, found {sizes}")
        run.adapters = first.adapters
    now = base_identity(configs, backbone, datasets)
    check_room(out, state_bytes(first))
    rehearse(out, _task(first, now, {}))
    own = [run.batches for run in runs]
    parameters = [*first.adapters.trained().values(), *(p for run in runs for p in run.head.parameters())]
    first.optimiser = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    first.batches = max(run.batches for run in runs)
    for epoch in range(1, config.epochs + 1):
        for batch in range(first.batches):
            first.epoch, first.batch = epoch, batch
            first.before_step()
            rows = []
            for run, batches in zip(runs, own, strict=True):
                run.batch = batch % batches
                rows.append(run.next_rows())
            images = torch.cat([run.images(r) for run, r in zip(runs, rows, strict=True)])
            features = adapted.features(images, first.step_weights(), first.autocast)
            parts = torch.split(features, [len(r) for r in rows])
            losses = [run.loss(part, r) for run, part, r in zip(runs, parts, rows, strict=True)]
            loss = torch.stack(losses).mean()
            if not bool(torch.isfinite(loss)):
                raise DivergedError("base", f"the loss became {float(loss)} in epoch {epoch}", config.lr)
            loss.backward()  # type: ignore[no-untyped-call]
            first.move()
            if progress is not None:
                done = batch == first.batches - 1
                val = sum(run.accuracy(run.val_pixels) for run in runs) / len(runs) if done else None
                progress(Step("base", epoch, config.epochs, batch + 1, first.batches, float(loss.detach()),
                              sum(run.train_top1 for run in runs) / len(runs), val))  # fmt: skip
        first.check_finite()
    val_top1 = {run.config.task: run.accuracy(run.val_pixels) for run in runs}
    file_bytes = write_checkpoint(out, _task(first, now, val_top1))
    return Base(val_top1, file_bytes, round(time.perf_counter() - began, 2))


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


def check_configs(configs: Sequence[TrainConfig]) -> None:
    """Raises a ConfigError unless the tasks of a base set agree in what it takes from the first alone."""
    apart = {"task", "batch_size", "seed", "augment", "img_size"}  # of which each task has its own
    for config in configs[1:]:
        for name in OPTIONS.keys() - apart:
            one, other = getattr(configs[0], name), getattr(config, name)
            if one != other:
                raise ConfigError(
                    f"base set: {name.replace('_', ' ')} {one} of task {configs[0].task!r}, {other} of task "
                    f"{config.task!r}: expected one for all tasks"
                )


def _task(first: TaskRun, identity: Identity, val_top1: dict[str, float]) -> Task:
    """The base set as it stands, without heads."""
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
