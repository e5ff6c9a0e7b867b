"""How fast JPEGs become pixels of the input size: ways to decode and resize, by stage, taken in turn.

    python -m benchmarks.router.decode --out benchmarks/results/decode.json

Pictures are photographs that scikit-image brings, enlarged to the size and saved as JPEG of quality 90 (4:2:0). One
thread; times are medians over rounds in which every way has its turn. `pixels` is the largest and the mean difference
of a level (of 255) from Pillow at full size; `logits` is the largest difference of a logit, and `features` the cosine
distance of pear_tiny's features.

Where there is a GPU (or with --jpegs cpu, to try it out), `batches` has batches of 64 files: images a second of all
threads together, by Pillow and by the JpegDecoder, and how far its levels are from Pillow's by the same rule.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import PIL
import skimage
import torch
import torchvision
from PIL import Image
from torch.nn import functional as F
from torchvision.io import ImageReadMode, decode_jpeg

from router import AdaptedBackbone, JpegDecoder, Preprocess, load_backbone
from router.preprocess import Spent
from router.preprocess import decode as decode_batch

SOURCES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
SIZES = {"640": (640, 480), "4000": (4000, 3000)}
SIDE = 224
MARGIN = 2
BATCH = 64
RECORD = {
    "input_size": [3, SIDE, SIDE], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
    "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "squash", "reading": 1,
}  # fmt: skip

Decode = Callable[[bytes], Any]
Resize = Callable[[Any], torch.Tensor]


def pillow(data: bytes) -> Image.Image:
    from io import BytesIO

    image = Image.open(BytesIO(data))
    image.load()
    return image.convert("RGB")


def pillow_reduced(data: bytes) -> Image.Image:
    from io import BytesIO

    image = Image.open(BytesIO(data))
    image.draft(None, (MARGIN * SIDE, MARGIN * SIDE))
    image.load()
    return image.convert("RGB")


def torchvision_full(data: bytes) -> torch.Tensor:
    decoded: torch.Tensor = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    return decoded


def simplejpeg_full(data: bytes) -> Any:
    import simplejpeg

    return simplejpeg.decode_jpeg(data)


def simplejpeg_reduced(data: bytes) -> Any:
    import simplejpeg

    return simplejpeg.decode_jpeg(data, min_height=MARGIN * SIDE, min_width=MARGIN * SIDE)


def by_pillow(image: Any) -> torch.Tensor:
    if isinstance(image, torch.Tensor):
        image = image.permute(1, 2, 0).contiguous().numpy()
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    small = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)


def by_torch(image: Any) -> torch.Tensor:
    if not isinstance(image, torch.Tensor):
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # channels last, as torch's kernel likes it
    return F.interpolate(image.unsqueeze(0), (SIDE, SIDE), mode="bicubic", antialias=True).squeeze(0)


WAYS: dict[str, tuple[Decode, Resize]] = {
    "Pillow": (pillow, by_pillow),
    "Pillow, reduced": (pillow_reduced, by_pillow),
    "Pillow, resized by torch": (pillow, by_torch),
    "Pillow, reduced, resized by torch": (pillow_reduced, by_torch),
    "torchvision": (torchvision_full, by_torch),
    "torchvision, resized by Pillow": (torchvision_full, by_pillow),
    "simplejpeg": (simplejpeg_full, by_pillow),
    "simplejpeg, reduced": (simplejpeg_reduced, by_pillow),
}


def whole_pipeline(reading: int) -> tuple[Decode, Resize]:
    """What a task does whose pictures are read by that rule: all of it counts as resizing."""
    return bytes, Preprocess({**RECORD, "reading": reading}).pixels


WAYS |= {f"Pear, rule {reading}": whole_pipeline(reading) for reading in (1, 2)}


def pictures(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for size, sides in SIZES.items():
        for source in SOURCES:
            image = Image.open(Path(skimage.__file__).parent / "data" / source).convert("RGB")
            path = folder / f"{size}-{Path(source).stem}.jpg"
            image.resize(sides, Image.Resampling.LANCZOS).save(path, quality=90)
            found.setdefault(size, []).append(path)
    return found


def time_ways(files: list[Path], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds an image of each stage, the median over rounds."""
    times: dict[str, dict[str, list[float]]] = {way: {"read": [], "decode": [], "resize": []} for way in WAYS}
    for number in range(rounds + 1):
        for way, (decode, resize) in WAYS.items():
            spent = dict.fromkeys(times[way], 0.0)
            for file in files:
                began = time.perf_counter()
                data = file.read_bytes()
                read = time.perf_counter()
                image = decode(data)
                decoded = time.perf_counter()
                resize(image)
                spent["read"] += read - began
                spent["decode"] += decoded - read
                spent["resize"] += time.perf_counter() - decoded
            for stage, seconds in spent.items() if number else ():  # the first round warms up
                times[way][stage].append(1000 * seconds / len(files))
    return {
        way: {f"{stage}_ms": round(statistics.median(some), 3) for stage, some in stages.items()}
        for way, stages in times.items()
    }


