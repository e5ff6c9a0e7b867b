"""What other threads that compute cost the one that runs forwards (router/threads.py), on a CPU.

    python -m benchmarks.router.threads --out benchmarks/results/router_threads.json

Times forwards of one image through a bare ViT-B/16 in a thread of a fresh process, where

    alone      no other thread has computed
    teams      two others have, in parallel, and sleep
    side       the same two, made by `side_threads`

Rounds take turns with these three.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import click
import timm
import torch

from benchmarks.router.peers import machine
from router.threads import side_threads

CASES = ("alone", "teams", "side")


def measure(case: str, dtype: torch.dtype, forwards: int) -> float:
    """Median milliseconds."""

    def compute() -> None:
        torch.randn(2000, 2000).add(1).sum()

    def run() -> float:
        model = timm.create_model("vit_base_patch16_224", num_classes=0).to(dtype).eval()
        image = torch.randn(1, 3, 224, 224).to(dtype)
        others = [side_threads(1, "side") if case == "side" else ThreadPoolExecutor(1) for _ in range(2)]
        if case != "alone":
            for pool in others:
                pool.submit(compute).result()
        times = []
        with torch.inference_mode():
            for _ in range(forwards + 3):
                began = time.perf_counter()
                model(image)
                times.append(time.perf_counter() - began)
        return 1000 * statistics.median(times[3:])

    with ThreadPoolExecutor(1) as device:
        return device.submit(run).result()


@click.command(help=__doc__)
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@click.option("--forwards", default=25, show_default=True, type=click.IntRange(1))
@click.option("--case", nargs=2, hidden=True, help="What a fresh process measures: a case and a dtype.")
def main(out: Path, rounds: int, forwards: int, case: tuple[str, str] | None) -> None:
    if case is not None:
        click.echo(measure(case[0], getattr(torch, case[1]), forwards))
        return
    found: dict[str, dict[str, list[float]]] = {}
    for number in range(rounds):
        for dtype in ("bfloat16", "float32"):
            for name in (*CASES[number % 3 :], *CASES[: number % 3]):
                command = [sys.executable, "-m", "benchmarks.router.threads", "--out", str(out)]
                command += ["--forwards", str(forwards), "--case", name, dtype]
                said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found.setdefault(dtype, {}).setdefault(name, []).append(round(float(said), 1))
    medians = {
        dtype: {name: statistics.median(times) for name, times in cases.items()} for dtype, cases in found.items()
    }
    report = {
        "command": f"python -m benchmarks.router.threads --out {out} --rounds {rounds} --forwards {forwards}",
        "machine": machine(), "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": version("torch"), "timm": version("timm")},
        "milliseconds": found, "medians": medians,
    }  # fmt: skip
    out.write_text(json.dumps(report, indent=1) + "\n")
    click.echo(json.dumps(medians, indent=1))


if __name__ == "__main__":
    main()
