"""What happens to each kind of picture: the rows of docs/pictures.md, in its order, with pixel values."""

import io
import os
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, features
from timm.data.dataset import ImageDataset

import pear_train.cli
import pear_train.data.timm_data
from pear_store import CheckpointError, Store, Task, make_task
from pear_store.local.sources import Access
from pear_train.data import DataOptions, Pixels, open_dataset, preprocess_record
from pear_train.errors import ConfigError
from router import Backbone, ImageError, Limits, Preprocess, Router, TaskError, decode, load_backbone, open_image
from router.infer import cli as infer_cli
from router.pictures import MAX_PIXELS, READING, READINGS, _InFlight, extensions, opened
from router.preprocess import Spent
from tests.helpers.jpegs import photograph, wide_profile
from tests.helpers.makers import record

Pixel = tuple[int, ...]
AVIF = pytest.param("AVIF", {}, marks=pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF"))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def one(image: bytes | Image.Image | NDArray[Any] | str | Path, x: int = 0, y: int = 0, **options: Any) -> Pixel:
    """One pixel of the picture as RGB."""
    found = open_image(image, **options).getpixel((x, y))
    assert isinstance(found, tuple)
    return found


def row(image: bytes | Image.Image | NDArray[Any], **options: Any) -> list[int]:
    """The red levels of a picture's first row."""
    found: list[int] = np.asarray(open_image(image, **options))[0, :, 0].tolist()
    return found


def png(depth: int, colour: int, raw: bytes, width: int, trns: bytes | None = None) -> bytes:
    """A PNG of one row, as Pillow does not write it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))
    key = b"" if trns is None else chunk(b"tRNS", trns)
    return b"\x89PNG\r\n\x1a\n" + head + key + chunk(b"IDAT", zlib.compress(b"\0" + raw)) + chunk(b"IEND", b"")


def noise(height: int = 20, width: int = 33, colours: int = 256) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, colours, (height, width, 3), dtype=np.uint8)


DEEP = np.array([[0, 255, 256, 257, 32768, 65280, 65535]], np.uint16)
SEEN = [0, 0, 1, 1, 128, 255, 255]
"""The upper 8 bits of DEEP."""


# ---- 8 bits and fewer -------------------------------------------------------------------------

LOSSLESS: dict[str, tuple[str, dict[str, Any]]] = {
    "png": ("PNG", {}),
    "tif": ("TIFF", {}),
    "lzw.tif": ("TIFF", {"compression": "tiff_lzw"}),
    "bmp": ("BMP", {}),
    "webp": ("WEBP", {"lossless": True}),
    "ppm": ("PPM", {}),
    "tga": ("TGA", {}),
    "sgi": ("SGI", {}),
    "pcx": ("PCX", {}),
    "dds": ("DDS", {}),
    "jp2": ("JPEG2000", {}),
}


@pytest.mark.parametrize("name", sorted(LOSSLESS))
def test_lossless_files_are_read_to_the_bit(name: str) -> None:
    kind, options = LOSSLESS[name]
    pixels = noise()
    assert np.array_equal(np.asarray(open_image(saved(Image.fromarray(pixels), kind, **options))), pixels)


def test_grey_bilevel_and_palette() -> None:
    grey = Image.fromarray(np.array([[0, 17, 128, 255]], np.uint8))
    for kind in ("PNG", "TIFF", "BMP", "PPM", "JPEG2000", "GIF"):
        assert row(saved(grey, kind)) == [0, 17, 128, 255]
    bilevel = Image.fromarray(np.array([[False, True]]))
    for kind, options in (("PNG", {}), ("TIFF", {}), ("TIFF", {"tiffinfo": {262: 0}}), ("BMP", {}), ("PPM", {})):
        assert row(saved(bilevel, kind, **options)) == [0, 255]
    palette = Image.fromarray(noise(4, 4, 7)).quantize(64)
    for kind in ("PNG", "TIFF", "BMP", "GIF"):
        assert np.array_equal(np.asarray(open_image(saved(palette, kind))), np.asarray(palette.convert("RGB")))
    assert row(png(2, 0, bytes([0b00011011]), 4)) == [0, 85, 170, 255]
    assert row(png(4, 0, bytes([0x0F]), 2)) == [0, 255]


def test_interlaced_png_and_progressive_jpeg_are_like_plain_ones() -> None:
    picture = Image.fromarray(noise(16, 16)).resize((64, 64))
    plain = open_image(saved(picture, "JPEG"))
    assert np.array_equal(np.asarray(open_image(saved(picture, "JPEG", progressive=True))), np.asarray(plain))
    seven = [  # the passes of Adam7 over 1 x 2 pixels: only the first and the sixth hold any
        struct.pack(">IIBBBBB", 2, 1, 8, 0, 0, 0, 1), zlib.compress(b"\0\x07\0\xf8")
    ]  # fmt: skip
    chunks = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", seven[0]), (b"IDAT", seven[1]), (b"IEND", b""))
    )
    assert row(b"\x89PNG\r\n\x1a\n" + chunks) == [0x07, 0xF8]


def test_a_wrong_ending_does_not_matter(tmp_path: Path) -> None:
    for name in ("a.jpg", "a", "a.txt", "a::b.png", "a b.PNG"):
        (tmp_path / name).write_bytes(saved(Image.new("RGB", (2, 2), (1, 2, 3)), "PNG"))
        assert one(tmp_path / name) == (1, 2, 3)
        assert one(str(tmp_path / name)) == (1, 2, 3)


# ---- deeper than 8 bits -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG2000"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_grey_of_16_bits_keeps_its_upper_8(kind: str, order: str) -> None:
    if (kind, order) != ("JPEG2000", ">u2"):  # which Pillow writes wrongly
        assert row(saved(Image.fromarray(DEEP.astype(order)), kind)) == SEEN
    assert row(Image.fromarray(DEEP.astype(order))) == SEEN
    assert row(saved(Image.fromarray(DEEP), kind), reading=0) == [0, 255, 255, 255, 255, 255, 255]  # what was wrong


def test_colour_of_16_bits_keeps_its_upper_8() -> None:
    raw = DEEP.astype(">u2")
    assert row(png(16, 2, np.repeat(raw, 3).tobytes(), 7)) == SEEN
    opaque = np.stack([raw, np.full_like(raw, 65535)], -1).astype(">u2").tobytes()
    assert row(png(16, 4, opaque, 7)) == SEEN
    assert row(b"P6 7 1 65535 " + np.repeat(raw, 3).tobytes()) == pytest.approx(SEEN, abs=1)  # Pillow rounds there
    assert row(b"P5 7 1 65535 " + raw.tobytes()) == SEEN
    assert row(b"P5 3 1 1023 " + struct.pack(">3H", 0, 512, 1023)) == [0, 128, 255]


def tiff(bits: int, data: bytes, width: int, photometric: int = 1, sample_format: int = 1) -> bytes:
    """A little-endian TIFF of one grey row."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: 1, 279: len(data)}
    tags[339] = sample_format
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, tags[tag]) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + data


