#!/usr/bin/env python3
"""What a task on common bases takes in a store: 1,000 tasks made from trained ones by changing their cores and heads.

    python -m benchmarks.store.bases TASK.safetensors [...] --out benchmarks/results/store_bases.json

Each is a checkpoint of a task on the same common bases, as `pear-train --bases` wrote it. A made task has another name,
other metrics and history, codes of cores and heads drawn anew, and noise on floats; bases stay. They are stored in both
formats: pear-task/2, which stores each tensor, and pear-task/3, which stores a task's own tensors as one.
"""

import json
import os
import platform
import random
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

from pear_store import RawTensor, Store, Task, make_task, read_checkpoint, write_checkpoint
from pear_store.format.checkpoint import STACKED_FORMAT
from pear_store.format.codes import to_numpy
from pear_store.format.joined import JOINED_FORMAT
from pear_store.format.manifest import as_stored, to_manifest


def base_names(task: Task) -> set[str]:
    """The tensors that belong to the bases, which stay as they are."""
    cored = [adapter for adapter in task.adapters.values() if adapter.core is not None]
    return {name for adapter in cored for matrix in (adapter.down, adapter.up) for name in matrix.names}


def changed(raw: RawTensor, rng: np.random.Generator) -> RawTensor:
    if raw.dtype == "U8":
        return RawTensor(raw.dtype, raw.shape, rng.bytes(raw.size_bytes))
    values = to_numpy(raw).astype("<f4")
    values = values + rng.standard_normal(values.shape).astype("<f4") * (0.1 * float(values.std()) + 1e-4)
    kind = {"F32": "<f4", "F16": "<f2"}[raw.dtype]
    return RawTensor(raw.dtype, raw.shape, values.astype(kind).tobytes())


def perturbed(task: Task, number: int) -> Task:
    """Another task on the same bases, of other numbers wherever two tasks would differ."""
    rng, stay = np.random.default_rng(number), base_names(task)
    tensors = {name: raw if name in stay else changed(raw, rng) for name, raw in task.tensors.items()}
    return make_task({**differing(task.record, random.Random(number)), "task": f"task-{number:05}"}, tensors)


def differing(value: Any, rng: random.Random) -> Any:
    """A record with other metrics, history, recalls and digests of data."""
    record = dict(value)
    record["metrics"] = {key: rng.randrange(1000) / 1000 for key in record["metrics"]}
    training = dict(record["training"])
    training["history"] = [{key: round(rng.random(), 6) for key in epoch} for epoch in training["history"]]
    training["recall"] = {
        split: [round(rng.random(), 4) for _ in values] for split, values in training["recall"].items()
    }
    for key in ("data_fingerprint", "fingerprint"):
        training[key] = rng.randbytes(32).hex()
    record["labels"] = [f"{label}-{rng.randrange(1000)}" for label in record["labels"]]
    return {**record, "training": training}


def tasks_of(sources: list[Task], count: int) -> Iterator[Task]:
    for number in range(count):
        yield perturbed(sources[number % len(sources)], number)


def measure(sources: list[Task], count: int, folder: Path, one_by_one: bool) -> dict[str, Any]:
    shared = {source.tensors[name].digest: source.tensors[name].size_bytes for source in sources
              for name in base_names(source)}  # fmt: skip
    new_bytes = manifest_bytes = 0
    with Store.create(folder) as store:

        def told() -> Iterator[Task]:
            nonlocal new_bytes, manifest_bytes
            for task in tasks_of(sources, count):
                new_bytes += sum(
                    {t.digest: t.size_bytes for t in task.tensors.values() if t.digest not in shared}.values()
                )
                manifest_bytes += len(to_manifest(task))
                yield task

        if one_by_one:
            for task in told():
                store.add(task)
        else:
            for _ in store.add_many(told()):
                pass
        stats = store.stats()
    index = int(subprocess.check_output(["du", "-B1", "-s", str(folder / "index")]).split()[0])
    new = new_bytes / count
    packs = (stats.pack_bytes - sum(shared.values())) / count
    return {
        "format": sources[0].record["format"],
        "tensors_a_task": len(as_stored(sources[0])[1]),
        "tasks": count,
        "added": "one by one" if one_by_one else "together",
        "bases_bytes": sum(shared.values()),
        "new_bytes_a_task": round(new),
        "manifest_json_bytes_a_task": round(manifest_bytes / count),
        "record_bytes_a_task_in_packs": round(packs - new),
        "record_bytes_a_task_in_the_index": round(index / count),
        "stored_bytes_a_task": round(packs + index / count),
        "stored_over_new_bytes_and_records": round((packs + index / count) / (new + manifest_bytes / count), 3),
        "stored_over_new_bytes": round((packs + index / count) / new, 3),
        "dedup_ratio_of_stats": stats.dedup_ratio,
        "logical_bytes": stats.logical_bytes, "unique_bytes": stats.unique_bytes, "stored_bytes": stats.stored_bytes,
    }  # fmt: skip


def file_record(task: Task, folder: Path) -> int:
    """Bytes of a checkpoint that are no tensor's."""
    return write_checkpoint(folder / "one.safetensors", task) - sum(t.size_bytes for t in task.tensors.values())


@click.command(help=__doc__)
@click.argument("tasks", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--count", default=1000, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(tasks: tuple[Path, ...], count: int, out: Path) -> None:
    sources = [read_checkpoint(path) for path in tasks]
    with tempfile.TemporaryDirectory() as made:
        rows = []
        for form in (STACKED_FORMAT, JOINED_FORMAT):
            alike = [make_task({**source.record, "format": form}, source.tensors) for source in sources]
            header = sum(file_record(perturbed(task, 0), Path(made)) for task in alike) / len(alike)
            for each in (False, True):
                row = measure(alike, count, Path(made) / f"{form[-1]}-{each}", each)
                rows.append({**row, "record_bytes_in_a_checkpoint": round(header)})
    found = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "python": platform.python_version(),
        "lmdb": version("lmdb"), "sources": [path.name for path in tasks], "stores": rows,
    }  # fmt: skip
    out.write_text(json.dumps(found, indent=1) + "\n")
    click.echo(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
