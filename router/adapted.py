"""A backbone on a device. Each forward may add branches at its positions."""

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
"""On a CPU, a block takes a larger input in parts. Its intermediate results then stay in caches, and in memory that
the allocator keeps. The value was found with 2 threads (benchmarks/README.md, the router)."""


class AdaptedBackbone:
    """A backbone on a device. Each forward may add branches at its positions.

    Thread-safe: forwards take turns. Positions are measured while forwards run.

    Args:
        backbone: the frozen model.
        device: where it runs.
        dtype: compute precision of forwards without autocast.
        for_training: on a CPU, switch off timm's fused attention, whose backward is slower.
        compile: name of a torch.compile backend; None: run eagerly.
    Raises:
        BackboneError: the backbone gives no pooled features.
        ForkedError: this process was forked from one that has used a backbone.
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
        """Held by each forward. Its holder keeps other threads from the device."""
        self._attaching = threading.Lock()
        self._unfused = for_training and device.type == "cpu"
        self._sized: dict[tuple[int, int], _Sized] = {}
        """Image size -> its module. It is not here while it is changed, so after an interruption it is made anew."""
        self._compile = compile
        self._pass = Pass()
        self._lent: dict[nn.Module, nn.Parameter] = {}
        """Modules with a lent weight in this forward -> their own weight."""
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
        """The blocks at whose inputs a batch of this backbone may grow."""
        return find_levels(self.backbone, self._blocks)

    def attach(self, positions: Iterable[str]) -> None:
        """Makes positions usable: measures their widths in one dry forward, which must run each exactly once.

        Forwards of other threads go on meanwhile.

        Args:
            positions: module paths of the backbone.
        Raises:
            BackboneError: a position is not a module of this backbone, never runs, runs twice, changes its input, or
                returns other axes than its input has.
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
        """Pooled features of images, with branches at the given positions.

        Args:
            images: normalised floats [batch, 3, h, w].
            weights: attached position -> its branches.
            autocast: dtype of torch.autocast; None: no autocast.
            grow: block of `levels` -> int64 [row]: for each row from this block on, the earlier row that it continues.
            matrices: position -> a weight that replaces its Linear's own in this forward.
            compiled: run through torch.compile.
            in_parts: blocks may take a large batch in parts.
        Returns:
            float32 [batch, d] on the device.
        Raises:
            ImageError: this backbone cannot take images of this size.
            BackboneError: the backbone does not compile into one graph.
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
        """Sets what this forward adds, and prepares the module for it."""
        size = (images.shape[2], images.shape[3])
        most = PART_BYTES if in_parts and self.device.type == "cpu" else None
        # the first block's input has about as many bytes as the images
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
        """Replaces the weights of Linears by these matrices."""
        linears = {module.get_submodule(position): matrix for position, matrix in matrices.items()}
        self._lent = {linear: linear.get_parameter("weight") for linear in linears}
        for linear, matrix in linears.items():
            linear._parameters["weight"] = matrix

    def _give_back(self) -> None:
        """Gives modules their own weights back. If this is interrupted, the next forward does it again."""
        for linear, parameter in self._lent.items():
            linear._parameters["weight"] = parameter
        self._lent = {}

    def _run_compiled(self, images: Tensor) -> Tensor:
        from torch._dynamo import config, exc  # takes seconds to import

        one = self._sized[images.shape[2], images.shape[3]]
        if one.compiled is None:
            assert self._compile is not None
            # a graph that breaks within a module would skip its hooks, which add the branches: so one whole graph
            one.compiled = torch.compile(one.module, fullgraph=True, dynamic=False, backend=self._compile)
        try:
            with config.patch(recompile_limit=64):  # the default of 8 is less than the number of batch sizes
                return one.compiled(images)
        except exc.Unsupported as error:
            reason = str(error).splitlines()[0]
            raise BackboneError(
                f"backbone {self.backbone.name} does not compile into one graph: {reason}: make the router without "
                "compile"
            ) from None

    def inputs(
        self, images: Tensor, weights: Mapping[str, PositionWeights], positions: Iterable[str]
    ) -> dict[str, Tensor]:
        """The inputs of the branches at some positions in a forward, channels last.

        Args:
            images: normalised floats [batch, 3, h, w].
            weights: attached position -> its branches.
        Returns:
            position -> [batch, ..., d_in].
        """
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
            # all sizes share the device's copy of the weights; only weights that depend on the size were resampled
            shared = dict(self._base.named_parameters())
            for name, value in list(module.named_parameters()):
                if name in shared and shared[name].shape == value.shape:
                    owner, _, leaf = name.rpartition(".")
                    setattr(module.get_submodule(owner), leaf, shared[name])
            module = module.to(device=self.device, dtype=self.dtype)
            if self._unfused:  # the unfused backward was faster in a first try at 37 tokens; there is no benchmark
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
    """A module for one image size, and how it was changed."""

    module: nn.Module
    grows: bool = False
    divided: bool = False
    compiled: Callable[[Tensor], Tensor] | None = None
