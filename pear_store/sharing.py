"""Counts what versions share and what that saves, by the tensors that each version names (local/uses.py)."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pear_store.local.references import Version
from pear_store.local.uses import Uses

Numbered = tuple[str, int]
"""A version: its task's name and its number"""


@dataclass(frozen=True)
class Stage:
    """A store right after a version was added.

    Args:
        time_ns: when that was, in nanoseconds since the epoch.
        versions: how many there were.
        logical_bytes: tensor bytes of all versions.
        unique_bytes: the same, each distinct tensor counted once.
    """

    time_ns: int
    versions: int
    logical_bytes: int
    unique_bytes: int


@dataclass(frozen=True)
class Neighbour:
    """A task that shares tensors with a version of another task, and the bytes of those tensors."""

    task: str
    shared_bytes: int


@dataclass(frozen=True)
class Shared:
    """How much of a version other tasks have, too.

    Args:
        shared_bytes: of the version's tensors, those that some other task names.
        size_bytes: all of the version's distinct tensors.
        neighbours: these other tasks. Those that share most come first.
    """

    shared_bytes: int
    size_bytes: int
    neighbours: tuple[Neighbour, ...]


@dataclass(frozen=True)
class Group:
    """Tensors that exactly these tasks name.

    Args:
        tasks: the tasks' places in the list that :func:`groups` was given.
        tensors: how many tensors.
        size_bytes: their bytes, each counted once.
    """

    tasks: tuple[int, ...]
    tensors: int
    size_bytes: int

    @property
    def saved_bytes(self) -> int:
        return self.size_bytes * (len(self.tasks) - 1)


def new_bytes(uses: Uses) -> dict[Numbered, int]:
    """The bytes of each version that no older version has. Their sum is what the store's tensors take."""
    found: dict[Numbered, int] = {}
    seen: set[int] = set()
    for use in uses.versions:
        fresh = set(use.tensors) - seen
        seen |= fresh
        found[use.version.task, use.version.version] = sum(map(uses.size_bytes.__getitem__, fresh))
    return found


def growth(uses: Uses, most: int = 200) -> list[Stage]:
    """How the store grew, by the versions that are there now: at most `most` stages, the last one included."""
    stages: list[Stage] = []
    logical = unique = 0
    new = new_bytes(uses)
    step = max(1, -(-len(uses.versions) // most))
    for count, use in enumerate(uses.versions, 1):
        logical += use.version.size_bytes
        unique += new[use.version.task, use.version.version]
        if count % step == 0 or count == len(uses.versions):
            stages.append(Stage(use.version.time_ns, count, logical, unique))
    return stages


def shared_with_others(uses: Uses, version: Version) -> Shared:
    """What a version shares with any version of other tasks."""
    own: set[int] = set()
    by_task: dict[str, set[int]] = {}
    for use in uses.versions:
        if (use.version.task, use.version.version) == (version.task, version.version):
            own = set(use.tensors)
    for use in uses.versions:
        if use.version.task != version.task and not own.isdisjoint(use.tensors):
            by_task.setdefault(use.version.task, set()).update(own.intersection(use.tensors))

    def size(tensors: Iterable[int]) -> int:
        return sum(map(uses.size_bytes.__getitem__, tensors))

    neighbours = [Neighbour(task, size(tensors)) for task, tensors in by_task.items()]
    neighbours.sort(key=lambda one: (-one.shared_bytes, one.task))
    return Shared(size(set().union(*by_task.values())), size(own), tuple(neighbours))


def groups(tensors: Sequence[Sequence[int]], size_bytes: Mapping[int, int]) -> list[Group]:
    """Groups tensors by the tasks that name them. Groups that save most come first.

    Args:
        tensors: for each task, the numbers of its tensors.
        size_bytes: the bytes of each tensor, by number.
    """
    named: dict[int, list[int]] = {}
    for place, numbers in enumerate(tensors):
        for number in set(numbers):
            named.setdefault(number, []).append(place)
    counts: Counter[tuple[int, ...]] = Counter()
    sizes: Counter[tuple[int, ...]] = Counter()
    for number, places in named.items():
        counts[key := tuple(places)] += 1
        sizes[key] += size_bytes[number]
    found = [Group(key, counts[key], sizes[key]) for key in counts]
    return sorted(found, key=lambda group: (-group.saved_bytes, -group.size_bytes, group.tasks))
