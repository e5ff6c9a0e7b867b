#!/usr/bin/env python3
"""Whether a change made anything slower: two commits of this project, measured in turn in one session.

The commit before is checked out into a temporary directory. Every measurement is a fresh process, which imports one of
the two. Rounds alternate: before, after; after, before; and so on. The same files are read by both; the commit before
makes them. A ratio is after over before: the median over the rounds, with the 95 % interval of 2,000 bootstrap samples
of the rounds.

    python -m benchmarks.before_after --before main --out runs/before_after.json

    bulk add    all tasks into a new store, seconds a task; and what processors worked for it, which other work and a
                busy disk change less
    one add     one more task, median of several
    hot read    a task that was read before
    verify      the whole store, seconds a task
    gc          after half of the tasks were removed, seconds a task
    cold read   opening a store and reading tasks, with the page cache dropped (all of it as root, else the store's)
    mixed       a batch of normalised images on pear_tiny, each with a task of its own, best of several
    files       the same of image files, decoding included
    one task    the batch, all of one task
    run_all     one image through all tasks
    help        `pear-store --help`, a process
    training    a task of 512 images on pear_tiny, 4 epochs, read, pruned, judged and written
"""

import contextlib
import io
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image
from tabulate import tabulate

HERE = Path(__file__).resolve().parents[1]
SINGLES, COLD, IMAGES, CALLS = 20, 200, 16, 7
"""Tasks added one by one; tasks read cold; images in a batch; calls of which the best counts."""
Figures = dict[str, float]


# ---- in a process that imports one of the commits -----------------------------------------------


def record(name: str, model: str, digest: str, width: int, adapters: int, classes: int) -> dict[str, Any]:
    return {
        "format": "pear-task/1", "task": name, "backbone": {"model": model, "digest": digest}, "activation": "identity",
        "adapters": {f"a{i}": {"down": f"a{i}.down", "up": f"a{i}.up"} for i in range(adapters)},
        "positions": {f"blocks.{i}.attn": [[f"a{i}", 1.0]] for i in range(adapters)},
        "head": {"weight": "head.weight", "bias": "head.bias"}, "labels": [f"class {i}" for i in range(classes)],
        "preprocess": {"input_size": [3, 48, 48], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic",
                       "crop_pct": 1.0, "crop_mode": "squash"},
        "metrics": {}, "training": {"width": width},
    }  # fmt: skip


def make_tasks(folder: Path, count: int, model: str, digest: str, width: int, classes: int = 10) -> None:
    """Tasks of six adapters of rank 4. Each has half of its adapters in common with the task before."""
    from pear_store import RawTensor, make_task, write_checkpoint

    def floats(*shape: int) -> RawTensor:
        return RawTensor("F32", shape, generator.standard_normal(shape, np.float32).tobytes())

    generator = np.random.default_rng(0)
    folder.mkdir()
    pairs = [(floats(width, 4), floats(4, width)) for _ in range(6)]
    for number in range(count):
        for i in range(number % 2, 6, 2):
            pairs[i] = (floats(width, 4), floats(4, width))
        tensors = {f"a{i}.{side}": pairs[i][k] for i in range(6) for k, side in enumerate(("down", "up"))}
        tensors |= {"head.weight": floats(classes, width), "head.bias": floats(classes)}
        made = make_task(record(f"{folder.name}-{number:05}", model, digest, width, 6, classes), tensors)
        write_checkpoint(folder / f"{number:05}.safetensors", made)


