#!/usr/bin/env python3
"""What it costs to round a finished Pear task to fewer bits, as `pear-train --round` does it: 12 sets, one seed.

Each set is trained once, with the final table's options. Then the task is rounded in several ways, and the router
evaluates each of them.

    python -m benchmarks.study.rounding --shared ../shared --out benchmarks/results/rounding.json
"""

import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import click
import timm
import torch

from benchmarks.study.run import SETS, Plan, Study, chosen_rows
from pear_train.rounding import round_task
from pear_train.to_task import to_task

WAYS: dict[str, dict[str, Any]] = {
    "head Q4": {"head_dtype": "Q4"},
    "cores Q4": {"core_dtype": "Q4"},
    "adapters Q4": {"tensor_dtype": "Q4"},
    "all Q8": {"tensor_dtype": "Q8", "core_dtype": "Q8", "head_dtype": "Q8"},
    "all Q4": {"tensor_dtype": "Q4", "core_dtype": "Q4", "head_dtype": "Q4"},
    "all Q2": {"tensor_dtype": "Q2", "core_dtype": "Q2", "head_dtype": "Q2"},
}


@click.command(help=__doc__)
@click.option("--shared", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--dtype", type=click.Choice(("bfloat16", "float32")), default="bfloat16", show_default=True)
def main(shared: Path, out: Path, seed: int, dtype: str) -> None:
    study, rows = Study(shared, out.with_suffix(".jsonl")), []
    options, _ = chosen_rows()["pear r=12, 0.92"]
    for dataset in SETS:
        plan = Plan("rounding", "pear", "deit96", dataset, seed, {**options, "dtype": dtype})
        task = to_task(study.trained(plan, study.config(plan)), {})
        with tempfile.TemporaryDirectory() as folder:
            for way, formats in WAYS.items():
                made = round_task(task, study.backbone("deit96"), study.data(dataset), Path(folder) / way, **formats)
                row = {"dataset": dataset, "way": way, "adapter_bytes": made.adapter_bytes,
                       "head_bytes": made.head_bytes, "top1": made.top1, "loss": made.loss}  # fmt: skip
                rows.append(row)
                before, after = made.top1["test"]
                click.echo(f"{dataset} {way}: test {100 * before:.1f} to {100 * after:.1f}")
    found = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, timm {timm.__version__}",
        "options": plan.options, "seed": seed, "mean": mean(rows), "rows": rows,
    }  # fmt: skip
    out.write_text(json.dumps(found, indent=1) + "\n")


def mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Over the sets: top-1 in percent of before and of each way, and the bytes of each way."""
    found: dict[str, Any] = {}
    for way in WAYS:
        of = [row for row in rows if row["way"] == way]
        for split in ("val", "test"):
            before, after = (100 * sum(row["top1"][split][i] for row in of) / len(of) for i in (0, 1))
            found.setdefault("before", {})[split] = round(before, 2)
            found.setdefault(way, {})[split] = round(after, 2)
        for what in ("adapter_bytes", "head_bytes"):
            found[way][what] = round(sum(row[what] for row in of) / len(of))
    return found


if __name__ == "__main__":
    main()
