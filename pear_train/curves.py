"""How runs learn, for other programs: a CSV file, or a folder that TensorBoard reads."""

import csv
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from pear_train.errors import ConfigError, ResourceError
from pear_train.report import Result, Step

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_FIRST = "epoch"
_GROUPS = {"loss": "loss/train", "train_top1": "top1/train", "val_top1": "top1/val", "val_macro_f1": "macro_f1/val"}
"""What TensorBoard calls an epoch's figures."""

History = Sequence[Mapping[str, float]]


def write_csv(path: Path, history: History) -> None:
    """A row for each epoch. Raises a ResourceError where it cannot be written."""
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
    """Raises a ConfigError where something lies that is no such file: it is not replaced."""
    if not path.parent.is_dir():
        raise ConfigError(f"--curves {path}: folder {path.parent} does not exist; make it first")
    if path.is_file() and path.stat().st_size:
        with open(path, "rb") as file:
            if not file.read(64).startswith(f"{_FIRST},loss,".encode()):
                raise ConfigError(f"--curves {path}: there is something that pear-train did not write: not replaced")
    elif path.exists() and not path.is_file():
        raise ConfigError(f"--curves {path}: is no regular file")


def check_tensorboard() -> None:
    """Raises a ConfigError where the package is missing."""
    try:
        import_module("tensorboard")
    except ImportError:
        raise ConfigError("--tensorboard needs tensorboard: pip install 'pear-adapters[tensorboard]'") from None


class Curves:
    """Writes each epoch of each run where it was asked for, as soon as it ends.

    Args:
        csv_path: a CSV file of one run.
        folder: of TensorBoard; each task has a folder in it.
    """

    def __init__(self, csv_path: Path | None, folder: Path | None) -> None:
        self._csv, self._folder = csv_path, folder
        self._writers: dict[str, SummaryWriter] = {}
        if csv_path is not None:
            check_csv(csv_path)
        if folder is not None:
            check_tensorboard()

    def show(self, step: Step) -> None:
        """Writes what an epoch's last step says."""
        if step.history:
            self._write(step.task, step.history, len(step.history))

    def whole(self, result: Result) -> None:
        """Writes a run that was trained before."""
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
