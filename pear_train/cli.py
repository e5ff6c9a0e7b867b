"""The pear-train command: a thin twin of :func:`pear_train.train` and :func:`pear_train.train_many`."""

import json
import os
import sys
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click
from tqdm import tqdm

from pear_store import PearStoreError, Store, Task, read_checkpoint
from pear_store.format.checkpoint import ACTIVATIONS
from pear_store.terminal import echo, echo_table, printable
from pear_train.base import Base, base_identity, check_configs, train_base
from pear_train.config import (
    AUGMENT,
    BORROW,
    DOWN,
    HEAD_DTYPES,
    IMPORTANCE,
    KNOWLEDGE,
    METHODS,
    OPTIONS,
    SELECT,
    SHARING,
    TENSOR_DTYPES,
)
from pear_train.data import Dataset, open_dataset
from pear_train.errors import ConfigError, PearTrainError
from pear_train.finished import check_out, is_finished
from pear_train.loop import Failed, Job, Result, Step, result_of, train_many
from pear_train.plot import check_plot, plot_path, plot_result
from pear_train.recall import recall_rows, recall_warnings
from pear_train.run import given_digest, run_identity
from pear_train.tasks import DATA_OPTIONS, TaskEntry, read_tasks
from router import Backbone, RouterError, load_backbone

F = TypeVar("F", bound=Callable[..., Any])
_DEFAULTS = {name: option.default for name, option in (OPTIONS | DATA_OPTIONS).items()}


def _option(flag: str, help: str, **settings: Any) -> Callable[[F], F]:
    """An option whose default is the field's of TrainConfig or DataOptions."""
    name = flag.split("/")[0].removeprefix("--").replace("-", "_")
    return click.option(flag, default=_DEFAULTS[name], help=help, show_default=_DEFAULTS[name] is not None, **settings)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("task", required=False)
@click.option("--data", help="Image folder, VTAB-1k folder, .npz file, or a data set's name in timm.")
@click.option("--data-root", type=click.Path(path_type=Path), help="Where a named data set lies or is downloaded to.")
@click.option(
    "--tasks", "tasks_file", type=click.Path(path_type=Path), help="TOML file of many tasks, instead of TASK."
)
@click.option("--together", type=click.IntRange(1), help="Tasks of --tasks in one batch [default: 8 on a GPU, else 1].")
@click.option("--backbone", default="pear_tiny", show_default=True, help="A timm model's name.")
@click.option("--weights", type=click.Path(), help="Local safetensors file of the backbone's weights.")
@click.option("--out", type=click.Path(path_type=Path), required=True,
              help="Task checkpoint to write; with --tasks a folder, made where it is missing.")  # fmt: skip
@click.option("--bank", type=click.Path(path_type=Path), help="Store whose adapters pruned positions may borrow.")
@click.option("--bank-tasks", help="Comma-separated tasks of --bank [default: the 64 added last].")
@click.option("--base", type=click.Path(path_type=Path), help="Base set to start from, as --make-base wrote it.")
@click.option("--make-base", is_flag=True, help="Train one adapter set for all of --tasks, and write it as a base set.")
@click.option("--overwrite", is_flag=True,
              help="Replace what runs of other options or data left at --out; refused without.")  # fmt: skip
