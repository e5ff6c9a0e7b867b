"""Converts between a store's raw tensors and torch, and quantises adapters."""

import numpy as np
import torch
from torch import Tensor

from pear_store import RawTensor
from pear_store.format import codes as quant
from pear_store.format.codes import to_numpy
from pear_store.format.record import FLOATS

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I64": torch.int64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def to_torch(raw: RawTensor) -> Tensor:
    """The raw tensor as a CPU tensor with its own memory."""
    dtype = _DTYPES[raw.dtype]
    if not len(raw.data):
        return torch.empty(raw.shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw.data), dtype=dtype).view(raw.shape)


def all_finite(raw: RawTensor) -> bool:
    """Whether no element is NaN or infinite. Codes are always finite."""
    return raw.dtype not in FLOATS or bool(np.isfinite(to_numpy(raw)).all())


def from_torch(tensor: Tensor) -> RawTensor:
    """The tensor as a raw tensor, copied from its device."""
    tensor = tensor.detach().to("cpu").contiguous()
    data = tensor.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return RawTensor(_NAMES[tensor.dtype], tuple(tensor.shape), data)


def quantise(matrix: Tensor, bits: int, rank_axis: int) -> tuple[Tensor, Tensor]:
    """Packs a matrix into codes of 1, 2, 4 or 8 bits with one float16 scale for each index of its rank axis.

        1 bit:   w ≈ scale · (2 code - 1)                      scale = mean |w|, the least squares choice
        b bits:  w ≈ scale · (2 code - top) / top              scale = max |w|, top = 2^b - 1

    Codes are row-major, the first one in the lowest bits of its byte. The last byte is padded with zeros.

    Args:
        matrix: float [d_in, rank] or [rank, d_out], or [classes, features] of a head, whose rank axis is its classes.
        bits: 1, 2, 4 or 8.
        rank_axis: 1 for `down`, 0 for `up` and a head.
    Returns:
        Packed codes, uint8 [ceil(numel * bits / 8)], and scales, float16 [rank].
    """
    matrix = matrix.detach().float().cpu()
    codes, scale = _codes(matrix, bits, rank_axis)
    codes = codes.to(torch.uint8).reshape(-1)
    per_byte = 8 // bits
    codes = torch.cat([codes, codes.new_zeros(-len(codes) % per_byte)]).view(-1, per_byte)
    shifts = torch.arange(per_byte, dtype=torch.uint8) * bits
    return (codes << shifts).sum(1, dtype=torch.uint8), scale.half().squeeze(1 - rank_axis)


def _codes(matrix: Tensor, bits: int, rank_axis: int) -> tuple[Tensor, Tensor]:
    """Codes as float32 in the matrix's shape, and scales rounded to float16, with length 1 along the other axis."""
    magnitude, across, top = matrix.abs(), 1 - rank_axis, 2**bits - 1
    scale = magnitude.mean(across, keepdim=True) if bits == 1 else magnitude.amax(across, keepdim=True)
    scale = scale.half().float()
    unit = matrix / scale.clamp_min(1e-12)
    codes = (unit >= 0).float() if bits == 1 else ((unit.clamp(-1, 1) * top + top) / 2).round().clamp(0, top)
    return codes, scale


def fake_quantise(matrix: Tensor, bits: int, rank_axis: int) -> Tensor:
    """The matrix after :func:`quantise` and :func:`dequantise`. Gradients pass through unchanged."""
    with torch.no_grad():
        codes, scale = _codes(matrix.float(), bits, rank_axis)
        top = 2**bits - 1
        change = scale * (2 * codes - top) / top - matrix
    rounded: Tensor = matrix + change
    return rounded


def dequantise(packed: Tensor, scale: Tensor, shape: tuple[int, int], bits: int, rank_axis: int) -> Tensor:
    """The float32 matrix that :func:`quantise` packed."""
    values = quant.dequantise(packed.cpu().numpy(), scale.detach().float().cpu().numpy(), shape, bits, rank_axis)
    return torch.from_numpy(values).to(packed.device)
