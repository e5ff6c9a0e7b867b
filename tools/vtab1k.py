#!/usr/bin/env python3
"""VTAB-1k: trains all 19 tasks from the standard folders and prints the standard table.

DIR holds a folder for each task, in the benchmark's usual form: cifar/train800val200.txt, cifar/test.txt,
cifar/images/…. All tasks have the same options, the last epoch is kept, and test is evaluated once. To choose options,
use --tune: it trains on 800 images and reports val of the other 200, never test. A trained task is not trained again.

    python -m tools.vtab1k vtab-1k --out vtab-out                    # vit_base_patch16_224.augreg_in21k
    python -m tools.vtab1k vtab-1k --out tune --tune --set ratio=0.75    # options are pear-train's
"""

import json
import os
import sys
from collections.abc import Container
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate

from pear_store import PearStoreError, read_checkpoint
from pear_train import Dataset, Failed, Job, PearTrainError, TrainConfig, train_many
from pear_train.config import OPTIONS
from pear_train.data.vtab import open_vtab
from pear_train.identity import Identity, run_identity
from pear_train.options import parse_settings
from pear_train.output import is_finished
from router import RouterError, load_backbone

GROUPS = {
    "natural": ("cifar", "caltech101", "dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn", "sun397"),
    "specialized": ("patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy"),
    "structured": ("clevr_count", "clevr_dist", "dmlab", "kitti", "dsprites_loc", "dsprites_ori", "smallnorb_azi",
                   "smallnorb_ele"),
}  # fmt: skip
CONVENTIONS: dict[str, Any] = {"epochs": 100, "lr": 1e-3, "weight_decay": 1e-4, "batch_size": 64, "warmup": 0.1,
                               "select": "last"}  # fmt: skip
"""The options of the published figures."""
PUBLISHED = {"linear": 60.5, "LoRA": 75.2, "FacT-TK": 75.7, "RepAdapter": 75.8, "AdaptFormer": 76.0, "Convpass": 76.4}
"""Published averages of the three group means, of ViT-B/16 in21k: uniform re-runs, tuned on val, last epoch."""


@click.command(help=__doc__)
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for task checkpoints.")
@click.option("--backbone", default="vit_base_patch16_224.augreg_in21k", show_default=True, help="A timm model's name.")
@click.option("--weights", type=click.Path(path_type=Path), help="Local safetensors file of the backbone's weights.")
@click.option("--tasks", help="Comma-separated tasks [default: all 19].")
@click.option("--tune", is_flag=True, help="Train on 800 images and report val of 200.")
@click.option("--together", default=1, show_default=True, type=click.IntRange(1), help="Tasks to train at once.")
@click.option(
    "--set", "changes", multiple=True, metavar="OPTION=VALUE", help="An option of pear-train, such as ratio=0.75."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON value.")
def main(
    folder: Path, out: Path, backbone: str, weights: Path | None, tasks: str | None, tune: bool, together: int,
    changes: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    names = tasks.split(",") if tasks else [name for group in GROUPS.values() for name in group]
    try:
        for name in names:
            if not os.path.isdir(folder / name):
                raise click.ClickException(f"{folder / name}: no such folder: put VTAB-1k's task {name!r} there")
        options = {**CONVENTIONS, **parse_settings("--set", changes, OPTIONS)}
        configs = {name: TrainConfig(task=name, **options) for name in names}
        loaded = load_backbone(backbone, weights)
        out.mkdir(parents=True, exist_ok=True)

        paths = {name: out / f"{name}.safetensors" for name in names}
        sources = {name: partial(_open, folder / name, tune) for name in names}

        def now(name: str) -> Identity:
            return run_identity(configs[name], loaded, sources[name](), None)

        done = {name for name in names if is_finished(paths[name], partial(now, name), overwrite=True)}
        jobs = [Job(configs[name], sources[name], paths[name]) for name in names if name not in done]
        for result in train_many(jobs, loaded, together=together):
            if isinstance(result, Failed):
                click.echo(f"Error: {result.task}: {result.error}", err=True)
            else:
                done.add(result.task)
                click.echo(f"{result.task}: {result.seconds:.0f} s", err=True)
    except (PearTrainError, RouterError, PearStoreError) as error:
        raise click.ClickException(str(error)) from None
    table = score(done, names, out, "val_top1" if tune else "test_top1")
    if as_json:
        click.echo(json.dumps(table))
    else:
        show(table, tune)
    sys.exit(0 if len(done) == len(set(names)) else 1)


def _open(path: Path, tune: bool) -> Dataset:
    return replace(open_vtab(path).dataset(), test=None) if tune else open_vtab(path, whole=True).dataset()


def score(done: Container[str], names: list[str], out: Path, metric: str) -> dict[str, Any]:
    """Top-1 of each task in %, the means of the groups, and their average. None if a task is missing."""
    found: dict[str, Any] = {}
    for name in names:
        path = out / f"{name}.safetensors"
        value = read_checkpoint(path).record["metrics"].get(metric) if name in done else None
        found[name] = None if value is None else round(100 * value, 2)
    means = {}
    for group, members in GROUPS.items():
        means[group] = _mean([found.get(name) for name in members])
    return {"tasks": found, **means, "average": _mean(list(means.values()))}


def _mean(values: list[float | None]) -> float | None:
    """The mean, rounded to 0.01. None if a value is missing."""
    there = [value for value in values if value is not None]
    return round(sum(there) / len(there), 2) if len(there) == len(values) else None


def show(table: dict[str, Any], tune: bool) -> None:
    rows = [(name, value) for name, value in table["tasks"].items()]
    rows += [(f"{group} (mean)", table[group]) for group in GROUPS]
    rows.append(("average of the group means", table["average"]))
    click.echo(tabulate(rows, headers=("task", "val, %" if tune else "test, %"), missingval="-", floatfmt=".2f"))
    if not tune:
        others = ", ".join(f"{name} {value}" for name, value in PUBLISHED.items())
        click.echo(f"published, ViT-B/16 in21k, one set of options, last epoch: {others}")


if __name__ == "__main__":
    main()
