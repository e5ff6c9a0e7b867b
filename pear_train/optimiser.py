"""The optimiser of a run: AdamW, its learning rate over the steps, and which weights it trains."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pear_train.adapters import AdapterSet
from pear_train.config import TrainConfig


def make_optimiser(config: TrainConfig, adapters: AdapterSet, head: nn.Module) -> torch.optim.AdamW:
    """AdamW with two or three groups.

    The first holds matrices and the head. The second holds scales, with their own learning rate and no decay. On common
    bases, a third holds everything but the head and the scales, with its own learning rate.
    """
    optimiser = torch.optim.AdamW(list(head.parameters()), lr=config.lr, weight_decay=config.weight_decay)
    common = optimiser.param_groups[0]
    optimiser.param_groups.append({**common, "params": [], "weight_decay": 0.0, "factor": config.scale_lr})
    if adapters.on_bases:
        optimiser.param_groups.append({**common, "params": [], "factor": config.core_lr})
    train_what_is_there(optimiser, adapters, head)
    return optimiser


def rate_factor(step: int, steps: int, warmup_share: float) -> float:
    """Factor of the learning rate at a step, 0 to 1. It rises linearly, then falls along a cosine to 0."""
    warmup = max(1, round(warmup_share * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (step - warmup) / max(1, steps - warmup)))))


def set_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Sets each group's learning rate to `lr` times the group's factor."""
    for group in optimiser.param_groups:
        group["lr"] = lr * group.get("factor", 1.0)


def move(optimiser: torch.optim.Optimizer, max_grad_norm: float) -> None:
    """Clips all gradients together, then makes a step."""
    trained = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    nn.utils.clip_grad_norm_(trained, max_grad_norm)
    optimiser.step()


def train_what_is_there(
    optimiser: torch.optim.Optimizer, adapters: AdapterSet, head: nn.Module, changed: Iterable[Tensor] = ()
) -> None:
    """Gives the optimiser all weights that train now. Drops the moments of weights that no longer train.

    Args:
        changed: weights that keep training but whose moments are dropped, because other positions now use them.
    """
    matrices, scales, *on_bases = optimiser.param_groups
    of_adapters = [*adapters.trained().values(), *adapters.cores().values()]
    matrices["params"] = [*([] if on_bases else of_adapters), *head.parameters()]
    scales["params"] = list(adapters.scales().values())
    for group in on_bases:
        group["params"] = of_adapters
    training, forgotten = {p for group in optimiser.param_groups for p in group["params"]}, set(changed)
    for parameter in list(optimiser.state):
        if parameter in forgotten or parameter not in training:
            del optimiser.state[parameter]
