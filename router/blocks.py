"""Blocks: children of a backbone's lists, such as a ViT's `blocks.3`, at whose inputs a batch may grow or part.

A batch grows where tasks that had all in common part: rows are repeated at the input of a block. On a CPU a block may
take a large batch in parts, so that what it computes on the way stays in caches.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from router.backbone import Backbone, share
from router.ops import PositionWeights


@dataclass(frozen=True)
class Levels:
    """Where a batch may grow on its way through a backbone: at the inputs of blocks that nothing bypasses."""

    blocks: tuple[str, ...]
    """In forward order; level 0 lies before the first, level i + 1 begins with blocks[i]."""
    of: Mapping[str, int]
    """The level of each module."""


@dataclass(frozen=True)
class Blocks:
    """Children of lists of modules that run once, and take one tensor of the batch's rows."""

    order: list[str]
    """All modules, in the order in which they run."""
    alone: list[str]
    """Blocks that are given no other tensor of the batch's rows."""
    in_parts: list[str]
    """Those that return one tensor of as many rows, and hold no other block."""


@dataclass(eq=False)
class Pass:
    """One forward: what is added and what grows on its way."""

    weights: Mapping[str, PositionWeights] = field(default_factory=dict)
    """Position -> its branches."""
    grow: Mapping[str, Tensor] = field(default_factory=dict)
    """Block -> int64, the row that each row from there on continues."""
    in_place: bool = False
    """Branches may be added to the memory of a position's output."""
    most_bytes: int | None = None
    """The largest input that a block takes as one."""
    part: tuple[int, int, int] | None = None
    """The rows that a block is given at present: first, end, and of how many."""

    def weights_at(self, position: str) -> PositionWeights | None:
        """The branches there, of the rows that are given at present."""
        weights = self.weights.get(position)
        return weights if weights is None or self.part is None else weights.of_rows(*self.part)


Now = Callable[[], Pass]
"""The forward under way."""


def hook_growth(module: nn.Module, levels: Levels, blocks: Blocks, now: Now) -> None:
    """Lets a batch grow at the inputs of blocks."""
    for block in levels.blocks:
        module.get_submodule(block).register_forward_pre_hook(_grower(block, blocks, now))


def divide(module: nn.Module, blocks: Blocks, now: Now) -> None:
    """Lets blocks take a batch in parts."""
    for block in blocks.in_parts:
        part = cast(Any, module.get_submodule(block))
        part.forward = _by_parts(block, part.forward, blocks, now)


def _grower(block: str, blocks: Blocks, now: Now) -> Any:
    def grow(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        rows = now().grow.get(block)
        if rows is None or _grows_within(block, blocks, now()):
            return None
        return args[0].index_select(0, rows), *args[1:]

    return grow


def _grows_within(block: str, blocks: Blocks, forward: Pass) -> bool:
    """Whether a block's own forward grows its input, part by part, so that it never lies in memory as a whole.

    A block that is a position itself is given it grown: its branches need it.
    """
    return block in blocks.in_parts and block not in forward.weights


def _by_parts(block: str, run: Callable[..., Tensor], blocks: Blocks, now: Now) -> Callable[..., Tensor]:
    def by_parts(x: Tensor, /, *args: Any, **options: Any) -> Tensor:
        forward = now()
        grown = forward.grow.get(block) if _grows_within(block, blocks, forward) else None
        count = len(x) if grown is None else len(grown)
        rows = _part_rows(block, count, x[:1].nbytes, forward)
        if rows >= count:
            return run(x if grown is None else x.index_select(0, grown), *args, **options)
        out: Tensor | None = None
        try:
            for start in range(0, count, rows):
                stop = min(start + rows, count)
                part = x[start:stop] if grown is None else x.index_select(0, grown[start:stop])
                forward.part = start, stop, count
                found = run(part, *args, **options)
                out = _room(count, found) if out is None else out
                out[start:stop] = found
        finally:
            forward.part = None
        assert out is not None
        return out

    return by_parts


def _part_rows(block: str, count: int, row_bytes: int, forward: Pass) -> int:
    """How many rows a block takes at once: of a batch that is too large, equal parts, which end where the runs of
    rows do that one task's branches serve, or divide them."""
    parts = 1 if forward.most_bytes is None else min(count, -(-count * row_bytes // forward.most_bytes))
    rows = -(-count // parts)
    if parts > 1:
        inside = f"{block}."
        units = [w.runs for p, w in forward.weights.items() if w.runs is not None and p.startswith(inside)]
        run = count // max(units, default=count)
        rows = rows // run * run if run <= rows else -(-run // -(-run // rows))
    return rows


def _room(rows: int, like: Tensor) -> Tensor:
    """Memory on the CPU for [rows, ...] of a tensor's type and shape but for the first axis, not yet written.

    By way of NumPy, which asks the system for huge pages: with small ones, the first use of so much costs far more.
    """
    room = np.empty(rows * like[:1].nbytes, np.uint8)
    return torch.from_numpy(room).view(like.dtype).view(rows, *like.shape[1:])


_IMAGES = 11
"""In a dry run: no number that models' own sizes are likely to be multiples of."""


def find_blocks(backbone: Backbone) -> Blocks:
    """A backbone's blocks; none where they cannot be found."""
    try:
        return _find_blocks(share(backbone.module).to("meta"), backbone.input_size)
    except MemoryError:
        raise
    except Exception:  # whatever a model may do that the meta device cannot
        return Blocks([], [], [])


def _find_blocks(module: nn.Module, size: tuple[int, int]) -> Blocks:
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
    return Blocks(order, found, [n for n in inner if n in plain])


def find_levels(backbone: Backbone, found: Blocks) -> Levels:
    """Where a backbone's batches may grow, found by growing one on the meta device.

    No blocks where that fails: then only the images, but no part of the forward, are shared.
    """
    module = share(backbone.module)
    order, blocks = found.order or [name for name, _ in module.named_modules()], found.alone
    module.to("meta")
    may_grow = partial(_may_grow, module, backbone.input_size)
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
