"""The branch op as one Triton kernel, and the choice between it and the plain op.

The plain op is two launches; it writes φ(x · down) to memory and reads it back. The kernel keeps φ(x · down) in
registers. Which one is faster depends on the GPU and the shapes. So :func:`use_fused` times both at the first call with
a shape, and keeps the faster one. Without Triton or CUDA it always chooses the plain op.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from router.ops import PositionWeights, add_branch

try:
    import triton
    import triton.language as tl
except ImportError:  # pragma: no cover  (torch without Triton)
    triton = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_RANK = 128
BLOCK_TOKEN = 32
"""Tokens of a tile. Of 12 tiles of 16 to 128 tokens and 64 to 256 channels, 32 x 128 was the fastest on an H200."""
_CODES = {"identity": 0, "relu": 1, "gelu": 2}

if triton is not None:
    _DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

    @triton.jit
    def _activate(h, code):  # type: ignore[no-untyped-def]
        relu = tl.where(h > 0, h, 0.0)
        gelu = 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
        return tl.where(code == 1, relu, tl.where(code == 2, gelu, h))

    @triton.jit  # type: ignore[untyped-decorator]
    def _branch(  # type: ignore[no-untyped-def]
        out, y, x, down, up, codes,
        tokens, tiles, d_in, d_out, rank,
        down_group, down_dim, down_rank, up_group, up_rank, up_dim,
        CODE: tl.constexpr, DOT: tl.constexpr,
        BLOCK_TOKEN: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_RANK: tl.constexpr,
    ):  # fmt: skip
        """A tile of tokens of a group. Contiguous: x [group, token, d_in]; y, out [group, token, d_out]."""
        group = (tl.program_id(0) // tiles).to(tl.int64)
        token = (tl.program_id(0) % tiles) * BLOCK_TOKEN + tl.arange(0, BLOCK_TOKEN)
        ranks = tl.arange(0, BLOCK_RANK)
        here = token[:, None] < tokens
        row = (group * tokens + token)[:, None]
        h = tl.full((BLOCK_TOKEN, BLOCK_RANK), 0.0, tl.float32)
        for start in range(0, d_in, BLOCK_DIM):
            dim = start + tl.arange(0, BLOCK_DIM)
            x_tile = tl.load(x + row * d_in + dim[None, :], mask=here & (dim[None, :] < d_in), other=0.0)
            at = down + group * down_group + dim[:, None] * down_dim + ranks[None, :] * down_rank
            down_tile = tl.load(at, mask=(dim[:, None] < d_in) & (ranks[None, :] < rank), other=0.0)
            h = tl.dot(x_tile.to(DOT), down_tile.to(x_tile.dtype).to(DOT), h, input_precision="ieee")
        h = _activate(h, tl.load(codes + group)) if CODE < 0 else _activate(h, CODE)
        h = h.to(x.dtype.element_ty).to(DOT)
        for start in range(0, d_out, BLOCK_DIM):
            dim = start + tl.arange(0, BLOCK_DIM)
            at = up + group * up_group + ranks[:, None] * up_rank + dim[None, :] * up_dim
            up_tile = tl.load(at, mask=(ranks[:, None] < rank) & (dim[None, :] < d_out), other=0.0)
            inside = here & (dim[None, :] < d_out)
            place = row * d_out + dim[None, :]
            total = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
            total = tl.dot(h, up_tile.to(x.dtype.element_ty).to(DOT), total, input_precision="ieee")
            tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)

    # Triton's interpreter multiplies the bits of bfloat16, so it gets float32 instead
    _INTERPRETED = not isinstance(_branch, triton.JITFunction)


def add_branch_fused(y: Tensor, x: Tensor, weights: PositionWeights, in_place: bool = False) -> Tensor:
    """Adds a position's branches to its module's output in one kernel. Sums are float32, rounded once.

        y + φ(x · down) · up

    It takes the arguments of :func:`router.ops.add_branch` for which :func:`can_fuse` is true. Not differentiable.

    Args:
        y: output of the module, [batch, ..., d_out].
        x: input of the module, [batch, ..., d_in].
        in_place: write the sum into `y` if that is contiguous, and return it. Else nothing is mutated.
    """
    down, up = weights.down, weights.up
    if down.ndim == 2:
        down, up = down.unsqueeze(0), up.unsqueeze(0)
    groups, d_in, rank = down.shape
    d_out = up.shape[-1]
    x = x.reshape(groups, -1, d_in).contiguous()
    into = in_place and y.is_contiguous()
    y = y.contiguous()
    out = y if into else torch.empty_like(y)
    activation = weights.activation
    code, codes = (_CODES[activation], out) if isinstance(activation, str) else (-1, _row_codes(activation))
    tokens = x.shape[1]
    tiles = triton.cdiv(tokens, BLOCK_TOKEN)
    _branch[(groups * tiles,)](
        out, y, x, down, up, codes,
        tokens, tiles, d_in, d_out, rank,
        *down.stride(), *up.stride(),
        CODE=code, DOT=tl.float32 if _INTERPRETED else _DTYPES[x.dtype],
        BLOCK_TOKEN=BLOCK_TOKEN, BLOCK_DIM=64 if x.dtype == torch.float32 else 128,
        BLOCK_RANK=max(16, triton.next_power_of_2(rank)),
    )  # fmt: skip
    return out


def _row_codes(activation: Any) -> Tensor:
    """Each row's activation as a code, int32 [batch]."""
    codes = [mask.view(-1).to(torch.int32) * _CODES[name] for name, mask in activation.items()]
    return torch.stack(codes).sum(0, dtype=torch.int32)


def can_fuse(y: Tensor, x: Tensor, weights: PositionWeights) -> bool:
    """Whether the kernel can be used: on CUDA, without gradients, one of DTYPES, a rank of at most MAX_RANK.

    It supports neither cores nor branches beside.
    """
    return (
        triton is not None
        and weights.core is None
        and weights.beside is None
        and x.is_cuda
        and x.dtype in DTYPES
        and y.dtype == x.dtype
        and 0 < weights.down.shape[-1] <= MAX_RANK
        and x.numel() > 0
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, weights.down, weights.up)))
    )


def use_fused(y: Tensor, x: Tensor, weights: PositionWeights) -> bool:
    """Whether :func:`add_branch_fused` can be used and is faster than :func:`router.ops.add_branch`.

    The first call with such shapes on a device measures both. While a CUDA graph is captured, nothing is measured: the
    plain op is used unless it is known to be slower. Within torch.compile the plain op is always used.
    """
    return not torch.compiler.is_compiling() and can_fuse(y, x, weights) and _fused_is_faster(y, x, weights)


_faster: dict[object, bool] = {}


def _fused_is_faster(y: Tensor, x: Tensor, weights: PositionWeights) -> bool:
    rows = 1 << (x.numel() // x.shape[-1] - 1).bit_length()
    mixed = not isinstance(weights.activation, str)
    key = (x.device, x.dtype, weights.down.dtype, rows, *weights.down.shape, y.shape[-1], mixed)
    if key not in _faster:
        if torch.cuda.is_current_stream_capturing():
            return False
        plain = _milliseconds(lambda: add_branch(y, x, weights))
        _faster[key] = _milliseconds(lambda: add_branch_fused(y, x, weights)) < plain
    return _faster[key]


def _milliseconds(call: Callable[[], object]) -> float:
    """A call's time on the GPU: the least of several."""
    call()  # compiles
    times: list[float] = []
    for _ in range(5):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        call()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return min(times)