def test_tiff_of_12_bits_and_of_white_is_zero() -> None:
    assert row(tiff(12, bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x00]), 3)) == [0, 128, 255]
    inverted = [255 - level for level in SEEN]
    assert row(tiff(16, DEEP.tobytes(), 7, photometric=0)) == inverted


def test_pixels_without_a_fixed_range_are_refused() -> None:
    floats, integers = Image.fromarray(np.ones((2, 2), np.float32)), Image.fromarray(np.ones((2, 2), np.int32))
    for image in (floats, saved(floats, "TIFF"), b"Pf 1 1 -1.0 " + struct.pack("<f", 0.5)):
        with pytest.raises(ImageError, match=r"floating-point pixels have no fixed range: scale them to 8 or 16 bits"):
            open_image(image)
    for image in (integers, saved(integers, "TIFF")):
        with pytest.raises(ImageError, match=r"integer pixels have no fixed range: scale them to 8 or 16 bits"):
            open_image(image)
    for data in (tiff(16, DEEP.tobytes(), 7, sample_format=2), tiff(8, b"\1\2", 2, sample_format=2)):
        with pytest.raises(ImageError, match=r"signed integer pixels have no fixed range"):
            open_image(data)
    with pytest.raises(ImageError, match=r"a TIFF of a kind that Pillow cannot read"):
        open_image(tiff(64, bytes(8), 1))


# ---- arrays -----------------------------------------------------------------------------------


def test_arrays() -> None:
    for shape in ((1, 7), (1, 7, 1)):
        assert row(DEEP.reshape(shape)) == SEEN
        assert row(DEEP.astype(">u2").reshape(shape)) == SEEN
        assert row((DEEP >> 8).astype(np.uint8).reshape(shape)) == SEEN
    assert one(np.full((2, 2, 3), 512, np.uint16)) == (2, 2, 2)
    assert one(np.array([[[255, 0, 0, 128]]], np.uint8)) == (255, 127, 127)
    assert one(np.asfortranarray(noise())[::-1, ::-1]) == tuple(noise()[-1, -1])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((2, 2, 3), np.nan, np.float32), r"array image float32 \[2, 2, 3\]: expected uint8 or uint16 .* scale"),
        (np.zeros((2, 2), np.int64), r"array image int64 \[2, 2\]: expected uint8 or uint16 \[h, w\]"),
        (np.zeros((2, 2), bool), r"array image bool \[2, 2\]: expected uint8 or uint16"),
        (np.zeros((3, 20, 20), np.uint8), r"array image uint8 \[3, 20, 20\]: expected uint8 or uint16"),
        (np.zeros((0, 2), np.uint8), r"array image uint8 \[0, 2\]: expected pixels"),
        (np.zeros((2, 2, 2, 2), np.uint8), r"array image uint8 \[2, 2, 2, 2\]: expected"),
    ],
)
def test_other_arrays_are_refused(array: NDArray[Any], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        open_image(array)
    with pytest.raises(ImageError, match=r"expected uint8 \[h, w\], \[h, w, 1\] or \[h, w, 3\]"):
        open_image(np.zeros((2, 2, 4), np.uint8), reading=0)


# ---- transparency -----------------------------------------------------------------------------

RED = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
RED.putpixel((0, 0), (255, 0, 0, 255))
RED.putpixel((1, 0), (255, 0, 0, 128))


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("TGA", {})])
def test_transparency_shows_white(kind: str, options: dict[str, Any]) -> None:
    data = saved(RED, kind, **options)
    assert [one(data), one(data, 1), one(data, 2)] == [(255, 0, 0), (255, 127, 127), (255, 255, 255)]
    grey = Image.new("LA", (4, 4), (0, 0))
    grey.putpixel((0, 0), (0, 255))
    if kind in ("PNG", "TIFF"):
        assert row(saved(grey, kind)) == [0, 255, 255, 255]


