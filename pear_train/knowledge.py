"""What a position keeps of its pruned adapter: the knowledge checkpoint."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pear_train.adapters import FrozenAdapter
from router.tensors import dequantise, quantise


def lowbit_copy(down: Tensor, up: Tensor, bits: int) -> FrozenAdapter:
    """A frozen copy, quantised and read back. Quantising it again gives the same codes.

    Args:
        down: [d_in, rank].
        up: [rank, d_out].
        bits: 1 or 4.
    """
    packed_down, packed_up = quantise(down, bits, rank_axis=1), quantise(up, bits, rank_axis=0)
    return FrozenAdapter(
        "knowledge",
        dequantise(*packed_down, (down.shape[0], down.shape[1]), bits, rank_axis=1),
        dequantise(*packed_up, (up.shape[0], up.shape[1]), bits, rank_axis=0),
        bits,
    )


def exact_copy(down: Tensor, up: Tensor) -> FrozenAdapter:
    """A frozen copy, rounded to float16 and kept as float32."""
    return FrozenAdapter("knowledge", down.detach().half().float(), up.detach().half().float())


def fold(adapters: Sequence[tuple[Tensor, Tensor]], steps: int = 20) -> tuple[Tensor, Tensor, list[float]]:
    """Fits one adapter, and a scale for each position, to several adapters.

        minimise over down, up and s:    Σ_j | down_j · up_j - s_j · down · up |²      (Frobenius)

    It alternates between the best rank-r matrix for given scales and the best scales for a given matrix. It starts at
    s = 1 for the first and 0 for the others, so the first is kept if the others are unlike it. No step increases the
    error.

    Args:
        adapters: (down [d_in, rank], up [rank, d_out]) of the source, then of the positions that will borrow it.
        steps: number of alternations.
    Returns:
        down [d_in, rank] and up [rank, d_out], float32, with balanced norms; the scales in the order of `adapters`.
    """
    rank = adapters[0][0].shape[1]
    left, right, cores = _in_bases(adapters)
    scales = [1.0] + [0.0] * (len(adapters) - 1)
    u, s, v = torch.linalg.svd(cores[0], full_matrices=False)
    for _ in range(steps):
        fitted = (u[:, :rank] * s[:rank]) @ v[:rank]
        norm = float((fitted * fitted).sum())
        if norm == 0:
            break
        scales = [float((core * fitted).sum()) / norm for core in cores]
        weight = sum(scale * scale for scale in scales)
        target = torch.stack([scale * core for scale, core in zip(scales, cores, strict=True)]).sum(0) / weight
        u, s, v = torch.linalg.svd(target, full_matrices=False)
    fitted = (u[:, :rank] * s[:rank]) @ v[:rank]
    norm = float((fitted * fitted).sum())
    if norm > 0:
        scales = [float((core * fitted).sum()) / norm for core in cores]
    root = s[:rank].sqrt()
    down = (left @ (u[:, :rank] * root)).float()
    up = ((root.unsqueeze(1) * v[:rank]) @ right.t()).float()
    return down, up, scales


def fold_cores(adapters: Sequence[tuple[Tensor, Tensor]], steps: int = 10) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Fits one adapter, and a core for each position, to several adapters.

        minimise over down, up and C:    Σ_j | down_j · up_j - down · C_j · up |²      (Frobenius)

    It alternates: the best `down` for a given `up`, then the best `up` for a given `down` (a Tucker decomposition along
    two modes). Columns of `down` have norm 1. `up` is scaled so that the largest singular value of all cores is 1.

    Args:
        adapters: (down [d_in, rank], up [rank, d_out]) of the source, then of the positions that will borrow it.
        steps: number of alternations.
    Returns:
        down [d_in, rank], up [rank, d_out], and cores [rank, rank] in the order of `adapters`; all float32.
    Source: higher-order orthogonal iteration, De Lathauwer et al. 2000; shared factors with a core for each layer as in
        FacT, arXiv:2212.03145.
    """
    rank = adapters[0][0].shape[1]
    left, right, deltas = _in_bases(adapters)
    v = torch.linalg.svd(torch.cat(deltas), full_matrices=False).Vh[:rank]
    u = v.t()
    for _ in range(steps):
        u = torch.linalg.svd(torch.cat([delta @ v.t() for delta in deltas], 1), full_matrices=False).U[:, :rank]
        v = torch.linalg.svd(torch.cat([u.t() @ delta for delta in deltas]), full_matrices=False).Vh[:rank]
    cores = [u.t() @ delta @ v.t() for delta in deltas]
    norm = max(float(torch.linalg.matrix_norm(core, 2)) for core in cores) or 1.0
    down, up = (left @ u).float(), (norm * (v @ right.t())).float()
    return down, up, [(core / norm).float() for core in cores]


def common_bases(adapters: Sequence[tuple[Tensor, Tensor]], rank: int, steps: int = 10) -> tuple[Tensor, Tensor]:
    """Fits two orthonormal bases to several adapters, each of which has a core of its own.

        minimise over D, U and C:    Σ_j | down_j · up_j - D · C_j · U |²      (Frobenius)

    It alternates: the best D for a given U, then the best U for a given D. The directions that hold most come first.

    Args:
        adapters: (down [d_in, r], up [r, d_out]) of each task; ranks may differ.
        rank: of the bases; at most the number of directions that all adapters have together on each side.
        steps: number of alternations.
    Returns:
        D [d_in, rank] and U [rank, d_out], float32.
    Source: higher-order orthogonal iteration, De Lathauwer et al. 2000.
    """
    left, right, deltas = _in_bases(adapters)
    v = torch.linalg.svd(torch.cat(deltas), full_matrices=False).Vh[:rank]
    u = v.t()
    for _ in range(steps):
        u = torch.linalg.svd(torch.cat([delta @ v.t() for delta in deltas], 1), full_matrices=False).U[:, :rank]
        v = torch.linalg.svd(torch.cat([u.t() @ delta for delta in deltas]), full_matrices=False).Vh[:rank]
    return (left @ u).float(), (v @ right.t()).float()


def in_common_bases(down: Tensor, up: Tensor, d: Tensor, u: Tensor) -> Tensor:
    """The core [R, R], float32, that brings d · C · u nearest to down · up (Frobenius).

        C = d⁺ · down · up · u⁺

    Args:
        down, up: [d_in, r] and [r, d_out].
        d, u: common bases [d_in, R] and [R, d_out].
    """
    left = torch.linalg.pinv(d.double()) @ down.detach().double()
    core: Tensor = left @ (up.detach().double() @ torch.linalg.pinv(u.double()))
    return core.float()


def _in_bases(adapters: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Orthonormal bases [d_in, k] of all downs and [d_out, k] of all ups, and each adapter's matrix in them; float64.

    k is at most the number of adapters times their rank. So these matrices are smaller than d_in x d_out.
    """
    pairs = [(down.detach().double(), up.detach().double()) for down, up in adapters]
    left, _ = torch.linalg.qr(torch.cat([down for down, _ in pairs], 1))
    right, _ = torch.linalg.qr(torch.cat([up for _, up in pairs]).t())
    return left, right, [(left.t() @ down) @ (up @ right) for down, up in pairs]
