#!/usr/bin/env python3
"""The router on a GPU: ViT-B/16, rank 8, one task and mixes of 16 and 64 at batches of 1, 16 and 256.

As CUDA graphs (small batches; also from two threads), eager with the plain op, eager with the Triton kernel, and
compiled; PEFT and AdapterHub beside them. Contestants of a batch size take turns; figures are medians over the bare
backbone's, eager or compiled. The bare backbone is there as a CUDA graph, too.

    python -m benchmarks.router.gpu --out benchmarks/results/router_gpu.json
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch

from benchmarks.router.peers import (
    LINEARS_24,
    LINEARS_48,
    adapterhub_model,
    go_where_adapterhub_is,
    hf_vit,
    make_tasks,
    peft_model,
    vit,
)
from router import Router, kernels, load_backbone

NAMES = [f"t{i}" for i in range(64)]
BATCHES = (1, 16, 256)
Call = Callable[[int], object]
"""Runs that many images."""


@contextmanager
def op(fused: bool | None) -> Any:
    """Takes the plain op, or the Triton kernel, whatever is faster; None leaves the choice to the router."""
    if fused is None:
        yield
        return
    asked = []

    def fused_is_faster(*_: object) -> bool:
        asked.append(1)
        return fused

    with mock.patch.object(kernels, "_fused_is_faster", fused_is_faster):
        yield
    if fused and not asked:
        raise click.ClickException("the router never asked for the Triton kernel: this figure would be the plain op's")


def rows(tasks: int, batch: int) -> list[str]:
    return [NAMES[i % tasks] for i in range(batch)]


def contestants(dtype: torch.dtype, missing: str | None, ours: bool) -> dict[str, tuple[str, Call]]:
    """Of each: the bare one that it is over, and the call."""
    images = torch.randn(max(BATCHES), 3, 224, 224, device="cuda", dtype=dtype)
    backbone = load_backbone(vit())
    tasks = make_tasks(backbone, "blocks", NAMES)
    bare = vit().to("cuda", dtype)
    compiled_bare = torch.compile(bare, dynamic=False)
    found: dict[str, tuple[str, Call]] = {
        "bare": ("bare", lambda n: bare(images[:n])),
        "bare, CUDA graph": ("bare, CUDA graph", graphed(bare, images)),
        "bare, compiled": ("bare, compiled", lambda n: compiled_bare(images[:n])),
    }

    def add_pear(mode: str, over: str, fused: bool | None, compile: bool = False, graphs: bool = False) -> None:
        router = Router(backbone, device="cuda", dtype=dtype, compile=compile, graphs=graphs)
        for task in tasks:
            router.add(task)

        def run(count: int, n: int) -> None:
            with op(fused):
                router.run(images[:n], rows(count, n))

        for count in (1, 16, 64):
            title = "one task" if count == 1 else f"{count} tasks"
            found[f"pear {mode}, {title}"] = (over, partial(run, count))
        if graphs:
            pool = ThreadPoolExecutor(2)

            def run_two(n: int) -> None:
                """Two batches of 16 tasks at once: half of its time is a batch's."""
                for done in [pool.submit(torch.inference_mode()(run), 16, n) for _ in range(2)]:
                    done.result()

            found["pear graphs, 16 tasks, two batches from two threads"] = (over, run_two)

    def run_peft(model: Any, count: int, n: int) -> object:
        return model(images[:n], adapter_names=rows(count, n))

    add_pear("graphs", "bare", fused=None, graphs=True)
    add_pear("eager", "bare", fused=False)
    add_pear("triton", "bare", fused=True)
    add_pear("compiled", "bare, compiled", fused=False, compile=True)
    for title, pattern in () if ours else (("48 linears", LINEARS_48), ("24 linears", LINEARS_24)):
        model = peft_model(pattern, bare, NAMES)
        for count in (16, 64):
            found[f"peft {title}, {count} tasks"] = ("bare", partial(run_peft, model, count))
    if not missing and not ours:
        from adapters.composition import BatchSplit

        hf_bare = hf_vit().to("cuda", dtype)
        found["hf bare"] = ("hf bare", lambda n: hf_bare(pixel_values=images[:n]))
        split = adapterhub_model("bottleneck", hf_bare, dtype, NAMES).to("cuda")

        def run_split(n: int, count: int) -> None:
            parts = min(n, count)
            split.active_adapters = BatchSplit(*NAMES[:parts], batch_sizes=[n // parts] * parts)
            split(pixel_values=images[:n])

        for count in (16, 64):
            found[f"adapterhub BatchSplit, {count} tasks"] = ("hf bare", partial(run_split, count=count))
    return found


def graphed(bare: torch.nn.Module, images: torch.Tensor) -> Call:
    """The bare backbone as a CUDA graph for each batch size, given images that lie in its memory already."""
    graphs: dict[int, Any] = {}

    def run(n: int) -> None:
        if n not in graphs:
            with torch.cuda.stream(torch.cuda.Stream()):
                bare(images[:n])
            torch.cuda.synchronize()
            graphs[n] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[n]):
                bare(images[:n])
        graphs[n].replay()

    return run


def measure(calls: dict[str, tuple[str, Call]], batch: int, repeats: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    refused: dict[str, str] = {}
    for name, (_, call) in calls.items():
        try:
            for _ in range(3):  # compiles, measures, fills slots
                call(batch)
        except click.ClickException as error:
            refused[name] = error.message
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    for turn in range(repeats):
        order = list(calls)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            if name not in refused:
                torch.cuda.synchronize()
                began = time.perf_counter()
                calls[name][1](batch)
                torch.cuda.synchronize()
                times[name].append(1000 * (time.perf_counter() - began))
    medians = {name: statistics.median(found) for name, found in times.items() if found}
    return {
        name: {"median_ms": round(m, 4), "throughput_over_its_bare": round(medians[calls[name][0]] / m, 4)}
        for name, m in medians.items()
    } | {name: {"refused": why} for name, why in refused.items()}


@click.command(help=__doc__)
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--dtype", default="bfloat16", show_default=True, type=click.Choice(["bfloat16", "float16", "float32"]))
@click.option("--repeats", default=30, show_default=True, type=click.IntRange(1))
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1, max(BATCHES)), help="Instead of all three.")
@click.option("--ours", is_flag=True, help="Without PEFT and AdapterHub.")
@click.option("--environment", default="runs/peers", show_default=True, type=click.Path(path_type=Path))
def main(out: Path, dtype: str, repeats: int, batches: tuple[int, ...], ours: bool, environment: Path) -> None:
    if not torch.cuda.is_available():
        raise click.ClickException("no CUDA GPU here: nothing is measured")
    missing = None if ours else go_where_adapterhub_is(environment)
    packages = ("torch", "timm", "peft", "triton", *(() if missing or ours else ("adapters", "transformers")))
    report: dict[str, Any] = {
        "command": " ".join(["python", "-m", "benchmarks.router.gpu", *sys.argv[1:]]),
        "machine": {"gpu": torch.cuda.get_device_name(), "cpu": platform.machine()},
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "dtype": dtype,
        "repeats": repeats,
        "adapterhub_not_run": missing,
        "figures": {},
    }
    with torch.inference_mode():
        calls = contestants(getattr(torch, dtype), missing, ours)
        for batch in batches or BATCHES:
            print(f"batch {batch}", file=sys.stderr)
            report["figures"][f"batch {batch}"] = measure(calls, batch, repeats)
            out.write_text(json.dumps(report, indent=1) + "\n")  # a time limit may end what follows
    print(json.dumps(report["figures"], indent=1))


if __name__ == "__main__":
    main()
