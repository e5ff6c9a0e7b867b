"""Training tasks, alone or several at once in mixed batches through the router's op."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pear_store import PearStoreError, Task, write_checkpoint
from pear_train.config import TrainConfig
from pear_train.data import Dataset, Pixels
from pear_train.errors import DivergedError, PearTrainError, ResourceError
from pear_train.finished import check_out, check_room, partial_path, rehearse
from pear_train.partial import resume_partial, save_partial, state_bytes
from pear_train.recall import by_class, recall_by_class
from pear_train.record import stored_bytes, to_task
from pear_train.run import TaskRun, in_batches
from router import AdaptedBackbone, Backbone, PositionWeights, Router, RouterError
from router.device import open_device


@dataclass(frozen=True)
class Step:
    """Progress, given to the callback after every batch; `val_top1` after the last batch of an epoch."""

    task: str
    epoch: int
    epochs: int
    batch: int
    batches: int
    loss: float
    train_top1: float
    val_top1: float | None


@dataclass(frozen=True)
class Result:
    """What a run gave. Bytes are of the tensors as written, each distinct one once; top-1 in 0..1, from the file."""

    task: str
    method: str
    val_top1: float
    test_top1: float | None
    trainable_params: int
    adapter_bytes: int
    knowledge_bytes: int
    head_bytes: int
    file_bytes: int
    epochs: int
    best_epoch: int
    seconds: float
    importance: dict[str, float]
    borrowed: dict[str, str]
    """Source position of each pruned position that borrows from this task."""
    banked: dict[str, list[str]]
    """What each pruned position borrows from the bank."""
    pruned: list[str]
    history: list[dict[str, float]]
    """For each epoch: loss, train_top1 (while it went on), val_top1 (at its end)."""
    classes: dict[str, dict[str, Any]]
    """For each class, `images` and `recall` by split; recall is None where a split has no image of the class."""


@dataclass(frozen=True)
class Job:
    """A task to train: options, where its data comes from (opened when its turn comes), and where its file goes."""

    config: TrainConfig
    dataset: Callable[[], Dataset]
    out: Path


@dataclass(frozen=True)
class Failed:
    """A task that could not be trained; the others were."""

    task: str
    error: str


def train(
    config: TrainConfig,
    backbone: Backbone,
    dataset: Dataset,
    out: Path,
    progress: Callable[[Step], None] | None = None,
    *,
    base: Task | None = None,
    bank: Sequence[Task] = (),
    say: Callable[[str], None] | None = None,
) -> Result:
    """Trains one task and writes its checkpoint; evaluates from the written file, through the router.

    A fixed seed and dtype give the same file on one machine. `config.select` says which epoch is kept; test is looked
    at once, at the end. After every epoch the run's state is kept in ``OUT.partial``, from which the same call goes on
    after an interruption, to the same file; it is removed at the end.

    What the end needs is checked before the first epoch: that the checkpoint can be written at `out` and read back, and
    that the disk has room. A task checkpoint at `out` is replaced, another run's state begun anew; nothing else is.

    Args:
        say: receives lines for a person: that a run goes on, and what it then cannot promise.
        base: a task whose adapters the lowest blocks use frozen, and the others start from.
        bank: stored tasks whose adapters pruned positions may borrow, frozen and bit-identical.
    Raises:
        PearTrainError, RouterError, PearStoreError: options, data, backbone or disk do not allow it.
    """
    for done in train_many(
        [Job(config, lambda: dataset, out)], backbone, progress, base=base, bank=bank, careful=False, say=say
    ):
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
    careful: bool = True,
    say: Callable[[str], None] | None = None,
) -> Iterator[Result | Failed]:
    """Trains many tasks, up to `together` of them at once: one backbone forward for a batch of each.

    Every task has its own batches, schedule and optimiser; rounding apart, it comes out as if trained alone. When one
    is done the next takes its place. All must name the same device.

    Args:
        careful: a task that fails is reported as :class:`Failed`, and the others go on; else its error is raised.
    """
    waiting = iter(jobs)
    trainer: _Trainer | None = None
    active: list[_Active] = []
    errors: tuple[type[Exception], ...] = (PearTrainError, RouterError, PearStoreError) if careful else ()
    while True:
        while len(active) < together and (job := next(waiting, None)) is not None:
            try:
                trainer = trainer or _Trainer(backbone, job.config)
                with _memory_named(job.config.task):
                    active.append(trainer.start(job, base, bank, say))
            except errors as error:
                yield Failed(job.config.task, str(error))
        if not active:
            return
        assert trainer is not None
        ready: list[tuple[_Active, _Batch]] = []
        for one in list(active):
            try:
                with _memory_named(one.job.config.task):
                    ready.append((one, trainer.batch(one.run)))
            except errors as error:
                active.remove(one)
                yield Failed(one.job.config.task, str(error))
        ready.sort(key=lambda pair: _batch_key(pair[0].run))
        stepped: list[_Active] = []
        for _, pairs in groupby(ready, lambda pair: _batch_key(pair[0].run)):
            group = list(pairs)
            try:
                with _memory_named(", ".join(one.job.config.task for one, _ in group)):
                    trainer.step([(one.run, batch) for one, batch in group])
                stepped += [one for one, _ in group]
            except errors as error:
                for one, _ in group:
                    active.remove(one)
                    yield Failed(one.job.config.task, str(error))
        for one in stepped:
            try:
                with _memory_named(one.job.config.task):
                    ended = trainer.after_step(one)
                if progress is not None:
                    progress(_progress(one.run, ended))
                if one.run.finished:
                    active.remove(one)
                    with _memory_named(one.job.config.task):
                        result = trainer.finish(one)
                    yield result
                elif ended:
                    save_partial(one.run, one.job.out)
            except errors as error:
                active = [other for other in active if other is not one]
                yield Failed(one.job.config.task, str(error))


@contextmanager
def _memory_named(task: str) -> Iterator[None]:
    """Turns a memory that is too small into one of our errors."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch has a class for a GPU's memory, and only a text for the host's
        short = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not short:
            raise
        raise ResourceError(
            f"{task}: out of memory: lower --batch-size, --img-size or --rank, or train fewer tasks --together"
        ) from None


