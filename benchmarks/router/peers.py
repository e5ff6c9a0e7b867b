#!/usr/bin/env python3
"""The router beside HF PEFT and AdapterHub on one mixed batch of ViT-B/16: 16 tasks of rank 8, 16 images of 224 pixels.

Contestants of a section take turns in one process, on the same weights in memory; figures are medians of their times.
Everything is over the bare backbone that a contestant runs: timm's for Pear and PEFT, Hugging Face's for AdapterHub.
Weights are random. A load is of a task that the process has not read before; files are in the system's cache.

    python -m benchmarks.router.peers --out benchmarks/results/router_peers.json

AdapterHub's package needs an older transformers than PEFT's newest; where it is not there, the script makes an
environment for it in runs/peers, on top of the present one, and goes on in that. --only runs single sections
(and keeps the others' figures in the JSON).
"""

import copy
import importlib.util
import inspect
import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import timm
import torch
from torch import Tensor, nn

from pear_store import RawTensor, Store, Task, make_task
from router import AdaptedBackbone, Backbone, Router, choose_positions, load_backbone

TASKS, RANK, CLASSES, THREADS = 16, 8, 10, 2
ADAPTERHUB = "adapters==1.3.0"
NAMES = [f"t{i}" for i in range(TASKS)]
LINEARS_48 = r"blocks\.\d+\.(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)"
LINEARS_24 = r"blocks\.\d+\.(attn\.qkv|mlp\.fc2)"
PATTERNS_48 = "blocks.*.attn.qkv,blocks.*.attn.proj,blocks.*.mlp.fc1,blocks.*.mlp.fc2"
PATTERNS_24 = "blocks.*.attn.qkv,blocks.*.mlp.fc2"
Call = Callable[[int], object]
"""Runs the first n images of the batch, each with a task of its own."""


def make_tasks(backbone: Backbone, positions: str, names: list[str], activation: str = "identity") -> list[Task]:
    """Random tasks with an adapter of its own at every position."""
    adapted = AdaptedBackbone(backbone, torch.device("cpu"), torch.float32)
    adapted.attach(choose_positions(backbone.module, positions))
    rng = np.random.default_rng(0)

    def floats(*shape: int) -> RawTensor:
        return RawTensor("F32", shape, (rng.standard_normal(shape, dtype=np.float32) * 0.02).tobytes())

    made = []
    for name in names:
        tensors = {"head.weight": floats(CLASSES, adapted.feature_width), "head.bias": floats(CLASSES)}
        adapters = {}
        for position, (d_in, d_out) in adapted.widths.items():
            adapters[position] = {"down": f"{position}.down", "up": f"{position}.up"}
            tensors |= {f"{position}.down": floats(d_in, RANK), f"{position}.up": floats(RANK, d_out)}
        record = {
            "format": "pear-task/1",
            "task": name,
            "backbone": {"model": backbone.name, "digest": backbone.digest},
            "activation": activation,
            "adapters": adapters,
            "positions": {position: [[position, 1.0]] for position in adapters},
            "head": {"weight": "head.weight", "bias": "head.bias"},
            "labels": [str(i) for i in range(CLASSES)],
            "preprocess": {"input_size": [3, *backbone.input_size], "mean": [0.5] * 3, "std": [0.5] * 3,
                           "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"},
            "metrics": {},
            "training": {},
        }  # fmt: skip
        made.append(make_task(record, tensors))
    return made


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_base_patch16_224", num_classes=0).eval()


def share_weights(model: nn.Module, bare: nn.Module) -> None:
    """Gives a model the memory of bare's weights: where a tensor lies moves a forward's time by some percent."""
    left = model.load_state_dict(bare.state_dict(), assign=True, strict=False)
    assert not left.missing_keys, left


def peft_model(pattern: str, bare: nn.Module, names: list[str] = NAMES) -> Any:
    """timm's ViT-B with LoRA of all tasks at the Linears that match; in bare's dtype throughout."""
    from peft import LoraConfig, get_peft_model

    # random matrices in place of zeros: outputs then show that a task's adapter runs
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=rf".*{pattern}", init_lora_weights=False)
    model = vit()
    share_weights(model, bare)
    model = get_peft_model(model, config, adapter_name=names[0], autocast_adapter_dtype=False)
    for name in names[1:]:
        model.add_adapter(name, config, autocast_adapter_dtype=False)
    return model.eval()


