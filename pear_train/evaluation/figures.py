"""Figures of one task: accuracies, each class, confusions, and how far its confidence can be trusted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pear_train.evaluate import threshold_for
from pear_train.evaluation.answers import Floats, Ints

TOP = 5
BINS = 15
"""Number of bins of confidence, of equal width, as is usual for the ECE."""
WANTED = (0.95, 0.99)
"""Accuracies for which the needed confidence is reported."""


@dataclass(frozen=True)
class ClassFigures:
    """Figures of one class, 0 to 1. None: not defined."""

    label: str
    images: int
    precision: float | None
    """The share of the answers of this class that were right."""
    recall: float | None
    """The share of this class's images that were recognised."""
    f1: float | None


@dataclass(frozen=True)
class Bin:
    """Images of about the same confidence. The two figures are means."""

    images: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Point:
    """Coverage and accuracy if answers below a confidence are not taken."""

    threshold: float
    coverage: float
    """The share of all images that are answered."""
    accuracy: float | None
    """Accuracy of the answered images. None if there are none."""


@dataclass(frozen=True)
class Figures:
    """Figures of a task. Shares are in 0..1."""

    images: int
    top1: float
    top1_low: float
    """Lower end of Wilson's 95 % confidence interval of top-1."""
    top1_high: float
    top5: float | None
    """None for a task of at most five classes."""
    balanced_accuracy: float
    macro_f1: float
    ece: float
    """Expected calibration error: the mean distance between confidence and accuracy."""
    confidence: float
    """Mean confidence."""
    classes: list[ClassFigures]
    confusion: list[list[int]]
    """Number of images, [true class, answered class], in the order of `classes`."""
    reliability: list[Bin]
    coverage: list[Point]
    """For the thresholds 0, 0.01 and so on to 1."""
    most_confident: list[Point]
    """For the most confident 1 % of the images, 2 % and so on."""
    wanted: dict[float, Point | None]
    """Accuracy -> the point of the lowest threshold that reaches it. None if none does."""

    def confused(self) -> list[tuple[str, str, int]]:
        """(true class, answered class, number of images), the most frequent first."""
        names = [one.label for one in self.classes]
        pairs = [
            (names[i], names[j], count)
            for i, row in enumerate(self.confusion)
            for j, count in enumerate(row)
            if i != j and count
        ]
        return sorted(pairs, key=lambda pair: -pair[2])


def figures(labels: Sequence[str], targets: Ints, probabilities: Floats) -> Figures:
    """The figures of a task.

    Args:
        labels: names of the task's classes.
        targets: true classes, as numbers of `labels`, int64 [image].
        probabilities: float32 [image, class].
    """
    from scipy.stats import binomtest
    from sklearn.metrics import (
        accuracy_score,
        confusion_matrix,
        f1_score,
        precision_recall_fscore_support,
        recall_score,
        top_k_accuracy_score,
    )

    predicted, confidence = probabilities.argmax(1), probabilities.max(1)
    right = predicted == targets
    numbers, present = list(range(len(labels))), np.unique(targets)
    top1 = float(accuracy_score(targets, predicted))
    interval = binomtest(int(right.sum()), len(targets)).proportion_ci(method="wilson")
    precision, recall, f1, support = precision_recall_fscore_support(
        targets, predicted, labels=numbers, zero_division=np.nan
    )
    many = len(labels) > TOP
    bins = _reliability(right, confidence)
    return Figures(
        images=len(targets),
        top1=top1,
        top1_low=float(interval.low),
        top1_high=float(interval.high),
        top5=float(top_k_accuracy_score(targets, probabilities, k=TOP, labels=numbers)) if many else None,
        balanced_accuracy=float(recall_score(targets, predicted, labels=present, average="macro", zero_division=0)),
        macro_f1=float(f1_score(targets, predicted, labels=present, average="macro", zero_division=0)),
        ece=sum(one.images * abs(one.accuracy - one.confidence) for one in bins) / len(targets),
        confidence=float(confidence.mean()),
        classes=[
            ClassFigures(label, int(support[i]), _known(precision[i]), _known(recall[i]), _known(f1[i]))
            for i, label in enumerate(labels)
        ],
        confusion=confusion_matrix(targets, predicted, labels=numbers).tolist(),
        reliability=bins,
        coverage=[_point(right, confidence, threshold / 100) for threshold in range(101)],
        most_confident=_most_confident(right, confidence),
        wanted={share: _reaches(right, confidence, share) for share in WANTED},
    )


def _known(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def _reliability(right: NDArray[np.bool_], confidence: Floats) -> list[Bin]:
    """Every bin that has images, from the least to the most confident."""
    from sklearn.calibration import calibration_curve

    clipped = np.clip(confidence.astype(np.float64), 0, 1)  # rounding of float32 may give a little above 1
    accuracies, means = calibration_curve(right, clipped, n_bins=BINS, strategy="uniform")
    edges = np.linspace(0, 1, BINS + 1)
    counts = np.bincount(np.searchsorted(edges[1:-1], clipped), minlength=BINS)
    return [
        Bin(int(count), float(mean), float(accuracy))
        for count, mean, accuracy in zip(counts[counts > 0], means, accuracies, strict=True)
    ]


def _point(right: NDArray[np.bool_], confidence: Floats, threshold: float) -> Point:
    answered = confidence >= threshold
    return Point(threshold, float(answered.mean()), float(right[answered].mean()) if answered.any() else None)


def _most_confident(right: NDArray[np.bool_], confidence: Floats) -> list[Point]:
    order = np.argsort(-confidence, kind="stable")
    counts = np.unique(np.ceil(np.linspace(0.01, 1, 100) * len(order) - 1e-9).astype(np.int64))
    return [
        Point(float(confidence[order[count - 1]]), count / len(order), float(right[order[:count]].mean()))
        for count in counts.tolist()
    ]


def _reaches(right: NDArray[np.bool_], confidence: Floats, wanted: float) -> Point | None:
    """The point of the lowest threshold at which a share `wanted` of the answers is right."""
    threshold = threshold_for(torch.from_numpy(right), torch.from_numpy(confidence), wanted)
    return None if threshold is None else _point(right, confidence, threshold)
