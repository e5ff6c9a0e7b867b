"""Backbones: loading, digest, input sizes, and the attachment of branches at positions."""

import copy
import difflib
import fnmatch
import hashlib
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import router.pear_tiny  # noqa: F401  (registers the embedded backbone with timm)
from pear_store import Digest, tensor_digest
from router.errors import BackboneError, ForkedError, ImageError
from router.kernels import add_branch_fused, use_fused
from router.ops import PositionWeights, add_branch
from router.tensors import from_torch

PART_BYTES = 5 * 2**20
"""On a CPU, a block whose input has more bytes takes it in parts: what it computes on the way then stays in
caches, and in memory that the allocator keeps. Found with 2 threads (benchmarks/README.md, the router)."""
POSITION_PRESETS = {
    "blocks": r".*blocks\.\d+\.(attn|mlp)",
    "attn": r".*blocks\.\d+\.attn",
    "mlp": r".*blocks\.\d+\.mlp",
    "qkv": r".*blocks\.\d+\.attn\.qkv",
    "linear": r".*blocks\.\d+\..*",  # narrowed to nn.Linear
}


class Backbone:
    """A frozen timm model without classifier: its module, name and digest.

    The module is a copy of the given one's structure; weights are shared, never changed.

    Args:
        source: the timm name and the weights' file, if it has one, by which another process can load it again; None
            where the module was given.
    Raises:
        BackboneError: it is no timm model, or a weight is NaN or infinite.
    """

    def __init__(self, module: nn.Module, name: str, source: tuple[str, str | None] | None = None) -> None:
        self.module = _without_classifier(module)
        self.name, self.source = name, source
        _check_finite(self.module, name)
        self.digest = backbone_digest(self.module)
        config: Mapping[str, Any] = getattr(self.module, "pretrained_cfg", {}) or {}
        self.config = config
        self.input_size: tuple[int, int] = tuple(config.get("input_size", (3, 224, 224))[1:])

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights in float32."""
        return sum(4 * parameter.numel() for parameter in self.module.parameters())

    def sized(self, size: tuple[int, int]) -> nn.Module:
        """The module for [batch, 3, *size] images, position embeddings resampled; weights shared.

        Raises:
            ImageError: this model cannot take that size.
        """
        module = _share(self.module)
        if size == self.input_size:
            return module
        try:
            if hasattr(module, "set_input_size"):
                cast(Any, module).set_input_size(img_size=size)
                patch = getattr(getattr(module, "patch_embed", None), "patch_size", (1, 1))
                if size[0] % patch[0] or size[1] % patch[1]:
                    raise ValueError(f"its patches need multiples of {patch[0]}")
            elif self.config.get("fixed_input_size"):
                raise ValueError(f"it takes {self.input_size[0]} x {self.input_size[1]} only")
        except (AssertionError, ValueError, RuntimeError) as error:
            raise ImageError(f"backbone {self.name} cannot take {size[0]} x {size[1]} pixels: {error}") from None
        return module


def load_backbone(backbone: str | nn.Module | Backbone, weights: str | Path | None = None) -> Backbone:
    """A backbone by timm name, with pretrained weights through timm or from a file; or around a timm module.

    Raises:
        BackboneError: no such model, weights that do not fit it, or a module that is not at its native precision
            and size.
        ForkedError: this process was forked from one that has used a backbone.
    """
    _check_process()
    if isinstance(backbone, Backbone):
        return backbone
    if isinstance(backbone, nn.Module):
        config = getattr(backbone, "pretrained_cfg", None) or {}
        name = ".".join(filter(None, (config.get("architecture"), config.get("tag")))) or type(backbone).__name__
        _check_native(backbone, name)
        return Backbone(backbone, name)
    try:
        if weights is None:
            return Backbone(timm.create_model(backbone, pretrained=True), backbone, (backbone, None))
        module = timm.create_model(backbone)
    except RuntimeError as error:
        if "Unknown model" not in str(error):
            raise BackboneError(f"backbone {backbone!r}: {error}") from None
        known = timm.list_models()
        near = ", ".join(difflib.get_close_matches(backbone.partition(".")[0], known, 5))
        hint = f"; did you mean {near}?" if near else "; timm.list_models() has the names"
        raise BackboneError(f"backbone {backbone!r}: timm has no model of that name{hint}") from None
    except BackboneError:
        raise
    except Exception as error:  # whatever a download can raise: hub, requests, urllib, OSError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BackboneError(
            f"backbone {backbone!r}: its pretrained weights could not be loaded ({reason}); "
            "give a local file of them with weights (--weights)"
        ) from None
    cast(Any, module).reset_classifier(0)
    _load_weights(module, backbone, Path(weights))
    return Backbone(module, backbone, (backbone, str(Path(weights).absolute())))


def _load_weights(module: nn.Module, name: str, path: Path) -> None:
    if not path.is_file():
        raise BackboneError(f"{path}: no such file; expected the weights of {name}")
    try:
        state = load_file(path)
    except Exception as error:  # safetensors raises a bare Exception type of its own
        raise BackboneError(f"{path}: not a whole safetensors file (pickles are never read): {error}") from None
    expected = module.state_dict()
    for key, value in expected.items():
        if key not in state:
            raise BackboneError(f"{path}: tensor {key!r} of {name} is missing; are these another model's weights?")
        if state[key].shape != value.shape:
            found = f"{list(state[key].shape)}, expected {list(value.shape)}"
            raise BackboneError(f"{path}: tensor {key!r} is {found} for {name}; are these another model's weights?")
    classifiers = (getattr(module, "pretrained_cfg", None) or {}).get("classifier", "head")
    prefixes = tuple(f"{c}." for c in ([classifiers] if isinstance(classifiers, str) else classifiers))
    for key in state.keys() - expected.keys():
        if not key.startswith(prefixes):
            raise BackboneError(f"{path}: tensor {key!r} is none of {name}'s; are these another model's weights?")
    module.load_state_dict({key: state[key] for key in expected})


def backbone_digest(module: nn.Module) -> Digest:
    """sha256 over the lines ``{name} {tensor digest}\\n``, sorted by name, of a state dict without classifier.

    Floating tensors are hashed as F32, integers as I64.
    """
    lines = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        raw = from_torch(tensor.float() if tensor.is_floating_point() else tensor.long())
        lines.update(f"{name} {tensor_digest(raw.dtype, raw.shape, raw.data)}\n".encode())
    return Digest("sha256:" + lines.hexdigest())


def _check_finite(module: nn.Module, name: str) -> None:
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = (float(end) for end in torch.aminmax(tensor))
            if not (math.isfinite(low) and math.isfinite(high)):
                raise BackboneError(
                    f"backbone {name}: tensor {key!r} holds NaN or infinity: expected finite weights; take a good copy"
                )


def _check_native(module: nn.Module, name: str) -> None:
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise BackboneError(
                f"backbone {name}: {key!r} is {str(tensor.dtype).removeprefix('torch.')}: give the float32 module, "
                "and choose the compute precision with dtype="
            )
    native = (getattr(module, "pretrained_cfg", None) or {}).get("input_size", (3, 0, 0))[1:]
    built = getattr(getattr(module, "patch_embed", None), "img_size", None)
    if built is not None and tuple(built) != tuple(native):
        raise BackboneError(
            f"backbone {name}: built for {built[0]} x {built[1]} pixels, native are {native[0]} x {native[1]}: give "
            "the native module, images of other sizes are taken as they come"
        )


def _share(module: nn.Module) -> nn.Module:
    """A copy of the structure whose parameters and buffers are the original's memory, frozen, in eval mode."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    memo.update({id(buffer): buffer for buffer in module.buffers()})
    return copy.deepcopy(module, memo).eval()


