"""Random changes of training images."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from pear_train.choices import Augmentation
from pear_train.options import parse_augment

MIXUP_ALPHA = 0.2
"""Parameter of the Beta distribution. With this one, most mixtures are almost one of the two images."""
_EACH = ("rotate", "zoom", "color")
"""Changes that torchvision makes, image by image."""
_GREY = 124
"""Fills the corners of a rotated picture."""


def augment(images: Tensor, how: str, generator: torch.Generator) -> Tensor:
    """Changes each image at random, by what `how` names, in this order.

        flip    mirrored left to right with a chance of one half
        crop    shifted by up to an eighth of its sides, mirrored at the border
        rotate  rotated by up to 15 degrees
        zoom    a part of 35 to 100 % of its area, resized to the whole size
        color   brightness, contrast and saturation changed by up to 40 %

    Args:
        images: uint8 [batch, 3, h, w], not yet normalised; not mutated.
        how: words joined by +, as in the option. It ignores mixup, which :func:`mix` does.
    Returns:
        uint8 [batch, 3, h, w].
    """
    words = parse_augment(how)
    if "flip" in words:
        flipped = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(flipped.view(-1, 1, 1, 1), images.flip(3), images)
    if "crop" in words:
        images = _shifted(images, generator)
    changes = [_change(word, images.shape[2:]) for word in words if word in _EACH]
    if changes:
        with seeded(generator):
            images = torch.stack([v2.Compose(changes)(image) for image in images])
    return images


def mix(images: Tensor, targets: Tensor, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mixup: blends each image with its neighbour in the batch, and their classes in the same shares.

    Args:
        images: float [batch, 3, h, w].
        targets: int64 [batch].
    Returns:
        The images, and the share of each class: float [batch, class].
    Source: mixup, arXiv:1710.09412.
    """
    with seeded(generator):
        mixed: tuple[Tensor, Tensor] = v2.MixUp(alpha=MIXUP_ALPHA, num_classes=classes)(images, targets)
    return mixed


@contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """Seeds torch's default generator, which torchvision uses, from `generator`. Restores it at the end."""
    seed = int(torch.randint(2**31, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _change(word: Augmentation, size: torch.Size) -> v2.Transform:
    if word == "rotate":
        return v2.RandomRotation(15, v2.InterpolationMode.BILINEAR, fill=_GREY)
    if word == "zoom":
        return v2.RandomResizedCrop(tuple(size), scale=(0.35, 1.0), antialias=True)
    return v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4)


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    height, width = images.shape[2:]
    up, left = height // 8, width // 8
    padded = F.pad(images, (left, left, up, up), mode="reflect")
    y = torch.randint(0, 2 * up + 1, (len(images),), generator=generator).tolist()
    x = torch.randint(0, 2 * left + 1, (len(images),), generator=generator).tolist()
    return torch.stack([padded[i, :, y[i] : y[i] + height, x[i] : x[i] + width] for i in range(len(images))])
