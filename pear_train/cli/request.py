"""A request to the command, and its results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pear_store import PearStoreError, Task
from pear_train.cli.answer import summary_line
from pear_train.curves import Curves
from pear_train.errors import PearTrainError
from pear_train.job import Job
from pear_train.output import epochs_ended
from pear_train.recall import recall_warnings
from pear_train.report import Failed, Result
from pear_train.tasks import TaskEntry


@dataclass(frozen=True)
class Request:
    """The command's own arguments, without the options of runs."""

    task: str | None
    data: str | None
    data_root: Path | None
    tasks_file: Path | None
    together: int | None
    address: str | None
    """Address of a Ray cluster."""
    workers: int | None
    cpus_per_worker: int | None
    backbone: str
    weights: str | None
    out: Path
    bank: Path | None
    bank_tasks: str | None
    base: Path | None
    make_base: bool
    bases: str | None
    rebase: str | None
    round: str | None
    make_bases: bool
    from_backbone: bool
    from_store: Path | None
    from_tasks: str | None
    overwrite: bool
    force: bool
    plot: bool
    html: Path | None
    preview: Path | None
    curves: Path | None
    tensorboard: Path | None
    as_json: bool

    @property
    def many(self) -> bool:
        """Whether many checkpoints are written. A base set or common bases are one, also from many tasks."""
        return self.tasks_file is not None and not self.make_base and not self.make_bases


@dataclass
class Work:
    """The tasks and their results."""

    entries: list[TaskEntry]
    paths: dict[str, Path]
    """Path of each task's checkpoint."""
    jobs: list[Job] = field(default_factory=list)
    results: list[Result | Failed] = field(default_factory=list)
    kept: set[str] = field(default_factory=set)
    """Tasks whose checkpoint was already there."""
    curves: Curves = field(default_factory=lambda: Curves(None, None))
    drawn: bool = True
    """Whether no drawing failed."""

    def draw(self, what: str, draw: Callable[[], None], say: Callable[[str], None]) -> bool:
        """Draws a picture or writes curves. Reports any failure in one line, so that it never ends a training."""
        try:
            draw()
        except Exception as error:  # whatever matplotlib, TensorBoard, Jinja or a disk can raise
            self.drawn = False
            ours = isinstance(error, PearTrainError | PearStoreError)
            reason = " ".join(str(error).split()) or type(error).__name__
            say(f"Error: {what}: {reason if ours else f'cannot be drawn: {reason}'}")
            return False
        return True

    def left_behind(self) -> str:
        """What stopped runs left on disk, for a message. Empty if nothing."""
        trained = {result.task for result in self.results if isinstance(result, Result)}
        told = [f"{len(trained)} of {len(self.entries)} tasks are trained"] if trained else []
        for entry in self.entries:
            task, epochs = entry.config.task, entry.config.epochs
            if task not in trained and (ended := epochs_ended(entry.config, self.paths[task])):
                told.append(f"{task}: epoch {ended} of {epochs} is kept")
        return "; ".join(told[:9]) + ("; …" if len(told) > 9 else "")

    def keep(self, result: Result | Failed, say: Callable[[str], None]) -> None:
        """Records a task's result, and prints it."""
        self.results.append(result)
        say(summary_line(result))
        for warning in recall_warnings(result.classes) if isinstance(result, Result) else ():
            say(f"Warning: {result.task}: {warning}")


class Stopped(KeyboardInterrupt):
    """Ctrl-C in a training. `left_behind` says what is left on disk; it is empty for nothing."""

    def __init__(self, left_behind: str) -> None:
        super().__init__(left_behind)
        self.left_behind = left_behind


@dataclass(frozen=True)
class Given:
    """The base set, the bank and the common bases of the runs."""

    base: Task | None
    bank: Sequence[Task]
    bases: Task | None
