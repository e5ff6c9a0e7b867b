"""Random adapter sets in random mixes, against a plain float32 loop over rows."""

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_store import RawTensor, Task, make_task
from router import Backbone, Router, load_backbone
from router.tensors import from_torch, quantise
from tests.helpers.makers import record
from tests.router.test_router import reference

pytestmark = pytest.mark.slow

WIDTHS = {"blocks.0.attn": (192, 192), "blocks.1.mlp": (192, 192), "blocks.3.attn.qkv": (192, 576),
          "blocks.4.mlp.fc2": (384, 192), "blocks.5.mlp": (192, 192), "norm": (192, 192)}  # fmt: skip
WHOLE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@cache
def pear_tiny() -> Backbone:
    return load_backbone("pear_tiny")


@st.composite
def tasks(draw: st.DrawFn) -> list[Task]:
    """Up to four tasks: own adapters and such as all may share, of several ranks, precisions and scales."""
    made = []
    for number in range(draw(st.integers(1, 4))):
        found: dict[str, RawTensor] = {}
        adapters: dict[str, Any] = {}
        positions: dict[str, list[list[Any]]] = {}
        for position in draw(st.lists(st.sampled_from(sorted(WIDTHS)), unique=True, max_size=4)):
            positions[position] = []
            for _ in range(draw(st.integers(1, 2))):
                kind = draw(st.integers(0, 2))  # few kinds: so tasks often share
                rank = kind + 1
                form = draw(st.sampled_from([*WHOLE, 1, 2, 4, 8]))
                name = f"{kind}-{form}-{'x'.join(map(str, WIDTHS[position]))}"
                generator = torch.Generator().manual_seed(kind)
                sides = {"down": (WIDTHS[position][0], rank), "up": (rank, WIDTHS[position][1])}
                entry: dict[str, Any] = {side: f"{name}.{side}" for side in sides}
                for side, shape in sides.items():
                    matrix = torch.randn(shape, generator=generator) / shape[0] ** 0.5
                    if isinstance(form, str):
                        found[f"{name}.{side}"] = from_torch(matrix.to(WHOLE[form]))
                        continue
                    assert isinstance(form, int)
                    codes, scale = quantise(matrix, form, 1 if side == "down" else 0)
                    found[f"{name}.{side}"], found[f"{name}.{side}.s"] = from_torch(codes), from_torch(scale)
                    entry.setdefault("quant", {"bits": form})[side] = {
                        "scale": f"{name}.{side}.s",
                        "shape": list(shape),
                    }
                adapters[name] = entry
                if draw(st.booleans()):
                    generator = torch.Generator().manual_seed(number)
                    name = f"{name}-{number}"
                    core = torch.randn(rank, rank, generator=generator)
                    found[f"{name}.up"] = from_torch(core)
                    adapters[name] = {**entry, "up": f"{name}.up", "basis": entry["up"]}
                    if "quant" in entry:
                        down, up = entry["quant"]["down"], entry["quant"]["up"]
                        adapters[name]["quant"] = {"bits": form, "down": down, "basis": up}
                    if bits := draw(st.sampled_from([0, 2, 8])):
                        codes, scale = quantise(core, bits, 0)
                        found[f"{name}.up"], found[f"{name}.s"] = from_torch(codes), from_torch(scale)
                        coded = {"bits": bits, "shape": [rank, rank], "scale": f"{name}.s"}
                        adapters[name]["quant"] = {"bits": bits, **adapters[name].get("quant", {}), "up": coded}
                positions[position].append([name, draw(st.sampled_from([0.0, 0.5, 1.0, -1.25]))])
        classes = draw(st.integers(0, 3))
        head: dict[str, Any] = {"weight": "head.weight", "bias": "head.bias"}
        if classes:
            generator = torch.Generator().manual_seed(number)
            weight = torch.randn(classes, 192, generator=generator)
            found["head.bias"] = from_torch(torch.randn(classes, generator=generator))
            found["head.weight"] = from_torch(weight)
            if bits := draw(st.sampled_from([0, 2, 4, 8])):
                codes, scale = quantise(weight, bits, 0)
                found["head.weight"], found["head.s"] = from_torch(codes), from_torch(scale)
                head["quant"] = {"bits": bits, "weight": {"shape": [classes, 192], "scale": "head.s"}}
        about = record(
            f"t{number}", backbone={"model": "pear_tiny", "digest": pear_tiny().digest}, adapters=adapters,
            positions=positions, activation=draw(st.sampled_from(["identity", "relu", "gelu"])),
            labels=[str(i) for i in range(classes)],
        )  # fmt: skip
        about = {**about, "head": head if classes else None}
        made.append(make_task(about, found))
    return made


@settings(max_examples=40)
@given(tasks(), st.data())
def test_any_mix_of_any_tasks_equals_a_plain_loop(made: list[Task], data: st.DataObject) -> None:
    router = Router(pear_tiny())
    for task in made:
        router.add(task)
    picks = data.draw(st.lists(st.integers(0, len(made) - 1), min_size=1, max_size=5))
    images = torch.randn(len(picks), 3, 48, 48, generator=torch.Generator().manual_seed(len(picks)))
    out = router.run(images, [made[pick].name for pick in picks])
    together = router.run_all(images[:2], [task.name for task in made])
    expected = {
        (row, pick): reference(pear_tiny(), made[pick], images[row])
        for row in range(len(picks)) for pick in range(len(made)) if picks[row] == pick or row < 2
    }  # fmt: skip
    for row, pick in enumerate(picks):
        torch.testing.assert_close(out.logits[row], expected[row, pick], atol=1e-4, rtol=1e-4)
    for pick, task in enumerate(made):
        for row in range(min(2, len(images))):
            found = together[task.name].logits[row]
            torch.testing.assert_close(found, expected[row, pick], atol=1e-4, rtol=1e-4)
