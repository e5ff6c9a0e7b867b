"""Shared fixtures and makers."""

import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

from pear_store import RawTensor, Store, Task, make_task
from router import Backbone, load_backbone

SHARED = Path(__file__).parents[2] / "shared"


def floats(values: Any) -> RawTensor:
    array = np.asarray(values, dtype="<f4")
    return RawTensor("F32", array.shape, array.tobytes())


def record(name: str = "dtd", **changes: Any) -> dict[str, Any]:
    """A valid record with one adapter used at two positions, and two classes."""
    return {
        "format": "pear-task/1",
        "task": name,
        "backbone": {"model": "pear_tiny", "digest": "sha256:" + "0" * 64},
        "activation": "identity",
        "adapters": {"a0": {"down": "a0.down", "up": "a0.up"}},
        "positions": {"blocks.0.attn": [["a0", 1.0]], "blocks.1.attn": [["a0", 0.5]]},
        "head": {"weight": "head.weight", "bias": "head.bias"},
        "labels": ["banded", "blotchy"],
        "preprocess": {
            "input_size": [3, 48, 48],
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "squash",
        },
        "metrics": {"val_top1": 0.5},
        "training": {"method": "pear", "ratio": 0.5, "seed": 0},
        **changes,
    }


def tensors(seed: int = 0, d: int = 6, rank: int = 2, classes: int = 2) -> dict[str, RawTensor]:
    rng = np.random.default_rng(seed)
    return {
        "a0.down": floats(rng.normal(size=(d, rank))),
        "a0.up": floats(rng.normal(size=(rank, d))),
        "head.weight": floats(rng.normal(size=(classes, d))),
        "head.bias": floats(rng.normal(size=classes)),
    }


def small_task(name: str = "dtd", seed: int = 0, **changed: RawTensor) -> Task:
    return make_task(record(name), {**tensors(seed), **{k.replace("__", "."): v for k, v in changed.items()}})


def container(header: bytes | str, data: bytes = b"") -> bytes:
    """A raw safetensors file around any header."""
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.create(tmp_path / "store") as made:
        yield made


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    where = tmp_path / "disk"
    where.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", where], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", where], check=True)


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    return load_backbone("pear_tiny")


@pytest.fixture(scope="session")
def task_maker(backbone: Backbone) -> Callable[..., Task]:
    """Makes random tasks for the embedded backbone."""

    def make(
        name: str,
        seed: int = 0,
        rank: int = 4,
        classes: int = 3,
        activation: str = "identity",
        positions: tuple[str, ...] = ("blocks.0.attn", "blocks.2.mlp", "blocks.4.attn.qkv"),
        size: int = 48,
        headless: bool = False,
    ) -> Task:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> RawTensor:
            return floats(torch.randn(*shape, generator=generator).numpy() / shape[0] ** 0.5)

        found: dict[str, RawTensor] = {}
        adapters, branches = {}, {}
        for i, position in enumerate(positions):
            d_out = 576 if position.endswith("qkv") else 192
            found[f"a{i}.down"], found[f"a{i}.up"] = random(192, rank), random(rank, d_out)
            adapters[f"a{i}"] = {"down": f"a{i}.down", "up": f"a{i}.up"}
            branches[position] = [[f"a{i}", 0.5 + 0.25 * i]]
        branches["blocks.5.attn"] = [["a0", 0.3], ["a0", -0.2]]  # shared, and two branches at once
        if not headless:
            found["head.weight"], found["head.bias"] = random(classes, 192), random(classes)
        made = record(
            name,
            backbone={"model": backbone.name, "digest": backbone.digest},
            activation=activation,
            adapters=adapters,
            positions=branches,
            labels=[] if headless else [f"{name}-{i}" for i in range(classes)],
        )
        made["preprocess"] = {**made["preprocess"], "input_size": [3, size, size]}
        if headless:
            made["head"] = None
        return make_task(made, found)

    return make


settings.register_profile("commit", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("commit")
