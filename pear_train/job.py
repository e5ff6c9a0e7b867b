"""One task from its options to its file: how a run starts, resumes after an interruption, and ends."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pear_store import Task, write_checkpoint
from pear_train.config import TrainConfig
from pear_train.data import Dataset
from pear_train.errors import DivergedError
from pear_train.evaluate import calibrated, probabilities
from pear_train.output import check_out, check_room, partial_path, rehearse
from pear_train.recall import metrics_of, scores_of
from pear_train.report import Result, Step, result_of
from pear_train.run import TaskRun
from pear_train.state import resume_state, save_state, state_bytes
from pear_train.to_task import to_task
from router import AdaptedBackbone, Router

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A task to train."""

    config: TrainConfig
    dataset: Callable[[], Dataset]
    """Opens the data. It is called when the task's turn comes."""
    out: Path
    """The task checkpoint to write."""

    @classmethod
    def of(cls, config: TrainConfig, dataset: Dataset, out: Path) -> "Job":
        """A job whose data is open already."""
        return cls(config, lambda: dataset, out)


@dataclass
class ActiveJob:
    """A job whose turn has come."""

    job: Job
    run: TaskRun
    began: float
    """In seconds of time.perf_counter."""

    @classmethod
    def start(
        cls,
        job: Job,
        adapted: AdaptedBackbone,
        base: Task | None = None,
        bank: Sequence[Task] = (),
        bases: Task | None = None,
        say: Callable[[str], None] | None = None,
    ) -> "ActiveJob":
        """Starts a run, or resumes it where it was interrupted. Checks first that its files can be written."""
        began, task = time.perf_counter(), job.config.task
        check_out(job.out)
        run = TaskRun(job.config, adapted, job.dataset(), base, bank, bases)
        check_room(job.out, state_bytes(run))
        rehearse(job.out, to_task(run, {}))  # a record or a file that cannot be written fails now, not at the end
        here = run.machines
        if resume_state(run, job.out):
            logger.info("%s: goes on after epoch %d of %d", task, run.epoch - 1, job.config.epochs)
            if say is not None:
                say(f"{task}: goes on after epoch {run.epoch - 1} of {job.config.epochs}")
                if run.machines != here:
                    say(
                        f"{task}: began on another machine, with {_shown(run.machines[0])} instead of "
                        f"{_shown(here[0])}: the file may differ in rounding from that of an uninterrupted run"
                    )
        logger.debug("%s: ready to train in %.2f s", task, time.perf_counter() - began)
        return cls(job, run, began)

    def after_step(self) -> bool:
        """Moves the weights. Returns whether an epoch ended. A run that diverges loses its state, which is useless."""
        try:
            return self.run.after_step()
        except DivergedError:
            partial_path(self.job.out).unlink(missing_ok=True)
            raise

    def progress(self, ended: bool) -> Step:
        """The run's progress after a step.

        Args:
            ended: whether the step ended an epoch.
        """
        run = self.run
        epoch, batch = (run.epoch - 1, run.batches) if ended else (run.epoch, run.batch)
        val = run.history[-1]["val_top1"] if ended else None
        history = tuple(run.history) if ended else ()
        return Step(
            run.config.task, epoch, run.config.epochs, batch, run.batches, run.running_loss, run.train_top1, val,
            history, run.finished, run.precision, str(run.device),
        )  # fmt: skip

    def keep(self) -> None:
        """Writes the state, from which the same job resumes after an interruption."""
        save_state(self.run, self.job.out)

    def finish(self) -> Result:
        """Writes the checkpoint. Figures come from the written form."""
        run, out = self.run, self.job.out
        if run.config.select != "last":
            run.restore(run.best_state)
        written = rehearse(out, to_task(run, {}))
        metrics = self._evaluate(written)
        task = to_task(run, metrics)
        began = time.perf_counter()
        file_bytes = write_checkpoint(out, task)
        logger.debug("%s: wrote %s, %d bytes, in %.2f s", task.name, out, file_bytes, time.perf_counter() - began)
        partial_path(out).unlink(missing_ok=True)
        seconds = round(time.perf_counter() - self.began, 2)
        logger.info("%s: trained in %.2f s", task.name, seconds)
        return result_of(task, file_bytes, seconds)

    def _evaluate(self, written: Task) -> dict[str, float]:
        """Figures of val and test through the router. Also keeps the classes' figures and calibrates the threshold."""
        began, run = time.perf_counter(), self.run
        router = Router(run.adapted.backbone, device=run.device)
        router.add(written)
        for split, pixels in run.pixels.items():
            if split == "train":
                continue
            confidence, predicted = probabilities(router, written.name, pixels, run.config.lr).max(1)
            run.scores[split] = scores_of(predicted, pixels.targets, len(written.labels))
            wanted = run.config.threshold_accuracy
            if split == "val" and wanted is not None:
                run.threshold = calibrated(predicted == pixels.targets, confidence, wanted)
        logger.debug("%s: evaluated the written task in %.2f s", written.name, time.perf_counter() - began)
        return metrics_of(run.scores)


def _shown(machine: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in machine.items())
