"""JPEG files and colour profiles for tests of pictures."""

import io
from typing import Any

import numpy as np
from PIL import Image, ImageCms


def photograph(width: int, height: int, **saving: Any) -> bytes:
    """A JPEG with edges, gradients and some noise; its left half is darker, its top redder."""
    y, x = np.mgrid[0:height, 0:width]
    waves = 40 * np.sin(x / (width / 9)) * np.cos(y / (height / 7))
    pixels = np.stack([150 + waves - 60 * y / height, 120 + waves, 110 - waves], 2) - 60 * (x < width // 2)[..., None]
    pixels = pixels + np.random.default_rng(0).normal(0, 4, pixels.shape)
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90, **saving)
    return file.getvalue()


def wide_profile() -> bytes:
    """An RGB profile with sRGB's curve and red and green swapped: no one could take it for sRGB."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = data.index(b"rXYZ"), data.index(b"gXYZ")
    data[red : red + 4], data[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(data)
