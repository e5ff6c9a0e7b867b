"""From a run to the task that its checkpoint holds."""

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pear_store import RawTensor, Task, make_task
from pear_store.format.record import entry_names, renamed, with_core
from pear_train.adapters import FrozenAdapter
from pear_train.config import TrainConfig
from pear_train.dtypes import code_bits, core_dtype, float_dtype
from pear_train.identity import fingerprint
from pear_train.recall import in_record
from pear_train.run import TaskRun
from router.tensors import from_torch, quantise


def to_task(run: TaskRun, metrics: dict[str, Any]) -> Task:
    """The task as the run stands, tensors in the dtypes to be written."""
    tensors: dict[str, RawTensor] = {}
    entries, positions = _write_adapters(run, tensors)
    record = {
        "format": "pear-task/1",
        "task": run.config.task,
        "backbone": {"model": run.adapted.backbone.name, "digest": run.adapted.backbone.digest},
        "activation": run.config.activation,
        "adapters": entries,
        "positions": positions,
        "head": _write_head(run, tensors),
        "labels": list(run.dataset.classes),
        "preprocess": run.preprocess,
        "metrics": metrics,
        "training": _training(run),
        **({} if run.threshold is None else {"threshold": run.threshold}),
    }
    return make_task(record, tensors, run.config.task)


def _write_adapters(run: TaskRun, tensors: dict[str, RawTensor]) -> tuple[dict[str, Any], dict[str, list[list[Any]]]]:
    """Adds what adapters and cores hold to `tensors`; returns the record's `adapters` and `positions`."""
    config, adapters = run.config, run.adapters
    entries = {}
    for name in adapters.used():
        frozen = adapters.frozen.get(name)
        if frozen is not None and frozen.entry is not None:
            entries[name] = _write_stored(tensors, name, frozen, frozen.entry)
        elif frozen is not None:
            written = _write_matrices(tensors, name, frozen.down, frozen.up, frozen.bits, torch.float16)
            entries[name] = {**written, "role": "knowledge"}
        else:
            bits, dtype = code_bits(config.tensor_dtype), float_dtype(config.tensor_dtype)
            entries[name] = _write_matrices(tensors, name, *adapters.matrices(name), bits, dtype)
    positions: dict[str, list[list[Any]]] = {}
    for i, (position, branches) in enumerate(adapters.branches.items()):
        for j, branch in enumerate(branches):
            name = branch.adapter
            if branch.core is not None:
                name = f"c{i}" if j == 0 else f"c{i}.{j}"
                codes = _write_core(tensors, f"{name}.up", branch.core, config)
                entries[name] = with_core(entries[branch.adapter], f"{name}.up", codes)
            scale = float(torch.as_tensor(branch.scale).detach())
            positions.setdefault(position, []).append([name, scale])
    plain = {name for branches in positions.values() for name, _ in branches}
    return {name: entry for name, entry in entries.items() if name in plain}, positions


def _write_core(tensors: dict[str, RawTensor], name: str, core: Tensor, config: TrainConfig) -> dict[str, Any] | None:
    """Adds a core to `tensors`; returns what the record says of its codes, if it is codes."""
    dtype = core_dtype(config.core_dtype, config.tensor_dtype)
    if (bits := code_bits(dtype)) is None:
        tensors[name] = from_torch(core.to(float_dtype(dtype)))
        return None
    return {"bits": bits, **_write_codes(tensors, name, core, bits, rank_axis=0)}


def _write_stored(
    tensors: dict[str, RawTensor], name: str, adapter: FrozenAdapter, entry: Mapping[str, Any]
) -> dict[str, Any]:
    """A stored adapter goes back as it came, whatever its form, but for its tensors' names."""
    own: dict[str, str] = {}
    for use, named in entry_names(entry):
        own.setdefault(named, f"{name}.{use}")
    tensors.update({own[old]: raw for old, raw in adapter.tensors.items()})
    return renamed({key: value for key, value in entry.items() if key != "role"}, own.__getitem__)


def _write_matrices(
    tensors: dict[str, RawTensor], name: str, down: Tensor, up: Tensor, bits: int | None, dtype: torch.dtype
) -> dict[str, Any]:
    """An adapter's matrices, as floats or as codes of `bits`."""
    entry: dict[str, Any] = {"down": f"{name}.down", "up": f"{name}.up"}
    if bits is not None:
        entry["quant"] = {"bits": bits}
    for side, matrix, rank_axis in (("down", down, 1), ("up", up, 0)):
        if bits is None:
            tensors[f"{name}.{side}"] = from_torch(matrix.to(dtype))
        else:
            entry["quant"][side] = _write_codes(tensors, f"{name}.{side}", matrix, bits, rank_axis)
    return entry


def _write_head(run: TaskRun, tensors: dict[str, RawTensor]) -> dict[str, Any]:
    """Adds the head to `tensors`; returns what the record says of it."""
    head: dict[str, Any] = {"weight": "head.weight", "bias": "head.bias"}
    bits, dtype = code_bits(run.config.head_dtype), float_dtype(run.config.head_dtype)
    if bits is None:
        tensors["head.weight"] = from_torch(run.head.weight.to(dtype))
    else:
        form = _write_codes(tensors, "head.weight", run.head.weight, bits, rank_axis=0)
        head["quant"] = {"bits": bits, "weight": form}
    tensors["head.bias"] = from_torch(run.head.bias.to(dtype))
    return head


def _training(run: TaskRun) -> dict[str, Any]:
    """What the record says of how the task was trained."""
    config = run.config
    return {
        **{key: value for key, value in asdict(config).items() if key not in ("task", "device")},
        "data": run.dataset.description.partition(": ")[2],
        "data_name": os.fsencode(Path(run.dataset.description.partition(": ")[0]).name).decode(errors="replace"),
        "data_fingerprint": run.identity["data"],
        "images": run.dataset.counts,
        "unreadable": run.dataset.unreadable_counts,
        **in_record(run.scores),
        "importance_score": config.importance,
        "precision": run.precision,
        "given": run.given,
        **({} if run.bases is None else {"bases": run.bases}),
        "importance": run.importance,
        "pruned": in_order(run),
        "borrowed": run.sources,
        "banked": run.banked,
        "history": run.history,
        "fingerprint": fingerprint(run.identity),
        "kept_epoch": run.best_epoch if config.select != "last" else len(run.history),
        "trainable_params": sum(p.numel() for group in run.optimiser.param_groups for p in group["params"]),
        "machines": run.machines,
    }


def in_order(run: TaskRun) -> list[str]:
    """The pruned positions, in forward order."""
    return sorted(run.pruned, key=list(run.adapters.own).index)


def _write_codes(tensors: dict[str, RawTensor], name: str, matrix: Tensor, bits: int, rank_axis: int) -> dict[str, Any]:
    packed, scale = quantise(matrix, bits, rank_axis)
    tensors[name], tensors[f"{name}.scale"] = from_torch(packed), from_torch(scale)
    return {"shape": list(matrix.shape), "scale": f"{name}.scale"}
