"""How important each adapter is."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor


def taylor_scores(ups: Mapping[str, Tensor], losses: Iterable[Callable[[], Tensor]]) -> dict[str, float]:
    """First-order Taylor importance of each adapter, as one group of weights.

        I_k = mean over batches of ⟨up_k, ∂L/∂up_k⟩²

    The term is the loss's first-order change when the adapter is removed; for identity and relu it equals `down`'s,
    as the branch is linear in each.

    Args:
        ups: `up` [rank, d_out] of each adapter, requiring grad.
        losses: for every batch, what computes its mean loss.
    Source: Molchanov et al., arXiv:1906.10771, equation 8; grouped by adapter as Pear, arXiv:2409.19733.
    """
    totals = dict.fromkeys(ups, 0.0)
    batches = 0
    for loss in losses:
        gradients = torch.autograd.grad(loss(), list(ups.values()))
        for (name, up), gradient in zip(ups.items(), gradients, strict=True):
            totals[name] += float((up.detach().float() * gradient.float()).sum()) ** 2
        batches += 1
    return {name: total / max(1, batches) for name, total in totals.items()}
