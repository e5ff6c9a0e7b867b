"""A picture of a store: which task uses which adapter where, and what sharing saves."""

import colorsys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pear_store.errors import PearStoreError
from pear_store.files import ending
from pear_store.format.checkpoint import Task, natural_key
from pear_store.readable import ReadableStore

FORMATS = (".png", ".svg")
_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1))
_STRIPES = 4
"""Of more branches at one position, only some are drawn"""
_LABELS = 60
"""More rows or columns than this are drawn without their names"""


def plot(store: ReadableStore, path: str | Path, references: Iterable[str] = ()) -> None:
    """Draws tasks x positions to a .png or .svg file.

    A cell has a stripe for each branch, in its adapter's colour. One colour is one pair of tensors, in whatever task
    and position; a branch's own core has no say. Grey ones are used once. Bars show each task's bytes: those that no
    task above it has, those that it shares with these, and what else it would take with an adapter for each branch.

    Raises:
        NotFoundError: no such task.
        PearStoreError: another ending, or the file cannot be written.
    """
    path = Path(path)
    if ending(path) not in FORMATS:
        raise PearStoreError(f"{path}: expected a file that ends in {' or '.join(FORMATS)}")
    import numpy as np
    from matplotlib.figure import Figure  # not pyplot: a caller's own figures and backend stay as they are

    names = list(references) or [version.task for version in store.tasks()]
    if not names:
        raise PearStoreError(f"{store.where}: no task to draw")
    cells: list[dict[str, list[str]]] = []
    new: list[int] = []
    above: list[int] = []
    within: list[int] = []
    seen: set[str] = set()
    for name in names:
        task = store.get(name, copy=False)
        cells.append({p: [_identity(task, b.adapter) for b in branches] for p, branches in task.positions.items()})
        sizes = {tensor.digest: tensor.size_bytes for tensor in task.tensors.values()}
        new.append(sum(size for digest, size in sizes.items() if digest not in seen))
        above.append(sum(sizes.values()) - new[-1])
        within.append(_shared_within(task))
        seen |= sizes.keys()
    columns = sorted({position for row in cells for position in row}, key=natural_key)
    uses = Counter(adapter for row in cells for branches in row.values() for adapter in branches)
    colours = _colours([adapter for adapter in uses if uses[adapter] > 1])
    stripes = min(_STRIPES, max((len(branches) for row in cells for branches in row.values()), default=1))
    picture = np.ones((len(names), max(1, len(columns)) * stripes, 3))
    for y, row in enumerate(cells):
        for x, position in enumerate(columns):
            for stripe in range(stripes if position in row else 0):
                adapter = row[position][stripe * len(row[position]) // stripes]
                picture[y, x * stripes + stripe] = colours.get(adapter, (0.78, 0.78, 0.78))
    below = 0.06 * max(map(len, map(_shown, columns)), default=0) if len(columns) <= _LABELS else 0  # inches of names
    size = (max(8, min(24, 0.25 * len(columns) + 4)), max(1.2, min(30, 0.25 * len(names))) + 1 + below)
    figure = Figure(size, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
    extent = (-0.5, max(1, len(columns)) - 0.5, len(names) - 0.5, -0.5)
    left.imshow(picture, aspect="auto", interpolation="nearest", extent=extent)
    left.set_title(
        "colour: an adapter used more than once; grey: once; stripes: several branches", fontsize=9, loc="left"
    )
    if max(len(columns), len(names)) <= _LABELS:  # lines between the cells
        left.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
        left.set_yticks(np.arange(len(names) + 1) - 0.5, minor=True)
        left.grid(which="minor", color="white", linewidth=2)
        left.tick_params(which="minor", length=0)
    plain: dict[str, Any] = {"fontsize": 7, "parse_math": False}
    if len(columns) <= _LABELS:
        left.set_xticks(range(len(columns)), map(_shown, columns), rotation=90, **plain)
    left.set_yticks(*((range(len(names)), map(_shown, names)) if len(names) <= _LABELS else ([], [])), **plain)
    start = np.zeros(len(names))
    unit, factor = next((u, f) for u, f in _UNITS if max(np.add(np.add(new, above), within)) >= f or f == 1)
    for label, colour, sizes_bytes in (
        ("new", "#4472a8", new),
        ("shared with tasks above", "#9db8d6", above),
        ("saved by sharing within the task", "#dfe5ec", within),
    ):
        right.barh(
            np.arange(len(names)), np.divide(sizes_bytes, factor), left=start, height=0.8, color=colour, label=label
        )
        start = start + np.divide(sizes_bytes, factor)
    saved = sum(above) + sum(within)
    right.set_title(f"{saved / max(1, sum(new) + saved):.0%} saved by sharing", fontsize=9, loc="left")
    right.set_xlabel(f"tensors, {unit}", fontsize=8)
    right.tick_params(labelsize=7)
    figure.legend(loc="outside lower right", ncols=3, fontsize=7, frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise PearStoreError(f"{path}: cannot be written: {error.strerror}") from None


def _identity(task: Task, adapter: str) -> str:
    """What adapters have in common that differ in their cores alone."""
    parts = task.adapters[adapter]
    return f"{parts.down.name} {parts.up.name} {parts.down.place}"


def _shared_within(task: Task) -> int:
    """Bytes that a task would take besides if each branch had `down` and the part that reaches d_out for itself."""
    adapters = task.adapters
    alone = sum(
        part.tensor(task.tensors).size_bytes
        for branches in task.positions.values()
        for branch in branches
        for part in (adapters[branch.adapter].down, adapters[branch.adapter].up)
    )
    used = {
        (matrix.name, matrix.place): matrix.tensor(task.tensors).size_bytes
        for adapter in adapters.values()
        for matrix in adapter.matrices
    }
    return max(0, alone - sum(used.values()))


def _shown(name: str) -> str:
    """A name in one line of at most 40 characters."""
    text = "".join(c if c.isprintable() else "?" for c in name)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _colours(adapters: list[str]) -> dict[str, tuple[float, float, float]]:
    """Hues a golden ratio apart, so that neighbours differ."""
    return {adapter: colorsys.hsv_to_rgb(0.618034 * i % 1, 0.65, 0.85) for i, adapter in enumerate(adapters)}
