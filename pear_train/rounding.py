"""Writes a trained task in other number formats, and measures how much worse it becomes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pear_store import RawTensor, Task, make_task
from pear_store.format.codes import matrix_values
from pear_store.format.manifest import with_plain_names
from pear_store.format.record import Adapter, Head, Matrix, Part, with_matrices
from pear_train.bases import is_bases
from pear_train.changed import Changed, check_task, write_changed
from pear_train.choices import CoreDtype, HeadDtype, TensorDtype
from pear_train.config import TrainConfig
from pear_train.data import Dataset
from pear_train.dtypes import Written, code_bits, float_dtype
from pear_train.errors import ConfigError
from pear_train.machine import on_device
from pear_train.output import check_out
from router import Backbone
from router.tensors import from_torch, quantise, to_torch


def round_task(
    task: Task,
    backbone: Backbone,
    dataset: Dataset,
    out: Path,
    tensor_dtype: TensorDtype | None = None,
    core_dtype: CoreDtype | None = None,
    head_dtype: HeadDtype | None = None,
    name: str = "",
    device: str | None = None,
) -> Changed:
    """Writes a task in other number formats. It is evaluated on the data before and after, through the router.

    Common bases stay as they are, and so does what is kept of pruned adapters. Adapters of a base set or a bank cannot
    be rounded.

    Args:
        dataset: data of the task's classes; val and test are evaluated.
        out: the checkpoint to write.
        tensor_dtype, core_dtype, head_dtype: formats of adapters, cores and head, as :class:`TrainConfig` has them.
            None: as they are.
        name: name of the new task; empty: the same name.
        device: device of torch. None: a GPU if there is one.
    Raises:
        ConfigError: no format is given, the task lacks what is to be rounded or has it from other tasks, or the data do
            not fit it.
    """
    told = {"tensor_dtype": tensor_dtype, "core_dtype": core_dtype, "head_dtype": head_dtype}
    asked = {option: dtype for option, dtype in told.items() if dtype is not None}
    training = task.record["training"]
    rounded = training.get("rounded")
    given = rounded.get("given") if isinstance(rounded, dict) else training.get("given")
    _check(task, asked, given)
    check_task(task, backbone, dataset)
    check_out(out)
    name = TrainConfig(task=name or task.name).task
    adapted = on_device(backbone, device)
    adapted.attach(list(task.positions))
    before = _formats(task)
    settled: dict[str, str] = dict(asked)
    if training.get("core_dtype") == "auto" and "core_dtype" in before:  # it would now mean another format
        settled = {"core_dtype": before["core_dtype"], **asked}
    made = in_formats(task, tensor_dtype, core_dtype, head_dtype)
    record = {**made.record, "task": name, "training": {**training, **settled}}
    done = {"from": {option: before[option] for option in asked}, "given": given}
    return write_changed(task, make_task(record, made.tensors, name), adapted, dataset, out, "rounded", done)


def in_formats(
    task: Task,
    tensor_dtype: TensorDtype | None = None,
    core_dtype: CoreDtype | None = None,
    head_dtype: HeadDtype | None = None,
) -> Task:
    """The task with its own adapters, cores and head in other number formats. What its record says of training stays.

    Args:
        tensor_dtype, core_dtype, head_dtype: as for :func:`round_task`.
    """
    record, tensors = _rounded(
        with_plain_names(task), {"tensor_dtype": tensor_dtype, "core_dtype": core_dtype, "head_dtype": head_dtype}
    )
    return make_task(record, tensors, task.name)


def _formats(task: Task) -> dict[str, str]:
    """The formats of what a task has of its own, by option. Several, if there are, are joined by +."""
    found: dict[str, set[str]] = {}
    for adapter in task.adapters.values():
        for matrix in adapter.parts.values():
            if adapter.core is not None and matrix == adapter.core:
                found.setdefault("core_dtype", set()).add(_format(matrix, task))
            elif not _is_shared(adapter, task):
                found.setdefault("tensor_dtype", set()).add(_format(matrix, task))
    if task.head is not None:
        found["head_dtype"] = {_format(task.head.weight, task)}
    return {option: "+".join(sorted(formats)) for option, formats in found.items()}


def _format(matrix: Matrix, task: Task) -> str:
    return task.tensors[matrix.name].dtype if matrix.bits is None else f"Q{matrix.bits}"


def _is_shared(adapter: Adapter, task: Task) -> bool:
    """Whether an adapter's matrices, but for its core, stay: common bases, and what is kept of pruned adapters."""
    return adapter.role == "knowledge" or (adapter.core is not None and "bases" in task.record["training"])


