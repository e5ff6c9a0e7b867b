"""Quantised adapters and heads: from packed codes back to numbers (docs/design.md, section 5)."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # numpy only where numbers are needed: commands that move bytes start without it
    import numpy as np
    from numpy.typing import NDArray


def dequantise(
    packed: bytes | bytearray | memoryview | NDArray[np.uint8],
    scale: NDArray[np.float32],
    shape: tuple[int, int],
    bits: int,
    rank_axis: int,
) -> NDArray[np.float32]:
    """The float32 matrix that codes of 1, 4 or 8 bits stand for.

        w = scale · (2 code - top) / top            top = 2^bits - 1

    Args:
        packed: uint8 [ceil(numel * bits / 8)]; codes lie row-major, the first in the lowest bits of its byte.
        scale: float32 [rank], one for each index of the rank axis.
        shape: of the matrix, [d_in, rank], [rank, d_out], or of a head [classes, features].
        bits: 1, 4 or 8.
        rank_axis: 1 for `down`, 0 for `up` and a head.
    Returns:
        float32 of `shape`.
    """
    import numpy as np

    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (np.frombuffer(packed, np.uint8)[:, None] >> shifts) & np.uint8(2**bits - 1)
    codes = codes.reshape(-1)[: prod(shape)].reshape(shape)
    top = 2**bits - 1
    levels = (2 * np.arange(2**bits, dtype=np.float32) - top) / np.float32(top)
    matrix: NDArray[np.float32] = levels[codes] * np.expand_dims(scale, 1 - rank_axis)
    return matrix