@dataclass
class _Active:
    job: Job
    run: TaskRun
    began: float


@dataclass(frozen=True)
class _Batch:
    """What a step of one task needs: its images, or for a task without adapters their features."""

    rows: Tensor
    images: Tensor | None
    features: Tensor | None


def _batch_key(run: TaskRun) -> tuple[Any, ...]:
    """Tasks of one key can share a batch."""
    return (bool(run.adapters.branches), run.record["input_size"], run.config.activation, str(run.autocast))


class _Trainer:
    """The backbone on its device, and how a step of several tasks goes."""

    def __init__(self, backbone: Backbone, config: TrainConfig) -> None:
        self.backbone = backbone
        self.device = open_device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.adapted = AdaptedBackbone(backbone, self.device, torch.float32, for_training=True)

    def start(
        self, job: Job, base: Task | None, bank: Sequence[Task], say: Callable[[str], None] | None = None
    ) -> _Active:
        """A run at its beginning, or where it was interrupted; checks that its end will have what it needs."""
        began = time.perf_counter()
        check_out(job.out)
        run = TaskRun(job.config, self.adapted, job.dataset(), base, bank)
        check_room(job.out, state_bytes(run))
        rehearse(
            job.out, to_task(run, {})
        )  # the record, labels and all, and the file itself are found good or refused now
        here = run.machines
        if resume_partial(run, job.out) and say is not None:
            say(f"{job.config.task}: goes on after epoch {run.epoch - 1} of {job.config.epochs}")
            if run.machines != here:
                say(
                    f"{job.config.task}: began elsewhere, with {_shown(run.machines[0])} instead of {_shown(here[0])}: "
                    "the file may differ in rounding from one of an uninterrupted run"
                )
        return _Active(job, run, began)

    def batch(self, run: TaskRun) -> _Batch:
        """The next batch of a task."""
        rows = run.next_rows()
        if run.adapters.branches:
            return _Batch(rows, run.images(rows), None)
        return _Batch(rows, None, run.features(run.train_pixels, rows))

    def step(self, group: Sequence[tuple[TaskRun, _Batch]]) -> None:
        """Gradients of one batch of each task; all have adapters, or none has."""
        for run, _ in group:
            run.before_step()
        run, batch = group[0]
        if batch.features is not None:
            parts = [one.features for _, one in group]
        elif len(group) == 1:
            assert batch.images is not None
            parts = [self.adapted.features(batch.images, run.step_weights(), run.autocast)]
        else:
            parts = self._mixed(group)
        losses = []
        for (run, batch), part in zip(group, parts, strict=True):
            assert part is not None
            losses.append(run.loss(part, batch.rows))
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]

    def _mixed(self, group: Sequence[tuple[TaskRun, _Batch]]) -> list[Tensor | None]:
        """Features of each task's batch from one forward; shorter batches are filled up with rows that do not count."""
        images = [batch.images for _, batch in group if batch.images is not None]
        longest = max(map(len, images))
        filled = torch.cat([torch.cat([i, i[:1].expand(longest - len(i), *i.shape[1:])]) for i in images])
        run = group[0][0]
        weights = stack_weights([one.step_weights() for one, _ in group], self.adapted.widths, run.config.activation)
        features = self.adapted.features(filled, weights, run.autocast)
        return [part[: len(i)] for part, i in zip(features.view(len(group), longest, -1), images, strict=True)]

    def after_step(self, one: _Active) -> bool:
        """Moves a task's weights; returns whether an epoch ended. The state of a run that diverged leads nowhere."""
        try:
            return one.run.after_step()
        except DivergedError:
            partial_path(one.job.out).unlink(missing_ok=True)
            raise

    def finish(self, one: _Active) -> Result:
        """Writes the checkpoint, and evaluates it as it was written."""
        run, out = one.run, one.job.out
        if run.config.select == "best":
            run.restore(run.best_state)
        written = rehearse(out, to_task(run, {}))
        router = Router(self.backbone, device=self.device)
        router.add(written)
        metrics = {}
        for split in [name for name in run.pixels if name != "train"]:
            predicted = _predicted(router, written.name, run.pixels[split], run.config.lr)
            targets = run.pixels[split].targets
            metrics[f"{split}_top1"] = int((predicted == targets).sum()) / len(targets)
            run.recall[split] = recall_by_class(predicted, targets, len(written.labels))
        task = to_task(run, metrics)
        file_bytes = write_checkpoint(out, task)
        partial_path(out).unlink(missing_ok=True)
        return result_of(task, file_bytes, round(time.perf_counter() - one.began, 2))


