"""What tensors are written in: floats, or codes of a few bits."""

import torch

from pear_train.choices import HeadDtype, TensorDtype

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CODE_BITS = {"Q8": 8, "Q4": 4, "Q1": 1}


def code_bits(dtype: TensorDtype | HeadDtype) -> int | None:
    """Bits of a code; None for floats."""
    return _CODE_BITS.get(dtype)


def float_dtype(dtype: TensorDtype | HeadDtype) -> torch.dtype:
    """What the floats are written in; beside codes (scales, cores, biases) that is float16."""
    return _FLOATS.get(dtype, torch.float16)
