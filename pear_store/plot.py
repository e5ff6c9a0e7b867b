"""Draws a picture of a store: what tasks share, grouped by backbone, and what that saves."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pear_store.counted import counted
from pear_store.errors import PearStoreError
from pear_store.files import ending
from pear_store.format.checkpoint import Task, natural_key
from pear_store.readable import ReadableStore

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1))
_STRIPES = 4
"""Branches that are drawn at one position. If it has more, some are left out."""
_LABELS = 60
"""If there are more columns than this, they are drawn without names"""
_LINE = 0.16
"""Height in inches of a task's line, if the task's name is drawn beside it"""
_PANELS = 6
"""Backbones that get a map. Up to `_BARS` backbones get a bar."""
_BARS = 12
_COLOURS = (
    "#d1495b", "#2a9d5c", "#e9a03b", "#7b5cc4", "#17a2b8", "#b5651d", "#d65db1", "#6b8e23", "#f2684a", "#2f5fd0",
)  # fmt: skip
_BETWEEN, _WITHIN, _ONCE = "#56606e", "#a7b4c6", "#dededa"
"""Adapters without a colour of their own: used by several tasks, used repeatedly by one task, used once"""
_NEW, _ABOVE, _SAVED = "#4472a8", "#9db8d6", "#dfe5ec"
"""Parts of a bar: new bytes; bytes that a task above has, too; bytes that sharing within the task saves"""


@dataclass
class _Row:
    """What is drawn of a task.

    Args:
        cells: by position, the identity of each branch's adapter.
        sizes: the bytes of each of its tensors, by digest.
        within: the bytes that it would take on top if each branch had its own adapter.
        new: the bytes that no task above has.
        above: the bytes that a task above has, too.
    """

    name: str
    backbone: tuple[str, str]
    cells: dict[str, list[str]]
    sizes: dict[str, int]
    within: int
    new: int = 0
    above: int = 0


@dataclass
class _Key:
    """Adapters that have the same colour: one pair of tensors, or all that the same tasks use."""

    adapters: list[str] = field(default_factory=list)
    uses: int = 0
    tasks: tuple[str, ...] = ()
    saved_bytes: int = 0


def plot(store: ReadableStore, path: str | Path, references: Iterable[str] = ()) -> None:
    """Draws what tasks share to a .png or .svg file.

    Bars at the top show for each backbone what its tasks take, and what they would take without sharing. Below, each
    backbone has a map of tasks x positions. A cell has a stripe for each branch. The adapters that save most have a
    colour, which the legend explains. One colour is one pair of tensors, in any task and position. If there are too
    many pairs, one colour is all pairs that the same tasks use. Cores are ignored.

    Args:
        path: the file. One that is there is replaced.
        references: which tasks or versions to draw, in this order. Empty: the newest version of every task.

    Raises:
        NotFoundError: there is no such task.
        PearStoreError: the path has another ending, there is nothing to draw, or the file cannot be written.
        ImportError: matplotlib is not installed.
    """
    path = Path(path)
    if ending(path) not in FORMATS:
        raise PearStoreError(f"{path}: expected a file that ends in {' or '.join(FORMATS)}")
    from matplotlib.figure import Figure  # not pyplot, which would change the caller's figures and backend

    given = list(references)
    names = given or [version.task for version in store.tasks()]
    if not names:
        raise PearStoreError(f"{store.where}: no task to draw")
    pair_bytes: dict[str, int] = {}
    rows = [_row(name, store.get(name, copy=False), pair_bytes) for name in names]
    keys = _keys(rows, pair_bytes)
    coloured = keys[: len(_COLOURS)]
    if len(keys) > len(_COLOURS):
        coloured = [key for key in coloured if len(key.tasks) > 1]
    colours = {adapter: colour for key, colour in zip(coloured, _COLOURS, strict=False) for adapter in key.adapters}
    panels = _panels(rows, colours, is_sorted=not given)
    _count_new(panels.values())
    most = max(row.new + row.above + row.within for row in rows)
    drawn = list(panels.items())[:_PANELS]
    heights = _heights([len(members) for _, members in drawn])
    names_below = [_names_below(members) for _, members in drawn]
    bars = 0.35 * min(len(panels), _BARS) + 0.75
    legend = 0.2 * -(-(len(coloured) + 6) // 2) + 0.4
    tall = [bars, *(height + below + 0.5 for height, below in zip(heights, names_below, strict=True))]
    figure = Figure((13, sum(tall) + legend + 0.3), layout="constrained")
    grid = figure.add_gridspec(1 + len(drawn), 2, width_ratios=[3, 1], height_ratios=tall)
    _draw_bars(figure.add_subplot(grid[0, :]), panels)
    for place, ((backbone, _), members) in enumerate(drawn, 1):
        left = figure.add_subplot(grid[place, 0])
        is_named = heights[place - 1] >= _LINE * len(members)
        _draw_map(left, members, colours, backbone, is_named)
        right = figure.add_subplot(grid[place, 1], sharey=left)
        _draw_bytes(right, members, most, is_named, is_last=place == len(drawn))
    _add_legend(figure, coloured, keys[len(coloured) :], rows, left_out=len(panels) - len(drawn))
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise PearStoreError(f"{path}: cannot be written: {error.strerror}") from None


# ---- what is drawn


def _row(name: str, task: Task, pair_bytes: dict[str, int]) -> _Row:
    """What is drawn of a task. Adds to `pair_bytes` the bytes of each of its adapters, without cores."""
    identities = {}
    for adapter in {branch.adapter for branches in task.positions.values() for branch in branches}:
        parts = task.adapters[adapter]
        identities[adapter] = identity = f"{parts.down.name} {parts.up.name} {parts.down.place}"
        pair_bytes[identity] = sum(part.tensor(task.tensors).size_bytes for part in (parts.down, parts.up))
    cells = {
        position: [identities[branch.adapter] for branch in branches] for position, branches in task.positions.items()
    }
    sizes = {str(tensor.digest): tensor.size_bytes for tensor in task.tensors.values()}
    return _Row(name, (task.backbone_model, task.backbone_digest), cells, sizes, _shared_within(task))


def _shared_within(task: Task) -> int:
    """Bytes that a task would take on top if each branch had its own `down` and `up`."""
    adapters = task.adapters
    alone = sum(
        part.tensor(task.tensors).size_bytes
        for branches in task.positions.values()
        for branch in branches
        for part in (adapters[branch.adapter].down, adapters[branch.adapter].up)
    )
    used = {
        (matrix.name, matrix.place): matrix.tensor(task.tensors).size_bytes
        for adapter in adapters.values()
        for matrix in adapter.matrices
    }
    return max(0, alone - sum(used.values()))


def _keys(rows: Sequence[_Row], pair_bytes: Mapping[str, int]) -> list[_Key]:
    """Adapters that are used more than once, those that save most first.

    Each has its own key. If there are more of them than colours, adapters of the same tasks have one key.
    """
    uses = Counter(adapter for row in rows for branches in row.cells.values() for adapter in branches)
    tasks: dict[str, dict[str, None]] = {}
    for row in rows:
        for adapter in {adapter for branches in row.cells.values() for adapter in branches}:
            if uses[adapter] > 1:
                tasks.setdefault(adapter, {})[row.name] = None
    keys: dict[Any, _Key] = {}
    for adapter, names in tasks.items():
        key = keys.setdefault(adapter if len(tasks) <= len(_COLOURS) else tuple(names), _Key(tasks=tuple(names)))
        key.adapters.append(adapter)
        key.uses += uses[adapter]
        key.saved_bytes += (uses[adapter] - 1) * pair_bytes[adapter]
    several_first = len(keys) > len(_COLOURS)  # sharing between tasks is more interesting than sharing within one
    return sorted(keys.values(), key=lambda key: (several_first and len(key.tasks) < 2, -key.saved_bytes, key.tasks))


def _panels(rows: Iterable[_Row], colours: Mapping[str, str], is_sorted: bool) -> dict[tuple[str, str], list[_Row]]:
    """Tasks by backbone; the backbone of most tasks comes first. If `is_sorted`, tasks of like colours are adjacent."""
    panels: dict[tuple[str, str], list[_Row]] = {}
    for row in rows:
        panels.setdefault(row.backbone, []).append(row)
    if is_sorted:
        ranks = {colour: rank for rank, colour in enumerate(_COLOURS)}

        def likeness(row: _Row) -> tuple[list[int], int, str]:
            adapters = [adapter for branches in row.cells.values() for adapter in branches]
            found = sorted({ranks[colours[adapter]] for adapter in adapters if adapter in colours})
            return found or [len(ranks)], len(set(adapters)), row.name

        for members in panels.values():
            members.sort(key=likeness)
    return dict(sorted(panels.items(), key=lambda item: -len(item[1])))


def _count_new(panels: Iterable[Sequence[_Row]]) -> None:
    for members in panels:
        seen: set[str] = set()
        for row in members:
            row.new = sum(size for digest, size in row.sizes.items() if digest not in seen)
            row.above = sum(row.sizes.values()) - row.new
            seen |= row.sizes.keys()


# ---- how it is drawn


def _heights(counts: Sequence[int]) -> list[float]:
    """Heights of the maps in inches: one line for each task if all names fit, else a share of a page."""
    if sum(counts) <= 2 * _LABELS:
        return [max(0.45, 1.2 * _LINE * count) for count in counts]
    return [max(0.8, 12 * count / sum(counts)) for count in counts]


def _names_below(members: Sequence[_Row]) -> float:
    columns = _positions(members)
    return 0.065 * max(map(len, map(_shown, columns)), default=0) if len(columns) <= _LABELS else 0.1


def _positions(members: Sequence[_Row]) -> list[str]:
    return sorted({position for row in members for position in row.cells}, key=natural_key)


def _draw_bars(axes: "Axes", panels: Mapping[tuple[str, str], Sequence[_Row]]) -> None:
    """Draws what each backbone's tasks take, and what sharing saves."""
    taken = {key: [sum(getattr(row, part) for row in rows) for part in _PARTS] for key, rows in panels.items()}
    shown = list(taken.items())[:_BARS]
    most = max(sum(sizes) for _, sizes in shown)
    for place, ((model, _), sizes) in enumerate(shown):
        start = 0
        for size, colour in zip(sizes, (_NEW, _ABOVE, _SAVED), strict=True):
            axes.barh(place, size, left=start, height=0.7, color=colour)
            start += size
        rows = len(list(panels.values())[place])
        text = f"{_shown(model)}: {counted(rows, 'task')}, {_bytes(sizes[0])} stored, {_saved(sizes)}"
        axes.text(start + most * 0.01, place, text, va="center", fontsize=8, parse_math=False)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(0, most * 2.1)
    axes.set_axis_off()
    total = [sum(parts) for parts in zip(*taken.values(), strict=True)]
    count = sum(map(len, panels.values()))
    many = f" on {len(panels):,} backbones" if len(panels) > 1 else ""
    axes.set_title(
        f"{counted(count, 'task')}{many}: {_bytes(total[0])} stored in place of {_bytes(sum(total))}, "
        f"{_saved(total)}",
        fontsize=11, loc="left", fontweight="bold",
    )  # fmt: skip


