"""Draws the training curve that a task's record has. Needs matplotlib."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MOST_EPOCHS = 10_000


def curve_of(training: Mapping[str, Any]) -> dict[str, list[float]]:
    """The accuracy of each epoch in percent, by split. Empty if the record has none, or values that are no numbers."""
    history = training.get("history")
    if not isinstance(history, list) or not 1 < len(history) <= _MOST_EPOCHS:
        return {}
    found = {}
    for split in ("train", "val"):
        values = [epoch.get(f"{split}_top1") if isinstance(epoch, dict) else None for epoch in history]
        if all(isinstance(value, int | float) and 0 <= value <= 1 for value in values):
            found[split] = [100 * float(value) for value in values if value is not None]
    return found


def draw_curve(curve: Mapping[str, list[float]], path: Path) -> None:
    from matplotlib.figure import Figure  # not pyplot: a caller's own figures and backend stay as they are
    from matplotlib.ticker import MaxNLocator

    figure = Figure((6, 3), layout="constrained")
    axes = figure.subplots()
    for split, values in curve.items():
        axes.plot(range(1, len(values) + 1), values, marker=".", label=f"{split} top-1, %")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8, ncols=len(curve), loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    figure.savefig(path, dpi=120)
