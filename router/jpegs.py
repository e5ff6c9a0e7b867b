"""Decodes JPEG files in batches, on a GPU by NVJPEG. docs/pictures.md says which files, and how their levels differ.

torchvision does the work. Its function is deprecated in favour of TorchCodec, so only `JpegDecoder._decoded` knows it.
"""

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from io import BytesIO
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from router.device import open_device
from router.errors import BackboneError
from router.pictures import PlainJpeg

PIXELS = 64_000_000
"""Most pixels of all JPEGs that are decoded together, unless there is only one. Each takes 3 bytes on the device."""

Key = TypeVar("Key", bound=Hashable)


class JpegDecoder:
    """Decodes plain JPEGs in batches, in place of Pillow.

    Thread-safe: calls take turns, so several threads need no more memory on the device than one. A process to which it
    is sent makes its own.

    Args:
        device: a GPU, such as "cuda". On "cpu" torchvision decodes by libjpeg, which gains nothing.
    Raises:
        BackboneError: the device cannot be used, or torchvision cannot decode JPEGs there.
    """

    def __init__(self, device: str | torch.device) -> None:
        self.device = open_device(device)
        self._turn = threading.Lock()
        # of high priority, because torch has only 32 of normal priority: others would soon get this one, too
        self._stream = torch.cuda.Stream(self.device, priority=-1) if self.device.type == "cuda" else None
        file = BytesIO()
        Image.new("L", (16, 16)).save(file, "JPEG")
        try:
            with torch.cuda.stream(self._stream):
                self._decoded([PlainJpeg("", file.getvalue(), (16, 16), None)])
        except (ImportError, RuntimeError, Warning) as error:
            reason = " ".join(str(error).split(".")[0].split())
            raise BackboneError(
                f"device {str(device)!r} cannot decode JPEGs: {reason}: install a torchvision with NVJPEG for this "
                "GPU, or let Pillow decode them"
            ) from None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self.device),)

    def decode(
        self, jpegs: Sequence[PlainJpeg], finish: Callable[[int, Tensor], dict[Key, Tensor]]
    ) -> list[dict[Key, Tensor] | None]:
        """Decodes files, as many at a time as PIXELS allows.

        Args:
            finish: makes the results of a picture, given its number and its pixels: uint8 [3, h, w] on the device, as
                they are stored.
        Returns:
            For each file its results, on the CPU. None if it cannot be decoded here; Pillow may say why, or read it.
        """
        found: list[dict[Key, Tensor] | None] = []
        for part in _parts(jpegs):
            with self._turn, torch.cuda.stream(self._stream):
                decoded = zip(part, self._decoded_or_none(part), strict=True)
                finished = [
                    _finished(jpeg, pixels, partial(finish, number))
                    for number, (jpeg, pixels) in enumerate(decoded, len(found))
                ]
                found += [one and {key: small.cpu() for key, small in one.items()} for one in finished]
        return found

    def _decoded_or_none(self, jpegs: list[PlainJpeg]) -> list[Tensor | None]:
        try:
            return [*self._decoded(jpegs)]
        except RuntimeError:  # torchvision does not say which file it was
            return [None] if len(jpegs) == 1 else [pixels for jpeg in jpegs for pixels in self._decoded_or_none([jpeg])]

    def _decoded(self, jpegs: list[PlainJpeg]) -> list[Tensor]:
        """The files' pixels, uint8 [3, h, w]. Its own stream is the current one."""
        from torchvision.io import ImageReadMode, decode_jpeg

        if self._stream is not None:
            # NVJPEG's hardware does not wait for what is queued on its stream. So it would overwrite memory that was
            # freed here but is still being read. Other streams have memory of their own.
            self._stream.synchronize()
        files = [torch.frombuffer(bytearray(jpeg.data), dtype=torch.uint8) for jpeg in jpegs]
        decoded: list[Tensor] = decode_jpeg(files, ImageReadMode.RGB, self.device)
        return decoded


def _parts(jpegs: Sequence[PlainJpeg]) -> Iterator[list[PlainJpeg]]:
    part: list[PlainJpeg] = []
    pixels = 0
    for jpeg in jpegs:
        height, width = jpeg.size
        if part and pixels + height * width > PIXELS:
            yield part
            part, pixels = [], 0
        part.append(jpeg)
        pixels += height * width
    if part:
        yield part


def _finished(
    jpeg: PlainJpeg, pixels: Tensor | None, finish: Callable[[Tensor], dict[Key, Tensor]]
) -> dict[Key, Tensor] | None:
    if pixels is None or tuple(pixels.shape) != (3, *jpeg.size):
        return None
    try:
        return finish(pixels)
    except RuntimeError:  # too little memory, or too long a picture for torch's kernel
        return None


def upright(levels: Tensor, turn: Image.Transpose | None) -> Tensor:
    """A picture [..., h, w] that was transposed like that."""
    if turn is None:
        return levels
    transposed, axes = _STEPS[turn]
    return (levels.mT if transposed else levels).flip(axes)


_STEPS: dict[Image.Transpose, tuple[bool, tuple[int, ...]]] = {
    Image.Transpose.FLIP_LEFT_RIGHT: (False, (-1,)),
    Image.Transpose.ROTATE_180: (False, (-1, -2)),
    Image.Transpose.FLIP_TOP_BOTTOM: (False, (-2,)),
    Image.Transpose.TRANSPOSE: (True, ()),
    Image.Transpose.ROTATE_270: (True, (-1,)),
    Image.Transpose.TRANSVERSE: (True, (-1, -2)),
    Image.Transpose.ROTATE_90: (True, (-2,)),
}
"""Whether rows become columns, and the axes that are then reversed."""
