"""The report of a training run: learning curves, what was pruned and why, figures of each class, and options."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from pear_store import read_checkpoint
from pear_train.config import OPTIONS
from pear_train.html.drawing import Chart, Line, LineKind, Tick, percent, x_of, y_of
from pear_train.html.page import check_page, make_page, write_page
from pear_train.plot import WHY_PASSED_OVER
from pear_train.report import Result


def check_html(path: Path) -> None:
    """Raises a ConfigError if no report of a training run can be written."""
    check_page(path, "pear-train")


def write_html(result: Result, checkpoint: Path, path: Path) -> None:
    """Writes the report of the run that wrote a checkpoint, as a whole or not at all.

    Raises:
        ConfigError: as :func:`check_html`.
        PearStoreError: the checkpoint cannot be read.
        ResourceError: the report cannot be written.
    """
    check_html(path)
    task = read_checkpoint(checkpoint)
    training, metrics = task.record["training"], task.record["metrics"]
    scored = {"importance": "importance_score"}
    options = [(name, training.get(scored.get(name, name)), OPTIONS[name].default) for name in OPTIONS]
    splits = [split for split in ("train", "val", "test") if split in training.get("images", {})]
    text = make_page(
        "training.html",
        result=result,
        backbone=task.backbone_model,
        data=f"{training.get('data_name', '')}: {training.get('data', '')}",
        metrics=metrics,
        splits=splits,
        options=[(name, value, value != default) for name, value, default in options if name in training],
        machines=training.get("machines", []),
        accuracy=accuracy_chart(result),
        loss=loss_chart(result),
        peak=max(result.importance.values(), default=1.0) or 1.0,
        why=WHY_PASSED_OVER,
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    write_page(path, text)


def accuracy_chart(result: Result) -> Chart:
    """Top-1 on train and val over the epochs."""
    values = {name: [one[f"{name}_top1"] for one in result.history] for name in ("val", "train")}
    low = min(min(some) for some in values.values())
    bottom = max(0.0, math.floor(low * 10) / 10) if low < 0.9 else 0.9
    shares = [bottom + i * (1 - bottom) / 4 for i in range(5)]
    kinds: dict[str, LineKind] = {"val": "curve", "train": "second"}
    lines = [
        Line(_points([(value - bottom) / (1 - bottom) for value in values[name]]), kind, name)
        for name, kind in kinds.items()
    ]
    ticks = [Tick(y_of((share - bottom) / (1 - bottom)), percent(share)) for share in shares]
    return Chart([], "", "", _epoch_ticks(len(result.history)), ticks, lines, _marks(result))


def loss_chart(result: Result) -> Chart:
    """The mean loss on train over the epochs."""
    losses = [one["loss"] for one in result.history]
    top = max(losses) or 1.0
    step = 10 ** math.floor(math.log10(top)) / 2
    while top / step > 5:
        step *= 2
    ticks = [Tick(y_of(i * step / top), f"{i * step:.3g}") for i in range(int(top / step) + 1)]
    lines = [Line(_points([loss / top for loss in losses]), "curve", "loss")]
    return Chart([], "", "", _epoch_ticks(len(losses)), ticks, lines, _marks(result))


def _place(epoch: float, epochs: int) -> float:
    return x_of((epoch - 1) / (epochs - 1) if epochs > 1 else 0.5)


def _points(shares: Sequence[float]) -> str:
    return " ".join(f"{_place(epoch, len(shares))},{y_of(share)}" for epoch, share in enumerate(shares, 1))


def _epoch_ticks(epochs: int) -> list[Tick]:
    """Whole epochs, at most eight."""
    step = next(step for power in range(9) for step in (10**power, 2 * 10**power, 5 * 10**power) if epochs / step <= 8)
    shown = [1, *(epoch for epoch in range(step, epochs + 1, step) if epoch > 1)] if step > 1 else range(1, epochs + 1)
    return [Tick(_place(epoch, epochs), str(epoch)) for epoch in shown]


def _marks(result: Result) -> list[Tick]:
    """Marks of the prune epoch and of the kept epoch."""
    epochs = len(result.history)
    marks = [Tick(_place(result.best_epoch, epochs), f"epoch {result.best_epoch} is kept")]
    if result.prune_epoch is not None and result.prune_epoch < epochs:
        marks.append(Tick(_place(result.prune_epoch + 0.5, epochs), f"pruned after epoch {result.prune_epoch}"))
    return marks