def result_of(task: Task, file_bytes: int, seconds: float = 0.0) -> Result:
    """What the run gave that wrote a checkpoint, as the checkpoint says."""
    training, metrics = task.record["training"], task.record["metrics"]
    adapter_bytes, knowledge_bytes, head_bytes = stored_bytes(task)
    return Result(
        task.name, training["method"], metrics["val_top1"], metrics.get("test_top1"), training["trainable_params"],
        adapter_bytes, knowledge_bytes, head_bytes, file_bytes, len(training["history"]), training["kept_epoch"],
        seconds, training["importance"], training["borrowed"], training["banked"], training["pruned"],
        training["history"], by_class(task.labels, training),
    )  # fmt: skip


def _shown(machine: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in machine.items())


def stack_weights(
    weights: Sequence[dict[str, PositionWeights]], widths: dict[str, tuple[int, int]], activation: str
) -> dict[str, PositionWeights]:
    """What each position adds to equal runs of rows, one a task: `down` [task, d_in, rank], `up` [task, rank, d_out].

    Ranks are filled up with zeros, which add nothing whatever the activation, and have no gradient to give.
    """
    stacked = {}
    for position in dict.fromkeys(position for one in weights for position in one):
        rank = max(one[position].down.shape[1] for one in weights if position in one)
        d_in, d_out = widths[position]
        downs, ups = [], []
        for one in weights:
            if position in one:
                missing = rank - one[position].down.shape[1]
                downs.append(F.pad(one[position].down, (0, missing)))
                ups.append(F.pad(one[position].up, (0, 0, 0, missing)))
            else:
                like = next(w[position].down for w in weights if position in w)
                downs.append(like.new_zeros(d_in, rank))
                ups.append(like.new_zeros(rank, d_out))
        stacked[position] = PositionWeights(torch.stack(downs), torch.stack(ups), activation)
    return stacked


def _progress(run: TaskRun, ended: bool) -> Step:
    epoch, batch = (run.epoch - 1, run.batches) if ended else (run.epoch, run.batch)
    val = run.history[-1]["val_top1"] if ended else None
    return Step(
        run.config.task, epoch, run.config.epochs, batch, run.batches, run.running_loss, run.train_top1, val
    )  # fmt: skip


def _predicted(router: Router, task: str, pixels: Pixels, lr: float) -> Tensor:
    """The class of each image, as the router answers.

    Raises:
        DivergedError: a logit is not finite, so that the likeliest class means nothing.
    """
    predicted = []
    for rows in in_batches(pixels):
        logits = router.run(pixels.images(rows), task).logits
        assert isinstance(logits, Tensor)
        if not bool(torch.isfinite(logits).all()):
            raise DivergedError(task, "logits of the written checkpoint are not finite", lr)
        predicted.append(logits.argmax(1).cpu())
    return torch.cat(predicted)
