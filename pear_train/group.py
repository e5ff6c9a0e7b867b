"""A step of several runs at once: one batch of each, one forward of the backbone, gradients for each of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pear_train.choices import Activation
from pear_train.run import TaskRun
from router import PositionWeights


@dataclass(frozen=True)
class Batch:
    """What a step of one run needs: its images, or for a run without adapters their features."""

    rows: Tensor
    images: Tensor | None
    features: Tensor | None


def next_batch(run: TaskRun) -> Batch:
    """The batch of a run's next step."""
    rows = run.next_rows()
    if run.adapters.branches:
        return Batch(rows, run.images(rows), None)
    return Batch(rows, None, run.features(run.train_pixels, rows))


def batch_key(run: TaskRun) -> tuple[Any, ...]:
    """Runs of one key can step together."""
    return (bool(run.adapters.branches), run.preprocess["input_size"], run.config.activation, str(run.autocast))


def step_together(group: Sequence[tuple[TaskRun, Batch]]) -> None:
    """Gradients of one batch of each run; all are of one key, on one backbone."""
    for run, _ in group:
        run.before_step()
    run, batch = group[0]
    parts: Sequence[Tensor | None]
    if batch.features is not None:
        parts = [other.features for _, other in group]
    elif len(group) == 1:
        assert batch.images is not None
        parts = [run.adapted.features(batch.images, run.step_weights(), run.autocast)]
    else:
        parts = mixed_features(group)
    losses = []
    for (run, batch), part in zip(group, parts, strict=True):
        assert part is not None
        losses.append(run.loss(part, batch.rows))
    torch.stack(losses).sum().backward()


def mixed_features(group: Sequence[tuple[TaskRun, Batch]]) -> list[Tensor]:
    """Features of each run's batch from one forward; shorter batches are filled up with rows that do not count."""
    images = [batch.images for _, batch in group if batch.images is not None]
    longest = max(map(len, images))
    filled = torch.cat([torch.cat([i, i[:1].expand(longest - len(i), *i.shape[1:])]) for i in images])
    first = group[0][0]
    weights = stack_weights([run.step_weights() for run, _ in group], first.adapted.widths, first.config.activation)
    features = first.adapted.features(filled, weights, first.autocast)
    return [part[: len(i)] for part, i in zip(features.view(len(group), longest, -1), images, strict=True)]


def stack_weights(
    weights: Sequence[dict[str, PositionWeights]], widths: dict[str, tuple[int, int]], activation: Activation
) -> dict[str, PositionWeights]:
    """What each position adds to equal runs of rows, one a task: `down` [task, d_in, rank], `up` [task, rank, d_out].

    Ranks are filled up with zeros, which add nothing whatever the activation, and have no gradient to give.
    """
    stacked = {}
    for position in dict.fromkeys(position for added in weights for position in added):
        rank = max(added[position].down.shape[1] for added in weights if position in added)
        d_in, d_out = widths[position]
        downs, ups = [], []
        for added in weights:
            if position in added:
                missing = rank - added[position].down.shape[1]
                downs.append(F.pad(added[position].down, (0, missing)))
                ups.append(F.pad(added[position].up, (0, 0, 0, missing)))
            else:
                like = next(w[position].down for w in weights if position in w)
                downs.append(like.new_zeros(d_in, rank))
                ups.append(like.new_zeros(rank, d_out))
        stacked[position] = PositionWeights(torch.stack(downs), torch.stack(ups), activation)
    return stacked
