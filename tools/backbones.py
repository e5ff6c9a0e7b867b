"""Tries timm's families as backbones: their default positions, and whether mixed batches equal their rows alone.

Weights are random, so it says what runs, not how good it is. `python -m tools.backbones` writes docs/backbones.md.
"""

from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import timm
import torch

from pear_store import RawTensor, Task, make_task
from pear_train.start import DEFAULTS, attached
from router import AdaptedBackbone, Backbone, Router, RouterError, choose_positions

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "backbones.md"
TOLERANCE = 1e-4
"""Largest allowed difference between a row of a mixed batch and that row alone. With logits above 1, relative to the
largest one."""
SMALL = ("atto", "femto", "pico", "xxs", "xx_small", "nano", "_050", "_035", "xs", "tiny", "_t", "small", "b0", "18",
         "lite", "s0", "_s")  # fmt: skip
"""Parts of the names of small models, the smallest first."""
MOST = 100_000_000
"""Most parameters of a model to try."""


class Found(NamedTuple):
    """The result for one model."""

    family: str
    model: str
    preset: str
    """One of DEFAULTS; "" if none fits."""
    positions: int
    problem: str


def smallest(family: str) -> str | None:
    """A small model of a timm module. Only a few models are built to find it. None if there is none."""
    names = [name for name in timm.list_models(module=family) if not name.startswith("test_")]
    if not names:
        return None
    ranked = sorted(names, key=lambda n: (next((i for i, p in enumerate(SMALL) if p in n), len(SMALL)), len(n)))
    return min(dict.fromkeys([*ranked[:3], min(names, key=len)]), key=_parameters)


def _parameters(model: str) -> float:
    try:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in timm.create_model(model, num_classes=0).parameters())
    except Exception:  # whatever a model raises on the meta device
        return float("inf")


def random_module(name: str, seed: int = 0) -> torch.nn.Module:
    """A model without classifier and with random weights. Every layer has an effect, because none is left at zero."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    module: torch.nn.Module = timm.create_model(name, num_classes=0).eval()
    with torch.no_grad():
        for key, value in module.state_dict().items():
            if value.is_floating_point() and value.ndim == 1:  # norms, biases, layer scales
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            if key.endswith(("bias", "running_mean")):
                value.sub_(1.0)
    return module


def try_backbone(model: str, family: str = "") -> Found:
    """Attaches the default positions of a model with random weights, and runs two tasks mixed and alone."""
    try:
        module = random_module(model)
        backbone = Backbone(module, model)
        adapted = AdaptedBackbone(backbone, torch.device("cpu"), torch.float32)
        positions = attached(adapted, "auto")
    except RouterError as error:
        named = "none of the defaults fits: name modules" if "none of the default" in str(error) else str(error)
        return Found(family, model, "", 0, named)
    except Exception as error:  # whatever timm raises for a model that needs another package
        return Found(family, model, "", 0, f"{type(error).__name__}: {' '.join(str(error).split())}")
    preset = next(one for one in DEFAULTS if _chosen(module, one) == positions)
    return Found(family, model, preset, len(positions), _mixed_problem(backbone, adapted, positions))


def _chosen(module: torch.nn.Module, preset: str) -> list[str] | None:
    try:
        return choose_positions(module, preset)
    except RouterError:
        return None


def _mixed_problem(backbone: Backbone, adapted: AdaptedBackbone, positions: list[str]) -> str:
    """The fault of a mixed batch; "" if there is none."""
    names = ["a", "b", "a"]
    with Router(backbone, merge=False) as router:
        for seed, name in enumerate("ab"):
            router.add(_random_task(backbone, adapted, positions, name, seed))
        images = torch.randn(len(names), 3, *backbone.input_size, generator=torch.Generator().manual_seed(0))
        mixed = router.run(images, names).logits
        alone = [router.run(images[i : i + 1], name).logits[0] for i, name in enumerate(names)]
        other = router.run(images[:1], "b").logits[0]
    largest = max(float(one.abs().max()) for one in alone)
    difference = max(float((m - a).abs().max()) for m, a in zip(mixed, alone, strict=True))
    if not difference <= TOLERANCE * max(1.0, largest):
        return f"a mixed batch differs from its rows alone by {difference:.1e}, logits up to {largest:.1e}"
    return "" if not torch.allclose(alone[0], other) else "adapters make no difference"


def _random_task(backbone: Backbone, adapted: AdaptedBackbone, positions: list[str], name: str, seed: int) -> Task:
    random = np.random.default_rng(seed)

    def floats(*shape: int) -> RawTensor:
        values = (random.normal(size=shape) / shape[0] ** 0.5).astype("<f4")
        return RawTensor("F32", values.shape, values.tobytes())

    tensors, adapters, branches = {}, {}, {}
    for i, position in enumerate(positions):
        d_in, d_out = adapted.widths[position]
        tensors[f"{i}.down"], tensors[f"{i}.up"] = floats(d_in, 2), floats(2, d_out)
        adapters[f"a{i}"] = {"down": f"{i}.down", "up": f"{i}.up"}
        branches[position] = [[f"a{i}", 0.1]]
    config = backbone.config
    record: dict[str, Any] = {
        "format": "pear-task/1", "task": name, "backbone": {"model": backbone.name, "digest": backbone.digest},
        "activation": "identity", "adapters": adapters, "positions": branches, "head": None, "labels": [],
        "preprocess": {
            "input_size": [3, *backbone.input_size], "mean": list(config.get("mean", [0.5] * 3)),
            "std": list(config.get("std", [0.5] * 3)), "interpolation": "bicubic", "crop_pct": 1.0,
            "crop_mode": "squash",
        },
        "metrics": {}, "training": {},
    }  # fmt: skip
    return make_task(record, tensors)


HEAD = """# Which backbones work

