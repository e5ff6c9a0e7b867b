"""An evaluation as one HTML file. Style and pictures are in the file; it has no script and loads nothing."""

import base64
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from io import BytesIO
from pathlib import Path

from PIL import Image

from pear_store.counted import counted
from pear_train.evaluation import charts
from pear_train.evaluation.compare import Comparison
from pear_train.evaluation.evaluated import Evaluated, Evaluation
from pear_train.html.page import check_page, make_page, write_page
from router import ImageError, Limits, open_image

_SIDE = 300
"""Most pixels of a thumbnail's side."""
_SMALL = 96
"""Smaller pictures are enlarged with sharp pixels."""
_UNFOLDED = 12
"""Pictures of a gallery that show before it is unfolded."""


@dataclass(frozen=True)
class Thumbnail:
    url: str
    width: int
    height: int
    small: bool


def check_report(path: Path) -> None:
    """Raises a ConfigError if no report of an evaluation can be written."""
    check_page(path, "pear-eval")


def write_report(evaluation: Evaluation, path: Path, most: int, limits: Limits) -> None:
    """Writes the report, as a whole or not at all.

    Args:
        most: most pictures in a gallery.
        limits: limits for opening pictures.
    Raises:
        ConfigError: as :func:`check_report`.
        ResourceError: the file cannot be written.
    """
    check_report(path)
    write_page(path, make_report(evaluation, most, limits))


def make_report(evaluation: Evaluation, most: int, limits: Limits) -> str:
    """The report's text."""
    made: dict[int, Thumbnail | None] = {}
    backbones = dict.fromkeys(task.subject.task.backbone_model for task in evaluation.tasks)
    return make_page(
        "evaluation.html",
        title=_title([task.subject.shown for task in evaluation.tasks]),
        evaluation=evaluation,
        most=most,
        folded=_UNFOLDED,
        heat_map=charts.heat_map,
        reliability_chart=charts.reliability_chart,
        coverage_chart=charts.coverage_chart,
        thumbnail=partial(_once, made, partial(_thumbnail, evaluation, limits)),
        wrong=_wrong,
        changed=changed,
        backbones=list(backbones),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def changed(comparison: Comparison) -> str:
    """A comparison in a few sentences."""
    better, worse, points = len(comparison.better), len(comparison.worse), 100 * comparison.top1_change
    told = f"{counted(better, 'image')} better, {worse:,} worse: top-1 {points:+.2f} points."
    if not better + worse:
        return told
    p_value = "below 0.001" if comparison.p_value < 0.001 else f"{comparison.p_value:.3f}"
    verdict = "this is hardly chance" if comparison.p_value < 0.05 else "this could be chance"
    return f"{told} McNemar's exact test gives p {'' if p_value.startswith('b') else '= '}{p_value}: {verdict}."


def _title(names: list[str]) -> str:
    return names[0] if len(names) == 1 else " and ".join(names) if len(names) == 2 else f"{len(names)} tasks"


def _wrong(task: Evaluated) -> int:
    return int((~task.right).sum())


def _once(made: dict[int, Thumbnail | None], make: Callable[[int], Thumbnail | None], place: int) -> Thumbnail | None:
    if place not in made:
        made[place] = make(place)
    return made[place]


def _thumbnail(evaluation: Evaluation, limits: Limits, place: int) -> Thumbnail | None:
    """A small copy of an image. None if it can no longer be read."""
    row = int(evaluation.answers.rows[place])
    try:
        image = open_image(evaluation.sample.images.image(row), limits=limits)
    except ImageError:
        return None
    except Exception:  # whatever a reader of timm, torchvision or datasets can raise
        return None
    bare = Image.new("RGB", image.size)  # without the file's metadata, such as where it was taken
    bare.paste(image)
    bare.thumbnail((_SIDE, _SIDE))
    small, file = max(bare.size) <= _SMALL, BytesIO()
    if small:
        bare.save(file, "PNG")
    else:
        bare.save(file, "JPEG", quality=84)
    url = f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"
    return Thumbnail(url, *bare.size, small)
