"""Figures of each class. Top-1 alone hides a rare class that is never recognised."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pear_store.format.checkpoint import shown_label

_RECORDED = {"images": "images", "recall": "recall", "class_precision": "precision", "f1": "f1"}
"""Keys of a task's training record, and their names for people. The record's own `precision` means the dtype."""


@dataclass(frozen=True)
class Scores:
    """Figures of a split, from 0 to 1. Lists have a value for each class, to 4 places. None: not defined."""

    top1: float
    macro_f1: float
    """Mean F1 of the classes of which the split has images."""
    recall: list[float | None]
    """The share of a class's images that were recognised."""
    precision: list[float | None]
    """The share of the answers of a class that were right."""
    f1: list[float | None]


def scores_of(predicted: Tensor, targets: Tensor, classes: int) -> Scores:
    """Figures of predictions.

    Args:
        predicted, targets: classes, int64 [image].
        classes: number of classes.
    """
    images = torch.bincount(targets, minlength=classes).double()
    taken = torch.bincount(predicted, minlength=classes).double()
    right = torch.bincount(targets[predicted == targets], minlength=classes).double()
    f1 = 2 * right / (images + taken)
    return Scores(
        float(right.sum()) / max(1, len(targets)),
        float(f1[images > 0].mean()),
        _rounded(right / images),
        _rounded(right / taken),
        _rounded(f1),
    )


def metrics_of(scores: Mapping[str, Scores]) -> dict[str, float]:
    """What a task's metrics say, by split."""
    return {f"{split}_{name}": getattr(one, name) for split, one in scores.items() for name in ("top1", "macro_f1")}


def _rounded(values: Tensor) -> list[float | None]:
    return [None if value != value else round(value, 4) for value in values.tolist()]


def by_class(labels: Sequence[str], training: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each class's number of images and figures by split, from a task's training record."""
    told: dict[str, dict[str, Any]] = {label: {"images": {}, "recall": {}} for label in labels}
    for key, name in _RECORDED.items():
        of_splits = training.get(key, {})
        for split in [split for split in ("train", "val", "test") if split in of_splits]:  # the file sorts by name
            for label, value in zip(labels, of_splits[split], strict=True):
                told[label].setdefault(name, {})[split] = value
    return told


def in_record(scores: Mapping[str, Scores]) -> dict[str, dict[str, list[float | None]]]:
    """The classes' figures by split, in the form of the training record."""
    told = {split: asdict(one) for split, one in scores.items()}
    return {
        key: {split: one[name] for split, one in told.items()} for key, name in _RECORDED.items() if name != "images"
    }


def recall_rows(classes: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A table of all classes: images in each split, recall and F1 in %."""
    rows = []
    for label, told in classes.items():
        row: dict[str, Any] = {"class": shown_label(label), **told["images"]}
        for split, recall in told["recall"].items():
            row[f"{split} recall %"] = _percent(recall)
            if split in told.get("f1", {}):
                row[f"{split} F1 %"] = _percent(told["f1"][split])
        rows.append(row)
    return rows


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def recall_warnings(classes: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A line for each class that is never recognised in a split, with its counts."""
    whole = sum(told["images"].get("train", 0) for told in classes.values())
    for label, told in classes.items():
        for split, recall in told["recall"].items():
            if recall == 0:
                yield (
                    f"class {shown_label(label)!r}: none of its {told['images'][split]} {split} images is recognised. "
                    f"It has {told['images']['train']} of {whole} training images"
                )
