"""What Ray Serve costs a request: an application of one replica beside one pear-serve.

    python -m benchmarks.cluster.serve --out benchmarks/results/cluster_serve.json

Both serve the same 20 random tasks of pear_tiny, at 48 pixels, in a process of one thread. The load is that of
benchmarks/serve/load.py: JPEGs over loopback, 1, 4 and 16 clients that ask again as soon as they are answered. Rounds
take turns. `cpu_ms` is what the server's processes took of the processors for each request: with Ray Serve its proxy,
its controller and the rest of Ray, too. Both run all the time, so what Ray's idle processes take is in both.
"""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from benchmarks.router.peers import machine, make_tasks
from pear_store import Store, make_task
from router import load_backbone

NAMES = [f"t{i}" for i in range(20)]
CLIENTS = (1, 4, 16)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}


def make_files(work: Path, names: list[str] = NAMES) -> None:
    backbone = load_backbone("pear_tiny")
    with Store.create(work / "store") as store:
        for task in make_tasks(backbone, "blocks", names):
            preprocess = {**task.record["preprocess"], "input_size": [3, 48, 48]}
            store.add(make_task({**task.record, "preprocess": preprocess}, task.tensors))
    rng = np.random.default_rng(0)
    for i in range(16):
        Image.fromarray(rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(work / f"{i}.jpg")


@contextmanager
def plain(work: Path) -> Iterator[tuple[int, int]]:
    """The port of a pear-serve, and its process."""
    command = [sys.executable, "-m", "router.serve", "--store", str(work / "store"), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stderr is not None
        try:
            lines = iter(process.stderr.readline, "")
            port = next(int(found[1]) for line in lines if (found := re.search(r"serving on http://.*:(\d+)", line)))
            yield port, process.pid
        finally:
            process.terminate()


@contextmanager
def on_ray(work: Path, **settings: Any) -> Iterator[tuple[int, int]]:
    """The port of an application of Ray Serve, and the process that started Ray."""
    every = {"backbone": "pear_tiny", "store": str(work / "store"), "no_auth": True, **settings}
    command = [sys.executable, "-m", "tests.helpers.served", "local"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, env=ENVIRONMENT, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(every) + "\n")
            process.stdin.flush()
            yield int(process.stdout.readline()), process.pid
        finally:
            process.stdin.close()


def load(work: Path, port: int, process: int, clients: int, seconds: float, **more: Any) -> dict[str, Any]:
    """What clients that ask all the time get.

    Args:
        more: of the stream (benchmarks/serve/load.py), such as its tasks and their weights.
    """
    stream = {"path": "/v1/tasks/TASK/predict", "tasks": NAMES, "connections": clients, **more}
    plan = {"port": port, "images": str(work), "seconds": seconds, "warm_s": 2, "server_pid": process,
            "streams": {"all": stream}}  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.serve.load"]
    done = subprocess.run(command, input=json.dumps(plan), stdout=subprocess.PIPE, check=True, text=True)
    found = json.loads(done.stdout)
    times = found["streams"]["all"]["seconds"]
    assert set(found["streams"]["all"]["statuses"]) == {"200"}, found["streams"]["all"]["statuses"]
    return {
        "rate": round(found["streams"]["all"]["rate"], 1),
        "median_ms": round(1000 * statistics.median(times), 2),
        "p99_ms": round(1000 * float(np.quantile(times, 0.99)), 2),
        "cpu_ms": round(1000 * found["server_cpu_s"] / len(times), 2),
    }


@click.command(help=__doc__)
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--seconds", default=6.0, show_default=True, type=click.FloatRange(1))
def main(out: Path, rounds: int, seconds: float) -> None:
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        work = Path(folder)
        make_files(work)
        servers = {"pear-serve": stack.enter_context(plain(work)), "ray serve": stack.enter_context(on_ray(work))}
        for _ in range(rounds):
            for clients in CLIENTS:
                for name, (port, process) in servers.items():
                    figures = load(work, port, process, clients, seconds)
                    found.setdefault(name, {}).setdefault(f"{clients} clients", []).append(figures)
                    click.echo(f"{name}, {clients} clients: {figures}", err=True)
    medians = {
        name: {
            clients: {key: statistics.median(one[key] for one in runs) for key in runs[0]}
            for clients, runs in cases.items()
        }
        for name, cases in found.items()
    }
    report = {
        "command": f"python -m benchmarks.cluster.serve --out {out} --rounds {rounds} --seconds {seconds:g}",
        "machine": machine(),
        "versions": {name: version(name) for name in ("ray", "torch", "uvicorn", "starlette")}
        | {"python": platform.python_version()},
        "medians": medians,
        "runs": found,
    }
    out.write_text(json.dumps(report, indent=1) + "\n")
    click.echo(json.dumps(medians))


if __name__ == "__main__":
    main()
