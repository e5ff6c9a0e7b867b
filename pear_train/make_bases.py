"""Makes common bases: fits them to the adapters of tasks, then trains them further on data sets; or takes them from the
backbone's own weights."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pear_store import RawTensor, Task, make_task, write_checkpoint
from pear_store.format.manifest import manifest_hash, to_manifest
from pear_train.config import OF_TRAINED_BASES, OPTIONS, TrainConfig
from pear_train.data import Dataset, preprocess_record
from pear_train.dtypes import code_bits, float_dtype
from pear_train.errors import ConfigError, DivergedError
from pear_train.fitting import Pairs, fit_bases, fitting_tasks, held_energy, singular_bases
from pear_train.group import mixed_features, next_batch
from pear_train.identity import BASES, Identity, fingerprint, identity
from pear_train.machine import on_device
from pear_train.make_base import check_configs
from pear_train.optimiser import move, rate_factor, set_rate
from pear_train.output import check_out
from pear_train.report import Step
from pear_train.run import TaskRun
from pear_train.source_tasks import remove_sources, train_sources
from pear_train.start import attached
from router import AdaptedBackbone, Backbone
from router.tensors import from_torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bases:
    """What :func:`make_bases` measured."""

    energy: dict[str, float]
    """The share, 0 to 1, of each task's adapters that the bases hold, by squared norm. Empty if there were no tasks."""
    val_top1: dict[str, float]
    """Top-1 on val, 0 to 1, of each task that the bases were trained for. Its cores and its head are not kept."""
    rank: int
    positions: int
    """Number of positions."""
    file_bytes: int
    seconds: float
    """Duration of the whole call."""


def make_bases(
    config: TrainConfig,
    backbone: Backbone,
    sources: Sequence[Task],
    out: Path,
    configs: Sequence[TrainConfig] = (),
    datasets: Sequence[Dataset] = (),
    progress: Callable[[Step], None] | None = None,
    say: Callable[[str], None] | None = None,
    overwrite: bool = False,
    force: bool = False,
) -> Bases:
    """Makes common bases of rank `config.rank` from stored tasks, from data sets, or from both.

    At each position the bases are fitted to all tasks' adapters; each task counts the same. Without stored tasks an
    unpruned task is trained for each data set first. These are kept in the folder ``OUT.sources`` until the bases are
    there, so that an interrupted call goes on from them. In training, a step takes a batch of every data set. The mean
    loss moves cores, heads and, more slowly, the bases. Bases are written orthonormal, as a task without a head whose
    branches have the scale 0.

    Args:
        config: options of the bases; its `task` is their name.
        sources: stored tasks, which may be none. Those of another backbone, activation or other positions are skipped.
        out: the checkpoint to write.
        configs, datasets: options and data of each task to train for. Without sources there must be some. Positions,
            rank and activation are those of `config`. The bases are trained with the first task's options.
        progress: is called after every step, with the task "bases", or with a task that is trained first.
        say: receives lines for a person: which tasks were skipped, and where bases are wider than what tasks learnt.
        overwrite: replace other runs' checkpoints in ``OUT.sources``.
        force: train again what is in ``OUT.sources``, and replace any task checkpoint there.
    Raises:
        ConfigError: neither tasks nor data are given, no stored task fits, the tasks' ranks at a position add up to
            less than `config.rank`, or tasks have one name or differ in what bases have once.
        PearTrainError, RouterError, PearStoreError: as for :func:`train`.
    Source: higher-order orthogonal iteration, De Lathauwer et al. 2000.
    """
    began = time.perf_counter()
    _check_options(config)
    if not sources and not datasets:
        raise ConfigError("bases: expected stored tasks or data, found neither: give a store with tasks, or data sets")
    _check_tasks(config, configs, datasets, backbone)
    check_out(out)
    config = _as_trained(config, configs)
    adapted = on_device(backbone, config.device)
    positions = attached(adapted, config.positions)
    _check_widths(config.rank, {position: adapted.widths[position] for position in positions})
    own: list[Task] = []
    if not sources:
        own = train_sources(config.rank, configs, backbone, datasets, out, progress, say, overwrite, force)
    fitting = fitting_tasks(sources or own, adapted, positions, say)
    fitted = fit_bases(fitting, positions, config.rank, say)
    now = bases_identity(config, backbone, sources, configs, datasets)
    task = _task(config, backbone, fitted, fitting, now, {})
    val_top1: dict[str, float] = {}
    if datasets:
        fitted, val_top1 = _train_on(task, configs, adapted, datasets, progress)
        task = _task(config, backbone, fitted, fitting, now, val_top1)
    file_bytes = write_checkpoint(out, task)
    if own:
        remove_sources(config.rank, configs, backbone, datasets, out)
    seconds = round(time.perf_counter() - began, 2)
    logger.debug("bases: wrote %s, %d bytes, in %.2f s", out, file_bytes, seconds)
    return bases_of(task, file_bytes, seconds)


