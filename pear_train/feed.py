"""The batches of a run: which images come, how they are changed, and how much their loss weighs."""

import torch
from torch import Tensor
from torch.nn import functional as F

from pear_train.config import TrainConfig
from pear_train.data import Pixels
from pear_train.data.augment import augment, mix
from pear_train.options import parse_augment


class Feed:
    """Batches of the train split, and their loss.

        loss = mean over the batch of  w[y] * cross_entropy(logits, y),  over the mean of w[y]

    Args:
        generator: draws the order of images, and their changes.
    """

    def __init__(self, config: TrainConfig, pixels: Pixels, classes: int, generator: torch.Generator) -> None:
        self._config, self._pixels, self._classes, self._generator = config, pixels, classes, generator
        self._mixes = "mixup" in parse_augment(config.augment)
        self._mixed: tuple[Tensor, Tensor] | None = None
        """The rows whose images were mixed last, and each class's share in them, float [row, class]."""
        counts = torch.bincount(pixels.targets, minlength=classes).float()
        self.weights = len(pixels) / (counts > 0).sum() / counts.clamp_min(1)
        """Weight of each class, float [class]. All are 1 if classes have equally many images."""

    def order(self) -> Tensor:
        """Row numbers of an epoch: each once, or with `balance` sampling drawn so that classes come equally often."""
        count = len(self._pixels)
        if self._config.balance == "sampling":
            chances = self.weights[self._pixels.targets]
            return torch.multinomial(chances, count, replacement=True, generator=self._generator)
        return torch.randperm(count, generator=self._generator)

    def images(self, rows: Tensor) -> Tensor:
        """Images after all random changes, normalised, float32 [batch, 3, h, w]."""
        pixels = augment(self._pixels.raw(rows), self._config.augment, self._generator)
        images = self._pixels.normalise(pixels)
        if self._mixes:
            images, shares = mix(images, self._pixels.targets[rows], self._classes, self._generator)
            self._mixed = rows, shares
        return images

    def targets(self, rows: Tensor) -> Tensor:
        """Classes of a batch, int64 [batch]. For mixed images the shares of classes, float [batch, class]."""
        if self._mixed is not None and self._mixed[0] is rows:
            return self._mixed[1]
        return self._pixels.targets[rows]

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The batch's mean loss, a scalar."""
        weights = self.weights.to(logits) if self._config.balance == "weights" else None
        return F.cross_entropy(logits, targets, weights, label_smoothing=self._config.label_smoothing)
