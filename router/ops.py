"""The maths of a branch, used by router and trainer alike. Functions on tensors, no state.

Axes: batch, token, dim (d_in or d_out), rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

Activation = str | Mapping[str, Bool[Tensor, "batch 1 1"]]
"""identity, relu or gelu; or, where the rows of a batch differ, the mask of rows of each."""


@dataclass(frozen=True, eq=False)
class PositionWeights:
    """The branches at one position: those of one form, concatenated along the rank, and maybe others beside them.

        φ(x · down) · up            scales multiplied into `up`
        φ(x · down) · core · up     on common bases: scales multiplied into `core`

    A matrix is [dim, rank], core [rank, rank] and up [rank, dim], where every row of the batch uses the same, or has an
    axis before these where each row, or each of so many equal runs of rows, has its own. One may be common, and another
    each row's own.
    """

    down: Tensor
    up: Tensor
    activation: Activation
    core: Tensor | None = None
    beside: "PositionWeights | None" = None

    @property
    def runs(self) -> int | None:
        """Into how many equal runs the rows of a batch fall; None where all rows use the same."""
        own = (len(matrix) for matrix in (self.down, self.core, self.up) if matrix is not None and matrix.ndim == 3)
        return next(own, None if self.beside is None else self.beside.runs)

    def of_rows(self, start: int, stop: int, count: int) -> "PositionWeights":
        """The weights of the rows from `start` to `stop` of a batch of `count`."""
        if (runs := self.runs) is None:
            return self
        run = count // runs
        first, last = start // run, (stop - 1) // run
        units: slice | Tensor = slice(first, last + 1)
        if first != last and (start % run or stop % run):
            units = torch.arange(start, stop, device=self.down.device) // run
        return self._of_units(units)

    def times(self, factor: float) -> "PositionWeights":
        """What adds `factor` times as much."""
        beside = self.beside and self.beside.times(factor)
        if self.core is None:
            return replace(self, up=self.up * factor, beside=beside)
        return replace(self, core=self.core * factor, beside=beside)

    def _of_units(self, units: slice | Tensor) -> "PositionWeights":
        down, core, up = (
            matrix if matrix is None or matrix.ndim == 2 else matrix[units]
            for matrix in (self.down, self.core, self.up)
        )
        assert down is not None and up is not None
        masks = self.activation
        if not isinstance(masks, str):
            masks = {name: mask[units] for name, mask in masks.items()}
        return PositionWeights(down, up, masks, core, self.beside and self.beside._of_units(units))


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

        y + φ(x · down) · up, or with a core y + φ(x · down) · core · up; and so what is beside

    `x` is [batch, ..., d_in] and `y` [batch, ..., d_out], channels last. With weights of each row, the first axis may
    be a multiple of theirs: the windows of a row, as Swin has them, or a run of rows of one task. Differentiable in
    all tensors. What all rows have in common is one product for the whole batch.

    Args:
        in_place: write the sum into `y`, where it is contiguous, and return it; else mutate nothing.

    Source: LoRA, arXiv:2106.09685, section 4.1; AdaptFormer, arXiv:2205.13535, section 3.2; a core between, LoRA-XS,
        arXiv:2405.17604, section 3.
    """
    h = _product(x, weights.down.to(x.dtype))
    if not isinstance(weights.activation, str):
        h = h.reshape(len(next(iter(weights.activation.values()))), -1, h.shape[-1])
    h = activate(h, weights.activation)
    if weights.core is not None:
        h = _product(h, weights.core.to(x.dtype))
    up = weights.up.to(x.dtype)
    into = in_place and y.is_contiguous()
    h, flat = _matched(h, up), _matched(y, up)
    if up.ndim == 2:
        out = flat.addmm_(h, up) if into else torch.addmm(flat, h, up)
    else:
        out = flat.baddbmm_(h, up) if into else torch.baddbmm(flat, h, up)
    out = out.view(y.shape)
    return out if weights.beside is None else add_branch(out, x, weights.beside, in_place)


def strides(x: torch.Size, y: torch.Size) -> tuple[int, int] | None:
    """Every how many pixels a map y [..., h, w] has one of x [..., H, W]; None where it has others."""
    across = [-(-large // small) for large, small in zip(x[-2:], y[-2:], strict=True)]
    fits = all(-(-large // stride) == small for large, stride, small in zip(x[-2:], across, y[-2:], strict=True))
    return (across[0], across[1]) if fits else None


def channels_last(
    y: Float[Tensor, "batch out h w"], x: Float[Tensor, "batch dim H W"]
) -> tuple[Float[Tensor, "batch h w out"], Float[Tensor, "batch h w dim"]]:
    """Views of a module's output and input as `add_branch` takes them; of the input those pixels that strides keep.

    So a branch beside a convolution of stride s is a 1x1 convolution of stride s.
    """
    down, right = strides(x.shape, y.shape) or (1, 1)
    return y.movedim(1, -1), x[:, :, ::down, ::right].movedim(1, -1)


def _matched(x: Tensor, matrix: Tensor) -> Tensor:
    """[rows, dim] for a matrix that all rows have in common; [runs, rows, dim] for one of each run of rows."""
    return x.reshape(-1, x.shape[-1]) if matrix.ndim == 2 else x.reshape(len(matrix), -1, x.shape[-1])


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    return torch.matmul(_matched(x, matrix), matrix)