Written by `python -m tools.backbones` (timm {timm}, torch {torch}). A test checks it on some of them.

This program takes a small model with random weights from each of timm's modules. It attaches the default positions of
`pear-train` (places where adapters are added), and runs two tasks in a mixed batch. A model works if each row's
features equal those of the row alone to 1e-4, and the tasks differ. This does not say how good a task becomes there,
because that needs pretrained weights.

Default positions are the first of these that a backbone has, and that run once in a forward:

- `qkv,mlp`: the fused qkv, and the MLP as a whole.
- `blocks`: attention and MLP, each as a whole.
- `whole`: each residual block of a convolutional network as a whole.
- `pointwise`: all 1x1 convolutions. These can be merged into weights, as Linears can.

If none fits, name modules: `pear-train --positions 'PATTERN'`. A position is a module that takes one tensor and returns
one. Its channels come last, or its axes are [batch, channel, height, width]. In that second form it may have a stride.

{works} of {all} families work by default.

| timm's module | tried | positions | how many | |
|---|---|---|---|---|
"""


def page(found: list[Found]) -> str:
    """The text of docs/backbones.md."""
    works = sum(not one.problem for one in found)
    rows = [
        f"| {one.family} | {one.model} | {f'`{one.preset}`' if one.preset else '–'} | {one.positions or '–'} | "
        f"{'works' if not one.problem else one.problem.replace('|', '/')[:160]} |"
        for one in found
    ]
    return (
        HEAD.format(timm=timm.__version__, torch=torch.__version__, works=works, all=len(found))
        + "\n".join(rows)
        + "\n"
    )


@click.command(help=__doc__)
@click.argument("families", nargs=-1)
@click.option("--write", type=click.Path(path_type=Path), default=PAGE, show_default=True, help="Page to write.")
def main(families: tuple[str, ...], write: Path) -> None:
    found = []
    for family in families or sorted(timm.list_modules()):
        model = smallest(family)
        if model is None or _parameters(model) > MOST:
            continue
        found.append(try_backbone(model, family))
        click.echo(" ".join(map(str, found[-1])))
    write.write_text(page(found))


if __name__ == "__main__":
    main()
