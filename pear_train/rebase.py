"""Moves a task to other common bases without training, and measures how much worse it becomes."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from pear_store import RawTensor, Task, make_task
from pear_store.format.codes import matrix_values, up_values
from pear_store.format.record import HEAD_PARTS, entry_names, renamed
from pear_train.adapters import AdapterSet, TrainedBranch
from pear_train.bank import stored_adapter
from pear_train.bases import bases_at, check_bases, is_bases, stand_on
from pear_train.changed import Changed, check_task, write_changed
from pear_train.config import OPTIONS, TrainConfig
from pear_train.data import Dataset
from pear_train.dtypes import code_bits
from pear_train.errors import ConfigError
from pear_train.identity import identity_of
from pear_train.knowledge import in_common_bases
from pear_train.machine import on_device
from pear_train.output import check_out
from pear_train.to_task import write_adapters
from router import AdaptedBackbone, Backbone


@dataclass(frozen=True)
class Rebased(Changed):
    """The figures of a task that was moved."""

    bases: str
    held: float
    """The share, 0 to 1, of the cores' sum that the new bases hold, by squared norm."""


def rebase(
    task: Task,
    bases: Task,
    backbone: Backbone,
    dataset: Dataset,
    out: Path,
    name: str = "",
    device: str | None = None,
) -> Rebased:
    """Writes a task with the nearest cores in other bases: C = D⁺ · down · core · up · U⁺ at each position.

    Its own adapters, its head and its options do not change. The old and the new task are both evaluated on the data,
    through the router.

    Args:
        bases: the new common bases.
        dataset: data of the task's classes; val and test are evaluated.
        out: the checkpoint to write.
        name: name of the new task; empty: the same name.
        device: device of torch. None: a GPU if there is one.
    Raises:
        ConfigError: the task has no common bases, or the new bases or the data do not fit it.
    """
    if is_bases(task) or "bases" not in task.record["training"]:
        raise ConfigError(f"task {task.name!r}: it uses no common bases: give a task that was trained with --bases")
    check_task(task, backbone, dataset)
    check_out(out)
    name = TrainConfig(task=name or task.name).task
    config = _options(task, name)
    adapted = on_device(backbone, device)
    check_bases(bases, adapted, config)
    adapted.attach(list(task.positions))
    adapters, held = _moved(task, bases, adapted, config)
    tensors: dict[str, RawTensor] = {}
    record = {**task.record, "task": config.task, **write_adapters(config, adapters, tensors)}
    if (head := task.record["head"]) is not None:
        names = {stored: f"head.{use}" for use, stored in entry_names(head, HEAD_PARTS)}
        tensors |= {new: task.tensors[stored] for stored, new in names.items()}
        record["head"] = renamed(head, names.__getitem__, HEAD_PARTS)
    record["training"] = {**task.record["training"], "bases": bases.name}
    told = {"from": task.record["training"]["bases"], "held": held}
    after = make_task(record, tensors, config.task)
    changed = write_changed(task, after, adapted, dataset, out, "rebased", told, bases)
    return Rebased(**asdict(changed), bases=bases.name, held=held)


def _options(task: Task, name: str) -> TrainConfig:
    options = {key: value for key, value in identity_of(task).items() if key in OPTIONS}
    try:
        return TrainConfig(**{**options, "task": name or task.name, "rank": OPTIONS["rank"].default})
    except ConfigError as error:
        raise ConfigError(f"task {task.name!r}: field 'training': {error}") from None


def _moved(task: Task, bases: Task, adapted: AdaptedBackbone, config: TrainConfig) -> tuple[AdapterSet, float]:
    """The task's adapters with the nearest cores in `bases`, and the share of the squared norm that these hold."""
    bits = code_bits(config.tensor_dtype), code_bits(config.core_dtype)
    adapters = AdapterSet({}, 0, config.activation, config.scale, torch.Generator(), False, *bits)
    stand_on(adapters, bases_at(bases, adapted, list(task.positions)), 1.0, adapted.device)
    whole = kept = 0.0
    for position, (common, *own) in task.positions.items():
        branch = adapters.branches[position][0]
        (d, u), old = adapters.matrices(branch.adapter), task.adapters[common.adapter]
        down = torch.from_numpy(matrix_values(old.down, task.tensors).astype("f4"))
        up = torch.from_numpy(up_values(old, task.tensors).astype("f4")) * common.scale
        core = in_common_bases(down, up, d.cpu(), u.cpu())
        whole += float((down @ up).square().sum())
        kept += float((d.cpu() @ core @ u.cpu()).square().sum())
        branch.core = nn.Parameter(core.to(adapted.device))
        for one in own:
            adapters.frozen[one.adapter] = stored_adapter(task, one.adapter, "bank")
            adapters.branches[position].append(TrainedBranch(one.adapter, one.scale))
    return adapters, min(kept / whole, 1.0) if whole else 1.0
