"""Coordinates of the report's drawings. The template draws them and escapes every text."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image

from pear_store.counted import counted
from pear_train.evaluation.figures import BINS, Figures
from pear_train.html.drawing import Bar, Chart, Kind, Tick, percent, x_of, y_of

MOST_DRAWN = 60
"""A confusion matrix of more classes is a picture without names."""
MOST_COUNTED = 25
"""With more classes, cells are too small for their counts."""
NAME_LENGTH = 18


def reliability_chart(figures: Figures) -> Chart:
    """A bar of accuracy for each bin of confidence. It is faint if the bin has few images."""
    bars = []
    few = max(5, 0.01 * figures.images)
    for one in figures.reliability:
        number = min(BINS - 1, max(0, int(np.ceil(one.confidence * BINS - 1e-9)) - 1))
        left, right = x_of(number / BINS) + 1, x_of((number + 1) / BINS) - 1
        title = (
            f"{counted(one.images, 'image')}: {100 * one.confidence:.1f} % confident, {100 * one.accuracy:.1f} % right"
        )
        width = round(right - left, 1)
        high, low = max(one.accuracy, one.confidence), min(one.accuracy, one.confidence)
        kind: Kind = "over" if one.confidence > one.accuracy else "under"
        parts: tuple[tuple[float, float, Kind], ...] = ((low, 0.0, "bin"), (high, low, kind))
        for top, bottom, of in parts:
            y, height = y_of(top), round(y_of(bottom) - y_of(top), 1)
            bars.append(Bar(round(left, 1), y, width, height, title, of, one.images < few))
    shares = (0, 0.25, 0.5, 0.75, 1)
    return Chart(bars, "", "", [Tick(x_of(s), percent(s)) for s in shares], [Tick(y_of(s), percent(s)) for s in shares])


def coverage_chart(figures: Figures) -> Chart:
    """Accuracy of the most confident answers, over their share of all answers."""
    points = [(point.coverage, float(point.accuracy or 0)) for point in figures.most_confident]
    lowest = min(accuracy for _, accuracy in points)
    bottom = 0.0 if lowest < 0.5 else 0.5 if lowest < 0.8 else 0.8 if lowest < 0.95 else 0.9
    shares = [bottom + i * (1 - bottom) / 4 for i in range(5)]

    def y(accuracy: float) -> float:
        return y_of((accuracy - bottom) / (1 - bottom))

    curve = [(x_of(coverage), y(accuracy)) for coverage, accuracy in points]
    line = " ".join(f"{x},{y}" for x, y in curve)
    area = f"{curve[0][0]},{y_of(0)} {line} {curve[-1][0]},{y_of(0)}"
    digits = 1 if any(abs(100 * s - round(100 * s)) > 1e-6 for s in shares) else 0
    return Chart(
        [], line, area, [Tick(x_of(s), percent(s)) for s in (0, 0.25, 0.5, 0.75, 1)],
        [Tick(y(s), f"{100 * s:.{digits}f}") for s in shares],
    )  # fmt: skip


@dataclass(frozen=True)
class Cell:
    x: float
    y: float
    count: int
    right: bool
    strength: float
    """The share of the class's images in this cell, 0..1."""
    title: str


@dataclass(frozen=True)
class HeatMap:
    """A confusion matrix: a row for each true class, a column for each answered class."""

    side: int
    """Pixels of a cell."""
    margin: float
    """Pixels for the names."""
    width: float
    height: float
    names: list[tuple[float, str, str]]
    """Centre of the row or column, the name as drawn, and the whole name."""
    least_width: float
    """The least width in pixels to which it may shrink."""
    cells: list[Cell]
    counted: bool
    picture: str | None
    """A PNG as a data URL, which replaces the cells if there are very many."""


def heat_map(labels: Sequence[str], confusion: Sequence[Sequence[int]]) -> HeatMap:
    matrix = np.array(confusion, np.int64).reshape(len(labels), len(labels))
    sums = matrix.sum(1, keepdims=True)
    shares = matrix / np.maximum(sums, 1)
    count = len(labels)
    if count > MOST_DRAWN:
        side = 2 if count > 300 else 5
        return HeatMap(side, 0, count * side, count * side, [], count * side, [], False, _picture(shares))
    side = 44 if count <= 8 else 38 if count <= 12 else 26 if count <= MOST_COUNTED else 15
    drawn = [name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1]}…" for name in labels]
    margin = 12 + 7.0 * max(map(len, drawn))
    names = [(margin + (i + 0.5) * side, drawn[i], labels[i]) for i in range(count)]
    cells = [
        Cell(
            margin + j * side, margin + i * side, int(matrix[i, j]), bool(i == j), round(float(shares[i, j]), 3),
            f"{matrix[i, j]} of {counted(int(sums[i, 0]), 'image')} of {labels[i]} taken for {labels[j]}",
        )
        for i, j in zip(*np.nonzero(matrix), strict=True)
    ]  # fmt: skip
    size = margin + count * side + 8
    return HeatMap(side, margin, size, size, names, margin + count * min(side, 26), cells, count <= MOST_COUNTED, None)


def _picture(shares: np.ndarray) -> str:
    """Cells as pixels: green on the diagonal, red elsewhere. Rarer ones are more transparent."""
    count = len(shares)
    pixels = np.zeros((count, count, 4), np.uint8)
    pixels[..., :3] = (205, 74, 60)
    pixels[np.arange(count), np.arange(count), :3] = (100, 150, 40)
    pixels[..., 3] = np.where(shares > 0, 50 + 205 * np.sqrt(shares), 0).astype(np.uint8)
    file = BytesIO()
    Image.fromarray(pixels, "RGBA").save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
