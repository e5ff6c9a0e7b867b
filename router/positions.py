"""Positions: the modules of a backbone to whose outputs tasks may add; how they are chosen and measured."""

import fnmatch
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pear_store.counted import counted
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
    "linear": r".*blocks\.\d+\..*",  # only nn.Linear
    "whole": "|".join(_WHOLE),
    "pointwise": r".*",  # only 1x1 convolutions
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
    """The module paths that presets and shell patterns select.

    Args:
        module: a backbone's module.
        choice: comma-separated presets (blocks, attn, mlp, qkv, linear, whole, pointwise) and patterns of module paths.
    Returns:
        Paths in the order in which the modules are registered.
    Raises:
        BackboneError: a preset or pattern matches nothing.
    """
    named = [(name, m) for name, m in module.named_modules() if name]
    wanted = [part.strip() for part in choice.split(",")]
    for one in wanted:
        if not any(_selects(one, name, part) for name, part in named):
            presets = ", ".join(PRESETS)
            some = ", ".join(n for n, m in named if is_linear(m))[:120]
            raise BackboneError(
                f"positions {one!r} match no module: expected one of the presets {presets}, or a pattern over {some}, …"
            )
    return [name for name, part in named if any(_selects(one, name, part) for one in wanted)]


@dataclass(frozen=True)
class Position:
    """The measured widths of a module that takes [..., d_in] and returns [..., d_out], or maps of channels first."""

    d_in: int
    d_out: int
    owned: bool
    """Whether its output has memory of its own, which may be written to."""
    channels_first: bool
    """Whether its axes are [batch, channel, height, width]."""


def measure(
    backbone: Backbone, module: nn.Module, positions: Iterable[str], device: torch.device, dtype: torch.dtype
) -> tuple[int, dict[str, Position]]:
    """Measures positions and the width of the features, in one forward of a black image.

    Args:
        module: the backbone's module on the device. No other thread may run it meanwhile.
        positions: module paths.
    Returns:
        The width of the pooled features, and each position.
    Raises:
        BackboneError: a position is not a module of this backbone, never runs, runs twice, changes its input, or
            returns other axes than its input has; or the backbone gives no pooled features.
    """
    modules = dict(module.named_modules())
    wanted = list(positions)
    for position in wanted:
        if position not in modules:
            raise BackboneError(f"backbone {backbone.name} has no module {position!r}: choose other positions")
    with torch.inference_mode(False), torch.no_grad(), _calls(module, wanted) as calls:
        features = module(torch.zeros(1, 3, *backbone.input_size, device=device, dtype=dtype))
    if features.ndim != 2:
        found = list(features.shape)
        raise BackboneError(f"backbone {backbone.name}: expected pooled features [batch, d], found an output {found}")
    maps = [position for position, seen in calls.items() if seen and _axes(seen[0].x) == 4]
    at_double_size = _calls_at_double_size(backbone, maps)
    measured = {}
    for position, seen in calls.items():
        where = f"position {position!r} of {backbone.name}"
        if len(seen) != 1:
            raise BackboneError(
                f"{where} runs {counted(len(seen), 'time')} in a forward, expected once: choose other positions"
            )
        call = seen[0]
        if not (isinstance(call.x, Tensor) and isinstance(call.y, Tensor)) or call.x.ndim < 2:
            raise BackboneError(f"{where}: expected a module that takes one tensor and returns one")
        if call.changed:
            raise BackboneError(
                f"{where} changes its input in place: expected a module that does not; choose its parent"
            )
        large = at_double_size.get(position, call)
        first = call.x.ndim == 4 and (isinstance(modules[position], nn.Conv2d) or large.x.shape[-1] != call.x.shape[-1])
        if not (_keeps_pixels(call, large) if first else call.x.shape[:-1] == call.y.shape[:-1]):
            raise BackboneError(
                f"{where} makes {list(call.y.shape)} of {list(call.x.shape)}: expected equal axes except for channels, "
                "or a map with the sides of its input divided by a stride; choose other positions"
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
    """Records each call of each position inside the block."""
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
    """How many times a tensor was written to. 0 for inference tensors, which do not count."""
    return x._version if isinstance(x, Tensor) and not x.is_inference() else 0


def _axes(x: object) -> int:
    return x.ndim if isinstance(x, Tensor) else 0


def _keeps_pixels(*calls: _Call) -> bool:
    """Whether a module's output keeps its input's pixels, or every s-th, with the same stride in all calls."""
    found = {strides(call.x.shape, call.y.shape) if _axes(call.y) == 4 else None for call in calls}
    first = calls[0]
    return None not in found and len(found) == 1 and first.x.shape[0] == first.y.shape[0]


def _calls_at_double_size(backbone: Backbone, positions: list[str]) -> dict[str, _Call]:
    """Calls of positions with feature maps for an image of twice the side. Empty if the model does not take that.

    An axis that grows with the image is not the channel axis. The forward runs on the meta device if possible, where
    nothing is computed.
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
        except Exception:  # whatever a model raises on the meta device or for this size
            continue
    return {}


def _aliases(y: Tensor, x: Tensor, module: nn.Module) -> bool:
    """Whether an output shares memory with its input or with a parameter, as a dropout's does in eval mode."""
    others = [x, *module.parameters(), *module.buffers()]
    return y.untyped_storage().data_ptr() in {other.untyped_storage().data_ptr() for other in others}
