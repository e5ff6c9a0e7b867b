"""Trainable adapter sets, run through the router's own op."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pear_store import RawTensor
from pear_train.choices import Activation, Role
from router import PositionWeights
from router.tensors import fake_quantise


@dataclass
class TrainedBranch:
    """One use of an adapter: its name, a scale that is a number or a trained 0-dim parameter, and maybe a core of this
    position's own, [rank, rank], between its down and up."""

    adapter: str
    scale: float | nn.Parameter
    core: nn.Parameter | None = None


@dataclass(frozen=True, eq=False)
class FrozenAdapter:
    """An adapter that does not train: `down` [d_in, rank] and `up` [rank, d_out], float32, as they will be read back.

    One from a store (role bank, base or bases) is written as it was found: `entry`, with its `tensors`, of a stack the
    whole one; a knowledge checkpoint as float16, or as codes of `bits`.
    """

    role: Role
    down: Tensor
    up: Tensor
    bits: int | None = None
    entry: Mapping[str, Any] | None = None
    tensors: Mapping[str, RawTensor] = field(default_factory=dict)
    place: int | None = None
    """Which of a stack it is."""

    def to(self, device: torch.device) -> "FrozenAdapter":
        return replace(self, down=self.down.to(device), up=self.up.to(device))


class AdapterSet(nn.Module):
    """An adapter at every position to begin with; pruning rewrites `branches`.

    `down` is uniform in ±1/√d_in, `up` zero, so that training starts from the backbone's own function.

    Args:
        widths: position -> (d_in, d_out), in forward order.
        common_down: freeze `down` at values that depend on the position and its shape only.
        bits, core_bits: train matrices, cores as codes of so many bits, rounded in each step, gradients passed straight
            through; None: as is.
    Source: straight-through rounding, Bengio et al., arXiv:1308.3432; low-bit adapters, Jie et al., arXiv:2307.16867.
    """

    def __init__(
        self,
        widths: Mapping[str, tuple[int, int]],
        rank: int,
        activation: Activation,
        scale: float,
        generator: torch.Generator,
        common_down: bool = False,
        bits: int | None = None,
        core_bits: int | None = None,
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.bits, self.core_bits = bits, core_bits
        self.on_bases = False
        """The first branch of each position is a core in common bases."""
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        self.frozen: dict[str, FrozenAdapter] = {}
        self.own: dict[str, str] = {}
        """The adapter that each position had of its own."""
        self.branches: dict[str, list[TrainedBranch]] = {}
        for i, (position, (d_in, d_out)) in enumerate(widths.items()):
            bound = 1 / math.sqrt(d_in)
            down = torch.rand(d_in, rank, generator=generator) * 2 * bound - bound
            if common_down:
                down = make_common_down(position, d_in, rank)
            self.down[f"a{i}"] = nn.Parameter(down, requires_grad=not common_down)
            self.up[f"a{i}"] = nn.Parameter(torch.zeros(rank, d_out))
            self.own[position] = f"a{i}"
            self.branches[position] = [TrainedBranch(f"a{i}", scale)]

    def matrices(self, adapter: str) -> tuple[Tensor, Tensor]:
        """(down, up) of a trained or frozen adapter, as they are kept."""
        if adapter in self.frozen:
            frozen = self.frozen[adapter]
            return frozen.down, frozen.up
        return self.down[adapter], self.up[adapter]

    def _written(self, adapter: str) -> tuple[Tensor, Tensor]:
        """(down, up) as they will be written, where that is in codes."""
        down, up = self.matrices(adapter)
        if self.bits is None or adapter in self.frozen:
            return down, up
        return fake_quantise(down, self.bits, rank_axis=1), fake_quantise(up, self.bits, rank_axis=0)

    def _written_core(self, core: Tensor) -> Tensor:
        return core if self.core_bits is None else fake_quantise(core, self.core_bits, rank_axis=0)

    def position_weights(self) -> dict[str, PositionWeights]:
        """What each position adds: a core in common bases as it is, all else concatenated along the rank."""
        used = {adapter: self._written(adapter) for adapter in self.used()}
        weights = {}
        for position, branches in self.branches.items():
            common = branches[: int(self.on_bases)]
            added = self._concatenated(branches[len(common) :], used)
            for branch in common:
                assert branch.core is not None
                core = self._written_core(branch.core) * branch.scale
                added = PositionWeights(*used[branch.adapter], self.activation, core, added)
            if added is not None:
                weights[position] = added
        return weights

    def _concatenated(
        self, branches: Sequence[TrainedBranch], used: Mapping[str, tuple[Tensor, Tensor]]
    ) -> PositionWeights | None:
        """Branches side by side, cores and scales in `up`; None of none."""
        if not branches:
            return None
        downs = [used[branch.adapter][0] for branch in branches]
        ups = [
            (up if branch.core is None else self._written_core(branch.core) @ up) * branch.scale
            for branch, up in ((branch, used[branch.adapter][1]) for branch in branches)
        ]
        down, up = (parts[0] if len(parts) == 1 else torch.cat(parts, axis) for parts, axis in ((downs, 1), (ups, 0)))
        return PositionWeights(down, up, self.activation)

    def used(self) -> list[str]:
        """The adapters that some position uses, in order of first use."""
        return list(dict.fromkeys(branch.adapter for branches in self.branches.values() for branch in branches))

    def drop_unused(self) -> None:
        """Forgets adapters that no position uses."""
        used = set(self.used())
        for name in list(self.down):
            if name not in used:
                del self.down[name], self.up[name]
        for name in list(self.frozen):
            if name not in used:
                del self.frozen[name]

    def trained(self) -> dict[str, nn.Parameter]:
        """What trains of the matrices, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def scales(self) -> dict[str, nn.Parameter]:
        """The trained scales, by position and number of the branch."""
        return {
            f"{position} {i}": branch.scale
            for position, i, branch in self._every_branch()
            if isinstance(branch.scale, nn.Parameter)
        }

    def cores(self) -> dict[str, nn.Parameter]:
        """The cores, by position and number of the branch."""
        return {f"{p} {i}": branch.core for p, i, branch in self._every_branch() if branch.core is not None}

    def _every_branch(self) -> list[tuple[str, int, TrainedBranch]]:
        return [(p, i, branch) for p, branches in self.branches.items() for i, branch in enumerate(branches)]


def make_common_down(position: str, d_in: int, rank: int) -> Tensor:
    """The `down` [d_in, rank], uniform in ±1/√d_in, that all tasks have in common at a position, in float16's values.

    From raw bits of a generator that is specified, so that every machine and version makes the same bytes.
    """
    seed = int.from_bytes(hashlib.sha256(f"{position} {d_in} {rank}".encode()).digest()[:8], "little")
    raw = np.random.PCG64(seed).random_raw(d_in * rank) >> np.uint64(40)
    unit = raw.astype(np.float64) / 2**23 - 1
    return torch.from_numpy((unit / math.sqrt(d_in)).astype(np.float16).astype(np.float32).reshape(d_in, rank))
