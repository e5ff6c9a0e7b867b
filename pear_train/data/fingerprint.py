"""A data set's sha256. It changes with any picture, class or split."""

import hashlib
import json
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image

from pear_store.files import open_regular_file
from pear_store.pools import ThreadPool
from router.pictures import ImageLike


def picture_digest(image: ImageLike) -> str:
    """A sha256 of a file's bytes, an array's values or a PIL image's pixels. "unreadable" if it cannot be read.

    A picture behind a URL is not downloaded for this, so it counts as unreadable. Only its name then distinguishes it.
    """
    try:
        if isinstance(image, str | PathLike):
            with open_regular_file(Path(image)) as file:
                return hashlib.sha256(file.read()).hexdigest()
        if isinstance(image, Image.Image):
            values, told = image.tobytes(), f"{image.mode} {image.size} {image.getpalette()}"
        elif isinstance(image, bytes):
            values, told = image, "file"
        elif isinstance(image, np.ndarray):
            values, told = np.ascontiguousarray(image).tobytes(), f"{image.dtype} {image.shape}"
        else:
            image.seek(0)
            values, told = image.read(), "file"
    except Exception:  # whatever Pillow raises for a broken file; the check before the first epoch names the file
        return "unreadable"
    return hashlib.sha256(told.encode() + values).hexdigest()


def fingerprint(
    classes: Sequence[str], splits: Sequence[tuple[str, Sequence[str], Sequence[int], Callable[[int], ImageLike]]]
) -> str:
    """A sha256 of class names and, for each split, of every picture's name, class and content, in order.

    Args:
        splits: for each split its name, the names and class numbers of its pictures, and the pictures by number.
    """
    whole = hashlib.sha256(json.dumps(["pear-data/1", *classes]).encode())
    with ThreadPool() as workers:  # files are read and hashed without the GIL
        for split, names, targets, image in splits:
            digests = workers.map(lambda i, image=image: picture_digest(image(i)), range(len(names)))
            for name, target, digest in zip(names, targets, digests, strict=True):
                whole.update(json.dumps([split, name, target, digest]).encode())
    return whole.hexdigest()
