"""Runs any number of tasks on one frozen backbone. A batch may mix tasks."""

from pear_store.version import __version__ as __version__
from router.adapted import AdaptedBackbone
from router.backbone import Backbone, load_backbone
from router.batches import Batch, prepare
from router.errors import (
    BackboneError,
    ClosedError,
    ForkedError,
    ImageError,
    RouterError,
    SlotBudgetError,
    TaskError,
    TooManyPixelsError,
    UnknownTaskError,
    WrongBackboneError,
)
from router.jpegs import JpegDecoder
from router.ops import PositionWeights, add_branch
from router.pictures import Limits, open_image
from router.positions import choose_positions
from router.predictions import Prediction, Predictions
from router.preprocess import Preprocess, decode
from router.router import Router
from router.slots import SlotStats

__all__ = [
    "AdaptedBackbone",
    "Backbone",
    "BackboneError",
    "Batch",
    "ClosedError",
    "ForkedError",
    "ImageError",
    "JpegDecoder",
    "Limits",
    "PositionWeights",
    "Prediction",
    "Predictions",
    "Preprocess",
    "Router",
    "RouterError",
    "SlotBudgetError",
    "SlotStats",
    "TaskError",
    "TooManyPixelsError",
    "UnknownTaskError",
    "WrongBackboneError",
    "add_branch",
    "choose_positions",
    "decode",
    "load_backbone",
    "open_image",
    "prepare",
]
