"""pear-infer on a Ray cluster beside pear-infer alone, on the same cores.

    python -m benchmarks.cluster.speed --out benchmarks/results/cluster_speed.json

Each run is a process of its own that serves the same list: JPEGs of 320x240, 50 tasks, a ViT-S at 224 pixels, all of
random weights. Rounds take turns with

    alone      pear-infer, with a thread for each core
    one        --ray, one worker of all cores
    each       --ray, a worker of one core for each core
    single     --ray, one worker of one core, pinned to one core with all of Ray: with `each` the scaling

`running` is images a second once it runs: of `alone` all images over its seconds, which begin when the backbone is
loaded; of the others all images but one batch a worker, over the seconds after the first answer. `whole` is images over
the whole process's seconds: start of Ray, imports and all. `cpu_s` is what the process and its descendants took of the
processors: that tells what Ray costs where others use the machine, too.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.router.peers import PATTERNS_24, machine, make_tasks
from benchmarks.serve.load import cpu_s
from pear_store import Store
from router import load_backbone

MODEL, PICTURES, TASKS, BATCH = "vit_small_patch16_224", 100, 50, 16
CORES = os.cpu_count() or 1
CASES = {
    "alone": [],
    "one": ["--ray", "--workers", "1", "--cpus-per-worker", str(CORES)],
    "each": ["--ray", "--workers", str(CORES), "--cpus-per-worker", "1"],
    "single": ["--ray", "--workers", "1", "--cpus-per-worker", "1"],
}
PINNED = {"single": ["taskset", "--cpu-list", "0"]}


def make_files(work: Path, rows: int) -> None:
    """Weights, a store, pictures and their list."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=0)
    save_file(model.state_dict(), work / "weights.safetensors")
    backbone = load_backbone(MODEL, work / "weights.safetensors")
    with Store.create(work / "store") as store:
        list(store.add_many(make_tasks(backbone, PATTERNS_24, [f"task{i}" for i in range(TASKS)])))
    rng = np.random.default_rng(0)
    for i in range(PICTURES):
        noise = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((320, 240), Image.Resampling.BICUBIC).save(work / f"{i}.jpg", quality=90)
    lines = ["image,task", *(f"{i % PICTURES}.jpg,task{i * 7 % TASKS}" for i in range(rows))]
    (work / "list.csv").write_text("\n".join(lines) + "\n")


def run(case: str, work: Path, rows: int) -> dict[str, Any]:
    """One process; what it reported, with the rates."""
    out = work / f"{case}-{time.monotonic_ns()}.parquet"
    command = [
        *PINNED.get(case, []), sys.executable, "-m", "router.infer", str(work / "list.csv"), str(out),
        "--store", str(work / "store"), "--backbone", MODEL, "--weights", str(work / "weights.safetensors"),
        "--batch-size", str(BATCH), "--json", *CASES[case],
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(CORES)}
    began = time.perf_counter()
    used_s = 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        while process.poll() is None:
            used_s = max(used_s, cpu_s(process.pid))  # of Ray's processes, too, which are its descendants
            time.sleep(0.5)
        assert process.stdout is not None
        said = process.stdout.read()
    whole_s = time.perf_counter() - began
    report: dict[str, Any] = json.loads(said)
    assert report["predictions"] == rows, report
    workers, start_s = report.get("workers", 0), report.get("start_s", 0.0)
    running = (rows - workers * BATCH) / (report["seconds"] - start_s)
    kept = ("seconds", "start_s", "list_s", "read_s", "decode_s", "transfer_s", "device_s", "write_s", "retries")
    figures = {"running": round(running, 2), "whole": round(rows / whole_s, 2), "whole_s": round(whole_s, 1)}
    figures["cpu_s"] = round(used_s, 1)
    return {**figures, **{key: report[key] for key in kept if key in report}}


@click.command(help=__doc__)
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--rows", default=600, show_default=True, type=click.IntRange(100))
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
def main(out: Path, rows: int, rounds: int) -> None:
    found: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_files(work, rows)
        for number in range(rounds):
            names = list(CASES)
            for case in names[number % len(names) :] + names[: number % len(names)]:
                found[case].append(run(case, work, rows))
                click.echo(f"{case}: {found[case][-1]}", err=True)
    running = {case: [one["running"] for one in runs] for case, runs in found.items()}
    over = {
        case: statistics.median(mine / alone for mine, alone in zip(running[case], running["alone"], strict=True))
        for case in CASES
        if case != "alone"
    }
    packages = ("ray", "torch", "timm", "pyarrow")
    report = {
        "command": f"python -m benchmarks.cluster.speed --out {out} --rows {rows} --rounds {rounds}",
        "machine": machine(),
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "images_per_s_running": {case: statistics.median(rates) for case, rates in running.items()},
        "over_alone": {case: round(ratio, 3) for case, ratio in over.items()},
        "start_s": {case: statistics.median(one["start_s"] for one in found[case]) for case in over},
        "runs": found,
    }
    out.write_text(json.dumps(report, indent=1) + "\n")
    click.echo(json.dumps({key: report[key] for key in ("images_per_s_running", "over_alone", "start_s")}))


if __name__ == "__main__":
    main()
