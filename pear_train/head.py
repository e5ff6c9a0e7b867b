"""The classifier of a task in training."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from router.tensors import fake_quantise


class Head(nn.Linear):
    """A linear classifier that starts at zero: [n, features] to logits [n, classes].

    Args:
        bits: train the weight as codes of this many bits. It is rounded in each step, and gradients pass through
            unchanged, so it learns what it will be written as. None: a weight of floats.
    """

    def __init__(self, features: int, classes: int, bits: int | None, device: torch.device) -> None:
        super().__init__(features, classes)
        self.bits = bits
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.to(device)

    def forward(self, features: Tensor) -> Tensor:
        weight = self.weight if self.bits is None else fake_quantise(self.weight, self.bits, rank_axis=0)
        return F.linear(features, weight, self.bias)