def _check(task: Task, asked: Mapping[str, Written], given: str | None) -> None:
    """Raises a ConfigError unless the task has of its own what is to be rounded."""
    name, on_bases = f"task {task.name!r}", "bases" in task.record["training"]
    if not asked:
        raise ConfigError(f"{name}: expected a number format to round to: give tensor, core or head dtype")
    if asked.get("core_dtype") == "auto":
        raise ConfigError(f"{name}: core dtype 'auto' is no format to round to: name one")
    if is_bases(task):
        raise ConfigError(f"{name}: it is common bases, which stay floats: give a task")
    if "tensor_dtype" in asked and all(_is_shared(one, task) for one in task.adapters.values()):
        raise ConfigError(f"{name}: it has no adapters of its own: leave tensor dtype out")
    if "tensor_dtype" in asked and given is not None and not on_bases:
        raise ConfigError(
            f"{name}: it has adapters of a base set or a bank, and a store would no longer keep them once for all "
            "tasks: leave tensor dtype out"
        )
    if "core_dtype" in asked and not any(one.core for one in task.adapters.values()):
        raise ConfigError(f"{name}: it has no cores: leave core dtype out")


def _rounded(task: Task, asked: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, RawTensor]]:
    """The record and the tensors of a task whose adapters, cores and head are of the formats that are asked for."""
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in task.tensors.items()}
    of_adapters, of_cores, of_head = (asked.get(f"{what}_dtype") for what in ("tensor", "core", "head"))
    written = _Rewritten(task.tensors)
    entries: dict[str, Any] = {}
    for name, entry in task.record["adapters"].items():
        adapter = Adapter.parse(entry, shapes)
        shared = _is_shared(adapter, task)
        parts: dict[Part, Matrix] = {}
        for part, matrix in adapter.parts.items():
            dtype = of_cores if matrix == adapter.core else None if shared else of_adapters
            parts[part] = written.matrix(f"{name}.{part}", matrix, dtype, adapter.stack)
        entries[name] = with_matrices(entry, parts)
    head = task.record["head"]
    if head is not None:
        parsed = Head.parse(head, shapes)
        bias = to_torch(task.tensors[parsed.bias])
        written.tensors["head.bias"] = from_torch(bias if of_head is None else bias.to(float_dtype(of_head)))
        head = {**with_matrices(head, {"weight": written.matrix("head.weight", parsed.weight, of_head)}),
                "bias": "head.bias"}  # fmt: skip
    return {**task.record, "adapters": entries, "head": head}, written.tensors


class _Rewritten:
    """The tensors of a changed task. Matrices that entries have in common are written once.

    Args:
        before: the tensors of the task as it was.
    """

    def __init__(self, before: Mapping[str, RawTensor]) -> None:
        self.before = before
        self.tensors: dict[str, RawTensor] = {}
        self._made: dict[tuple[str, ...], Matrix] = {}

    def matrix(self, name: str, matrix: Matrix, dtype: Written | None, stack: int | None = None) -> Matrix:
        """Writes a matrix, or a stack of them, as tensors of this name, unless that is done already.

        Args:
            dtype: the format that it gets; None: as it is.
        """
        if matrix.names not in self._made:
            self._made[matrix.names] = self._write(name, matrix, dtype, stack)
        return self._made[matrix.names]

    def _write(self, name: str, matrix: Matrix, dtype: Written | None, stack: int | None) -> Matrix:
        scale = f"{name}.scale"
        if dtype is None:
            self.tensors[name] = self.before[matrix.name]
            if matrix.scale is None:
                return replace(matrix, name=name)
            self.tensors[scale] = self.before[matrix.scale]
            return replace(matrix, name=name, scale=scale)
        places = [matrix] if stack is None else [replace(matrix, place=place) for place in range(stack)]
        every = [torch.from_numpy(matrix_values(one, self.before).astype("f4")) for one in places]
        bits = code_bits(dtype)
        if bits is None:
            self._add(name, [one.to(float_dtype(dtype)) for one in every], stack)
            return replace(matrix, name=name, bits=None, scale=None)
        codes = [quantise(one, bits, matrix.rank_axis) for one in every]
        self._add(name, [packed for packed, _ in codes], stack)
        self._add(scale, [scales for _, scales in codes], stack)
        return replace(matrix, name=name, bits=bits, scale=scale)

    def _add(self, name: str, every: Sequence[Tensor], stack: int | None) -> None:
        self.tensors[name] = from_torch(every[0] if stack is None else torch.stack(list(every)))