def test_modes_with_transparency_of_pil_images() -> None:
    premultiplied = RED.convert("RGBa")
    assert [one(premultiplied), one(premultiplied, 2)] == [(255, 0, 0), (255, 255, 255)]
    palette = RED.convert("PA")
    assert [one(palette), one(palette, 2)] == [(255, 0, 0), (255, 255, 255)]
    assert row(Image.new("LA", (2, 1), (0, 128))) == [127, 127]
    assert row(Image.new("LA", (2, 1), (0, 128)).convert("La")) == [127, 127]


def test_palettes_with_transparency() -> None:
    palette = Image.new("P", (3, 1))
    palette.putpalette([0, 0, 0, 200, 0, 0, 0, 0, 200])
    for x in range(3):
        palette.putpixel((x, 0), x)
    for data in (saved(palette, "PNG", transparency=1), saved(palette, "GIF", transparency=1)):
        assert [one(data, x) for x in range(3)] == [(0, 0, 0), (255, 255, 255), (0, 0, 200)]
    levels = saved(palette, "PNG", transparency=bytes([255, 0, 128]))
    assert [one(levels, x) for x in range(3)] == [(0, 0, 0), (255, 255, 255), (127, 127, 227)]


def test_one_transparent_colour_in_png() -> None:
    assert row(png(8, 0, bytes([1, 17]), 2, b"\0\1")) == [255, 17]
    assert row(png(4, 0, bytes([0x1F, 0x00]), 3, b"\0\1")) == [255, 255, 0]
    assert row(png(2, 0, bytes([0b00011011]), 4, b"\0\2")) == [0, 85, 255, 255]
    assert row(png(1, 0, bytes([0b01000000]), 2, b"\0\0")) == [0, 255]  # white on nothing: seen on black
    assert row(png(1, 0, bytes([0b01000000]), 2, b"\0\1")) == [0, 255]
    assert row(png(16, 0, DEEP.astype(">u2").tobytes(), 7, struct.pack(">H", 256))) == [0, 0, 255, 1, 128, 255, 255]
    assert row(png(8, 2, bytes([1, 2, 3, 1, 2, 4]), 2, struct.pack(">3H", 1, 2, 3))) == [255, 1]
    deep = struct.pack(">6H", 300, 300, 300, 60000, 0, 0)
    assert row(png(16, 2, deep, 2, struct.pack(">3H", 300, 300, 300))) == [255, 234]


@pytest.mark.parametrize("level", [0, 255])
def test_shapes_in_the_alpha_channel_are_seen_over_black_and_over_white(level: int) -> None:
    shape = Image.new("RGBA", (8, 8), (level, level, level, 0))
    shape.paste((level, level, level, 255), (0, 0, 4, 8))
    levels = row(saved(shape, "PNG"))
    assert levels == [level] * 4 + [255 - level] * 4
    assert one(Image.new("RGBA", (2, 2), (0, 0, 0, 0))) == (255, 255, 255)


# ---- which way up -----------------------------------------------------------------------------


def quarter() -> Image.Image:
    """16 x 8, black, its upper left quarter red."""
    image = Image.new("RGB", (16, 8))
    image.paste((255, 0, 0), (0, 0, 8, 4))
    return image


