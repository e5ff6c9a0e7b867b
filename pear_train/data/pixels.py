"""The decoded pictures of a data set, from which batches are made."""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from pear_store.pools import ThreadPool
from pear_train.data.dataset import Dataset, Split, raise_all
from router import ImageError, Preprocess

logger = logging.getLogger(__name__)

CACHE_BYTES = 4 * 1024**3
"""A split's pixels are kept in memory up to this size. A larger split is decoded anew for every batch."""


class Pixels:
    """A split's images at the input size. Making it decodes every image; they are kept if they fit into memory."""

    def __init__(self, split: Split, preprocess: Preprocess) -> None:
        """Raises a DataError that names every image that cannot be read."""
        self._decode_all(split, preprocess)
        raise_all(list(self.unreadable.values()))

    @classmethod
    def readable(cls, split: Split, preprocess: Preprocess) -> "Pixels":
        """The pixels of all images of a split that can be read. `unreadable` has the reason for each other one."""
        made = cls.__new__(cls)
        made._decode_all(split, preprocess)
        if made.unreadable:
            made.kept = torch.tensor([i for i in range(len(split)) if i not in made.unreadable], dtype=torch.long)
            made._split, made.targets = split.subset(made.kept), split.targets[made.kept]
            made._cache = None if made._cache is None else made._cache[made.kept]
        return made

    def _decode_all(self, split: Split, preprocess: Preprocess) -> None:
        self._split, self._preprocess, self.targets = split, preprocess, split.targets
        self.kept = torch.arange(len(split))
        """Numbers of the split's images that could be read, int64."""
        self.unreadable: dict[int, str] = {}
        shape = (len(split), 3, *preprocess.size)
        self._cache = torch.zeros(shape, dtype=torch.uint8) if math.prod(shape) <= CACHE_BYTES else None
        for i, pixels in enumerate(self._decode(range(len(split)))):
            if isinstance(pixels, ImageError):
                self.unreadable[i] = str(pixels)
            elif self._cache is not None:
                self._cache[i] = pixels

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def kept_bytes(self) -> int:
        """Bytes of decoded pixels in memory. 0 if they are decoded anew for every batch."""
        return 0 if self._cache is None else self._cache.nbytes

    def images(self, indices: Tensor) -> Tensor:
        """Normalised float32 [batch, 3, h, w]. Raises as :meth:`raw`."""
        return self.normalise(self.raw(indices))

    def normalise(self, pixels: Tensor) -> Tensor:
        """float32 [batch, 3, h, w] from uint8 [batch, 3, h, w]."""
        return self._preprocess.normalise(pixels)

    def raw(self, indices: Tensor) -> Tensor:
        """uint8 [batch, 3, h, w].

        Raises:
            ImageError: an image can no longer be read.
        """
        if self._cache is not None:
            return self._cache[indices]
        decoded = []
        for pixels in self._decode(indices.tolist()):
            if isinstance(pixels, ImageError):
                raise pixels
            decoded.append(pixels)
        return torch.stack(decoded)

    def _decode(self, indices: "range | list[int]") -> "Iterator[Tensor | ImageError]":
        with ThreadPool() as workers:  # Pillow decodes and resizes without the GIL
            yield from workers.map(self._decode_one, indices)

    def _decode_one(self, index: int) -> "Tensor | ImageError":
        try:
            image = self._split.image(index)
        except ImageError as error:
            return error
        except Exception as error:  # whatever a reader of timm, torchvision or datasets can raise
            reason = " ".join(str(error).split()) or type(error).__name__
            return ImageError(f"image {self._split.names[index]}: cannot be read: {reason}")
        try:
            return self._preprocess.pixels(image)
        except ImageError as error:
            return error if isinstance(image, str) else ImageError(f"image {self._split.names[index]}: {error}")


def read_pictures(dataset: Dataset, preprocess: Preprocess) -> tuple[Dataset, dict[str, Pixels]]:
    """Decodes the images of all splits. With `skip_unreadable`, leaves out those that cannot be read.

    Returns:
        The data set without the images that were left out, and the pixels of each split.
    Raises:
        DataError: images cannot be read (the message names all of them), or too few are left.
    """
    began = time.perf_counter()
    pixels = {name: Pixels.readable(split, preprocess) for name, split in dataset.splits.items()}
    images, kept_bytes = sum(map(len, dataset.splits.values())), sum(read.kept_bytes for read in pixels.values())
    seconds = time.perf_counter() - began
    logger.debug("%s: decoded %d images in %.2f s, kept %d bytes", dataset.description, images, seconds, kept_bytes)
    faults = [f"{name}: {fault}" for name, read in pixels.items() for fault in read.unreadable.values()]
    if not faults:
        return dataset, pixels
    if not dataset.skip_unreadable:
        count = f"{len(faults)} of {sum(map(len, dataset.splits.values()))} images cannot be read"
        remedy = "repair or remove them, or leave them out with --skip-unreadable"
        raise_all(faults, f"{dataset.description}: {count}: {remedy}")
    left = {name: split.subset(pixels[name].kept) for name, split in dataset.splits.items()}
    train, val, test = left["train"], left["val"], left.get("test")
    return replace(dataset, train=train, val=val, test=test, unreadable=tuple(faults), opened=dataset), pixels
