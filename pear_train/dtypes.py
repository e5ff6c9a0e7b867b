"""How tensors are written: as floats, or as codes of a few bits."""

import math
from typing import TypeAlias

import torch

from pear_train.choices import CoreDtype, HeadDtype, TensorDtype

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CODE_BITS = {"Q8": 8, "Q4": 4, "Q2": 2, "Q1": 1}
Written: TypeAlias = TensorDtype | HeadDtype | CoreDtype


def code_bits(dtype: Written) -> int | None:
    """Bits of a code; None for floats."""
    return _CODE_BITS.get(dtype)


def written_bytes(shape: tuple[int, int], dtype: TensorDtype, rank_axis: int) -> int:
    """Bytes of a matrix as written, its scales included."""
    numbers, bits = math.prod(shape), code_bits(dtype)
    if bits is None:
        return numbers * float_dtype(dtype).itemsize
    return (numbers * bits + 7) // 8 + shape[rank_axis] * torch.float16.itemsize


def float_dtype(dtype: Written) -> torch.dtype:
    """The dtype of floats. Floats beside codes (scales, cores, biases) are float16."""
    return _FLOATS.get(dtype, torch.float16)


def core_dtype(core: CoreDtype, adapter: TensorDtype) -> CoreDtype:
    """How cores are written, with `auto` resolved."""
    if core != "auto":
        return core
    return adapter if adapter in ("F16", "BF16", "F32") else "F16"
