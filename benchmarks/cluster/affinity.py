"""What it gains that a task's requests go to one replica of a Ray Serve application.

    python -m benchmarks.cluster.affinity --out benchmarks/results/cluster_affinity.json

Two replicas hold a quarter of 64 random tasks of pear_tiny each. 16 clients ask for tasks by Zipf's law with exponent
0.8, as in section `hits` of benchmarks/serve/fleet.py. Applications with `affinity` "task" and "none" take turns.
`hits` is the share of images whose task was loaded. It comes from the counters of both replicas, after a warm-up.
"""

import json
import platform
import re
import statistics
import tempfile
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from benchmarks.cluster.serve import load, make_files, on_ray
from benchmarks.router.peers import machine
from benchmarks.scale_sim import popularity
from router import Router
from router.cluster.deployment import Affinity

NAMES = [f"t{number:03}" for number in range(64)]
SLOTS, EXPONENT, CLIENTS, REPLICAS = len(NAMES) // 4, 0.8, 16, 2
AFFINITIES: tuple[Affinity, ...] = ("task", "none")


def counters(port: int) -> tuple[float, float]:
    """Images that were answered and tasks that were loaded, by all replicas. Chance says which one is asked."""
    seen: set[tuple[float, float]] = set()
    until = time.monotonic() + 60
    while len(seen) < REPLICAS:
        assert time.monotonic() < until, f"expected {REPLICAS} replicas, found {seen}"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        images = sum(map(float, re.findall(r"^pear_images_total\{.*\} (.+)$", text, re.MULTILINE)))
        loads = sum(map(float, re.findall(r"^pear_slot_loads_total (.+)$", text, re.MULTILINE)))
        seen.add((images, loads))
    return sum(images for images, _ in seen), sum(loads for _, loads in seen)


def measure(work: Path, affinity: Affinity, slot_bytes: int, seconds: float) -> dict[str, float]:
    asked = {"tasks": NAMES, "weights": popularity(len(NAMES), EXPONENT).tolist()}
    settings = {"fewest": REPLICAS, "most": REPLICAS, "slot_bytes": slot_bytes, "refresh_s": 0, "affinity": affinity}
    with on_ray(work, **settings) as (port, process):
        load(work, port, process, CLIENTS, 3, **asked)
        before = counters(port)
        found = load(work, port, process, CLIENTS, seconds, **asked)
        images, loads = (after - first for first, after in zip(before, counters(port), strict=True))
    return {"hits": round(1 - loads / images, 4), "images": images, **found}


@click.command(help=__doc__)
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--seconds", default=10.0, show_default=True, type=click.FloatRange(1))
def main(out: Path, rounds: int, seconds: float) -> None:
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_files(work, NAMES)
        with Router("pear_tiny", work / "store") as router:
            router.preload(NAMES[:1]).result()
            slot_bytes = SLOTS * router.stats().size_bytes
        for turn in range(rounds):
            for affinity in AFFINITIES if turn % 2 == 0 else AFFINITIES[::-1]:
                figures = measure(work, affinity, slot_bytes, seconds)
                found.setdefault(affinity, []).append(figures)
                click.echo(f"{affinity}: {figures}", err=True)
    report: dict[str, Any] = {
        "command": f"python -m benchmarks.cluster.affinity --out {out} --rounds {rounds} --seconds {seconds:g}",
        "machine": machine(),
        "versions": {name: version(name) for name in ("ray", "torch")} | {"python": platform.python_version()},
        "tasks": len(NAMES), "replicas": REPLICAS, "slots": SLOTS, "exponent": EXPONENT, "clients": CLIENTS,
        "medians": {
            name: {key: statistics.median(one[key] for one in runs) for key in runs[0]} for name, runs in found.items()
        },
        "runs": found,
    }  # fmt: skip
    out.write_text(json.dumps(report, indent=1) + "\n")
    click.echo(json.dumps(report["medians"]))


if __name__ == "__main__":
    main()
