"""From images to normalised tensors, as a task's record says.

Images are decoded and resized in worker threads (Pillow releases the GIL). Work that rows have in common is done once:
an image asked for several times is opened once, and prepared once for each preprocessing.
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
"""Interpolations that torch has for 8 bits, with the antialiasing of Pillow."""
MAX_ASPECT = 256
"""Of pictures that are resized in proportion; to 224 pixels in height, such a one has 13 megapixels."""


class Preprocess:
    """A task's way to read pictures, then timm's evaluation transform: to pixels of the input size, then normalised.

    Args:
        record: a task's `preprocess`.
        limits: what may be opened as a picture.

    Raises:
        RouterError: the record asks for a way of reading that this Pear does not know.
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
        """uint8 [3, h, w] of the input size.

        Raises:
            ImageError: the image cannot be read.
        """
        with opened(image, self.limits) as picture:
            return self.resized(picture)

    def resized(self, picture: Picture) -> Tensor:
        """uint8 [3, h, w] of the input size.

        Raises:
            ImageError: the picture cannot be decoded, or is too long to be resized.
        """
        rgb = picture.rgb(self.reading, max(self._resized))
        if not self._can_resize(*rgb.size):
            raise ImageError(
                f"{picture.name}: {rgb.width} x {rgb.height} pixels are too long: this task keeps "
                "proportions, and cannot resize such to its input size: cut it into pieces"
            )
        with errors_named(picture.name):
            pixels: Tensor = self._transform(self._shrunk(rgb) if self._shrinks(rgb) else rgb)
        return pixels

    def _shrinks(self, rgb: Image.Image) -> bool:
        """Whether torch makes the picture smaller. What is enlarged is left to Pillow: small pictures take no time."""
        smaller = rgb.height >= self._resized[0] and rgb.width >= self._resized[1]
        return self.reading >= 2 and self._mode == "squash" and self._interpolation in _BY_TORCH and smaller

    def _shrunk(self, rgb: Image.Image) -> Tensor:
        """uint8 [3, h, w] of the size that it is resized to. Levels differ from Pillow's by one at most."""
        pixels = (
            torch.from_numpy(np.array(rgb)).permute(2, 0, 1).unsqueeze(0)
        )  # channels last, as torch's kernel is fast
        return F.interpolate(pixels, self._resized, mode=self._interpolation, antialias=True).squeeze(0)

    def _can_resize(self, width: int, height: int) -> bool:
        """Whether resizing in proportion leaves a pixel of either side, and no more memory than MAX_ASPECT allows."""
        if self._mode == "squash":
            return True
        ratios = (width / self._resized[1], height / self._resized[0])
        ratio = max(ratios) if self._mode == "border" else min(ratios)
        sides = (round(width / ratio), round(height / ratio))
        return min(sides) >= 1 and sides[0] * sides[1] <= MAX_ASPECT * self._resized[0] * self._resized[1]

    def normalise(self, pixels: Tensor) -> Tensor:
        """float32 [batch, 3, h, w] from uint8 [batch, 3, h, w], on its device."""
        mean, std = self._mean.to(pixels.device), self._std.to(pixels.device)
        return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)

    def __call__(self, images: Sequence[ImageLike]) -> Tensor:
        """float32 [batch, 3, h, w].

        Raises:
            ImageError: the first image that cannot be read.
        """
        pixels = []
        for found in decode(images, [self] * len(images)):
            if isinstance(found, ImageError):
                raise found
            pixels.append(found)
        return self.normalise(torch.stack(pixels))


@dataclass
class Spent:
    """Where the time of decoding went, in seconds of all threads together."""

    read_s: float = 0.0
    """Files and URLs that images are in."""
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
    """Pixels, uint8 [3, h, w], of each image prepared in its own way; of one that cannot be read, the error.

    Rows with the same image (one object, or equal paths) and preprocessing are given the same tensor.

    Args:
        spent: is told where the time went.
    """
    images = list(images)  # an array's rows are made anew at each look: hold them, for they are told apart by id
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
