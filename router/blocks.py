"""Blocks: children of a backbone's lists of modules, such as a ViT's `blocks.3`.

A batch may grow at the input of a block: where tasks stop agreeing, rows are repeated. On a CPU a block may take a
large batch in parts, so that its intermediate results stay in caches.
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
    """The blocks at whose inputs a batch may grow. No tensor bypasses them."""

    blocks: tuple[str, ...]
    """In forward order. Level 0 is before the first block; level i + 1 begins with blocks[i]."""
    of: Mapping[str, int]
    """Module path -> its level."""


@dataclass(frozen=True)
class Blocks:
    """Children of lists of modules that run once in a forward and take a tensor of the batch's rows."""

    order: list[str]
    """All modules, in the order in which they run."""
    alone: list[str]
    """Blocks that take no other tensor of the batch's rows."""
    in_parts: list[str]
    """Those of them that return one tensor of as many rows and contain no other block."""


@dataclass(eq=False)
class Pass:
    """One forward: which branches it adds, and where its batch grows."""

    weights: Mapping[str, PositionWeights] = field(default_factory=dict)
    """Position -> its branches."""
    grow: Mapping[str, Tensor] = field(default_factory=dict)
    """Block -> int64 [row]: for each row from this block on, the earlier row that it continues."""
    in_place: bool = False
    """Whether branches may be added in the memory of a position's output."""
    most_bytes: int | None = None
    """Bytes of the largest input that a block takes as a whole. None: no limit."""
    part: tuple[int, int, int] | None = None
    """The rows that a block computes now: (first, end, number of all rows). None: all."""

    def weights_at(self, position: str) -> PositionWeights | None:
        """The branches at a position for the rows that are computed now."""
        weights = self.weights.get(position)
        return weights if weights is None or self.part is None else weights.of_rows(*self.part)


Now = Callable[[], Pass]
"""Gives the current forward."""


def hook_growth(module: nn.Module, levels: Levels, blocks: Blocks, now: Now) -> None:
    """Adds hooks that let a batch grow at the inputs of blocks."""
    for block in levels.blocks:
        module.get_submodule(block).register_forward_pre_hook(_grower(block, blocks, now))


def divide(module: nn.Module, blocks: Blocks, now: Now) -> None:
    """Changes blocks so that they can take a batch in parts."""
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
    """Whether the block's own forward grows its input part by part. The grown input is then never whole in memory.

    A block that is itself a position gets a grown input, because its branches need it.
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
    """Rows per part, or `count` if the whole input fits `most_bytes`.

    Parts are equal. No part cuts a run of rows that share one task's weights, unless one run alone is too large: then
    parts divide the run.
    """
    parts = 1 if forward.most_bytes is None else min(count, -(-count * row_bytes // forward.most_bytes))
    rows = -(-count // parts)
    if parts > 1:
        inside = f"{block}."
        units = [w.runs for p, w in forward.weights.items() if w.runs is not None and p.startswith(inside)]
        run = count // max(units, default=count)
        rows = rows // run * run if run <= rows else -(-run // -(-run // rows))
    return rows


def _room(rows: int, like: Tensor) -> Tensor:
    """Unwritten CPU memory for a tensor [rows, ...]. Its dtype and its other axes are those of `like`.

    NumPy allocates it, because NumPy asks the system for huge pages. With small pages the first use is much slower.
    """
    room = np.empty(rows * like[:1].nbytes, np.uint8)
    return torch.from_numpy(room).view(like.dtype).view(rows, *like.shape[1:])


_IMAGES = 11
"""Batch size of a dry run. The sizes of models are rarely multiples of it."""


def find_blocks(backbone: Backbone) -> Blocks:
    """A backbone's blocks. Empty if they cannot be found."""
    try:
        return _find_blocks(share(backbone.module).to("meta"), backbone.input_size)
    except MemoryError:
        raise
    except Exception:  # whatever a model raises on the meta device
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
    """Finds where a backbone's batches may grow, by growing one on the meta device.

    If that fails there are no blocks. Then rows share images, but no part of the forward.
    """
    module = share(backbone.module)
    order, blocks = found.order or [name for name, _ in module.named_modules()], found.alone
    module.to("meta")
    may_grow = partial(_may_grow, module, backbone.input_size)
    if not may_grow(blocks):
        kinds: dict[str, list[str]] = {}
        for block in blocks:  # layer1.0 and layer2.3 are one kind, layer1.0.downsample.0 is another
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
    """Whether a batch of two images on the meta device can get one more row at each of these blocks."""

    def grow(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return torch.cat([args[0], args[0][-1:]]), *args[1:]

    handles: list[Any] = []
    try:
        handles += [module.get_submodule(block).register_forward_pre_hook(grow) for block in blocks]
        with torch.inference_mode():
            return len(module(torch.zeros(2, 3, *size, device="meta"))) == 2 + len(blocks)
    except MemoryError:
        raise
    except Exception:  # whatever a module raises if its input has grown and another tensor has not
        return False
    finally:
        for handle in handles:
            handle.remove()
