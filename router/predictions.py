"""What tasks say of images."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Literal, Self, overload

import numpy as np
import torch
from torch import Tensor

from router.errors import RouterError
from router.layout import Ints

Threshold = float | None | Literal["stored"]
"""The probability that the likeliest class must have, else the answer is unknown: a number from 0 to 1, None for none,
or what each task has stored."""


def check_threshold(threshold: object) -> None:
    """Raises a RouterError unless it is a Threshold."""
    if threshold is None or threshold == "stored":
        return
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise RouterError(f"threshold {threshold!r:.80}: expected a number from 0 to 1, None for none, or 'stored'")


def read_threshold(text: str) -> float | None:
    """What a user's text says: ``none``, or a number from 0 to 1.

    Raises:
        RouterError: anything else.
    """
    try:
        threshold = None if text == "none" else float(text)
        check_threshold(threshold)
    except (ValueError, RouterError):
        raise RouterError(f"threshold {text!r:.80}: expected a number from 0 to 1, or none") from None
    return threshold


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a task says of one image.

    The answer is unknown where the likeliest class has a probability below `threshold`: `known` is False then, and
    there is no `label`. `topk` gives the likeliest classes all the same.
    """

    task: str
    """The reference that was asked for, such as ``dtd`` or ``dtd@prod``."""
    version: int | None
    """The task's version in the store; None if it was added to the router, or not found."""
    logits: Tensor
    """float32 [classes]; for a task without head, its features. NaN where the row failed."""
    classes: tuple[str, ...]
    """The names of the classes; none for a task without head."""
    error: str | None
    """Why there is no answer; None where there is one."""
    threshold: float | None = field(default=None, kw_only=True)
    """The probability below which the likeliest class counts as unknown; None: it never does."""

    def with_threshold(self, threshold: float | None) -> Self:
        """The same with another threshold, or None.

        Raises:
            RouterError: it is not from 0 to 1.
        """
        check_threshold(threshold)
        return replace(self, threshold=threshold)

    @property
    def probs(self) -> Tensor:
        """float32 [classes]: softmax of the logits."""
        return self.logits.softmax(-1)

    @property
    def known(self) -> bool | None:
        """Whether the likeliest class counts; None for a task without head, and where there is an error."""
        if not self.classes or self.error is not None:
            return None
        return self.threshold is None or float(self.probs.max()) >= self.threshold

    @property
    def label(self) -> str | None:
        """The likeliest class's name; None for a task without head, where there is an error, and if it is unknown."""
        return self.classes[int(self.logits.argmax())] if self.known else None

    def topk(self, k: int) -> list[tuple[str, float]]:
        """The k likeliest classes with their probabilities, best first, also of an unknown; none where `known` is None.

        Raises:
            RouterError: k is below 1.
        """
        if k < 1:
            raise RouterError(f"k {k}: expected at least 1")
        values, indices = self.probs.topk(min(k, len(self.classes)) if self.error is None else 0)
        return [(self.classes[i], p) for i, p in zip(indices.tolist(), values.tolist(), strict=True)]


@dataclass(frozen=True, eq=False)
class Predictions(Sequence[Prediction]):
    """What tasks say of a batch of images, in the images' order. A sequence of `Prediction`.

    `logits` is a float32 tensor [batch, classes] where all rows have equally many classes, else a list of [classes];
    for a task without head, they are its features. `classes` are each row's class names.

    A row whose numbers are not finite, because they overflowed or the image held NaN, has no label: `errors` says so,
    and no other row is touched by it. Nor has one that failed, where `run` was asked to return errors. A row whose
    likeliest class has a probability below the row's threshold is unknown: `known` is False, and it has no label.
    """

    logits: Tensor | list[Tensor]
    tasks: list[str]
    classes: list[tuple[str, ...]]
    versions: list[int | None]
    """Each row's version of its task in the store; None if the task was added to the router, or not found."""
    failures: Mapping[int, Exception] = field(default_factory=lambda: MappingProxyType({}))
    """Row -> the RouterError or PearStoreError for which it was not run."""
    thresholds: Sequence[float | None] = ()
    """Each row's; empty if no row has one."""

    def __len__(self) -> int:
        return len(self.tasks)

    @overload
    def __getitem__(self, index: int) -> Prediction: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prediction]: ...
    def __getitem__(self, index: int | slice) -> Prediction | list[Prediction]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        return Prediction(
            self.tasks[row], self.versions[row], self.logits[row], self.classes[row], self.errors[row],
            threshold=self.thresholds[row] if self.thresholds else None,
        )  # fmt: skip

    def __iter__(self) -> Iterator[Prediction]:
        return (self[row] for row in range(len(self)))

    @property
    def probs(self) -> Tensor | list[Tensor]:
        """Softmax of the logits, in the same form."""
        if isinstance(self.logits, Tensor):
            return self.logits.softmax(-1)
        return [row.softmax(-1) for row in self.logits]

    @cached_property
    def finite(self) -> list[bool]:
        """Whether all logits of a row are numbers, neither NaN nor infinite."""
        if isinstance(self.logits, Tensor):
            flags: list[bool] = self.logits.isfinite().all(-1).tolist()
            return flags
        return [bool(row.isfinite().all()) for row in self.logits]

    @cached_property
    def errors(self) -> list[str | None]:
        """Why a row has no answer; None where it has one."""
        reason = "gives NaN or infinity for this image: use dtype float32, or mend the image"
        said: list[str | None] = [
            None if finite else f"task {task!r} {reason}" for task, finite in zip(self.tasks, self.finite, strict=True)
        ]
        for row, error in self.failures.items():
            said[row] = str(error)
        return said

    @property
    def known(self) -> list[bool | None]:
        """Whether each row's likeliest class counts; None for a task without head, and where `errors` has something."""
        return [one.known for one in self]

    @property
    def labels(self) -> list[str | None]:
        """The likeliest class's name of each image; None where `known` is not True."""
        return [one.label for one in self]

    def topk(self, k: int) -> list[list[tuple[str, float]]]:
        """The k likeliest classes of each image with their probabilities, best first; none where `known` is None.

        Raises:
            RouterError: k is below 1.
        """
        return [one.topk(k) for one in self]


class Answers:
    """The logits of rows as forwards give them, on the CPU.

    Args:
        widths: int64 [row], how many logits each row has. A row that no forward answers has NaN.
    """

    def __init__(self, widths: Ints) -> None:
        self._widths = widths
        self._starts = np.cumsum(widths) - widths
        self._flat = torch.full((int(widths.sum()),), torch.nan)
        self._same = int(widths[0]) if len(widths) and (widths == widths[0]).all() else 0

    def put(self, rows: Ints, logits: Tensor) -> None:
        """Keeps the logits [row, classes] of some rows, all of that width."""
        if self._same:
            self._flat.view(-1, self._same)[torch.from_numpy(rows)] = logits
        else:
            places = self._starts[rows][:, None] + np.arange(logits.shape[1])
            self._flat[torch.from_numpy(places)] = logits

    def of(self, rows: slice) -> Tensor | list[Tensor]:
        """The logits of a run of rows: [row, classes] where they are equally wide, else a list of [classes]."""
        widths = self._widths[rows]
        if not len(widths):
            return []
        start = int(self._starts[rows][0])
        part = self._flat[start : start + int(widths.sum())]
        if (widths == widths[0]).all():
            return part.view(len(widths), -1)
        return list(torch.split(part, widths.tolist()))
