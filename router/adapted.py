"""A backbone on a device, to whose positions each forward may add branches."""

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from router.backbone import Backbone, share
from router.blocks import Blocks, Levels, Pass, divide, find_blocks, find_levels, hook_growth
from router.device import check_process
from router.errors import BackboneError
from router.kernels import add_branch_fused, use_fused
from router.ops import PositionWeights, add_branch, channels_last
from router.positions import measure

PART_BYTES = 5 * 2**20
"""On a CPU, a block whose input has more bytes takes it in parts: what it computes on the way then stays in
caches, and in memory that the allocator keeps. Found with 2 threads (benchmarks/README.md, the router)."""


class AdaptedBackbone:
    """A backbone on a device, to whose positions each forward may add branches.

    Thread-safe: forwards take turns. Positions are measured beside them.

    Args:
        compile: a torch.compile backend's name; None to run eagerly.
    """

    def __init__(
        self,
        backbone: Backbone,
        device: torch.device,
        dtype: torch.dtype,
        for_training: bool = False,
        compile: str | None = None,
    ) -> None:
        check_process()
        self.backbone, self.device, self.dtype = backbone, device, dtype
        self.widths: dict[str, tuple[int, int]] = {}
        """(d_in, d_out) of each attached position."""
        self.turn = threading.RLock()
        """Held by a forward. Whoever holds it meanwhile keeps others from the device."""
        self._attaching = threading.Lock()
        self._unfused = for_training and device.type == "cpu"
        self._sized: dict[tuple[int, int], _Sized] = {}
        """The modules of each image size. One that is being changed is not here: interrupted, it is made anew."""
        self._compile = compile
        self._pass = Pass()
        self._lent: dict[nn.Module, nn.Parameter] = {}
        """The weights of modules that have another one for this forward."""
        self._owned: set[str] = set()
        """Positions whose output may be written to."""
        self._maps: set[str] = set()
        """Positions whose axes are [batch, channel, height, width]."""
        self._base = share(backbone.module).to(device=device, dtype=dtype)
        self.feature_width, _ = measure(backbone, self._base, [], device, dtype)

    @cached_property
    def _blocks(self) -> Blocks:
        return find_blocks(self.backbone)

    @cached_property
    def levels(self) -> Levels:
        """Where this backbone's batches may grow."""
        return find_levels(self.backbone, self._blocks)

    def attach(self, positions: Iterable[str]) -> None:
        """Makes positions usable: one dry forward must run each exactly once, and measures its widths.

        Forwards of other threads go on meanwhile.

        Raises:
            BackboneError: a position that is no module of this backbone, never runs, runs twice, or whose output is not
                of its input's axes.
        """
        with self._attaching:
            new = [position for position in positions if position not in self.widths]
            if not new:
                return
            _, measured = measure(self.backbone, self._base, new, self.device, self.dtype)
            with self.turn:
                sized, self._sized = self._sized, {}
                for one in sized.values():
                    self._hook(one.module, new)
                self._owned.update(position for position, found in measured.items() if found.owned)
                self._maps.update(position for position, found in measured.items() if found.channels_first)
                self.widths.update({position: (found.d_in, found.d_out) for position, found in measured.items()})
                self._sized = sized

    def features(
        self,
        images: Tensor,
        weights: Mapping[str, PositionWeights],
        autocast: torch.dtype | None = None,
        *,
        grow: Mapping[str, Tensor] = MappingProxyType({}),
        matrices: Mapping[str, nn.Parameter] = MappingProxyType({}),
        compiled: bool = False,
        in_parts: bool = False,
    ) -> Tensor:
        """Pooled features [batch, d] of normalised images [batch, 3, h, w], with branches at the given positions.

        Args:
            grow: block of `levels` -> int64, the row that each row from there on continues.
            matrices: position -> weight to use in place of its Linear's own, this time.
            in_parts: blocks may take a large batch in parts.

        Raises:
            ImageError: a size that this backbone cannot take.
            BackboneError: it does not compile into one graph.
        """
        with self.turn:
            module = self._module((images.shape[2], images.shape[3]))
            self._give_back()
            self._begin(images, weights, grow, in_parts, in_place=autocast is None and not torch.is_grad_enabled())
            try:
                self._lend(module, matrices)
                with torch.autocast(self.device.type, autocast, enabled=autocast is not None):
                    run = self._run_compiled if compiled else module
                    features = run(images.to(self.device, self.dtype))
            finally:
                self._pass.weights, self._pass.grow = {}, {}
                self._give_back()
            return features.float()

    def _begin(
        self,
        images: Tensor,
        weights: Mapping[str, PositionWeights],
        grow: Mapping[str, Tensor],
        in_parts: bool,
        in_place: bool,
    ) -> None:
        """Says what this forward adds, and readies the module for it."""
        size = (images.shape[2], images.shape[3])
        most = PART_BYTES if in_parts and self.device.type == "cpu" else None
        # a first block's input has about as many bytes as the images
        if grow or (most is not None and images.numel() * self.dtype.itemsize > most):
            self._ready_blocks(size, bool(grow))
        forward = self._pass
        forward.part, forward.most_bytes, forward.in_place = None, most, in_place
        forward.weights, forward.grow = weights, grow

    def _ready_blocks(self, size: tuple[int, int], to_grow: bool) -> None:
        one = self._sized[size]
        if one.divided and (one.grows or not to_grow):
            return
        del self._sized[size]
        if to_grow and not one.grows:
            hook_growth(one.module, self.levels, self._blocks, self._now)
            one.grows = True
        if not one.divided:
            divide(one.module, self._blocks, self._now)
            one.divided = True
        self._sized[size] = one

    def _now(self) -> Pass:
        return self._pass

    def _lend(self, module: nn.Module, matrices: Mapping[str, nn.Parameter]) -> None:
        """Puts matrices in the place of Linears' own."""
        linears = {module.get_submodule(position): matrix for position, matrix in matrices.items()}
        self._lent = {linear: linear.get_parameter("weight") for linear in linears}
        for linear, matrix in linears.items():
            linear._parameters["weight"] = matrix

    def _give_back(self) -> None:
        """Gives modules their own weights again; the next forward does so, too, should this be interrupted."""
        for linear, parameter in self._lent.items():
            linear._parameters["weight"] = parameter
        self._lent = {}

    def _run_compiled(self, images: Tensor) -> Tensor:
        from torch._dynamo import config, exc  # takes seconds to import

        one = self._sized[images.shape[2], images.shape[3]]
        if one.compiled is None:
            assert self._compile is not None
            # a graph that breaks within a module leaves its hooks out, and with them what tasks add: one or none
            one.compiled = torch.compile(one.module, fullgraph=True, dynamic=False, backend=self._compile)
        try:
            with config.patch(recompile_limit=64):  # 8 by default: fewer than there are buckets of batches
                return one.compiled(images)
        except exc.Unsupported as error:
            reason = str(error).splitlines()[0]
            raise BackboneError(f"backbone {self.backbone.name} does not compile into one graph: {reason}") from None

    def inputs(
        self, images: Tensor, weights: Mapping[str, PositionWeights], positions: Iterable[str]
    ) -> dict[str, Tensor]:
        """What the branches at some positions are given in a forward, channels last."""
        module = self._module((images.shape[2], images.shape[3]))
        found: dict[str, Tensor] = {}
        handles = []
        try:
            for position in positions:
                handles.append(module.get_submodule(position).register_forward_hook(self._keeper(position, found)))
            self.features(images, weights)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _module(self, size: tuple[int, int]) -> nn.Module:
        one = self._sized.get(size)
        if one is None:
            module = self.backbone.sized(size)
            # the device's copy of the weights serves every size; what depends on the size was resampled just now
            shared = dict(self._base.named_parameters())
            for name, value in list(module.named_parameters()):
                if name in shared and shared[name].shape == value.shape:
                    owner, _, leaf = name.rpartition(".")
                    setattr(module.get_submodule(owner), leaf, shared[name])
            module = module.to(device=self.device, dtype=self.dtype)
            if self._unfused:  # its backward was the faster one in a first try at 37 tokens; no benchmark
                for part in module.modules():
                    if hasattr(part, "fused_attn"):
                        cast(Any, part).fused_attn = False
            self._hook(module, self.widths)
            one = self._sized[size] = _Sized(module)
        return one.module

    def _hook(self, module: nn.Module, positions: Iterable[str]) -> None:
        for position in positions:
            module.get_submodule(position).register_forward_hook(self._adder(position))

    def _adder(self, position: str) -> Any:
        def add(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            weights = self._pass.weights_at(position)
            if weights is None:
                return None
            y, x = channels_last(output, args[0]) if position in self._maps else (output, args[0])
            op = add_branch_fused if use_fused(y, x, weights) else add_branch
            added = op(y, x, weights, in_place=self._pass.in_place and position in self._owned)
            return added.movedim(-1, 1) if position in self._maps else added

        return add

    def _keeper(self, position: str, found: dict[str, Tensor]) -> Any:
        def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            found[position] = channels_last(output, args[0])[1] if position in self._maps else args[0]

        return keep


@dataclass(eq=False)
class _Sized:
    """A module for one image size, and what was done to it."""

    module: nn.Module
    grows: bool = False
    divided: bool = False
    compiled: Callable[[Tensor], Tensor] | None = None
