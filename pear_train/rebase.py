"""Moves a task to other common bases without training, and measures how much worse it becomes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pear_store import RawTensor, Task, make_task, write_checkpoint
from pear_store.format.codes import matrix_values, up_values
from pear_store.format.record import HEAD_PARTS, entry_names, renamed
from pear_train.adapters import AdapterSet, TrainedBranch
from pear_train.bank import stored_adapter
from pear_train.bases import bases_at, check_bases, is_bases, stand_on
from pear_train.config import OPTIONS, TrainConfig
from pear_train.data import Dataset, Pixels, read_pictures
from pear_train.dtypes import code_bits
from pear_train.errors import ConfigError
from pear_train.evaluate import calibrated, in_batches
from pear_train.identity import given_digest, identity_of
from pear_train.knowledge import in_common_bases
from pear_train.machine import on_device
from pear_train.output import check_out
from pear_train.recall import Scores, in_record, metrics_of, scores_of
from pear_train.report import bases_bytes, stored_bytes
from pear_train.to_task import write_adapters
from router import AdaptedBackbone, Backbone, Preprocess, Router


@dataclass(frozen=True)
class Rebased:
    """The figures of a task that was moved. Pairs are (before, after)."""

    task: str
    bases: str
    held: float
    """The share, 0 to 1, of the cores' sum that the new bases hold, by squared norm."""
    loss: dict[str, tuple[float, float]]
    """Cross-entropy on val, and on test if there is one."""
    top1: dict[str, tuple[float, float]]
    """Top-1, 0 to 1, on the same splits."""
    threshold: tuple[float | None, float | None]
    """The second one is calibrated anew on val; None if no confidence is enough, or the task was trained without."""
    adapter_bytes: int
    head_bytes: int
    bases_bytes: int
    file_bytes: int


def rebase(
    task: Task,
    bases: Task,
    backbone: Backbone,
    dataset: Dataset,
    out: Path,
    name: str = "",
    device: str | None = None,
) -> Rebased:
    """Writes a task with the nearest cores in other bases: C = D⁺ · down · core · up · U⁺ at each position.

    Its own adapters, its head and its options do not change. The old and the new task are both evaluated on the data,
    through the router.

    Args:
        bases: the new common bases.
        dataset: data of the task's classes; val and test are evaluated.
        out: the checkpoint to write.
        name: name of the new task; empty: the same name.
        device: device of torch. None: a GPU if there is one.
    Raises:
        ConfigError: the task has no common bases, or the new bases or the data do not fit it.
    """
    if is_bases(task) or "bases" not in task.record["training"]:
        raise ConfigError(f"task {task.name!r}: it uses no common bases: give a task that was trained with --bases")
    if list(task.labels) != list(dataset.classes):
        raise ConfigError(
            f"task {task.name!r}: expected data of its {len(task.labels)} classes, found {len(dataset.classes)} "
            "classes, and not the same: give the data that it was trained on"
        )
    check_out(out)
    training = task.record["training"]
    options = {key: value for key, value in identity_of(task).items() if key in OPTIONS}
    try:
        config = TrainConfig(**{**options, "task": name or task.name, "rank": OPTIONS["rank"].default})
    except ConfigError as error:
        raise ConfigError(f"task {task.name!r}: field 'training': {error}") from None
    adapted = on_device(backbone, device)
    check_bases(bases, adapted, config)
    adapted.attach(list(task.positions))
    adapters, held = _moved(task, bases, adapted, config)
    tensors: dict[str, RawTensor] = {}
    record = {**task.record, "task": config.task, **write_adapters(config, adapters, tensors)}
    if (head := task.record["head"]) is not None:
        names = {stored: f"head.{use}" for use, stored in entry_names(head, HEAD_PARTS)}
        tensors |= {new: task.tensors[stored] for stored, new in names.items()}
        record["head"] = renamed(head, names.__getitem__, HEAD_PARTS)
    _, pixels = read_pictures(dataset, Preprocess(task.preprocess, dataset.limits))
    splits = {split: one for split, one in pixels.items() if split != "train"}
    before = _measure(task, adapted, splits)
    after = _measure(make_task(record, tensors, config.task), adapted, splits)
    loss = {split: (before[split].loss, after[split].loss) for split in splits}
    scores = {split: after[split].scores for split in splits}
    top1 = {split: (before[split].scores.top1, scores[split].top1) for split in splits}
    record["metrics"] = metrics_of(scores)  # nothing of before the move, also if these data have no test split
    threshold = task.record.get("threshold"), after["val"].threshold(config.threshold_accuracy)
    record.pop("threshold", None)
    if threshold[1] is not None:
        record["threshold"] = threshold[1]
    told = {"from": training["bases"], "data": dataset.fingerprint, "held": held, "loss": loss, "top1": top1}
    counts = {"images": dataset.counts, "unreadable": dataset.unreadable_counts}  # of what the figures are measured on
    given = given_digest(task, (), bases)  # so that no run on these bases takes this file for its own
    where_it_is = {"bases": bases.name, "given": given, "rebased": told}
    record["training"] = {**training, **counts, **in_record(scores), **where_it_is}
    written = make_task(json.loads(json.dumps(record)), tensors, config.task)
    file_bytes = write_checkpoint(out, written)
    adapter, _, head_bytes = stored_bytes(written)
    return Rebased(
        config.task, bases.name, held, loss, top1, threshold, adapter, head_bytes, bases_bytes(written), file_bytes
    )


