"""Makes normalised tensors of images, as a task's record says.

Worker threads decode and resize images, because Pillow releases the GIL. An image that comes several times is opened
once, and prepared once for each preprocessing. If there is a JpegDecoder, it decodes large plain JPEGs in batches, and
the worker threads only read them.
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
from router.jpegs import JpegDecoder, upright
from router.pictures import (
    LIMITS,
    SPARE,
    Clock,
    ImageLike,
    Limits,
    Picture,
    PlainJpeg,
    check_reading,
    errors_named,
    opened,
    shrink_factor,
)
from router.threads import side_threads

_BY_TORCH = ("bilinear", "bicubic")
"""Interpolations of 8-bit images that torch has with the antialiasing of Pillow."""
FILES = 64
"""Most pictures whose files are held in memory for a JpegDecoder."""
MAX_ASPECT = 256
"""Largest aspect ratio of pictures that are resized in proportion. At 224 pixels in height, that is 13 megapixels."""


class Preprocess:
    """Reads pictures by a task's rule, resizes them by timm's evaluation transform, and normalises them.

    Args:
        record: a task's `preprocess`, such as :attr:`Backbone.preprocess`.
        limits: most pixels, and which paths and URLs may be opened.
        jpegs: decodes large plain JPEGs, if they are read by rule 2 and torch makes them smaller. None: Pillow does.
    Raises:
        RouterError: this Pear does not know the record's rule for reading.
    """

    def __init__(self, record: Mapping[str, Any], limits: Limits = LIMITS, jpegs: JpegDecoder | None = None) -> None:
        self.reading = check_reading(record)
        self.limits, self.jpegs = limits, jpegs
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
        self._by_torch = self.reading >= 2 and self._mode == "squash" and self._interpolation in _BY_TORCH
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
        return self._by_torch and rgb.height >= self._resized[0] and rgb.width >= self._resized[1]

    def _shrunk(self, rgb: Image.Image) -> Tensor:
        """The picture made smaller by torch, uint8 [3, h, w]. Levels differ from Pillow's by at most one."""
        pixels = (
            torch.from_numpy(np.array(rgb)).permute(2, 0, 1).unsqueeze(0)
        )  # channels last in memory, for which torch's kernel is fast
        return F.interpolate(pixels, self._resized, mode=self._interpolation, antialias=True).squeeze(0)

    def leaves_to_jpegs(self, picture: Picture) -> bool:
        """Whether the JpegDecoder is to decode this picture, if it is a plain JPEG.

        Smaller ones are left to Pillow. Theirs would be other levels, because decoders differ in how they enlarge the
        colours, which a JPEG stores at half the size.
        """
        return self.jpegs is not None and self._by_torch and min(picture.size) >= SPARE * max(self._resized)

    def resized_on_device(self, pixels: Tensor, turn: Image.Transpose | None) -> Tensor:
        """Resizes a decoded JPEG where it lies, in the steps of the CPU: uint8 [3, h, w] of the input size.

        Args:
            pixels: uint8 [3, h, w], as the file stores them.
            turn: the transposition that makes them upright.
        """
        levels, (height, width) = pixels.unsqueeze(0).float(), self._resized
        if (factor := shrink_factor((pixels.shape[1], pixels.shape[2]), max(self._resized))) > 1:
            levels = F.avg_pool2d(levels, factor, ceil_mode=True)
        levels = upright(levels, turn)
        for size in ((levels.shape[2], width), (height, width)):  # a pass for each axis, as for uint8 on the CPU
            levels = F.interpolate(levels, size, mode=self._interpolation, antialias=True).round_().clamp_(0, 255)
        small: Tensor = self._transform(levels.squeeze(0).to(torch.uint8))
        return small

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
    by_jpegs: int = 0
    """Number of pictures that a JpegDecoder decoded."""
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, read_s: float, whole_s: float, by_jpegs: int = 0) -> None:
        with self.lock:
            self.read_s += read_s
            self.decode_s += whole_s - read_s
            self.by_jpegs += by_jpegs


