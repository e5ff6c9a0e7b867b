"""Makers of small tasks, without torch: worker processes start in a fraction of a second."""

import struct
from typing import Any

import numpy as np
from numpy import random  # numpy imports it when it is first asked for: in one thread, while another forks

from pear_store import RawTensor, Task, make_task


def floats(values: Any) -> RawTensor:
    array = np.asarray(values, dtype="<f4")
    return RawTensor("F32", array.shape, array.tobytes())


def container(header: bytes | str, data: bytes = b"") -> bytes:
    """A raw safetensors file around any header."""
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text)) + text + data


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
    rng = random.default_rng(seed)
    return {
        "a0.down": floats(rng.normal(size=(d, rank))),
        "a0.up": floats(rng.normal(size=(rank, d))),
        "head.weight": floats(rng.normal(size=(classes, d))),
        "head.bias": floats(rng.normal(size=classes)),
    }


def small_task(name: str = "dtd", seed: int = 0, **changed: RawTensor) -> Task:
    return make_task(record(name), {**tensors(seed), **{k.replace("__", "."): v for k, v in changed.items()}})
