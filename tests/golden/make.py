"""Made the files in this folder, with the code of the commit that brought them. They are read for ever: run this into a
new folder for another format, never into one that is there.

    python -m tests.golden.make tests/golden/2
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from pear_store import RawTensor, Store, Task, make_task, write_checkpoint
from pear_store.exchange.peft import export_peft, import_peft
from tests.helpers.makers import record

D, RANK, CLASSES = 8, 2, 3
BACKBONE = {"model": "pear_tiny", "digest": "sha256:" + "5" * 64}


class Tensors:
    """Tensors of chance, by name."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)
        self.made: dict[str, RawTensor] = {}

    def floats(self, name: str, *shape: int, dtype: str = "F32") -> str:
        values = self._generator.standard_normal(shape)
        if dtype == "BF16":
            data = (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
        else:
            data = values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
        self.made[name] = RawTensor(dtype, shape, data)
        return name

    def codes(self, name: str, rows: int, columns: int, bits: int, rank_axis: int) -> dict[str, Any]:
        """Codes under `name`; returns their `quant`."""
        size = (rows * columns * bits + 7) // 8
        self.made[name] = RawTensor("U8", (size,), self._generator.integers(0, 256, size, np.uint8).tobytes())
        scale = self.floats(f"{name}.scale", (rows, columns)[rank_axis])
        return {"shape": [rows, columns], "scale": scale}


def make_tasks() -> dict[str, Task]:
    """A task of each kind."""
    made: dict[str, Task] = {}
    for kind, dtype in (("plain", "F32"), ("half", "F16"), ("brain", "BF16")):
        t = Tensors(len(made))
        adapters = {
            f"a{i}": {
                "down": t.floats(f"a{i}.down", D, RANK, dtype=dtype),
                "up": t.floats(f"a{i}.up", RANK, D, dtype=dtype),
            }
            for i in range(2)
        }
        made[kind] = task(
            kind, t, adapters, {"blocks.0.attn": [["a0", 1.0]], "blocks.1.attn": [["a0", -0.25], ["a1", 0.5]]}
        )
    t = Tensors(3)
    own = {"down": t.floats("a0.down", D, RANK), "up": t.floats("a0.up", RANK, D)}
    core = {"down": "a0.down", "up": t.floats("c1.up", RANK, RANK), "basis": "a0.up"}
    made["core"] = task(
        "core", t, {"a0": own, "c1": core}, {"blocks.0.attn": [["a0", 1.0]], "blocks.1.attn": [["c1", 1.0]]}
    )
    for bits in (1, 4, 8):
        t = Tensors(10 + bits)
        quant = {"bits": bits, "down": t.codes("a0.down", D, RANK, bits, 1), "up": t.codes("a0.up", RANK, D, bits, 0)}
        entry: dict[str, Any] = {"down": "a0.down", "up": "a0.up", "quant": quant, "role": "knowledge"}
        made[f"q{bits}"] = task(
            f"q{bits}", t, {"a0": entry}, {"blocks.0.attn": [["a0", 1.0]]}, head_bits=bits if bits > 1 else 0
        )
    t = Tensors(20)
    quant = {"bits": 4, "down": t.codes("a0.down", D, RANK, 4, 1), "basis": t.codes("a0.up", RANK, D, 4, 0)}
    entry = {"down": "a0.down", "up": t.floats("c1.up", RANK, RANK), "basis": "a0.up", "quant": quant}
    made["q4core"] = task("q4core", t, {"c1": entry}, {"blocks.0.attn": [["c1", 2.0]]})
    t = Tensors(21)
    codes = {"bits": 2, "up": {"shape": [RANK, RANK], "scale": t.floats("c.scale", 3, RANK)}}
    t.made["c.up"] = RawTensor("U8", (3, 1), bytes([17, 228, 99]))
    down, basis = t.floats("b.down", 3, D, RANK, dtype="F16"), t.floats("b.up", 3, RANK, D, dtype="F16")
    stack = {"down": down, "up": "c.up", "basis": basis, "quant": codes, "stack": 3}
    single: dict[str, Any] = {"down": t.floats("a.down", 1, D, 1), "up": t.floats("a.up", 1, 1, D), "stack": 1}
    places = {"blocks.0.attn": [["c", 1.0, 2], ["a", -0.5, 0]], "blocks.1.attn": [["c", 1.0, 0]]}
    made["stacks"] = task("stacks", t, {"c": stack, "a": single}, places, format="pear-task/2")
    t = Tensors(22)
    t.floats("b.down", 3, D, RANK, dtype="F16"), t.floats("b.up", 3, RANK, D, dtype="F16")
    t.made["c.up"] = RawTensor("U8", (3, 1), bytes([40, 7, 201]))
    scale = t.floats("c.up.scale", 3, RANK, dtype="F16")
    codes = {"bits": 2, "up": {"shape": [RANK, RANK], "scale": scale}}
    stack = {"down": "b.down", "up": "c.up", "basis": "b.up", "quant": codes, "stack": 3}
    single = {"down": t.floats("a.down", 1, D, 1), "up": t.floats("a.up", 1, 1, D), "stack": 1}
    made["joined"] = task("joined", t, {"c": stack, "a": single}, places, head_bits=4, format="pear-task/3")
    made["headless"] = task("headless", Tensors(30), {}, {}, head=False)
    return made


def task(
    name: str, t: Tensors, adapters: dict[str, Any], positions: dict[str, Any], head: bool = True, head_bits: int = 0,
    format: str = "pear-task/1",
) -> Task:  # fmt: skip
    changes: dict[str, Any] = {"head": None, "labels": [], "format": format}
    if head:
        named: dict[str, Any] = {"weight": "head.weight", "bias": t.floats("head.bias", CLASSES)}
        if head_bits:
            named["quant"] = {"bits": head_bits, "weight": t.codes("head.weight", CLASSES, D, head_bits, 0)}
        else:
            t.floats("head.weight", CLASSES, D)
        changes |= {"head": named, "labels": [f"{name}-{i}" for i in range(CLASSES)]}
    made = record(
        name, backbone=BACKBONE, adapters=adapters, positions=positions, kept={"unknown": ["keys", 1, None]}, **changes
    )
    return make_task(made, t.made)


def main(folder: Path) -> None:
    folder.mkdir()
    tasks = make_tasks()
    (folder / "checkpoints").mkdir()
    for name, one in tasks.items():
        write_checkpoint(folder / "checkpoints" / f"{name}.safetensors", one)
    with Store.create(folder / "store") as store:
        for one in tasks.values():
            store.add(one)
        for name in ("core", "q8", "half"):  # second versions, of other tasks' tensors
            store.add(Task({**tasks["plain"].record, "task": name}, tasks["plain"].tensors))
        store.tag("core@1", "prod")
        store.tag("core@2", "next")
        store.tag("core@2", "prod")
        store.untag("core@next")
        store.remove("half@1")
        store.remove("brain")
        store.gc()
        export_peft(store.get("q4core"), folder / "peft", linears={"blocks.0.attn": (D, D)})
        expected = {
            "checkpoints": {name: digests(one) for name, one in tasks.items()},
            "peft": digests(import_peft(folder / "peft")),
            "store": {
                f"{v.task}@{v.version}": {
                    "time_ns": v.time_ns, "bytes": v.size_bytes, "tags": list(v.tags),
                    "record": dict((got := store.get(f"{v.task}@{v.version}")).record), "tensors": sorted(got.tensors),
                }
                for v in store.versions()
            },
        }  # fmt: skip
    (folder / "store" / "index" / "lock.mdb").unlink()
    (folder / "expected.json").write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")


def digests(task: Task) -> dict[str, str]:
    return {name: tensor.digest for name, tensor in sorted(task.tensors.items())}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
