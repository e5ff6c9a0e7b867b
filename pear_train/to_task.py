"""From a run to the task that its checkpoint holds."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pear_store import RawTensor, Task, make_task
from pear_store.format.record import entry_names, renamed, with_core
from pear_train.dtypes import code_bits, float_dtype
from pear_train.identity import fingerprint
from pear_train.run import TaskRun
from router.tensors import from_torch, quantise


def to_task(run: TaskRun, metrics: dict[str, Any]) -> Task:
    """The task as the run stands, tensors in the dtypes to be written."""
    config, adapters = run.config, run.adapters
    tensors: dict[str, RawTensor] = {}
    entries: dict[str, Any] = {}
    for name in adapters.used():
        frozen = adapters.frozen.get(name)
        if frozen is not None and frozen.entry is not None:  # a stored one goes back as it came, whatever its form
            own: dict[str, str] = {}
            for use, named in entry_names(frozen.entry):
                own.setdefault(named, f"{name}.{use}")
            stored = {key: value for key, value in frozen.entry.items() if key != "role"}
            entries[name] = renamed(stored, own.__getitem__)
            tensors.update({own[old]: raw for old, raw in frozen.tensors.items()})
            continue
        entry: dict[str, Any] = {"down": f"{name}.down", "up": f"{name}.up"}
        matrices = dict(zip(("down", "up"), adapters.matrices(name), strict=True))
        bits, dtype = code_bits(config.tensor_dtype), float_dtype(config.tensor_dtype)
        if frozen is not None:
            entry["role"] = "knowledge"
            bits, dtype = frozen.bits, torch.float16
        if bits is not None:
            entry["quant"] = {"bits": bits}
        for side, rank_axis in (("down", 1), ("up", 0)):
            matrix = matrices[side]
            if bits is not None:
                entry["quant"][side] = _write_codes(tensors, f"{name}.{side}", matrix, bits, rank_axis)
            else:
                tensors[f"{name}.{side}"] = from_torch(matrix.to(dtype))
        entries[name] = entry
    positions: dict[str, list[list[Any]]] = {}
    for i, (position, branches) in enumerate(adapters.branches.items()):
        for j, branch in enumerate(branches):
            name = branch.adapter
            if branch.core is not None:
                name = f"c{i}" if j == 0 else f"c{i}.{j}"
                tensors[f"{name}.up"] = from_torch(branch.core.to(float_dtype(config.tensor_dtype)))
                entries[name] = with_core(entries[branch.adapter], f"{name}.up")
            scale = float(torch.as_tensor(branch.scale).detach())
            positions.setdefault(position, []).append([name, scale])
    plain = {name for branches in positions.values() for name, _ in branches}
    entries = {name: entry for name, entry in entries.items() if name in plain}
    head: dict[str, Any] = {"weight": "head.weight", "bias": "head.bias"}
    head_bits = code_bits(config.head_dtype)
    if head_bits is None:
        tensors["head.weight"] = from_torch(run.head.weight.to(float_dtype(config.head_dtype)))
    else:
        form = _write_codes(tensors, "head.weight", run.head.weight, head_bits, rank_axis=0)
        head["quant"] = {"bits": head_bits, "weight": form}
    tensors["head.bias"] = from_torch(run.head.bias.to(float_dtype(config.head_dtype)))
    record = {
        "format": "pear-task/1",
        "task": config.task,
        "backbone": {"model": run.adapted.backbone.name, "digest": run.adapted.backbone.digest},
        "activation": config.activation,
        "adapters": entries,
        "positions": positions,
        "head": head,
        "labels": list(run.dataset.classes),
        "preprocess": run.record,
        "metrics": metrics,
        "training": {
            **{key: value for key, value in asdict(config).items() if key not in ("task", "device")},
            "data": run.dataset.description.partition(": ")[2],
            "data_name": os.fsencode(Path(run.dataset.description.partition(": ")[0]).name).decode(errors="replace"),
            "data_fingerprint": run.identity["data"],
            "images": run.dataset.counts,
            "unreadable": run.dataset.unreadable_counts,
            "recall": run.recall,
            "importance_score": config.importance,
            "precision": run.precision,
            "given": run.given,
            "importance": run.importance,
            "pruned": in_order(run),
            "borrowed": run.sources,
            "banked": run.banked,
            "history": run.history,
            "fingerprint": fingerprint(run.identity),
            "kept_epoch": run.best_epoch if config.select == "best" else len(run.history),
            "trainable_params": sum(p.numel() for group in run.optimiser.param_groups for p in group["params"]),
            "machines": run.machines,
        },
    }
    return make_task(record, tensors, config.task)


def in_order(run: TaskRun) -> list[str]:
    """The pruned positions, in forward order."""
    return sorted(run.pruned, key=list(run.adapters.own).index)


def _write_codes(tensors: dict[str, RawTensor], name: str, matrix: Tensor, bits: int, rank_axis: int) -> dict[str, Any]:
    packed, scale = quantise(matrix, bits, rank_axis)
    tensors[name], tensors[f"{name}.scale"] = from_torch(packed), from_torch(scale)
    return {"shape": list(matrix.shape), "scale": f"{name}.scale"}