def prepare(work: Path, tasks: int) -> Figures:
    """Makes what both commits read: checkpoints, two stores and images."""
    from pear_store import Store
    from router import load_backbone

    make_tasks(work / "bulk", tasks, "pear_tiny", "sha256:" + "0" * 64, 48)
    make_tasks(work / "ones", SINGLES, "pear_tiny", "sha256:" + "0" * 64, 48)
    backbone = load_backbone("pear_tiny")
    make_tasks(work / "routed", IMAGES, backbone.name, backbone.digest, 192)
    for name in ("bulk", "routed"):
        with Store.create(work / f"{name}.store") as store:
            for _ in store.add_many([str(file) for file in sorted((work / name).iterdir())]):
                pass
    generator = np.random.default_rng(0)
    for i in range(IMAGES):
        Image.fromarray(generator.integers(0, 255, (240, 320, 3), np.uint8)).save(work / f"{i}.jpg")
    images, targets = generator.integers(0, 120, (512, 48, 48, 3)), np.arange(512) % 3
    images[np.arange(512), :, :, targets] += 100
    images, few = images.astype(np.uint8), slice(96)
    np.savez(work / "train.npz", x_train=images, x_val=images[few], x_test=images[few],
             y_train=targets, y_val=targets[few], y_test=targets[few])  # fmt: skip
    return {}


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def processor_s() -> float:
    """Processors' time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def measure_store(work: Path, tasks: int) -> Figures:
    from pear_store import Store
    from pear_store.cli import main as command

    files = [str(file) for file in sorted((work / "bulk").iterdir())]
    names = [f"bulk-{number:05}" for number in range(tasks)]
    with tempfile.TemporaryDirectory(dir=work) as folder:
        path = Path(folder) / "store"
        with Store.create(path) as store:
            worked = processor_s()
            bulk = seconds(lambda: list(store.add_many(files)))
            worked = processor_s() - worked
            one = statistics.median(seconds(partial(store.add, file)) for file in sorted((work / "ones").iterdir()))
            order = random.Random(0).sample(names, tasks)
            hot = [seconds(lambda: [store.get(name) for name in order]) for _ in range(3)]
        with contextlib.redirect_stdout(io.StringIO()):
            verify = seconds(lambda: run_command(command, ["--store", str(path), "verify"]))
        with Store(path) as store:
            store.remove(*names[::2])
            gc = seconds(store.gc)
    found = {"bulk add": bulk, "bulk add, CPU": worked, "hot read": min(hot[1:]), "verify": verify, "gc": gc}
    return {**{name: figure / tasks for name, figure in found.items()}, "one add": one}


def run_command(command: Any, words: list[str]) -> None:
    try:
        code = command.main(words, standalone_mode=False)
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    if code:
        raise click.ClickException(f"{' '.join(words)}: exit code {code}")


def measure_cold(work: Path, tasks: int) -> Figures:
    from pear_store import Store

    def read(names: list[str]) -> None:
        with Store(work / "bulk.store") as store:
            for name in names:
                store.get(name)

    names = [f"bulk-{number:05}" for number in random.Random(1).sample(range(tasks), min(COLD, tasks))]
    read(names[:1])  # imports what it needs
    drop_page_cache(work / "bulk.store")
    return {"cold read": seconds(lambda: read(names)) / len(names)}


def drop_page_cache(folder: Path) -> None:
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    with contextlib.suppress(OSError):  # not root, or a container's
        Path("/proc/sys/vm/drop_caches").write_text("1")


def measure_router(work: Path, _: int) -> Figures:
    import torch

    from router import Router

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    names = [f"routed-{i:05}" for i in range(IMAGES)]
    images = torch.randn(IMAGES, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    files = [str(work / f"{i}.jpg") for i in range(IMAGES)]
    with Router("pear_tiny", work / "routed.store") as router:
        router.run(images, names)
        router.run(files, names)
        router.run_all(images[:1], names)
        calls = {
            "mixed": lambda: router.run(images, names),
            "files": lambda: router.run(files, names),
            "one task": lambda: router.run(images, names[0]),
            "run_all": lambda: router.run_all(images[:1], names),
        }
        return {name: min(seconds(call) for _ in range(CALLS)) for name, call in calls.items()}


def measure_help(_: Path, __: int) -> Figures:
    command = [sys.executable, "-P", "-c", "from pear_store.cli import main; main(['--help'])"]
    return {
        "help": min(seconds(lambda: subprocess.run(command, check=True, capture_output=True)) for _ in range(CALLS))
    }


def measure_training(work: Path, _: int) -> Figures:
    import torch

    from pear_train.cli import main as command

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory(dir=work) as folder, contextlib.redirect_stdout(io.StringIO()):
        words = ["t", "--data", str(work / "train.npz"), "--backbone", "pear_tiny", "--img-size", "48", "--json"]
        first, second = ([*words, "--epochs", str(epochs), "--out", f"{folder}/{epochs}"] for epochs in (2, 4))
        run_command(command, first)  # imports what it needs
        return {"training": seconds(lambda: run_command(command, second))}


MEASURES = {
    "store": measure_store, "cold": measure_cold, "router": measure_router, "help": measure_help,
    "training": measure_training,
}  # fmt: skip


# ---- in the process that compares ---------------------------------------------------------------


def child(tree: Path, what: str, work: Path, tasks: int) -> Figures:
    """What a fresh process measures that imports the project from `tree`."""
    command = [
        sys.executable,
        "-P",  # without this file's folder, whose router/ is not the project's
        str(Path(__file__).resolve()),
        "--child",
        what,
        "--work",
        str(work),
        "--tasks",
        str(tasks),
    ]
    environment = {**os.environ, "PYTHONPATH": str(tree), "BEFORE_AFTER_TREE": str(tree)}
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise click.ClickException(f"{what} of {tree}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def compared(before: list[float], after: list[float]) -> dict[str, Any]:
    """Both commits' best and median, and the ratio of the medians with its interval."""

    def ratio(rounds: list[int]) -> float:
        return statistics.median(after[i] for i in rounds) / statistics.median(before[i] for i in rounds)

    count = len(before)
    chance = random.Random(0)
    samples = sorted(ratio(chance.choices(range(count), k=count)) for _ in range(2000))
    return {
        "before_best_s": min(before), "after_best_s": min(after), "best_ratio": min(after) / min(before),
        "before_median_s": statistics.median(before), "after_median_s": statistics.median(after),
        "ratio": ratio(list(range(count))), "low": samples[49], "high": samples[1949],
        "before_s": before, "after_s": after,
    }  # fmt: skip


