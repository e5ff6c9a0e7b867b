"""The pear-train command: a thin twin of :func:`pear_train.train` and :func:`pear_train.train_many`."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click
from tabulate import tabulate
from tqdm import tqdm

from pear_store import PearStoreError, Store, Task, read_checkpoint
from pear_store.checkpoint import ACTIVATIONS, TASK_NAME
from pear_train.base import train_base
from pear_train.config import (
    AUGMENT,
    BORROW,
    DOWN,
    HEAD_DTYPES,
    IMPORTANCE,
    KNOWLEDGE,
    METHODS,
    SELECT,
    SHARING,
    TENSOR_DTYPES,
    TrainConfig,
)
from pear_train.data import DataOptions, Dataset, open_dataset
from pear_train.errors import ConfigError, PearTrainError
from pear_train.loop import Failed, Job, Result, Step, train_many
from pear_train.plot import plot_result
from pear_train.recall import recall_rows, recall_warnings
from pear_train.record import is_done
from pear_train.run import given_digest
from pear_train.tasks import TaskEntry, read_tasks
from router import RouterError, load_backbone

F = TypeVar("F", bound=Callable[..., Any])
_DEFAULTS = {field.name: field.default for kind in (TrainConfig, DataOptions) for field in fields(kind)}


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
    plot: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train TASK: adapters on a frozen backbone, pruned and shared, into one task checkpoint.

    With --tasks FILE, train every task that FILE names into the folder --out; those that are there already are not
    trained again, and an interrupted run goes on after its last epoch.
    """
    try:
        if (task is None) == (tasks_file is None) or (task is None) != (data is None):
            raise click.UsageError("expected either TASK with --data, or --tasks")
        if make_base and tasks_file is None:
            raise click.UsageError("--make-base needs --tasks")
        many = tasks_file is not None and not make_base
        if not many and not out.parent.is_dir():
            raise ConfigError(f"--out {out}: folder {out.parent} does not exist; make it first")
        if out.is_dir() != many and out.exists():
            raise ConfigError(f"--out {out}: " + ("is a file: --tasks needs a folder" if many else "is a folder"))
        if tasks_file is not None:
            entries = read_tasks(tasks_file, options)
        else:
            if not TASK_NAME.fullmatch(str(task)):
                raise ConfigError(f"task name {task!r}: expected up to 100 letters, digits, '.', '_', '-'")
            entries = [TaskEntry.of(str(task), str(data), options)]
        start, offered = (None if base is None else read_checkpoint(base)), _bank(bank, bank_tasks)
        if many:
            out.mkdir(parents=True, exist_ok=True)
        datasets = [] if many else [_open(entry, data_root) for entry in entries]  # first: a mistake shows at once
        loaded = load_backbone(backbone, weights)
        click.echo(f"backbone  {loaded.name} {loaded.digest[:19]}…", err=True)
        if make_base:
            with _Progress("base") as bar:
                made = train_base([entry.config for entry in entries], loaded, datasets, out, bar.show)
            _answer(asdict(made), as_json, f"{out}: base set of {len(made.val_top1)} tasks, {made.file_bytes:,} bytes")
            return
        paths = {e.config.task: out / f"{e.config.task}.safetensors" if many else out for e in entries}
        given = given_digest(start, offered)
        jobs = [
            Job(e.config, partial(_open, e, data_root) if many else lambda: datasets[0], paths[e.config.task])
            for e in entries
            if not (many and is_done(paths[e.config.task], e.config, loaded, Path(e.data).name, given))
        ]
        if len(jobs) < len(entries):
            click.echo(f"tasks     {len(entries) - len(jobs)} of {len(entries)} are trained already", err=True)
        together = together or (8 if many and _on_gpu(options["device"]) else 1)
        results: list[Result | Failed] = []
        with _Progress(str(task or tasks_file), sum(job.config.epochs for job in jobs) if many else None) as bar:
            done = train_many(jobs, loaded, bar.show, together=together, careful=many, base=start, bank=offered)
            for result in done:
                results.append(result)
                if isinstance(result, Failed):
                    click.echo(f"Error: {result.task}: {result.error}", err=True)
                    continue
                for warning in recall_warnings(result.classes):
                    tqdm.write(f"Warning: {result.task}: {warning}", file=sys.stderr)
                if plot:
                    plot_result(result, paths[result.task].with_suffix(".png"))
    except (PearTrainError, RouterError, PearStoreError) as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(getattr(error, "exit_code", 1))
    if many:
        _answer_many(entries, results, paths, as_json)
        sys.exit(1 if any(isinstance(result, Failed) for result in results) else 0)
    assert isinstance(results[0], Result)
    if as_json:
        click.echo(json.dumps(asdict(results[0])))
    else:
        _print(results[0], out)


def _open(entry: TaskEntry, root: Path | None) -> Dataset:
    """Opens a task's data, and says on stderr what it was taken for."""
    dataset = open_dataset(entry.data, root, entry.data_options)
    lines = [f"data      {dataset.description}; {dataset.sizes()}", f"classes   {dataset.table()}"]
    lines += [f"skipped   {note}" for note in dataset.notes]
    lines += [f"Warning: {entry.data}: {warning}" for warning in dataset.warnings()]
    tqdm.write("\n".join(lines), file=sys.stderr)  # above the progress bar, if there is one
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

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.refresh()
        self.bar.close()


def _answer(value: Any, as_json: bool, text: str) -> None:
    click.echo(json.dumps(value) if as_json else text)


def _answer_many(
    entries: list[TaskEntry], results: list[Result | Failed], paths: Mapping[str, Path], as_json: bool
) -> None:
    by_task = {result.task: result for result in results}
    rows = list(_rows(entries, by_task, paths))
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
    click.echo(tabulate(shown, headers="keys", disable_numparse=True))


def _rows(
    entries: list[TaskEntry], by_task: Mapping[str, Result | Failed], paths: Mapping[str, Path]
) -> Iterator[dict[str, Any]]:
    for entry in entries:
        name = entry.config.task
        result = by_task.get(name)
        row: dict[str, Any] = {"task": name, "file": str(paths[name]), "trained": result is not None}
        if isinstance(result, Failed):
            yield {**row, "trained": None, "val_top1": None, "test_top1": None, "error": result.error}
        elif result is None:
            metrics = read_checkpoint(paths[name]).record["metrics"]
            yield {**row, "val_top1": metrics.get("val_top1"), "test_top1": metrics.get("test_top1")}
        else:
            yield {**row, **asdict(result)}


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
        click.echo(tabulate(rows, headers="keys", disable_numparse=True))
        click.echo("importance: how much the loss would change without the adapter, relative to the highest")
    click.echo(tabulate(recall_rows(result.classes), headers="keys", disable_numparse=True))
    test = "no test split" if result.test_top1 is None else f"test {100 * result.test_top1:.1f} %"
    click.echo(f"{result.task} ({result.method}): val {100 * result.val_top1:.1f} %, {test}, {result.seconds:.0f} s")
    click.echo(
        f"{out}: {result.file_bytes:,} bytes (adapters {result.adapter_bytes:,}, knowledge {result.knowledge_bytes:,}, "
        f"head {result.head_bytes:,})"
    )
