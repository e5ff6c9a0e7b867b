#!/usr/bin/env python3
"""How the store behaves at 100,000 tasks: add, list, show, get, gc and add again.

    python -m benchmarks.store.scale --out benchmarks/results/store_scale.json

Tasks have 10 tensors of 256 to 512 bytes; 60 % of them are drawn from a common pool of 2,000. Adds go through
Store.add_many from tasks in memory (so the checkpoint's parsing is not in the clock, hashing is), in runs of 5,000.
"""

import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import click

from pear_store import RawTensor, Store, Task, make_task

RUN = 5_000
TARGETS = {"add_end_over_start": ">= 0.5", "gc_s": "< 10", "add_after_gc_over_start": ">= 0.7"}


def make_tasks(first: int, count: int) -> Iterator[Task]:
    """Tasks of 5 adapters at 5 positions; which tensors are shared is drawn by the task's number."""
    for number in range(first, first + count):
        rng = random.Random(number)
        tensors, adapters = {}, {}
        for k in range(5):
            for side, shape in (("down", (16, 4)), ("up", (4, 32))):
                shared = rng.random() < 0.6
                source = random.Random(f"pool {side} {rng.randrange(1000)}") if shared else rng
                # exponents stay small: finite numbers, whatever the bits
                data = bytes(
                    byte & 0x3F if i % 4 == 3 else byte
                    for i, byte in enumerate(source.randbytes(4 * shape[0] * shape[1]))
                )
                tensors[f"a{k}.{side}"] = RawTensor("F32", shape, data)
            adapters[f"a{k}"] = {"down": f"a{k}.down", "up": f"a{k}.up"}
        yield make_task(record(f"task-{number:06}", adapters), tensors)


def record(name: str, adapters: dict[str, dict[str, str]]) -> dict[str, object]:
    preprocess = {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic",
                  "crop_pct": 0.9, "crop_mode": "center"}  # fmt: skip
    return {
        "format": "pear-task/1", "task": name, "backbone": {"model": "vit", "digest": "sha256:" + "0" * 64},
        "activation": "identity", "adapters": adapters,
        "positions": {f"blocks.{k}.attn": [[adapter, 1.0]] for k, adapter in enumerate(adapters)},
        "head": None, "labels": [], "preprocess": preprocess, "metrics": {}, "training": {},
    }  # fmt: skip


def memory_bytes() -> int:
    """Memory of this process that is its own, without the file pages it maps."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024


def add_run(store: Store, first: int, count: int = RUN) -> dict[str, float]:
    tasks = list(make_tasks(first, count))
    start = time.perf_counter()
    for _ in store.add_many(tasks):
        pass
    seconds = time.perf_counter() - start
    return {"tasks": first + count, "tasks_per_s": count / seconds}


def reads(store: Store, path: Path, count: int) -> dict[str, float]:
    """Seconds of one read each, and of listing all; commands as a user runs them."""
    rng = random.Random(count)
    names = [f"task-{rng.randrange(count):06}" for _ in range(500)]
    times = []
    for name in names:
        start = time.perf_counter()
        store.get(name)
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    listed = sum(1 for _ in store.iter_tasks())
    ls_s = time.perf_counter() - start
    start = time.perf_counter()
    subprocess.run(
        [str(Path(sys.executable).with_name("pear-store")), "--store", str(path), "show", names[0]],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    show_s = time.perf_counter() - start
    assert listed == count
    return {
        "tasks": count,
        "get_median_s": statistics.median(times),
        "ls_per_task_s": ls_s / listed,
        "show_command_s": show_s,
    }


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--tasks", default=100_000, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/store_scale"), show_default=True)
def main(out: Path, tasks: int, work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        measure(out, tasks, Path(folder) / "store")


def measure(out: Path, tasks: int, path: Path) -> None:
    adds, read, done = [], [], 0
    with Store.create(path) as store:
        while done < tasks:
            adds.append(add_run(store, done))
            done += RUN
            click.echo(f"{done}: {adds[-1]['tasks_per_s']:.0f} tasks/s", err=True)
            if done in (RUN, tasks // 2, tasks):
                read.append(reads(store, path, done))
        stats = store.stats()
        names = [f"task-{number:06}" for number in range(0, tasks, 2)]
        start = time.perf_counter()
        store.remove(*names)
        remove_s = time.perf_counter() - start
        before = memory_bytes()
        start = time.perf_counter()
        plan = store.gc(dry_run=True)
        mark_s = time.perf_counter() - start
        start = time.perf_counter()
        result = store.gc()
        gc_s = time.perf_counter() - start
        after = memory_bytes()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        again = add_run(store, tasks)
    rates = [one["tasks_per_s"] for one in adds]
    first, last = statistics.median(rates[:3]), statistics.median(rates[-3:])
    figures = {
        "add_end_over_start": last / first,
        "gc_s": gc_s,
        "add_after_gc_over_start": again["tasks_per_s"] / first,
        "get_end_over_start": read[-1]["get_median_s"] / read[0]["get_median_s"],
        "ls_per_task_end_over_start": read[-1]["ls_per_task_s"] / read[0]["ls_per_task_s"],
    }
    found = {
        "command": "python -m benchmarks.store.scale " + " ".join(sys.argv[1:]),
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version(),
                    "lmdb": version("lmdb")},
        "figures": figures, "targets": TARGETS,
        "adds": adds, "reads": read, "remove_s": remove_s, "dry_run_s": mark_s, "gc": vars(result), "plan": vars(plan),
        "stats_before_gc": vars(stats),
        "memory": {"before_gc_bytes": before, "after_gc_bytes": after, "peak_rss_with_maps_bytes": peak},
    }  # fmt: skip
    out.write_text(json.dumps(found, indent=1) + "\n")
    draw(adds, again, out.with_suffix(".png"))
    for name, value in figures.items():
        click.echo(f"{name:<28} {value:8.3f}  {TARGETS.get(name, '')}")


def draw(adds: list[dict[str, float]], again: dict[str, float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axes.plot([one["tasks"] for one in adds], [one["tasks_per_s"] for one in adds], "o-", label="add")
    axes.plot([adds[-1]["tasks"]], [again["tasks_per_s"]], "s", label="add after gc of half")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tasks in the store")
    axes.set_ylabel("tasks added a second")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
