"""A bank: stored adapters that a new task may borrow, frozen and bit-identical."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pear_store import Task
from pear_store.format.codes import matrix_values, up_values
from pear_store.format.record import without_core
from pear_train.adapters import AdapterSet, FrozenAdapter, TrainedBranch
from pear_train.choices import Activation, Role
from router import AdaptedBackbone


class Bank:
    """The adapters of stored tasks, by the positions that use them.

    The bank skips tasks of another backbone or activation. It also skips adapters at positions that this run does not
    have, and adapters of other widths.

    Args:
        cores: whether a borrower gets a new core. If so, adapters are offered without the core of the stored task.
    """

    def __init__(self, tasks: Sequence[Task], adapted: AdaptedBackbone, activation: Activation, cores: bool) -> None:
        self.cores = cores
        self.adapters: dict[str, FrozenAdapter] = {}
        """Every distinct adapter, by name."""
        self._at: dict[str, dict[str, None]] = {}
        names: dict[tuple[str, ...], str] = {}
        for task in tasks:
            if task.backbone_digest != adapted.backbone.digest or task.activation != activation:
                continue
            for position, branches in task.positions.items():
                for branch in branches:
                    if widths_of(task, branch.adapter) != adapted.widths.get(position):
                        continue
                    frozen = stored_adapter(task, branch.adapter, "bank", with_core=not cores)
                    key = tuple(tensor.digest for tensor in frozen.tensors.values())
                    name = names.setdefault(key, f"b{len(names)}")
                    self.adapters.setdefault(name, frozen)
                    self._at.setdefault(position, {})[name] = None

    def __len__(self) -> int:
        return len(self.adapters)

    def choose(
        self,
        positions: Iterable[str],
        adapters: AdapterSet,
        losses: Callable[[], Iterable[Callable[[], Tensor]]],
        count: int,
    ) -> dict[str, list[str]]:
        """Chooses for each position the `count` stored adapters that would lower this task's loss most steeply.

            scale:  |mean over batches of ∂L/∂s|² / |down · up|²       s: the scale of a branch added at s = 0
            core:   |mean over batches of ∂L/∂C|²                      C: the core of one added at C = 0, its down and
                                                                       up made orthonormal

        This is the squared slope of the loss along the steepest branch of norm 1 that the adapter allows. While slopes
        are measured, all given positions are empty. Candidates are the adapters that stored tasks use at a position.

        Args:
            adapters: the task's own. Their branches change while slopes are measured, and are put back afterwards.
            losses: for every batch, a function that computes its mean loss from `adapters`.
        Returns:
            position -> names in `self.adapters`, the steepest first.
        """
        candidates = {p: list(self._at.get(p, ())) for p in positions}
        before = {p: adapters.branches[p] for p in candidates}
        device = next(iter(adapters.up.values())).device
        units = {name: self._unit(self.adapters[name]).to(device) for names in candidates.values() for name in names}
        moved: dict[tuple[str, str], nn.Parameter] = {}
        for p, names in candidates.items():
            adapters.branches[p] = []
            for name in names:
                rank = units[name].down.shape[1], units[name].up.shape[0]
                free = nn.Parameter(torch.zeros(rank if self.cores else (), device=device))
                moved[p, name] = free
                branch = TrainedBranch(name, 1.0, free) if self.cores else TrainedBranch(name, free)
                adapters.branches[p].append(branch)
        slopes = {key: torch.zeros_like(free) for key, free in moved.items()}
        try:
            adapters.frozen.update(units)
            if moved:
                for loss in losses():
                    gradients = torch.autograd.grad(loss(), list(moved.values()))
                    for key, gradient in zip(moved, gradients, strict=True):
                        slopes[key] += gradient
        finally:
            adapters.branches.update(before)
            for name in units:
                adapters.frozen.pop(name, None)
        chosen = {}
        for p, names in candidates.items():
            steepness = {name: float(slopes[p, name].square().sum()) for name in names}
            chosen[p] = sorted(names, key=steepness.__getitem__, reverse=True)[:count]
        return chosen

    def _unit(self, adapter: FrozenAdapter) -> FrozenAdapter:
        """The adapter scaled to norm 1. With cores, `down` and `up` are made orthonormal instead."""
        down, up = adapter.down, adapter.up
        if self.cores:
            return FrozenAdapter("bank", torch.linalg.qr(down).Q, torch.linalg.qr(up.t()).Q.t().contiguous())
        norm = float(((down.t() @ down) * (up @ up.t())).sum()) ** 0.5
        return FrozenAdapter("bank", down, up / max(norm, 1e-12))


def widths_of(task: Task, adapter: str) -> tuple[int, int]:
    """(d_in, d_out) of a stored adapter."""
    return task.adapters[adapter].shape


def stored_adapter(task: Task, name: str, role: Role, with_core: bool = True) -> FrozenAdapter:
    """An adapter of a stored task, to be written again tensor for tensor.

    Args:
        with_core: whether it keeps its core.
    Returns:
        The adapter. One of a stack comes alone, without the others.
    """
    entry, adapter = dict(task.entry(name)[0]), task.adapters[name]
    entry.pop("stack", None)
    if adapter.core is not None and not with_core:
        entry, adapter = without_core(entry), replace(adapter, core=None)
    values = matrix_values(adapter.down, task.tensors), up_values(adapter, task.tensors)
    down, up = (torch.from_numpy(one.astype("f4")) for one in values)
    used = {}
    for matrix in adapter.matrices:
        used[matrix.name] = matrix.tensor(task.tensors)
        if matrix.scale is not None and (scales := matrix.scales(task.tensors)) is not None:
            used[matrix.scale] = scales
    return FrozenAdapter(role, down, up, None, entry, dict(sorted(used.items())))
