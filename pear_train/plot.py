"""A run as a picture: what was pruned and why, and how it learnt. Needs matplotlib."""

import os
from importlib import import_module
from pathlib import Path

from pear_store import PearStoreError
from pear_store.files import open_regular_file
from pear_train.errors import ConfigError, ResourceError
from pear_train.report import Result

_SOFTWARE = "pear-train"
"""In a picture's metadata: what says so may be replaced."""


def plot_path(out: Path) -> Path:
    """Where the picture of the run that writes `out` goes: beside it, by its name."""
    return out.with_name(out.name.removesuffix(".safetensors") + ".png")


def check_plot(path: Path) -> None:
    """Checks, before anything is trained, that a picture can be drawn there.

    Raises:
        ConfigError: matplotlib is not installed, or something lies there that is no picture of a run.
    """
    try:
        import_module("matplotlib.figure")
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib") from None
    if not os.path.lexists(path):
        return
    try:
        with open_regular_file(path) as file:
            start = file.read(4096)
    except PearStoreError as error:
        raise ConfigError(f"--plot {error}") from None
    if start and not (start.startswith(b"\x89PNG") and f"Software\0{_SOFTWARE}".encode() in start):
        raise ConfigError(f"--plot {path}: there is something that pear-train did not draw, and it is not replaced")


def plot_result(result: Result, path: Path) -> None:
    """Draws the importance of every position beside the learning curve.

    Raises:
        ConfigError: as :func:`check_plot`.
        ResourceError: the file cannot be written.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    rows = len(result.importance)
    figure = Figure(figsize=(11 if rows else 6, max(3.5, 0.22 * rows)), layout="constrained")
    axes = figure.subplots(1, 2 if rows else 1, squeeze=False)[0]
    if rows:
        peak = max(result.importance.values()) or 1.0
        kept = [position not in result.pruned for position in result.importance]
        colours = ["tab:green" if own else "tab:orange" for own in kept]
        names = [f"{p} ← {result.borrowed[p]}" if p in result.borrowed else p for p in result.importance]
        axes[0].barh(range(rows), [score / peak for score in result.importance.values()], color=colours)
        axes[0].set_yticks(range(rows), names, fontsize=7)
        axes[0].invert_yaxis()
        axes[0].set_xlabel("importance, relative (kept green; pruned orange, ← whose adapter it borrows)", fontsize=8)
    epochs = range(1, len(result.history) + 1)
    for key, label in (("train_top1", "train"), ("val_top1", "val")):
        axes[-1].plot(epochs, [100 * one[key] for one in result.history], marker=".", label=f"{label} top-1, %")
    axes[-1].axvline(result.best_epoch, color="grey", linestyle=":", label="kept epoch")
    axes[-1].set_xlabel("epoch")
    axes[-1].legend(fontsize=8)
    figure.suptitle(f"{result.task} ({result.method}): val {100 * result.val_top1:.1f} %")
    try:
        figure.savefig(path, dpi=120, metadata={"Software": _SOFTWARE})
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written: {error.strerror or error}") from None
