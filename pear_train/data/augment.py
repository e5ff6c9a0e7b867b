"""What training images may undergo."""

import torch
from torch import Tensor
from torch.nn import functional as F

from pear_train.choices import Augment


def augment(images: Tensor, how: Augment, generator: torch.Generator) -> Tensor:
    """Flips half of the images left to right; shifts each by up to an eighth of its sides, mirrored at the border.

    Args:
        images: [batch, 3, h, w]; not mutated.
    """
    if "flip" in how:
        flipped = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(flipped.view(-1, 1, 1, 1), images.flip(3), images)
    if "crop" in how:
        height, width = images.shape[2:]
        up, left = height // 8, width // 8
        padded = F.pad(images, (left, left, up, up), mode="reflect")
        y = torch.randint(0, 2 * up + 1, (len(images),), generator=generator).tolist()
        x = torch.randint(0, 2 * left + 1, (len(images),), generator=generator).tolist()
        images = torch.stack([padded[i, :, y[i] : y[i] + height, x[i] : x[i] + width] for i in range(len(images))])
    return images
