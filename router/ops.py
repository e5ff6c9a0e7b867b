"""The maths of a branch, for router and trainer. These are functions on tensors, without state.

Axes: batch, token, dim (d_in or d_out), rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

Activation = str | Mapping[str, Bool[Tensor, "batch 1 1"]]
"""identity, relu or gelu. If the rows of a batch differ: activation -> mask of its rows."""


@dataclass(frozen=True, eq=False)
class PositionWeights:
    """The branches at one position, concatenated along the rank. Branches of another form are in `beside`.

        φ(x · down) · up            scales are multiplied into `up`
        φ(x · down) · core · up     on common bases: scales are multiplied into `core`

    Matrices are 2-dimensional if all rows of the batch use the same. They have a first axis if each row, or each of
    several equal runs of rows, has its own. One matrix may be common while another is not.
    """

    down: Tensor
    """[d_in, rank], or [run, d_in, rank]."""
    up: Tensor
    """[rank, d_out], or [run, rank, d_out]."""
    activation: Activation
    core: Tensor | None = None
    """[rank, rank], or [run, rank, rank]."""
    beside: "PositionWeights | None" = None
    """Further branches at the position, which are added, too."""

    @property
    def runs(self) -> int | None:
        """The number of equal runs of rows that have their own matrices. None if all rows use the same."""
        own = (len(matrix) for matrix in (self.down, self.core, self.up) if matrix is not None and matrix.ndim == 3)
        return next(own, None if self.beside is None else self.beside.runs)

    def of_rows(self, start: int, stop: int, count: int) -> "PositionWeights":
        """The weights of the rows from `start` up to, but without, `stop` of a batch of `count` rows."""
        if (runs := self.runs) is None:
            return self
        run = count // runs
        first, last = start // run, (stop - 1) // run
        units: slice | Tensor = slice(first, last + 1)
        if first != last and (start % run or stop % run):
            units = torch.arange(start, stop, device=self.down.device) // run
        return self._of_units(units)

    def times(self, factor: float) -> "PositionWeights":
        """The weights that add `factor` times as much."""
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
    """φ(h), elementwise. If rows differ in activation, masks choose."""
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
    """Adds a position's branches to its module's output. Differentiable in all tensors.

        y + φ(x · down) · up            or with a core: y + φ(x · down) · core · up
                                        plus the same for `beside`

    If rows have their own weights, the first axis of `x` may be a multiple of theirs. Such rows are the windows of an
    image, as in Swin, or a run of rows of one task. Common matrices take one product for the whole batch.

    Args:
        y: output of the module, [batch, ..., d_out], channels last.
        x: input of the module, [batch, ..., d_in], channels last.
        weights: the branches; they are cast to the dtype of `x`.
        in_place: write the sum into `y` if that is contiguous, and return it. Else nothing is mutated.
    Returns:
        The sum, in the shape of `y`.
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
    """The strides (down, right) by which a map y [..., h, w] keeps pixels of x [..., H, W]. None if there are none."""
    across = [-(-large // small) for large, small in zip(x[-2:], y[-2:], strict=True)]
    fits = all(-(-large // stride) == small for large, stride, small in zip(x[-2:], across, y[-2:], strict=True))
    return (across[0], across[1]) if fits else None


def channels_last(
    y: Float[Tensor, "batch out h w"], x: Float[Tensor, "batch dim H W"]
) -> tuple[Float[Tensor, "batch h w out"], Float[Tensor, "batch h w dim"]]:
    """Views of a module's output and input for `add_branch`. The input has only the pixels that the stride keeps.

    So a branch beside a convolution of stride s is a 1x1 convolution of stride s.
    """
    down, right = strides(x.shape, y.shape) or (1, 1)
    return y.movedim(1, -1), x[:, :, ::down, ::right].movedim(1, -1)


def _matched(x: Tensor, matrix: Tensor) -> Tensor:
    """`x` as [rows, dim] for a matrix that all rows share, or as [runs, rows, dim] for one matrix per run of rows."""
    return x.reshape(-1, x.shape[-1]) if matrix.ndim == 2 else x.reshape(len(matrix), -1, x.shape[-1])


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    return torch.matmul(_matched(x, matrix), matrix)
