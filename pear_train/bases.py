"""Common bases: two matrices at each position that many tasks use. Each task has cores of its own between them.

    y = f(x) + scale · ((x · D) · C) · U        D [d_in, R] and U [R, d_out]: of all tasks; C [R, R]: of this one

A checkpoint of bases is a task without a head. Its adapters are D and U at scale 0, so as a task it adds nothing.
pear_train/make_bases.py makes one.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from pear_store import Task
from pear_store.format.record import entry_names
from pear_train.adapters import AdapterSet, FrozenAdapter, TrainedBranch
from pear_train.bank import stored_adapter, widths_of
from pear_train.config import OPTIONS, TrainConfig
from pear_train.errors import ConfigError
from pear_train.identity import BASES
from router import AdaptedBackbone


def is_bases(task: Task) -> bool:
    return bool(task.record["training"].get("method") == BASES)


def check_bases(bases: Task, adapted: AdaptedBackbone, config: TrainConfig) -> None:
    """Checks all that can be checked before a position is attached.

    Raises:
        ConfigError: `bases` is an ordinary task, is for another backbone, or does not fit the options.
    """
    name = f"bases {bases.name!r}"
    if not is_bases(bases):
        raise ConfigError(f"{name}: expected common bases, found a task: give a checkpoint that --make-bases wrote")
    if not bases.positions:
        raise ConfigError(f"{name}: have nothing at any position: give a checkpoint that --make-bases wrote")
    if bases.backbone_digest != adapted.backbone.digest:
        raise ConfigError(
            f"{name}: expected bases of {adapted.backbone.name} {adapted.backbone.digest[:19]}…, "
            f"found ones of {bases.backbone_model} {bases.backbone_digest[:19]}…: make bases with this backbone"
        )
    if config.method != "pear":
        raise ConfigError(f"{name}: expected method 'pear', found {config.method!r}, which cannot use common bases")
    if config.activation != bases.activation:
        raise ConfigError(f"{name}: its activation is {bases.activation!r}: train with it, not {config.activation!r}")
    if config.own_bytes is not None and config.knowledge not in ("fold", "none"):
        raise ConfigError(f"{name}: expected knowledge 'fold' or 'none' on common bases, found {config.knowledge!r}")
    if config.rank != OPTIONS["rank"].default:
        check_rank(bases, config.rank)


def check_rank(bases: Task, rank: int) -> None:
    """Raises a ConfigError if the bases are of another rank than was asked for. Other tasks are not judged here."""
    if not is_bases(bases):
        return
    ranks = {bases.adapters[branches[0].adapter].rank for branches in bases.positions.values()}
    if ranks and ranks != {rank}:
        shown = " and ".join(map(str, sorted(ranks)))
        raise ConfigError(
            f"bases {bases.name!r}: expected rank {shown}, found {rank}: leave rank out, or choose other bases"
        )


def bases_at(bases: Task, adapted: AdaptedBackbone, positions: Sequence[str]) -> dict[str, FrozenAdapter]:
    """Each position's D and U, as they will be written again.

    Raises:
        ConfigError: the bases lack a position, two positions use one adapter, or widths differ from the backbone's.
    """
    name = f"bases {bases.name!r}"
    found: dict[str, FrozenAdapter] = {}
    owners: dict[str, str] = {}
    for position in positions:
        branches = bases.positions.get(position, [])
        if not branches:
            raise ConfigError(
                f"{name}: have nothing at {position!r}: leave positions out, or choose some that they have"
            )
        adapter = branches[0].adapter
        if len(branches) > 1 or bases.adapters[adapter].core is not None:
            raise ConfigError(
                f"{name}: expected one adapter without a core at {position!r}: give a checkpoint that --make-bases "
                "wrote"
            )
        if (owner := owners.setdefault(adapter, position)) != position:  # a task on a stack keeps one core a place
            raise ConfigError(
                f"{name}: expected an adapter of its own at {position!r}, found {adapter!r} of {owner!r}: give a "
                "checkpoint that --make-bases wrote"
            )
        if (widths := widths_of(bases, adapter)) != adapted.widths[position]:
            raise ConfigError(
                f"{name}: expected widths {adapted.widths[position]} at {position!r}, found {widths}: "
                "make bases with this backbone"
            )
        frozen, (entry, place) = stored_adapter(bases, adapter, "bases"), bases.entry(adapter)
        if place is not None:  # a task on these bases names the same stacks
            stack = {name: bases.tensors[name] for _, name in entry_names(entry)}
            frozen = replace(frozen, entry=entry, tensors=stack, place=place)
        found[position] = frozen
    return found


def stand_on(adapters: AdapterSet, bases: dict[str, FrozenAdapter], scale: float, device: torch.device) -> None:
    """Puts the common bases, with a core of zeros, before each position's own branches."""
    adapters.on_bases = True
    own, adapters.branches = adapters.branches, {}
    for i, (position, frozen) in enumerate(bases.items()):  # in forward order
        adapters.frozen[f"b{i}"] = frozen.to(device)
        core = nn.Parameter(torch.zeros(frozen.down.shape[1], frozen.up.shape[0], device=device))
        adapters.branches[position] = [TrainedBranch(f"b{i}", scale, core), *own.get(position, [])]


def share_bases(adapters: AdapterSet, others: AdapterSet) -> None:
    """Gives `adapters` the tensors of `others` where their bases are equal. A step of both then multiplies once."""
    if not (adapters.on_bases and others.on_bases):
        return
    for position, (branch, *_) in adapters.branches.items():
        if position in others.branches:
            theirs = others.frozen[others.branches[position][0].adapter]
            if bases_key(theirs) == bases_key(adapters.frozen[branch.adapter]):
                adapters.frozen[branch.adapter] = theirs


def bases_key(bases: FrozenAdapter) -> tuple[tuple[str, ...], int | None]:
    """A key that is equal for equal bases: the digests of their tensors, and their place in a stack."""
    return tuple(tensor.digest for tensor in bases.tensors.values()), bases.place
