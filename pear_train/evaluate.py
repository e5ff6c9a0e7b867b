"""How good a task is on a split: with the trainer's weights while they train, from the written file at the end."""

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
def predicted_classes(pixels: Pixels, logits: Callable[[Tensor], Tensor]) -> Tensor | None:
    """The likeliest class of each image, int64 [image]. None if a logit is not finite.

    Args:
        logits: computes the logits [row, class] of rows by their numbers.
    """
    found = []
    for rows in in_batches(pixels):
        answer = logits(rows)
        if not bool(torch.isfinite(answer).all()):
            return None
        found.append(answer.argmax(1).cpu())
    return torch.cat(found)


def probabilities(router: Router, task: str, pixels: Pixels, lr: float) -> Tensor:
    """The router's probabilities, float32 [image, class].

    Args:
        lr: the run's learning rate, for the error.
    Raises:
        DivergedError: a logit is not finite.
    """
    found = []
    for rows in in_batches(pixels):
        logits = router.run(pixels.images(rows), task).logits
        assert isinstance(logits, Tensor)
        if not bool(torch.isfinite(logits).all()):
            raise DivergedError(task, "logits of the written checkpoint are not finite", lr)
        found.append(logits.cpu().softmax(1))
    return torch.cat(found)


def calibrated(right: Tensor, confidence: Tensor, wanted: float) -> float | None:
    """The threshold of a task whose answers on val are these: 0 if no answer need be unknown, None if none is found."""
    return 0.0 if float(right.double().mean()) >= wanted else threshold_for(right, confidence, wanted)


def threshold_for(right: Tensor, confidence: Tensor, wanted: float) -> float | None:
    """The lowest confidence such that a share `wanted` of the answers from it upwards is right. None if none does.

    Args:
        right: bool [image], whether the answer is right.
        confidence: float [image], of the answer.
    """
    order = torch.argsort(confidence, descending=True, stable=True)
    ordered = confidence[order]
    shares = right[order].double().cumsum(0) / torch.arange(1, len(order) + 1)
    last_of_equals = torch.cat([ordered[1:] != ordered[:-1], torch.tensor([True])])
    good = torch.nonzero((shares >= wanted) & last_of_equals).flatten()
    return float(ordered[good[-1]]) if len(good) else None
