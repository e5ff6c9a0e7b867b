"""A picture of a store: which task uses which adapter where, and what sharing saves."""

import colorsys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from pear_store.checkpoint import Task, natural_key
from pear_store.errors import PearStoreError
from pear_store.store import Store

FORMATS = (".png", ".svg")
_LABELS = 60
"""More rows or columns than this are drawn without their names"""


def plot(store: Store, path: str | Path, references: Iterable[str] = ()) -> None:
    """Draws tasks x positions to a .png or .svg file.

    A cell has the colour of its adapter (of its first branch's): one colour is one pair of tensors, in whatever task
    and position; grey ones are used once. Bars show each task's tensor bytes: what no task above it has, and what it
    shares.

    Raises:
        NotFoundError: no such task.
        PearStoreError: another ending, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise PearStoreError(f"{path}: expected a file that ends in {' or '.join(FORMATS)}")
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    names = list(references) or [version.task for version in store.tasks()]
    if not names:
        raise PearStoreError(f"{store.path}: no task to draw")
    cells: list[dict[str, str]] = []
    new: list[int] = []
    shared: list[int] = []
    seen: set[str] = set()
    for name in names:
        task = store.get(name, copy=False)
        cells.append({position: _identity(task, branches[0].adapter) for position, branches in task.positions.items()})
        sizes = {tensor.digest: tensor.size_bytes for tensor in task.tensors.values()}
        new.append(sum(size for digest, size in sizes.items() if digest not in seen))
        shared.append(sum(sizes.values()) - new[-1])
        seen |= sizes.keys()
    columns = sorted({position for row in cells for position in row}, key=natural_key)
    uses = Counter(adapter for row in cells for adapter in row.values())
    colours = _colours([adapter for adapter in uses if uses[adapter] > 1])
    picture = np.ones((len(names), max(1, len(columns)), 3))
    for y, row in enumerate(cells):
        for x, position in enumerate(columns):
            if position in row:
                picture[y, x] = colours.get(row[position], (0.78, 0.78, 0.78))
    figure, (left, right) = plt.subplots(
        1, 2, sharey=True, width_ratios=[3, 1], layout="constrained",
        figsize=(max(7, min(24, 0.25 * len(columns) + 4)), max(2.5, min(30, 0.25 * len(names) + 1.8))),
    )  # fmt: skip
    left.imshow(picture, aspect="auto", interpolation="nearest")
    left.set_title("colour: an adapter used more than once; grey: once", fontsize=9, loc="left")
    if max(len(columns), len(names)) <= _LABELS:  # lines between the cells
        left.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
        left.set_yticks(np.arange(len(names) + 1) - 0.5, minor=True)
        left.grid(which="minor", color="white", linewidth=2)
        left.tick_params(which="minor", length=0)
    if len(columns) <= _LABELS:
        left.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
    left.set_yticks(*((range(len(names)), names) if len(names) <= _LABELS else ([], [])), fontsize=7)
    rows = np.arange(len(names))
    right.barh(rows, new, height=0.8, color="#4472a8", label="new")
    right.barh(rows, shared, left=new, height=0.8, color="#cfd9e6", label="shared with tasks above")
    saved = sum(shared) / max(1, sum(new) + sum(shared))
    right.set_title(f"tensor bytes: {saved:.0%} saved", fontsize=9, loc="left")
    right.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(-0.05, -0.06))
    right.tick_params(labelsize=7)
    right.ticklabel_format(axis="x", style="sci", scilimits=(0, 3))
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise PearStoreError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        plt.close(figure)


def _identity(task: Task, adapter: str) -> str:
    entry = task.record["adapters"][adapter]
    return f"{entry['down']} {entry['up']}"


def _colours(adapters: list[str]) -> dict[str, tuple[float, float, float]]:
    """Hues a golden ratio apart, so that neighbours differ."""
    return {adapter: colorsys.hsv_to_rgb(0.618034 * i % 1, 0.65, 0.85) for i, adapter in enumerate(adapters)}
