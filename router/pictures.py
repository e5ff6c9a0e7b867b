"""Makes an RGB picture of any kind of image. docs/pictures.md says what happens to each kind.

A task's record says by which rule its training pictures were read (`preprocess`, key `reading`). The same rule is used
to serve it:

    0   Pillow's convert("RGB"), as timm and torchvision read; for records without the key
    1   upright, all of a 16-bit range, transparency on white, colours in sRGB
    2   as 1, but faster: a JPEG much larger than needed is decoded at a half, a quarter or an eighth of its size, and
        torch makes pictures smaller (router/preprocess.py)

A JpegDecoder may take plain JPEGs that are read by rule 2 (router/jpegs.py).
"""

import os
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, lru_cache
from io import BufferedIOBase, BytesIO
from os import PathLike, fspath
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageChops, ImageCms, features
from PIL.JpegImagePlugin import JpegImageFile

from pear_store.errors import PearStoreError
from pear_store.files import LFS_POINTER, is_lfs_pointer
from pear_store.local.sources import Access, open_source
from router.errors import ImageError, RouterError, TooManyPixelsError

with suppress(ImportError):  # with this package installed, HEIC can be read
    import pillow_heif

    pillow_heif.register_heif_opener()

ImageLike = Image.Image | NDArray[Any] | str | PathLike[str] | bytes | BinaryIO
"""A PIL image; a uint8 or uint16 array [h, w], [h, w, 1], [h, w, 3] or [h, w, 4]; a path or URL; a file's bytes; or a
file that is open for reading bytes, which is read from its start."""

READINGS = (0, 1, 2)
"""The rules that this Pear knows."""
READING = 2
"""The rule for new tasks."""
SPARE = 2
"""By rule 2, the shorter side of a decoded JPEG keeps at least this many times the needed pixels."""

MAX_PIXELS = 80_000_000
"""Larger pictures are refused by default, because a file of 200 KB can hold more. Decoded, this many pixels take up to
1 GB. The limit is below Pillow's own of 89 million."""
PIXELS_IN_FLIGHT = max(128_000_000, 16_000_000 * (os.cpu_count() or 1))
"""Most pixels of all pictures that are decoded at the same time, unless there is only one picture."""

METADATA = 1_000_000
"""A file that is larger than its pixels by more bytes than this is not a plain JPEG."""
JPEG_BYTES = 16_000_000
"""Nor is one of more bytes than this, because many of them may wait in memory."""

_FORMATS = (
    "JPEG", "PNG", "BMP", "DIB", "GIF", "PPM", "TIFF", "WEBP", "JPEG2000", "AVIF", "HEIF", "MPO", "DDS", "PSD", "QOI",
    "SGI", "SUN", "PCX", "TGA",
)  # fmt: skip
"""Pillow's formats that are read. Others run a program (EPS), decode before their size can be checked (icons), or are
not pictures (HDF5, MPEG)."""


@dataclass(frozen=True)
class Limits:
    """Limits for opening pictures.

    Raises:
        ImageError: `max_pixels` is below 1.
    """

    max_pixels: int = MAX_PIXELS
    """Most pixels (width times height). Larger pictures are refused before they are decoded."""
    access: Access = field(default_factory=Access)
    """Which paths and URLs may be opened."""

    def __post_init__(self) -> None:
        if self.max_pixels < 1:
            raise ImageError(f"max_pixels {self.max_pixels}: expected at least 1")


LIMITS = Limits()
"""The default limits."""


@dataclass(frozen=True)
class PlainJpeg:
    """A JPEG file that a decoder without colour profiles can read: whole, grey or YCbCr of 8 bits, in sRGB."""

    name: str
    data: bytes
    size: tuple[int, int]
    """Height and width, as they are stored."""
    turn: Image.Transpose | None
    """The transposition that makes the picture upright."""


def shrink_factor(size: tuple[int, int], needed: int) -> int:
    """The factor by which rule 2 shrinks a JPEG while it is decoded: 8, 4, 2, or 1 for none.

    Args:
        size: of the JPEG.
        needed: pixels of the longer side to which it will be resized.
    """
    return next((factor for factor in (8, 4, 2) if min(size) >= SPARE * needed * factor), 1)


