"""A base set: one adapter set trained for several tasks at once, for others to start from and to share."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pear_store import make_task, write_checkpoint
from pear_train.config import TrainConfig
from pear_train.data import Dataset
from pear_train.errors import ConfigError, DataError
from pear_train.loop import Step
from pear_train.record import to_task
from pear_train.run import TaskRun
from router import AdaptedBackbone, Backbone
from router.backbone import open_device


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
        ConfigError: tasks of different input sizes.
        PearTrainError, RouterError, PearStoreError: as for :func:`pear_train.train`.
    """
    began = time.perf_counter()
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
                raise DataError(f"base set: the loss became {float(loss)}: lower the learning rate, it is {config.lr}")
            loss.backward()  # type: ignore[no-untyped-call]
            first.move()
            if progress is not None:
                done = batch == first.batches - 1
                val = sum(run.accuracy(run.val_pixels) for run in runs) / len(runs) if done else None
                progress(Step("base", epoch, config.epochs, batch + 1, first.batches, float(loss.detach()),
                              sum(run.train_top1 for run in runs) / len(runs), val))  # fmt: skip
    val_top1 = {run.config.task: run.accuracy(run.val_pixels) for run in runs}
    task = to_task(first, {"val_top1": sum(val_top1.values()) / len(val_top1)})
    record = {**task.record, "task": "base", "head": None, "labels": []}
    record["training"] = {**record["training"], "method": "base", "tasks": sorted(val_top1)}
    tensors = {name: tensor for name, tensor in task.tensors.items() if not name.startswith("head.")}
    file_bytes = write_checkpoint(out, make_task(record, tensors, out))
    return Base(val_top1, file_bytes, round(time.perf_counter() - began, 2))