CORNERS = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "tr", 7: "br", 8: "bl"}


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {}), ("PNG", {}), ("TIFF", {}), ("WEBP", {}), AVIF])
@pytest.mark.parametrize("orientation", sorted(CORNERS))
def test_pictures_are_turned_upright(kind: str, options: dict[str, Any], orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "image"
    path.write_bytes(saved(quarter(), kind, exif=exif, **options))
    for image in (path, Image.open(path)):
        found = open_image(image)
        assert found.size == ((16, 8) if orientation < 5 else (8, 16))
        width, height = found.size
        x, y = {"t": 1, "b": height - 2}, {"l": 1, "r": width - 2}
        corners = {a + b: one(found, y[b], x[a])[0] > 128 for a in "tb" for b in "lr"}
        assert corners == {corner: corner == CORNERS[orientation] for corner in corners}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_exif_that_cannot_be_parsed_says_nothing() -> None:
    broken = saved(quarter(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert open_image(broken).size == (16, 8)


# ---- colours ----------------------------------------------------------------------------------


def test_cmyk_jpeg_is_not_inverted() -> None:
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    for image in (saved(cyan, "JPEG"), saved(cyan, "TIFF"), cyan):
        assert one(image) == pytest.approx((0, 255, 255), abs=3)
    dark = saved(Image.new("CMYK", (16, 16), (0, 0, 0, 200)), "JPEG")
    assert one(dark) == pytest.approx((55, 55, 55), abs=3)


def test_ycck_jpeg() -> None:
    """As Adobe's programs write it: inverted, with a transform of 2."""
    stored = Image.new("RGB", (16, 16), (255, 0, 0)).convert("YCbCr").split()
    full = Image.new("L", (16, 16), 255)
    data = saved(Image.merge("CMYK", [band.point(lambda v: 255 - v) for band in (*stored, full)]), "JPEG")
    at = data.index(b"Adobe")
    assert data[at + 11] == 0
    assert one(data[: at + 11] + b"\2" + data[at + 12 :]) == pytest.approx((0, 255, 255), abs=4)


def test_lab_and_ycbcr() -> None:
    red = Image.new("RGB", (8, 8), (200, 30, 40))
    for mode in ("LAB", "YCbCr", "HSV"):
        assert one(red.convert(mode)) == pytest.approx((200, 30, 40), abs=3)
    assert one(saved(red.convert("LAB"), "TIFF")) == pytest.approx((200, 30, 40), abs=3)


def test_colour_profiles_are_applied() -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    for kind in ("PNG", "TIFF", "JPEG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
        assert one(saved(red, kind, icc_profile=wide_profile(), **options)) == pytest.approx((0, 255, 0), abs=4)
    palette = red.convert("P")
    assert one(saved(palette, "PNG", icc_profile=wide_profile())) == pytest.approx((0, 255, 0), abs=4)
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    clear.putpixel((0, 0), (0, 0, 0, 0))
    data = saved(clear, "PNG", icc_profile=wide_profile())
    assert [one(data), one(data, 1)] == [(255, 255, 255), pytest.approx((0, 255, 0), abs=4)]


def test_srgb_profiles_change_no_bit() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(np.asarray(open_image(saved(Image.fromarray(noise()), "PNG", icc_profile=srgb))), noise())


@pytest.mark.parametrize("profile", [b"nonsense", b"\0" * 200, None])
def test_profiles_that_are_broken_or_of_other_colours_are_left_out(profile: bytes | None) -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    data = saved(Image.new("RGB", (8, 8), (255, 0, 0)), "PNG", icc_profile=profile or lab)
    assert one(data) == (255, 0, 0)
    assert row(saved(Image.fromarray(DEEP), "PNG", icc_profile=wide_profile())) == SEEN


# ---- several pictures in a file ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {}), ("MPO", {}), AVIF],
)
def test_the_first_picture_of_several_counts(kind: str, options: dict[str, Any]) -> None:
    first, second = Image.new("RGB", (8, 8), (250, 0, 0)), Image.new("RGB", (8, 8), (0, 250, 0))
    data = saved(first, kind, save_all=True, append_images=[second], **options)
    assert one(data) == pytest.approx((250, 0, 0), abs=3)
    moved = Image.open(io.BytesIO(data))
    assert getattr(moved, "n_frames", 1) == 2


# ---- what cannot be read ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}),
     ("BMP", {}), ("WEBP", {}), ("WEBP", {"lossless": True}), ("GIF", {}), ("PPM", {}), ("JPEG2000", {}), AVIF,
     ("TGA", {}), ("SGI", {}), ("PCX", {}), ("DDS", {})],
)  # fmt: skip
def test_files_that_are_cut_off_are_errors(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    picture = Image.fromarray(noise(64, 64))
    data = saved(picture.quantize(64) if kind == "GIF" else picture, kind, **options)
    path = tmp_path / "cut"
    for size in (len(data) // 2, len(data) * 3 // 4, 20):
        path.write_bytes(data[:size])
        with pytest.raises(ImageError, match=rf"^{path}: "):
            open_image(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer, not the file"),
        (b"", "an empty file"),
        (b"hello", "not an image that Pillow can read"),
        (b"<!DOCTYPE html><html>", "a web page, not an image"),
        (b"\xef\xbb\xbf<svg xmlns=", "an SVG drawing, not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a PostScript file, not an image"),
        (b"\0\0\1\0\1\0", "an icon, not an image"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file, not an image"),
    ],
)  # fmt: skip
def test_files_that_are_no_pictures_are_called_what_they_are(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=rf"^{path}: {message}"):
        open_image(path)


def test_heic(tmp_path: Path) -> None:
    path = tmp_path / "IMG_1.HEIC"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40))
    known = ".heic" in extensions()
    with pytest.raises(ImageError, match="cannot be read" if known else "a HEIC picture.* pip install pillow-heif"):
        open_image(path)


def test_a_camera_s_raw_file_is_not_read_as_its_thumbnail() -> None:
    with pytest.raises(ImageError, match=r"a camera's raw file \(DNG\)"):
        open_image(saved(quarter(), "TIFF", tiffinfo={50706: bytes([1, 4, 0, 0])}))


def test_pipes_devices_sockets_and_folders_are_errors_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.png"))
    (tmp_path / "link.png").symlink_to("pipe.png")
    paths = [*(tmp_path / f"{name}.png" for name in ("pipe", "folder", "socket", "link")), Path("/dev/zero")]
    names = ("a pipe", "a directory", "a socket", "a pipe", "a device")
    found: list[Any] = []
    thread = threading.Thread(
        target=lambda: found.extend(decode([str(p) for p in paths], [way()] * len(paths))), daemon=True
    )
    thread.start()
    thread.join(60)
    assert [str(error) for error in found] == [f"{p}: {n}: expected a file" for p, n in zip(paths, names, strict=True)]


def test_paths_outside_of_a_root_and_chains_of_urls_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("out.png", "in/a.png"):
        (tmp_path / name).write_bytes(saved(quarter(), "PNG"))
    limits = Limits(access=Access(root=tmp_path / "in"))
    assert open_image("a.png", limits=limits).size == (16, 8)
    for path in ("../out.png", str(tmp_path / "out.png"), "memory://x.png"):
        with pytest.raises(ImageError, match="only files below"):
            open_image(path, limits=limits)
    for url in ("reference://a::data:,{}", "simplecache::memory://a", "zip://a::memory://b"):
        with pytest.raises(ImageError, match="is not opened unless allowed"):
            open_image(url)


# ---- sizes ------------------------------------------------------------------------------------


def way(size: int = 48, reading: int | None = READING, **changes: Any) -> Preprocess:
    limits = changes.pop("limits", Limits())
    made = {**record()["preprocess"], "input_size": [3, size, size], **changes}
    return Preprocess(made if reading is None else {**made, "reading": reading}, limits)


@pytest.mark.parametrize("mode", ["squash", "center", "border"])
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (30, 600), (600, 30)])
def test_tiny_and_long_pictures(mode: str, size: tuple[int, int]) -> None:
    pixels = way(crop_mode=mode).pixels(Image.new("RGB", size, (9, 9, 9)))
    assert pixels.shape == (3, 48, 48)
    assert mode == "border" or pixels[0, 24, 24] == 9  # whose centre is the line between its two middle pixels


