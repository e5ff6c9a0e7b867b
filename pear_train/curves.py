"""Training curves for other programs: a CSV file, or a folder that TensorBoard reads."""

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from pear_train.errors import ConfigError, ResourceError
from pear_train.report import Result, Step
from pear_train.targets import check_target

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_FIRST = "epoch"
_GROUPS = {"loss": "loss/train", "train_top1": "top1/train", "val_top1": "top1/val", "val_macro_f1": "macro_f1/val"}
"""TensorBoard's tag for each figure of an epoch."""

History = Sequence[Mapping[str, float]]


def write_csv(path: Path, history: History) -> None:
    """Writes a row for each epoch. Raises a ResourceError if the file cannot be written."""
    names = [name for name in _GROUPS if history and name in history[0]]
    try:
        with open(path, "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow([_FIRST, *names])
            rows.writerows(
                [epoch, *(float(f"{one[name]:.6g}") for name in names)] for epoch, one in enumerate(history, 1)
            )
    except OSError as error:
        raise ResourceError(f"--curves {path}: cannot be written: {error.strerror or error}") from None


def check_csv(path: Path) -> None:
    """Raises a ConfigError if the file cannot be written, or if `path` holds something else than such a file."""
    check_target("--curves", path, lambda start: start.startswith(f"{_FIRST},loss,".encode()))


def check_tensorboard(folder: Path, tasks: Iterable[str]) -> None:
    """Raises a ConfigError if tensorboard is not installed, or if a task's folder cannot be made."""
    try:
        import_module("tensorboard")
    except ImportError:
        raise ConfigError("--tensorboard needs tensorboard: pip install 'pear-adapters[tensorboard]'") from None
    for place in [folder, *(folder / task for task in tasks)]:
        there = next(above for above in (place, *place.absolute().parents) if os.path.lexists(above))
        if not os.path.isdir(there):
            raise ConfigError(f"--tensorboard {folder}: {there} is not a folder: name another place")
        if not os.access(there, os.W_OK | os.X_OK):
            raise ConfigError(f"--tensorboard {folder}: folder {there} takes no file: Permission denied")


class Curves:
    """Writes the figures of each epoch as soon as the epoch ends.

    Args:
        csv_path: the CSV file of one run; None: no CSV file.
        folder: TensorBoard's folder, in which each task gets a folder; None: no such folder.
        tasks: names of the tasks.
    """

    def __init__(self, csv_path: Path | None, folder: Path | None, tasks: Iterable[str] = ()) -> None:
        self._csv, self._folder = csv_path, folder
        self._writers: dict[str, SummaryWriter] = {}
        if csv_path is not None:
            check_csv(csv_path)
        if folder is not None:
            check_tensorboard(folder, tasks)

    def show(self, step: Step) -> None:
        """Writes an epoch's figures, if the step is the last of its epoch."""
        if step.history:
            self._write(step.task, step.history, len(step.history))

    def whole(self, result: Result) -> None:
        """Writes all epochs of a run that was trained before."""
        if result.history:
            self._write(result.task, result.history, 1)

    def _write(self, task: str, history: History, first: int) -> None:
        if self._csv is not None:
            write_csv(self._csv, history)
        if self._folder is not None:
            writer = self._writer(task, first)
            for epoch in range(first, len(history) + 1):
                for name, tag in _GROUPS.items():
                    if name in history[epoch - 1]:
                        writer.add_scalar(tag, history[epoch - 1][name], epoch)
            writer.flush()

    def _writer(self, task: str, first: int) -> "SummaryWriter":
        if task not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            assert self._folder is not None
            try:
                self._writers[task] = SummaryWriter(str(self._folder / task), purge_step=first)
            except OSError as error:
                where = f"--tensorboard {self._folder}"
                raise ResourceError(f"{where}: cannot be written: {error.strerror or error}") from None
        return self._writers[task]

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