@click.option("--force", is_flag=True, help="Train again, whatever task checkpoint lies at --out.")
@click.option("--plot", is_flag=True, help="Draw importance and learning curve beside the checkpoint, as .png.")
@_option("--method", "Prune and share, all adapters, or head only.", type=click.Choice(METHODS))
@_option("--epochs", "Epochs in all.", type=int)
@_option("--prune-epoch", "Epochs before pruning [default: two fifths of all].", type=int)
@_option(
    "--positions",
    "auto, or presets (blocks, attn, mlp, qkv, linear: the last two for PEFT) or patterns, by commas.",
    type=str,
)
@_option("--rank", "Rank of an adapter.", type=int)
@_option("--activation", "Between down and up.", type=click.Choice(ACTIVATIONS))
@_option("--scale", "Factor of a branch.", type=float)
@_option("--down", "Trained, or frozen and common to all tasks of a backbone.", type=click.Choice(DOWN))
@_option("--ratio", "Share of the adapters that is pruned.", type=float)
@_option("--importance", "What ranks adapters.", type=click.Choice(IMPORTANCE))
@_option("--sharing", "Whose adapter a pruned position borrows.", type=click.Choice(SHARING))
@_option("--borrow", "What a borrowed branch has of its own.", type=click.Choice(BORROW))
@_option("--borrowed-scale", "Where a borrowed branch starts, times --scale.", type=float)
@_option("--train-borrowed-scale/--fix-borrowed-scale", "Whether a borrowed scale trains.")
@_option("--scale-lr", "Learning rate of scales, times --lr.", type=float)
@_option("--knowledge", "What is preserved of pruned adapters.", type=click.Choice(KNOWLEDGE))
@_option("--knowledge-bits", "Bits of --knowledge lowbit: 1 or 4.", type=int)
@_option("--bank-share", "Stored adapters that a pruned position borrows of --bank.", type=int)
@_option("--base-blocks", "Lowest blocks that take --base frozen.", type=int)
@_option("--lr", "Peak learning rate.", type=float)
@_option("--weight-decay", "Of AdamW.", type=float)
@_option("--warmup", "Share of the steps over which the learning rate rises.", type=float)
@_option("--max-grad-norm", "Gradients are scaled down to this norm.", type=float)
@_option("--drop-branch", "Probability that a position's branches sit out a step.", type=float)
@_option("--augment", "What training images undergo.", type=click.Choice(AUGMENT))
@_option("--batch-size", "Images a step.", type=int)
@_option("--seed", "Of initial adapters and batch order.", type=int)
@_option("--select", "Which epoch is kept.", type=click.Choice(SELECT))
@_option("--patience", "Stop after so many epochs without a better val.", type=int)
@_option("--img-size", "Pixels of a side [default: the backbone's own].", type=int)
@_option("--device", "Such as cpu or cuda [default: cuda where there is one].", type=str)
@_option("--dtype", "Precision of training.", type=click.Choice(("auto", "float32", "bfloat16")))
@_option("--tensor-dtype", "What adapters are written in; Q8, Q4, Q1: codes.", type=click.Choice(TENSOR_DTYPES))
@_option("--head-dtype", "What the head is written in.", type=click.Choice(HEAD_DTYPES))
@_option("--train-split", "Folder of the train split [default: recognised by its name].", type=str)
@_option("--val-split", "Folder of the val split; none: hold a tenth of train out.", type=str)
@_option("--test-split", "Folder of the test split; none: there is no test split.", type=str)
@_option("--no-splits", "The folders are classes, even if they are called train or test.", is_flag=True)
@_option("--max-pixels", "Pictures with more pixels are refused before they are decoded.", type=int)
@_option("--skip-unreadable", "Train without pictures that cannot be read.", is_flag=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON value.")
def main(
    task: str | None,
    data: str | None,
    data_root: Path | None,
    tasks_file: Path | None,
    together: int | None,
    backbone: str,
    weights: str | None,
    out: Path,
    bank: Path | None,
    bank_tasks: str | None,
    base: Path | None,
    make_base: bool,
    overwrite: bool,
    force: bool,
    plot: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train TASK: adapters on a frozen backbone, pruned and shared, into one task checkpoint.

    With --tasks FILE, train every task that FILE names into the folder --out. A task whose checkpoint is there already,
    of the same options and data, is not trained again; one of others is refused. An interrupted run goes on after its
    last epoch.
    """
    many = tasks_file is not None and not make_base
    _check_usage(task, data, tasks_file, make_base, many, {"base": base, "bank": bank, "plot": plot})
    results: list[Result | Failed] = []
    kept: set[str] = set()
    try:
        if os.path.isdir(out) != many and os.path.exists(out):
            raise ConfigError(f"--out {out}: " + ("is a file: --tasks needs a folder" if many else "is a folder"))
        if tasks_file is not None:
            entries = read_tasks(tasks_file, options)
        else:
            entries = [TaskEntry.of(str(task), str(data), options)]
        _note_unused(entries, base is not None, bank is not None, make_base)
        if many:
            _make_folder(out)
        paths = {e.config.task: out / f"{e.config.task}.safetensors" if many else out for e in entries}
        if not many:
            check_out(out)
        if plot:
            for path in paths.values():
                check_plot(plot_path(path))
        start, offered = (None if base is None else read_checkpoint(base)), _bank(bank, bank_tasks)
        datasets = [] if many else [_open(entry, data_root) for entry in entries]  # first: a mistake shows at once
        loaded = load_backbone(backbone, weights)
        echo(f"backbone  {loaded.name} {loaded.digest[:19]}…", err=True)
        if make_base:
            _make_base(entries, loaded, datasets, out, overwrite, force, as_json)
            return
        given = given_digest(start, offered)
        jobs: list[Job] = []
        for i, entry in enumerate(entries):
            config, path = entry.config, paths[entry.config.task]
            try:  # of many, all mistakes show now, and each costs only its task
                dataset = open_dataset(entry.data, data_root, entry.data_options) if many else datasets[i]
                if not force and is_finished(path, partial(run_identity, config, loaded, dataset, given), overwrite):
                    kept.add(config.task)
                    results.append(result_of(read_checkpoint(path), path.stat().st_size))
                else:
                    check_out(path)
                    jobs.append(Job(config, partial(_open, entry, data_root) if many else lambda: datasets[0], path))
            except (PearTrainError, RouterError, PearStoreError) as error:
                if not many:
                    raise
                results.append(Failed(config.task, str(error)))
                echo(f"Error: {config.task}: {error}", err=True)
        if many and kept:
            echo(
                f"tasks     {len(kept)} of {len(entries)} are trained already, with the same options and data", err=True
            )
        elif kept:
            echo(f"{out}: trained already, with the same options and data; --force trains again", err=True)
        together = together or (8 if many and _on_gpu(options["device"]) else 1)
        with _Progress(str(task or tasks_file), sum(job.config.epochs for job in jobs) if many else None) as bar:
            done = train_many(
                jobs, loaded, bar.show, together=together, careful=many, base=start, bank=offered, say=bar.say
            )
            for result in done:
                results.append(result)
                bar.say(_line(result))
                for warning in recall_warnings(result.classes) if isinstance(result, Result) else ():
                    bar.say(f"Warning: {result.task}: {warning}")
    except (PearTrainError, RouterError, PearStoreError) as error:
        _say(f"Error: {error}")
        sys.exit(getattr(error, "exit_code", 1))
    except KeyboardInterrupt:
        echo("Stopped: the same command goes on after the last epoch that was ended.", err=True)
        sys.exit(130)
    if many:
        _answer_many(entries, results, kept, paths, as_json)
    else:
        assert isinstance(results[0], Result)
        if as_json:
            click.echo(json.dumps(asdict(results[0])))
        else:
            _print(results[0], out)
    trained = [result for result in results if isinstance(result, Result)]
    drawn = [_draw(result, plot_path(paths[result.task])) for result in trained] if plot else []
    if len(trained) < len(results) or not all(drawn):
        sys.exit(1)


def _check_usage(
    task: str | None, data: str | None, tasks_file: Path | None, make_base: bool, many: bool, given: Mapping[str, Any]
) -> None:
    """Refuses options that would say nothing."""
    if (task is None) == (tasks_file is None) or (task is None) != (data is None):
        raise click.UsageError("expected either TASK with --data, or --tasks")
    if make_base and tasks_file is None:
        raise click.UsageError("--make-base needs --tasks")
    parameters = click.get_current_context().params
    if parameters["together"] is not None and not many:
        raise click.UsageError("--together needs --tasks, and no --make-base: it says how many tasks train at once")
    if parameters["bank_tasks"] is not None and given["bank"] is None:
        raise click.UsageError("--bank-tasks needs --bank: it names tasks of that store")
    if make_base and (found := [f"--{name}" for name, value in given.items() if value]):
        raise click.UsageError(f"--make-base takes no {' or '.join(found)}")


def _note_unused(entries: list[TaskEntry], base: bool, bank: bool, make_base: bool) -> None:
    """Says which options have no effect: the method does not use them, or the file of tasks has others."""
    context = click.get_current_context()
    unused: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        config = replace(entry.config, method="adapters") if make_base else entry.config
        for name in config.unused(base, bank):
            unused.setdefault((name, config.method), []).append(config.task)
        for name in OPTIONS | DATA_OPTIONS:
            source = context.get_parameter_source(name)
            value = getattr(entry.config if name in OPTIONS else entry.data_options, name)
            if source is click.core.ParameterSource.COMMANDLINE and value != context.params[name]:
                unused.setdefault((name, "file"), []).append(config.task)
    for (name, why), tasks in unused.items():
        reason = (
            "the file of tasks says otherwise" if why == "file" else f"this run of method {why!r} has no use for it"
        )
        of = "" if len(entries) == 1 else f" on {', '.join(tasks[:5])}{' …' if len(tasks) > 5 else ''}"
        echo(f"note      --{name.replace('_', '-')} has no effect{of}: {reason}", err=True)


def _say(text: str) -> None:
    """Lines on stderr: an error may name many pictures, each on its line."""
    for line in text.split("\n"):
        echo(line, err=True)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: the folder cannot be made: {error.strerror}") from None


def _make_base(
    entries: list[TaskEntry], loaded: Backbone, datasets: list[Dataset], out: Path, overwrite: bool, force: bool,
    as_json: bool,
) -> None:  # fmt: skip
    configs = [entry.config for entry in entries]
    check_configs(configs)
    if not force and is_finished(out, lambda: base_identity(configs, loaded, datasets), overwrite):
        echo(f"{out}: made already, with the same options and data; --force makes it again", err=True)
        metrics = read_checkpoint(out).record["training"]["val_top1"]
        made = Base(metrics, out.stat().st_size, 0.0)
    else:
        with _Progress("base") as bar:
            made = train_base(configs, loaded, datasets, out, bar.show)
    shown = f"{click.format_filename(out)}: base set of {len(made.val_top1)} tasks, {made.file_bytes:,} bytes"
    click.echo(json.dumps(asdict(made)) if as_json else shown)


def _draw(result: Result, path: Path) -> bool:
    """Draws a picture; says what is wrong if it cannot be drawn, for the run itself is done."""
    try:
        plot_result(result, path)
    except PearTrainError as error:
        echo(f"Error: {result.task}: {error}", err=True)
        return False
    return True


def _line(result: Result | Failed) -> str:
    if isinstance(result, Failed):
        return f"Error: {result.task}: {result.error}"
    return f"{result.task}: {_scores(result)}"


def _open(entry: TaskEntry, root: Path | None) -> Dataset:
    """Opens a task's data, and says on stderr what it was taken for."""
    dataset = open_dataset(entry.data, root, entry.data_options)
    lines = [f"data      {dataset.description}; {dataset.sizes()}", f"classes   {dataset.table()}"]
    lines += [f"skipped   {note}" for note in dataset.notes]
    lines += [f"Warning: {entry.data}: {warning}" for warning in dataset.warnings()]
    tqdm.write("\n".join(map(printable, lines)), file=sys.stderr)  # above the progress bar, if there is one
    return dataset


def _bank(path: Path | None, names: str | None) -> list[Task]:
    """The newest versions of tasks in a store: of those named, or of those added last."""
    if path is None:
        return []
    with Store(path) as store:
        if names is not None:
            return [store.get(name) for name in names.split(",")]
        newest = sorted(store.tasks(), key=lambda version: version.time_ns)[-_BANK_TASKS:]
        return [store.get(version.task) for version in newest]


_BANK_TASKS = 64
"""All of a bank's adapters at a position are tried in one forward: more would not fit, and hardly help."""


def _on_gpu(device: str | None) -> bool:
    import torch

    return torch.cuda.is_available() if device is None else device.startswith("cuda")


class _Progress:
    """A tqdm bar on stderr: batches of one task, or epochs of many."""

    def __init__(self, name: str, epochs: int | None = None) -> None:
        unit = "batch" if epochs is None else "epoch"
        self.many = epochs is not None
        self.bar: tqdm[Any] = tqdm(desc=name, unit=unit, total=epochs, file=sys.stderr, mininterval=0.5)
        self.val = ""

    def show(self, step: Step) -> None:
        if step.val_top1 is not None:
            self.val = f" val {100 * step.val_top1:.1f}%"
        if self.many:
            if step.val_top1 is not None:
                self.bar.set_postfix_str(f"{step.task} {step.epoch}/{step.epochs}{self.val}", refresh=False)
                self.bar.update(1)
            return
        self.bar.total = step.batches * step.epochs
        self.bar.n = (step.epoch - 1) * step.batches + step.batch
        self.bar.set_postfix_str(
            f"epoch {step.epoch} loss {step.loss:.3f} train {100 * step.train_top1:.1f}%{self.val}", refresh=False
        )
        self.bar.update(0)

    def say(self, line: str) -> None:
        """A line above the bar."""
        self.bar.clear()
        _say(line)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.refresh()
        self.bar.close()


def _answer_many(
    entries: list[TaskEntry],
    results: list[Result | Failed],
    kept: Container[str],
    paths: Mapping[str, Path],
    as_json: bool,
) -> None:
    by_task = {result.task: result for result in results}
    rows = list(_rows(entries, by_task, kept, paths))
    if as_json:
        click.echo(json.dumps(rows))
        return
    shown = [
        {
            "task": row["task"],
            "val %": "" if row["val_top1"] is None else f"{100 * row['val_top1']:.1f}",
            "test %": "" if row["test_top1"] is None else f"{100 * row['test_top1']:.1f}",
            "result": "failed, see above"
            if "error" in row
            else ("was there" if row["trained"] is False else f"{row['seconds']:.0f} s"),
        }
        for row in rows
    ]
    echo_table(shown, ["left"] * len(shown[0]))


def _rows(
    entries: list[TaskEntry], by_task: Mapping[str, Result | Failed], kept: Container[str], paths: Mapping[str, Path]
) -> Iterator[dict[str, Any]]:
    for entry in entries:
        result = by_task[entry.config.task]
        row: dict[str, Any] = {"task": result.task, "file": str(paths[result.task]), "trained": result.task not in kept}
        if isinstance(result, Failed):
            yield {**row, "trained": None, "val_top1": None, "test_top1": None, "error": result.error}
        else:
            yield {**row, **asdict(result)}


def _scores(result: Result) -> str:
    test = "no test split" if result.test_top1 is None else f"test {100 * result.test_top1:.1f} %"
    return f"val {100 * result.val_top1:.1f} %, {test}"


def _print(result: Result, out: Path) -> None:
    if result.importance:
        peak = max(result.importance.values()) or 1.0
        rows = []
        for position, score in result.importance.items():
            uses = "own"
            if position in result.pruned:
                borrowed = [*([result.borrowed[position]] if position in result.borrowed else [])]
                borrowed += [f"bank {name}" for name in result.banked.get(position, [])]
                uses = f"pruned, borrows {', '.join(borrowed)}" if borrowed else "pruned"
            bar = "█" * max(1, round(20 * score / peak)) if score > 0 else ""
            rows.append({"position": position, "importance": f"{score / peak:.4f}", "": bar, "adapter": uses})
        echo_table(rows, ["left"] * len(rows[0]))
        echo("importance: how much the loss would change without the adapter, relative to the highest")
    echo_table(recall := recall_rows(result.classes), ["left"] * len(recall[0]))
    echo(f"{result.task} ({result.method}): {_scores(result)}, {result.seconds:.0f} s")
    echo(
        f"{click.format_filename(out)}: {result.file_bytes:,} bytes (adapters {result.adapter_bytes:,}, "
        f"knowledge {result.knowledge_bytes:,}, head {result.head_bytes:,})"
    )
