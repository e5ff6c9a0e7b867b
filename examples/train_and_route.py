"""Train two tasks, store them, and run both in one batch. All from Python.

    python examples/train_and_route.py

It draws its own pictures. It takes about ten seconds on two cores, and writes only to a temporary folder.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from pear_store import Store
from pear_train import Dataset, Split, TrainConfig, train
from router import Router, load_backbone


def picture(shape: str, dark: bool, random: np.random.Generator) -> Image.Image:
    """A circle or a square at a random place, on a dark or a light ground."""
    low, high = int(random.integers(0, 24)), int(random.integers(36, 64))
    image = Image.new("RGB", (64, 64), (30, 30, 30) if dark else (225, 225, 225))
    draw = ImageDraw.Draw(image)
    colour = tuple(random.integers(60, 200, 3).tolist())
    (draw.ellipse if shape == "circle" else draw.rectangle)((low, low, high, high), fill=colour)
    return image


random = np.random.default_rng(0)
drawn = [(shape, ground) for _ in range(60) for shape in ("circle", "square") for ground in ("dark", "light")]
pictures = [picture(shape, ground == "dark", random) for shape, ground in drawn]


def dataset(name: str, classes: tuple[str, str], labels: list[str]) -> Dataset:
    """The first 140 pictures are for training, 40 for validation and 60 for a test. A folder does it, too:
    `open_dataset("my/folder")`."""
    targets = torch.tensor([classes.index(label) for label in labels])

    def split(start: int, stop: int) -> Split:
        return Split(lambda number: pictures[start + number], targets[start:stop])

    return Dataset(name, classes, split(0, 140), split(140, 180), split(180, 240))


tasks = {
    "shapes": dataset("shapes", ("circle", "square"), [shape for shape, _ in drawn]),
    "grounds": dataset("grounds", ("dark", "light"), [ground for _, ground in drawn]),
}
backbone = load_backbone("pear_tiny")  # part of Pear, for tries; or a timm name, such as deit_tiny_patch16_224

with tempfile.TemporaryDirectory() as folder, Store.create(Path(folder, "pear.store")) as store:
    for name, data in tasks.items():
        file = Path(folder, f"{name}.safetensors")
        result = train(TrainConfig(task=name, epochs=6), backbone, data, file)
        assert result.test_top1 is not None
        print(f"{name}: {100 * result.test_top1:.0f} % right on test, {result.adapter_bytes:,} bytes of adapters")
        store.add(file)

    router = Router(backbone, store)
    answers = router.run(pictures[-4:], task=["shapes", "grounds", "shapes", "grounds"])  # one batch, two tasks
    for (shape, ground), answer in zip(drawn[-4:], answers, strict=True):
        label, probability = answer.topk(1)[0]
        print(f"a {shape} on a {ground} ground: {answer.task} says {label} ({probability:.2f})")
