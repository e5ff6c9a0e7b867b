"""What rows of a batch have in common is computed once.

A row is an image and a task. Two tasks agree up to a level of the backbone if all their branches before it do; rows
of one image whose tasks agree are one row until they part. So a forward starts with few rows, and grows at the input
of the blocks where tasks part: a trie over tasks, walked level by level.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Walk:
    """How a batch runs through the levels of a backbone."""

    start: Ints
    """The image of each row at level 0."""
    grow: dict[int, Ints]
    """Level -> the row of the level before that each row continues."""
    units: list[Ints]
    """For each level, the task of each equal run of rows."""
    end: Ints
    """The row in which each row that was asked for ends."""


def plan(images: Ints, tasks: Ints, branches: Sequence[Sequence[Hashable]]) -> Walk:
    """The walk of rows, each an image and a task.

    Args:
        images: int64 [row].
        tasks: int64 [row], indices into `branches`.
        branches: for each task, what it adds at each level; equal where two tasks add the same. At least one level.
    """
    same = _prefixes(branches)
    if len(np.unique(images)) == len(images):  # nothing is in common: one level, a task's rows side by side
        same = same[:, -1:]
    start, end = images, np.arange(len(images))
    grow: dict[int, Ints] = {}
    units: list[Ints] = []
    width = int(images.max()) + 1
    parted = 0
    for level, prefix in enumerate(same.T):
        apart = len(np.unique(prefix[tasks]))
        if apart == parted:  # nobody parts here
            units.append(units[-1])
            continue
        parted = apart
        _, first, inverse = np.unique(prefix[tasks] * width + images, return_index=True, return_inverse=True)
        if level == 0:
            start = images[first]
        else:
            grow[level] = end[first]
        end = inverse.reshape(-1)
        counts = np.unique(prefix[tasks[first]], return_counts=True)[1]
        units.append(tasks[first][:: np.gcd.reduce(counts)])
    return Walk(start, grow, units + units[-1:] * (len(branches[0]) - len(units)), end)


def bucket(images: Ints, tasks: Ints) -> Walk:
    """The walk that shares nothing, filled up to a power of two with rows of no task: shapes for compiled graphs."""
    more = (1 << (len(images) - 1).bit_length()) - len(images)
    start = np.concatenate([images, np.repeat(images[:1], more)])
    return Walk(start, {}, [np.concatenate([tasks, np.full(more, -1)])], np.arange(len(images)))


def _prefixes(branches: Sequence[Sequence[Hashable]]) -> Ints:
    """int64 [task, level]: equal numbers where tasks agree up to and at a level."""
    known: dict[Hashable, int] = {}
    found = np.zeros((len(branches), len(branches[0])), np.int64)
    for task, levels in enumerate(branches):
        prefix = -1
        for level, added in enumerate(levels):
            prefix = known.setdefault((level, prefix, added), len(known))
            found[task, level] = prefix
    return found


def by_level(branches: Mapping[str, Hashable], levels: Mapping[str, int], count: int) -> list[Hashable]:
    """What a task adds at each of `count` levels, as :func:`plan` takes it, from what it adds at each position."""
    added: list[list[Hashable]] = [[] for _ in range(count)]
    for position in sorted(branches):
        added[levels[position]].append((position, branches[position]))
    return [tuple(one) for one in added]
