"""One task in training: its adapters, head, optimiser and schedule (docs/method.md)."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pear_store import Task
from pear_train.bank import Bank
from pear_train.config import TrainConfig
from pear_train.data import Dataset, Pixels, preprocess_record, read_pictures
from pear_train.dtypes import Written, code_bits, core_dtype, float_dtype
from pear_train.errors import DivergedError
from pear_train.evaluate import in_batches, predicted_classes
from pear_train.feed import Feed
from pear_train.head import Head
from pear_train.identity import given_digest, run_identity
from pear_train.machine import autocast_dtype, choose_precision, describe_machine
from pear_train.memory import check_batch
from pear_train.optimiser import make_optimiser, move, rate_factor, set_rate, train_what_is_there
from pear_train.pruning import Pruning
from pear_train.recall import Scores, scores_of
from pear_train.start import start_adapters
from router import AdaptedBackbone, PositionWeights, Preprocess

logger = logging.getLogger(__name__)


@dataclass
class Tally:
    """Sums over the batches of the current epoch so far."""

    loss: float = 0.0
    right: int = 0
    images: int = 0


class TaskRun:
    """One task in training, a batch at a time. The caller computes the features (pear_train/group.py).

    Args:
        adapted: the backbone on its device; several runs may share it.
        base: a base set. The lowest `config.base_blocks` blocks use its adapters frozen; the others start from them.
        bank: stored tasks whose adapters pruned positions may borrow.
        bases: common bases, in which every position gets a core.
    """

    def __init__(
        self,
        config: TrainConfig,
        adapted: AdaptedBackbone,
        dataset: Dataset,
        base: Task | None = None,
        bank: Sequence[Task] = (),
        bases: Task | None = None,
    ) -> None:
        if config.prunes(on_bases=bases is not None):
            config.check_pruning()
        self.config, self.adapted, self.device = config, adapted, adapted.device
        self.preprocess = preprocess_record(adapted.backbone, config.img_size)
        self.precision = choose_precision(config.dtype, self.device)
        """Precision of the forward. A run that resumes keeps it, also on another machine."""
        self.machines = [describe_machine(self.device)]
        """Machines that the run was on, in order. If it is one, the same options and seed give the same bytes there."""
        self.generator = torch.Generator().manual_seed(config.seed)
        self.dropping = torch.Generator().manual_seed(config.seed)
        self.given = given_digest(base, bank, bases)
        self.identity = run_identity(config, adapted.backbone, dataset, self.given)
        self.adapters = start_adapters(config, adapted, base, self.generator, bases)
        self.bases = None if bases is None else bases.name
        self.bank = Bank(bank, adapted, config.activation, cores=config.borrow == "core")
        self.head = Head(adapted.feature_width, len(dataset.classes), code_bits(config.head_dtype), self.device)
        preprocess = Preprocess(self.preprocess, dataset.limits)
        check_batch(config.task, min(config.batch_size, len(dataset.train)), preprocess.size, self.device)
        self.dataset, self.pixels = read_pictures(dataset, preprocess)
        self.train_pixels, self.val_pixels = self.pixels["train"], self.pixels["val"]
        self.feed = Feed(config, self.train_pixels, len(dataset.classes), self.generator)
        self.batches = -(-len(self.train_pixels) // config.batch_size)
        """Steps of an epoch."""
        self._frozen_features: dict[int, Tensor] = {}
        self.optimiser = make_optimiser(config, self.adapters, self.head)
        self.importance: dict[str, float] = {}
        self.sources: dict[str, str] = {}
        self.banked: dict[str, list[str]] = {}
        self.pruned: list[str] = []
        """This and the three above are the results of pear_train/pruning.py."""
        self.scores: dict[str, Scores] = {}
        """Figures of each split that was evaluated at the end."""
        self.threshold: float | None = None
        """The lowest confidence at which a share `threshold_accuracy` of answers on val is right."""
        self.history: list[dict[str, float]] = []
        """Figures of each epoch: loss and top-1 on train over its steps, top-1 and macro F1 on val at its end."""
        self.epoch, self.batch, self.order = 1, 0, torch.empty(0, dtype=torch.long)
        self.best, self.best_epoch, self.best_state = -1.0, 0, self.state()
        self.finished = False
        self._tally, self._epoch_began = Tally(), time.perf_counter()

    # ---- a step -------------------------------------------------------------------------------

    def next_rows(self) -> Tensor:
        """Row numbers of the next batch."""
        if self.batch == 0:
            self.order = self.feed.order()
            self._tally, self._epoch_began = Tally(), time.perf_counter()
        return self.order[self.batch * self.config.batch_size : (self.batch + 1) * self.config.batch_size]

    def images(self, rows: Tensor) -> Tensor:
        """Train images, augmented and normalised, float32 [batch, 3, h, w]."""
        return self.feed.images(rows)

    def step_weights(self) -> dict[str, PositionWeights]:
        """What positions add in a training step. `drop_branch` leaves some out at random."""
        weights = self.adapters.position_weights()
        drop = self.config.drop_branch
        if not drop:
            return weights
        kept = {}
        for position, added in weights.items():
            if float(torch.rand((), generator=self.dropping)) >= drop:
                kept[position] = added.times(1 / (1 - drop))
        return kept

    def before_step(self) -> None:
        """Sets the learning rate of this step and clears gradients."""
        step, steps = (self.epoch - 1) * self.batches + self.batch, self.config.epochs * self.batches
        set_rate(self.optimiser, self.config.lr * rate_factor(step, steps, self.config.warmup))
        self.optimiser.zero_grad(set_to_none=True)

    def loss(self, features: Tensor, rows: Tensor) -> Tensor:
        """The batch's mean loss. Adds it to the epoch's sums."""
        logits, targets = self.head(features), self.feed.targets(rows).to(self.device)
        loss = self.feed.loss(logits, targets)
        classes = targets if targets.ndim == 1 else targets.argmax(1)
        self._tally.loss += float(loss.detach()) * len(rows)
        self._tally.right += int((logits.detach().argmax(1) == classes).sum())
        self._tally.images += len(rows)
        return loss

    def after_step(self) -> bool:
        """Moves the weights. At an epoch's end it evaluates, prunes and keeps the best weights.

        Returns:
            Whether an epoch ended.
        Raises:
            DivergedError: the loss, a weight or a logit is no longer finite.
        """
        if not math.isfinite(self.running_loss):
            raise self._diverged(f"the loss became {self.running_loss} in epoch {self.epoch}")
        self.move()
        self.batch += 1
        if self.batch < self.batches:
            return False
        self._end_epoch()
        return True

    def move(self) -> None:
        """Clips gradients and makes a step of the optimiser."""
        move(self.optimiser, self.config.max_grad_norm)

    # ---- an epoch's end -----------------------------------------------------------------------

    def _end_epoch(self) -> None:
        self.check_finite()
        val = self.look_at_val()
        self.history.append({"loss": self.running_loss, "train_top1": self.train_top1, **val})
        before_pruning = self.prunes and self.epoch <= self.config.pruned_after
        if self.prunes and self.epoch == self.config.pruned_after:
            self.prune()
        if not before_pruning and val[self.judged_by] >= self.best:
            self.best, self.best_epoch, self.best_state = val[self.judged_by], self.epoch, self.state()
        patience = self.config.patience
        stalled = patience is not None and not before_pruning and self._stalled() >= patience
        self.finished = self.epoch == self.config.epochs or stalled
        seconds = time.perf_counter() - self._epoch_began
        logger.debug("%s: epoch %d of %d in %.2f s", self.config.task, self.epoch, self.config.epochs, seconds)
        self.epoch, self.batch = self.epoch + 1, 0

    def prune(self) -> None:
        """Scores adapters and prunes. Weights that other positions now use start with fresh optimiser moments."""
        pruning = Pruning(
            self.config, self.adapted, self.adapters, self.head, self.train_pixels, self.bank, self.generator
        )
        self.importance = pruning.score()
        if odd := [position for position, score in self.importance.items() if not math.isfinite(score)]:
            raise self._diverged(f"after epoch {self.epoch}, the importance of {odd[0]} is {self.importance[odd[0]]}")
        pruned = pruning.prune(self.importance)
        self.pruned, self.sources, self.banked = pruned.positions, pruned.sources, pruned.banked
        train_what_is_there(self.optimiser, self.adapters, self.head, pruned.changed)

    def _stalled(self) -> int:
        """Epochs since the best val after pruning."""
        first = self.config.pruned_after if self.prunes else 0
        values = [epoch[self.judged_by] for epoch in self.history[first:]]
        return len(values) - 1 - values.index(max(values))

    def check_finite(self) -> None:
        """Raises a DivergedError unless every trained weight is finite, also in the dtype that it is written in."""
        for name, tensor in self.tensors().items():
            dtype: Written = self.config.head_dtype if name.startswith("head.") else self.config.tensor_dtype
            if name.startswith("scale."):
                dtype = "F32"
            elif name.startswith("core."):
                dtype = core_dtype(self.config.core_dtype, self.config.tensor_dtype)
            if not bool(torch.isfinite(tensor.detach().to(float_dtype(dtype))).all()):
                raise self._diverged(f"after epoch {self.epoch}, {name} is not finite as {dtype}")

    def _diverged(self, found: str) -> DivergedError:
        return DivergedError(self.config.task, found, self.config.lr)

    # ---- properties and evaluation ------------------------------------------------------------

    @property
    def prunes(self) -> bool:
        """Whether adapters are pruned. On common bases, that is so only if `own_bytes` limits them."""
        return self.config.prunes(on_bases=self.bases is not None)

    @property
    def autocast(self) -> torch.dtype | None:
        return autocast_dtype(self.precision)

    @property
    def running_loss(self) -> float:
        return self._tally.loss / max(1, self._tally.images)

    @property
    def train_top1(self) -> float:
        return self._tally.right / max(1, self._tally.images)

    @property
    def judged_by(self) -> str:
        """The key of an epoch's history that says how good the epoch is."""
        return "val_macro_f1" if self.config.select == "macro_f1" else "val_top1"

    def look_at_val(self) -> dict[str, float]:
        """Figures of val for the history."""
        scores = self.evaluate(self.val_pixels)
        return {"val_top1": scores.top1, "val_macro_f1": scores.macro_f1}

    def accuracy(self, pixels: Pixels) -> float:
        """Top-1 of the current weights. Raises as :meth:`evaluate`."""
        return self.evaluate(pixels).top1

    def evaluate(self, pixels: Pixels) -> Scores:
        """Figures of the current weights.

        Raises:
            DivergedError: a logit is not finite.
        """
        predicted = predicted_classes(pixels, lambda rows: self.head(self.features(pixels, rows)))
        if predicted is None:
            raise self._diverged(f"after epoch {self.epoch}, logits on val are not finite")
        return scores_of(predicted, pixels.targets, len(self.dataset.classes))

    def features(self, pixels: Pixels, rows: Tensor) -> Tensor:
        """Pooled features [row, d] of this task alone, for evaluation. Without adapters they are computed only once."""
        if self.adapters.branches:
            weights = self.adapters.position_weights()
            return self.adapted.features(pixels.images(rows), weights, self.autocast)
        if id(pixels) not in self._frozen_features:
            with torch.no_grad():
                parts = [self.adapted.features(pixels.images(part), {}, self.autocast) for part in in_batches(pixels)]
            self._frozen_features[id(pixels)] = torch.cat(parts)
        return self._frozen_features[id(pixels)][rows.to(self.device)]

    def tensors(self) -> dict[str, nn.Parameter]:
        """Every trained weight, by name."""
        named = dict(self.adapters.named_parameters())
        named.update({f"scale.{name}": scale for name, scale in self.adapters.scales().items()})
        named.update({f"core.{name}": core for name, core in self.adapters.cores().items()})
        named.update({f"head.{name}": parameter for name, parameter in self.head.named_parameters()})
        return named

    def state(self) -> dict[str, Tensor]:
        """A copy of :meth:`tensors`."""
        return {name: tensor.detach().clone() for name, tensor in self.tensors().items()}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.tensors().items():
            tensor.copy_(state[name])
