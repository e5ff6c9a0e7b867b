"""How images of a task become the backbone's input."""

from typing import Any

from router import Backbone
from router.pictures import READING


def preprocess_record(backbone: Backbone, img_size: int | None) -> dict[str, Any]:
    """The `preprocess` of a task checkpoint: the whole image is resized to the input size, as in VTAB-1k.

    Mean and std are the backbone's.

    Args:
        img_size: height and width in pixels; None: the backbone's own.
    """
    config = backbone.config
    height, width = (img_size, img_size) if img_size else backbone.input_size
    return {
        "input_size": [3, height, width],
        "mean": list(config.get("mean", (0.485, 0.456, 0.406))),
        "std": list(config.get("std", (0.229, 0.224, 0.225))),
        "interpolation": config.get("interpolation", "bicubic"),
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "reading": READING,
    }
