"""Progress on stderr while tasks train: a bar on a terminal, a line for each epoch in a log, and messages."""

import shlex
import sys
import time
from typing import Any

import torch
from tqdm import tqdm

from pear_store.counted import counted
from pear_store.terminal import echo, printable
from pear_train.report import Step

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def say(text: str) -> None:
    """Prints lines on stderr."""
    for line in text.split("\n"):
        echo(line, err=True)


def say_above(text: str) -> None:
    """Prints lines on stderr, above all bars."""
    tqdm.write("\n".join(map(printable, text.split("\n"))), file=sys.stderr)


def as_command(*words: str) -> str:
    """Words quoted for a shell, on one line, also if they hold line breaks or bytes that are not text."""
    return " ".join(shlex.quote(word) if word.isprintable() else _escaped(word) for word in words)


def _escaped(word: str) -> str:
    return "$'" + printable(word.replace("\\", r"\\").replace("'", r"\'")) + "'"


class Progress:
    """A tqdm bar on stderr: batches of one task, or epochs of many. If stderr is not a terminal, a line per epoch.

    Args:
        epochs: all epochs of many tasks, which then get no line per epoch; None for one task.
    """

    def __init__(self, name: str, epochs: int | None = None) -> None:
        unit = "batch" if epochs is None else "epoch"
        self.many, self.name, self.on_terminal = epochs is not None, name, sys.stderr.isatty()
        self.bar: tqdm[Any] = tqdm(
            desc=name, unit=unit, total=epochs, file=sys.stderr, mininterval=0.5, disable=not self.on_terminal
        )
        self.val = ""
        self._machine, self._began, self._before = "", time.monotonic(), 0

    def show(self, step: Step) -> None:
        self._tell_machine(step)
        if step.val_top1 is not None:
            self.val = f" val {100 * step.val_top1:.1f}%"
        if self.many:
            if step.val_top1 is not None:
                self.bar.set_postfix_str(f"{step.task} {step.epoch}/{step.epochs}{self.val}", refresh=False)
                self.bar.update(1)
            return
        if self.on_terminal:
            self.bar.total = step.batches * step.epochs
            self.bar.n = (step.epoch - 1) * step.batches + step.batch
            self.bar.set_postfix_str(
                f"epoch {step.epoch} loss {step.loss:.3f} train {100 * step.train_top1:.1f}%{self.val}, "
                f"{memory_shown(step.device)}",
                refresh=False,
            )
            self.bar.update(0)
        elif step.val_top1 is not None:
            say(self._line(step))
        if step.finished and step.epoch < step.epochs:
            self.say(f"stopped   after epoch {step.epoch} of {step.epochs}: val did not improve (--patience)")

    def _tell_machine(self, step: Step) -> None:
        told = f"{step.precision} on {step.device}" if step.precision else ""
        if told and told != self._machine:
            threads = f", {counted(torch.get_num_threads(), 'thread')}" if step.device == "cpu" else ""
            self.say(f"machine   trains in {told}{threads}")
            self._machine, self._began, self._before = told, time.monotonic(), step.epoch - 1

    def _line(self, step: Step) -> str:
        """An epoch as a row of a table."""
        spent, done = time.monotonic() - self._began, step.epoch - self._before
        left = spent / max(1, done) * (step.epochs - step.epoch)
        assert step.val_top1 is not None
        return (
            f"epoch {step.epoch:>{len(str(step.epochs))}}/{step.epochs}  loss {step.loss:6.3f}  "
            f"train {100 * step.train_top1:5.1f} %  val {100 * step.val_top1:5.1f} %  "
            f"{duration(left):>8} left  {memory_shown(step.device)}"
        )

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self.bar.clear()
        say(line)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.refresh()
        self.bar.close()


def duration(seconds: float) -> str:
    """Such as 8 s, 3 min, 2 h 05."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02}"


def memory_shown(device: str) -> str:
    """The most memory used so far: on a GPU what torch reserved, else of this process."""
    if device.startswith("cuda"):
        return f"{torch.cuda.max_memory_reserved(device) / 1e9:.1f} GB"
    if resource is None:
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f} GB"


class Table(Progress):
    """The bar of all epochs, and below it a line for each task in training if stderr is a terminal."""

    def __init__(self, name: str, epochs: dict[str, int]) -> None:
        """
        Args:
            epochs: number of epochs of each task.
        """
        super().__init__(name, sum(epochs.values()))
        self._epochs = epochs
        self._lines: dict[str, tqdm[Any]] = {}
        self._hosts: dict[str, str] = {}

    def __enter__(self) -> "Table":
        return self

    def began(self, task: str, host: str) -> None:
        """A worker on this machine starts a task, or takes it over."""
        self.ended(task)
        self._hosts[task] = host
        self._lines[task] = tqdm(
            desc=printable(task), total=self._epochs[task], unit="epoch", file=sys.stderr, leave=False, disable=None,
            bar_format="  {desc}: epoch {n_fmt}/{total_fmt}{postfix} [{elapsed}]",
        )  # fmt: skip
        self._lines[task].set_postfix_str(f"on {printable(host)}")

    def show(self, step: Step) -> None:
        super().show(step)
        line = self._lines[step.task]
        line.n = step.epoch if step.val_top1 is not None else step.epoch - 1
        figures = f"batch {step.batch}/{step.batches} loss {step.loss:.3f} train {100 * step.train_top1:.1f}%"
        val = "" if step.val_top1 is None else f" val {100 * step.val_top1:.1f}%"
        line.set_postfix_str(f"on {printable(self._hosts[step.task])} {figures}{val}")

    def ended(self, task: str) -> None:
        """Removes a task's line."""
        if task in self._lines:
            self._lines.pop(task).close()

    def say(self, line: str) -> None:
        say_above(line)

    def __exit__(self, *args: object) -> None:
        for task in list(self._lines):
            self.ended(task)
        super().__exit__(*args)
