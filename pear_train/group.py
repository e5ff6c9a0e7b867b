"""A step of several runs at once: one batch of each run, one forward of the backbone, separate gradients."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pear_train.run import TaskRun
from router import PositionWeights


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of one run: row numbers, and either their images or, for a run without adapters, their features."""

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
    """Runs of equal keys can step together."""
    return (bool(run.adapters.branches), run.preprocess["input_size"], run.config.activation, str(run.autocast))


def step_together(group: Sequence[tuple[TaskRun, Batch]]) -> None:
    """Computes the gradients of one batch of each run. All runs have equal keys and one backbone."""
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
    """Features of each run's batch, [row, d] each, from one forward. Shorter batches are padded with rows that are
    then dropped."""
    images = [batch.images for _, batch in group if batch.images is not None]
    longest = max(map(len, images))
    filled = torch.cat([torch.cat([i, i[:1].expand(longest - len(i), *i.shape[1:])]) for i in images])
    first = group[0][0]
    weights = stack_weights([run.step_weights() for run, _ in group])
    features = first.adapted.features(filled, weights, first.autocast)
    return [part[: len(i)] for part, i in zip(features.view(len(group), longest, -1), images, strict=True)]


def stack_weights(weights: Sequence[dict[str, PositionWeights]]) -> dict[str, PositionWeights]:
    """What each position adds, for rows that come in equal runs, one run per task. All tasks have one activation.

    Common bases stay common, with the tasks' cores [task, R, R]. All else becomes `down` [task, d_in, rank] and `up`
    [task, rank, d_out].
    """
    stacked = {}
    for position in dict.fromkeys(position for added in weights for position in added):
        every = [added.get(position) for added in weights]
        cored = [added for added in every if added is not None and added.core is not None]
        known = [added.core for added in cored if added.core is not None]
        if cored and all(one.down is cored[0].down and one.up is cored[0].up for one in cored):
            none = torch.zeros_like(known[0])
            cores = [none if one is None or one.core is None else one.core for one in every]
            beside = [one if one is None or one.core is None else one.beside for one in every]
            stacked[position] = replace(cored[0], core=torch.stack(cores), beside=_stacked(beside))
        elif (plain := _stacked([one and _multiplied(one) for one in every])) is not None:
            stacked[position] = plain
    return stacked


def _multiplied(added: PositionWeights) -> PositionWeights:
    """The same weights as one pair. A core is multiplied into `up`; `beside` is concatenated along the rank."""
    up = added.up if added.core is None else added.core @ added.up
    if added.beside is None:
        return PositionWeights(added.down, up, added.activation)
    beside = _multiplied(added.beside)
    return PositionWeights(torch.cat([added.down, beside.down], 1), torch.cat([up, beside.up]), added.activation)


def _stacked(every: Sequence[PositionWeights | None]) -> PositionWeights | None:
    """Stacks the pairs of all tasks. A task that adds nothing is None. The result is None if no task adds anything.

    Ranks are padded with zeros. With every activation they add nothing, and they get no gradient.
    """
    there = [added for added in every if added is not None]
    if not there:
        return None
    rank, like = max(added.down.shape[1] for added in there), there[0]
    downs, ups = [], []
    for added in every:
        down, up = (like.down[:, :0], like.up[:0]) if added is None else (added.down, added.up)
        missing = rank - down.shape[1]
        downs.append(F.pad(down, (0, missing)))
        ups.append(F.pad(up, (0, 0, 0, missing)))
    return PositionWeights(torch.stack(downs), torch.stack(ups), like.activation)
