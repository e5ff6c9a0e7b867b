"""Make common bases of three tasks, and train a fourth on them. It brings a few KB of its own.

    python examples/common_bases.py

It draws its own pictures. It takes about ten seconds on two cores, and writes only to a temporary folder.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pear_store import Store, read_checkpoint
from pear_train import Dataset, Split, TrainConfig, make_bases, train
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


sources = {"a": dataset((0, 45), 0), "b": dataset((20, 70), 1), "c": dataset((90, 135), 2)}
new = dataset((10, 60, 110), 3)
backbone = load_backbone("pear_tiny")

with tempfile.TemporaryDirectory() as folder, Store.create(Path(folder, "pear.store")) as store:
    bases_file, file = Path(folder, "bases.safetensors"), Path(folder, "new.safetensors")
    configs = [TrainConfig(task=name, epochs=3, rank=8) for name in sources]
    make_bases(TrainConfig(task="bases", epochs=3, rank=8), backbone, [], bases_file, configs, list(sources.values()))
    config = TrainConfig(task="new", epochs=6, core_dtype="Q4", head_dtype="Q4")  # 4 bits a number
    result = train(config, backbone, new, file, bases=read_checkpoint(bases_file))
    assert result.test_top1 is not None
    print(f"new: {100 * result.test_top1:.0f} % right on test")
    print(f"its own: {result.adapter_bytes + result.head_bytes:,} bytes; bases, once for all: {result.bases_bytes:,}")
    for name in ("new", "new-for-others"):  # the second one brings nothing
        print(f"{name}: {store.add(file, name).new_bytes:,} new bytes in the store")
    print(Router(backbone, store).run(waves(60, np.random.default_rng(9)), task="new")[0].label)