@torch.inference_mode()
def differences(files: list[Path]) -> dict[str, dict[str, float]]:
    """Of pixels, and of pear_tiny's features and of logits that a head of unit rows makes of them."""
    backbone = load_backbone("pear_tiny")
    adapted = AdaptedBackbone(backbone, torch.device("cpu"), torch.float32)
    way = Preprocess({**RECORD, "mean": backbone.config["mean"], "std": backbone.config["std"]})
    pixels = {
        name: torch.stack([resize(decode(file.read_bytes())) for file in files])
        for name, (decode, resize) in WAYS.items()
    }
    head = F.normalize(torch.randn(100, adapted.feature_width, generator=torch.Generator().manual_seed(0)), dim=1)
    features = {name: adapted.features(way.normalise(some), {}) for name, some in pixels.items()}
    base, found = features["Pillow"], {}
    for name in WAYS:
        moved = (pixels[name].int() - pixels["Pillow"].int()).abs().float()
        logits = (features[name] - base) @ head.t()
        found[name] = {
            "pixels_max": float(moved.max()),
            "pixels_mean": round(float(moved.mean()), 4),
            "logits_max": round(float(logits.abs().max()), 5),
            "logits_spread": round(float((base @ head.t()).std()), 5),
            "features": round(float((1 - F.cosine_similarity(features[name], base)).max()), 7),
        }
    return found


def batches(files: list[Path], jpegs: JpegDecoder, rounds: int) -> dict[str, Any]:
    """Whole batches by Pillow in all threads, and by the decoder, in turns."""
    record = {**RECORD, "reading": 2}
    ways = {"Pillow": Preprocess(record), f"JpegDecoder, {jpegs.device}": Preprocess(record, jpegs=jpegs)}
    data = [file.read_bytes() for file in files]
    batch = [bytes(bytearray(data[i % len(data)])) for i in range(BATCH)]  # equal objects would be decoded once
    times: dict[str, list[float]] = {name: [] for name in ways}
    found, spent = {}, Spent()
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            found[name] = decode_batch(batch, [way] * BATCH, spent)
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - began)
    pillow, other = (torch.stack([one for one in some if isinstance(one, torch.Tensor)]) for some in found.values())
    moved = (pillow.int() - other.int()).abs().float()
    return {
        "images_per_s": {name: round(BATCH / statistics.median(some), 1) for name, some in times.items()},
        "decoded_there": spent.by_jpegs / (BATCH * (rounds + 1)),
        "pixels_max": float(moved.max()), "pixels_mean": round(float(moved.mean()), 4),
    }  # fmt: skip


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--rounds", default=9, show_default=True)
@click.option("--jpegs", help="Device of the JpegDecoder [default: cuda if there is one].")
@click.option("--only-batches", is_flag=True, help="Leave out all ways of one thread.")
def main(out: Path, rounds: int, jpegs: str | None, only_batches: bool) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "machine": {
            "cpu": torch.backends.cpu.get_cpu_capability(), "platform": platform.platform(),
            "torch": torch.__version__, "torchvision": torchvision.__version__, "pillow": PIL.__version__,
        }
    }  # fmt: skip
    if jpegs or torch.cuda.is_available():
        decoder = JpegDecoder(jpegs or "cuda")
        results["machine"] |= {
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if decoder.device.type == "cuda" else None,
        }
        with tempfile.TemporaryDirectory() as folder:
            results["batches"] = {
                size: batches(files, decoder, rounds) for size, files in pictures(Path(folder)).items()
            }
        click.echo(json.dumps(results["batches"], indent=1))
    with tempfile.TemporaryDirectory() as folder:
        for size, files in pictures(Path(folder)).items() if not only_batches else ():
            times, moved = time_ways(files, rounds), differences(files)
            results[size] = {way: {**times[way], **moved[way]} for way in WAYS}
            for way, row in results[size].items():
                whole = sum(row[f"{stage}_ms"] for stage in ("read", "decode", "resize"))
                row["images_per_s"] = round(1000 / whole, 1)
                click.echo(f"{size:>5} {way:34} {row['images_per_s']:7.1f}/s {json.dumps(row)}")
    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
