"""The start of a run: its positions, and the adapters there: new ones, those of a base set, or common bases."""

import torch

from pear_store import Task
from pear_train.adapters import AdapterSet, TrainedBranch
from pear_train.base import BaseAdapters, base_adapters
from pear_train.bases import bases_at, check_bases, is_bases, stand_on
from pear_train.config import TrainConfig
from pear_train.dtypes import code_bits, written_bytes
from pear_train.errors import ConfigError
from router import AdaptedBackbone, BackboneError, choose_positions

DEFAULTS = ("qkv,mlp", "blocks", "whole", "pointwise")
"""Default positions; the first that the backbone has and runs is taken. In turn they suit: transformers whose qkv runs,
other transformers, convolutional networks with residual blocks, other convolutional networks."""


def attached(adapted: AdaptedBackbone, choice: str) -> list[str]:
    """Attaches the positions of a choice and returns them. `auto` takes the first of DEFAULTS that fits.

    Raises:
        BackboneError: a position does not exist or does not run, or no default fits.
    """
    reason = ""
    for one in DEFAULTS if choice == "auto" else (choice,):
        try:
            positions = choose_positions(adapted.backbone.module, one)
            adapted.attach(positions)
            return positions
        except BackboneError as error:
            if choice != "auto":
                raise
            reason = str(error)
    raise BackboneError(
        f"backbone {adapted.backbone.name} has none of the default positions: name its modules with --positions, or "
        f"take a backbone of docs/backbones.md. The last default failed: {reason}"
    )


def start_adapters(
    config: TrainConfig,
    adapted: AdaptedBackbone,
    base: Task | None,
    generator: torch.Generator,
    bases: Task | None = None,
) -> AdapterSet:
    """The adapters of a run before its first step, on the backbone's device.

    Raises:
        ConfigError: the base set or the common bases do not fit, nothing is left to train, or the rank is too high.
    """
    if base is not None and is_bases(base):
        raise ConfigError(f"base {base.name!r}: expected a base set, found common bases: give them as --bases")
    if bases is not None:
        if base is not None:
            raise ConfigError(f"bases {bases.name!r}: cannot be used with base {base.name!r}: choose one of them")
        return _start_on_bases(config, adapted, bases, generator)
    positions = [] if config.method == "linear" else attached(adapted, config.positions)
    given = None if base is None else base_adapters(base, adapted, positions, config)
    trained = [position for position in positions if given is None or position not in given.frozen]
    if positions and not trained:
        raise ConfigError(
            f"positions {config.positions!r}: all lie in the {config.base_blocks} blocks that use the base set frozen: "
            "lower base blocks"
        )
    widths = {position: adapted.widths[position] for position in trained}
    for position, sides in widths.items() if config.method == "pear" else ():
        if config.rank > min(sides):  # a fold needs as many directions as the rank
            raise ConfigError(f"rank {config.rank}: expected at most {min(sides)}, the smaller side at {position}")
    common, bits = config.down == "common", (code_bits(config.tensor_dtype), code_bits(config.core_dtype))
    adapters = AdapterSet(widths, config.rank, config.activation, config.scale, generator, common, *bits)
    if given is not None:
        _start_from(given, adapters, positions, config.scale, adapted.device)
    return adapters.to(adapted.device)


@torch.no_grad()
def _start_from(
    given: BaseAdapters, adapters: AdapterSet, positions: list[str], scale: float, device: torch.device
) -> None:
    """Puts a base set's adapters in place: frozen in the lowest blocks, as starting values in the others."""
    for position, (down, up) in given.start.items():
        adapters.down[adapters.own[position]].copy_(down)
        adapters.up[adapters.own[position]].copy_(up / scale)
    adapters.frozen.update({name: adapter.to(device) for name, adapter in given.adapters.items()})
    own = adapters.branches
    adapters.branches = {}
    for position in positions:  # in forward order
        frozen = given.frozen.get(position)
        adapters.branches[position] = (
            own[position] if frozen is None else [TrainedBranch(branch.adapter, branch.scale) for branch in frozen]
        )


def _start_on_bases(
    config: TrainConfig, adapted: AdaptedBackbone, bases: Task, generator: torch.Generator
) -> AdapterSet:
    """A core of zeros in the common bases at every position, with an own adapter beside it if `own_rank` is above 0."""
    check_bases(bases, adapted, config)
    chosen = config.positions if config.positions != "auto" else ",".join(bases.positions)
    positions = attached(adapted, chosen)
    found = bases_at(bases, adapted, positions)
    widths = {position: adapted.widths[position] for position in positions if config.own_rank}
    _check_own(config, widths)
    common, bits = config.down == "common", (code_bits(config.tensor_dtype), code_bits(config.core_dtype))
    adapters = AdapterSet(widths, config.own_rank, config.activation, config.scale, generator, common, *bits)
    stand_on(adapters, found, config.scale, adapted.device)
    return adapters.to(adapted.device)


def _check_own(config: TrainConfig, widths: dict[str, tuple[int, int]]) -> None:
    """Checks the adapters that a task on common bases has of its own.

    Raises:
        ConfigError: their rank is too high, or not one of them fits into `own_bytes`.
    """
    rank, dtype = config.own_rank, config.tensor_dtype
    for position, sides in widths.items():
        if rank > min(sides):
            raise ConfigError(f"own rank {rank}: expected at most {min(sides)}, the smaller side at {position}")
    sizes = [
        written_bytes((d_in, rank), dtype, 1) + written_bytes((rank, d_out), dtype, 0)
        for d_in, d_out in widths.values()
    ]
    if config.own_bytes and config.own_bytes < min(sizes):
        raise ConfigError(
            f"own bytes {config.own_bytes:,}: expected at least {min(sizes):,}, which the smallest adapter of rank "
            f"{rank} takes in {dtype}: give more bytes, or a smaller own rank"
        )
