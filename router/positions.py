"""Positions: the modules of a backbone whose outputs tasks may add to; how they are chosen, and what they are."""

import fnmatch
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from router.backbone import Backbone
from router.errors import BackboneError
from router.ops import strides

_WHOLE = (
    r"layer\d+\.\d+",  # resnet
    r"s\d+\.b\d+",  # regnet
    r"stages\.\d+\.(blocks\.)?\d+",  # convnext, resnetv2, nfnet, byobnet
    r"blocks\.\d+\.\d+",  # efficientnet, mobilenet
    r"features\.\d+",  # inception_v4, rexnet
)
PRESETS = {
    "blocks": r".*blocks\.\d+\.(attn|mlp)",
    "attn": r".*blocks\.\d+\.attn",
    "mlp": r".*blocks\.\d+\.mlp",
    "qkv": r".*blocks\.\d+\.attn\.qkv",
    "linear": r".*blocks\.\d+\..*",  # narrowed to nn.Linear
    "whole": "|".join(_WHOLE),
    "pointwise": r".*",  # narrowed to 1x1 convolutions
}


def _selects(choice: str, name: str, module: nn.Module) -> bool:
    if choice not in PRESETS:
        return fnmatch.fnmatchcase(name, choice)
    fits = re.fullmatch(PRESETS[choice], name) is not None
    if choice == "pointwise":
        return isinstance(module, nn.Conv2d) and is_linear(module)
    return fits and (choice != "linear" or isinstance(module, nn.Linear))


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one matrix over channels: a Linear, or a 1x1 convolution."""
    if type(module) is nn.Conv2d:
        return (module.kernel_size, module.groups, module.padding) == ((1, 1), 1, (0, 0))
    return type(module) is nn.Linear


def choose_positions(module: nn.Module, choice: str) -> list[str]:
    """The module paths that comma-separated presets and shell patterns select, in forward order of blocks.

    Raises:
        BackboneError: one of them matches nothing.
    """
    named = [(name, m) for name, m in module.named_modules() if name]
    wanted = [part.strip() for part in choice.split(",")]
    for one in wanted:
        if not any(_selects(one, name, part) for name, part in named):
            presets = ", ".join(PRESETS)
            some = ", ".join(n for n, m in named if is_linear(m))[:120]
            raise BackboneError(f"positions {one!r} match no module; presets: {presets}; or a pattern over {some}, …")
    return [name for name, part in named if any(_selects(one, name, part) for one in wanted)]


@dataclass(frozen=True)
class Position:
    """What a module is given and returns: [..., d_in] and [..., d_out]; or maps with their channels in axis 1."""

    d_in: int
    d_out: int
    owned: bool
    """Its output is memory of its own, which may be written to."""
    channels_first: bool
    """Its axes are [batch, channel, height, width]."""


def measure(
    backbone: Backbone, module: nn.Module, positions: Iterable[str], device: torch.device, dtype: torch.dtype
) -> tuple[int, dict[str, Position]]:
    """How wide the backbone's features are, and each position, by one forward of a black image.

    Args:
        module: the backbone's module on the device; nobody else runs it meanwhile.

    Raises:
        BackboneError: a position that is no module of this backbone, never runs, runs twice, changes its input, or
            returns other axes than it is given; or the backbone gives no pooled features.
    """
    modules = dict(module.named_modules())
    wanted = list(positions)
    for position in wanted:
        if position not in modules:
            raise BackboneError(f"backbone {backbone.name} has no module {position!r}")
    with torch.inference_mode(False), torch.no_grad(), _calls(module, wanted) as calls:
        features = module(torch.zeros(1, 3, *backbone.input_size, device=device, dtype=dtype))
    if features.ndim != 2:
        found = list(features.shape)
        raise BackboneError(f"backbone {backbone.name}: its output is {found}: expected pooled features")
    maps = [position for position, seen in calls.items() if seen and _axes(seen[0].x) == 4]
    at_double_size = _calls_at_double_size(backbone, maps)
    measured = {}
    for position, seen in calls.items():
        where = f"position {position!r} of {backbone.name}"
        if len(seen) != 1:
            raise BackboneError(f"{where} runs {len(seen)} times in a forward: expected once")
        call = seen[0]
        if not (isinstance(call.x, Tensor) and isinstance(call.y, Tensor)) or call.x.ndim < 2:
            raise BackboneError(f"{where}: expected a module that is given one tensor, and returns one")
        if call.changed:
            raise BackboneError(
                f"{where} changes its input in place: expected a module that leaves it; take its parent"
            )
        large = at_double_size.get(position, call)
        first = call.x.ndim == 4 and (isinstance(modules[position], nn.Conv2d) or large.x.shape[-1] != call.x.shape[-1])
        if not (_keeps_pixels(call, large) if first else call.x.shape[:-1] == call.y.shape[:-1]):
            raise BackboneError(
                f"{where} makes {list(call.y.shape)} of {list(call.x.shape)}: expected equal axes but for the "
                "channels, or a map whose sides are those of its input over a stride"
            )
        axis = 1 if first else -1
        owned = not _aliases(call.y, call.x, modules[position])
        measured[position] = Position(call.x.shape[axis], call.y.shape[axis], owned, first)
    return features.shape[1], measured


@dataclass(frozen=True)
class _Call:
    """The first input of a module, its output, and whether it wrote to its input."""

    x: Any
    y: Any
    changed: bool


@contextmanager
def _calls(module: nn.Module, positions: Iterable[str]) -> Iterator[dict[str, list[_Call]]]:
    """Each call of each position, as long as it is open."""
    seen: dict[str, list[_Call]] = {position: [] for position in positions}
    with ExitStack() as hooks:
        for position, calls in seen.items():
            part = module.get_submodule(position)
            versions: list[int] = []

            def before(_: nn.Module, args: tuple[Any, ...], versions: list[int] = versions) -> None:
                versions.append(_version(args[0] if args else None))

            def after(
                _: nn.Module, args: tuple[Any, ...], y: Any, calls: list[_Call] = calls, versions: list[int] = versions
            ) -> None:
                x = args[0] if args else None
                calls.append(_Call(x, y, _version(x) != versions.pop()))

            hooks.enter_context(part.register_forward_pre_hook(before))
            hooks.enter_context(part.register_forward_hook(after))
        yield seen


def _version(x: object) -> int:
    """How often a tensor was written to; inference tensors do not count."""
    return x._version if isinstance(x, Tensor) and not x.is_inference() else 0


def _axes(x: object) -> int:
    return x.ndim if isinstance(x, Tensor) else 0


def _keeps_pixels(*calls: _Call) -> bool:
    """Whether a module's output is a map of its input's pixels, or of every so many, for two sizes of image."""
    found = {strides(call.x.shape, call.y.shape) if _axes(call.y) == 4 else None for call in calls}
    first = calls[0]
    return None not in found and len(found) == 1 and first.x.shape[0] == first.y.shape[0]


def _calls_at_double_size(backbone: Backbone, positions: list[str]) -> dict[str, _Call]:
    """How positions with feature maps run for an image of twice the side, where the model takes that.

    An axis that grows with the image is no channel axis. On the meta device, where nothing is computed, if it can be.
    """
    if not positions:
        return {}
    height, width = (2 * side for side in backbone.input_size)
    for device in ("meta", None):
        try:
            module = backbone.sized((height, width)).to(device)
            images = torch.zeros(1, 3, height, width, device=next(module.parameters()).device)
            with torch.inference_mode(False), torch.no_grad(), _calls(module, positions) as calls:
                module(images)
            return {position: seen[0] for position, seen in calls.items() if seen}
        except MemoryError:
            raise
        except Exception:  # whatever a model does that the meta device, or this size, cannot
            continue
    return {}


def _aliases(y: Tensor, x: Tensor, module: nn.Module) -> bool:
    """Whether an output shares memory with its input or with a parameter, as a dropout's does in eval mode."""
    others = [x, *module.parameters(), *module.buffers()]
    return y.untyped_storage().data_ptr() in {other.untyped_storage().data_ptr() for other in others}
