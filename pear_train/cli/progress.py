"""What a person sees while tasks train: a bar, and lines above it."""

import sys
from typing import Any

from tqdm import tqdm

from pear_store.terminal import echo, printable
from pear_train.report import Step


def say(text: str) -> None:
    """Lines on stderr: an error may name many pictures, each on its line."""
    for line in text.split("\n"):
        echo(line, err=True)


def say_above(text: str) -> None:
    """Lines on stderr, above whatever bars there are."""
    tqdm.write("\n".join(map(printable, text.split("\n"))), file=sys.stderr)


class Progress:
    """A tqdm bar on stderr: batches of one task, or epochs of many."""

    def __init__(self, name: str, epochs: int | None = None) -> None:
        unit = "batch" if epochs is None else "epoch"
        self.many = epochs is not None
        self.bar: tqdm[Any] = tqdm(desc=name, unit=unit, total=epochs, file=sys.stderr, mininterval=0.5)
        self.val = ""

    def show(self, step: Step) -> None:
        if step.val_top1 is not None:
            self.val = f" val {100 * step.val_top1:.1f}%"
        if self.many:
            if step.val_top1 is not None:
                self.bar.set_postfix_str(f"{step.task} {step.epoch}/{step.epochs}{self.val}", refresh=False)
                self.bar.update(1)
            return
        self.bar.total = step.batches * step.epochs
        self.bar.n = (step.epoch - 1) * step.batches + step.batch
        self.bar.set_postfix_str(
            f"epoch {step.epoch} loss {step.loss:.3f} train {100 * step.train_top1:.1f}%{self.val}", refresh=False
        )
        self.bar.update(0)

    def say(self, line: str) -> None:
        """A line above the bar."""
        self.bar.clear()
        say(line)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.refresh()
        self.bar.close()


class Table(Progress):
    """Under the bar of all epochs a line for each task that trains now, if stderr is a terminal."""

    def __init__(self, name: str, epochs: dict[str, int]) -> None:
        """
        Args:
            epochs: of each task that is to train.
        """
        super().__init__(name, sum(epochs.values()))
        self._epochs = epochs
        self._lines: dict[str, tqdm[Any]] = {}
        self._hosts: dict[str, str] = {}

    def __enter__(self) -> "Table":
        return self

    def began(self, task: str, host: str) -> None:
        """A worker on this machine has taken a task, or has taken it over."""
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
        """A task needs no line any more."""
        if task in self._lines:
            self._lines.pop(task).close()

    def say(self, line: str) -> None:
        say_above(line)

    def __exit__(self, *args: object) -> None:
        for task in list(self._lines):
            self.ended(task)
        super().__exit__(*args)
