"""Makes normalised tensors of images, as a task's record says.

Worker threads decode and resize images, because Pillow releases the GIL. An image that comes several times is opened
once, and prepared once for each preprocessing.
"""

import math
import os
import threading
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from os import PathLike, fspath
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms_factory import transforms_imagenet_eval
from torch import Tensor
from torch.nn import functional as F

from pear_store.pools import ThreadPool
from router.errors import ImageError
from router.pictures import LIMITS, Clock, ImageLike, Limits, Picture, check_reading, errors_named, opened
from router.threads import side_threads

_BY_TORCH = ("bilinear", "bicubic")
"""Interpolations of 8-bit images that torch has with the antialiasing of Pillow."""
MAX_ASPECT = 256
"""Largest aspect ratio of pictures that are resized in proportion. At 224 pixels in height, that is 13 megapixels."""


class Preprocess:
    """Reads pictures by a task's rule, resizes them by timm's evaluation transform, and normalises them.

    Args:
        record: a task's `preprocess`, such as :attr:`Backbone.preprocess`.
        limits: most pixels, and which paths and URLs may be opened.
    Raises:
        RouterError: this Pear does not know the record's rule for reading.
    """

    def __init__(self, record: Mapping[str, Any], limits: Limits = LIMITS) -> None:
        self.reading = check_reading(record)
        self.limits = limits
        self.size: tuple[int, int] = (int(record["input_size"][1]), int(record["input_size"][2]))
        self.key = (
            self.reading,
            *(
                tuple(record[name]) if isinstance(record[name], list | tuple) else record[name]
                for name in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
            ),
        )
        self._mode: str = record["crop_mode"]
        self._interpolation: str = record["interpolation"]
        self._resized = [math.floor(side / float(record["crop_pct"])) for side in self.size]
        self._mean = torch.tensor(record["mean"], dtype=torch.float32).view(1, 3, 1, 1)
        self._std = torch.tensor(record["std"], dtype=torch.float32).view(1, 3, 1, 1)
        self._transform = transforms_imagenet_eval(
            img_size=self.size,
            crop_pct=float(record["crop_pct"]),
            crop_mode=record["crop_mode"],
            interpolation=record["interpolation"],
            mean=tuple(record["mean"]),
            normalize=False,
        )

    def pixels(self, image: ImageLike) -> Tensor:
        """Reads and resizes an image: uint8 [3, h, w] of the input size.

        Raises:
            ImageError: the image cannot be read.
        """
        with opened(image, self.limits) as picture:
            return self.resized(picture)

    def resized(self, picture: Picture) -> Tensor:
        """Resizes an opened picture: uint8 [3, h, w] of the input size.

        Raises:
            ImageError: the picture cannot be decoded, or is too long to be resized.
        """
        rgb = picture.rgb(self.reading, max(self._resized))
        if not self._can_resize(*rgb.size):
            raise ImageError(
                f"{picture.name}: {rgb.width} x {rgb.height} pixels are too long to resize, because this task keeps "
                "proportions: cut it into pieces"
            )
        with errors_named(picture.name):
            pixels: Tensor = self._transform(self._shrunk(rgb) if self._shrinks(rgb) else rgb)
        return pixels

    def _shrinks(self, rgb: Image.Image) -> bool:
        """Whether torch makes the picture smaller. Pillow enlarges pictures; small ones are fast anyway."""
        smaller = rgb.height >= self._resized[0] and rgb.width >= self._resized[1]
        return self.reading >= 2 and self._mode == "squash" and self._interpolation in _BY_TORCH and smaller

    def _shrunk(self, rgb: Image.Image) -> Tensor:
        """The picture made smaller by torch, uint8 [3, h, w]. Levels differ from Pillow's by at most one."""
        pixels = (
            torch.from_numpy(np.array(rgb)).permute(2, 0, 1).unsqueeze(0)
        )  # channels last in memory, for which torch's kernel is fast
        return F.interpolate(pixels, self._resized, mode=self._interpolation, antialias=True).squeeze(0)

    def _can_resize(self, width: int, height: int) -> bool:
        """Whether resizing in proportion leaves at least a pixel on each side, and stays within MAX_ASPECT."""
        if self._mode == "squash":
            return True
        ratios = (width / self._resized[1], height / self._resized[0])
        ratio = max(ratios) if self._mode == "border" else min(ratios)
        sides = (round(width / ratio), round(height / ratio))
        return min(sides) >= 1 and sides[0] * sides[1] <= MAX_ASPECT * self._resized[0] * self._resized[1]

    def normalise(self, pixels: Tensor) -> Tensor:
        """Normalised float32 [batch, 3, h, w] from uint8 [batch, 3, h, w], on the same device."""
        mean, std = self._mean.to(pixels.device), self._std.to(pixels.device)
        return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)

    def __call__(self, images: Sequence[ImageLike]) -> Tensor:
        """Reads, resizes and normalises images: float32 [batch, 3, h, w].

        Raises:
            ImageError: an image cannot be read; the first one's error.
        """
        pixels = []
        for found in decode(images, [self] * len(images)):
            if isinstance(found, ImageError):
                raise found
            pixels.append(found)
        return self.normalise(torch.stack(pixels))


