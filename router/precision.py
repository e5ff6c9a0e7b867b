"""The precision that a device computes fastest, for training and for routing."""

import time
from functools import cache

import torch

AMX_GAIN, BF16_GAIN = 1.0, 1.5
"""How many times faster a CPU must measure in bfloat16, so that it is taken. The first is for a CPU that reports AMX
tiles, the second for one that reports only vector instructions, or whose instructions are not known."""
_ROUNDS = 20


def fast_precision(device: torch.device) -> torch.dtype:
    """bfloat16 if the device computes it faster than float32, else float32.

    For a GPU, its own report decides; emulation does not count. A CPU without bfloat16 instructions gets float32. Any
    other CPU is measured once per process.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        needed = _needed_gain() if device.type == "cpu" else None
        fast = needed is not None and _measured_gain() > needed
    return torch.bfloat16 if fast else torch.float32


def _needed_gain() -> float | None:
    """The gain from which bfloat16 is taken on this CPU. None if it reports no bfloat16 instructions."""
    if torch.cpu._is_amx_tile_supported():
        return AMX_GAIN
    x86 = torch.cpu._is_avx2_supported()
    return None if x86 and not torch.cpu._is_avx512_bf16_supported() else BF16_GAIN


@cache
def _measured_gain() -> float:
    """How many times faster this CPU multiplies matrices in bfloat16 than in float32.

    The instruction set alone does not tell: a CPU with AVX-512 BF16 but without AMX may be half as fast in bfloat16.
    Rounds of both precisions alternate, so that other load slows both. The best round of each counts.
    """
    factors = {
        dtype: (torch.ones(1024, 192, dtype=dtype), torch.ones(192, 192, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
    best_s = dict.fromkeys(factors, float("inf"))
    for _ in range(_ROUNDS):
        for dtype, (x, w) in factors.items():
            began = time.perf_counter()
            x @ w
            best_s[dtype] = min(best_s[dtype], time.perf_counter() - began)
    return best_s[torch.float32] / best_s[torch.bfloat16]
