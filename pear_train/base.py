"""What a base set gives a new task: frozen adapters below, and a start above. pear_train/make_base.py makes one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pear_store import Branch, Task
from pear_store.format.codes import matrix_values, up_values
from pear_train.adapters import FrozenAdapter
from pear_train.bank import stored_adapter, widths_of
from pear_train.config import TrainConfig
from pear_train.errors import ConfigError
from router import AdaptedBackbone


@dataclass(frozen=True, eq=False)
class BaseAdapters:
    """What a base set gives a new task."""

    frozen: Mapping[str, list[Branch]]
    """Positions that use the base's adapters frozen, with the base's scales."""
    adapters: Mapping[str, FrozenAdapter]
    start: Mapping[str, tuple[Tensor, Tensor]]
    """Where the other positions' adapters start: `down`, and `up` times its scale."""


def base_adapters(base: Task, adapted: AdaptedBackbone, positions: Sequence[str], config: TrainConfig) -> BaseAdapters:
    """Divides a base set at the input of block number `config.base_blocks`.

    Raises:
        ConfigError: the base is for another backbone, or its adapters do not fit the configuration.
    """
    name = f"base {base.name!r}"
    if base.backbone_digest != adapted.backbone.digest:
        raise ConfigError(
            f"{name}: expected a base of {adapted.backbone.name} {adapted.backbone.digest[:19]}…, "
            f"found one of {base.backbone_model} {base.backbone_digest[:19]}…: make a base with this backbone"
        )
    if base.activation != config.activation:
        raise ConfigError(f"{name}: its activation is {base.activation!r}: train with it, not {config.activation!r}")
    if strangers := [p for p in base.positions if p not in positions]:
        raise ConfigError(
            f"{name}: has an adapter at {strangers[0]!r}, which is not among the positions {config.positions!r}: "
            "choose the positions that the base was made with"
        )
    for position, branches in base.positions.items():
        if (found := widths_of(base, branches[0].adapter)) != adapted.widths[position]:
            raise ConfigError(
                f"{name}: expected widths {adapted.widths[position]} at {position!r}, found {found}: "
                "make a base with this backbone"
            )
    level, blocks = adapted.levels.of, len(adapted.levels.blocks)
    if config.base_blocks >= blocks:
        raise ConfigError(
            f"base blocks {config.base_blocks}: expected fewer than {blocks}, "
            f"the blocks of {adapted.backbone.name} at which tasks may part"
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
                f"{name}: found {len(branches)} branch(es) of rank {adapter.rank} at {position!r}: to start there, "
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
