"""Small timm models with random weights, and random tasks for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from pear_store import Task, make_task
from router import AdaptedBackbone, Backbone
from tests.helpers.makers import floats, record
from tools.backbones import random_module

__all__ = ["random_module", "random_task", "saved"]


def saved(module: nn.Module, file: Path) -> Path:
    save_file({key: value.contiguous() for key, value in module.state_dict().items()}, file)
    return file


def random_task(
    backbone: Backbone,
    positions: Sequence[str],
    name: str = "t",
    seed: int = 0,
    activation: str = "identity",
    classes: int = 5,
    size: tuple[int, int] | None = None,
    scale: float = 0.5,
) -> Task:
    """A task with one adapter at each position, and rank and scale that differ by position."""
    adapted = AdaptedBackbone(backbone, torch.device("cpu"), torch.float32)
    adapted.attach(positions)
    random = np.random.default_rng(seed)
    tensors, adapters, branches = {}, {}, {}
    for i, position in enumerate(positions):
        d_in, d_out = adapted.widths[position]
        rank = 2 + (i + seed) % 3
        tensors[f"a{i}.down"] = floats(random.normal(size=(d_in, rank)) / d_in**0.5)
        tensors[f"a{i}.up"] = floats(random.normal(size=(rank, d_out)) / rank**0.5)
        adapters[f"a{i}"] = {"down": f"a{i}.down", "up": f"a{i}.up"}
        branches[position] = [[f"a{i}", scale * (1 + 0.5 * (i % 2))]]
    width = adapted.feature_width
    tensors["head.weight"] = floats(random.normal(size=(classes, width)) / width**0.5)
    tensors["head.bias"] = floats(random.normal(size=classes))
    made: dict[str, Any] = record(
        name,
        backbone={"model": backbone.name, "digest": backbone.digest},
        activation=activation,
        adapters=adapters,
        positions=branches,
        labels=[f"{name}-{i}" for i in range(classes)],
    )
    made["preprocess"] = {**made["preprocess"], "input_size": [3, *(size or backbone.input_size)]}
    return make_task(made, tensors)
