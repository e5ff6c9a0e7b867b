"""How good a task is on a split: the trainer's weights while they train, the written file at the end."""

from collections.abc import Callable

import torch
from torch import Tensor

from pear_train.data import Pixels
from pear_train.errors import DivergedError
from router import Router

EVAL_BATCH = 100


def in_batches(pixels: Pixels, size: int = EVAL_BATCH) -> list[Tensor]:
    """Row numbers of a split in order, `size` at a time."""
    return [torch.arange(start, min(start + size, len(pixels))) for start in range(0, len(pixels), size)]


@torch.no_grad()
def accuracy(pixels: Pixels, logits: Callable[[Tensor], Tensor]) -> float | None:
    """Top-1 of a split; None if a logit is not finite, so that the likeliest class means nothing.

    Args:
        logits: of the rows with these numbers.
    """
    right = 0
    for rows in in_batches(pixels):
        answer = logits(rows)
        if not bool(torch.isfinite(answer).all()):
            return None
        right += int((answer.argmax(1).cpu() == pixels.targets[rows]).sum())
    return right / len(pixels)


def predict(router: Router, task: str, pixels: Pixels, lr: float) -> Tensor:
    """The class of each image, as the router answers.

    Raises:
        DivergedError: a logit is not finite, so that the likeliest class means nothing.
    """
    predicted = []
    for rows in in_batches(pixels):
        logits = router.run(pixels.images(rows), task).logits
        assert isinstance(logits, Tensor)
        if not bool(torch.isfinite(logits).all()):
            raise DivergedError(task, "logits of the written checkpoint are not finite", lr)
        predicted.append(logits.argmax(1).cpu())
    return torch.cat(predicted)
