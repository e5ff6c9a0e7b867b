"""Interrupted runs: after every epoch, a run's whole state is written to one file beside its future checkpoint."""

import errno
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pear_train.adapters import FrozenAdapter, TrainedBranch
from pear_train.errors import ConfigError, PearTrainError, ResourceError
from pear_train.identity import differences
from pear_train.optimiser import train_what_is_there
from pear_train.output import STATE_FORMAT, partial_path, temporary_path
from pear_train.run import TaskRun
from router.tensors import from_torch, to_torch

logger = logging.getLogger(__name__)

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def state_bytes(run: TaskRun) -> int:
    """About how many bytes a run's files take at most: two states (one replaces the other) and two checkpoints."""
    numbers = sum(parameter.numel() for parameter in run.tensors().values())
    numbers += sum(one.down.numel() + one.up.numel() for one in run.adapters.frozen.values())
    return 4 * numbers * (2 * 4 + 2) + 1_000_000  # float32: weights, the best ones, two moments; and a record


def save_state(run: TaskRun, out: Path) -> None:
    """Writes the state at an epoch's end, as a whole or not at all.

    Raises:
        ResourceError: the disk is full. The older state stays.
        PearTrainError: the file cannot be written for another reason. The older state stays.
    """
    began, path, temporary = time.perf_counter(), partial_path(out), temporary_path(out)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in _tensors(run).items()}
    try:
        temporary.unlink(missing_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, {"run": json.dumps(_record(run))})
        temporary.chmod(mode)  # safetensors makes files for their owner alone
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        size_bytes = temporary.stat().st_size
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise ResourceError(
                f"{path}: the run's state cannot be written: the disk is full. Make room; then the same command "
                "resumes after the last epoch that was kept"
            ) from None
        raise PearTrainError(f"{path}: the run's state cannot be written: {error}") from None
    seconds = time.perf_counter() - began
    logger.debug("%s: kept the state, %d bytes, in %.2f s", run.config.task, size_bytes, seconds)


def _tensors(run: TaskRun) -> dict[str, Tensor]:
    """The current and the best weights, optimiser moments, generators, and frozen adapters."""
    tensors: dict[str, Tensor] = {f"now {name}": tensor for name, tensor in run.state().items()}
    tensors.update({f"best {name}": tensor for name, tensor in run.best_state.items()})
    for name, parameter in run.tensors().items():
        for moment in _MOMENTS:
            if moment in run.optimiser.state.get(parameter, {}):
                tensors[f"{moment} {name}"] = torch.as_tensor(run.optimiser.state[parameter][moment])
    tensors["generator"], tensors["dropping"] = run.generator.get_state(), run.dropping.get_state()
    for name, adapter in _frozen(run).items():
        tensors[f"down {name}"], tensors[f"up {name}"] = adapter.down, adapter.up
        tensors.update({f"raw {name} {key}": to_torch(raw) for key, raw in adapter.tensors.items()})
    return tensors


def _record(run: TaskRun) -> dict[str, Any]:
    """The part of the state that is not tensors."""
    return {
        "format": STATE_FORMAT,
        "identity": run.identity,
        "machines": run.machines,
        "precision": run.precision,
        "epoch": run.epoch,
        "best": [run.best, run.best_epoch],
        "importance": run.importance,
        "sources": run.sources,
        "banked": run.banked,
        "pruned": run.pruned,
        "history": run.history,
        "frozen": {
            name: {"role": adapter.role, "bits": adapter.bits, "entry": adapter.entry}
            for name, adapter in _frozen(run).items()
        },
        "branches": {
            position: [[branch.adapter, float(torch.as_tensor(branch.scale).detach()),
                        isinstance(branch.scale, nn.Parameter), branch.core is not None]
                       for branch in branches]
            for position, branches in run.adapters.branches.items()
        },
    }  # fmt: skip


def _frozen(run: TaskRun) -> dict[str, FrozenAdapter]:
    """The frozen adapters but for common bases. A run that resumes is given those anew."""
    return {name: adapter for name, adapter in run.adapters.frozen.items() if adapter.role != "bases"}


def resume_state(run: TaskRun, out: Path) -> bool:
    """Brings a fresh run to the state of an interrupted run of the same identity. Returns whether there was one.

    Raises:
        ConfigError: the state is of such a run, but lacks something or holds something else.
    """
    began, path = time.perf_counter(), partial_path(out)
    try:
        with safe_open(path, "pt") as file:
            record = json.loads((file.metadata() or {}).get("run", "{}"))
            if record.get("format") != STATE_FORMAT or differences(record["identity"], run.identity):
                return False
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
    except (OSError, SafetensorError, ValueError):
        return False
    try:
        _resume(run, record, tensors)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: expected the whole state of an interrupted run, found one that is changed or incomplete "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}): move it away to begin anew"
        ) from None
    logger.debug("%s: read the state in %.2f s", run.config.task, time.perf_counter() - began)
    return True


def _resume(run: TaskRun, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    if not 1 < record["epoch"] <= run.config.epochs:
        raise ValueError(f"epoch {record['epoch']} of {run.config.epochs}")
    if record["branches"].keys() != run.adapters.branches.keys():
        raise ValueError("other positions")
    _restore_adapters(run, record, tensors)
    run.importance, run.sources, run.banked = record["importance"], record["sources"], record["banked"]
    run.pruned, run.history = record["pruned"], record["history"]
    run.epoch, (run.best, run.best_epoch) = record["epoch"], record["best"]
    run.precision = record["precision"]
    run.machines = [*record["machines"], *(machine for machine in run.machines if machine not in record["machines"])]
    if run.pruned or run.adapters.on_bases:  # cores are new objects
        run.adapters.drop_unused()
        train_what_is_there(run.optimiser, run.adapters, run.head)
    _restore_weights(run, tensors)
    run.generator.set_state(tensors["generator"])
    run.dropping.set_state(tensors["dropping"])


def _restore_adapters(run: TaskRun, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    adapters, device = run.adapters, run.device
    adapters.frozen = {name: adapter for name, adapter in adapters.frozen.items() if adapter.role == "bases"}
    adapters.frozen |= {
        name: FrozenAdapter(
            frozen["role"], tensors[f"down {name}"], tensors[f"up {name}"], frozen["bits"], frozen["entry"],
            {key.split(" ", 2)[2]: from_torch(tensors[key]) for key in tensors if key.startswith(f"raw {name} ")},
        ).to(device)
        for name, frozen in record["frozen"].items()
    }  # fmt: skip
    adapters.branches = {
        position: [
            TrainedBranch(
                name,
                nn.Parameter(torch.tensor(scale, device=device)) if trained else scale,
                nn.Parameter(tensors[f"now core.{position} {i}"].to(device)) if cored else None,
            )
            for i, (name, scale, trained, cored) in enumerate(branches)
        ]
        for position, branches in record["branches"].items()
    }


def _restore_weights(run: TaskRun, tensors: dict[str, Tensor]) -> None:
    """Puts back the weights and their optimiser moments."""
    device = run.device
    run.restore({name: tensors[f"now {name}"] for name in run.tensors()})
    run.best_state = {name: tensors[f"best {name}"].to(device) for name in run.tensors() if f"best {name}" in tensors}
    run.optimiser.state.clear()
    for name, parameter in run.tensors().items():
        found = {m: tensors[f"{m} {name}"] for m in _MOMENTS if f"{m} {name}" in tensors}
        if found:
            run.optimiser.state[parameter] = {m: t if m == "step" else t.to(device) for m, t in found.items()}