def make_backbone_bases(config: TrainConfig, backbone: Backbone, out: Path) -> Bases:
    """Makes common bases of rank `config.rank` from the backbone's own weights. This needs no task and no data.

    D are the first right singular vectors of a position's weight, U its left ones times their singular values. So a
    core's entry counts as much as the backbone's own direction. With positions `auto`, every Linear of the blocks gets
    bases.

    Args:
        config: options of the bases; its `task` is their name.
        out: the checkpoint to write.
    Raises:
        ConfigError: a position is neither a Linear nor a 1x1 convolution, or is narrower than the rank.
        BackboneError: a position does not exist.
    Source: LoRA-XS, Bałazy et al., arXiv:2405.17604, section 3.
    """
    began = time.perf_counter()
    _check_options(config)
    check_out(out)
    config = of_backbone(config)
    adapted = on_device(backbone, config.device)
    positions = attached(adapted, config.positions)
    _check_widths(config.rank, {position: adapted.widths[position] for position in positions})
    fitted = singular_bases(backbone.module, positions, config.rank)
    task = _task(config, backbone, fitted, {}, bases_identity(config, backbone, ()), {})
    file_bytes = write_checkpoint(out, task)
    return bases_of(task, file_bytes, round(time.perf_counter() - began, 2))


def of_backbone(config: TrainConfig) -> TrainConfig:
    """The options of :func:`make_backbone_bases` as they are used."""
    config = _as_trained(config, ())
    return replace(config, positions="linear") if config.positions == "auto" else config


def _check_options(config: TrainConfig) -> None:
    if config.activation != "identity":
        raise ConfigError(f"bases: expected activation 'identity', which cores need, found {config.activation!r}")
    if code_bits(config.tensor_dtype) is not None:
        raise ConfigError(
            f"bases: expected tensor dtype F16, BF16 or F32, found {config.tensor_dtype}: bases are floats"
        )


def _as_trained(config: TrainConfig, configs: Sequence[TrainConfig]) -> TrainConfig:
    """The options of bases as they are used: those of training are the tasks', and what has no effect is default."""
    given: dict[str, Any] = {}
    if configs:
        given = {name: getattr(configs[0], name) for name in (*OF_TRAINED_BASES, "device", "img_size")}
    made = replace(config, **given)
    unused: dict[str, Any] = {name: OPTIONS[name].default for name in made.unused_by_bases(trained=bool(configs))}
    return replace(made, **unused)


