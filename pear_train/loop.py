"""Trains tasks, alone or several at once: which task steps next, and what happens if one fails."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from pear_store import PearStoreError, Task
from pear_train.bases import share_bases
from pear_train.choices import OnError
from pear_train.config import TrainConfig
from pear_train.data import Dataset
from pear_train.errors import PearTrainError
from pear_train.group import Batch, batch_key, next_batch, step_together
from pear_train.job import ActiveJob, Job
from pear_train.machine import on_device
from pear_train.memory import memory_named
from pear_train.report import Failed, Result, Step
from router import AdaptedBackbone, Backbone, RouterError


def train(
    config: TrainConfig,
    backbone: Backbone,
    dataset: Dataset,
    out: Path,
    progress: Callable[[Step], None] | None = None,
    *,
    base: Task | None = None,
    bank: Sequence[Task] = (),
    bases: Task | None = None,
    say: Callable[[str], None] | None = None,
) -> Result:
    """Trains one task, writes its checkpoint, and evaluates the written file through the router.

    On one machine, a fixed seed and dtype give the same file. `config.select` says which epoch is kept. The test split
    is evaluated once, at the end. After every epoch the run's state is written to ``OUT.partial``. After an
    interruption, the same call resumes from it and gives the same file. The state is removed at the end.

    Before the first epoch, it checks that the checkpoint can be written at `out` and read back, and that the disk has
    room. It replaces a task checkpoint at `out`, and another run's state beside it. It replaces nothing else.

    Args:
        out: the task checkpoint to write.
        progress: is called after every step.
        base: a base set. The lowest blocks use its adapters frozen; the other positions start from them.
        bank: stored tasks whose adapters pruned positions may borrow, frozen and bit-identical.
        bases: common bases, as :func:`make_bases` makes them. The task gets a core in them at every position.
        say: receives lines for a person, such as that a run resumes.
    Raises:
        ConfigError: options contradict each other, the backbone, or a file at `out`.
        DataError: the data cannot be used.
        DivergedError: weights, loss or logits are no longer finite.
        ResourceError: the disk or the memory is too small.
        RouterError: the backbone lacks the positions, or the device cannot be used.
        PearStoreError: the checkpoint cannot be written or read back.
    Source: after Prune and Share (Pear), arXiv:2409.19733; docs/method.md says where it differs.
    """
    job = Job.of(config, dataset, out)
    for done in train_many([job], backbone, progress, base=base, bank=bank, bases=bases, on_error="raise", say=say):
        assert isinstance(done, Result)
        return done
    raise AssertionError("a job gives a result")


def train_many(
    jobs: Iterable[Job],
    backbone: Backbone,
    progress: Callable[[Step], None] | None = None,
    *,
    together: int = 1,
    base: Task | None = None,
    bank: Sequence[Task] = (),
    bases: Task | None = None,
    on_error: OnError = "report",
    say: Callable[[str], None] | None = None,
) -> Iterator[Result | Failed]:
    """Trains many tasks, up to `together` at once. One forward of the backbone serves a batch of each of them.

    Every task has its own batches, schedule and optimiser. Except for rounding, it gets the weights that it would get
    alone. When a task ends, the next one takes its place. All tasks must name the same device.

    Args:
        jobs: the tasks; each is taken when its turn comes.
        progress, base, bank, bases, say: as for :func:`train`.
        together: most tasks at once, at least 1.
        on_error: "report": a task that fails gives a :class:`Failed`, and the others go on. "raise": the first error
            is raised.
    Yields:
        A result or a failure for each job, in the order in which they end.
    Raises:
        PearTrainError, RouterError, PearStoreError: as for :func:`train`, only if `on_error` is "raise".
    """
    loop = _Loop(iter(jobs), backbone, progress, base, bank, bases, on_error, say)
    while True:
        while loop.start_next(together):
            yield from loop.take_ended()
        if not loop.active:
            return
        loop.step()
        yield from loop.take_ended()


class _Loop:
    """The tasks that train now. `ended` holds results and failures until the caller takes them."""

    def __init__(
        self,
        waiting: Iterator[Job],
        backbone: Backbone,
        progress: Callable[[Step], None] | None,
        base: Task | None,
        bank: Sequence[Task],
        bases: Task | None,
        on_error: OnError,
        say: Callable[[str], None] | None,
    ) -> None:
        self.waiting, self.backbone, self.progress = waiting, backbone, progress
        self.base, self.bank, self.bases, self.say = base, bank, bases, say
        self.errors = (PearTrainError, RouterError, PearStoreError) if on_error == "report" else ()
        self.adapted: AdaptedBackbone | None = None
        self.active: list[ActiveJob] = []
        self.ended: list[Result | Failed] = []

    def take_ended(self) -> list[Result | Failed]:
        taken, self.ended = self.ended, []
        return taken

    def start_next(self, together: int) -> bool:
        """Starts a waiting task if a place is free. Returns whether it tried to."""
        if len(self.active) >= together or (job := next(self.waiting, None)) is None:
            return False
        with self._failing_alone(job):
            self.adapted = self.adapted or on_device(self.backbone, job.config.device)
            started = ActiveJob.start(job, self.adapted, self.base, self.bank, self.bases, self.say)
            for other in self.active[:1]:
                share_bases(started.run.adapters, other.run.adapters)
            self.active.append(started)
        return True

    def step(self) -> None:
        """Makes one step of every active task. Tasks of equal keys share a forward."""
        ready: list[tuple[ActiveJob, Batch]] = []
        for task in list(self.active):
            with self._failing_alone(task.job):
                ready.append((task, next_batch(task.run)))
        stepped: list[ActiveJob] = []
        for _, pairs in groupby(sorted(ready, key=_key), _key):
            group = list(pairs)
            with self._failing_alone(*(task.job for task, _ in group)):
                step_together([(task.run, batch) for task, batch in group])
                stepped += [task for task, _ in group]
        for task in stepped:
            with self._failing_alone(task.job):
                self._after_step(task)

    def _after_step(self, task: ActiveJob) -> None:
        ended = task.after_step()
        if self.progress is not None:
            self.progress(task.progress(ended))
        if task.run.finished:
            self.active.remove(task)
            self.ended.append(task.finish())
        elif ended:
            task.keep()

    @contextmanager
    def _failing_alone(self, *jobs: Job) -> Iterator[None]:
        """An error inside ends only these tasks, if errors are reported."""
        try:
            with memory_named(", ".join(job.config.task for job in jobs)):
                yield
        except self.errors as error:
            self.active = [task for task in self.active if not any(task.job is job for job in jobs)]
            self.ended += [Failed(job.config.task, str(error)) for job in jobs]


def _key(pair: tuple[ActiveJob, Batch]) -> tuple[object, ...]:
    return batch_key(pair[0].run)
