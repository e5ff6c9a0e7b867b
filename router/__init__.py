"""One frozen backbone, any number of tasks, any mix of them in a batch."""

from router.backbone import AdaptedBackbone, Backbone, choose_positions, load_backbone
from router.errors import (
    BackboneError,
    ClosedError,
    ForkedError,
    ImageError,
    RouterError,
    SlotBudgetError,
    TaskError,
    UnknownTaskError,
    WrongBackboneError,
)
from router.ops import PositionWeights, add_branch
from router.pictures import Limits, open_image
from router.preprocess import Prepared, Preprocess, decode, prepare
from router.router import Predictions, Router
from router.slots import SlotStats

__all__ = [
    "AdaptedBackbone",
    "Backbone",
    "BackboneError",
    "ClosedError",
    "ForkedError",
    "ImageError",
    "Limits",
    "PositionWeights",
    "Predictions",
    "Prepared",
    "Preprocess",
    "Router",
    "RouterError",
    "SlotBudgetError",
    "SlotStats",
    "TaskError",
    "UnknownTaskError",
    "WrongBackboneError",
    "add_branch",
    "choose_positions",
    "decode",
    "load_backbone",
    "open_image",
    "prepare",
]
