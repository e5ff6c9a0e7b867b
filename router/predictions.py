"""The answers of tasks for images."""

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
"""The probability that the likeliest class must reach, else the answer is unknown: a number from 0 to 1, None for no
threshold, or "stored" for each task's own."""


def check_threshold(threshold: object) -> None:
    """Raises a RouterError unless it is a Threshold."""
    if threshold is None or threshold == "stored":
        return
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise RouterError(f"threshold {threshold!r:.80}: expected a number from 0 to 1, None for none, or 'stored'")


def read_threshold(text: str) -> float | None:
    """Parses a user's text: ``none``, or a number from 0 to 1.

    Raises:
        RouterError: the text is something else.
    """
    try:
        threshold = None if text == "none" else float(text)
        check_threshold(threshold)
    except (ValueError, RouterError):
        raise RouterError(f"threshold {text!r:.80}: expected a number from 0 to 1, or none") from None
    return threshold


@dataclass(frozen=True, eq=False)
class Prediction:
    """A task's answer for one image.

    The answer is unknown if the likeliest class has a probability below `threshold`. Then `known` is False and `label`
    is None. `topk` still gives the likeliest classes.
    """

    task: str
    """The reference that was asked for, such as ``dtd`` or ``dtd@prod``."""
    version: int | None
    """The task's version in the store. None if the task was added to the router, or not found."""
    logits: Tensor
    """float32 [classes]; for a task without head its features, float32 [d]. NaN if the row failed."""
    classes: tuple[str, ...]
    """The names of the classes. Empty for a task without head."""
    error: str | None
    """Why there is no answer. None if there is one."""
    threshold: float | None = field(default=None, kw_only=True)
    """The probability, 0 to 1, below which the likeliest class counts as unknown. None: never."""

    def with_threshold(self, threshold: float | None) -> Self:
        """The same answer with another threshold.

        Args:
            threshold: from 0 to 1; None: no threshold.
        Raises:
            RouterError: it is not from 0 to 1.
        """
        check_threshold(threshold)
        return replace(self, threshold=threshold)

    @property
    def probs(self) -> Tensor:
        """Softmax of the logits, float32 [classes]."""
        return self.logits.softmax(-1)

    @property
    def known(self) -> bool | None:
        """Whether the likeliest class reaches the threshold. None for a task without head, and after an error."""
        if not self.classes or self.error is not None:
            return None
        return self.threshold is None or float(self.probs.max()) >= self.threshold

    @property
    def label(self) -> str | None:
        """The likeliest class's name. None if `known` is not True."""
        return self.classes[int(self.logits.argmax())] if self.known else None

    def topk(self, k: int) -> list[tuple[str, float]]:
        """The k likeliest classes with their probabilities, best first. Unknown answers have them, too.

        Returns:
            At most k pairs (class, probability). Empty if `known` is None.
        Raises:
            RouterError: k is below 1.
        """
        if k < 1:
            raise RouterError(f"k {k}: expected at least 1")
        values, indices = self.probs.topk(min(k, len(self.classes)) if self.error is None else 0)
        return [(self.classes[i], p) for i, p in zip(indices.tolist(), values.tolist(), strict=True)]


@dataclass(frozen=True, eq=False)
class Predictions(Sequence[Prediction]):
    """The answers for a batch of images, in the images' order. A sequence of `Prediction`.

    A row has an entry in `errors`, and no label, if it failed or if its logits are not finite. Logits are not finite if
    numbers overflowed or the image held NaN. One row's error affects no other row. A row is unknown, and has no label,
    if its likeliest class has a probability below the row's threshold.
    """

    logits: Tensor | list[Tensor]
    """float32 [batch, classes] if all rows have equally many classes, else a list of [classes]. For a task without
    head, its features."""
    tasks: list[str]
    """Each row's task, as it was asked for."""
    classes: list[tuple[str, ...]]
    """Each row's class names."""
    versions: list[int | None]
    """Each row's version of its task in the store. None if the task was added to the router, or not found."""
    failures: Mapping[int, Exception] = field(default_factory=lambda: MappingProxyType({}))
    """Row -> the RouterError or PearStoreError that stopped it."""
    thresholds: Sequence[float | None] = ()
    """Each row's threshold. Empty if no row has one."""

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
        """Softmax of the logits, in the same form as `logits`."""
        if isinstance(self.logits, Tensor):
            return self.logits.softmax(-1)
        return [row.softmax(-1) for row in self.logits]

    @cached_property
    def finite(self) -> list[bool]:
        """Whether all logits of each row are finite."""
        if isinstance(self.logits, Tensor):
            flags: list[bool] = self.logits.isfinite().all(-1).tolist()
            return flags
        return [bool(row.isfinite().all()) for row in self.logits]

    @cached_property
    def errors(self) -> list[str | None]:
        """Why each row has no answer. None if it has one."""
        reason = "gives NaN or infinity for this image: use dtype float32, or repair the image"
        said: list[str | None] = [
            None if finite else f"task {task!r} {reason}" for task, finite in zip(self.tasks, self.finite, strict=True)
        ]
        for row, error in self.failures.items():
            said[row] = str(error)
        return said

    @property
    def known(self) -> list[bool | None]:
        """Whether each row's likeliest class reaches its threshold. None without a head, and after an error."""
        return [one.known for one in self]

    @property
    def labels(self) -> list[str | None]:
        """The name of each image's likeliest class. None if `known` is not True."""
        return [one.label for one in self]

    def topk(self, k: int) -> list[list[tuple[str, float]]]:
        """The k likeliest classes of each image with their probabilities, best first. Empty where `known` is None.

        Raises:
            RouterError: k is below 1.
        """
        return [one.topk(k) for one in self]


class Answers:
    """Collects the logits of rows on the CPU. Rows that get none stay NaN.

    Args:
        widths: number of logits of each row, int64 [row].
    """

    def __init__(self, widths: Ints) -> None:
        self._widths = widths
        self._starts = np.cumsum(widths) - widths
        self._flat = torch.full((int(widths.sum()),), torch.nan)
        self._same = int(widths[0]) if len(widths) and (widths == widths[0]).all() else 0

    def put(self, rows: Ints, logits: Tensor) -> None:
        """Stores the logits [row, classes] of rows that all have this width."""
        if self._same:
            self._flat.view(-1, self._same)[torch.from_numpy(rows)] = logits
        else:
            places = self._starts[rows][:, None] + np.arange(logits.shape[1])
            self._flat[torch.from_numpy(places)] = logits

    def of(self, rows: slice) -> Tensor | list[Tensor]:
        """The logits of a run of rows: [row, classes] if all have one width, else a list of [classes]."""
        widths = self._widths[rows]
        if not len(widths):
            return []
        start = int(self._starts[rows][0])
        part = self._flat[start : start + int(widths.sum())]
        if (widths == widths[0]).all():
            return part.view(len(widths), -1)
        return list(torch.split(part, widths.tolist()))
