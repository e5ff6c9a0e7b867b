"""What a person sees while tasks train: a bar on a terminal, a line for each epoch in a log, and lines above them."""

import sys
import time
from typing import Any

import torch
from tqdm import tqdm

from pear_store.terminal import echo
from pear_train.report import Step

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def say(text: str) -> None:
    """Lines on stderr: an error may name many pictures, each on its line."""
    for line in text.split("\n"):
        echo(line, err=True)


class Progress:
    """A tqdm bar on stderr: batches of one task, or epochs of many. Where stderr is no terminal, a line an epoch.

    Args:
        epochs: of all tasks together, if there are many: then epochs have no lines of their own.
    """

    def __init__(self, name: str, epochs: int | None = None) -> None:
        unit = "batch" if epochs is None else "epoch"
        self.many, self.name, self.on_terminal = epochs is not None, name, sys.stderr.isatty()
        self.bar: tqdm[Any] = tqdm(
            desc=name, unit=unit, total=epochs, file=sys.stderr, mininterval=0.5, disable=not self.on_terminal
        )
        self.val = ""
        self.kept: Step | None = None
        """The last step of the last epoch whose state is on disk, as far as is known: the next one has begun."""
        self._ended: Step | None = None
        self._machine, self._began, self._before = "", time.monotonic(), 0

    def show(self, step: Step) -> None:
        self._tell_machine(step)
        self.kept = self._ended or self.kept
        if step.val_top1 is not None:
            self._ended = step
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
            self.say(f"stopped   after epoch {step.epoch} of {step.epochs}: val got no better (--patience)")

    def _tell_machine(self, step: Step) -> None:
        told = f"{step.precision} on {step.device}" if step.precision else ""
        if told and told != self._machine:
            threads = f", {torch.get_num_threads()} threads" if step.device == "cpu" else ""
            self.say(f"machine   trains in {told}{threads}")
            self._machine, self._began, self._before = told, time.monotonic(), step.epoch - 1

    def _line(self, step: Step) -> str:
        """An epoch, as a row of a table."""
        spent, done = time.monotonic() - self._began, step.epoch - self._before
        left = spent / max(1, done) * (step.epochs - step.epoch)
        assert step.val_top1 is not None
        return (
            f"epoch {step.epoch:>{len(str(step.epochs))}}/{step.epochs}  loss {step.loss:6.3f}  "
            f"train {100 * step.train_top1:5.1f} %  val {100 * step.val_top1:5.1f} %  "
            f"{duration(left):>8} left  {memory_shown(step.device)}"
        )

    def say(self, line: str) -> None:
        """A line above the bar."""
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
    """The most memory so far: of a GPU what torch holds, else of this process."""
    if device.startswith("cuda"):
        return f"{torch.cuda.max_memory_reserved(device) / 1e9:.1f} GB"
    if resource is None:
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f} GB"
