"""From a run to the task that its checkpoint holds."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pear_store import RawTensor, Task, make_task
from pear_store.format.checkpoint import FORMAT
from pear_store.format.joined import JOINED_FORMAT
from pear_store.format.record import entry_names, renamed, with_core
from pear_train.adapters import AdapterSet, FrozenAdapter
from pear_train.bases import bases_key
from pear_train.config import TrainConfig
from pear_train.dtypes import code_bits, core_dtype, float_dtype
from pear_train.identity import fingerprint
from pear_train.recall import in_record
from pear_train.run import TaskRun
from router.tensors import from_torch, quantise


def to_task(run: TaskRun, metrics: dict[str, Any]) -> Task:
    """The task as the run stands, tensors in the dtypes to be written."""
    tensors: dict[str, RawTensor] = {}
    written = write_adapters(run.config, run.adapters, tensors)
    record = {
        **written,
        "task": run.config.task,
        "backbone": {"model": run.adapted.backbone.name, "digest": run.adapted.backbone.digest},
        "activation": run.config.activation,
        "head": _write_head(run, tensors),
        "labels": list(run.dataset.classes),
        "preprocess": run.preprocess,
        "metrics": metrics,
        "training": _training(run),
        **({} if run.threshold is None else {"threshold": run.threshold}),
    }
    return make_task(record, tensors, run.config.task)


def write_adapters(config: TrainConfig, adapters: AdapterSet, tensors: dict[str, RawTensor]) -> dict[str, Any]:
    """Adds what adapters and cores hold to `tensors`; returns the record's `format`, `adapters` and `positions`."""
    stacks = any(frozen.place is not None for frozen in adapters.frozen.values())
    entries, positions = (_write_stacks if stacks else _write_each)(config, adapters, tensors)
    return {"format": JOINED_FORMAT if stacks else FORMAT, "adapters": entries, "positions": positions}


_Written: TypeAlias = tuple[dict[str, Any], dict[str, list[list[Any]]]]
"""The record's `adapters` and `positions`."""


def _write_each(config: TrainConfig, adapters: AdapterSet, tensors: dict[str, RawTensor]) -> _Written:
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
            positions.setdefault(position, []).append([name, _number(branch.scale)])
    plain = {name for branches in positions.values() for name, _ in branches}
    return {name: entry for name, entry in entries.items() if name in plain}, positions


def _write_stacks(config: TrainConfig, adapters: AdapterSet, tensors: dict[str, RawTensor]) -> _Written:
    """On common bases that are stacks: cores that stand on one of them are one stack, and so are adapters of its own of
    one shape. The record then names few tensors, whatever the number of positions."""
    bits, dtype = code_bits(config.tensor_dtype), float_dtype(config.tensor_dtype)
    positions: dict[str, list[list[Any]]] = {}
    bases: dict[tuple[str, ...], FrozenAdapter] = {}
    cores: dict[tuple[str, ...], dict[int, Tensor]] = {}
    own: dict[tuple[torch.Size, torch.Size], list[tuple[Tensor, Tensor]]] = {}
    for position, (common, *others) in adapters.branches.items():
        frozen = adapters.frozen[common.adapter]
        assert common.core is not None and frozen.place is not None
        stack, _ = bases_key(frozen)
        bases.setdefault(stack, frozen)
        cores.setdefault(stack, {})[frozen.place] = common.core
        positions[position] = [[f"c{list(bases).index(stack)}", _number(common.scale), frozen.place]]
        for branch in others:
            down, up = adapters.matrices(branch.adapter)
            alike = own.setdefault((down.shape, up.shape), [])
            name = f"a{list(own).index((down.shape, up.shape))}"
            positions[position].append([name, _number(branch.scale), len(alike)])
            alike.append((down, up))
    entries: dict[str, Any] = {}
    for i, (stack, frozen) in enumerate(bases.items()):
        assert frozen.entry is not None
        entry = _write_stored(tensors, f"b{i}", frozen, frozen.entry)
        some = next(iter(cores[stack].values()))
        members: list[dict[str, RawTensor]] = [{} for _ in range(entry["stack"])]
        for place, member in enumerate(members):  # zeros where this run has no position
            core = cores[stack].get(place, torch.zeros_like(some))
            codes = _write_core(member, f"c{i}.up", core, config)
        tensors.update(_joined(members))
        entries[f"c{i}"] = with_core(entry, f"c{i}.up", codes)
    for i, pairs in enumerate(own.values()):
        members = [{} for _ in pairs]
        for (down, up), member in zip(pairs, members, strict=True):
            written = _write_matrices(member, f"a{i}", down, up, bits, dtype)
        tensors.update(_joined(members))
        entries[f"a{i}"] = {**written, "stack": len(pairs)}
    return entries, positions


def _number(scale: float | torch.nn.Parameter) -> float:
    return float(torch.as_tensor(scale).detach())


def _joined(members: Sequence[Mapping[str, RawTensor]]) -> dict[str, RawTensor]:
    """Tensors of equal names, dtypes and shapes as stacks."""
    return {
        name: RawTensor(like.dtype, (len(members), *like.shape), b"".join(bytes(one[name].data) for one in members))
        for name, like in members[0].items()
    }


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
        "importance": _short(run.importance),
        "pruned": in_order(run),
        "borrowed": run.sources,
        "banked": run.banked,
        "history": [_short(epoch) for epoch in run.history],
        "fingerprint": fingerprint(run.identity),
        "kept_epoch": run.best_epoch if config.select != "last" else len(run.history),
        "trainable_params": sum(p.numel() for group in run.optimiser.param_groups for p in group["params"]),
        "machines": run.machines,
    }


def _short(numbers: Mapping[str, float]) -> dict[str, float]:
    """Numbers to six digits: with all of theirs, those of 20 epochs take as many bytes as a task's cores."""
    return {name: float(f"{number:.6g}") for name, number in numbers.items()}


def in_order(run: TaskRun) -> list[str]:
    """The pruned positions, in forward order."""
    return sorted(run.pruned, key=list(run.adapters.own).index)


def _write_codes(tensors: dict[str, RawTensor], name: str, matrix: Tensor, bits: int, rank_axis: int) -> dict[str, Any]:
    packed, scale = quantise(matrix, bits, rank_axis)
    tensors[name], tensors[f"{name}.scale"] = from_torch(packed), from_torch(scale)
    return {"shape": list(matrix.shape), "scale": f"{name}.scale"}
