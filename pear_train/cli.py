"""The pear-train command: a thin twin of :func:`pear_train.train`."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import click
from tabulate import tabulate
from tqdm import tqdm

from pear_store import PearStoreError
from pear_store.checkpoint import ACTIVATIONS, TASK_NAME
from pear_train.config import IMPORTANCE, KNOWLEDGE, METHODS, SHARING, TrainConfig
from pear_train.data import open_dataset
from pear_train.errors import ConfigError, PearTrainError
from pear_train.loop import Result, Step, train
from router import RouterError, load_backbone

F = TypeVar("F", bound=Callable[..., Any])
_DEFAULTS = {field.name: field.default for field in fields(TrainConfig)}


def _option(flag: str, help: str, **settings: Any) -> Callable[[F], F]:
    """An option whose default is the TrainConfig field's."""
    name = flag.split("/")[0].removeprefix("--").replace("-", "_")
    return click.option(flag, default=_DEFAULTS[name], help=help, show_default=_DEFAULTS[name] is not None, **settings)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("task")
@click.option("--data", required=True, help="Image folder, VTAB-1k folder, .npz file, or a data set's name in timm.")
@click.option("--data-root", type=click.Path(path_type=Path), help="Where a named data set lies or is downloaded to.")
@click.option("--backbone", default="pear_tiny", show_default=True, help="A timm model's name.")
@click.option("--weights", type=click.Path(), help="Local safetensors file of the backbone's weights.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="Task checkpoint to write.")
@_option("--method", "Prune and share, all adapters, or head only.", type=click.Choice(METHODS))
@_option("--epochs", "Epochs in all.", type=int)
@_option("--prune-epoch", "Epochs before pruning [default: two fifths of all].", type=int)
@_option("--positions", "Preset (blocks, attn, mlp, qkv, linear) or comma-separated patterns.", type=str)
@_option("--rank", "Rank of an adapter.", type=int)
@_option("--activation", "Between down and up.", type=click.Choice(ACTIVATIONS))
@_option("--scale", "Factor of a branch.", type=float)
@_option("--ratio", "Share of the adapters that is pruned.", type=float)
@_option("--importance", "What ranks adapters.", type=click.Choice(IMPORTANCE))
@_option("--sharing", "Whose adapter a pruned position borrows.", type=click.Choice(SHARING))
@_option("--borrowed-scale", "Where a borrowed branch's scale starts, times --scale.", type=float)
@_option("--train-borrowed-scale/--fix-borrowed-scale", "Whether it trains.")
@_option("--knowledge", "What is preserved of pruned adapters.", type=click.Choice(KNOWLEDGE))
@_option("--knowledge-bits", "Bits of --knowledge lowbit: 1 or 4.", type=int)
@_option("--lr", "Peak learning rate.", type=float)
@_option("--weight-decay", "Of AdamW.", type=float)
@_option("--batch-size", "Images a step.", type=int)
@_option("--seed", "Of initial adapters and batch order.", type=int)
@_option("--img-size", "Pixels of a side [default: the backbone's own].", type=int)
@_option("--device", "Such as cpu or cuda [default: cuda where there is one].", type=str)
@_option("--dtype", "Precision of training.", type=click.Choice(("auto", "float32", "bfloat16")))
@_option("--tensor-dtype", "What tensors are written in.", type=click.Choice(("F16", "BF16", "F32")))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON value.")
def main(
    task: str,
    data: str,
    data_root: Path | None,
    backbone: str,
    weights: str | None,
    out: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Train TASK: adapters on a frozen backbone, pruned and shared, into one task checkpoint."""
    try:
        if not TASK_NAME.fullmatch(task):
            raise ConfigError(f"task name {task!r}: expected up to 100 letters, digits, '.', '_', '-'")
        if not out.parent.is_dir():
            raise ConfigError(f"--out {out}: folder {out.parent} does not exist; make it first")
        config = TrainConfig(task=task, **options)
        dataset = open_dataset(data, data_root)
        click.echo(f"data      {dataset.description}; {dataset.sizes()}", err=True)
        loaded = load_backbone(backbone, weights)
        click.echo(f"backbone  {loaded.name} {loaded.digest[:19]}…", err=True)
        with _Progress(config) as bar:
            result = train(config, loaded, dataset, out, bar.show)
    except (PearTrainError, RouterError, PearStoreError) as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(getattr(error, "exit_code", 1))
    if as_json:
        click.echo(json.dumps(asdict(result)))
    else:
        _print(result, out)


class _Progress:
    """A tqdm bar over all batches, on stderr."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.bar: tqdm[Any] = tqdm(desc=config.task, unit="batch", file=sys.stderr, mininterval=0.5)
        self.val = ""

    def show(self, step: Step) -> None:
        self.bar.total = step.batches * self.config.epochs
        self.bar.n = (step.epoch - 1) * step.batches + step.batch
        if step.val_top1 is not None:
            self.val = f" val {100 * step.val_top1:.1f}%"
        self.bar.set_postfix_str(
            f"epoch {step.epoch} loss {step.loss:.3f} train {100 * step.train_top1:.1f}%{self.val}", refresh=False
        )
        self.bar.update(0)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.refresh()
        self.bar.close()


def _print(result: Result, out: Path) -> None:
    if result.importance:
        peak = max(result.importance.values()) or 1.0
        rows = [
            {
                "position": position,
                "importance": f"{score / peak:.4f}",
                "adapter": f"borrows {result.borrowed[position]}"
                if position in result.borrowed
                else ("pruned" if position in result.pruned else "own"),
            }
            for position, score in result.importance.items()
        ]
        click.echo(tabulate(rows, headers="keys", disable_numparse=True))
    test = "no test split" if result.test_top1 is None else f"test {100 * result.test_top1:.1f} %"
    click.echo(f"{result.task} ({result.method}): val {100 * result.val_top1:.1f} %, {test}, {result.seconds:.0f} s")
    click.echo(
        f"{out}: {result.file_bytes:,} bytes (adapters {result.adapter_bytes:,}, knowledge {result.knowledge_bytes:,}, "
        f"head {result.head_bytes:,})"
    )
