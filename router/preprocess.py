"""From images to normalised tensors, as a task's record says.

Images are decoded and resized in worker threads (Pillow releases the GIL). Work that rows have in common is done once:
an image asked for several times is opened once, and prepared once for each preprocessing.
"""

import io
import os
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from os import PathLike, fspath
from typing import Any

import fsspec
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from timm.data.transforms_factory import transforms_imagenet_eval
from torch import Tensor

from router.errors import ImageError

ImageLike = Image.Image | NDArray[np.uint8] | str | PathLike[str]
"""A PIL image, a uint8 array [h, w], [h, w, 1] or [h, w, 3], or a path or URL that fsspec opens."""


class Preprocess:
    """timm's evaluation transform in two steps: to pixels of the input size, then normalised."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.size: tuple[int, int] = (int(record["input_size"][1]), int(record["input_size"][2]))
        self.key = tuple(
            tuple(record[name]) if isinstance(record[name], list | tuple) else record[name]
            for name in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
        )
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
        """uint8 [3, h, w] of the input size."""
        pixels: Tensor = self._transform(open_image(image))
        return pixels

    def normalise(self, pixels: Tensor) -> Tensor:
        """float32 [batch, 3, h, w] from uint8 [batch, 3, h, w], on its device."""
        mean, std = self._mean.to(pixels.device), self._std.to(pixels.device)
        return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)

    def __call__(self, images: Sequence[ImageLike]) -> Tensor:
        """float32 [batch, 3, h, w].

        Raises:
            ImageError: the first image that cannot be read.
        """
        (prepared,) = prepare(images, [self] * len(images))
        return prepared.images[prepared.index]


@dataclass(frozen=True)
class Prepared:
    """The rows of a batch that have one preprocessing; an image that several of them ask for is there once."""

    preprocess: Preprocess
    images: Tensor
    """float32 [image, 3, h, w], normalised, all distinct."""
    rows: list[int]
    """The batch's rows, ascending."""
    index: list[int]
    """For each of `rows`, which of `images` it is."""


def prepare(images: Sequence[ImageLike], ways: Sequence[Preprocess]) -> list[Prepared]:
    """A batch, each image prepared in its own way, as one tensor for each preprocessing.

    Images may be of any sizes: each is resized to its preprocessing's input size; unlike sizes never meet in a tensor.

    Raises:
        ImageError: the first image that cannot be read.
    """
    groups: dict[Hashable, list[int]] = {}
    for row, way in enumerate(ways):
        groups.setdefault(way.key, []).append(row)
    pixels: list[Tensor] = []
    for found in decode(images, ways):
        if isinstance(found, ImageError):
            raise found
        pixels.append(found)
    prepared = []
    for rows in groups.values():
        distinct = {id(pixels[row]): pixels[row] for row in rows}
        place = {key: i for i, key in enumerate(distinct)}
        way = ways[rows[0]]
        stacked = way.normalise(torch.stack(list(distinct.values())))
        prepared.append(Prepared(way, stacked, rows, [place[id(pixels[row])] for row in rows]))
    return prepared


def decode(images: Sequence[ImageLike], ways: Sequence[Preprocess]) -> list[Tensor | ImageError]:
    """Pixels, uint8 [3, h, w], of each image prepared in its own way; of one that cannot be read, the error.

    Rows with the same image (one object, or equal paths) and preprocessing are given the same tensor.
    """
    images = list(images)  # an array's rows are made anew at each look: hold them, for they are told apart by id
    asked: dict[Hashable, tuple[ImageLike, dict[Hashable, Preprocess]]] = {}
    names = [fspath(image) if isinstance(image, str | PathLike) else id(image) for image in images]
    for name, image, way in zip(names, images, ways, strict=True):
        asked.setdefault(name, (image, {}))[1].setdefault(way.key, way)
    run = _workers().map if len(asked) > 1 else map
    found = dict(zip(asked, run(_decode_one, asked.values()), strict=True))
    return [found[name][way.key] for name, way in zip(names, ways, strict=True)]


def _decode_one(asked: tuple[ImageLike, dict[Hashable, Preprocess]]) -> dict[Hashable, Tensor | ImageError]:
    image, ways = asked
    try:
        opened = open_image(image)
    except ImageError as error:
        return dict.fromkeys(ways, error)
    return {key: way.pixels(opened) for key, way in ways.items()}


@cache
def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="pear-decode")


os.register_at_fork(after_in_child=_workers.cache_clear)  # a child has none of its parent's threads


def open_image(image: ImageLike) -> Image.Image:
    """An RGB PIL image.

    Raises:
        ImageError: what is given is no image, or cannot be read.
    """
    if isinstance(image, Image.Image):
        try:
            return image.convert("RGB")
        except Exception as error:  # a lazily read file may be truncated, gone or of an odd mode
            raise ImageError(f"image {getattr(image, 'filename', '') or image!r}: cannot be read: {error}") from None
    if isinstance(image, np.ndarray):
        shape = image.shape
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and shape[2] not in (1, 3)):
            found = f"{image.dtype} {list(shape)}"
            raise ImageError(f"array image {found}: expected uint8 [h, w], [h, w, 1] or [h, w, 3]")
        if 0 in shape:
            raise ImageError(f"array image {list(shape)} is empty")
        return Image.fromarray(image.squeeze(2) if image.ndim == 3 and shape[2] == 1 else image).convert("RGB")
    if isinstance(image, PathLike):
        image = fspath(image)
    if not isinstance(image, str):
        raise ImageError(f"image of type {type(image).__name__}: expected a PIL image, a uint8 array or a path")
    try:
        with fsspec.open(image, "rb") as file:
            data = file.read()
        return Image.open(io.BytesIO(data)).convert("RGB")
    except FileNotFoundError:
        raise ImageError(f"{image}: no such file") from None
    except UnidentifiedImageError:
        raise ImageError(f"{image}: not an image that Pillow can read") from None
    except Exception as error:  # whatever a file system of fsspec or a decoder of Pillow can raise
        raise ImageError(f"{image}: cannot be read: {' '.join(str(error).split()) or type(error).__name__}") from None
