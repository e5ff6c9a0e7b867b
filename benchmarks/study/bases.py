#!/usr/bin/env python3
"""Tasks on common bases, beside the study's other rows: three folds of the 12 sets, bases from 8, tasks on the other 4.

Each run is a row of benchmarks/results/study.jsonl, of stage `bases`; what is there is not repeated. Sources (unpruned
adapters of the sets) and bases are kept in --kept, from which a stopped script goes on. One training gives several rows
where codes are rounded to after it. A row has val and test from the written task; what is chosen is chosen on val.

    python -m benchmarks.study.bases --shared ../shared --seeds 3
    python -m benchmarks.study.bases --shared ../shared --count 1      # the next piece of work, then end
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.study.run import BASE, RESULTS, SETS, SWEEP_SETS, Plan, Study, StudyRun, bits, chosen_rows, routed, top1
from pear_store import Task, make_task, read_checkpoint, write_checkpoint
from pear_train import TrainConfig, open_dataset
from pear_train.dtypes import code_bits
from pear_train.machine import on_device
from pear_train.make_bases import make_backbone_bases, make_bases
from pear_train.report import bases_bytes, stored_bytes
from pear_train.to_task import to_task
from router.tensors import from_torch, to_torch

FOLDS = (
    SWEEP_SETS,
    ("dtd10", "neu_surface", "mnist", "chars74k36"),
    ("cifar10", "chest_xray3", "brain_mri", "spoken_digits_mel"),
)
"""The sets that have no part in a fold's bases."""
RECIPE: dict[str, Any] = {**BASE, "lr": 1e-2, "core_lr": 2.0, "weight_decay": 1.0, "warmup": 0.3}
CODES = ("Q8", "Q4", "Q2")
OWN = {"by importance": "taylor", "at random": "random", "at first blocks": "first"}


@dataclass(frozen=True)
class Form:
    """A task's form: which bases, of which rank, and options of the run."""

    kind: str
    """random, V1, V2, V1-halves: V1 of three times as many sources, each set and each half of its classes; or backbone:
    the first singular vectors of each Linear, from no task; unscaled: the same without their singular values."""
    rank: int
    name: str = ""
    options: tuple[tuple[str, Any], ...] = ()
    after: tuple[str, ...] = ()
    """Codes that cores and head are rounded to after training: each another row."""

    @property
    def bases(self) -> str:
        return f"{self.kind} R={self.rank}"

    def plans(self, dataset: str, seed: int) -> list[Plan]:
        """The rows of one training, the first as it was trained."""
        options = {**RECIPE, "bases": self.bases, **dict(self.options)}
        name = self.bases + (f", {self.name}" if self.name else "")
        made = [Plan("bases", name, "deit96", dataset, seed, options, None, True)]
        for code in self.after:
            told = {**options, "rounded": code}
            made.append(Plan("bases", f"{name}, {code} afterwards", "deit96", dataset, seed, told, None, True))
        return made


def own(kind: str, rank: int, own_rank: int, own_bytes: int) -> Iterator[Form]:
    """Own parts of 4 bits beside cores of 4 bits, placed by the score and by its controls."""
    told = {"core_dtype": "Q4", "tensor_dtype": "Q4", "head_dtype": "Q4", "own_rank": own_rank, "own_bytes": own_bytes}
    for where, importance in OWN.items():
        options = tuple({**told, "importance": importance}.items())
        yield Form(kind, rank, f"cores Q4, own r={own_rank} Q4 in {own_bytes:,} bytes {where}", options)


def trained_as(kind: str, rank: int, core: str, head: str, **options: Any) -> Form:
    told = {"core_dtype": core, "head_dtype": head, **options}
    shown = ", ".join((f"cores {core}, head {head}", *(f"{name} {value:g}" for name, value in options.items())))
    return Form(kind, rank, shown, tuple(told.items()))


