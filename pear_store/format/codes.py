"""Turns stored tensors and codes into numbers (docs/checkpoint.md)."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from pear_store.format.digest import RawTensor
from pear_store.format.record import Adapter, Matrix

if TYPE_CHECKING:  # numpy is imported only for numbers: commands that only move bytes start faster without it
    import numpy as np
    from numpy.typing import NDArray


def dequantise(
    packed: bytes | bytearray | memoryview | NDArray[np.uint8],
    scale: NDArray[np.float32],
    shape: tuple[int, int],
    bits: int,
    rank_axis: int,
) -> NDArray[np.float32]:
    """The float32 matrix that codes of 1, 2, 4 or 8 bits stand for.

        w = scale · (2 code - top) / top            top = 2^bits - 1

    Args:
        packed: uint8 [ceil(numel * bits / 8)]; codes lie row-major, the first in the lowest bits of its byte.
        scale: float32 [rank], one for each index of the rank axis.
        shape: of the matrix, [d_in, rank], [rank, d_out], a core, or of a head [classes, features].
        bits: 1, 2, 4 or 8.
        rank_axis: 1 for `down`, 0 for `up`, a core and a head.
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


def to_numpy(raw: RawTensor) -> NDArray[np.floating[Any]]:
    """A floating tensor as an array: float16 or float32 on the raw tensor's own memory; bfloat16 as a new float32."""
    import numpy as np

    if raw.dtype == "BF16":  # the upper half of a float32
        bits = np.frombuffer(raw.data, "<u2").astype("<u4") << 16
        return bits.view("<f4").reshape(raw.shape)
    return np.frombuffer(raw.data, {"F32": "<f4", "F16": "<f2"}[raw.dtype]).reshape(raw.shape)


def matrix_values(matrix: Matrix, tensors: Mapping[str, RawTensor]) -> NDArray[np.floating[Any]]:
    """A matrix's numbers: float [rows, columns], dequantised. Never write to it: it may be the tensor's own memory."""
    tensor, scales = matrix.tensor(tensors), matrix.scales(tensors)
    if scales is None or matrix.bits is None:
        return to_numpy(tensor)
    return dequantise(tensor.data, to_numpy(scales).astype("<f4"), matrix.shape, matrix.bits, matrix.rank_axis)


def up_values(adapter: Adapter, tensors: Mapping[str, RawTensor]) -> NDArray[np.floating[Any]]:
    """[rank, d_out]: core @ up in float32, or up alone if there is no core. Never write to it."""
    up = matrix_values(adapter.up, tensors)
    if adapter.core is None:
        return up
    product: NDArray[np.floating[Any]] = matrix_values(adapter.core, tensors).astype("<f4") @ up.astype("<f4")
    return product
