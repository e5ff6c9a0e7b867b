"""Coordinates of a report's drawings. The template draws them and escapes every text."""

from dataclasses import dataclass, field
from typing import Literal

WIDTH, HEIGHT = 460, 320
LEFT, TOP, RIGHT, BOTTOM = 46, 30, 14, 40
Kind = Literal["bin", "over", "under"]
"""Kind of a bar: right answers; how much too confident answers were; how much too little confident."""
LineKind = Literal["curve", "second"]


@dataclass(frozen=True)
class Tick:
    place: float
    text: str


@dataclass(frozen=True)
class Bar:
    x: float
    y: float
    width: float
    height: float
    title: str
    kind: Kind
    """Says its colour."""
    faint: bool = False


@dataclass(frozen=True)
class Line:
    points: str
    """In the form of SVG."""
    kind: LineKind
    name: str


@dataclass(frozen=True)
class Chart:
    """A drawing with axes from `LEFT`, `TOP` to the lower right corner."""

    bars: list[Bar]
    line: str
    """Points of the curve, in the form of SVG."""
    area: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line] = field(default_factory=list)
    marks: list[Tick] = field(default_factory=list)
    """Vertical lines, with their meaning."""


def x_of(share: float) -> float:
    return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)


def y_of(share: float) -> float:
    return round(TOP + (1 - share) * (HEIGHT - TOP - BOTTOM), 1)


def percent(share: float) -> str:
    return f"{100 * share:.0f}"
