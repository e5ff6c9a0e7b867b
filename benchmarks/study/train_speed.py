#!/usr/bin/env python3
"""Training speed and memory: our adapters, one task and several at once, beside PEFT's LoRA at the same positions.

DeiT-tiny at 96 pixels, rank 8 at the 12 fused qkv Linears (identity, so the same function as LoRA), batch 32, AdamW;
random images, steps taken in turns in one process, medians. Memory is the peak resident size of a process of each
variant's own.

    python -m benchmarks.study.train_speed --weights ../shared/weights/deit_tiny_patch16_224.safetensors
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import peft
import timm
import torch
from torch import nn
from torch.nn import functional as F

from pear_train import Dataset, Split, TrainConfig
from pear_train.group import next_batch, step_together
from pear_train.machine import on_device
from pear_train.run import TaskRun
from router import load_backbone

MODEL, PIXELS, BATCH, RANK, CLASSES = "deit_tiny_patch16_224", 96, 32, 8, 10
OUT = Path(__file__).parents[1] / "results" / "train_speed.json"
VARIANTS = {"ours, alone": 1, "ours, 4 tasks together": 4, "PEFT LoRA": 0}


def stepper(variant: str, weights: Path, device: str) -> Callable[[], None]:
    """One training step of one batch a task."""
    torch.manual_seed(0)
    count = VARIANTS[variant]
    if count:
        pixels = torch.randint(0, 256, (BATCH, PIXELS, PIXELS, 3), dtype=torch.uint8).numpy()
        split = Split(lambda i: pixels[i], torch.arange(BATCH) % CLASSES)
        data = Dataset("random: images", tuple(map(str, range(CLASSES))), split, split, None)
        config = TrainConfig(task="x", method="adapters", positions="qkv", rank=RANK, img_size=PIXELS, batch_size=BATCH,
                             device=device, epochs=100_000, dtype="float32")  # fmt: skip
        adapted = on_device(load_backbone(MODEL, weights), device)
        runs = [TaskRun(config, adapted, data) for _ in range(count)]

        def step() -> None:
            step_together([(run, next_batch(run)) for run in runs])
            for run in runs:
                run.optimiser.step()

        return step
    backbone = load_backbone(MODEL, weights)
    model: Any = timm.create_model(MODEL, num_classes=0, img_size=PIXELS)
    model.load_state_dict(backbone.sized((PIXELS, PIXELS)).state_dict())
    if device == "cpu":
        for part in model.modules():
            if hasattr(part, "fused_attn"):
                part.fused_attn = False
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["qkv"])).to(device)
    tuned.eval()
    head = nn.Linear(model.num_features, CLASSES).to(device)
    trained = [p for p in tuned.parameters() if p.requires_grad] + list(head.parameters())
    optimiser = torch.optim.AdamW(trained, lr=5e-3)
    images, targets = torch.randn(BATCH, 3, PIXELS, PIXELS, device=device), (torch.arange(BATCH) % CLASSES).to(device)

    def peft_step() -> None:
        optimiser.zero_grad(set_to_none=True)
        F.cross_entropy(head(tuned(images)), targets).backward()
        optimiser.step()

    return peft_step


def resident_peak() -> int:
    """Bytes; not getrusage's, which a child inherits from the process that started it."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


@click.command(help=__doc__)
@click.option("--weights", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--rounds", default=25, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=OUT)
@click.option("--memory", hidden=True)
def main(weights: Path, device: str, rounds: int, out: Path, memory: str | None) -> None:
    if memory is not None:
        step = stepper(memory, weights, device)
        for _ in range(3):
            step()
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident_peak()
        click.echo(json.dumps(peak))
        return
    steps = {name: stepper(name, weights, device) for name in VARIANTS}
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for turn in range(rounds + 3):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= 3:
                times[name].append((time.perf_counter() - began) / max(1, VARIANTS[name]))
    rows = {}
    for name in VARIANTS:
        command = [sys.executable, __file__, "--weights", str(weights), "--device", device, "--memory", name]
        peak = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        median = statistics.median(times[name])
        rows[name] = {"ms_per_task_step": round(1000 * median, 1), "images_per_s": round(BATCH / median, 1),
                      "peak_mib": round(peak / 2**20)}  # fmt: skip
    base = rows["PEFT LoRA"]["ms_per_task_step"]
    for row in rows.values():
        row["speed_over_peft"] = round(base / row["ms_per_task_step"], 3)
    record = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {device}", "torch": torch.__version__,
        "peft": peft.__version__, "timm": timm.__version__, "rounds": rounds, "variants": rows,
    }  # fmt: skip
    out.write_text(json.dumps(record, indent=1) + "\n")
    click.echo(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
