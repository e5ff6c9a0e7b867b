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
    """One use of an adapter at a position."""

    adapter: str
    scale: float | nn.Parameter
    """A number, or a trained parameter of 0 dimensions."""
    core: nn.Parameter | None = None
    """This position's own [rank, rank] matrix between the adapter's `down` and `up`."""


@dataclass(frozen=True, eq=False)
class FrozenAdapter:
    """An adapter that does not train: `down` [d_in, rank] and `up` [rank, d_out], float32, as they will be read back.

    An adapter from a store (role bank, base or bases) is written as it was found: its `entry` and its `tensors`. Of a
    stack that is the whole stack. A knowledge checkpoint is written as float16, or as codes of `bits`.
    """

    role: Role
    down: Tensor
    up: Tensor
    bits: int | None = None
    entry: Mapping[str, Any] | None = None
    tensors: Mapping[str, RawTensor] = field(default_factory=dict)
    place: int | None = None
    """Its place in a stack."""

    def to(self, device: torch.device) -> "FrozenAdapter":
        return replace(self, down=self.down.to(device), up=self.up.to(device))


class AdapterSet(nn.Module):
    """The adapters of one task. It starts with one adapter at every position; pruning rewrites `branches`.

    `down` starts uniform in ±1/√d_in, `up` at zero. So training starts from the backbone's own function.

    Args:
        widths: position -> (d_in, d_out), in forward order.
        rank: of every adapter.
        scale: factor of every branch.
        generator: draws `down`.
        common_down: freeze `down` at values that depend only on the position and its shape.
        bits, core_bits: train matrices and cores as codes of this many bits. They are rounded in each step, and
            gradients pass straight through the rounding. None: no rounding.
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
        """(down, up) of a trained or frozen adapter, not rounded to codes."""
        if adapter in self.frozen:
            frozen = self.frozen[adapter]
            return frozen.down, frozen.up
        return self.down[adapter], self.up[adapter]

    def _written(self, adapter: str) -> tuple[Tensor, Tensor]:
        """(down, up), rounded if they will be written as codes."""
        down, up = self.matrices(adapter)
        if self.bits is None or adapter in self.frozen:
            return down, up
        return fake_quantise(down, self.bits, rank_axis=1), fake_quantise(up, self.bits, rank_axis=0)

    def _written_core(self, core: Tensor) -> Tensor:
        return core if self.core_bits is None else fake_quantise(core, self.core_bits, rank_axis=0)

    def position_weights(self) -> dict[str, PositionWeights]:
        """What each position adds. A core in common bases stays apart; all other branches are concatenated along the
        rank."""
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
        """Branches concatenated along the rank, with cores and scales multiplied into `up`. None if there are none."""
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
        """The matrices that train, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def scales(self) -> dict[str, nn.Parameter]:
        """The trained scales. A key is the position and the branch's number."""
        return {
            f"{position} {i}": branch.scale
            for position, i, branch in self._every_branch()
            if isinstance(branch.scale, nn.Parameter)
        }

    def cores(self) -> dict[str, nn.Parameter]:
        """The cores. A key is the position and the branch's number."""
        return {f"{p} {i}": branch.core for p, i, branch in self._every_branch() if branch.core is not None}

    def _every_branch(self) -> list[tuple[str, int, TrainedBranch]]:
        return [(p, i, branch) for p, branches in self.branches.items() for i, branch in enumerate(branches)]


def make_common_down(position: str, d_in: int, rank: int) -> Tensor:
    """The `down` [d_in, rank] that all tasks share at a position, float32, uniform in ±1/√d_in.

    Float16 holds its values exactly. They come from the raw bits of PCG64, so every machine and every version makes the
    same bytes.
    """
    seed = int.from_bytes(hashlib.sha256(f"{position} {d_in} {rank}".encode()).digest()[:8], "little")
    raw = np.random.PCG64(seed).random_raw(d_in * rank) >> np.uint64(40)
    unit = raw.astype(np.float64) / 2**23 - 1
    return torch.from_numpy((unit / math.sqrt(d_in)).astype(np.float16).astype(np.float32).reshape(d_in, rank))