SMALLEST = next(own("V1", 8, 1, 2_900))
"""The best on val of what takes at most 4 KB"""
BACKBONE = Form("backbone", 16, after=CODES)
FORMS = (
    Form("V1", 16, after=CODES),
    Form("V1", 32, after=CODES),
    Form("random", 16),
    *own("V1", 16, 2, 4096),
    *own("V1", 32, 4, 10_500),
    Form("V2", 16, after=CODES),
    Form("V2", 32, after=CODES),
    trained_as("V2", 16, "Q4", "Q4"),
    trained_as("V2", 32, "Q4", "Q4"),
    trained_as("V2", 32, "Q2", "Q4"),
    *own("V2", 16, 2, 4096),
    *own("V2", 32, 4, 10_000),
    *own("V2", 16, 1, 2048),
    Form("V1", 48, after=CODES),
    Form("V2", 48, after=CODES),
    Form("V1", 40, after=CODES),
    SMALLEST,
    next(own("V1", 12, 1, 1_790)),
    trained_as("V1", 16, "Q4", "Q4"),
    *(trained_as("V1", 16, "Q4", "Q4", core_lr=factor) for factor in (1.0, 4.0)),
    Form("V1-halves", 16, after=CODES),
    Form("V1-halves", 32, after=CODES),
    BACKBONE,
    *(Form("backbone", rank, after=CODES) for rank in (11, 28)),
    Form("unscaled", 16, after=CODES),
)
"""In the order in which they are run: the cheapest first."""
REPEATED = (*(form for form in FORMS[:6] if form.kind != "random"), SMALLEST, BACKBONE)
"""What is run with three seeds."""


class BasesStudy:
    """Sources, bases and rows, each made when it is needed first.

    Args:
        count: pieces of work (a source, bases, a training) before it ends; None: all.
    """

    def __init__(self, study: Study, kept: Path, dtype: str, count: int | None) -> None:
        self.study, self.kept, self.dtype, self.left = study, kept, dtype, count
        self.backbone = study.backbone("deit96")

    def worked(self, what: str, began: float) -> None:
        """Says what was done; ends the script where that was enough."""
        click.echo(f"{what}: {time.perf_counter() - began:.0f} s")
        if self.left is not None:
            self.left -= 1
            if self.left <= 0:
                raise click.exceptions.Exit(0)

    def source(self, dataset: str, seed: int) -> Task:
        """Unpruned adapters of rank 8 of a set, or of half its classes; all of a seed start from one random `down`."""
        path = self.kept / "sources" / f"{dataset}-{seed}.safetensors"
        if not path.exists():
            began = time.perf_counter()
            options = {**chosen_rows()["unpruned r=8"][0], "dtype": self.dtype}
            plan = Plan("source", "source", "deit96", dataset, seed, options)
            run = self.trained(self.study.config(plan), None)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_checkpoint(path, to_task(run, {}))
            self.worked(f"source {dataset} {seed}", began)
        return read_checkpoint(path)

    def bases(self, kind: str, rank: int, fold: int, seed: int) -> Task:
        path = self.kept / "bases" / f"{kind}-{rank}-fold{fold}-{seed}.safetensors"
        if kind in ("backbone", "unscaled") and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            make_backbone_bases(TrainConfig(task="bases", rank=rank, img_size=96), self.backbone, path)
            if kind == "unscaled":
                write_checkpoint(path, unscaled(read_checkpoint(path)))
        if not path.exists():
            members = [s for s in SETS if s not in FOLDS[fold]]
            sources = [self.source(s, seed) for s in members]
            if kind == "V1-halves":
                sources += [self.source(half, seed) for s in members for half in self.study.halves(s)]
            began = time.perf_counter()
            path.parent.mkdir(parents=True, exist_ok=True)
            told = {**RECIPE, "epochs": 5, "dtype": self.dtype, "select": "last", "seed": seed, "rank": rank}
            common: dict[str, Any] = {**told, "positions": "qkv,mlp", "img_size": 96}
            of = [TrainConfig(task=s, **common) for s in members] if kind == "V2" else []
            data = [open_dataset(str(self.study.shared / "data" / f"{c.task}.npz")) for c in of]
            made = make_bases(TrainConfig(task="bases", **common), self.backbone, sources, path, of, data)
            if kind == "random":
                write_checkpoint(path, at_random(read_checkpoint(path), seed))
            held = sum(made.energy.values()) / len(made.energy)
            click.echo(f"{path.name}: {100 * held:.1f} % of the sources' energy held, val {made.val_top1}")
            self.worked(f"bases {path.stem}", began)
        return read_checkpoint(path)

    def trained(self, config: TrainConfig, bases: Task | None) -> StudyRun:
        adapted = self.study._adapted.setdefault("deit96", on_device(self.backbone, config.device))
        run = StudyRun(config, adapted, self.study.data(config.task), bases=bases)
        self.study._steps(run, config.epochs * run.batches)
        return run

    def do(self, form: Form, fold: int, dataset: str, seed: int) -> None:
        """One training, and its rows that are not there."""
        plans = form.plans(dataset, seed)
        todo = [plan for plan in plans if plan.key not in self.study.done]
        if not todo:
            return
        bases = self.bases(form.kind, form.rank, fold, seed)
        began = time.perf_counter()
        told = {key: value for key, value in plans[0].options.items() if key != "bases"}
        config = self.study.config(replace(plans[0], options={**told, "dtype": self.dtype}))
        run = self.trained(config, bases)
        for plan in todo:
            if code := plan.options.get("rounded"):
                run.config = replace(config, core_dtype=code, head_dtype=code)
                run.adapters.core_bits = code_bits(code)
            row = {**self.row(run), "seconds": round(time.perf_counter() - began, 1)}
            self.study.write(replace(plan, options={**plan.options, "dtype": self.dtype}), row)
            whole = row["adapter_bytes"] + row["head_bytes"]
            click.echo(f"{dataset} {seed} {plan.name}: val {100 * row['val_top1']:.1f}, {whole:,} bytes with head")
        self.worked(f"{form.bases} {form.name}", began)

    def row(self, run: StudyRun) -> dict[str, Any]:
        """What the written task gives, through the router."""
        task = to_task(run, {})
        adapter, knowledge, head = stored_bytes(task)
        found = {split: routed(self.backbone, task, run.pixels[split]) for split in ("val", "test")}
        targets = {split: run.pixels[split].targets for split in found}
        return {
            "val_top1": top1(found["val"], targets["val"]),
            "val_loss": float(torch.nn.functional.cross_entropy(found["val"], targets["val"])),
            "train_loss": run.history[-1]["loss"],
            "adapter_bytes": adapter, "knowledge_bytes": knowledge, "head_bytes": head,
            "bases_bytes": bases_bytes(task), "record_bytes": len(json.dumps(dict(task.record))),
            "pruned": run.pruned, "importance": run.importance,
            "test_top1": top1(found["test"], targets["test"]), "right": bits(found["test"], targets["test"]),
        }  # fmt: skip


