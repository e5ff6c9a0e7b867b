"""Makes batches of images and tasks: which images are decoded together, and which rows run in one forward."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from router.errors import ImageError
from router.pictures import ImageLike
from router.preprocess import Preprocess, decode
from router.sharing import Ints

PIXELS = 512 * 224 * 224
"""Most pixels of images that are decoded together, and of one forward. Longer lists run in parts."""
SHARED_ROWS, SHARED_PIXELS_CPU = 512, 64 * 224 * 224
"""Limits of a forward in which rows share images. It has at most SHARED_ROWS rows; more would only cost memory. On a
CPU, rows of several images have together at most SHARED_PIXELS_CPU pixels, because caches are small. Rows of one image
may have more, because its trunk runs once."""

Images = Tensor | ImageLike | Sequence[ImageLike]


@dataclass(frozen=True, eq=False)
class Batch:
    """Images of one size, and the rows that ask for them. Several rows may ask for one image."""

    images: Tensor
    """Normalised images, float32 [image, 3, h, w]."""
    rows: Ints
    """Numbers of the rows in the caller's list, int64 [row], ascending."""
    image_of: Ints
    """Each row's image, as an index into `images`, int64 [row]."""

    def parts(self, on_cpu: bool) -> Iterator[Ints]:
        """The rows of each forward, as indices into `rows`, int64 [row]. No forward has too many pixels."""
        pixels = self.images.shape[2] * self.images.shape[3]
        most = max(1, PIXELS // pixels)
        shared = min(SHARED_ROWS, most)
        return _parts(self.image_of, min(shared, SHARED_PIXELS_CPU // pixels) if on_cpu else shared, shared, most)

    def part(self, places: Ints) -> "Batch":
        """The batch of some rows, given as indices into `rows`, int64 [row]."""
        return Batch(self.images, self.rows[places], self.image_of[places])


def as_images(images: Images) -> Tensor | list[ImageLike]:
    """A batch of images. One image alone becomes a batch of one.

    Raises:
        ImageError: `images` is neither an image nor a batch of images.
    """
    if isinstance(images, Tensor):
        batch = images.unsqueeze(0) if images.ndim == 3 else images
        if batch.ndim != 4 or batch.shape[1] != 3 or not images.is_floating_point():
            found = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
            raise ImageError(f"images {found}: expected normalised floats [batch, 3, h, w], or [3, h, w] of one image")
        return batch
    if isinstance(images, np.ndarray):
        if images.ndim == 4:
            return list(images)  # views, which are compared by id, so the list must keep them alive
        if images.ndim == 2 or (images.ndim == 3 and images.shape[2] in (1, 3, 4)):
            return [images]
        raise ImageError(
            f"images {images.dtype} {list(images.shape)}: expected an array [batch, h, w, 1, 3 or 4], or [h, w], "
            "[h, w, 1], [h, w, 3] or [h, w, 4] of one image"
        )
    if isinstance(images, list | tuple):
        return list(images)
    if isinstance(images, str | PathLike | bytes | Image.Image) or hasattr(images, "read"):
        return [cast(ImageLike, images)]
    raise ImageError(f"images is one {type(images).__name__}: expected an image, or a list of images")


def same_images(images: Tensor | list[ImageLike]) -> Ints:
    """For each image the number of the first equal one, int64 [image]. Equal are the same object, path or bytes.

    Images of a tensor are equal if it was expanded along the batch.
    """
    count = len(images)
    if isinstance(images, Tensor):
        return np.zeros(count, np.int64) if count > 1 and images.stride(0) == 0 else np.arange(count)
    first: dict[object, int] = {}
    return np.array([first.setdefault(_likeness(image), i) for i, image in enumerate(images)], np.int64)


def _likeness(image: object) -> object:
    if isinstance(image, str | PathLike):
        return fspath(image)
    return image if isinstance(image, bytes) else id(image)


def check_size(images: Tensor, ways: Sequence[Preprocess], tasks: Sequence[str]) -> None:
    """Checks that normalised images have the size that all tasks expect.

    Args:
        images: [batch, 3, h, w].
        ways: each task's preprocessing.
        tasks: their names.
    Raises:
        ImageError: the tasks differ in preprocessing, or expect another size.
    """
    if len({way.key for way in ways}) > 1:
        listed = ", ".join(map(repr, tasks))
        raise ImageError(f"tasks {listed} differ in preprocessing: give a list of images, not one tensor")
    size = ways[0].size
    if tuple(images.shape[2:]) != size:
        found = f"{images.shape[2]} x {images.shape[3]}"
        raise ImageError(f"images: expected {size[0]} x {size[1]} pixels, found {found}: resize them")


def batches(
    images: list[ImageLike], image_of: Ints, ways: Sequence[Preprocess], device: torch.device
) -> Iterator[tuple[list[Batch], dict[int, ImageError]]]:
    """Decodes rows part by part. Yields the batches of each part, and the error of each row that failed.

    Args:
        image_of: each row's image, as an index into `images`, int64 [row].
        ways: each row's preprocessing.
    """
    sizes = {way.key: way.size for way in ways}
    for rows in _decoded_together(image_of, sum(height * width for height, width in sizes.values())):
        found, errors = prepare([images[i] for i in image_of[rows].tolist()], [ways[i] for i in rows.tolist()], device)
        yield (
            [Batch(batch.images, rows[batch.rows], batch.image_of) for batch in found],
            {int(rows[row]): error for row, error in errors.items()},
        )


def prepare(
    images: Sequence[ImageLike], ways: Sequence[Preprocess], device: torch.device | str = "cpu"
) -> tuple[list[Batch], dict[int, ImageError]]:
    """Decodes and normalises images, each with its own preprocessing.

    An image that comes several times is decoded once, and prepared once per preprocessing. Its batch holds it once.

    Args:
        images: PIL images, arrays, paths, URLs, files' bytes or open files.
        ways: each image's preprocessing.
        device: where the batches go.
    Returns:
        A batch for each image size, and the error of each image that cannot be read, by its number.
    """
    found = decode(images, ways)
    errors = {row: error for row, error in enumerate(found) if isinstance(error, ImageError)}
    pixels = {row: image for row, image in enumerate(found) if isinstance(image, Tensor)}
    return put_together(pixels, ways, device), errors


def put_together(
    pixels: Mapping[int, Tensor], ways: Sequence[Preprocess], device: torch.device | str = "cpu"
) -> list[Batch]:
    """Makes batches of decoded images on the device, one for each size. A tensor of several rows is stored once.

    Args:
        pixels: row -> uint8 [3, h, w], as `decode` gives it, or float32 that is already normalised.
        ways: each row's preprocessing.
    """
    sizes: dict[tuple[int, int], dict[int, tuple[Preprocess, Tensor, list[int]]]] = {}
    for row, image in pixels.items():
        sizes.setdefault(ways[row].size, {}).setdefault(id(image), (ways[row], image, []))[2].append(row)
    made = []
    for distinct in sizes.values():
        by_way: dict[object, list[tuple[Preprocess, Tensor, list[int]]]] = {}
        for one in distinct.values():
            by_way.setdefault((one[0].key, one[1].dtype), []).append(one)
        normalised = [
            to_device(alike[0][0], torch.stack([pixels for _, pixels, _ in alike]), torch.device(device))
            for alike in by_way.values()
        ]
        asked = [rows for alike in by_way.values() for _, _, rows in alike]
        rows = np.array([row for some in asked for row in some], np.int64)
        image_of = np.repeat(np.arange(len(asked)), [len(some) for some in asked])
        order = np.argsort(rows)
        made.append(
            Batch(normalised[0] if len(normalised) == 1 else torch.cat(normalised), rows[order], image_of[order])
        )
    return made


def to_device(way: Preprocess, pixels: Tensor, device: torch.device) -> Tensor:
    """Normalised float32 [batch, 3, h, w] on the device, from uint8 [batch, 3, h, w]. On CUDA other work goes on."""
    if pixels.is_floating_point():  # already normalised
        return pixels.to(device)
    if device.type != "cuda":
        return way.normalise(pixels).to(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        images = way.normalise(pixels.pin_memory().to(device, non_blocking=True))
    stream.synchronize()  # blocks only this thread
    return images


def _decoded_together(image_of: Ints, image_pixels: int) -> list[Ints]:
    """Sets of rows whose images are decoded together: all rows, or as many images at a time as PIXELS allows."""
    most, count = max(1, PIXELS // image_pixels), len(image_of)
    if count <= most:
        return [np.arange(count)]
    distinct, number = np.unique(image_of, return_inverse=True)
    return [np.flatnonzero(number // most == part) for part in range(-(-len(distinct) // most))]


def _parts(image_of: Ints, together: int, shared: int, most: int) -> Iterator[Ints]:
    """The rows of each forward. If all images differ: up to `most` rows. If images repeat: all rows of several images,
    up to `together`, or rows of one image, up to `shared`."""
    count = len(image_of)
    if count <= together or len(np.unique(image_of)) == count:
        yield from (np.arange(start, min(start + most, count)) for start in range(0, count, most))
        return
    by_image = np.argsort(image_of, kind="stable")
    starts = np.flatnonzero(np.diff(image_of[by_image], prepend=-1)).tolist()
    parts, begin = [], 0
    for start, stop in zip(starts, [*starts[1:], count], strict=True):
        if stop - begin > together and start > begin:
            parts.append(by_image[begin:start])
            begin = start
    parts.append(by_image[begin:])
    yield from (part[i : i + shared] for part in parts for i in range(0, len(part), shared))
