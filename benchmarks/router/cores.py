"""Tasks on common bases beside the bare backbone and beside the same tasks with each core multiplied into `up`.

    python -m benchmarks.router.cores PART [PART ...] --out benchmarks/results/router_cores.json

A part's figures are written under its name and options, those of other parts are kept. ViT-B/16 with random weights,
normalised tensors, 2 threads; bases of one rank at some positions, random cores, heads of 47 classes. What is compared
runs interleaved in one process; times are medians in seconds, ratios medians over the rounds.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.router import speed
from benchmarks.router.speed import CLASSES, Calls, Tasks, interleaved, outside, run_parts
from pear_store import Task
from pear_store.format.codes import up_values
from router import Router
from router.tensors import from_torch


class BasedTasks(Tasks):
    """Random tasks that stand on the same bases at every position."""

    def on_bases(self, name: str, seed: int, rank: int, own: int = 0) -> Task:
        """A task; with `own`, it has an adapter of that rank of its own at every fourth position."""
        plain = self.make(name, seed)
        tensors = {key: plain.tensors[key] for key in ("head.weight", "head.bias")}
        adapters: dict[str, dict[str, str]] = {}
        positions: dict[str, list[list[Any]]] = {}
        for i, position in enumerate(self.positions):
            d_in, d_out = self.widths[position]
            tensors[f"b{i}.down"] = self.tensor(("base", i, "down"), d_in, rank)
            tensors[f"b{i}.up"] = self.tensor(("base", i, "up"), rank, d_out)
            tensors[f"c{i}.up"] = self.tensor((seed, i, "core"), rank, rank)
            adapters[f"c{i}"] = {"down": f"b{i}.down", "up": f"c{i}.up", "basis": f"b{i}.up"}
            positions[position] = [[f"c{i}", 1.0]]
            if own and i % 4 == 0:
                tensors[f"a{i}.down"] = self.tensor((seed, i, "down"), d_in, own)
                tensors[f"a{i}.up"] = self.tensor((seed, i, "up"), own, d_out)
                adapters[f"a{i}"] = {"down": f"a{i}.down", "up": f"a{i}.up"}
                positions[position].append([f"a{i}", 1.0])
        return Task({**plain.record, "adapters": adapters, "positions": positions}, tensors)


def multiplied(task: Task) -> Task:
    """The same task with each core multiplied into its `up`: the form in which all tasks ran before."""
    tensors, adapters = dict(task.tensors), {}
    for name, entry in task.record["adapters"].items():
        adapters[name] = entry
        if task.adapters[name].core is not None:
            tensors[f"{name}.up"] = from_torch(torch.from_numpy(np.array(up_values(task.adapters[name], tensors))))
            adapters[name] = {"down": entry["down"], "up": f"{name}.up"}
            tensors.pop(entry["basis"])
    return Task({**task.record, "adapters": adapters}, tensors)


class Bench(speed.Bench):
    tasks: BasedTasks

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.tasks = BasedTasks(self.backbone, args.positions)

    def router(self, tasks: list[Task], **options: Any) -> Router:
        made = super().router(tasks, **options)
        made.preload([task.name for task in tasks]).result()
        return made

    def mixed(self) -> dict[str, Any]:
        """As many tasks as images, and fewer: over bare, and beside the multiplied form."""
        count, rank = len(self.images), self.args.rank
        on_bases = [self.tasks.on_bases(f"t{i}", i, rank) for i in range(count)]
        own = [self.tasks.on_bases(f"t{i}", i, rank, self.args.own) for i in range(count)]
        routers = {
            "cores": self.router(on_bases),
            "cores_and_own": self.router(own),
            "multiplied": self.router([multiplied(task) for task in on_bases]),
        }
        names = [f"t{i}" for i in range(count)]
        weights = routers["cores"]._adapted._base
        for model in (self.bare_model, *(router._adapted._base for router in routers.values())):
            same_memory(model, weights)
        calls: Calls = {name: partial(router.run, self.images, names) for name, router in routers.items()}
        for few in (1, 4):
            calls[f"cores_of_{few}"] = partial(
                routers["cores"].run, self.images, [names[i % few] for i in range(count)]
            )
        calls = {name: call for name, call in calls.items() if not self.args.only or name in self.args.only}
        exact, near = (
            torch.stack(list(routers[name].run(self.images, names).logits)) for name in ("multiplied", "cores")
        )
        found = interleaved({"bare": self.bare, **calls}, self.args.repeats)
        return {
            "images": count, "same_memory": True, "seconds": found.median(),
            "throughput_over_bare": {name: found.ratio("bare", name) for name in calls},
            "over_multiplied": {name: found.ratio("multiplied", name) for name in calls if "multiplied" in calls},
            "outside_the_backbone": {name: outside(routers.get(name, routers["cores"]), calls[name]) for name in calls},
            "largest_difference_of_logits": float((exact - near).abs().max() / exact.abs().max()),
        }  # fmt: skip

    def compiled(self) -> dict[str, Any]:
        """The same through torch.compile, over the bare backbone compiled."""
        count, rank = len(self.images), self.args.rank
        on_bases = [self.tasks.on_bases(f"t{i}", i, rank) for i in range(count)]
        names = [task.name for task in on_bases]
        compiled: Callable[[torch.Tensor], torch.Tensor] = torch.compile(self.bare_model)
        images = self.images.to(self.dtype)
        routers = {
            "cores": self.router(on_bases, compile=True),
            "multiplied": self.router([multiplied(task) for task in on_bases], compile=True),
        }
        calls: Calls = {name: partial(router.run, self.images, names) for name, router in routers.items()}
        with torch.inference_mode():
            found = interleaved({"bare": lambda: compiled(images), **calls}, self.args.repeats)
        ratios = {name: found.ratio("bare", name) for name in calls}
        return {"images": count, "seconds": found.median(), "throughput_over_bare": ratios}

    def bytes(self) -> dict[str, Any]:
        """What a loaded task takes on the device, of 64; a Pear task has adapters of rank 12 at the same positions."""
        rank, heads = self.args.rank, 4 * CLASSES * 769
        forms: dict[str, Callable[[int], Task]] = {
            "cores": lambda i: self.tasks.on_bases(f"t{i}", i, rank),
            "cores_and_own": lambda i: self.tasks.on_bases(f"t{i}", i, rank, self.args.own),
            "multiplied": lambda i: multiplied(self.tasks.on_bases(f"t{i}", i, rank)),
            "pear": lambda i: pear(self.tasks, i),
        }
        found: dict[str, Any] = {"head_bytes": heads}
        for name, make in forms.items():
            router = self.router([make(i) for i in range(64)])
            loaded = router.stats().size_bytes
            router.add(make(64))
            router.preload("t64").result()
            found[name] = {"of_64": loaded, "one_more": router.stats().size_bytes - loaded}
        pear_bytes = found["pear"]["one_more"]
        found["over_pear"] = {name: round(found[name]["one_more"] / pear_bytes, 4) for name in forms}
        found["adapters_over_pear"] = {
            name: round((found[name]["one_more"] - heads) / (pear_bytes - heads), 4) for name in forms
        }
        return found

    def loaded(self) -> dict[str, Any]:
        """Thousands of loaded tasks: their bytes, and what a switch and a miss take with few and with many of them.

        A switch is a run of one image for another task than before, beside one for the same. A miss is the load of a
        task that lies in memory.
        """
        forms: dict[str, tuple[Callable[[int], Task], tuple[int, ...]]] = {
            "cores": (lambda i: self.tasks.on_bases(f"t{i}", i, self.args.rank), (100, 1_000, 10_000)),
            "pear": (lambda i: pear(self.tasks, i), (100, 1_000)),
        }
        found: dict[str, Any] = {}
        for form, (make, counts) in forms.items():
            router, loaded, before = self.router([], slot_bytes=16 << 30), 0, resident_bytes()
            rows = []
            for count in counts:
                for i in range(loaded, count):
                    router.add(make(i))
                router.preload([f"t{i}" for i in range(loaded, count)]).result()
                loaded = count
                taken = {"slots": router.stats().size_bytes // count}
                if form == "cores":  # the first: a process keeps what it freed
                    taken["process"] = (resident_bytes() - before) // count
                times = {**self.switches(router, count), **self.misses(router, make, count)}
                rows.append({"tasks": count, "bytes_a_task": taken, **times})
            found[form] = rows
        return found

    def switches(self, router: Router, count: int) -> dict[str, float]:
        image, draw = self.images[:1], np.random.default_rng(0)
        same, other = [], []
        router.run(image, "t0")
        for turn in range(20 * self.args.repeats):
            name = f"t{draw.integers(1, count)}"
            began = time.perf_counter()
            router.run(image, name)
            switched = time.perf_counter()
            router.run(image, name)
            if turn >= 10:
                other.append(switched - began)
                same.append(time.perf_counter() - switched)
        beyond = [a - b for a, b in zip(other, same, strict=True)]
        return {"same_ms": median_ms(same), "switch_ms": median_ms(beyond)}

    def misses(self, router: Router, make: Callable[[int], Task], count: int) -> dict[str, float]:
        times = []
        for i in range(1_000_000 + count, 1_000_030 + count):
            router.add(make(i))
            began = time.perf_counter()
            router.preload([f"t{i}"]).result()
            times.append(time.perf_counter() - began)
        return {"miss_ms": median_ms(times)}

    def micro(self) -> dict[str, Any]:
        """One Linear with branches on bases after it, with `down` or `up` beside its weight, or with `up` before it."""
        found = {}
        for d_in, d_out in ((768, 2304), (768, 768), (768, 3072), (3072, 768)):
            found[f"{d_in}-{d_out}"] = self.linear(d_in, d_out)
        return found

    @torch.inference_mode()
    def linear(self, d_in: int, d_out: int) -> dict[str, Any]:
        count, rank = len(self.images), self.args.rank
        draw = partial(torch.randn, dtype=self.dtype)
        x, weight, bias = draw(count, 197, d_in), draw(d_out, d_in) / 30, draw(d_out)
        down, core, up = draw(rank, d_in) / 30, draw(count, rank, rank) / 30, draw(rank, d_out) / 30
        both, with_zeros = torch.cat([weight, down]), torch.cat([bias, bias.new_zeros(rank)])
        tall, with_bias = torch.cat([weight, up.t()], 1).contiguous(), torch.cat([up, bias[None]])

        def apart() -> torch.Tensor:
            y = F.linear(x, weight, bias)
            h = torch.bmm((x.view(-1, d_in) @ down.t()).view(count, -1, rank), core)
            return y.view(-1, d_out).addmm_(h.view(-1, rank), up)

        def beside_weight() -> torch.Tensor:
            whole = F.linear(x, both, with_zeros)
            h = torch.bmm(whole[..., d_out:], core)
            return whole.view(-1, d_out + rank)[:, :d_out].addmm_(h.view(-1, rank), up)

        def up_beside_weight() -> torch.Tensor:
            h = torch.bmm((x.view(-1, d_in) @ down.t()).view(count, -1, rank), core)
            return F.linear(torch.cat([x, h], -1), tall, bias)

        def up_first() -> torch.Tensor:
            h = torch.bmm((x.view(-1, d_in) @ down.t()).view(count, -1, rank), core)
            y = F.pad(h.view(-1, rank), (0, 1), value=1.0) @ with_bias
            return y.addmm_(x.view(-1, d_in), weight.t())

        calls: Calls = {
            "bare": lambda: F.linear(x, weight, bias), "apart": apart, "down_beside_weight": beside_weight,
            "up_beside_weight": up_beside_weight, "up_before_the_linear": up_first,
        }  # fmt: skip
        times = interleaved(calls, 40 * self.args.repeats)
        return {"seconds": times.median(), "over_bare": {name: times.ratio(name, "bare") for name in calls}}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def median_ms(seconds: list[float]) -> float:
    return round(1000 * statistics.median(seconds), 3)


def same_memory(model: nn.Module, other: nn.Module) -> None:
    """Lets a model use another's weights: where they lie in memory changes its speed by percents."""
    found = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.data = found[name].data