def _check_tasks(
    config: TrainConfig, configs: Sequence[TrainConfig], datasets: Sequence[Dataset], backbone: Backbone
) -> None:
    """Raises a ConfigError unless the tasks to train for agree with the bases, and with each other."""
    if len(configs) != len(datasets):
        raise ConfigError(
            f"bases: expected one config for each of {len(datasets)} data sets, found {len(configs)}: give as many"
        )
    names = [one.task.casefold() for one in configs]
    for one in configs:
        if names.count(one.task.casefold()) > 1:
            raise ConfigError(
                f"bases: task {one.task!r}: another task has the same name, but for case: give each its own"
            )
    check_configs(configs, "bases")
    for one in configs:
        for name in ("positions", "rank", "activation"):
            wanted, found = getattr(config, name), getattr(one, name)
            if found != wanted:
                raise ConfigError(
                    f"bases: task {one.task!r}: expected {name} {wanted}, as the bases have, found {found}: give it "
                    "for the bases, and not for tasks"
                )
    sizes = {tuple(preprocess_record(backbone, one.img_size)["input_size"][1:]) for one in configs}
    if len(sizes) > 1:
        shown = " and ".join(map(str, sorted(sizes)))
        raise ConfigError(f"bases: expected tasks of one input size, found {shown}: give all the same img_size")


def _check_widths(rank: int, widths: Mapping[str, tuple[int, int]]) -> None:
    for position, sides in widths.items():
        if min(sides) < rank:
            raise ConfigError(
                f"bases: expected a rank of at most {min(sides)}, the smaller side at {position!r}, found {rank}: give "
                "a smaller rank"
            )


def bases_of(task: Task, file_bytes: int, seconds: float = 0.0) -> Bases:
    """What their checkpoint records of how they were made."""
    training = task.record["training"]
    positions = len(task.positions)
    return Bases(training["energy"], training["val_top1"], training["rank"], positions, file_bytes, seconds)


# ---- training on -----------------------------------------------------------------------------------------------------


def _train_on(
    task: Task,
    configs: Sequence[TrainConfig],
    adapted: AdaptedBackbone,
    datasets: Sequence[Dataset],
    progress: Callable[[Step], None] | None,
) -> tuple[Pairs, dict[str, float]]:
    """Trains bases, cores and heads along the mean loss of one batch of each data set.

    Returns:
        The bases, made orthonormal again, and each task's top-1 on val.
    """
    plain: dict[str, Any] = {"method": "pear", "head_dtype": "F16", "own_rank": 0, "own_bytes": None}
    alone = [replace(config, **plain) for config in configs]  # all that is learnt goes into the bases
    runs = [
        TaskRun(config, adapted, replace(dataset, test=None), bases=task)
        for config, dataset in zip(alone, datasets, strict=True)
    ]
    common = _share_bases(runs)
    config, own = runs[0].config, [run.batches for run in runs]
    steps, step = config.epochs * max(own), 0
    cores = [core for run in runs for core in run.adapters.cores().values()]
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for run in runs for p in run.head.parameters()], "factor": 1.0},
            {"params": cores, "factor": config.core_lr},
            {"params": [*chain(*common.values())], "factor": config.bases_lr, "weight_decay": 0.0},
        ],
        lr=config.lr,
        weight_decay=config.weight_decay,
    )
    for epoch in range(1, config.epochs + 1):
        for batch in range(max(own)):
            set_rate(optimiser, config.lr * rate_factor(step, steps, config.warmup))
            optimiser.zero_grad(set_to_none=True)
            for run, batches in zip(runs, own, strict=True):
                run.epoch, run.batch = epoch, batch % batches
            group = [(run, next_batch(run)) for run in runs]
            parts = mixed_features(group)
            losses = [run.loss(part, one.rows) for (run, one), part in zip(group, parts, strict=True)]
            loss = torch.stack(losses).mean()
            if not bool(torch.isfinite(loss)):
                raise DivergedError("bases", f"the loss became {float(loss.detach())} in epoch {epoch}", config.lr)
            loss.backward()
            move(optimiser, config.max_grad_norm)
            step += 1
            if progress is not None:
                val = _mean([run.accuracy(run.val_pixels) for run in runs]) if batch == max(own) - 1 else None
                top1 = _mean([run.train_top1 for run in runs])
                progress(Step("bases", epoch, config.epochs, batch + 1, max(own), float(loss.detach()), top1, val))
    for run in runs:
        run.check_finite()
    val_top1 = {run.config.task: run.accuracy(run.val_pixels) for run in runs}
    return {position: _orthonormal(down, up) for position, (down, up) in common.items()}, val_top1


