"""Make common bases of the backbone's own weights, and train two tasks on them. Each brings a few KB of its own.

    python examples/common_bases.py

It draws its own pictures. It takes about ten seconds on two cores, and writes only to a temporary folder.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pear_store import Store, read_checkpoint
from pear_train import Dataset, Split, TrainConfig, make_backbone_bases, train
from router import Router, load_backbone


def waves(angle: float, random: np.random.Generator) -> Image.Image:
    """Waves of this direction, in degrees, with a random start and noise."""
    y, x = np.mgrid[:64, :64]
    along = x * np.cos(np.radians(angle)) + y * np.sin(np.radians(angle))
    values = 128 + 60 * np.sin(along / 3 + random.uniform(0, 6)) + random.normal(0, 25, (64, 64))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")


def dataset(angles: tuple[float, ...], seed: int) -> Dataset:
    """Which of these directions do the waves have?"""
    random = np.random.default_rng(seed)
    targets = torch.arange(len(angles)).repeat(60)
    pictures = [waves(angles[target], random) for target in targets.tolist()]

    def split(start: int, stop: int) -> Split:
        return Split(lambda number: pictures[start + number], targets[start:stop])

    count = len(targets)
    parts = split(0, count // 2), split(count // 2, 3 * count // 4), split(3 * count // 4, count)
    return Dataset(f"waves of {angles}", tuple(f"{angle:g} degrees" for angle in angles), *parts)


tasks = {"steep": dataset((10, 60, 110), 0), "flat": dataset((30, 80, 150), 1)}
backbone = load_backbone("pear_tiny")

with tempfile.TemporaryDirectory() as folder, Store.create(Path(folder, "pear.store")) as store:
    bases_file = Path(folder, "bases.safetensors")
    make_backbone_bases(TrainConfig(task="bases", rank=8), backbone, bases_file)
    for name, data in tasks.items():
        file = Path(folder, f"{name}.safetensors")
        config = TrainConfig(task=name, epochs=6, core_dtype="Q4", head_dtype="Q4")  # 4 bits a number
        result = train(config, backbone, data, file, bases=read_checkpoint(bases_file))
        assert result.test_top1 is not None
        print(f"{name}: {100 * result.test_top1:.0f} % right on test")
        own = result.adapter_bytes + result.head_bytes
        print(f"its own: {own:,} bytes; bases, once for all: {result.bases_bytes:,}")
        print(f"{store.add(file).new_bytes:,} new bytes in the store")
    print(Router(backbone, store).run(waves(60, np.random.default_rng(9)), task="steep")[0].label)