def git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(HERE), *words], check=True, capture_output=True, text=True).stdout.strip()


def machine(work: Path) -> dict[str, Any]:
    cpu = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
    file_system = subprocess.run(["df", "--output=fstype", work], capture_output=True, text=True).stdout.split()[-1]
    return {"cpu": cpu or platform.machine(), "cores": len(os.sched_getaffinity(0)), "file_system": file_system,
            "kernel": platform.release(), "root": os.geteuid() == 0}  # fmt: skip


def compare(before: str, work: Path, tasks: int, rounds: int, only: tuple[str, ...]) -> dict[str, Any]:
    load = [os.getloadavg()]
    tree = work / "before"
    git("worktree", "add", "--detach", str(tree), before)
    try:
        child(tree, "prepare", work, tasks)
        found: dict[str, dict[str, list[float]]] = {"before": {}, "after": {}}
        for turn in range(rounds):
            sides = [("before", tree), ("after", HERE)]
            for what in only or tuple(MEASURES):
                for side, where in sides if turn % 2 == 0 else sides[::-1]:
                    for name, value in child(where, what, work, tasks).items():
                        found[side].setdefault(name, []).append(value)
            click.echo(f"round {turn + 1} of {rounds}", err=True)
        commits = {"before": git("rev-parse", before), "after": git("rev-parse", "HEAD")}
    finally:
        git("worktree", "remove", "--force", str(tree))
    return {
        "command": "python -m benchmarks.before_after " + " ".join(sys.argv[1:]),
        "commits": {**commits, "changed_since": git("status", "--porcelain", "--untracked-files=no").splitlines()},
        "machine": machine(work), "load": [*load, os.getloadavg()],
        "versions": {"python": platform.python_version(),
                     **{name: version(name) for name in ("torch", "timm", "lmdb", "numpy", "pillow", "safetensors")}},
        "tasks": tasks, "rounds": rounds,
        "measured": {name: compared(values, found["after"][name]) for name, values in found["before"].items()},
    }  # fmt: skip


@click.command(help=__doc__)
@click.option("--before", help="The commit, branch or tag to compare with; after is this checkout as it is.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Where the JSON goes.")
@click.option("--tasks", default=2000, show_default=True, type=click.IntRange(2), help="Tasks in the store.")
@click.option("--rounds", default=16, show_default=True, type=click.IntRange(2), help="An even number is fair.")
@click.option("--only", multiple=True, type=click.Choice(list(MEASURES)), help="Give it again for more.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs"), show_default=True)
@click.option("--child", "what", type=click.Choice([*MEASURES, "prepare"]), hidden=True)
def main(
    before: str | None, out: Path | None, tasks: int, rounds: int, only: tuple[str, ...], work: Path, what: str | None
) -> None:
    if what is not None:
        tree = Path(os.environ["BEFORE_AFTER_TREE"])
        for package in ("pear_store", "router"):
            spec = find_spec(package)
            assert spec and spec.origin, f"no {package}"
            assert Path(spec.origin).is_relative_to(tree), f"{spec.origin} is not of {tree}"
        click.echo(json.dumps({"prepare": prepare, **MEASURES}[what](work, tasks)))
        return
    if before is None or out is None:
        raise click.UsageError("--before and --out are needed")
    work.mkdir(parents=True, exist_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=work.absolute()))
    try:
        result = compare(before, folder, tasks, rounds, only)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    rows = [
        [name, *(1e3 * row[key] for key in ("before_best_s", "after_best_s")), row["best_ratio"],
         *(1e3 * row[key] for key in ("before_median_s", "after_median_s")), row["ratio"],
         f"{row['low']:.3f} to {row['high']:.3f}"]
        for name, row in result["measured"].items()
    ]  # fmt: skip
    headers = ["", "best before, ms", "after", "ratio", "median before, ms", "after", "ratio", "95 %"]
    click.echo(tabulate(rows, headers, floatfmt=".3f"))


if __name__ == "__main__":
    main()
