"""Which positions lose their adapter, and whose they borrow."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from pear_train.choices import Sharing


def choose_pruned(importance: Mapping[str, float], widths: Mapping[str, tuple[int, int]], ratio: float) -> list[str]:
    """The positions whose adapters are pruned.

    In each group of equal (d_in, d_out), a share `ratio` is pruned, rounded down; at least one is kept. The least
    important go first. Of equal ones the earlier position goes first.

    Args:
        importance: of every position, in forward order.
        widths: position -> (d_in, d_out).
        ratio: at least 0 and below 1.
    Returns:
        Positions group by group, the least important first in each.
    """
    groups: dict[tuple[int, int], list[str]] = {}
    for position in importance:
        groups.setdefault(widths[position], []).append(position)
    pruned: list[str] = []
    for positions in groups.values():
        ranked = sorted(positions, key=lambda position: importance[position])
        pruned += ranked[: min(int(ratio * len(ranked) + 1e-9), len(ranked) - 1)]
    return pruned


def choose_within(importance: Mapping[str, float], sizes: Mapping[str, int], limit: int) -> list[str]:
    """The positions whose adapters are pruned so that the others take at most `limit` bytes, in forward order.

    Adapters are kept in order of importance. One that no longer fits is skipped; a smaller one after it may still fit.
    Of equal ones the earlier position is kept first.

    Args:
        importance: of every position, in forward order.
        sizes: bytes of each position's adapter.
        limit: bytes.
    """
    left, pruned = limit, set()
    for position in sorted(importance, key=lambda position: -importance[position]):
        if sizes[position] <= left:
            left -= sizes[position]
        else:
            pruned.add(position)
    return [position for position in importance if position in pruned]


def choose_sources(
    rule: Sharing,
    pruned: Sequence[str],
    importance: Mapping[str, float],
    widths: Mapping[str, tuple[int, int]],
    similarity: Callable[[str, str], float] | None = None,
) -> dict[str, str]:
    """Chooses for each pruned position the kept position, of the same (d_in, d_out), whose adapter it borrows.

    Args:
        rule: ``top``: the i-th most important kept position serves the i-th least important pruned one, round and
            round. ``nearest``: the nearest kept position in forward order, if possible one of the same kind of module
            (last part of its path). ``similar``: the kept position of largest `similarity(pruned, kept)`. ``none``:
            no position borrows.
        importance: of every position, in forward order.
        widths: position -> (d_in, d_out).
    Returns:
        pruned position -> kept position.
    """
    if rule == "none":
        return {}
    order = {position: i for i, position in enumerate(importance)}
    sources = {}

    def apart(one: str, other: str) -> tuple[int, int]:
        return abs(order[other] - order[one]), order[other]

    for shape in dict.fromkeys(widths[position] for position in pruned):
        lost = sorted((p for p in pruned if widths[p] == shape), key=lambda p: (importance[p], order[p]))
        kept = [p for p in importance if widths[p] == shape and p not in pruned]
        ranked = sorted(kept, key=lambda p: (-importance[p], order[p]))
        for i, position in enumerate(lost):
            if rule == "top":
                sources[position] = ranked[i % len(ranked)]
            elif rule == "similar":
                assert similarity is not None
                sources[position] = max(kept, key=partial(similarity, position))
            else:
                kind = position.rpartition(".")[2]
                alike = [p for p in kept if p.rpartition(".")[2] == kind] or kept
                sources[position] = min(alike, key=partial(apart, position))
    return sources


def matrix_similarity(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """⟨Δ, Δ'⟩ / |Δ| |Δ'| of two adapters' matrices Δ = down · up. The products are never formed."""

    def inner(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
        return ((a[0].t() @ b[0]) * (a[1] @ b[1].t())).sum()

    norm = (inner(one, one) * inner(other, other)).clamp_min(0).sqrt()
    return float(inner(one, other) / norm) if norm > 0 else 0.0


def output_similarity(one: Tensor, other: Tensor) -> float:
    """Cosine of two branches' outputs on the same inputs, each flattened to one vector."""
    return float(torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0))
