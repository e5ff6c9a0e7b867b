"""Stored adapters for new tasks: a bank to borrow from, and a base set to start from. Frozen, bit-identical."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pear_store import Branch, Task
from pear_store.format.codes import matrix_values, up_values
from pear_store.format.record import without_core
from pear_train.adapters import AdapterSet, FrozenAdapter, TrainedBranch
from pear_train.config import TrainConfig
from pear_train.errors import ConfigError
from router import AdaptedBackbone


class Bank:
    """The adapters of stored tasks, by the positions that use them.

    Tasks of another backbone or activation are passed over, and so is what stands at other positions than this run's,
    or has not their widths: it means nothing here.

    Args:
        cores: adapters are borrowed with a new core: offer them without the one that a stored task has for them.
    """

    def __init__(self, tasks: Sequence[Task], adapted: AdaptedBackbone, activation: str, cores: bool) -> None:
        self.cores = cores
        self.adapters: dict[str, FrozenAdapter] = {}
        """By name: every distinct one."""
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
        """For each position, the `count` stored adapters by which this task's loss would fall most once it is empty.

            scale:  |mean over batches of ∂L/∂s|² / |down · up|²       s: the scale of a branch added at s = 0
            core:   |mean over batches of ∂L/∂C|²                      C: the core of one added at C = 0, its down and
                                                                       up made orthonormal

        the squared slope of the loss along the steepest branch of norm 1 that the adapter allows. Candidates are what
        stored tasks use at that position.

        Args:
            losses: for every batch, what computes its mean loss from `adapters`; its branches are put back afterwards.
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
        """An adapter's directions with norm 1: of all that a core allows, or of its one matrix."""
        down, up = adapter.down, adapter.up
        if self.cores:
            return FrozenAdapter("bank", torch.linalg.qr(down).Q, torch.linalg.qr(up.t()).Q.t().contiguous())
        norm = float(((down.t() @ down) * (up @ up.t())).sum()) ** 0.5
        return FrozenAdapter("bank", down, up / max(norm, 1e-12))


def widths_of(task: Task, adapter: str) -> tuple[int, int]:
    """(d_in, d_out) of a stored adapter."""
    return task.adapters[adapter].shape


def stored_adapter(task: Task, name: str, role: str, with_core: bool = True) -> FrozenAdapter:
    """An adapter of a task as it will be written again, tensor for tensor, with or without its core."""
    entry, adapter = dict(task.record["adapters"][name]), task.adapters[name]
    if adapter.core is not None and not with_core:
        entry, adapter = without_core(entry), replace(adapter, core=None)
    values = matrix_values(adapter.down, task.tensors), up_values(adapter, task.tensors)
    down, up = (torch.from_numpy(one.astype("f4")) for one in values)
    used = sorted({used for matrix in adapter.matrices for used in matrix.names})
    return FrozenAdapter(role, down, up, None, entry, {one: task.tensors[one] for one in used})


@dataclass(frozen=True)
class BaseAdapters:
    """What a base set gives a new task."""

    frozen: Mapping[str, list[Branch]]
    """Positions that use the base's adapters as they are, with its scales."""
    adapters: Mapping[str, FrozenAdapter]
    start: Mapping[str, tuple[Tensor, Tensor]]
    """Where the adapters of the other positions start: down, and up times its scale."""


def base_adapters(base: Task, adapted: AdaptedBackbone, positions: Sequence[str], config: TrainConfig) -> BaseAdapters:
    """Divides a base set at the input of block number `config.base_blocks`.

    Raises:
        ConfigError: it is for another backbone, or its adapters do not fit the configuration.
    """
    name = f"base {base.name!r}"
    if base.backbone_digest != adapted.backbone.digest:
        raise ConfigError(f"{name}: made for {base.backbone_model} {base.backbone_digest[:19]}…: another backbone")
    if base.activation != config.activation:
        raise ConfigError(f"{name}: its activation is {base.activation!r}: train with it, not {config.activation!r}")
    if strangers := [p for p in base.positions if p not in positions]:
        raise ConfigError(f"{name}: has adapters at {strangers[0]!r}: not among the positions {config.positions!r}")
    for position, branches in base.positions.items():
        if (found := widths_of(base, branches[0].adapter)) != adapted.widths[position]:
            raise ConfigError(f"{name}: widths {found} at {position!r}: the backbone's are {adapted.widths[position]}")
    level, blocks = adapted.levels.of, len(adapted.levels.blocks)
    if config.base_blocks >= blocks:
        raise ConfigError(
            f"base blocks {config.base_blocks}: {adapted.backbone.name} has {blocks} blocks at which tasks may part: "
            "expected fewer than that"
        )
    lower = [p for p in positions if level.get(p, 0) <= config.base_blocks]
    frozen = {p: base.positions[p] for p in lower if p in base.positions}
    used = dict.fromkeys(branch.adapter for branches in frozen.values() for branch in branches)
    names = {old: f"s{i}" for i, old in enumerate(used)}
    start = {}
    for position in positions:
        branches = base.positions.get(position, [])
        if position in lower or not branches:
            continue
        adapter = base.adapters[branches[0].adapter]
        if len(branches) > 1 or adapter.rank != config.rank or config.down == "common":
            raise ConfigError(
                f"{name}: {len(branches)} branch(es) of rank {adapter.rank} at {position!r}: to start from it, "
                f"expected one of rank {config.rank} and down 'own'"
            )
        values = matrix_values(adapter.down, base.tensors), up_values(adapter, base.tensors)
        down, up = (torch.tensor(one).float() for one in values)
        start[position] = (down, up * branches[0].scale)
    return BaseAdapters(
        {p: [Branch(names[one.adapter], one.scale) for one in branches] for p, branches in frozen.items()},
        {new: stored_adapter(base, old, "base") for old, new in names.items()},
        start,
    )
