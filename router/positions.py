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

PRESETS = {
    "blocks": r".*blocks\.\d+\.(attn|mlp)",
    "attn": r".*blocks\.\d+\.attn",
    "mlp": r".*blocks\.\d+\.mlp",
    "qkv": r".*blocks\.\d+\.attn\.qkv",
    "linear": r".*blocks\.\d+\..*",  # narrowed to nn.Linear
}


def _selects(choice: str, name: str, module: nn.Module) -> bool:
    if choice not in PRESETS:
        return fnmatch.fnmatchcase(name, choice)
    fits = re.fullmatch(PRESETS[choice], name) is not None
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
            presets = ", ".join(PRESETS)
            some = ", ".join(n for n, m in named if isinstance(m, nn.Linear))[:120]
            raise BackboneError(f"positions {one!r} match no module; presets: {presets}; or a pattern over {some}, …")
    return [name for name, part in named if any(_selects(one, name, part) for one in wanted)]


@dataclass(frozen=True)
class Position:
    """What a module is given and returns: [..., d_in] and [..., d_out]."""

    d_in: int
    d_out: int
    owned: bool
    """Its output is memory of its own, which may be written to."""


def measure(
    backbone: Backbone, module: nn.Module, positions: Iterable[str], device: torch.device, dtype: torch.dtype
) -> tuple[int, dict[str, Position]]:
    """How wide the backbone's features are, and each position, by one forward of a black image.

    Args:
        module: the backbone's module on the device; nobody else runs it meanwhile.

    Raises:
        BackboneError: a position that is no module of this backbone, never runs, runs twice, or is not channels-last;
            or the backbone gives no pooled features.
    """
    modules = dict(module.named_modules())
    wanted = list(positions)
    for position in wanted:
        if position not in modules:
            raise BackboneError(f"backbone {backbone.name} has no module {position!r}")
    with torch.inference_mode(), _calls(module, wanted) as calls:
        features = module(torch.zeros(1, 3, *backbone.input_size, device=device, dtype=dtype))
    if features.ndim != 2:
        found = list(features.shape)
        raise BackboneError(f"backbone {backbone.name}: its output is {found}: expected pooled features")
    maps = [position for position, seen in calls.items() if seen and _axes(seen[0][0]) == 4]
    at_double_size = _shapes_at_double_size(backbone, maps)
    measured = {}
    for position, seen in calls.items():
        where = f"position {position!r} of {backbone.name}"
        if len(seen) != 1:
            raise BackboneError(f"{where} runs {len(seen)} times in a forward: expected once")
        x, y = seen[0]
        if not (isinstance(x, Tensor) and isinstance(y, Tensor)) or x.ndim < 2 or x.shape[:-1] != y.shape[:-1]:
            raise BackboneError(f"{where} does not map one tensor to one of equal leading axes, channels last")
        large = at_double_size.get(position, x.shape)
        if large[-1] != x.shape[-1] or isinstance(modules[position], nn.Conv2d):
            raise BackboneError(f"{where} is channels-first: expected a channels-last module such as a Linear")
        measured[position] = Position(x.shape[-1], y.shape[-1], not _aliases(y, x, modules[position]))
    return features.shape[1], measured


@contextmanager
def _calls(module: nn.Module, positions: Iterable[str]) -> Iterator[dict[str, list[tuple[Any, Any]]]]:
    """The first input and the output of each call of each position, as long as it is open."""
    seen: dict[str, list[tuple[Any, Any]]] = {position: [] for position in positions}
    with ExitStack() as hooks:
        for position, calls in seen.items():
            part = module.get_submodule(position)
            keep = calls.append
            hooks.enter_context(
                part.register_forward_hook(lambda _, args, y, keep=keep: keep((args[0] if args else None, y)))
            )
        yield seen


def _axes(x: object) -> int:
    return x.ndim if isinstance(x, Tensor) else 0


def _shapes_at_double_size(backbone: Backbone, positions: list[str]) -> dict[str, torch.Size]:
    """What positions with feature maps are given for an image of twice the side, where the model takes that.

    An axis that grows with the image is no channel axis. On the meta device, where nothing is computed, if it can be.
    """
    if not positions:
        return {}
    height, width = (2 * side for side in backbone.input_size)
    for device in ("meta", None):
        try:
            module = backbone.sized((height, width)).to(device)
            images = torch.zeros(1, 3, height, width, device=next(module.parameters()).device)
            with torch.inference_mode(), _calls(module, positions) as calls:
                module(images)
            return {position: seen[0][0].shape for position, seen in calls.items() if seen}
        except MemoryError:
            raise
        except Exception:  # whatever a model does that the meta device, or this size, cannot
            continue
    return {}


def _aliases(y: Tensor, x: Tensor, module: nn.Module) -> bool:
    """Whether an output shares memory with its input or with a parameter, as a dropout's does in eval mode."""
    others = [x, *module.parameters(), *module.buffers()]
    return y.untyped_storage().data_ptr() in {other.untyped_storage().data_ptr() for other in others}