def _moved(task: Task, bases: Task, adapted: AdaptedBackbone, config: TrainConfig) -> tuple[AdapterSet, float]:
    """The task's adapters with the nearest cores in `bases`, and the share of the squared norm that these hold."""
    bits = code_bits(config.tensor_dtype), code_bits(config.core_dtype)
    adapters = AdapterSet({}, 0, config.activation, config.scale, torch.Generator(), False, *bits)
    stand_on(adapters, bases_at(bases, adapted, list(task.positions)), 1.0, adapted.device)
    whole = kept = 0.0
    for position, (common, *own) in task.positions.items():
        branch = adapters.branches[position][0]
        (d, u), old = adapters.matrices(branch.adapter), task.adapters[common.adapter]
        down = torch.from_numpy(matrix_values(old.down, task.tensors).astype("f4"))
        up = torch.from_numpy(up_values(old, task.tensors).astype("f4")) * common.scale
        core = in_common_bases(down, up, d.cpu(), u.cpu())
        whole += float((down @ up).square().sum())
        kept += float((d.cpu() @ core @ u.cpu()).square().sum())
        branch.core = nn.Parameter(core.to(adapted.device))
        for one in own:
            adapters.frozen[one.adapter] = stored_adapter(task, one.adapter, "bank")
            adapters.branches[position].append(TrainedBranch(one.adapter, one.scale))
    return adapters, kept / (whole or 1.0)


@dataclass(frozen=True, eq=False)
class _Measured:
    """What a task answers to a split: the mean loss, figures, which answers are right, and how confident each is."""

    loss: float
    scores: Scores
    right: Tensor
    confidence: Tensor

    def threshold(self, wanted: float | None) -> float | None:
        return None if wanted is None else calibrated(self.right, self.confidence, wanted)


@torch.no_grad()
def _measure(task: Task, adapted: AdaptedBackbone, splits: Mapping[str, Pixels]) -> dict[str, _Measured]:
    """Of each split, through the router."""
    router, found = Router(adapted.backbone, device=adapted.device), {}
    router.add(task)
    for split, pixels in splits.items():
        parts = [router.run(pixels.images(rows), task.name).logits for rows in in_batches(pixels)]
        logits = torch.cat([torch.stack(list(part)) for part in parts]).cpu()
        confidence, predicted = logits.softmax(1).max(1)
        found[split] = _Measured(
            float(F.cross_entropy(logits, pixels.targets)), scores_of(predicted, pixels.targets, len(task.labels)),
            predicted == pixels.targets, confidence,
        )  # fmt: skip
    return found
