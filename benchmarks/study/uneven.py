"""What --balance, --label-smoothing and --augment do, on val: uneven cuts of real sets, and whole ones.

    python -m benchmarks.study.uneven balance --shared ../shared --out benchmarks/results/balance.json
    python -m benchmarks.study.uneven augment --shared ../shared --out benchmarks/results/augment.json

Test is never looked at. An uneven cut keeps 80 training images of the first class, and of each next one fewer, down to
4 of the last; val stays even, 20 images of each class or so. A run that is in the file already is not done again.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from pear_train import TrainConfig, open_dataset, train
from pear_train.data import Dataset
from router import load_backbone

MOST, LEAST = 80, 4
SETS = {"balance": ("cifar10", "rsscn7"), "augment": ("cifar10", "rsscn7", "chars74k36", "mnist_location16")}
CHANGES: dict[str, list[dict[str, Any]]] = {
    "balance": [
        *({"balance": how} for how in ("none", "weights", "sampling")),
        {"balance": "none", "label_smoothing": 0.1},
        {"balance": "weights", "label_smoothing": 0.1},
    ],
    "augment": [{"augment": how} for how in ("none", "flip", "crop", "rotate", "zoom", "color", "mixup")],
}


def uneven(dataset: Dataset) -> Dataset:
    """The data set with fewer training images of each next class; all of val."""
    classes = len(dataset.classes)
    kept = []
    for label in range(classes):
        rows = torch.nonzero(dataset.train.targets == label).flatten()
        kept.append(rows[: round(MOST * (LEAST / MOST) ** (label / (classes - 1)))])
    return replace(dataset, train=dataset.train.subset(torch.cat(kept)))


@click.command(help=__doc__)
@click.argument("what", type=click.Choice(list(SETS)))
@click.option("--shared", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--seeds", default=2)
def main(what: str, shared: Path, out: Path, seeds: int) -> None:
    rows: list[dict[str, Any]] = json.loads(out.read_text()) if out.exists() else []
    backbone = load_backbone("pear_tiny")
    for seed in range(seeds):
        for name in SETS[what]:
            whole = replace(open_dataset(str(shared / "data" / f"{name}.npz")), test=None)
            data = uneven(whole) if what == "balance" else whole
            for change in CHANGES[what]:
                plan = {"set": name, "seed": seed, **change}
                if any(plan.items() <= row.items() and row.keys() - plan.keys() == FOUND for row in rows):
                    continue
                config = TrainConfig(task="t", seed=seed, dtype="float32", select="macro_f1", **change)
                with tempfile.TemporaryDirectory() as folder:
                    result = train(config, backbone, data, Path(folder) / "t")
                recall = [one["recall"]["val"] for one in result.classes.values()]
                last = result.history[result.best_epoch - 1]
                row = {
                    **plan,
                    "top1": round(result.val_top1, 4),
                    "macro_f1": round(last["val_macro_f1"], 4),
                    "rarest_recall": round(sum(recall[-3:]) / 3, 4),
                    "images": len(data.train),
                }
                rows.append(row)
                click.echo(json.dumps(row))
                out.write_text(json.dumps(rows, indent=1) + "\n")


FOUND = {"top1", "macro_f1", "rarest_recall", "images"}

if __name__ == "__main__":
    main()
