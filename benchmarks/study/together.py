#!/usr/bin/env python3
"""Tasks on common bases trained together beside the same tasks one after another, and where a step's time goes.

DeiT-tiny at 96 pixels, cores of rank 16 at qkv and mlp, AdamW, random images; steps taken in turns in one process,
medians of milliseconds a task and step. `backbone alone` is the forward of the same images and the gradient through all
blocks, with no adapter but one of rank 1 at the first position: what no way of training adapters can go below.

    python -m benchmarks.study.together --weights ../shared/weights/deit_tiny_patch16_224.safetensors
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.study.bases import at_random
from pear_store import Task, make_task
from pear_train import Dataset, Split, TrainConfig
from pear_train.bases import share_bases
from pear_train.data import preprocess_record
from pear_train.group import next_batch, step_together
from pear_train.identity import BASES
from pear_train.machine import on_device
from pear_train.run import TaskRun
from router import AdaptedBackbone, PositionWeights, load_backbone
from router.tensors import from_torch

MODEL, PIXELS, RANK, CLASSES = "deit_tiny_patch16_224", 96, 16, 8
OUT = Path(__file__).parents[1] / "results" / "together.json"


def random_bases(adapted: AdaptedBackbone, positions: list[str]) -> Task:
    """Common bases of chance."""
    by_width: dict[tuple[int, int], list[str]] = {}
    for position in positions:
        by_width.setdefault(adapted.widths[position], []).append(position)
    tensors, entries, places = {}, {}, {}
    for i, ((d_in, d_out), group) in enumerate(by_width.items()):
        tensors[f"b{i}.down"] = from_torch(torch.zeros(len(group), d_in, RANK).half())
        tensors[f"b{i}.up"] = from_torch(torch.zeros(len(group), RANK, d_out).half())
        entries[f"b{i}"] = {"down": f"b{i}.down", "up": f"b{i}.up", "stack": len(group)}
        places.update({position: [[f"b{i}", 0.0, place]] for place, position in enumerate(group)})
    backbone = adapted.backbone
    record: dict[str, Any] = {
        "format": "pear-task/2", "task": "bases", "backbone": {"model": backbone.name, "digest": backbone.digest},
        "activation": "identity", "adapters": entries, "positions": {p: places[p] for p in positions}, "head": None,
        "labels": [], "preprocess": preprocess_record(backbone, PIXELS), "metrics": {},
        "training": {"method": BASES},
    }  # fmt: skip
    return at_random(make_task(record, tensors), 0)


def steppers(weights: Path, batch: int, count: int, dtype: str) -> dict[str, tuple[int, Callable[[], None]]]:
    """For each variant the tasks of one step, and the step."""
    adapted = on_device(load_backbone(MODEL, weights), "cpu")
    module = adapted.backbone.module
    positions = [name for name, _ in module.named_modules() if name.endswith((".qkv", ".mlp"))]
    adapted.attach(positions)
    bases = random_bases(adapted, positions)
    pixels = torch.randint(0, 256, (batch, PIXELS, PIXELS, 3), dtype=torch.uint8).numpy()
    split = Split(lambda i: pixels[i], torch.arange(batch) % CLASSES)
    data = Dataset("random: images", tuple(map(str, range(CLASSES))), split, split, None)
    told: dict[str, Any] = {
        "positions": "qkv,mlp",
        "img_size": PIXELS,
        "batch_size": batch,
        "epochs": 100_000,
        "dtype": dtype,
    }
    on_bases = TrainConfig(task="x", device="cpu", **told)
    plain = TrainConfig(task="x", device="cpu", method="adapters", rank=8, **told)

    def runs(config: TrainConfig, given: Task | None) -> list[TaskRun]:
        made = [TaskRun(config, adapted, data, bases=given) for _ in range(count)]
        for one in made[1:]:
            share_bases(one.adapters, made[0].adapters)
        return made

    def step(group: list[TaskRun]) -> None:
        step_together([(run, next_batch(run)) for run in group])
        for run in group:
            run.move()

    cores, adapters = runs(on_bases, bases), runs(plain, None)
    run = cores[0]
    d_in, d_out = adapted.widths[positions[0]]
    down, up = torch.zeros(d_in, 1, requires_grad=True), torch.zeros(1, d_out, requires_grad=True)

    def bare(images: int) -> None:
        rows = torch.arange(images) % batch
        features = adapted.features(
            run.images(rows), {positions[0]: PositionWeights(down, up, "identity")}, run.autocast
        )
        features.sum().backward()

    return {
        "on bases, alone": (1, partial(step, cores[:1])),
        f"on bases, {count} together": (count, partial(step, cores)),
        "rank 8, alone": (1, partial(step, adapters[:1])),
        f"rank 8, {count} together": (count, partial(step, adapters)),
        "backbone alone, one batch": (1, partial(bare, batch)),
        f"backbone alone, {count} batches": (count, partial(bare, count * batch)),
    }


@click.command(help=__doc__)
@click.option("--weights", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--count", default=8, show_default=True)
@click.option("--batches", default="8,32", show_default=True)
@click.option("--dtype", type=click.Choice(("bfloat16", "float32")), default="bfloat16", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=OUT)
def main(weights: Path, rounds: int, count: int, batches: str, dtype: str, out: Path) -> None:
    found = {}
    for batch in map(int, batches.split(",")):
        steps = steppers(weights, batch, count, dtype)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(rounds + 1):
            for name, (tasks, step) in steps.items():
                for _ in range(1 if tasks > 1 else count):
                    began = time.perf_counter()
                    step()
                    if turn:
                        times[name].append((time.perf_counter() - began) / tasks)
        rows = {name: round(1000 * statistics.median(one), 1) for name, one in times.items()}
        rows["together over alone, on bases"] = round(rows["on bases, alone"] / rows[f"on bases, {count} together"], 3)
        rows["together over alone, rank 8"] = round(rows["rank 8, alone"] / rows[f"rank 8, {count} together"], 3)
        found[f"batch {batch}"] = rows
    record = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "torch": torch.__version__, "dtype": dtype, "rounds": rounds, "ms_per_task_step": found,
    }  # fmt: skip
    out.write_text(json.dumps(record, indent=1) + "\n")
    click.echo(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