def _without_classifier(module: nn.Module) -> nn.Module:
    module = _share(module)
    if not hasattr(module, "reset_classifier"):
        raise BackboneError(f"{type(module).__name__}: expected a timm model (it lacks reset_classifier)")
    cast(Any, module).reset_classifier(0)
    return module


def _selects(choice: str, name: str, module: nn.Module) -> bool:
    if choice not in POSITION_PRESETS:
        return fnmatch.fnmatchcase(name, choice)
    fits = re.fullmatch(POSITION_PRESETS[choice], name) is not None
    return fits and (choice != "linear" or isinstance(module, nn.Linear))


def choose_positions(module: nn.Module, choice: str) -> list[str]:
    """The module paths that comma-separated presets and shell patterns select, in forward order of blocks.

    Raises:
        BackboneError: one of them matches nothing.
    """
    named = [(name, m) for name, m in module.named_modules() if name]
    wanted = [part.strip() for part in choice.split(",")]
    for one in wanted:
        if not any(_selects(one, name, part) for name, part in named):
            presets = ", ".join(POSITION_PRESETS)
            some = ", ".join(n for n, m in named if isinstance(m, nn.Linear))[:120]
            raise BackboneError(f"positions {one!r} match no module; presets: {presets}; or a pattern over {some}, …")
    return [name for name, part in named if any(_selects(one, name, part) for one in wanted)]


