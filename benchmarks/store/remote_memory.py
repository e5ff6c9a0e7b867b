#!/usr/bin/env python3
"""The memory that push, clone and remote verify take, of a store of 20 GB of random tensors.

    python -m benchmarks.store.remote_memory --work FOLDER --out benchmarks/results/remote_memory.json

The remote is a directory. FOLDER needs twice the store's size. Memory is sampled 50 times a second: `anonymous`, a
process' own pages, and `resident`, with those of files that it maps, which the system takes back when it needs them.
"""

import json
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.store.peers import BIN, machine
from pear_store import RawTensor, Store, Task, make_task

SHAPES = {"down": (768, 256), "up": (256, 768)}
ADAPTERS = 24
TASK_BYTES = ADAPTERS * sum(4 * a * b for a, b in SHAPES.values())


def make_tasks(count: int) -> Iterator[Task]:
    generator = np.random.default_rng(0)
    for number in range(count):
        names = [(f"a{k:02d}.{side}", shape) for k in range(ADAPTERS) for side, shape in SHAPES.items()]
        tensors = {
            name: RawTensor("F32", shape, generator.standard_normal(shape, np.float32).tobytes())
            for name, shape in names
        }
        record: dict[str, Any] = {
            "format": "pear-task/1", "task": f"t{number:05d}", "activation": "relu", "head": None, "labels": [],
            "backbone": {"model": "vit_base_patch16_224", "digest": "sha256:" + "0" * 64},
            "adapters": {f"a{k:02d}": {side: f"a{k:02d}.{side}" for side in SHAPES} for k in range(ADAPTERS)},
            "positions": {f"blocks.{k // 2}.{('mlp', 'attn')[k % 2]}": [[f"a{k:02d}", 1.0]] for k in range(ADAPTERS)},
            "preprocess": {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9,
                           "interpolation": "bicubic", "crop_mode": "center"}, "metrics": {}, "training": {},
        }  # fmt: skip
        yield make_task(record, tensors)


def measured(*command: str | Path) -> dict[str, Any]:
    """Seconds and peaks of memory of a command, in bytes."""
    peaks = {"RssAnon": 0, "VmHWM": 0}
    start = time.perf_counter()
    with subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                break
            for name, _, text in (line.partition(":") for line in lines):
                if name in peaks:
                    peaks[name] = max(peaks[name], int(text.split()[0]) * 1024)
            time.sleep(0.02)
    if process.returncode:
        raise click.ClickException(f"{command}: exit code {process.returncode}")
    found = {"seconds": time.perf_counter() - start, "anonymous": peaks["RssAnon"], "resident": peaks["VmHWM"]}
    click.echo(f"{command[1]}: {json.dumps(found)}", err=True)
    return found


@click.command(help=__doc__)
@click.option("--gigabytes", default=20.0, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(gigabytes: float, work: Path, out: Path | None) -> None:
    count = round(gigabytes * 1e9 / TASK_BYTES)
    command = BIN / "pear-store"
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = Path(name)
        with Store.create(folder / "store") as store:
            for _ in store.add_many(make_tasks(count)):
                pass
            stored_bytes = store.stats().stored_bytes
        here = ("--store", folder / "store")
        subprocess.run([command, "remote", "init", "origin", folder / "remote", *here], check=True)
        rows = {"push": measured(command, "push", *here)}
        shutil.rmtree(folder / "store")
        rows["clone"] = measured(command, "clone", folder / "remote", folder / "clone")
        rows["remote verify"] = measured(command, "remote", "verify", "--store", folder / "clone")
        result = {
            "command": f"python -m benchmarks.store.remote_memory --gigabytes {gigabytes:g}",
            "machine": machine(folder),
            "python": platform.python_version(),
            "tasks": count,
            "stored_bytes": stored_bytes,
            "rows": rows,
        }
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")
    click.echo(json.dumps(result["rows"], indent=1))


if __name__ == "__main__":
    main()