def pear(tasks: BasedTasks, seed: int) -> Task:
    """Adapters of rank 12, one for each shape, which all other positions borrow with a core, as pruning leaves them."""
    made, rank = tasks.on_bases(f"t{seed}", seed, 12), 12
    of_shape: dict[tuple[int, int], int] = {}
    adapters: dict[str, dict[str, str]] = {}
    tensors = {key: raw for key, raw in made.tensors.items() if key.startswith(("head", "c"))}
    for i, position in enumerate(tasks.positions):
        d_in, d_out = tasks.widths[position]
        source = of_shape.setdefault((d_in, d_out), i)
        if source == i:
            tensors[f"a{i}.down"] = tasks.tensor((seed, i, "down"), d_in, rank)
            tensors[f"a{i}.up"] = tasks.tensor((seed, i, "up"), rank, d_out)
        adapters[f"c{i}"] = {"down": f"a{source}.down", "up": f"c{i}.up", "basis": f"a{source}.up"}
    return Task({**made.record, "adapters": adapters}, tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["mixed", "compiled", "bytes", "loaded", "micro"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--positions", default="blocks", help="see router.choose_positions")
    parser.add_argument("--rank", type=int, default=32, help="of the bases")
    parser.add_argument("--own", type=int, default=2, help="rank of a task's own adapters, at every fourth position")
    parser.add_argument("--only", nargs="+", default=[], help="contestants of `mixed`; all by default")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    suffix = f" {args.dtype} {args.positions} rank {args.rank} images {args.images}"
    run_parts(Bench(args), args, "cores", suffix)


if __name__ == "__main__":
    main()
