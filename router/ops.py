"""The maths of a branch, used by router and trainer alike. Functions on tensors, no state.

Axes: batch, token, dim (d_in or d_out), rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

Activation = str | Mapping[str, Bool[Tensor, "batch 1 1"]]
"""identity, relu or gelu; or, where the rows of a batch differ, the mask of rows of each."""


@dataclass(frozen=True)
class PositionWeights:
    """All branches at one position, concatenated along the rank, scales multiplied into `up`.

    `down` is [dim, rank] and `up` [rank, dim] where every row of the batch uses the same branches, or
    [batch, dim, rank] and [batch, rank, dim] where each row, or each of `batch` equal runs of rows, has its own.
    """

    down: Tensor
    up: Tensor
    activation: Activation

    def of_rows(self, start: int, stop: int, count: int) -> "PositionWeights":
        """The weights of the rows from `start` to `stop` of a batch of `count`."""
        if self.down.ndim == 2:
            return self
        run = count // len(self.down)
        first, last = start // run, (stop - 1) // run
        units: slice | Tensor = slice(first, last + 1)
        if first != last and (start % run or stop % run):
            units = torch.arange(start, stop, device=self.down.device) // run
        masks = self.activation
        if not isinstance(masks, str):
            masks = {name: mask[units] for name, mask in masks.items()}
        return PositionWeights(self.down[units], self.up[units], masks)


def activate(h: Tensor, activation: Activation) -> Tensor:
    """φ(h), elementwise; rows by mask where they differ."""
    if not isinstance(activation, str):
        out = h
        for name, rows in activation.items():
            if name != "identity":
                out = torch.where(rows, activate(h, name), out)
        return out
    if activation == "identity":
        return h
    return F.relu(h) if activation == "relu" else F.gelu(h)


def add_branch(
    y: Float[Tensor, "..."], x: Float[Tensor, "..."], weights: PositionWeights, in_place: bool = False
) -> Float[Tensor, "..."]:
    """Adds a position's branches to its module's output.

        y + φ(x · down) · up

    `x` is [batch, ..., d_in] and `y` [batch, ..., d_out], channels last. With weights of each row, the first axis may
    be a multiple of theirs: the windows of a row, as Swin has them, or a run of rows of one task. Differentiable in
    all tensors.

    Args:
        in_place: write the sum into `y`, where it is contiguous, and return it; else mutate nothing.

    Source: LoRA, arXiv:2106.09685, section 4.1; AdaptFormer, arXiv:2205.13535, section 3.2.
    """
    down, up = weights.down.to(x.dtype), weights.up.to(x.dtype)
    into = in_place and y.is_contiguous()
    if down.ndim == 2:
        h = activate(x.reshape(-1, x.shape[-1]) @ down, weights.activation)
        flat = y.reshape(-1, y.shape[-1])
        return (flat.addmm_(h, up) if into else torch.addmm(flat, h, up)).view(y.shape)
    batch = len(down)
    h = activate(torch.bmm(x.reshape(batch, -1, x.shape[-1]), down), weights.activation)
    flat = y.reshape(batch, -1, y.shape[-1])
    return (flat.baddbmm_(h, up) if into else torch.baddbmm(flat, h, up)).view(y.shape)