@dataclass
class Spent:
    """The time of decoding, in seconds, summed over all threads."""

    read_s: float = 0.0
    """Reading files and URLs."""
    decode_s: float = 0.0
    """Decoding and resizing."""
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, read_s: float, whole_s: float) -> None:
        with self.lock:
            self.read_s += read_s
            self.decode_s += whole_s - read_s


def decode(
    images: Sequence[ImageLike], ways: Sequence[Preprocess], spent: Spent | None = None
) -> list[Tensor | ImageError]:
    """Reads and resizes images in parallel, each with its own preprocessing.

    Equal images (one object, or equal paths) with the same preprocessing get the same tensor.

    Args:
        images: PIL images, arrays, paths, URLs, files' bytes or open files.
        ways: each image's preprocessing.
        spent: the time of reading and of decoding is added to it.
    Returns:
        For each image its pixels, uint8 [3, h, w], or its error if it cannot be read.
    """
    images = list(images)  # images are compared by id, and an array makes its rows anew at each access: hold them
    asked: dict[Hashable, tuple[ImageLike, Limits, dict[Hashable, Preprocess]]] = {}
    sources = [fspath(image) if isinstance(image, str | PathLike) else id(image) for image in images]
    names = [(source, way.limits) for source, way in zip(sources, ways, strict=True)]
    for name, image, way in zip(names, images, ways, strict=True):
        asked.setdefault(name, (image, way.limits, {}))[2].setdefault(way.key, way)
    run = _workers().map if len(asked) > 1 else map
    found = dict(zip(asked, run(partial(_decode_one, spent=spent), asked.values()), strict=True))
    return [found[name][way.key] for name, way in zip(names, ways, strict=True)]


def _decode_one(
    asked: tuple[ImageLike, Limits, dict[Hashable, Preprocess]], spent: Spent | None
) -> dict[Hashable, Tensor | ImageError]:
    if spent is None:
        return _pixels_of(*asked, None)
    clock, began = Clock(), time.perf_counter()
    try:
        return _pixels_of(*asked, clock)
    finally:
        spent.add(clock.read_s, time.perf_counter() - began)


def _pixels_of(
    image: ImageLike, limits: Limits, ways: dict[Hashable, Preprocess], clock: Clock | None
) -> dict[Hashable, Tensor | ImageError]:
    found: dict[Hashable, Tensor | ImageError] = {}
    try:
        with opened(image, limits, clock) as picture:
            for key, way in ways.items():
                try:
                    found[key] = way.resized(picture)
                except ImageError as error:
                    found[key] = error
    except ImageError as error:
        return dict.fromkeys(ways, error)
    return found


@cache
def _workers() -> ThreadPool:
    return side_threads(None, "pear-decode")


os.register_at_fork(after_in_child=_workers.cache_clear)  # a child has none of its parent's threads