def test_pictures_too_long_to_keep_their_proportions_are_refused() -> None:
    for size in ((1, 30_000), (30_000, 1)):
        assert way().pixels(Image.new("RGB", size)).shape == (3, 48, 48)
        for mode in ("center", "border"):
            with pytest.raises(ImageError, match="pixels are too long to resize, because this task keeps proportions"):
                way(crop_mode=mode).pixels(Image.new("RGB", size))


def bomb(side: int, path: Path) -> Path:
    """A small PNG of side x side black pixels, or of what claims to be."""
    path.write_bytes(png(1, 0, b"", 1).replace(struct.pack(">II", 1, 1), struct.pack(">II", side, side)))
    data = bytearray(path.read_bytes())
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    path.write_bytes(bytes(data))
    return path


def test_large_pictures_are_refused_before_decoding_with_the_remedy(tmp_path: Path) -> None:
    path = bomb(13_000, tmp_path / "a.png")
    with pytest.raises(
        ImageError, match=rf"^{path}: 13000 x 13000 pixels, the limit is {MAX_PIXELS}: .*--max-pixels\) to at least"
    ):
        open_image(path)
    with pytest.raises(ImageError, match=r"set max_pixels \(--max-pixels\) to at least 169000000"):
        open_image(path, reading=0)
    small = Limits(max_pixels=100)
    assert open_image(np.zeros((10, 10), np.uint8), limits=small).size == (10, 10)
    for image in (quarter(), np.zeros((10, 11), np.uint8), saved(quarter(), "GIF")):
        with pytest.raises(ImageError, match="the limit is 100"):
            open_image(image, limits=small)
    with pytest.raises(ImageError, match="max_pixels 0: expected at least 1"):
        Limits(0)


def test_asking_for_large_pictures_is_enough(tmp_path: Path) -> None:
    """Pillow has a limit of its own, 179 million, which must not stand in the way."""
    path = bomb(15_000, tmp_path / "a.png")
    with opened(str(path), Limits(max_pixels=15_000**2)) as picture:
        assert picture.size == (15_000, 15_000)
    expected = "cannot be read: image file is truncated.*; copy or download the file again"
    with pytest.raises(ImageError, match=expected):  # its pixels are not there
        open_image(path, limits=Limits(max_pixels=15_000**2))


def test_pixels_in_flight_are_bounded_and_no_one_waits_for_ever() -> None:
    flight, lock = _InFlight(100), threading.Lock()
    now, peak = [0], [0]

    def work(pixels: int) -> None:
        with flight.hold(pixels):
            with lock:
                now[0] += pixels
                peak[0] = max(peak[0], now[0])
            threading.Event().wait(0.001)
            with lock:
                assert now[0] <= 100 or now[0] == pixels
                now[0] -= pixels

    with ThreadPoolExecutor(16) as workers:
        list(workers.map(work, [40, 500, 60, 30, 100, 1, 99, 250, 10] * 20))
    assert now == [0]
    assert peak == [500]