def check_tasks_differ(run: Callable[[Tensor], Tensor | list[Tensor]]) -> None:
    """One image for two tasks must not give the same: else what is timed is not what it is called."""
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    first, second = (logits.float() for logits in run(torch.cat([image, image])))
    assert not torch.allclose(first, second, atol=1e-3), "the tasks' adapters do not run"


def switch(model: Any, name: str) -> None:
    """PEFT's set_adapter; with what it offers for inference."""
    offered = "inference_mode" in inspect.signature(model.set_adapter).parameters
    model.set_adapter(name, **({"inference_mode": True} if offered else {}))


def peft_contestants(dtype: torch.dtype, with_peft: bool = True) -> dict[str, Call]:
    images = torch.randn(TASKS, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    cast = images.to(dtype)
    backbone = load_backbone(vit())
    bare = backbone.module if dtype == torch.float32 else copy.deepcopy(backbone.module).to(dtype)
    contestants: dict[str, Call] = {"bare": lambda n: bare(cast[:n])}

    def add_pear(name: str, positions: str) -> None:
        router = Router(backbone, dtype=dtype)
        for task in make_tasks(backbone, positions, NAMES):
            router.add(task)
        check_tasks_differ(lambda pair: router.run(pair, NAMES[:2]).logits)
        contestants[name] = lambda n: router.run(images[:n], NAMES[:n])

    def add_peft(name: str, pattern: str, loop: bool) -> None:
        model = peft_model(pattern, bare)
        count = sum(hasattr(module, "lora_A") for module in model.modules())
        assert count == int(name.split()[0]), count
        check_tasks_differ(lambda pair: model(pair.to(dtype), adapter_names=NAMES[:2]))
        contestants[f"peft adapter_names, {name}"] = lambda n: model(cast[:n], adapter_names=NAMES[:n])

        def one_by_one(n: int) -> None:
            for i in range(n):
                switch(model, NAMES[i])
                model(cast[i : i + 1])

        if loop:
            contestants[f"peft switching, {name}"] = one_by_one

    add_pear("pear, 24 block positions", "blocks")
    add_pear("pear, 24 linears", PATTERNS_24)
    if not with_peft:
        return contestants
    add_pear("pear, 48 linears", PATTERNS_48)
    add_peft("48 linears", LINEARS_48, loop=dtype == torch.float32)
    add_peft("24 linears", LINEARS_24, loop=False)
    return contestants


def hf_vit() -> Any:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    return ViTModel(ViTConfig(), add_pooling_layer=False).eval()


def adapterhub_model(method: str, bare: nn.Module, dtype: torch.dtype, names: list[str] = NAMES) -> Any:
    """Hugging Face's ViT-B with all tasks' adapters; in `dtype` throughout."""
    import adapters

    model = hf_vit()
    share_weights(model, bare)
    configs = {
        # after attention and after the MLP of each block, as Pear's 24 block positions
        "bottleneck": lambda: adapters.DoubleSeqBnConfig(reduction_factor=768 / RANK, non_linearity="linear"),
        # q, k, v and the MLP's second Linear, as 24 linears
        "lora": lambda: adapters.LoRAConfig(r=RANK, alpha=RANK, attn_matrices=["q", "k", "v"], output_lora=True),
    }
    adapters.init(model)
    for name in names:
        model.add_adapter(name, config=configs[method]())
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "adapter_up.weight" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.to(dtype).eval()


def adapterhub_contestants(dtype: torch.dtype) -> dict[str, Call]:
    from adapters.composition import BatchSplit

    images = torch.randn(TASKS, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(dtype)
    contestants = peft_contestants(dtype, with_peft=False)
    bare = hf_vit().to(dtype)
    contestants["hf bare"] = lambda n: bare(pixel_values=images[:n])

    def add(method: str) -> None:
        model = adapterhub_model(method, bare, dtype)

        def run(images: Tensor) -> Tensor:
            model.active_adapters = BatchSplit(*NAMES[: len(images)], batch_sizes=[1] * len(images))
            found: Tensor = model(pixel_values=images.to(dtype)).last_hidden_state
            return found

        check_tasks_differ(run)
        contestants[f"adapterhub BatchSplit, {method}"] = lambda n: run(images[:n])

    add("bottleneck")
    add("lora")
    return contestants


def parallel_contestants(dtype: torch.dtype) -> dict[str, Call]:
    """One image through n tasks: as many rows, so bare is n images."""
    from adapters.composition import Parallel

    images = torch.randn(TASKS, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    backbone = load_backbone(vit())
    bare = backbone.module if dtype == torch.float32 else copy.deepcopy(backbone.module).to(dtype)
    hf_bare = hf_vit().to(dtype)
    router = Router(backbone, dtype=dtype)
    for task in make_tasks(backbone, "blocks", NAMES):
        router.add(task)
    model = adapterhub_model("bottleneck", hf_bare, dtype)

    def run(n: int) -> None:
        model.active_adapters = Parallel(*NAMES[:n]) if n > 1 else NAMES[0]
        model(pixel_values=images[:1].to(dtype))

    return {
        "bare": lambda n: bare(images[:n].to(dtype)),
        "pear run_all": lambda n: router.run_all(images[:1], NAMES[:n]),
        "hf bare": lambda n: hf_bare(pixel_values=images[:n].to(dtype)),
        "adapterhub Parallel, bottleneck": run,
    }


def taking_turns(contestants: dict[str, Call], repeats: int, images: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in contestants}
    refused: dict[str, str] = {}
    for name, call in contestants.items():
        try:
            call(1)
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    for turn in range(repeats):
        order = list(contestants)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            call = contestants[name]
            if name not in refused:
                began = time.perf_counter()
                call(images)
                times[name].append(time.perf_counter() - began)
                print(f"  {turn + 1}/{repeats} {name}: {times[name][-1]:.3f} s", file=sys.stderr)
    medians = {name: statistics.median(found) for name, found in times.items() if found}
    of = {name: medians["hf bare" if "adapterhub" in name or name == "hf bare" else "bare"] for name in medians}
    return {
        name: {"median_s": round(m, 4), "times_s": [round(t, 4) for t in times[name]],
               "throughput_over_its_bare": round(of[name] / m, 4)}
        for name, m in medians.items()
    } | {name: {"refused": why} for name, why in refused.items()}  # fmt: skip


def timed(call: Callable[..., object], *given: object) -> float:
    """Milliseconds of one call."""
    began = time.perf_counter()
    call(*given)
    return 1000 * (time.perf_counter() - began)


def loads(repeats: int, _: int) -> dict[str, Any]:
    """Milliseconds to load one more task, and to switch, with 2, 16 and 64 loaded."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        bare = vit()
        saved = peft_model(LINEARS_48, bare, ["default"])
        saved.save_pretrained(folder)
        for count in (2, 16, 64):
            names = [f"n{i}" for i in range(count)]
            model = peft_model(LINEARS_48, bare, names)
            load, turn = [], []
            for i in range(repeats):
                load.append(timed(model.load_adapter, folder, f"more{i}"))
                turn.append(timed(switch, model, names[i % 2]))
                model.delete_adapter(f"more{i}")
            found[f"peft, 48 linears, {count} loaded"] = _load_figures(load, turn)
    backbone = load_backbone(vit())
    for title, positions in (("48 linears", PATTERNS_48), ("24 block positions", "blocks")):
        with tempfile.TemporaryDirectory() as folder, Store.create(Path(folder) / "s") as store:
            names = [f"n{i}" for i in range(64 + 3 * repeats)]
            list(store.add_many(make_tasks(backbone, positions, names)))
            for place, count in enumerate((2, 16, 64)):
                with Router(backbone, store) as router:
                    router.preload(names[:count]).result()
                    new = names[64 + place * repeats :][:repeats]
                    load = [timed(lambda n: router.preload(n).result(), n) for n in new]
                    found[f"pear, {title}, {count} loaded"] = _load_figures(load, [])
    # On a narrow ViT-B/16 of as many blocks: what a switch costs does not depend on the width, and is lost in the
    # noise of a whole ViT-B's forward. PEFT's figure above is of its own call.
    narrow: Any = timm.models.VisionTransformer(img_size=32, embed_dim=64, num_heads=2, num_classes=0, class_token=True)
    narrow.pretrained_cfg = {"architecture": "narrow", "input_size": (3, 32, 32)}
    small = load_backbone(narrow.eval())
    images = torch.randn(1, 3, 32, 32)
    for count in (2, 16, 64):
        names = [f"n{i}" for i in range(count)]
        with Router(small) as router:
            for task in make_tasks(small, "blocks", names):
                router.add(task)
                router.run(images, task.name)
            same, other = [], []
            for i in range(100 * repeats):
                router.run(images, names[i % 2])
                same.append(timed(router.run, images, names[i % 2]))
                other.append(timed(router.run, images, names[(i + 1) % 2]))
            cost = statistics.median(b - a for a, b in zip(same, other, strict=True))
            found[f"pear, switch, {count} loaded"] = {
                "switch_ms": round(cost, 4),
                "run_ms": round(statistics.median(same), 3),
            }
    return found


def _load_figures(load: list[float], turn: list[float]) -> dict[str, float]:
    figures = {"load_ms": round(statistics.median(load), 3)}
    return figures | ({"switch_ms": round(statistics.median(turn), 3)} if turn else {})


def in_turns(make: Callable[[torch.dtype], dict[str, Call]], dtype: torch.dtype, n: int, images: int) -> dict[str, Any]:
    return taking_turns(make(dtype), n, images)


SECTIONS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "loads": loads,
    **{
        f"{name} {str(dtype).removeprefix('torch.')}": partial(in_turns, make, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for name, make in (
            ("peft", peft_contestants),
            ("adapterhub", adapterhub_contestants),
            ("parallel", parallel_contestants),
        )
    },
}


def go_where_adapterhub_is(folder: Path) -> str | None:
    """Goes on in an environment with AdapterHub's package; returns why that cannot be."""
    if importlib.util.find_spec("adapters"):
        return None
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        venv.create(folder, with_pip=True)
        site = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        (site / "below.pth").write_text(f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})\n")
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", ADAPTERHUB]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"{ADAPTERHUB} could not be installed: {done.stderr.strip().splitlines()[-1]}"
        (folder / "installed").touch()
    os.execv(python, [str(python), *sys.orig_argv[1:]])


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set[str]())
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "bf16_instructions": sorted(flags & {"avx512_bf16", "amx_bf16", "avx_ne_convert"}),
    }


@click.command(help=__doc__)
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--only", multiple=True, type=click.Choice(list(SECTIONS)), help="A section; give it again for more.")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1))
@click.option("--images", default=TASKS, show_default=True, type=click.IntRange(1, TASKS), help="In a batch.")
@click.option("--environment", default="runs/peers", show_default=True, type=click.Path(path_type=Path))
def main(out: Path, only: tuple[str, ...], repeats: int, images: int, environment: Path) -> None:
    missing = go_where_adapterhub_is(environment)
    torch.set_num_threads(THREADS)
    report = json.loads(out.read_text()) if only and out.exists() else {"sections": {}}
    for name in only or SECTIONS:
        print(name, file=sys.stderr)
        needed = name.startswith(("adapterhub", "parallel"))
        with torch.inference_mode():
            found = {"not_run": missing} if missing and needed else SECTIONS[name](repeats, images)
        command = " ".join(["python", "-m", "benchmarks.router.peers", *sys.argv[1:]])
        report["sections"][name] = {"command": command, "repeats": repeats, "images": images, "figures": found}
        packages = ("torch", "timm", "peft", "transformers", *(() if missing else ("adapters",)))
        report |= {
            "machine": machine(),
            "threads": THREADS,
            "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        }
        out.write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