def _share_bases(runs: Sequence[TaskRun]) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Gives all runs the same parameters as bases. Returns them by position."""
    first, shared = runs[0].adapters, {}
    for position, (branch, *_) in first.branches.items():
        frozen = first.frozen[branch.adapter]
        down, up = nn.Parameter(frozen.down.clone()), nn.Parameter(frozen.up.clone())
        shared[position] = down, up
        for run in runs:
            run.adapters.frozen[branch.adapter] = replace(frozen, down=down, up=up)
    return shared


def _orthonormal(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal bases that span the same spaces."""
    down, up = down.detach().cpu(), up.detach().cpu()
    return torch.linalg.qr(down).Q, torch.linalg.qr(up.t()).Q.t().contiguous()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# ---- the file --------------------------------------------------------------------------------------------------------


def bases_identity(
    config: TrainConfig,
    backbone: Backbone,
    sources: Sequence[Task],
    configs: Sequence[TrainConfig] = (),
    datasets: Sequence[Dataset] = (),
) -> Identity:
    """What common bases depend on: options, stored tasks, and the data that they are trained on."""
    config = _as_trained(config, configs)
    told = [
        [{k: v for k, v in asdict(one).items() if k != "device"}, dataset.fingerprint]
        for one, dataset in zip(configs, datasets, strict=True)
    ]
    data = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    lines = [manifest_hash(to_manifest(task)).hex() for task in sources]
    given = hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else None
    preprocess = preprocess_record(backbone, config.img_size)
    return {**identity(config, backbone.digest, preprocess, data, given), "method": BASES}


def _task(
    config: TrainConfig,
    backbone: Backbone,
    bases: Pairs,
    sources: Mapping[str, Pairs],
    identity: Identity,
    val_top1: dict[str, float],
) -> Task:
    """The bases as a task without a head, whose branches have the scale 0."""
    tensors: dict[str, RawTensor] = {}
    entries: dict[str, Any] = {}
    positions: dict[str, Any] = {}
    alike: dict[tuple[torch.Size, torch.Size], list[str]] = {}
    for position, (down, up) in bases.items():
        alike.setdefault((down.shape, up.shape), []).append(position)
    for i, group in enumerate(alike.values()):
        names = {"down": f"b{i}.down", "up": f"b{i}.up"}
        entries[f"b{i}"] = {**names, "stack": len(group)}
        for side, name in enumerate(names.values()):
            stack = torch.stack([bases[position][side] for position in group])
            tensors[name] = from_torch(stack.to(float_dtype(config.tensor_dtype)))
        positions.update({position: [[f"b{i}", 0.0, place]] for place, position in enumerate(group)})
    training = {key: value for key, value in asdict(config).items() if key not in ("task", "device")}
    record: dict[str, Any] = {
        "format": "pear-task/2",
        "task": config.task,
        "backbone": {"model": backbone.name, "digest": backbone.digest},
        "activation": config.activation,
        "adapters": entries,
        "positions": {position: positions[position] for position in bases},
        "head": None,
        "labels": [],
        "preprocess": preprocess_record(backbone, config.img_size),
        "metrics": {"val_top1": _mean(list(val_top1.values()))} if val_top1 else {},
        "training": {
            **training,
            "method": BASES,
            "importance_score": config.importance,
            "given": identity["given"],
            "data_fingerprint": identity["data"],
            "fingerprint": fingerprint(identity),
            "energy": {name: round(held_energy(pairs, bases), 6) for name, pairs in sources.items()},
            "val_top1": val_top1,
        },
    }
    return make_task(record, tensors, "common bases")
