"""How two versions of tasks differ."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from pear_store.format.checkpoint import Task
from pear_store.format.digest import Digest
from pear_store.format.record import Matrix
from pear_store.local.references import Version

Change = Literal["equal", "scale", "changed", "added", "removed"]
"""What became of a position; scale: the same tensors, other scales"""


@dataclass(frozen=True)
class PositionDiff:
    """What two versions use at one position; bytes are those of its adapters' matrices, each distinct one once."""

    position: str
    change: Change
    shared_bytes: int
    a_bytes: int
    b_bytes: int


@dataclass(frozen=True)
class Diff:
    """How two versions differ; bytes are tensor bytes, each tensor once."""

    a: Version
    b: Version
    positions: tuple[PositionDiff, ...]
    fields: tuple[str, ...]
    """The fields of the records that differ, adapters and positions aside"""
    head: Literal["equal", "changed"]
    shared_bytes: int
    only_a_bytes: int
    only_b_bytes: int


def compare(a: Version, b: Version, task_a: Task, task_b: Task) -> Diff:
    sizes = {tensor.digest: tensor.size_bytes for task in (task_a, task_b) for tensor in task.tensors.values()}

    def used(matrix: Matrix, task: Task) -> Iterator[str]:
        """The digests of what a matrix is read from: of a stack, of its own part."""
        for tensor in (matrix.tensor(task.tensors), matrix.scales(task.tensors)):
            if tensor is not None:
                sizes[tensor.digest] = tensor.size_bytes
                yield tensor.digest

    def uses(task: Task) -> dict[str, list[tuple[tuple[str, ...], float]]]:
        """Position -> its branches as the digests of their matrices and their scales."""
        names = {
            name: tuple(sorted({digest for matrix in adapter.matrices for digest in used(matrix, task)}))
            for name, adapter in task.adapters.items()
        }
        return {
            position: [(names[branch.adapter], branch.scale) for branch in branches]
            for position, branches in task.positions.items()
        }

    def size(digests: Iterable[str]) -> int:
        return sum(sizes[Digest(digest)] for digest in set(digests))

    left, right = uses(task_a), uses(task_b)
    positions = []
    for position in sorted({*left, *right}):
        one, two = left.get(position), right.get(position)
        digests_a, digests_b = ({d for names, _ in side or () for d in names} for side in (one, two))
        change: Change = "added" if one is None else "removed" if two is None else "equal" if one == two else "changed"
        if one and two and one != two and [names for names, _ in one] == [names for names, _ in two]:
            change = "scale"
        positions.append(PositionDiff(position, change, size(digests_a & digests_b), size(digests_a), size(digests_b)))
    fields = [
        key
        for key in sorted({*task_a.record, *task_b.record} - {"adapters", "positions", "head"})
        if task_a.record.get(key) != task_b.record.get(key)
    ]
    heads = (task_a.record["head"], task_b.record["head"])
    all_a, all_b = set(task_a.tensors), set(task_b.tensors)
    return Diff(
        a, b, tuple(positions), tuple(fields), "equal" if heads[0] == heads[1] else "changed",
        size(all_a & all_b), size(all_a - all_b), size(all_b - all_a),
    )  # fmt: skip
