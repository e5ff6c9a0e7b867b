"""What routing costs over the bare backbone: mixed batches, one task, merged, loaded tasks, switches, misses, run_all.

    python -m benchmarks.router.speed PART [PART ...] --out benchmarks/results/router_speed.json

A part's figures are written under its name, those of other parts are kept. ViT-B/16 with random weights, normalised
tensors, 2 threads; adapters of rank 8 at the preset `blocks` (24 positions), random, about as small as trained ones.
Everything that is compared runs interleaved in one process, in an order that moves on; times are medians in seconds,
ratios medians over the rounds.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import timm
import torch

from pear_store import Digest, RawTensor, Store, Task
from router import AdaptedBackbone, Backbone, Router, add_branch, choose_positions, load_backbone

MODEL, SIZE, RANK, CLASSES, BLOCKS = "vit_base_patch16_224", 224, 8, 47, 12
Calls = dict[str, Callable[[], object]]
_NOISE = (0.02 * np.random.default_rng(0).normal(size=4_000_000)).astype("<f4").tobytes()


class Tasks:
    """Random tasks, told apart by seed; bytes are slices of one buffer, so that thousands fit into memory."""

    def __init__(self, backbone: Backbone, choice: str = "blocks") -> None:
        self.backbone = backbone
        self.positions = choose_positions(backbone.module, choice)
        adapted = AdaptedBackbone(backbone, torch.device("cpu"), torch.float32)
        adapted.attach(self.positions)
        self.widths = adapted.widths

    def tensor(self, seed: object, *shape: int) -> RawTensor:
        size = 4 * int(np.prod(shape))
        start = 4 * (hash(("s", seed)) % ((len(_NOISE) - size) // 4))
        name = Digest(f"sha256:{hash((seed, shape)) % 2**256:064x}")  # a stand-in: the slots only tell digests apart
        return RawTensor.checked("F32", shape, memoryview(_NOISE)[start : start + size], name)

    def make(self, name: str, seed: int, kinds: Callable[[int], int] | None = None) -> Task:
        """A task; `kinds` gives each block the seed of its adapters, where tasks are to share some."""
        tensors: dict[str, RawTensor] = {}
        for i, position in enumerate(self.positions):
            kind = kinds(int(position.split(".")[1])) if kinds else seed
            d_in, d_out = self.widths[position]
            tensors[f"a{i}.down"] = self.tensor((kind, i, "down"), d_in, RANK)
            tensors[f"a{i}.up"] = self.tensor((kind, i, "up"), RANK, d_out)
        tensors["head.weight"] = self.tensor((seed, "weight"), CLASSES, 768)
        tensors["head.bias"] = self.tensor((seed, "bias"), CLASSES)
        record = {
            "format": "pear-task/1", "task": name, "activation": "identity",
            "backbone": {"model": self.backbone.name, "digest": self.backbone.digest},
            "adapters": {f"a{i}": {"down": f"a{i}.down", "up": f"a{i}.up"} for i in range(len(self.positions))},
            "positions": {position: [[f"a{i}", 1.0]] for i, position in enumerate(self.positions)},
            "head": {"weight": "head.weight", "bias": "head.bias"},
            "labels": [str(i) for i in range(CLASSES)],
            "preprocess": {"input_size": [3, SIZE, SIZE], "mean": [0.5] * 3, "std": [0.5] * 3,
                           "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"},
            "metrics": {}, "training": {},
        }  # fmt: skip
        return Task(record, tensors)


class Times(dict[str, list[float]]):
    """Seconds of each contestant, round by round."""

    def median(self) -> dict[str, float]:
        return {name: statistics.median(found) for name, found in self.items()}

    def ratio(self, one: str, other: str) -> float:
        """Median over the rounds of one's time over the other's."""
        return round(statistics.median(a / b for a, b in zip(self[one], self[other], strict=True)), 4)


def interleaved(calls: Calls, repeats: int) -> Times:
    """All in each round, in an order that moves on by one, after a round that does not count."""
    times = Times({name: [] for name in calls})
    names = list(calls)
    for turn in range(-1, repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            calls[name]()
            if turn >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def outside(router: Router, call: Callable[[], object]) -> float:
    """Share of a call's time that is not the backbone's: branches, gather, index work, heads; median of three.

    Taken within one call, so that it tells a percent where a machine's speed wavers by several.
    """
    shares = []
    for _ in range(3):
        branches = forward = 0.0

        def timed_branch(*args: Any, **options: Any) -> torch.Tensor:
            nonlocal branches
            start = time.perf_counter()
            found = add_branch(*args, **options)
            branches += time.perf_counter() - start
            return found

        def timed_forward(*args: Any, **options: Any) -> torch.Tensor:
            nonlocal forward
            start = time.perf_counter()
            found = AdaptedBackbone.features(router._adapted, *args, **options)
            forward += time.perf_counter() - start
            return found

        with (
            patch("router.adapted.add_branch", timed_branch),
            patch.object(router._adapted, "features", timed_forward),
        ):
            start = time.perf_counter()
            call()
            whole = time.perf_counter() - start
        shares.append((whole - forward + branches) / whole)
    return round(statistics.median(shares), 4)


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        torch.set_num_threads(2)
        torch.manual_seed(0)
        self.args = args
        self.dtype = getattr(torch, args.dtype)
        self.model = timm.create_model(MODEL, num_classes=0).eval()
        self.backbone = load_backbone(self.model)
        self.tasks = Tasks(self.backbone)
        self.bare_model = timm.create_model(MODEL, num_classes=0).eval()
        self.bare_model.load_state_dict(self.model.state_dict())
        self.bare_model.to(self.dtype)
        self.images = torch.randn(args.images, 3, SIZE, SIZE)

    def router(self, tasks: list[Task], **options: Any) -> Router:
        made = Router(self.backbone, dtype=self.dtype, **{"merge": False, **options})
        for task in tasks:
            made.add(task)
        return made

    @torch.inference_mode()
    def bare(self) -> torch.Tensor:
        found: torch.Tensor = self.bare_model(self.images.to(self.dtype))
        return found

    def mixed(self) -> dict[str, Any]:
        """A batch of as many tasks as images, and one task unmerged, over bare."""
        made = [self.tasks.make(f"t{i}", i) for i in range(len(self.images))]
        names = [task.name for task in made]
        router = self.router(made)
        calls: Calls = {
            "mixed": lambda: router.run(self.images, names),
            "one": lambda: router.run(self.images, names[0]),
        }
        return {**self.over_bare(calls), "outside_the_backbone": {n: outside(router, c) for n, c in calls.items()}}

    def merged(self) -> dict[str, Any]:
        """One task at all 48 Linears, merged and unmerged, over bare; and what merging takes."""
        task = Tasks(self.backbone, "linear").make("t", 0)
        merged, unmerged = self.router([task], merge=True), self.router([task])
        with _no_forward(merged):
            start = time.perf_counter()
            merged.run(self.images[:1], "t")
            merge_s = time.perf_counter() - start
        calls: Calls = {
            "merged": lambda: merged.run(self.images, "t"),
            "unmerged": lambda: unmerged.run(self.images, "t"),
        }
        shares = {"merged": outside(merged, calls["merged"]), "unmerged": outside(unmerged, calls["unmerged"])}
        return {**self.over_bare(calls), "outside_the_backbone": shares, "merge_s": merge_s}

    def over_bare(self, calls: Calls) -> dict[str, Any]:
        found = interleaved({"bare": self.bare, **calls}, self.args.repeats)
        ratios = {name: found.ratio("bare", name) for name in calls}
        return {"images": len(self.images), "seconds": found.median(), "throughput_over_bare": ratios}

    def loaded(self) -> dict[str, Any]:
        """A batch of the same tasks where 16, 256 and 4,096 are loaded; and the router's work without the forward."""
        count = len(self.images)
        routers = {}
        for total in (16, 256, 4096):
            made = [self.tasks.make(f"t{i}", i) for i in range(total)]
            routers[total] = self.router(made)
            routers[total].preload([task.name for task in made]).result()
        names = [f"t{i}" for i in range(count)]
        calls: Calls = {str(n): partial(router.run, self.images, names) for n, router in routers.items()}
        found = interleaved(calls, self.args.repeats)
        without = {}
        for total, router in routers.items():
            with _no_forward(router):
                without[str(total)] = interleaved({"run": partial(router.run, self.images, names)}, 50)
        return {
            "images": count, "seconds": found.median(),
            "over_16": {n: found.ratio(n, "16") for n in found},
            "without_forward_s": {n: one.median()["run"] for n, one in without.items()},
            "slot_bytes": {str(n): router.stats().size_bytes for n, router in routers.items()},
        }  # fmt: skip

    def switch(self) -> dict[str, Any]:
        """Switches and misses: the router's work of a call on one image, the backbone's forward left out."""
        with tempfile.TemporaryDirectory() as folder, Store.create(Path(folder) / "s") as store:
            noise = np.random.default_rng(1)
            for i in range(64):
                task = self.tasks.make(f"t{i}", i)
                tensors = {
                    key: RawTensor("F32", t.shape, noise.normal(size=t.shape).astype("<f4").tobytes())
                    for key, t in task.tensors.items()
                }
                store.add(Task(task.record, tensors))
            names = [f"t{i}" for i in range(64)]
            one = self.images[:1]
            router = Router(self.backbone, store, dtype=self.dtype, merge=False)
            router.preload(names).result()
            size = router.stats().size_bytes
            tight = Router(self.backbone, store, dtype=self.dtype, merge=False, slot_bytes=size // 64 * 5 // 2)
            turn, miss = cycle(names), cycle(names)

            def first() -> None:
                tight._registry._known.clear()  # refresh keeps what did not change
                tight._registry._uses.clear()
                tight.run(one, next(miss))

            with _no_forward(router), _no_forward(tight):
                for name in names:  # every page of the store is warm, every digest checked
                    tight.run(one, name)
                found = interleaved(
                    {
                        "same": lambda: router.run(one, "t0"),
                        "switch": lambda: router.run(one, next(turn)),
                        "evicted": lambda: tight.run(one, next(miss)),
                        "looked_up": first,
                    },
                    self.args.repeats * 30,
                ).median()
            return {
                "seconds": found,
                "switch_ms": round(1e3 * (found["switch"] - found["same"]), 4),
                "miss_ms": round(1e3 * (found["evicted"] - found["same"]), 4),
                "miss_with_look_up_ms": round(1e3 * (found["looked_up"] - found["same"]), 4),
                "task_bytes": size // 64,
            }

    def run_all(self) -> dict[str, Any]:
        """16 tasks that share their first k blocks, and a tree of two levels, over the ideal from bare forwards."""
        count = 16
        trees: dict[str, tuple[Callable[[int], Callable[[int], int]], float]] = {}

        def shares_first(k: int, task: int) -> Callable[[int], int]:
            return lambda block: -1 if block < k else task

        for k in (0, 4, 8, 11):
            trees[f"k={k}"] = (partial(shares_first, k), (k + count * (BLOCKS - k)) / BLOCKS)
        # 4 groups of 4: all share 4 blocks, a group shares 4 more
        trees["tree"] = (
            lambda t: lambda block: -1 if block < 4 else -2 - t // 4 if block < 8 else t,
            (4 + 4 * 4 + 4 * count) / BLOCKS,
        )
        calls: Calls = {"16_bare": lambda: [self.bare() for _ in range(count)]}
        for name, (kinds, _) in trees.items():
            made = [self.tasks.make(f"t{t}", t, kinds(t)) for t in range(count)]
            router = self.router(made)
            names = [task.name for task in made]
            calls[name] = partial(router.run_all, self.images, names)
        found = interleaved(calls, self.args.repeats)
        return {
            "images": len(self.images), "tasks": count, "seconds": found.median(),
            "times_faster_than_16_bare_forwards": {n: found.ratio("16_bare", n) for n in trees},
            "of_ideal": {n: round(ideal / count * found.ratio("16_bare", n), 4) for n, (_, ideal) in trees.items()},
        }  # fmt: skip


class _no_forward:
    """Leaves the backbone's forward out of a router's runs, to time the rest."""

    def __init__(self, router: Router) -> None:
        self._adapted = router._adapted

    def __enter__(self) -> None:
        width = self._adapted.feature_width
        found: Any = self._adapted
        found.features = lambda images, *_, **__: torch.zeros(len(images), width)

    def __exit__(self, *_: object) -> None:
        del self._adapted.features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["mixed", "merged", "loaded", "switch", "run_all"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    run_parts(Bench(args), args, "speed", "" if args.dtype == "float32" else f"_{args.dtype}")


def run_parts(bench: object, args: argparse.Namespace, module: str, suffix: str) -> None:
    """Runs the methods of a bench that `args.parts` names, and keeps what each finds in `args.out`."""
    results = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    for part in args.parts:
        found = getattr(bench, part)()
        results[part + suffix] = {
            **found,
            "repeats": args.repeats,
            "command": " ".join(["python", "-m", f"benchmarks.router.{module}", *sys.argv[1:]]),
            "machine": {
                "cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
                "instructions": torch.backends.cpu.get_cpu_capability(), "system": platform.platform(),
            },
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
        }  # fmt: skip
        print(json.dumps({part + suffix: found}, indent=2), flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=2) + "\n")


def _cpu() -> str:
    found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return found[0].partition(":")[2].strip() if found else platform.processor()


if __name__ == "__main__":
    main()
