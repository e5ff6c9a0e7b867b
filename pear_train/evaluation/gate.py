"""A gate against regressions: demands on figures, and whether they are met."""

from collections.abc import Mapping
from dataclasses import dataclass

from pear_store.counted import counted
from pear_train.evaluation.figures import Figures


@dataclass(frozen=True)
class Check:
    """One demand, and whether it is met."""

    text: str
    passed: bool


@dataclass(frozen=True)
class Gate:
    """Demands on each task but the baseline."""

    min_top1: float | None = None
    """In percent."""
    baseline: str | None = None
    """A task, by its shown name. No other task may be worse than it."""
    by: float = 0.0
    """How many points of top-1 the others may be below the baseline."""
    max_errors: int | None = None
    """The most images that may be unreadable."""

    def checks(self, figures: Mapping[str, Figures], errors: int) -> list[Check]:
        """All demands, and whether they are met.

        Args:
            figures: of each task, by its shown name.
            errors: number of images that could not be evaluated.
        """
        found = []
        for shown, of_task in figures.items():
            if shown == self.baseline and len(figures) > 1:
                continue
            top1 = 100 * of_task.top1
            if self.min_top1 is not None:
                met = top1 >= self.min_top1 - _HAIR
                found.append(Check(f"{shown}: top-1 {top1:.2f} %, expected at least {self.min_top1:g} %", met))
            if self.baseline is not None:
                other = 100 * figures[self.baseline].top1
                met = top1 >= other - self.by - _HAIR
                allowed = f"at most {self.by:g} points below" if self.by else "not below"
                told = f"top-1 {top1:.2f} %, expected {allowed} {self.baseline}, which has {other:.2f} %"
                found.append(Check(f"{shown}: {told}", met))
        if self.max_errors is not None:
            met = errors <= self.max_errors
            found.append(
                Check(f"{counted(errors, 'image')} could not be evaluated, expected at most {self.max_errors}", met)
            )
        return found


_HAIR = 1e-9
"""Tolerance for rounding of floats."""