def at_random(bases: Task, seed: int) -> Task:
    """The same with random orthonormal bases: a control."""
    random = torch.Generator().manual_seed(seed)
    tensors = dict(bases.tensors)
    for entry in bases.record["adapters"].values():
        for side in ("down", "up"):
            drawn = torch.randn(bases.tensors[entry[side]].shape, generator=random)
            tall = torch.linalg.qr(drawn if side == "down" else drawn.mT).Q
            tensors[entry[side]] = from_torch((tall if side == "down" else tall.mT).contiguous().half())
    return make_task(bases.record, tensors)


def unscaled(bases: Task) -> Task:
    """The same with rows of `up` of norm 1: a control."""
    tensors = dict(bases.tensors)
    for entry in bases.record["adapters"].values():
        up = to_torch(bases.tensors[entry["up"]]).float()
        tensors[entry["up"]] = from_torch(torch.nn.functional.normalize(up, dim=-1).half())
    return make_task(bases.record, tensors)


@click.command(help=__doc__)
@click.option("--shared", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--kept", type=click.Path(path_type=Path), default=Path("runs/bases"), show_default=True)
@click.option("--seeds", default=1, show_default=True)
@click.option("--folds", default=len(FOLDS), show_default=True, help="How many of the folds.")
@click.option("--forms", default=len(FORMS), show_default=True, help="How many of the forms, the cheapest first.")
@click.option("--count", type=int, help="Pieces of work before it ends [default: all].")
@click.option("--dtype", type=click.Choice(("bfloat16", "float32")), default="bfloat16", show_default=True)
def main(
    shared: Path, results: Path, kept: Path, seeds: int, folds: int, forms: int, count: int | None, dtype: str
) -> None:
    study = BasesStudy(Study(shared, results), kept, dtype, count)
    for seed in range(seeds):
        for form in FORMS[:forms]:
            for fold, sets in enumerate(FOLDS[:folds]):
                for dataset in sets:
                    study.do(form, fold, dataset, seed)
    click.echo("nothing is left to do")


if __name__ == "__main__":
    main()
