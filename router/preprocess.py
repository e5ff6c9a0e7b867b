"""From images to normalised tensors, as a task's record says."""

import io
from collections.abc import Mapping, Sequence
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
        """float32 [batch, 3, h, w] from uint8 [batch, 3, h, w]."""
        return pixels.to(torch.float32).div_(255).sub_(self._mean).div_(self._std)

    def __call__(self, images: Sequence[ImageLike]) -> Tensor:
        """float32 [batch, 3, h, w]."""
        return self.normalise(torch.stack([self.pixels(image) for image in images]))


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
