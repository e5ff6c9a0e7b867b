"""A task and its backbone as one plain module, and a check that its logits are the router's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pear_store import PearStoreError, Task
from pear_store.format.codes import matrix_values, to_numpy, up_values
from router.adapted import AdaptedBackbone
from router.backbone import Backbone, load_backbone
from router.errors import RouterError
from router.fit import check_fit
from router.merge import merged_weight, unmergeable
from router.ops import PositionWeights, add_branch
from router.router import Router

TOLERANCE = 1e-4
"""Largest allowed difference of a logit. If logits are above 1, it is relative to the largest one."""
BATCHES = (1, 3)
"""Batch sizes of the comparison."""


class PlainModel(nn.Module):
    """Gives logits of one task, or features if it has no head: float32 [batch, 3, h, w] -> [batch, classes].

    Branches are merged into matrices where possible. The others are added to the outputs of their positions.

    Args:
        task: a task with its tensors' bytes that fits the backbone.
    """

    def __init__(self, backbone: Backbone, task: Task) -> None:
        super().__init__()
        self.backbone = backbone.sized(image_size(task))
        apart = set(unmergeable(backbone.module, task))
        for position in task.positions:
            part = self.backbone.get_submodule(position)
            if position in apart:
                part.register_forward_hook(_adder(_branches(task, position)))
            else:
                merged = merged_weight(backbone.module, task, position)
                part.register_parameter("weight", nn.Parameter(merged, requires_grad=False))
        self.head: nn.Module = nn.Identity()
        if task.head is not None:
            weight = torch.tensor(matrix_values(task.head.weight, task.tensors)).float()
            self.head = nn.Linear(weight.shape[1], weight.shape[0])
            self.head.weight = nn.Parameter(weight, requires_grad=False)
            bias = torch.tensor(to_numpy(task.tensors[task.head.bias])).float()
            self.head.bias = nn.Parameter(bias, requires_grad=False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(images))
        return logits


def _branches(task: Task, position: str) -> PositionWeights:
    downs, ups = [], []
    for branch in task.positions[position]:
        adapter = task.adapters[branch.adapter]
        downs.append(matrix_values(adapter.down, task.tensors).astype(np.float32))
        ups.append(up_values(adapter, task.tensors).astype(np.float32) * np.float32(branch.scale))
    down, up = torch.from_numpy(np.concatenate(downs, 1)), torch.from_numpy(np.concatenate(ups, 0))
    return PositionWeights(down, up, task.activation)


def _adder(weights: PositionWeights) -> Callable[..., Tensor]:
    def add(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return add_branch(output, args[0], weights)

    return add


def image_size(task: Task) -> tuple[int, int]:
    """Height and width of a task's images in pixels."""
    _, height, width = task.preprocess["input_size"]
    return height, width


def fitting_backbone(task: Task, weights: str | Path | None) -> Backbone:
    """Loads the backbone of a task, and checks that the task fits it.

    Raises:
        PearStoreError: the backbone cannot be loaded, or the task does not fit it.
    """
    try:
        backbone = load_backbone(task.backbone_model, weights)
        check_fit(AdaptedBackbone(backbone, torch.device("cpu"), torch.float32), task.name, task)
        return backbone
    except RouterError as error:
        raise PearStoreError(str(error)) from None


def compare(
    backbone: Backbone, task: Task, answers: Callable[[Tensor], Tensor | np.ndarray[Any, Any]], what: str
) -> float:
    """The largest difference between a model's logits and the router's, over some random images.

    Args:
        answers: the model: normalised images [batch, 3, h, w] in, logits [batch, classes] out.
        what: the model's name in the message.
    Raises:
        PearStoreError: the logits differ by more than TOLERANCE allows.
    """
    largest = 0.0
    with Router(backbone, device="cpu", dtype=torch.float32, merge=False) as router:
        name = router.add(task)
        for count in BATCHES:
            images = torch.randn(count, 3, *image_size(task), generator=torch.Generator().manual_seed(count))
            expected = torch.as_tensor(router.run(images, name).logits)
            with torch.inference_mode():
                found = torch.as_tensor(answers(images))
            allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
            difference = float((found - expected).abs().max()) if found.shape == expected.shape else float("inf")
            if not difference <= allowed:  # so that NaN is refused, too
                raise PearStoreError(
                    f"task {task.name!r}: logits of {what} differ from the router's by {difference:.1e} in a batch of "
                    f"{count}: expected at most {allowed:.1e}; nothing was written"
                )
            largest = max(largest, difference)
    return largest
