"""What a person sees while tasks train: a bar, and lines above it."""

import sys
from typing import Any

from tqdm import tqdm

from pear_store.terminal import echo
from pear_train.report import Step


def say(text: str) -> None:
    """Lines on stderr: an error may name many pictures, each on its line."""
    for line in text.split("\n"):
        echo(line, err=True)


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
