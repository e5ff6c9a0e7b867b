"""Memory of the process that runs pear-infer --ray, over a long list of tiny images.

    python -m benchmarks.cluster.memory --rows 2000000 --out benchmarks/results/cluster_memory.json

The list names 100 pictures of 16 pixels and two tasks that take images of 16 pixels, so a forward takes next to nothing
and the process that plans and writes is at its limit. Its resident memory is read twice a second, and put down for each
tenth of the run, beside a run of a hundredth of the rows.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from benchmarks.router.peers import machine, make_tasks
from pear_store import Store, make_task
from router import load_backbone

PICTURES, TASKS = 100, 2


def make_files(work: Path) -> None:
    backbone = load_backbone("pear_tiny")
    with Store.create(work / "store") as store:
        for task in make_tasks(backbone, "blocks", [f"task{i}" for i in range(TASKS)]):
            preprocess = {**task.record["preprocess"], "input_size": [3, 16, 16]}
            store.add(make_task({**task.record, "preprocess": preprocess}, task.tensors))
    rng = np.random.default_rng(0)
    for i in range(PICTURES):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(work / f"{i}.png")


def resident_mib(process: int) -> float:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def run(work: Path, rows: int, workers: int) -> dict[str, Any]:
    listed = work / f"{rows}.csv"
    with listed.open("w") as file:
        file.write("image,task\n")
        file.writelines(f"{i % PICTURES}.png,task{i // PICTURES % TASKS}\n" for i in range(rows))
    command = [
        sys.executable, "-m", "router.infer", str(listed), str(work / f"out{rows}"), "--store", str(work / "store"),
        "--batch-size", "512", "--json", "--ray", "--workers", str(workers), "--cpus-per-worker", "1",
    ]  # fmt: skip
    seen: list[tuple[float, float]] = []
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        while process.poll() is None:
            seen.append((time.perf_counter() - began, resident_mib(process.pid)))
            time.sleep(0.5)
        assert process.stdout is not None
        report = json.loads(process.stdout.read())
    assert (report["predictions"], report["errors"]) == (rows, 0), report
    ended = seen[-1][0]
    tenths = [max((mib for at, mib in seen if i <= 10 * at / ended <= i + 1), default=0.0) for i in range(10)]
    kept = ("seconds", "images_per_s", "start_s", "list_s", "read_s", "decode_s", "transfer_s", "device_s", "write_s")
    return {"rows": rows, "peak_mib": max(mib for _, mib in seen), "mib_by_tenth": tenths,
            **{key: report[key] for key in kept}}  # fmt: skip


@click.command(help=__doc__)
@click.option("--rows", default=2_000_000, show_default=True, type=click.IntRange(10_000))
@click.option("--workers", default=os.cpu_count() or 1, show_default=True, type=click.IntRange(1))
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False))
def main(rows: int, workers: int, out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder))
        runs = [run(Path(folder), count, workers) for count in (rows // 100, rows)]
    report = {
        "command": f"python -m benchmarks.cluster.memory --rows {rows} --workers {workers} --out {out}",
        "machine": machine(),
        "versions": {name: version(name) for name in ("ray", "torch", "pyarrow")}
        | {"python": platform.python_version()},
        "runs": runs,
    }
    out.write_text(json.dumps(report, indent=1) + "\n")
    click.echo(json.dumps(runs))


if __name__ == "__main__":
    main()
