"""Compares two versions, of one task or of two."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from pear_store.format.checkpoint import Task
from pear_store.format.digest import Digest
from pear_store.format.record import Matrix
from pear_store.local.references import Version

Change = Literal["equal", "scale", "changed", "added", "removed"]
"""What became of a position. "scale": it uses the same tensors with other scales"""


@dataclass(frozen=True)
class PositionDiff:
    """How two versions, a and b, differ at one position. Each distinct matrix counts once.

    Args:
        position: a module path of the backbone.
        change: "added" and "removed" are seen from a to b.
        shared_bytes: matrices that both use here.
        a_bytes: all that a uses here, shared ones included.
        b_bytes: all that b uses here, shared ones included.
    """

    position: str
    change: Change
    shared_bytes: int
    a_bytes: int
    b_bytes: int


@dataclass(frozen=True)
class Diff:
    """How two versions, a and b, differ. Bytes are tensor bytes; each distinct tensor counts once.

    A store may hold small tensors as slices of one tensor. Those that are equal count as shared here, too.

    Args:
        positions: every position of either version, by name.
        fields: the records' fields that differ, without adapters, positions and head.
        head: whether the two heads name the same tensors.
        shared_bytes: tensors that both have.
        only_a_bytes: tensors that only a has.
        only_b_bytes: tensors that only b has.
    """

    a: Version
    b: Version
    positions: tuple[PositionDiff, ...]
    fields: tuple[str, ...]
    head: Literal["equal", "changed"]
    shared_bytes: int
    only_a_bytes: int
    only_b_bytes: int


def compare(a: Version, b: Version, task_a: Task, task_b: Task) -> Diff:
    sizes = {tensor.digest: tensor.size_bytes for task in (task_a, task_b) for tensor in task.tensors.values()}

    def used(matrix: Matrix, task: Task) -> Iterator[str]:
        """The digests of what a matrix is read from. Of a stack, that is the matrix's own part."""
        for tensor in (matrix.tensor(task.tensors), matrix.scales(task.tensors)):
            if tensor is not None:
                sizes[tensor.digest] = tensor.size_bytes
                yield tensor.digest

    def uses(task: Task) -> dict[str, list[tuple[tuple[str, ...], float]]]:
        """By position: each branch's digests (of its matrices) and scale."""
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
