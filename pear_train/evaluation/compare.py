"""Compares two tasks: which images changed, and whether that could be chance."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pear_train.evaluation.answers import Ints


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two tasks on the same images. `Ints` are places among the answered images."""

    before: str
    after: str
    better: Ints
    """Wrong before, right after."""
    worse: Ints
    """Right before, wrong after."""
    other: Ints
    """Wrong both times, with different answers."""
    images: int
    both_right: int
    both_wrong: int
    p_value: float
    """McNemar's exact test: the chance of a change at least as uneven if both tasks were equally good."""

    @property
    def top1_change(self) -> float:
        """Top-1 after minus top-1 before, -1 to 1."""
        return (len(self.better) - len(self.worse)) / self.images


def compare(
    before: str, after: str, was_right: NDArray[np.bool_], is_right: NDArray[np.bool_], differs: NDArray[np.bool_]
) -> Comparison:
    """Compares two tasks.

    Args:
        was_right, is_right: bool [image], whether the first and the second task is right.
        differs: bool [image], whether their answers differ.
    Source: McNemar's exact test, McNemar 1947.
    """
    from scipy.stats import binomtest

    better, worse = np.flatnonzero(~was_right & is_right), np.flatnonzero(was_right & ~is_right)
    changed = len(better) + len(worse)
    p_value = float(binomtest(len(better), changed, 0.5).pvalue) if changed else 1.0
    return Comparison(
        before, after, better, worse, np.flatnonzero(~was_right & ~is_right & differs), len(was_right),
        int((was_right & is_right).sum()), int((~was_right & ~is_right).sum()), p_value,
    )  # fmt: skip