class Picture:
    """A picture whose header has been read. The first call of :meth:`rgb` decodes its pixels."""

    def __init__(self, name: str, source: Image.Image | NDArray[Any], file: BinaryIO | None = None) -> None:
        self.name = name
        self._source, self._file = source, file
        height, width = source.shape[:2] if isinstance(source, np.ndarray) else source.size[::-1]
        self.size: tuple[int, int] = (height, width)
        self._read: dict[tuple[int, int], Image.Image] = {}

    def rgb(self, reading: int, needed: int | None = None) -> Image.Image:
        """The picture in mode RGB. Do not change it: it is kept for the next call.

        Args:
            reading: one of READINGS.
            needed: pixels of the longer side to which it will be resized; None: it keeps its size.
        Raises:
            ImageError: it cannot be decoded, or has pixels that this rule refuses.
        """
        shrunk = 1 if reading < 2 or needed is None else self._shrinks(needed)
        key = reading, shrunk
        if key not in self._read:
            with errors_named(self.name):
                source = self._source if shrunk == 1 else self._shrunk(shrunk)
                if isinstance(source, np.ndarray):
                    source = _from_array(source, self.name, reading)
                self._read[key] = source.convert("RGB") if reading == 0 else _rgb(source, self.name)
        return self._read[key]

    def _shrinks(self, needed: int) -> int:
        """The factor by which a JPEG can be shrunk while it is decoded: 8, 4, 2, or 1 for none."""
        source = self._source
        if self._file is None or not isinstance(source, Image.Image) or source.format not in ("JPEG", "MPO"):
            return 1
        return shrink_factor(self.size, needed)

    def plain_jpeg(self) -> PlainJpeg | None:
        """The file, if it is a JPEG of the usual kind. None for all others, and if that cannot be told."""
        image, (height, width) = self._source, self.size
        if self._file is None or not isinstance(image, JpegImageFile) or image.format != "JPEG":
            return None  # an MPO has several pictures
        if not _is_grey_or_ycbcr(image):
            return None
        try:
            profile: bytes = image.info.get("icc_profile") or b""
            if profile and _transform(profile, image.mode) is not None:
                return None
            self._file.seek(0)
            data = self._file.read(min(3 * height * width + METADATA, JPEG_BYTES))
        except Exception:  # Pillow will meet it again and say what it is
            return None
        whole = data.endswith(b"\xff\xd9")  # else it is cut off, or something follows: Pillow knows what to do
        return PlainJpeg(self.name, data, self.size, _orientation(image)) if whole else None

    def _shrunk(self, factor: int) -> Image.Image:
        """The file opened anew, to be decoded at 1 / factor of its size. An earlier result may have another size."""
        assert self._file is not None
        image = _open_file(self._file, self.name)
        width, height = image.size
        image.draft(None, (width // factor, height // factor))
        return image

    def forget(self) -> None:
        """Frees the pixels, even if something still refers to this picture."""
        self._read.clear()
        del self._source, self._file


@contextmanager
def opened(
    image: ImageLike, limits: Limits = LIMITS, clock: "Clock | None" = None, name: str | None = None
) -> Iterator[Picture]:
    """Opens a picture and reads its header. While it is open, its pixels count towards PIXELS_IN_FLIGHT.

    Args:
        clock: measures the time that reading takes until the picture is closed.
        name: what errors call it; None: its path, or what kind of object it is.
    Raises:
        ImageError: it is not a picture, cannot be read, or is larger than `limits` allow.
    """
    name = _name(image) if name is None else name
    with ExitStack() as files:
        with errors_named(name):
            picture = Picture(name, *_source(image, name, limits, files, clock))
            _check_size(picture, limits)
        with _in_flight().hold(picture.size[0] * picture.size[1]):
            try:
                yield picture
            finally:
                picture.forget()


class Clock:
    """Adds up the time of reading a file: of its opening, and of each read by a decoder."""

    def __init__(self) -> None:
        self.read_s = 0.0

    @contextmanager
    def reading(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.read_s += time.perf_counter() - began


class _Timed(BufferedIOBase):
    """A file whose reads are timed."""

    def __init__(self, file: BinaryIO, clock: Clock) -> None:
        self._file, self._clock = file, clock

    def read(self, size: int | None = -1, /) -> bytes:
        with self._clock.reading():
            return self._file.read(-1 if size is None else size)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def open_image(image: ImageLike, *, reading: int = READING, limits: Limits = LIMITS) -> Image.Image:
    """Reads any kind of image as an RGB PIL image.

    Args:
        image: a PIL image, an array, a path, a URL, a file's bytes or an open file.
        reading: the rule for reading: 2, or 0 or 1 for tasks that were trained with these (docs/pictures.md).
        limits: most pixels, and which paths and URLs may be opened.
    Raises:
        ImageError: it is not an image, cannot be read, or is larger than `limits` allow.
    """
    with opened(image, limits) as picture:
        return picture.rgb(reading)


def check_reading(preprocess: Mapping[str, Any]) -> int:
    """The rule by which a task's pictures are read.

    Args:
        preprocess: of a task's record.
    Raises:
        RouterError: this Pear does not know the rule.
    """
    reading: int = preprocess.get("reading", 0)
    if reading not in READINGS:
        known = " or ".join(map(str, READINGS))
        raise RouterError(f"field 'preprocess', 'reading': expected {known}, found {reading!r}: use a newer Pear")
    return reading


@cache
def extensions() -> frozenset[str]:
    """The endings of picture files, in lower case with the dot."""
    return frozenset(ext for ext, kind in Image.registered_extensions().items() if kind in _formats())


@contextmanager
def errors_named(name: str) -> Iterator[None]:
    """Turns every error of Pillow or a file system into an ImageError that names the picture."""
    try:
        yield
    except ImageError:
        raise
    except PearStoreError as error:
        raise ImageError(str(error)) from None
    except Exception as error:  # a decoder of Pillow can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        cut_off = "; copy or download the file again" if "truncated" in reason.lower() else ""
        raise ImageError(f"{name}: cannot be read: {reason}{cut_off}") from None


# ---- from any image to a PIL image or an array ------------------------------------------------


def _name(image: object) -> str:
    if isinstance(image, Image.Image):
        return f"image {getattr(image, 'filename', '') or image!r}"
    if isinstance(image, np.ndarray):
        return f"array image {image.dtype} {list(image.shape)}"
    if isinstance(image, bytes):
        return f"image of {len(image)} bytes"
    if hasattr(image, "read"):
        return f"image of file {str(getattr(image, 'name', '') or image)!r:.200}"
    return fspath(image) if isinstance(image, str | PathLike) else f"image of type {type(image).__name__}"


def _source(
    image: ImageLike, name: str, limits: Limits, files: ExitStack, clock: Clock | None
) -> tuple[Image.Image | NDArray[Any], BinaryIO | None]:
    """The PIL image or array to decode, and its file if it has one."""
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ImageError(f"{name}: expected pixels, found an empty image")
        return image, None
    if isinstance(image, np.ndarray):
        if image.ndim not in (2, 3):
            raise ImageError(f"{name}: {_ARRAYS}")
        if 0 in image.shape:
            raise ImageError(f"{name}: expected pixels, found an empty image")
        return image, None
    if not isinstance(image, str | PathLike | bytes) and hasattr(image, "read"):
        image = _bytes_of(image, name)
    file: BinaryIO
    if isinstance(image, bytes):
        file = BytesIO(image)
        return _open_file(file, name), file
    if not isinstance(image, str | PathLike):
        raise ImageError(f"{name}: expected a PIL image, an array, a path, a file's bytes, or an open file")
    path = image if isinstance(image, str) else Path(fspath(image))
    if clock is None:
        file = files.enter_context(open_source(path, limits.access))
    else:
        with clock.reading():
            file = cast(BinaryIO, _Timed(files.enter_context(open_source(path, limits.access)), clock))
    return _open_file(file, name), file


def _bytes_of(file: BinaryIO, name: str) -> bytes:
    if file.seekable():
        file.seek(0)
    found = file.read()
    if not isinstance(found, bytes):
        raise ImageError(f"{name}: expected a file of bytes, found one of {type(found).__name__}: open it with 'rb'")
    return found


def _open_file(file: BinaryIO, name: str) -> Image.Image:
    file.seek(0)
    start = file.read(16)
    for kind in _formats():  # like Image.open, but that checks its own limit of pixels
        factory, accepts = Image.OPEN[kind]
        with suppress(SyntaxError, IndexError, TypeError, struct.error):  # it is not of this kind after all
            if accepts is None or accepts(start) is True:
                file.seek(0)
                return factory(file, "")
    file.seek(0)
    raise ImageError(f"{name}: {_what(file.read(1024))}")


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _what(start: bytes) -> str:
    """Describes a file that Pillow cannot read, by its first bytes."""
    if is_lfs_pointer(start):
        return LFS_POINTER
    if not start:
        return "an empty file"
    if start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"):
        return "a HEIC picture, which Pillow does not read by itself: pip install pillow-heif, or convert it"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for prefix, what in _OTHERS:
        if text.startswith(prefix):
            return f"{what}, not an image that Pillow can read"
    if start[:4] in (b"II*\0", b"MM\0*"):
        return "a TIFF of a kind that Pillow cannot read, such as 32 bits for each of several channels: convert it"
    return "not an image that Pillow can read"


_OTHERS = (
    (b"<!doctype html", "a web page"),
    (b"<html", "a web page"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "an XML file"),
    (b"%pdf", "a PDF file"),
    (b"%!ps", "a PostScript file"),
    (b"\0\0\1\0", "an icon"),
    (b"icns", "an icon"),
    (b"\x89hdf", "an HDF5 file"),
)


def _check_size(picture: Picture, limits: Limits) -> None:
    height, width = picture.size
    if height * width > limits.max_pixels:
        raise TooManyPixelsError(picture.name, width, height, limits.max_pixels)


class _InFlight:
    """Bounds the memory of pictures that are decoded at the same time."""

    def __init__(self, most: int) -> None:
        self._most, self._pixels = most, 0
        self._turn, self._freed = threading.Lock(), threading.Condition()

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        with self._turn, self._freed:  # in turn, so that small pictures cannot overtake a large one for ever
            self._freed.wait_for(lambda: self._pixels == 0 or self._pixels + pixels <= self._most)
            self._pixels += pixels
        try:
            yield
        finally:
            with self._freed:
                self._pixels -= pixels
                self._freed.notify_all()


@cache
def _in_flight() -> _InFlight:
    return _InFlight(PIXELS_IN_FLIGHT)


os.register_at_fork(after_in_child=_in_flight.cache_clear)  # a child does not decode its parent's pictures


# ---- rules 1 and 2 -----------------------------------------------------------------------------------

_ARRAYS = "expected uint8 or uint16 [h, w], [h, w, 1], [h, w, 3] or [h, w, 4]"
_TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> the transposition that makes the picture upright."""


def _from_array(array: NDArray[Any], name: str, reading: int) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if reading == 0 and (array.dtype != np.uint8 or channels not in (1, 3)):
        raise ImageError(f"{name}: expected uint8 [h, w], [h, w, 1] or [h, w, 3]")
    if array.dtype.kind == "f":
        raise ImageError(f"{name}: {_ARRAYS}; floats have no fixed range: scale them to 0..255 in uint8")
    if array.dtype.kind != "u" or array.dtype.itemsize > 2 or channels not in (1, 3, 4):
        raise ImageError(f"{name}: {_ARRAYS}")
    if array.dtype.itemsize == 2:
        array = _upper_bits(array, 16)
    return Image.fromarray(array.squeeze(2) if array.ndim == 3 and channels == 1 else array)


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """Mode RGB by rules 1 and 2."""
    depth, tiff = _sample_depth(image), getattr(image, "tag_v2", {})
    if 50706 in tiff:
        raise ImageError(f"{name}: a camera's raw file (DNG); Pillow reads only its thumbnail: develop it first")
    if any(kind != 1 for kind in tiff.get(339, (1,))) and image.mode != "F":
        raise ImageError(f"{name}: signed integer pixels have no fixed range: scale them to 8 or 16 bits")
    inverted = tiff.get(262) == 0 and image.mode.startswith("I;16")  # Pillow inverts all other depths itself
    image.load()
    profile: bytes = image.info.get("icc_profile") or b""
    turn = _orientation(image)
    colours, alpha = _eight_bits(image, name, depth)
    if inverted:
        colours = colours.point(lambda value: 255 - value)
    colours = _srgb(colours, profile)
    if alpha is not None:
        colours = _on_white(colours, alpha)
    if turn is not None:
        colours = colours.transpose(turn)
        for told in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):  # these would turn it once more
            colours.info.pop(told, None)
    return colours


def _sample_depth(image: Image.Image) -> int:
    """Bits of a sample in a PNG or TIFF file. 0 if that is not known."""
    if image.format == "TIFF":
        return int(getattr(image, "tag_v2", {}).get(258, (0,))[0])
    if image.format == "PNG" and (tiles := getattr(image, "tile", [])):
        raw = tiles[0][3]  # such as L, L;4, 1 or RGB;16B
        return 1 if raw == "1" else int(raw.partition(";")[2].rstrip("B") or 8) if isinstance(raw, str) else 0
    return 0


def _orientation(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # EXIF that cannot be parsed is ignored
        return None


def _is_grey_or_ycbcr(image: JpegImageFile) -> bool:
    """Whether all decoders agree on the colours that a JPEG stores. It may also hold CMYK, YCCK or RGB."""
    components = [layer[0] for layer in image.layer]
    return image.mode == "L" or (
        image.mode == "RGB" and image.info.get("adobe_transform", 1) == 1 and components != [*b"RGB"]
    )


def _eight_bits(image: Image.Image, name: str, depth: int) -> tuple[Image.Image, Image.Image | None]:
    """The colours with 8 bits, in mode L, RGB or CMYK, and the alpha channel if it hides anything."""
    mode, key = image.mode, image.info.get("transparency")
    alpha = None
    if mode == "F" or (mode == "I" and image.format not in ("PNG", "PPM")):  # PNG and PPM have at most 16 bits
        kind = "floating-point" if mode == "F" else "32-bit integer"
        raise ImageError(f"{name}: {kind} pixels have no fixed range: scale them to 8 or 16 bits per channel")
    if mode == "I" or mode.startswith("I;16"):
        values = np.asarray(image)
        if key is not None:
            alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
        image = Image.fromarray(_upper_bits(values, depth if depth in range(9, 16) else 16))
    elif mode in ("1", "L", "RGB") and key is not None:
        alpha = _keyed(image, key, depth)
    elif mode in ("La", "RGBa"):
        image = image.convert(mode.upper())
    elif mode == "PA" or (mode == "P" and image.has_transparency_data):
        image = image.convert("RGBA")
    if image.mode in ("LA", "RGBA"):
        alpha = image.getchannel("A")
        image = image.getchannel("L") if image.mode == "LA" else image.convert("RGB")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "RGB", "CMYK"):  # P, YCbCr, LAB, HSV, RGBX
        image = image.convert("RGB")
    return image, None if alpha is None or alpha.getextrema() == (255, 255) else alpha


def _upper_bits(values: NDArray[Any], depth: int) -> NDArray[np.uint8]:
    """The upper 8 of `depth` bits, as Pillow reads colours of 16 bits. The largest value becomes 255."""
    return (values >> (depth - 8)).astype(np.uint8)


def _keyed(image: Image.Image, key: Any, depth: int) -> Image.Image:
    """The alpha channel of a picture with one transparent colour (PNG's tRNS).

    Pillow scales pixels to 8 bits, but not this colour.
    """
    top = 2**depth - 1 if 0 < depth < 8 else 255
    scaled = [value >> 8 if depth == 16 else min(value * 255 // top, 255) for value in np.atleast_1d(key).tolist()]
    values = np.atleast_3d(np.asarray(image.convert("L") if image.mode == "1" else image))
    return Image.fromarray(np.where((values == scaled).all(2), 0, 255).astype(np.uint8))


def _on_white(colours: Image.Image, alpha: Image.Image) -> Image.Image:
    """The picture on white, or on black if its shapes are white, too."""
    flat = Image.new("RGB", colours.size, "white")
    flat.paste(colours, mask=alpha)
    if ImageChops.invert(flat).getbbox() is None and len(set(alpha.getextrema())) == 2:
        flat.paste("black", (0, 0, *flat.size))
        flat.paste(colours, mask=alpha)
    return flat


# ---- colour profiles --------------------------------------------------------------------------


def _srgb(colours: Image.Image, profile: bytes) -> Image.Image:
    """The picture in mode RGB and sRGB. Without a usable profile, colours count as sRGB."""
    if profile and (transform := _transform(profile, colours.mode)) is not None:
        return transform.apply(colours)
    return colours.convert("RGB") if colours.mode != "RGB" else colours


@lru_cache(32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from a profile to sRGB.

    None if the profile is broken, is for other colours, or is sRGB (it moves no level of 255 by more than 2).
    """
    if not features.check("littlecms2"):
        raise OSError(
            "it has a colour profile, and this Pillow was built without LittleCMS, which applies it: install a Pillow "
            "with LittleCMS"
        )
    try:
        found = ImageCms.ImageCmsProfile(BytesIO(profile))
        if found.profile.xcolor_space.strip() != {"L": "GRAY"}.get(mode, mode):
            return None
        transform = ImageCms.buildTransform(found, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, struct.error):
        return None
    if mode == "CMYK":
        return transform
    levels = np.linspace(0, 255, 18).astype(np.uint8)
    grid = levels if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3)
    probe = Image.fromarray(grid[np.newaxis])
    moved = np.abs(np.asarray(transform.apply(probe)).astype(int) - np.asarray(probe.convert("RGB")))
    return None if moved.max() <= 2 else transform
