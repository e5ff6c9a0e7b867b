"""What moves the weights of a run: AdamW, its learning rate over the steps, and what it trains now."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pear_train.adapters import AdapterSet
from pear_train.config import TrainConfig


def make_optimiser(config: TrainConfig, adapters: AdapterSet, head: nn.Module) -> torch.optim.AdamW:
    """AdamW with two groups: matrices and the head; and scales, which have a rate of their own and no decay."""
    matrices = [*adapters.trained().values(), *head.parameters()]
    optimiser = torch.optim.AdamW(matrices, lr=config.lr, weight_decay=config.weight_decay)
    optimiser.param_groups.append({**optimiser.param_groups[0], "params": [], "weight_decay": 0.0})
    optimiser.param_groups[1]["factor"] = config.scale_lr
    return optimiser


def rate_factor(step: int, steps: int, warmup_share: float) -> float:
    """What the learning rate is multiplied with at a step: rises in a line, then falls along a cosine to 0."""
    warmup = max(1, round(warmup_share * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (step - warmup) / max(1, steps - warmup)))))


def set_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of the step to come, each group's by its factor."""
    for group in optimiser.param_groups:
        group["lr"] = lr * group.get("factor", 1.0)


def move(optimiser: torch.optim.Optimizer, max_grad_norm: float) -> None:
    """A step along the gradients, which are clipped together."""
    trained = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    nn.utils.clip_grad_norm_(trained, max_grad_norm)
    optimiser.step()


def train_what_is_there(
    optimiser: torch.optim.Optimizer, adapters: AdapterSet, head: nn.Module, changed: Iterable[Tensor] = ()
) -> None:
    """Gives the optimiser what trains now; forgets moments of what does not, or changed its role."""
    matrices, scales = optimiser.param_groups
    matrices["params"] = [*adapters.trained().values(), *adapters.cores().values(), *head.parameters()]
    scales["params"] = list(adapters.scales().values())
    training, forgotten = {*matrices["params"], *scales["params"]}, set(changed)
    for parameter in list(optimiser.state):
        if parameter in forgotten or parameter not in training:
            del optimiser.state[parameter]
