"""The steps of the command, through the library: from a request to trained tasks."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import click
import torch

from pear_store import PearStoreError, Store, Task, read_checkpoint
from pear_store.counted import counted
from pear_store.terminal import echo
from pear_train.bases import check_rank, is_bases
from pear_train.changed import Changed
from pear_train.cli.cluster import train_on_cluster
from pear_train.cli.options import Told
from pear_train.cli.places import check_places
from pear_train.cli.progress import Progress, say_above
from pear_train.cli.request import Given, Request, Stopped, Work
from pear_train.config import OPTIONS, TrainConfig
from pear_train.curves import Curves
from pear_train.data import Dataset, open_dataset
from pear_train.errors import ConfigError, PearTrainError
from pear_train.html import check_html
from pear_train.identity import given_digest, run_identity
from pear_train.job import Job
from pear_train.loop import train_many
from pear_train.make_base import Base, base_identity, check_configs, train_base
from pear_train.make_bases import bases_identity, bases_of, make_backbone_bases, make_bases, of_backbone
from pear_train.output import check_out, checkpoint_at, is_finished
from pear_train.plot import check_picture, check_plot, plot_path
from pear_train.preview import write_preview
from pear_train.rebase import rebase
from pear_train.report import Failed, Result, Step, result_of
from pear_train.rounding import round_task
from pear_train.source_tasks import remove_sources, sources_at
from pear_train.tasks import DATA_OPTIONS, TaskEntry, read_tasks
from router import Backbone, RouterError, load_backbone

_BANK_TASKS = 64
"""Default size of a bank. One forward tries all its adapters at a position; more tasks need too much memory."""

_FORMATS = ("tensor_dtype", "core_dtype", "head_dtype")


def do_work(request: Request, told: Told) -> Work | None:
    """Trains the tasks of a request. None for a base set, common bases or a changed task, which are printed already."""
    out, many = request.out, request.many
    if request.round is not None and not told.shown.keys() & set(_FORMATS):
        raise click.UsageError("--round needs --tensor-dtype, --core-dtype or --head-dtype: it says what to round to")
    if os.path.isdir(out) != many and os.path.exists(out):
        raise ConfigError(
            f"--out {out}: " + ("is a file: --tasks needs a folder" if many else "is a folder: name a file in it")
        )
    if request.tasks_file is not None:
        entries = read_tasks(request.tasks_file, told.options)
    elif request.make_bases:
        entries = []
    else:
        entries = [TaskEntry.of(str(request.task), str(request.data), told.options)]
    _check_pruning(request, entries)
    work = Work(entries, {e.config.task: out / f"{e.config.task}.safetensors" if many else out for e in entries})
    check_places(request, work)
    _note_unused(request, entries, told)
    work.curves = Curves(request.curves, request.tensorboard, work.paths)
    if many:
        _make_folder(out)
    if request.html is not None:
        check_html(request.html)
    if request.preview is not None:
        check_picture("--preview", request.preview)
    if not many:
        check_out(out)
    if request.plot:
        for path in work.paths.values():
            check_plot(plot_path(path))
    rounded = None if request.round is None else _read_task(request.round, request.from_store)
    moved = None if request.rebase is None else _read_task(request.rebase, request.from_store)
    base = None if request.base is None else read_checkpoint(request.base)
    bank = _bank(request)
    bases = None if request.bases is None else _read_task(request.bases, request.from_store)
    if bases is not None and request.rebase is None:
        for entry in entries:
            if "rank" in told.shown or "rank" in entry.given:  # also a rank that is the default, if it was asked for
                check_rank(bases, entry.config.rank)
    if (
        (request.rebase is not None or request.round is not None)
        and checkpoint_at(out) is not None
        and not (request.overwrite or request.force)
    ):
        raise ConfigError(
            f"{out}: there is already a task checkpoint. --overwrite replaces it; another --out keeps both"
        )
    datasets = [] if many else [_open(entry, request.data_root) for entry in entries]  # early, so mistakes show at once
    loaded = load_backbone(request.backbone, request.weights)
    echo(f"backbone  {loaded.name} {loaded.digest[:19]}…", err=True)
    if request.make_base:
        _make_base(request, entries, loaded, datasets)
        return None
    if request.make_bases:
        _make_bases(request, told, entries, loaded, datasets)
        return None
    if moved is not None:
        assert bases is not None
        _rebase(request, moved, bases, loaded, datasets[0], told.options["device"])
        return None
    if rounded is not None:
        _round(request, rounded, loaded, datasets[0], told)
        return None
    _plan(request, work, loaded, datasets, given_digest(base, bank, bases))
    given = Given(base, bank, bases)
    if request.preview is not None:
        preview = partial(write_preview, entries[0].config, loaded, datasets[0], request.preview)
        if work.draw(f"{request.task}: --preview", preview, say_above):
            echo(f"preview   {request.preview}", err=True)
    try:
        _train(request, work, loaded, given, 8 if many and _on_gpu(told.options["device"]) else 1)
    except KeyboardInterrupt:
        raise Stopped(work.left_behind()) from None
    return work


def _check_pruning(request: Request, entries: list[TaskEntry]) -> None:
    """Checks options of tasks that prune, before anything is read."""
    if request.make_base or request.make_bases or request.rebase is not None or request.round is not None:
        return
    for config in (entry.config for entry in entries):
        if config.prunes(on_bases=request.bases is not None):
            try:
                config.check_pruning()
            except ConfigError as error:
                where = "" if request.tasks_file is None else f"{request.tasks_file}: task {config.task!r}: "
                raise ConfigError(f"{where}{error}") from None


def _plan(request: Request, work: Work, loaded: Backbone, datasets: Sequence[Dataset], given: str | None) -> None:
    """Finds out which tasks are already trained, which must be trained, and which cannot be."""
    for i, entry in enumerate(work.entries):
        config, path = entry.config, work.paths[entry.config.task]
        try:  # with many tasks, all mistakes show now, and each one only fails its own task
            dataset = datasets[i] if datasets else open_dataset(entry.data, request.data_root, entry.data_options)
            now = partial(run_identity, config, loaded, dataset, given)
            if not request.force and is_finished(path, now, request.overwrite):
                work.kept.add(config.task)
                work.results.append(result_of(read_checkpoint(path), path.stat().st_size))
            else:
                check_out(path)
                again = partial(_open, entry, request.data_root)  # many data sets may not fit into memory together
                work.jobs.append(Job(config, again, path) if request.many else Job.of(config, dataset, path))
        except (PearTrainError, RouterError, PearStoreError) as error:
            if not request.many:
                raise
            work.results.append(Failed(config.task, str(error)))
            echo(f"Error: {config.task}: {error}", err=True)
    if work.kept and request.many:
        count = f"{len(work.kept)} of {len(work.entries)}"
        echo(f"tasks     {count} are trained already, with the same options and data", err=True)
    elif work.kept:
        echo(f"{request.out}: trained already, with the same options and data; --force trains again", err=True)


def _train(request: Request, work: Work, loaded: Backbone, given: Given, default_together: int) -> None:
    if request.address is not None:
        train_on_cluster(request, work, loaded, given)
        return
    many, together = request.many, request.together or default_together
    epochs = sum(job.config.epochs for job in work.jobs) if many else None
    with Progress(str(request.task or request.tasks_file), epochs) as bar:
        for result in work.results:
            if isinstance(result, Result):
                _write_curves(work, result.task, partial(work.curves.whole, result), bar)
        ended = train_many(
            work.jobs, loaded, partial(_show, bar, work), together=together,
            on_error="report" if many else "raise",
            base=given.base, bank=given.bank, bases=given.bases, say=bar.say,
        )  # fmt: skip
        for result in ended:
            work.keep(result, bar.say)
        _write_curves(work, "curves", work.curves.close, bar)


def _show(bar: Progress, work: Work, step: Step) -> None:
    bar.show(step)
    _write_curves(work, step.task, partial(work.curves.show, step), bar)


def _write_curves(work: Work, task: str, write: Callable[[], None], bar: Progress) -> None:
    """Writes curves. If that fails, no more curves are written, and training goes on."""
    if not work.draw(f"{task}: curves", write, bar.say):
        work.curves = Curves(None, None)


def _make_base(request: Request, entries: list[TaskEntry], loaded: Backbone, datasets: list[Dataset]) -> None:
    configs, out = [entry.config for entry in entries], request.out
    check_configs(configs)
    now = partial(base_identity, configs, loaded, datasets)
    if not request.force and is_finished(out, now, request.overwrite):
        echo(f"{out}: made already, with the same options and data; --force makes it again", err=True)
        made = Base(read_checkpoint(out).record["training"]["val_top1"], out.stat().st_size, 0.0)
    else:
        with Progress("base") as bar:
            made = train_base(configs, loaded, datasets, out, bar.show)
    shown = (
        f"{click.format_filename(out)}: base set of {counted(len(made.val_top1), 'task')}, {made.file_bytes:,} bytes"
    )
    click.echo(json.dumps(asdict(made)) if request.as_json else shown)


def _make_bases(
    request: Request, told: Told, entries: list[TaskEntry], loaded: Backbone, datasets: list[Dataset]
) -> None:
    config, out = _config_of_bases(request, told), request.out
    if request.from_backbone:
        config = of_backbone(config)
    sources, configs = _stored(request.from_store, request.from_tasks), [entry.config for entry in entries]
    if request.from_store is not None and not sources:  # without stored tasks, others would be trained
        raise ConfigError(f"--from-store {request.from_store}: has no task: add some, or leave it out and give --tasks")
    now = partial(bases_identity, config, loaded, sources, configs, datasets)
    if not request.force and is_finished(out, now, request.overwrite):
        echo(f"{out}: made already, with the same options, tasks and data; --force makes them again", err=True)
        made = bases_of(read_checkpoint(out), out.stat().st_size)
        if datasets and not sources:
            remove_sources(config.rank, configs, loaded, datasets, out)  # left by a command that was killed
    elif request.from_backbone:
        made = make_backbone_bases(config, loaded, out)
    else:
        with Progress("bases") as bar:
            try:
                made = make_bases(
                    config, loaded, sources, out, configs, datasets, bar.show, bar.say,
                    overwrite=request.overwrite, force=request.force,
                )  # fmt: skip
            except KeyboardInterrupt:
                kept = sources_at(out)
                raise Stopped(f"what is trained is kept in {kept}" if not sources and kept.exists() else "") from None
    origin = "the backbone" if request.from_backbone else counted(len(made.energy), "task")
    shown = (
        f"{click.format_filename(out)}: common bases of rank {made.rank} at {counted(made.positions, 'position')} from "
        f"{origin}, {made.file_bytes:,} bytes"
    )
    click.echo(json.dumps(asdict(made)) if request.as_json else shown)


def _config_of_bases(request: Request, told: Told) -> TrainConfig:
    options = {name: value for name, value in told.options.items() if name in OPTIONS}
    return TrainConfig(task=request.task or "bases", **options)


def _rebase(request: Request, task: Task, bases: Task, loaded: Backbone, dataset: Dataset, device: str | None) -> None:
    made = rebase(task, bases, loaded, dataset, request.out, str(request.task), device)
    _say_changed(request, made, f"now on {made.bases}, which keep {100 * made.held:.1f} % of the cores' sum")


def _round(request: Request, task: Task, loaded: Backbone, dataset: Dataset, told: Told) -> None:
    asked = {name: told.options[name] for name in _FORMATS if name in told.shown}
    made = round_task(
        task, loaded, dataset, request.out, name=str(request.task), device=told.options["device"], **asked
    )
    formats = ", ".join(f"{name.removesuffix('_dtype')} {dtype}" for name, dtype in asked.items())
    _say_changed(request, made, f"now {formats}")


def _say_changed(request: Request, made: Changed, how: str) -> None:
    if request.as_json:
        click.echo(json.dumps(asdict(made)))
        return
    for split, (before, after) in made.top1.items():
        loss = " to ".join(f"{one:.4f}" for one in made.loss[split])
        echo(f"{split}: {100 * before:.1f} % to {100 * after:.1f} %, loss {loss}")
    if made.threshold != (None, None):
        old, new = ("none" if one is None else f"{one:.4f}" for one in made.threshold)
        now = "dropped, because it cannot be" if made.threshold[1] is None else f"{new},"
        echo(f"threshold {old}: now {now} calibrated anew on val")
    common = f"; common bases {made.bases_bytes:,}" if made.bases_bytes else ""
    echo(
        f"{click.format_filename(request.out)}: {how}; {made.file_bytes:,} bytes (adapters {made.adapter_bytes:,}, "
        f"head {made.head_bytes:,}{common})"
    )


def _read_task(name: str, store: Path | None) -> Task:
    """A task or common bases, by name in a store, or from a file if there is no store."""
    if store is None:
        return read_checkpoint(name)
    with Store(store) as opened:
        return opened.get(name)


def _note_unused(request: Request, entries: list[TaskEntry], told: Told) -> None:
    """Prints which options have no effect: the method ignores them, or the file of tasks overrides them."""
    unused: dict[tuple[str, str], list[str]] = {}
    configs = [entry.config for entry in entries] or [_config_of_bases(request, told)]
    for config in configs:
        if request.rebase is not None or request.round is not None:
            used = {"device", *(_FORMATS if request.round is not None else ())}
            names = [name for name in told.shown if name in OPTIONS and name not in used]
            reason = f"a task that is {'moved' if request.rebase is not None else 'rounded'} keeps its own options"
        elif request.make_bases:
            names, reason = config.unused_by_bases(trained=bool(entries)), "common bases are made without it"
            if not entries:  # no data are read
                names += [name for name in told.shown if name in DATA_OPTIONS]
                names += [] if request.data_root is None else ["--data-root"]
        else:
            config = replace(config, method="adapters") if request.make_base else config
            names = config.unused(request.base is not None, request.bank is not None, request.bases is not None)
            reason = f"this run of method {config.method!r} does not use it"
        for name in names:
            unused.setdefault((name, reason), []).append(config.task)
    for entry in entries if request.tasks_file is not None else ():
        for name in told.shown:
            value = getattr(entry.config if name in OPTIONS else entry.data_options, name)
            if value != told.options[name]:
                unused.setdefault((name, "the file of tasks overrides it"), []).append(entry.config.task)
    for (name, reason), tasks in unused.items():
        of = "" if len(configs) == 1 else f" on {', '.join(tasks[:5])}{' …' if len(tasks) > 5 else ''}"
        shown = told.shown.get(name, name.replace("_", " "))
        echo(f"note      {shown} has no effect{of}: {reason}", err=True)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: the folder cannot be made: {error.strerror}") from None


def _open(entry: TaskEntry, root: Path | None) -> Dataset:
    """Opens a task's data, and prints on stderr which kind of data set it is."""
    dataset = open_dataset(entry.data, root, entry.data_options)
    say_above(dataset.summary(entry.data))
    return dataset


def _bank(request: Request) -> list[Task]:
    """The stored tasks to borrow from. Common bases are none: nothing of a task is in them."""
    stored = _stored(request.bank, request.bank_tasks)
    for bases in (task for task in stored if is_bases(task)):
        echo(f"note      {bases.name} is skipped: common bases, and a bank has tasks", err=True)
    return [task for task in stored if not is_bases(task)]


def _stored(path: Path | None, names: str | None) -> list[Task]:
    """The newest versions of the named tasks of a store, or of the tasks added last."""
    if path is None:
        return []
    with Store(path) as store:
        if names is not None:
            return [store.get(name) for name in dict.fromkeys(names.split(","))]
        newest = sorted(store.tasks(), key=lambda version: version.time_ns)[-_BANK_TASKS:]
        return [store.get(version.task) for version in newest]


def _on_gpu(device: str | None) -> bool:
    return torch.cuda.is_available() if device is None else device.startswith("cuda")
