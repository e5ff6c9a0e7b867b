"""How important each adapter is."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from pear_train.choices import GradientScore


def gradient_scores(
    kind: GradientScore, ups: Mapping[str, Tensor], losses: Iterable[Callable[[], Tensor]]
) -> dict[str, float]:
    """Scores each adapter by its gradient: how much its removal would change the loss. An adapter is one group.

        taylor:      I_k = mean over batches of ⟨up_k, ∂L/∂up_k⟩²
        taylor_abs:  I_k = mean over batches of |⟨up_k, ∂L/∂up_k⟩|
        gradient:    I_k = mean over batches of |∂L/∂up_k|²

    The inner product is the loss's first-order change when the adapter is removed. For identity and relu, `down` has
    the same inner product, because the branch is linear in each.

    Args:
        ups: `up` [rank, d_out] of each adapter, requiring grad.
        losses: for every batch, a function that computes its mean loss.
    Returns:
        name -> score, at least 0.
    Source: Molchanov et al., arXiv:1906.10771, equation 8; grouped by adapter as Pear, arXiv:2409.19733.
    """
    totals = dict.fromkeys(ups, 0.0)
    batches = 0
    for loss in losses:
        gradients = torch.autograd.grad(loss(), list(ups.values()))
        for (name, up), gradient in zip(ups.items(), gradients, strict=True):
            gradient = gradient.float()
            if kind == "gradient":
                totals[name] += float(gradient.square().sum())
            else:
                change = float((up.detach().float() * gradient).sum())
                totals[name] += change**2 if kind == "taylor" else abs(change)
        batches += 1
    return {name: total / max(1, batches) for name, total in totals.items()}


def place_scores(positions: Iterable[str]) -> dict[str, float]:
    """The earlier a position, the higher its score. A control that ignores what was learnt."""
    places = list(positions)
    return {position: float(len(places) - i) for i, position in enumerate(places)}


def magnitude_scores(adapters: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """The Frobenius norm of each adapter's down · up. The product is never formed."""
    return {
        name: float(((down.t() @ down) * (up @ up.t())).sum().clamp_min(0).sqrt())
        for name, (down, up) in adapters.items()
    }
