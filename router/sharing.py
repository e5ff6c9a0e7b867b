"""Plans forwards in which work that rows have in common is done once.

A row is an image and a task. Two tasks agree up to a level of the backbone if all their branches before it are equal.
Rows of one image are one row as long as their tasks agree. So a forward starts with few rows, and grows at the inputs
of blocks where tasks stop agreeing. It is a walk, level by level, through a trie of tasks.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Walk:
    """The way of a batch through the levels of a backbone. All arrays are int64."""

    start: Ints
    """The image of each row at level 0."""
    grow: dict[int, Ints]
    """Level -> for each row from this level on, the row of the level before that it continues."""
    units: list[Ints]
    """For each level, the task of each equal run of rows."""
    end: Ints
    """For each requested row, the last level's row that holds its result."""


def plan(images: Ints, tasks: Ints, branches: Sequence[Sequence[Hashable]]) -> Walk:
    """Plans the walk of rows, each an image and a task.

    Args:
        images: each row's image, int64 [row].
        tasks: each row's task, as an index into `branches`, int64 [row].
        branches: for each task a value per level, equal if two tasks add the same there. There is at least one level.
    """
    same = _prefixes(branches)
    if len(np.unique(images)) == len(images):  # rows share nothing: one level, with each task's rows side by side
        same = same[:, -1:]
    start, end = images, np.arange(len(images))
    grow: dict[int, Ints] = {}
    units: list[Ints] = []
    width = int(images.max()) + 1
    parted = 0
    for level, prefix in enumerate(same.T):
        apart = len(np.unique(prefix[tasks]))
        if apart == parted:  # no tasks stop agreeing here
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
    """A walk that shares nothing, padded to a power of two with rows of no task. Compiled graphs need such shapes."""
    more = (1 << (len(images) - 1).bit_length()) - len(images)
    start = np.concatenate([images, np.repeat(images[:1], more)])
    return Walk(start, {}, [np.concatenate([tasks, np.full(more, -1)])], np.arange(len(images)))


def _prefixes(branches: Sequence[Sequence[Hashable]]) -> Ints:
    """Numbers that are equal if tasks agree up to and at a level, int64 [task, level]."""
    known: dict[Hashable, int] = {}
    found = np.zeros((len(branches), len(branches[0])), np.int64)
    for task, levels in enumerate(branches):
        prefix = -1
        for level, added in enumerate(levels):
            prefix = known.setdefault((level, prefix, added), len(known))
            found[task, level] = prefix
    return found


def by_level(branches: Mapping[str, Hashable], levels: Mapping[str, int], count: int) -> list[Hashable]:
    """What a task adds at each of `count` levels, in the form of :func:`plan`.

    Args:
        branches: position -> what the task adds there.
        levels: position -> its level.
    """
    added: list[list[Hashable]] = [[] for _ in range(count)]
    for position in sorted(branches):
        added[levels[position]].append((position, branches[position]))
    return [tuple(one) for one in added]