@pytest.mark.slow
def test_memory_of_large_pictures_is_bounded(tmp_path: Path) -> None:
    """Pictures of 30 megapixels, whose 170 MB each would add up, were they decoded at once; in a process of its own."""
    for i in range(5):
        Image.new("1", (6000, 5000), i % 2).save(tmp_path / f"{i}.png")
    code = f"""
import resource, sys
from router import Preprocess, decode
from tests.helpers.jpegs import photograph, wide_profile
from tests.helpers.makers import record
from router.infer import cli as infer_cli
import router.pictures
router.pictures.PIXELS_IN_FLIGHT = 40_000_000
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
way = Preprocess({{**record()["preprocess"], "reading": 1}})
found = decode([f"{tmp_path}/{{i}}.png" for i in range(5)], [way] * 5)
assert [int(pixels.max()) for pixels in found] == [0, 255, 0, 255, 0], found
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}  # what is freed goes back at once
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=True
    )
    assert int(done.stdout) < 400_000, "KiB"


# ---- a stored task keeps its answers ----------------------------------------------------------


def test_records_without_the_key_are_read_as_they_were() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    images = [saved(RED, "PNG"), saved(quarter(), "JPEG", exif=turned), saved(Image.fromarray(DEEP), "PNG")]
    for data in images:
        plain = Image.open(io.BytesIO(data)).convert("RGB")
        old = way(reading=None)
        assert torch.equal(old.pixels(data), old.pixels(plain))
        assert np.array_equal(np.asarray(open_image(data, reading=0)), np.asarray(plain))
        assert not torch.equal(way().pixels(data), old.pixels(data))
        assert way().key != old.key == way(reading=0).key
        new_pixels, old_pixels = decode([data, data], [way(), old])  # opened once
        assert isinstance(new_pixels, torch.Tensor)
        assert isinstance(old_pixels, torch.Tensor)
        assert torch.equal(new_pixels, way().pixels(data))
        assert torch.equal(old_pixels, old.pixels(data))


def test_an_unknown_rule_is_refused_by_the_router_and_kept_by_the_store(
    store: Store, backbone: Backbone, task_maker: Callable[..., Task]
) -> None:
    store.add(read_by(task_maker("new"), 7))
    assert store.get("new").preprocess["reading"] == 7
    router = Router(backbone, store)
    with pytest.raises(
        TaskError, match=r"'new': field 'preprocess', 'reading': expected 0 or 1 or 2, found 7: use a newer"
    ):
        router.run([quarter()], "new")
    with pytest.raises(TaskError, match=r"'other': field 'preprocess', 'reading': expected 0 or 1 or 2, found 7"):
        router.add(read_by(task_maker("other"), 7))
    for wrong in (True, -1, 1.0, "1", None):
        with pytest.raises(CheckpointError, match="'reading': expected an integer of at least 0"):
            read_by(task_maker("wrong"), wrong)


# ---- through the router and the trainer -------------------------------------------------------


def read_by(task: Task, reading: Any) -> Task:
    changed = {**task.record, "preprocess": {**task.record["preprocess"], "reading": reading}}
    return make_task(changed, dict(task.tensors))


@pytest.fixture
def logits(backbone: Backbone, task_maker: Callable[..., Task]) -> Callable[..., torch.Tensor]:
    """Of some images, by a task that reads by the new rule, or by another."""
    router = Router(backbone)
    for reading in READINGS:
        router.add(read_by(task_maker(f"task{reading}"), reading))

    def run(*images: Any, reading: int = READING) -> torch.Tensor:
        found = router.run(list(images), f"task{reading}").logits
        assert isinstance(found, torch.Tensor)
        return found

    return run


def check_alike(images: list[Any], logits: Callable[..., torch.Tensor]) -> None:
    """That images give the same pixels, and so the same logits; to rounding, for rows of a batch may differ in that."""
    way = Preprocess({**record()["preprocess"], "reading": READING})
    first, *others = (way.pixels(image) for image in images)
    assert all(torch.equal(pixels, first) for pixels in others)
    found = logits(*images)
    torch.testing.assert_close(found, found[:1].expand_as(found), atol=1e-4, rtol=1e-5)


def test_one_picture_in_lossless_formats_gives_the_same_logits(
    logits: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    pixels = noise(40, 30)
    images: list[Any] = [pixels, pixels.astype(np.uint16) * 257, Image.fromarray(pixels)]
    for name, (kind, options) in LOSSLESS.items():
        path = tmp_path / f"a.{name}"
        path.write_bytes(saved(Image.fromarray(pixels), kind, **options))
        images.append(str(path))
    images.append(saved(Image.fromarray(np.dstack([pixels, np.full((40, 30), 255, np.uint8)])), "PNG"))
    check_alike(images, logits)
    grey = np.random.default_rng(1).integers(0, 65536, (30, 40), dtype=np.uint16)
    images = [grey, (grey >> 8).astype(np.uint8), np.repeat(grey[:, :, np.newaxis], 3, 2)]
    for kind in ("PNG", "TIFF", "JPEG2000"):
        images += [saved(Image.fromarray(grey), kind), saved(Image.fromarray((grey >> 8).astype(np.uint8)), kind)]
    images.append(saved(Image.fromarray((grey >> 8).astype(np.uint8)), "GIF"))
    check_alike(images, logits)


def deep_files(folder: Path) -> list[str]:
    """Pictures whose grey levels are all above 255: 16-bit PNG and TIFF, light from the left or from the right."""
    paths = []
    for i in range(8):
        levels = np.linspace(1000, 60_000, 32).astype(np.uint16)
        picture = np.tile(levels[:: 1 if i % 2 else -1], (32, 1)) + np.uint16(50 * i)
        path = folder / ("right" if i % 2 else "left") / f"{i}.{'png' if i < 4 else 'tif'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
        paths.append(str(path))
    return paths


def test_pictures_of_16_bits_differ(logits: Callable[..., torch.Tensor], tmp_path: Path) -> None:
    paths = deep_files(tmp_path)
    found, wrong = logits(*paths), logits(*paths, reading=0)
    assert len({tuple(values) for values in found.tolist()}) == 8
    assert len({tuple(values) for values in wrong.tolist()}) == 1
    data = open_dataset(str(tmp_path))
    pixels = Pixels(data.train, way())
    assert len({bytes(p.numpy().tobytes()) for p in pixels.images(torch.arange(len(data.train)))}) == len(data.train)


def test_a_turned_picture_is_the_upright_one(logits: Callable[..., torch.Tensor], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright, turned = (
        Image.fromarray(noise(40, 30)),
        Image.fromarray(noise(40, 30)).transpose(Image.Transpose.ROTATE_90),
    )
    for i in range(6):
        upright.save(tmp_path / f"u{i}.png")
        folder = tmp_path / "data" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        turned.save(folder / f"{i}.png", exif=exif)
    path = tmp_path / "data" / "a" / "0.png"
    found = logits(tmp_path / "u0.png", path, Image.open(path))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    old = logits(tmp_path / "u0.png", path, reading=0)
    assert not torch.equal(old[0], old[1])
    data = open_dataset(str(tmp_path / "data"))
    loaded = Pixels(data.train, way()).images(torch.tensor([0]))
    assert torch.equal(loaded, way()([upright]))


def test_shapes_in_alpha_reach_the_router_and_the_trainer(logits: Callable[..., torch.Tensor], tmp_path: Path) -> None:
    for i in range(6):
        alpha = np.zeros((32, 32), np.uint8)
        alpha[:, 16 * (i % 2) : 16 * (i % 2) + 12 + i // 2] = 255
        folder = tmp_path / ("left", "right")[i % 2]
        folder.mkdir(exist_ok=True)
        Image.merge("LA", (Image.new("L", (32, 32)), Image.fromarray(alpha))).save(folder / f"{i}.png")
    paths = sorted(map(str, tmp_path.rglob("*.png")))
    assert len({tuple(values) for values in logits(*paths).tolist()}) == 6
    assert len({tuple(values) for values in logits(*paths, reading=0).tolist()}) == 1
    data = open_dataset(str(tmp_path))
    pixels = Pixels(data.train, way()).images(torch.arange(len(data.train)))
    assert len({bytes(p.numpy().tobytes()) for p in pixels}) == len(data.train)


def test_a_router_has_a_limit_of_its_own(backbone: Backbone, task_maker: Callable[..., Task], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(saved(quarter(), "PNG"))
    router = Router(backbone, max_pixels=100, access=Access(root=tmp_path))
    router.add(task_maker("task"))
    with pytest.raises(ImageError, match="the limit is 100: .* set max_pixels"):
        router.run(["a.png"], "task")
    with pytest.raises(ImageError, match="only files below"):
        router.run(["../a.png"], "task")


def test_the_commands_take_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "data"
    for name in "ab":
        (path / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(noise(8, 8)).save(path / name / f"{i}.png")
    data = open_dataset(str(path), options=DataOptions(max_pixels=63))
    with pytest.raises(ImageError, match=r"8 x 8 pixels, the limit is 63: .*--max-pixels"):
        Preprocess(preprocess_record(load_backbone("pear_tiny"), None), data.limits).pixels(data.train.image(0))
    with pytest.raises(ConfigError, match="max pixels 0"):
        DataOptions(max_pixels=0)
    for command in (pear_train.cli.main, infer_cli.main):
        assert "--max-pixels" in {name for option in command.params for name in option.opts}


def test_data_sets_of_timm_are_read_by_the_rule_and_never_one_picture_for_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """timm converts to RGB by itself, and gives the next picture for one that cannot be read."""
    files = [saved(Image.fromarray(DEEP), "PNG"), b"broken"] * 6

    class Reader:
        def __init__(self) -> None:
            self.class_to_idx = {"a": 0, "b": 1}
            self.samples = [(str(i), i % 2) for i in range(12)]

        def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
            return io.BytesIO(files[index]), index % 2

        def __len__(self) -> int:
            return 12

    made: Any = ImageDataset
    monkeypatch.setattr(
        pear_train.data.timm_data,
        "create_dataset",
        lambda *_, input_img_mode, **__: made("", reader=Reader(), input_img_mode=input_img_mode),
    )
    data = open_dataset("hfds/some/thing", tmp_path)
    for i in range(len(data.train)):
        image: Any = data.train.image(i)
        if data.train.targets[i] == 0:
            assert row(image) == SEEN
        else:
            with pytest.raises(ImageError, match="not an image"):
                open_image(image)


def test_what_is_trained_says_how_its_pictures_were_read(backbone: Backbone) -> None:
    assert preprocess_record(backbone, None)["reading"] == READING == 2


# ---- rule 2: large JPEGs are decoded at a part of their size ------------------------------------


@pytest.mark.parametrize(
    ("size", "needed", "shrunk"),
    [
        ((1600, 1200), 64, (200, 150)),
        ((1600, 1200), 96, (400, 300)),
        ((1600, 1200), 224, (800, 600)),
        ((640, 480), 224, (640, 480)),
        ((512, 100), 48, (512, 100)),
        ((1025, 513), 64, (257, 129)),
    ],
)
def test_a_large_jpeg_keeps_twice_the_pixels_that_are_needed(
    size: tuple[int, int], needed: int, shrunk: tuple[int, int]
) -> None:
    with opened(photograph(*size)) as picture:
        assert picture.rgb(2, needed).size == shrunk and min(shrunk) >= min(2 * needed, *size)
        assert picture.rgb(1, needed).size == picture.rgb(2).size == size, "by rule 1, or to be looked at, whole"
        assert picture.rgb(2, needed).size == shrunk


@pytest.mark.parametrize("saving", [{}, {"progressive": True}, {"subsampling": 0}])
def test_what_a_task_sees_hardly_changes(saving: dict[str, Any]) -> None:
    data = photograph(1600, 1200, **saving)
    whole, part = (way(64, reading).pixels(data).int() for reading in (1, 2))
    moved = (whole - part).abs().float()
    assert 0 < float(moved.mean()) < 1 and float(moved.max()) < 16


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(200, 120), (97, 64), (1600, 1200), (64, 64)])
def test_torch_makes_pictures_smaller_as_pillow_does(size: tuple[int, int], interpolation: str) -> None:
    lossless = saved(Image.open(io.BytesIO(photograph(*size))), "PNG")
    one, two = (way(64, reading, interpolation=interpolation).pixels(lossless).int() for reading in (1, 2))
    assert int((one - two).abs().max()) <= 1 and float((one - two).abs().float().mean()) < 0.02


@pytest.mark.parametrize("changes", [{"crop_mode": "center"}, {"crop_mode": "border"}, {"interpolation": "lanczos"}])
def test_what_torch_cannot_do_alike_is_done_by_pillow(changes: dict[str, Any]) -> None:
    data = saved(Image.open(io.BytesIO(photograph(200, 120))), "PNG")
    assert torch.equal(way(64, 1, **changes).pixels(data), way(64, 2, **changes).pixels(data))
    small = saved(Image.open(io.BytesIO(photograph(60, 200))), "PNG")
    assert torch.equal(way(64, 1).pixels(small), way(64, 2).pixels(small)), "a side is enlarged"
    assert way(64, 2, crop_pct=0.875).pixels(data).shape == (3, 64, 64)


def test_a_shrunk_jpeg_is_the_same_from_a_path_bytes_and_a_file_and_beside_other_tasks(tmp_path: Path) -> None:
    data = photograph(1600, 1200)
    (tmp_path / "a.jpg").write_bytes(data)
    alone = {size: way(size).pixels(data) for size in (48, 96)}
    with open(tmp_path / "a.jpg", "rb") as file:
        for image in (tmp_path / "a.jpg", file):
            assert torch.equal(way(48).pixels(image), alone[48])
    ways = [way(96), way(48), way(48, 1), way(96)]
    found = decode([data] * 4, ways)  # opened once
    assert all(isinstance(pixels, torch.Tensor) for pixels in found)
    for pixels, expected in zip(found, (alone[96], alone[48], way(48, 1).pixels(data), alone[96]), strict=True):
        assert isinstance(pixels, torch.Tensor) and torch.equal(pixels, expected)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_shrunk_jpeg_is_upright_and_in_srgb(orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = photograph(1600, 1200, exif=exif)
    whole, part = (way(64, reading).pixels(data).int() for reading in (1, 2))
    assert float((whole - part).abs().float().mean()) < 1
    with opened(data) as picture:
        assert picture.rgb(2, 96).size == ((300, 400) if orientation in (6, 8) else (400, 300))


def test_a_large_jpeg_that_is_cut_off_or_too_large_is_refused_as_ever() -> None:
    data = photograph(1600, 1200)
    with pytest.raises(ImageError, match="cannot be read"):
        way(48).pixels(data[: len(data) // 2])
    with pytest.raises(ImageError, match="pixels"):
        way(48, limits=Limits(max_pixels=1600 * 1200 - 1)).pixels(data)


def test_where_time_goes_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(photograph(1600, 1200))
    spent = Spent()
    decode([tmp_path / "a.jpg", tmp_path / "none.jpg"], [way(), way()], spent)
    assert 0 < spent.read_s < spent.decode_s
    without = decode([tmp_path / "a.jpg"], [way()])[0]
    timed = decode([tmp_path / "a.jpg"], [way()], spent)[0]
    assert isinstance(without, torch.Tensor) and isinstance(timed, torch.Tensor) and torch.equal(without, timed)