def _axes(x: object) -> int:
    return x.ndim if isinstance(x, Tensor) else 0


def open_device(name: str | torch.device) -> torch.device:
    """The device, checked to be there.

    Raises:
        BackboneError: it is not.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split(".")[0].split())
        raise BackboneError(f"device {str(name)!r} cannot be used: {reason}") from None
    return device


@dataclass(frozen=True)
class Levels:
    """Where a batch may grow on its way through a backbone: at the inputs of blocks that nothing bypasses."""

    blocks: tuple[str, ...]
    """In forward order; level 0 lies before the first, level i + 1 begins with blocks[i]."""
    of: Mapping[str, int]
    """The level of each module."""


class AdaptedBackbone:
    """A backbone on a device, to whose positions each forward may add branches.

    Not thread-safe: callers allow one forward at a time.

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
        _check_process()
        self.backbone, self.device, self.dtype = backbone, device, dtype
        self.widths: dict[str, tuple[int, int]] = {}
        """(d_in, d_out) of each attached position."""
        self.feature_width = 0
        self._unfused = for_training and device.type == "cpu"
        self._sized: dict[tuple[int, int], _Sized] = {}
        """The modules of each image size. One that is being changed is not here: interrupted, it is made anew."""
        self._compile = compile
        self._weights: Mapping[str, PositionWeights] = {}
        self._grow: Mapping[str, Tensor] = {}
        self._lent: dict[nn.Module, nn.Parameter] = {}
        """The weights of modules that have another one for this forward."""
        self._most_bytes: int | None = None
        self._part: tuple[int, int, int] | None = None
        """The rows that a block is given at present: first, end, and of how many."""
        self._in_place = False
        self._owned: set[str] = set()
        """Positions whose output is memory of its own, which may be written to."""
        self._base = _share(backbone.module).to(device=device, dtype=dtype)
        self.feature_width, _ = self._run_dry([])

    @cached_property
    def _blocks(self) -> "_Blocks":
        try:
            return _find_blocks(_share(self.backbone.module).to("meta"), self.backbone.input_size)
        except MemoryError:
            raise
        except Exception:  # whatever a model may do that the meta device cannot
            return _Blocks([], [], [])

    @cached_property
    def levels(self) -> Levels:
        """Where this backbone's batches may grow, found by growing one on the meta device.

        No blocks where that fails: then only the images, but no part of the forward, are shared.
        """
        module = _share(self.backbone.module)
        order, blocks = self._blocks.order or [name for name, _ in module.named_modules()], self._blocks.alone
        module.to("meta")
        may_grow = partial(_may_grow, module, self.backbone.input_size)
        if not may_grow(blocks):
            kinds: dict[str, list[str]] = {}
            for block in blocks:  # layer1.0 and layer2.3 are of one kind, layer1.0.downsample.0 is of another
                kinds.setdefault(re.sub(r"\d+", "*", block), []).append(block)
            growing = {block for kind in kinds.values() if may_grow(kind) for block in kind}
            blocks = [block for block in blocks if block in growing]
            blocks = blocks if may_grow(blocks) else []
        of: dict[str, int] = {}
        level = 0
        for name in order:
            level += name in blocks
            of.setdefault(name, level)
        return Levels(tuple(blocks), of)

    def attach(self, positions: Iterable[str]) -> None:
        """Makes positions usable: one dry forward must run each exactly once, and measures its widths.

        Raises:
            BackboneError: a position that is no module of this backbone, never runs, runs twice, or is not
                channels-last.
        """
        new = [position for position in positions if position not in self.widths]
        modules = dict(self.backbone.module.named_modules())
        for position in new:
            if position not in modules:
                raise BackboneError(f"backbone {self.backbone.name} has no module {position!r}")
        if new:
            _, widths = self._run_dry(new)
            sized, self._sized = self._sized, {}
            for one in sized.values():
                self._hook(one.module, new)
            self.widths.update(widths)
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
        size = (images.shape[2], images.shape[3])
        module = self._module(size)
        self._give_back()
        self._part = None
        self._most_bytes = PART_BYTES if in_parts and self.device.type == "cpu" else None
        if self._most_bytes is not None and images.numel() * self.dtype.itemsize > self._most_bytes:
            self._divide_blocks(size)  # a first block's input has about as many bytes as the images
        if grow:
            self._hook_blocks(size)
            self._divide_blocks(size)
        self._weights, self._grow = weights, grow
        self._in_place = autocast is None and not torch.is_grad_enabled()
        linears = {module.get_submodule(position): matrix for position, matrix in matrices.items()}
        self._lent = {linear: linear.get_parameter("weight") for linear in linears}
        try:
            for linear, matrix in linears.items():
                linear._parameters["weight"] = matrix
            with torch.autocast(self.device.type, autocast, enabled=autocast is not None):
                run = self._run_compiled if compiled else module
                features = run(images.to(self.device, self.dtype))
        finally:
            self._weights, self._grow = {}, {}
            self._give_back()
        return features.float()

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

    def _hook_blocks(self, size: tuple[int, int]) -> None:
        if self._sized[size].grows:
            return
        one = self._sized.pop(size)
        for block in self.levels.blocks:
            one.module.get_submodule(block).register_forward_pre_hook(self._grower(block))
        one.grows = True
        self._sized[size] = one

    def _divide_blocks(self, size: tuple[int, int]) -> None:
        if self._sized[size].divided:
            return
        one = self._sized.pop(size)
        for block in self._blocks.in_parts:
            part = cast(Any, one.module.get_submodule(block))
            part.forward = self._by_parts(block, part.forward)
        one.divided = True
        self._sized[size] = one

    def _grower(self, block: str) -> Any:
        def grow(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            rows = self._grow.get(block)
            if rows is None or self._grows_within(block):
                return None
            return args[0].index_select(0, rows), *args[1:]

        return grow

    def _grows_within(self, block: str) -> bool:
        """Whether a block's own forward grows its input, part by part, so that it never lies in memory as a whole.

        A block that is a position itself is given it grown: its branches need it.
        """
        return block in self._blocks.in_parts and block not in self._weights

    def _by_parts(self, block: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(x: Tensor, /, *args: Any, **options: Any) -> Tensor:
            grown = self._grow.get(block) if self._grows_within(block) else None
            count = len(x) if grown is None else len(grown)
            rows = self._part_rows(block, count, x[:1].nbytes)
            if rows >= count:
                return run(x if grown is None else x.index_select(0, grown), *args, **options)
            out: Tensor | None = None
            try:
                for start in range(0, count, rows):
                    stop = min(start + rows, count)
                    part = x[start:stop] if grown is None else x.index_select(0, grown[start:stop])
                    self._part = start, stop, count
                    found = run(part, *args, **options)
                    out = _room(count, found) if out is None else out
                    out[start:stop] = found
            finally:
                self._part = None
            assert out is not None
            return out

        return forward

    def _part_rows(self, block: str, count: int, row_bytes: int) -> int:
        """How many rows a block takes at once: of a batch that is too large, equal parts, which end where the runs of
        rows do that one task's branches serve, or divide them."""
        parts = 1 if self._most_bytes is None else min(count, -(-count * row_bytes // self._most_bytes))
        rows = -(-count // parts)
        if parts > 1:
            inside = f"{block}."
            units = [len(w.down) for p, w in self._weights.items() if w.down.ndim == 3 and p.startswith(inside)]
            run = count // max(units, default=count)
            rows = rows // run * run if run <= rows else -(-run // -(-run // rows))
        return rows

    def inputs(
        self, images: Tensor, weights: Mapping[str, PositionWeights], positions: Iterable[str]
    ) -> dict[str, Tensor]:
        """What the modules at some positions are given in a forward."""
        module = self._module((images.shape[2], images.shape[3]))
        found: dict[str, Tensor] = {}
        handles = []
        try:
            for position in positions:
                keep = partial(found.__setitem__, position)
                part = module.get_submodule(position)
                handles.append(part.register_forward_pre_hook(lambda _, args, keep=keep: keep(args[0])))
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
            weights = self._weights.get(position)
            if weights is None:
                return None
            if self._part is not None:
                weights = weights.of_rows(*self._part)
            op = add_branch_fused if use_fused(output, args[0], weights) else add_branch
            return op(output, args[0], weights, in_place=self._in_place and position in self._owned)

        return add

    def _calls_at_double_size(self, positions: list[str]) -> dict[str, Tensor]:
        """What positions with feature maps are given for an image of twice the side, where the model takes that.

        An axis that grows with the image is no channel axis.
        """
        height, width = self.backbone.input_size
        if not positions:
            return {}
        try:
            return self.inputs(torch.zeros(1, 3, 2 * height, 2 * width), {}, positions)
        except torch.OutOfMemoryError:
            raise
        except (ImageError, RuntimeError):
            return {}

    def _run_dry(self, positions: list[str]) -> tuple[int, dict[str, tuple[int, int]]]:
        """How wide the features are, and (d_in, d_out) of each position, by one forward of a black image."""
        seen: dict[str, list[tuple[Any, Any]]] = {position: [] for position in positions}
        handles = []
        try:
            for position in positions:
                module = self._base.get_submodule(position)
                record = seen[position].append
                handles.append(
                    module.register_forward_hook(
                        lambda _, args, output, record=record: record((args[0] if args else None, output))
                    )
                )
            with torch.inference_mode():
                images = torch.zeros(1, 3, *self.backbone.input_size, device=self.device, dtype=self.dtype)
                features = self._base(images)
        finally:
            for handle in handles:
                handle.remove()
        if features.ndim != 2:
            found = list(features.shape)
            raise BackboneError(f"backbone {self.backbone.name}: its output is {found}: expected pooled features")
        elsewhere = self._calls_at_double_size([p for p, calls in seen.items() if calls and _axes(calls[0][0]) == 4])
        widths = {}
        for position, calls in seen.items():
            where = f"position {position!r} of {self.backbone.name}"
            if len(calls) != 1:
                raise BackboneError(f"{where} runs {len(calls)} times in a forward: expected once")
            x, y = calls[0]
            if not (isinstance(x, Tensor) and isinstance(y, Tensor)) or x.ndim < 2 or x.shape[:-1] != y.shape[:-1]:
                raise BackboneError(f"{where} does not map one tensor to one of equal leading axes, channels last")
            large = elsewhere.get(position, x)
            if large.shape[-1] != x.shape[-1] or isinstance(self._base.get_submodule(position), nn.Conv2d):
                raise BackboneError(f"{where} is channels-first: expected a channels-last module such as a Linear")
            widths[position] = (x.shape[-1], y.shape[-1])
            if not _aliases(y, x, self._base.get_submodule(position)):
                self._owned.add(position)
        return features.shape[1], widths


_computed_in = 0
"""The process that used a backbone first; 0 for none yet."""


def _check_process() -> None:
    """Raises a ForkedError where torch would wait for threads of the process that this one was forked from."""
    global _computed_in
    if _computed_in not in (0, os.getpid()) and torch.get_num_threads() > 1:
        raise ForkedError
    _computed_in = os.getpid()


@dataclass(eq=False)
class _Sized:
    """A module for one image size, and what was done to it."""

    module: nn.Module
    grows: bool = False
    divided: bool = False
    compiled: Callable[[Tensor], Tensor] | None = None


def _aliases(y: Tensor, x: Tensor, module: nn.Module) -> bool:
    """Whether an output shares memory with its input or with a parameter, as a dropout's does in eval mode."""
    others = [x, *module.parameters(), *module.buffers()]
    return y.untyped_storage().data_ptr() in {other.untyped_storage().data_ptr() for other in others}


@dataclass(frozen=True)
class _Blocks:
    """Children of lists of modules that run once, and take one tensor of the batch's rows."""

    order: list[str]
    """All modules, in the order in which they run."""
    alone: list[str]
    """Blocks that are given no other tensor of the batch's rows."""
    in_parts: list[str]
    """Those that return one tensor of as many rows, and hold no other block."""


def _room(rows: int, like: Tensor) -> Tensor:
    """Memory on the CPU for [rows, ...] of a tensor's type and shape but for the first axis, not yet written.

    By way of NumPy, which asks the system for huge pages: with small ones, the first use of so much costs far more.
    """
    room = np.empty(rows * like[:1].nbytes, np.uint8)
    return torch.from_numpy(room).view(like.dtype).view(rows, *like.shape[1:])


_IMAGES = 11
"""In a dry run: no number that models' own sizes are likely to be multiples of."""


def _find_blocks(module: nn.Module, size: tuple[int, int]) -> _Blocks:
    """The blocks of a module on the meta device."""
    order: list[str] = []
    alone, plain = set(), set()

    def before(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        order.append(name)
        others = [one for one in tree_leaves((args[1:], options)) if isinstance(one, Tensor) and one.ndim]
        whole = bool(args) and isinstance(args[0], Tensor) and args[0].ndim > 0 and len(args[0]) == _IMAGES
        if whole and all(len(one) % _IMAGES for one in others):
            alone.add(name)

    def after(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim and len(output) == _IMAGES:
            plain.add(name)

    handles: list[Any] = []
    try:
        for name, part in module.named_modules():
            handles += [
                part.register_forward_pre_hook(lambda _, a, o, name=name: before(name, a, o), with_kwargs=True),
                part.register_forward_hook(lambda _, __, output, name=name: after(name, output)),
            ]
        with torch.inference_mode():
            module(torch.zeros(_IMAGES, 3, *size, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
    lists = {n for n, m in module.named_modules() if isinstance(m, nn.Sequential | nn.ModuleList)}
    found = [n for n in order if n in alone and n.rpartition(".")[0] in lists and order.count(n) == 1]
    inner = [n for n in found if not any(other.startswith(f"{n}.") for other in found)]
    return _Blocks(order, found, [n for n in inner if n in plain])


def _may_grow(module: nn.Module, size: tuple[int, int], blocks: Collection[str]) -> bool:
    """Whether a batch of two images on the meta device may get one more row from each block on."""

    def grow(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return torch.cat([args[0], args[0][-1:]]), *args[1:]

    handles: list[Any] = []
    try:
        handles += [module.get_submodule(block).register_forward_pre_hook(grow) for block in blocks]
        with torch.inference_mode():
            return len(module(torch.zeros(2, 3, *size, device="meta"))) == 2 + len(blocks)
    except MemoryError:
        raise
    except Exception:  # whatever a module raises whose input has grown while something else has not
        return False
    finally:
        for handle in handles:
            handle.remove()
