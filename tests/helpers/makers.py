"""Makers of small tasks, without torch: worker processes start in a fraction of a second."""

import struct
from collections.abc import Iterator
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


def replace_at(tree: Any, path: str, value: Any) -> None:
    """Replaces what is at a slash-separated path of dicts and lists, or removes it if value is Ellipsis."""
    *parents, last = path.split("/")
    for part in parents:
        tree = tree[part]
    if value is ...:
        del tree[last]
    else:
        tree[int(last) if isinstance(tree, list) else last] = value


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


def sharing_tasks(count: int) -> Iterator[Task]:
    """Tasks as a team makes them, on three backbones: on common bases, pruned with borrowed adapters, some of which
    other tasks have, too, and unpruned."""
    vit = [f"blocks.{i}.{part}" for i in range(12) for part in ("attn.qkv", "mlp")]
    plans = (
        ("vit_base_patch16_224.augreg_in21k", vit, 12),
        ("deit_tiny_patch16_224.fb_in1k", vit[:16], 8),
        ("resnet50.a1_in1k", [f"layer{i}.{j}" for i in range(1, 5) for j in range(3)], 10),
    )
    for number in range(count):
        rng = random.default_rng(number)
        which = (0, 0, 0, 1, 1, 0, 1, 0, 2, 0)[number % 10]
        model, positions, d = plans[which]
        kind = ("bases", "pruned", "banked", "bases", "plain")[number // 3 % 5] if which < 2 else "pruned"
        parts = {"head.weight": floats(rng.normal(size=(3, d))), "head.bias": floats(rng.normal(size=3))}
        adapters: dict[str, dict[str, str]] = {}
        placed: dict[str, list[list[Any]]] = {}

        def own(
            name: str, seed: Any, d: int = d, parts: dict[str, Any] = parts, adapters: dict[str, Any] = adapters
        ) -> list[list[Any]]:
            made = random.default_rng(seed)
            parts[f"{name}.down"] = floats(made.normal(size=(d, 4)))
            parts[f"{name}.up"] = floats(made.normal(size=(4, d)))
            adapters[name] = {"down": f"{name}.down", "up": f"{name}.up"}
            return [[name, 1.0]]

        for place, position in enumerate(positions):
            if kind == "bases":
                own(f"b{place}", [9, which, place])
                parts[f"core{place}"] = floats(rng.normal(size=(4, 4)))
                adapters[f"b{place}"] = {"down": f"b{place}.down", "up": f"core{place}", "basis": f"b{place}.up"}
                placed[position] = [[f"b{place}", 1.0]]
            elif kind == "plain" or place % 8 < 2:
                placed[position] = own(f"a{place}", [number, place])
            else:
                placed[position] = [[f"a{place // 8 * 8 + place % 2}", 1.0]]
                if kind == "banked" and place % 3 == 0:
                    banked = own(f"k{place}", [7, which, place, int(rng.integers(min(3, 1 + number // 10)))])
                    placed[position] = [*placed[position], *banked]
        made = record(
            f"task-{number:03}", backbone={"model": model, "digest": f"sha256:{which:064}"}, adapters=adapters,
            positions=placed, labels=["a", "b", "c"], metrics={"val_top1": round(float(rng.uniform(0.6, 0.99)), 4)},
        )  # fmt: skip
        yield make_task(made, parts)