_PARTS = ("new", "above", "within")


def _saved(sizes: Sequence[int]) -> str:
    return f"{sum(sizes[1:]) / max(1, sum(sizes)):.0%} saved by sharing"


def _bytes(number: float) -> str:
    unit, factor = next((unit, factor) for unit, factor in _UNITS if number >= factor or factor == 1)
    return f"{number / factor:.3g} {unit}" if factor > 1 else f"{number:.0f} {unit}"


def _draw_map(axes: "Axes", members: Sequence[_Row], colours: Mapping[str, str], backbone: str, is_named: bool) -> None:
    import numpy as np
    from matplotlib.colors import to_rgb

    columns = _positions(members)
    between = _used_by_several(members)
    stripes = min(_STRIPES, max((len(branches) for row in members for branches in row.cells.values()), default=1))
    picture = np.ones((len(members), max(1, len(columns)) * stripes, 3))
    for y, row in enumerate(members):
        uses = Counter(adapter for branches in row.cells.values() for adapter in branches)
        for x, position in enumerate(columns):
            branches = row.cells.get(position, [])
            for stripe in range(stripes if branches else 0):
                adapter = branches[stripe * len(branches) // stripes]
                other = _BETWEEN if adapter in between else _WITHIN if uses[adapter] > 1 else _ONCE
                picture[y, x * stripes + stripe] = to_rgb(colours.get(adapter, other))
    extent = (-0.5, max(1, len(columns)) - 0.5, len(members) - 0.5, -0.5)
    axes.imshow(picture, aspect="auto", interpolation="nearest", extent=extent)
    count = counted(len(members), "task")
    title = f"{_shown(backbone)}: {count} x {counted(len(columns), 'position')}"
    axes.set_title(title, fontsize=9, loc="left", parse_math=False)
    if len(columns) <= _LABELS:  # lines between the cells
        axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
        axes.grid(which="minor", axis="x", color="white", linewidth=2)
    if is_named:
        axes.set_yticks(np.arange(len(members) + 1) - 0.5, minor=True)
        axes.grid(which="minor", axis="y", color="white", linewidth=2)
    axes.tick_params(which="minor", length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    plain: dict[str, Any] = {"fontsize": 7, "parse_math": False}
    axes.set_xticks([], [])
    if len(columns) <= _LABELS:
        axes.set_xticks(range(len(columns)), [*map(_shown, columns)], rotation=90, **plain)
    axes.set_yticks([], [])
    if is_named:
        axes.set_yticks(range(len(members)), [_shown(row.name) for row in members], **plain)


def _used_by_several(members: Iterable[_Row]) -> set[str]:
    tasks = Counter(
        adapter for row in members for adapter in {one for branches in row.cells.values() for one in branches}
    )
    return {adapter for adapter, count in tasks.items() if count > 1}


def _draw_bytes(axes: "Axes", members: Sequence[_Row], most: int, is_named: bool, is_last: bool) -> None:
    """Draws each task's bytes beside its row of the map. All maps have the same scale."""
    import numpy as np

    text, unit = next((text, unit) for text, unit in _UNITS if most >= unit or unit == 1)

    edges = np.repeat(np.arange(len(members) + 1) - 0.5, 2)[1:-1]
    gap = 0.1 if is_named else 0.0
    edges = edges + np.tile([gap, -gap], len(members))
    start = np.zeros(2 * len(members))
    for part, colour in zip(_PARTS, (_NEW, _ABOVE, _SAVED), strict=True):
        end = start + np.repeat([getattr(row, part) / unit for row in members], 2)
        for first in range(0, len(edges), 2) if gap else [0]:
            last = first + 2 if gap else len(edges)
            axes.fill_betweenx(edges[first:last], start[first:last], end[first:last], color=colour, linewidth=0)
        start = end
    axes.set_xlim(0, max(1, most) / unit)
    axes.tick_params(labelsize=7)
    axes.tick_params(which="both", labelleft=False, left=False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    if is_last:
        axes.set_xlabel(f"tensors of each task, {text}", fontsize=8)


def _add_legend(
    figure: "Figure", coloured: Sequence[_Key], others: Sequence[_Key], rows: Sequence[_Row], left_out: int
) -> None:
    from matplotlib.patches import Patch

    drawn = [(colour, _described(key, rows)) for key, colour in zip(coloured, _COLOURS, strict=False)]
    for colour, text, is_between in (
        (_BETWEEN, "other adapters that several tasks use: save", True),
        (_WITHIN, "adapters used at several positions of one task: save", False),
    ):
        if saved := sum(key.saved_bytes for key in others if (len(key.tasks) > 1) == is_between):
            drawn.append((colour, f"{text} {_bytes(saved)}"))
    drawn += [
        (_ONCE, "an adapter that is used once"),
        (_NEW, "bars: bytes that no task above has"),
        (_ABOVE, "bars: shared with tasks above"),
        (_SAVED, "bars: saved by sharing within the task"),
    ]
    if left_out > 0:
        drawn.append(("none", f"no map here of {counted(left_out, 'more backbone')}: name the tasks"))
    handles = [Patch(color=colour, label=label) for colour, label in drawn]
    legend = figure.legend(handles=handles, loc="outside lower left", ncols=2, fontsize=7.5, frameon=False)
    for label in legend.get_texts():
        label.set_parse_math(False)


def _described(key: _Key, rows: Sequence[_Row]) -> str:
    tasks = f"{len(key.tasks):,} tasks" if len(key.tasks) > 1 else _shown(key.tasks[0])
    if len(key.adapters) > 1:
        return f"{len(key.adapters):,} adapters of {tasks}: save {_bytes(key.saved_bytes)}"
    where = next(position for position, _ in _where(key.adapters[0], rows))
    return f"{_shown(where)}, {counted(key.uses, 'time')} in {tasks}: saves {_bytes(key.saved_bytes)}"


def _where(adapter: str, rows: Iterable[_Row]) -> Iterator[tuple[str, str]]:
    for row in rows:
        for position in sorted(row.cells, key=natural_key):
            if adapter in row.cells[position]:
                yield position, row.name


def _shown(name: str) -> str:
    """A name in one line of at most 40 characters."""
    text = "".join(c if c.isprintable() else "?" for c in name)
    return text if len(text) <= 40 else f"{text[:39]}…"