@dataclass(eq=False)
class _Asked:
    """An image, the ways in which it is asked for, and what came of each."""

    image: ImageLike
    limits: Limits
    ways: dict[Hashable, Preprocess] = field(default_factory=dict)
    found: dict[Hashable, Tensor | ImageError] = field(default_factory=dict)
    """By the ways' keys."""
    jpeg: PlainJpeg | None = None
    """The file, for the ways that leave it to a JpegDecoder."""

    def left(self) -> dict[Hashable, Preprocess]:
        """The ways of which nothing has come yet."""
        return {key: way for key, way in self.ways.items() if key not in self.found}


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
        For each image its pixels, uint8 [3, h, w] on the CPU, or its error if it cannot be read.
    """
    images = list(images)  # images are compared by id, and an array makes its rows anew at each access: hold them
    asked: dict[Hashable, _Asked] = {}
    sources = [fspath(image) if isinstance(image, str | PathLike) else id(image) for image in images]
    names = [(source, way.limits) for source, way in zip(sources, ways, strict=True)]
    for name, image, way in zip(names, images, ways, strict=True):
        asked.setdefault(name, _Asked(image, way.limits)).ways.setdefault(way.key, way)
    distinct = list(asked.values())
    decoder = next((way.jpegs for way in ways if way.jpegs is not None), None)
    together = len(distinct) if decoder is None else FILES
    for start in range(0, len(distinct), together or 1):
        part = distinct[start : start + together]
        _in_workers(part, spent)
        if decoder is not None:
            _decode_jpegs(decoder, [one for one in part if one.jpeg is not None], spent)
            _in_workers([one for one in part if one.jpeg is not None], spent)  # those that the decoder refused
    return [asked[name].found[way.key] for name, way in zip(names, ways, strict=True)]


def _in_workers(asked: list[_Asked], spent: Spent | None) -> None:
    run = _workers().map if len(asked) > 1 else map
    for _ in run(partial(_decode_one, spent=spent), asked):
        pass


def _decode_one(asked: _Asked, spent: Spent | None) -> None:
    if spent is None:
        _find(asked, None)
        return
    clock, began = Clock(), time.perf_counter()
    try:
        _find(asked, clock)
    finally:
        spent.add(clock.read_s, time.perf_counter() - began)


def _find(asked: _Asked, clock: Clock | None) -> None:
    """Decodes an image in all ways that are left. A plain JPEG is only read for ways that leave it to a JpegDecoder;
    if it was read before, the decoder refused it."""
    refused = asked.jpeg
    image, name = (asked.image, None) if refused is None else (refused.data, refused.name)
    try:
        with opened(image, asked.limits, clock, name) as picture:
            left = asked.left()
            waiting = [key for key, way in left.items() if refused is None and way.leaves_to_jpegs(picture)]
            asked.jpeg = picture.plain_jpeg() if waiting else None
            for key, way in left.items():
                if asked.jpeg is not None and key in waiting:
                    continue
                try:
                    asked.found[key] = way.resized(picture)
                except ImageError as error:
                    asked.found[key] = error
    except ImageError as error:
        asked.jpeg = None
        asked.found.update(dict.fromkeys(asked.left(), error))


def _decode_jpegs(decoder: JpegDecoder, asked: list[_Asked], spent: Spent | None) -> None:
    """Decodes plain JPEGs in the ways that are left. What the decoder refuses is left as it is."""
    began = time.perf_counter()
    jpegs = [one.jpeg for one in asked if one.jpeg is not None]

    def resized(number: int, pixels: Tensor) -> dict[Hashable, Tensor]:
        turn = jpegs[number].turn
        return {key: way.resized_on_device(pixels, turn) for key, way in asked[number].left().items()}

    decoded = decoder.decode(jpegs, resized)
    for one, found in zip(asked, decoded, strict=True):
        if found is not None:
            one.found.update(found)
            one.jpeg = None
    if spent is not None:
        spent.add(0, time.perf_counter() - began, sum(found is not None for found in decoded))


@cache
def _workers() -> ThreadPool:
    return side_threads(None, "pear-decode")


os.register_at_fork(after_in_child=_workers.cache_clear)  # a child has none of its parent's threads
