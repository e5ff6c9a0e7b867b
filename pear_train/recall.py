"""How each class fares: top-1 hides a rare class that is never recognised."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def recall_by_class(predicted: Tensor, targets: Tensor, classes: int) -> list[float | None]:
    """Of each class the share of its images that were recognised, to 4 places; None for a class without images."""
    images = torch.bincount(targets, minlength=classes).tolist()
    right = torch.bincount(targets[predicted == targets], minlength=classes).tolist()
    return [None if n == 0 else round(r / n, 4) for r, n in zip(right, images, strict=True)]


def by_class(labels: Sequence[str], training: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a task's training record says of each class: counts of images and recall, by split."""
    told: dict[str, dict[str, Any]] = {label: {"images": {}, "recall": {}} for label in labels}
    for key in ("images", "recall"):
        for split, values in training.get(key, {}).items():
            for label, value in zip(labels, values, strict=True):
                told[label][key][split] = value
    return told


def recall_rows(classes: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A table of all classes: images in each split, recall in %."""
    return [
        {"class": label, **told["images"]}
        | {f"{split} recall %": "" if r is None else f"{100 * r:.1f}" for split, r in told["recall"].items()}
        for label, told in classes.items()
    ]


def recall_warnings(classes: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A line for each class that is never recognised in a split, with its counts."""
    whole = sum(told["images"].get("train", 0) for told in classes.values())
    for label, told in classes.items():
        for split, recall in told["recall"].items():
            if recall == 0:
                yield (
                    f"class {label!r}: none of its {told['images'][split]} {split} images is recognised; it has "
                    f"{told['images']['train']} of {whole} training images"
                )
