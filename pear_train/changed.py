"""A task that is changed without training: evaluated before and after, and written with its new figures."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pear_store import Task, make_task, write_checkpoint
from pear_train.data import Dataset, Pixels, read_pictures
from pear_train.errors import ConfigError
from pear_train.evaluate import calibrated, in_batches
from pear_train.identity import given_digest
from pear_train.recall import Scores, in_record, metrics_of, scores_of
from pear_train.report import bases_bytes, stored_bytes
from router import AdaptedBackbone, Backbone, Preprocess, Router


@dataclass(frozen=True)
class Changed:
    """The figures of a task that was changed. Pairs are (before, after)."""

    task: str
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


def check_task(task: Task, backbone: Backbone, dataset: Dataset) -> None:
    """Raises a ConfigError unless the task is of this backbone and has a head, and the data are of its classes."""
    if task.backbone_digest != backbone.digest:
        raise ConfigError(
            f"task {task.name!r}: expected its backbone {task.backbone_model} {task.backbone_digest[:19]}…, found "
            f"{backbone.name} {backbone.digest[:19]}…: give the backbone and the weights that it was trained on"
        )
    if task.record["head"] is None:
        raise ConfigError(f"task {task.name!r}: it has no head, so it cannot be evaluated: give a task")
    if list(task.labels) != list(dataset.classes):
        raise ConfigError(
            f"task {task.name!r}: expected data of its {len(task.labels)} classes, found {len(dataset.classes)} "
            "classes, and not the same: give the data that it was trained on"
        )


def write_changed(
    task: Task,
    changed: Task,
    adapted: AdaptedBackbone,
    dataset: Dataset,
    out: Path,
    how: str,
    told: Mapping[str, Any],
    bases: Task | None = None,
) -> Changed:
    """Evaluates a task before and after a change, through the router, and writes it with the figures of after.

    Args:
        task: as it was.
        changed: as it is now. Metrics, threshold and counts of images are replaced.
        how: the field of `training` that says what was done: `told`, the data, and the figures of before and after.
        bases: common bases that the changed task has instead of its own.
    """
    _, pixels = read_pictures(dataset, Preprocess(task.preprocess, dataset.limits))
    splits = {split: one for split, one in pixels.items() if split != "train"}
    before, after = _measure(task, adapted, splits), _measure(changed, adapted, splits)
    loss = {split: (before[split].loss, after[split].loss) for split in splits}
    scores = {split: after[split].scores for split in splits}
    top1 = {split: (before[split].scores.top1, scores[split].top1) for split in splits}
    threshold = task.record.get("threshold"), after["val"].threshold(_wanted(task))
    written = {key: value for key, value in changed.record.items() if key != "threshold"}
    written["metrics"] = metrics_of(scores)  # nothing of before, also if these data have no test split
    if threshold[1] is not None:
        written["threshold"] = threshold[1]
    counts = {"images": dataset.counts, "unreadable": dataset.unreadable_counts}  # of what the figures are measured on
    given = given_digest(task, (), bases)  # so that no run takes this file for its own
    figures = {**told, "data": dataset.fingerprint, "loss": loss, "top1": top1}
    written["training"] = {**changed.record["training"], **counts, **in_record(scores), "given": given, how: figures}
    made = make_task(json.loads(json.dumps(written)), changed.tensors, changed.name)
    file_bytes = write_checkpoint(out, made)
    adapter, _, head = stored_bytes(made)
    return Changed(made.name, loss, top1, threshold, adapter, head, bases_bytes(made), file_bytes)


def _wanted(task: Task) -> float | None:
    """The share of answers that must be right, as the task was trained with. None if it records none."""
    share = task.record["training"].get("threshold_accuracy")
    return float(share) if isinstance(share, int | float) and 0 < share <= 1 else None


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
