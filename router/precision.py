"""Which precision a device computes fastest: one answer for training and for routing."""

import time
from functools import cache

import torch

AMX_GAIN, BF16_GAIN = 1.0, 1.5
"""How many times as fast a CPU must prove to be in bfloat16. The first is for one that reports tiles (AMX), the second
for one that reports only vector instructions, or an instruction set that we do not know."""
_ROUNDS = 20


def fast_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes it faster than float32, else float32.

    A GPU is believed what it reports; emulation does not count. A CPU that reports no bfloat16 instructions takes
    float32 unmeasured. Any other CPU is measured once in a process.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        needed = _needed_gain() if device.type == "cpu" else None
        fast = needed is not None and _measured_gain() > needed
    return torch.bfloat16 if fast else torch.float32


def _needed_gain() -> float | None:
    """The gain from which bfloat16 is taken on this CPU; None where it reports that it has no such instructions."""
    if torch.cpu._is_amx_tile_supported():
        return AMX_GAIN
    x86 = torch.cpu._is_avx2_supported()
    return None if x86 and not torch.cpu._is_avx512_bf16_supported() else BF16_GAIN


@cache
def _measured_gain() -> float:
    """How many times as fast this CPU multiplies matrices in bfloat16 as in float32.

    What its instructions promise does not say: a CPU with AVX-512 BF16 and without AMX may be half as fast in it. The
    rounds of both precisions alternate, so other load slows both; the best round of each counts.
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
