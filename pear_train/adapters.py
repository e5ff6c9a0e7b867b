"""Trainable adapter sets, run through the router's own op."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from router import PositionWeights


@dataclass
class TrainedBranch:
    """One use of an adapter: its name, and a scale that is a number or a trained 0-dim parameter."""

    adapter: str
    scale: float | nn.Parameter


@dataclass(frozen=True)
class FrozenAdapter:
    """A knowledge checkpoint's adapter: `down` [d_in, rank] and `up` [rank, d_out], float32; bits if quantised."""

    down: Tensor
    up: Tensor
    bits: int | None


class AdapterSet(nn.Module):
    """An adapter at every position to begin with; pruning rewrites `branches`.

    `down` is uniform in ±1/√d_in, `up` zero, so that training starts from the backbone's own function.
    """

    def __init__(
        self,
        widths: Mapping[str, tuple[int, int]],
        rank: int,
        activation: str,
        scale: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        self.frozen: dict[str, FrozenAdapter] = {}
        self.own: dict[str, str] = {}
        """The adapter that each position had of its own."""
        self.branches: dict[str, list[TrainedBranch]] = {}
        for i, (position, (d_in, d_out)) in enumerate(widths.items()):
            bound = 1 / math.sqrt(d_in)
            down = torch.rand(d_in, rank, generator=generator) * 2 * bound - bound
            self.down[f"a{i}"] = nn.Parameter(down)
            self.up[f"a{i}"] = nn.Parameter(torch.zeros(rank, d_out))
            self.own[position] = f"a{i}"
            self.branches[position] = [TrainedBranch(f"a{i}", scale)]

    def matrices(self, adapter: str) -> tuple[Tensor, Tensor]:
        """(down, up) of a trained or frozen adapter."""
        if adapter in self.frozen:
            frozen = self.frozen[adapter]
            return frozen.down, frozen.up
        return self.down[adapter], self.up[adapter]

    def position_weights(self) -> dict[str, PositionWeights]:
        """What each position adds: its branches concatenated along the rank, scales in `up`."""
        weights = {}
        for position, branches in self.branches.items():
            if not branches:
                continue
            pairs = [self.matrices(branch.adapter) for branch in branches]
            ups = [up * branch.scale for (_, up), branch in zip(pairs, branches, strict=True)]
            down = pairs[0][0] if len(pairs) == 1 else torch.cat([down for down, _ in pairs], 1)
            weights[position] = PositionWeights(down, ups[0] if len(ups) == 1 else torch.cat(ups), self.activation)
        return weights

    def used(self) -> list[str]:
        """The adapters that some position uses, in order of first use."""
        return list(dict.fromkeys(branch.adapter for branches in self.branches.values() for branch in branches))

    def drop_unused(self) -> None:
        """Forgets adapters that no position uses."""
        used = set(self.used())
        for name in list(self.down):
            if name not in used:
                del self.down[name], self.up[name]

    def scales(self) -> list[nn.Parameter]:
        """The trained scales."""
        all_branches = [branch for branches in self.branches.values() for branch in branches]
        return [branch.scale for branch in all_branches if isinstance(branch.scale, nn.Parameter)]
