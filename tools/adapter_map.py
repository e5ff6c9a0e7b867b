#!/usr/bin/env python3
"""Draw which position uses which adapter, for one or more task checkpoints.

One row a task, one cell a position. A filled cell has an adapter of its own, the darker the more important; a pale cell
borrows: it has its source's colour, and an arc leads to it. A dot marks a knowledge checkpoint.

    python tools/adapter_map.py dtd.safetensors svhn.safetensors --out map.png
"""

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from pear_store import PearStoreError, Task, read_checkpoint
from pear_store.format.checkpoint import natural_key


@dataclass(frozen=True)
class Row:
    """A task as drawn: sample images to its left, and lines of text to its right."""

    task: Task
    images: Sequence[Any] = ()
    notes: Sequence[str] = field(default=())


def colours(task: Task) -> dict[str, tuple[float, float, float]]:
    """A colour for each adapter, the same where only cores differ: along the rainbow in order of first use."""
    owners = list(dict.fromkeys(branch.adapter for _, branches in positions(task) for branch in branches))
    trained = [name for name in owners if task.adapters[name].role != "knowledge"]
    downs = {name: task.adapters[name].down.name for name in trained}
    order = {down: i for i, down in enumerate(dict.fromkeys(downs.values()))}
    return {
        name: colorsys.hsv_to_rgb(0.92 * order[down] / max(1, len(order)), 0.72, 0.88) for name, down in downs.items()
    }


def positions(task: Task) -> list[tuple[str, list[Any]]]:
    """Positions with their branches, in forward order."""

    return sorted(task.positions.items(), key=lambda item: natural_key(item[0]))


def draw(rows: Sequence[Row], out: Path, title: str = "") -> None:
    """Writes the picture; its kind follows the file's ending."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Arc, FancyBboxPatch

    columns = list(dict.fromkeys(name for row in rows for name, _ in positions(row.task)))
    width = len(columns)
    shown = max((len(row.images) for row in rows), default=0)
    noted = any(row.notes for row in rows)
    pitch = 1.75
    figure, axes = plt.subplots(
        figsize=(0.62 * (width + shown + 3) + (3.1 if noted else 0.3), 0.62 * pitch * len(rows) + 1.5)
    )
    for i, row in enumerate(rows):
        y = -pitch * i
        task, palette = row.task, colours(row.task)
        borrowed: Mapping[str, str] = task.record["training"].get("borrowed", {})
        importance: Mapping[str, float] = task.record["training"].get("importance", {})
        peak = max(importance.values(), default=0) or 1
        for k, image in enumerate(row.images):
            left = -3.4 - (shown - k) * 1.06
            axes.imshow(image, extent=(left, left + 1, y - 0.5, y + 0.5), cmap="gray", interpolation="nearest")
        axes.text(-3.2, y, task.name, ha="left", va="center", fontsize=12, fontweight="bold")
        own = task.positions
        for position, branches in own.items():
            x = columns.index(position)
            used = [branch for branch in branches if branch.adapter in palette]
            is_borrowed = position in borrowed
            for branch in used:
                alpha = 0.28 if is_borrowed else 0.55 + 0.45 * (importance.get(position, peak) / peak) ** 0.3
                box = FancyBboxPatch(
                    (x - 0.38, y - 0.38), 0.76, 0.76, boxstyle="round,pad=0.02,rounding_size=0.14",
                    facecolor=(*palette[branch.adapter], alpha),
                    edgecolor=palette[branch.adapter] if is_borrowed else "none",
                    linestyle="--" if is_borrowed else "-", linewidth=1.3,
                )  # fmt: skip
                axes.add_patch(box)
                if is_borrowed:
                    cored = task.adapters[branch.adapter].core is not None
                    how = "core" if cored else f"×{branch.scale:.2f}"
                    axes.text(x, y, how, ha="center", va="center", fontsize=7.5, color="#333333")
            if any(branch.adapter not in palette for branch in branches):
                axes.plot(x + 0.24, y - 0.24, "o", color="#333333", markersize=3)
            if is_borrowed and borrowed[position] in columns and used:
                start = columns.index(borrowed[position])
                axes.add_patch(
                    Arc(((start + x) / 2, y + 0.42), abs(start - x), 0.34 + 0.11 * abs(start - x), theta1=0, theta2=180,
                        color=palette[used[0].adapter], linewidth=1.4)
                )  # fmt: skip
        for missing in set(columns) - set(own):
            axes.plot(columns.index(missing), y, marker=".", color="#cccccc", markersize=4)
        for k, note in enumerate(row.notes):
            axes.text(width - 0.1, y + 0.38 - 0.38 * k, note, va="center", fontsize=9, family="DejaVu Sans Mono")
    bottom = -pitch * (len(rows) - 1) - 0.62
    for x, name in enumerate(columns):
        axes.text(x, bottom, name.removeprefix("blocks."), rotation=60, ha="right", va="top", fontsize=8.5)
    axes.set_xlim(-3.6 - 1.06 * shown, width + (5.0 if noted else 0))
    axes.set_ylim(bottom - 1.3, 1.35)
    axes.set_aspect("equal")
    axes.axis("off")
    if title:
        axes.set_title(title, loc="left", fontsize=12, pad=8)
    figure.savefig(out, dpi=140, bbox_inches="tight", facecolor="white")
    plt.close(figure)


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("files", nargs=-1, required=True, type=click.Path())
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A .png, .svg or .pdf file.")
def main(files: tuple[str, ...], out: Path) -> None:
    try:
        rows = [Row(read_checkpoint(file)) for file in files]
    except PearStoreError as error:
        raise click.ClickException(str(error)) from None
    if out.suffix not in (".png", ".svg", ".pdf") or not out.parent.is_dir():
        raise click.ClickException(f"{out}: expected a .png, .svg or .pdf file in a folder that exists")
    draw(rows, out)
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    main()
