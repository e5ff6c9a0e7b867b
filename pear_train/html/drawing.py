"""Where things lie in a report's drawings. The template draws them, so every text is escaped there."""

from dataclasses import dataclass, field
from typing import Literal

WIDTH, HEIGHT = 460, 320
LEFT, TOP, RIGHT, BOTTOM = 46, 30, 14, 40
Kind = Literal["bin", "over", "under"]
"""Of a bar: what was right; how much more, or less, confident the answers were"""
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
    """For its colour"""
    faint: bool = False


@dataclass(frozen=True)
class Line:
    points: str
    """As SVG has them."""
    kind: LineKind
    name: str


@dataclass(frozen=True)
class Chart:
    """A drawing with axes from `LEFT`, `TOP` to the lower right corner."""

    bars: list[Bar]
    line: str
    """Points of the curve, as SVG has them."""
    area: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line] = field(default_factory=list)
    marks: list[Tick] = field(default_factory=list)
    """Upright lines, with what they mean."""


def x_of(share: float) -> float:
    return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)


def y_of(share: float) -> float:
    return round(TOP + (1 - share) * (HEIGHT - TOP - BOTTOM), 1)


def percent(share: float) -> str:
    return f"{100 * share:.0f}"
