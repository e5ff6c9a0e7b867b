"""A sheet of training pictures as the network sees them: resized, augmented, mixed."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from pear_train.config import TrainConfig
from pear_train.data import Dataset, Pixels, preprocess_record
from pear_train.errors import ConfigError, ResourceError
from pear_train.feed import Feed
from pear_train.memory import check_batch
from pear_train.plot import SOFTWARE, check_picture
from router import Backbone, Preprocess

MOST = 48
_COLUMNS, _SIDE, _TEXT, _GAP = 8, 160, 34, 8


def write_preview(config: TrainConfig, backbone: Backbone, dataset: Dataset, path: Path) -> None:
    """Draws up to 48 training pictures with their classes, some of each class, as a training step would see them.

    It does not change training: it has its own random generator.

    Raises:
        ConfigError: `path` holds something that pear-train did not draw, or no picture can be read.
        ResourceError: the file cannot be written.
    """
    check_picture("--preview", path)
    record = preprocess_record(backbone, config.img_size)
    rows = some_of_each(dataset.train.targets, MOST, torch.Generator().manual_seed(config.seed))
    preprocess = Preprocess(record, dataset.limits)
    check_batch(f"--preview {path}", len(rows), preprocess.size, torch.device("cpu"))
    pixels = Pixels.readable(dataset.train.subset(rows), preprocess)
    if not len(pixels):
        raise ConfigError(f"--preview {path}: none of {len(rows)} training pictures can be read: check the data")
    feed = Feed(config, pixels, len(dataset.classes), torch.Generator().manual_seed(config.seed))
    shown = torch.arange(len(pixels))
    images, targets = feed.images(shown), feed.targets(shown)
    mean, std = (torch.tensor(record[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    seen = ((images * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    sheet = _sheet(seen, [_named(target, dataset.classes) for target in targets])
    told = PngInfo()
    told.add_text("Software", SOFTWARE)
    try:
        sheet.save(path, "PNG", pnginfo=told)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written: {error.strerror or error}") from None


def some_of_each(targets: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Up to `most` row numbers: one of each class in turn, drawn at random."""
    order = torch.randperm(len(targets), generator=generator)
    seen: dict[int, int] = {}
    turns = []
    for place, row in enumerate(order.tolist()):
        label = int(targets[row])
        turns.append((seen.get(label, 0), label, place, row))
        seen[label] = seen.get(label, 0) + 1
    return torch.tensor([row for *_, row in sorted(turns)[:most]], dtype=torch.long)


def _named(target: Tensor, classes: tuple[str, ...]) -> list[str]:
    """A picture's class. For a mixed picture, each class with its share."""
    if not target.ndim:
        return [classes[int(target)]]
    shares = sorted(((float(share), name) for share, name in zip(target, classes, strict=True) if share > 0))
    return [f"{100 * share:.0f} % {name}" for share, name in reversed(shares)]


def _sheet(images: Tensor, names: list[list[str]]) -> Image.Image:
    columns = min(_COLUMNS, len(images))
    rows = -(-len(images) // columns)
    width, height = _SIDE + _GAP, _SIDE + _TEXT + _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, (image, lines) in enumerate(zip(images, names, strict=True)):
        x, y = _GAP + i % columns * width, _GAP + i // columns * height
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        small = max(picture.size) <= _SIDE // 2
        scale = _SIDE / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        sheet.paste(picture.resize(size, Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS), (x, y))
        for line, text in enumerate(lines[:2]):
            draw.text((x, y + _SIDE + 2 + 15 * line), _fitting(draw, text, font), "black", font)
    return sheet


def _fitting(draw: ImageDraw.ImageDraw, text: str, font: "ImageFont.ImageFont | ImageFont.FreeTypeFont") -> str:
    if draw.textlength(text, font) <= _SIDE:
        return text
    while text and draw.textlength(f"{text}…", font) > _SIDE:
        text = text[:-1]
    return f"{text}…"
