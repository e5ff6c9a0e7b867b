"""A run as a picture: the importance of each position, what was pruned, and the learning curve. Needs matplotlib."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from pear_train.errors import ConfigError, ResourceError
from pear_train.report import Result
from pear_train.targets import check_target

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SOFTWARE = "pear-train"
"""Marks a picture's metadata. Only a picture with this mark may be replaced."""
WHY_PASSED_OVER = "pruned, although some kept ones matter less: at least one adapter of each shape is kept"


def plot_path(out: Path) -> Path:
    """The picture of the run that writes `out`: beside it, with the ending .png."""
    return out.with_name(out.name.removesuffix(".safetensors") + ".png")


def check_plot(path: Path) -> None:
    """Checks, before training, that a picture can be written at `path`.

    Raises:
        ConfigError: matplotlib is not installed, or `path` holds something else than a run's picture.
    """
    try:
        import_module("matplotlib.figure")
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'pear-adapters[demo]'") from None
    check_picture("--plot", path)


def check_picture(option: str, path: Path) -> None:
    """Raises a ConfigError if a picture cannot be written, or if `path` holds something else than a run's picture."""
    check_target(option, path, lambda start: start.startswith(b"\x89PNG") and f"Software\0{SOFTWARE}".encode() in start)


def plot_result(result: Result, path: Path) -> None:
    """Draws the importance of every position beside the learning curve. Needs matplotlib.

    Args:
        path: the PNG file to write. An earlier picture of a run is replaced, anything else is not.
    Raises:
        ConfigError: matplotlib is not installed, or `path` holds something else than a run's picture.
        ResourceError: the file cannot be written.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    rows = len(result.importance)
    figure = Figure(figsize=(11 if rows else 6, max(3.8, 0.22 * rows)), layout="constrained")
    axes = figure.subplots(1, 2 if rows else 1, squeeze=False)[0]
    if rows:
        _draw_importance(axes[0], result)
    _draw_curves(axes[-1], result)
    figure.suptitle(f"{result.task} ({result.method}): val {100 * result.val_top1:.1f} %")
    try:
        figure.savefig(path, dpi=120, metadata={"Software": SOFTWARE})
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written: {error.strerror or error}") from None


def _draw_importance(axes: "Axes", result: Result) -> None:
    rows, peak = len(result.importance), max(result.importance.values()) or 1.0
    kept = [position not in result.pruned for position in result.importance]
    colours = ["tab:green" if own else "tab:orange" for own in kept]
    names = [f"{p} ← {result.borrowed[p]}" if p in result.borrowed else p for p in result.importance]
    names = [f"{name} *" if p in result.passed_over else name for name, p in zip(names, result.importance, strict=True)]
    axes.barh(range(rows), [score / peak for score in result.importance.values()], color=colours)
    axes.set_yticks(range(rows), names, fontsize=7)
    axes.invert_yaxis()
    told = "importance, relative (kept green; pruned orange, ← whose adapter it borrows)"
    if result.passed_over:
        told += f"\n* {WHY_PASSED_OVER}"
    axes.set_xlabel(told, fontsize=8)


def _draw_curves(axes: "Axes", result: Result) -> None:
    from matplotlib.ticker import MaxNLocator

    epochs = range(1, len(result.history) + 1)
    for key, label in (("train_top1", "train"), ("val_top1", "val")):
        axes.plot(epochs, [100 * one[key] for one in result.history], marker=".", label=f"{label} top-1, %")
    axes.axvline(result.best_epoch, color="grey", linestyle=":", label="kept epoch")
    if result.prune_epoch is not None:
        axes.axvline(result.prune_epoch + 0.5, color="tab:orange", linestyle="--", label="pruned")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    losses = axes.twinx()
    losses.plot(epochs, [one["loss"] for one in result.history], color="tab:red", alpha=0.5, label="loss (right)")
    losses.set_ylim(bottom=0)
    lines = [*axes.get_lines(), *losses.get_lines()]
    labels = [str(line.get_label()) for line in lines]
    axes.legend(lines, labels, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
