#!/usr/bin/env python3
"""The study behind pear-train's defaults, its peers and its controls, on 12 real data sets.

Each run is one row of benchmarks/results/study.jsonl; what is there is not repeated, so the script may be stopped
and started at will. Sweeps look at val only, with the weights of the last epoch; test is looked at in the
stages `final`, `tuned`, `table` and `few`, and where tasks stand upon others. Runs that differ only in what happens
after pruning share the epochs before it, which are the same to the bit. benchmarks/study/report.py makes tables and
plots.

    python -m benchmarks.study.run shape --shared ../shared
    python -m benchmarks.study.run final --shared ../shared --seeds 3

Several processes of a thread each (OMP_NUM_THREADS=1, --processes 2 --process 0, and 1) get more done than one
of several threads. Rows are the same row whatever the precision of their forwards, which each of them names: --dtype
float32 on a CPU that is no faster in bfloat16.
"""

import copy
import json
import os
import platform
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import click
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.study.peers import adapt
from pear_store import Store, Task, read_checkpoint
from pear_train import Dataset, Split, TrainConfig, open_dataset
from pear_train.adapters import AdapterSet
from pear_train.data import Pixels, preprocess_record
from pear_train.evaluate import in_batches
from pear_train.feed import Feed
from pear_train.group import next_batch, step_together
from pear_train.machine import on_device
from pear_train.make_base import train_base
from pear_train.report import stored_bytes
from pear_train.rounding import in_formats
from pear_train.run import TaskRun
from pear_train.to_task import to_task
from router import AdaptedBackbone, Backbone, Preprocess, Router, load_backbone
from router.precision import fast_precision

DEVICE = torch.device("cpu")
RESULTS = Path(__file__).parents[1] / "results" / "study.jsonl"
GROUPS = {
    "natural": ("cifar10", "dtd10", "chars74k36", "sign_digits"),
    "specialized": ("rsscn7", "neu_surface", "chest_xray3", "brain_mri", "spoken_digits_mel"),
    "character": ("mnist",),
    "structured": ("mnist_count8", "mnist_location16"),
}
SETS = ("dtd10", "rsscn7", "mnist", "mnist_count8", "sign_digits", "neu_surface", "mnist_location16", "chest_xray3",
        "spoken_digits_mel", "chars74k36", "brain_mri", "cifar10")  # fmt: skip
"""In the order in which the final table takes them: early rows are of every group."""
SWEEP_SETS = ("sign_digits", "rsscn7", "mnist_location16", "mnist_count8")
PRUNING = ("ratio", "importance", "sharing", "borrow", "borrowed_scale", "scale_lr", "knowledge", "knowledge_bits",
           "train_borrowed_scale", "head_dtype")  # fmt: skip
"""Options that say nothing before pruning."""


@dataclass(frozen=True)
class Plan:
    """One run to do: `options` are TrainConfig's; a peer is trained by its own library."""

    stage: str
    name: str
    backbone: str
    dataset: str
    seed: int
    options: dict[str, Any] = field(default_factory=dict)
    peer: str | None = None
    test: bool = False

    @property
    def key(self) -> str:
        """What makes this run this run: not the precision of its forwards."""
        told = {name: value for name, value in self.options.items() if name != "dtype"}
        which = [self.stage, self.name, self.backbone, self.dataset, self.seed, told, self.peer]
        return json.dumps(which, sort_keys=True)

    @property
    def training(self) -> str:
        """What a run's end depends on."""
        told = {name: value for name, value in self.options.items() if name != "rounded"}
        return json.dumps([self.backbone, self.dataset, self.seed, told, self.peer])

    @property
    def before_pruning(self) -> str:
        """What the epochs before pruning depend on."""
        told = {name: value for name, value in self.options.items() if name not in (*PRUNING, "method", "rounded")}
        return json.dumps(
            [self.backbone, self.dataset, self.seed, told, self.peer, self.options.get("method") == "linear"]
        )


def plan_of(row: dict[str, Any]) -> Plan:
    """What a row of the results was to do."""
    return Plan(**{f.name: row[f.name] for f in fields(Plan)})


class StudyRun(TaskRun):
    """A run that looks at val once, at the last epoch."""

    def look_at_val(self) -> dict[str, float]:
        if self.epoch == self.config.epochs:
            return super().look_at_val()
        return {"val_top1": 0.0, "val_macro_f1": 0.0}

    def fork(self, config: TrainConfig) -> "StudyRun":
        """A copy that goes on with other options."""
        shared = (self.adapted, self.train_pixels, self.val_pixels, self.dataset, self.bank)
        memo: dict[int, Any] = {id(one): one for one in shared}
        for generator in (self.generator, self.dropping):
            memo[id(generator)] = generator.clone_state()
        made = copy.deepcopy(self, memo)
        made.config = config
        made.feed = Feed(config, made.train_pixels, len(made.dataset.classes), made.generator)
        made.optimiser.param_groups[1]["factor"] = config.scale_lr
        return made


@torch.no_grad()
def initialise(adapters: AdapterSet, how: str) -> None:
    """Other starts than a uniform `down` in ±1/√d_in and an `up` of 0."""
    generator = torch.Generator().manual_seed(0)
    for down, up in zip(adapters.down.values(), adapters.up.values(), strict=True):
        size = 1 / (3 * down.shape[0]) ** 0.5  # a uniform entry's deviation
        if how == "down 3 times as large":
            down.mul_(3)
        elif how == "up random":
            up.copy_(torch.randn(up.shape, generator=generator) * 0.1 * size)


def leave_k(adapters: AdapterSet) -> None:
    """Keeps k's columns of `up` at fused qkv modules where they are, at 0."""
    for name, up in adapters.up.items():
        if up.shape[1] == 3 * adapters.down[name].shape[0]:
            up.register_hook(lambda gradient: torch.cat([(q := gradient.chunk(3, 1))[0], 0 * q[1], q[2]], 1))


def half_of(data: Dataset, first: int) -> Dataset:
    """Every other class, from number 0 or 1."""

    def chosen(split: Split) -> Split:
        found = split.subset(torch.nonzero(split.targets % 2 == first)[:, 0])
        return replace(found, targets=found.targets // 2)

    classes = data.classes[first::2]
    return Dataset(f"{data.description}, every other class", classes, chosen(data.train), chosen(data.val), None)


class Study:
    def __init__(self, shared: Path, results: Path) -> None:
        self.shared, self.results = shared, results
        rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
        self.done = {plan_of(row).key for row in rows}
        self._backbones: dict[str, Backbone] = {}
        self._kept: tuple[str, StudyRun] | None = None
        self._ended: tuple[str, StudyRun] | None = None
        self._adapted: dict[str, AdaptedBackbone] = {}
        self._data: tuple[str, Dataset] | None = None

    def backbone(self, name: str) -> Backbone:
        if name not in self._backbones:
            model = {"tiny": "pear_tiny", "deit": "deit_tiny_patch16_224"}[name.rstrip("0123456789")]
            weights = None if model == "pear_tiny" else self.shared / "weights" / f"{model}.safetensors"
            self._backbones[name] = load_backbone(model, weights)
        return self._backbones[name]

    def data(self, name: str) -> Dataset:
        if self._data is None or self._data[0] != name:
            dataset, _, half = name.partition(".")
            opened = open_dataset(str(self.shared / "data" / f"{dataset}.npz"))
            self._data = (name, half_of(opened, int(half)) if half else opened)
        return self._data[1]

    def halves(self, name: str) -> list[str]:
        """Names of the halves of a set's classes. A half of one class is left out."""
        return [f"{name}.{first}" for first in (0, 1) if len(self.data(name).classes[first::2]) > 1]

    def config(self, plan: Plan) -> TrainConfig:
        pixels = plan.backbone.lstrip("abcdefghijklmnopqrstuvwxyz")
        common = {
            "task": plan.dataset,
            "select": "last",
            "seed": plan.seed,
            "lr": 5e-3, "weight_decay": 1e-4, "warmup": 0.1,  # where rows name none
            "img_size": int(pixels) if pixels else None,
        }  # fmt: skip
        told = {name: value for name, value in plan.options.items() if name not in ("init", "rounded")}
        return TrainConfig(**{**common, **told})

    def do(self, plans: list[Plan]) -> None:
        """Does what is not done yet, runs with common first epochs one after another."""
        todo = [plan for plan in plans if plan.key not in self.done]
        order = {before: i for i, before in reversed(list(enumerate(plan.before_pruning for plan in todo)))}
        for number, plan in enumerate(sorted(todo, key=lambda plan: order[plan.before_pruning])):
            began = time.perf_counter()
            row = self.peer(plan) if plan.peer else self.ours(plan)
            row.pop("task", None)
            row["seconds"] = round(time.perf_counter() - began, 1)
            self.write(plan, row)
            shown = f"{100 * row['val_top1']:.1f}" + (f" test {100 * row['test_top1']:.1f}" if plan.test else "")
            click.echo(
                f"{number + 1}/{len(todo)} {plan.stage} {plan.backbone} {plan.dataset} {plan.seed} {plan.name}: {shown}"
            )

    def write(self, plan: Plan, row: dict[str, Any]) -> None:
        versions = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, timm {timm.__version__}"
        record = {**asdict(plan), **row, "machine": versions}
        if "importance" in record:
            record["importance"] = {name: float(f"{score:.4g}") for name, score in record["importance"].items()}
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with open(self.results, "a") as file:
            file.write(json.dumps(record) + "\n")
        self.done.add(plan.key)

    # ---- ours ---------------------------------------------------------------------------------

    def ours(self, plan: Plan, base: Task | None = None, bank: Sequence[Task] = ()) -> dict[str, Any]:
        config, backbone = self.config(plan), self.backbone(plan.backbone)
        run = self.trained(plan, config, base, bank)
        task = to_task(run, {})
        formats = plan.options.get("rounded")
        if formats:
            task = in_formats(task, **formats)
        adapter, knowledge, head = stored_bytes(task)
        logits = routed(backbone, task, run.val_pixels) if formats else self.logits(run, run.val_pixels)
        row = {
            "val_top1": top1(logits, run.val_pixels.targets),
            "val_loss": float(F.cross_entropy(logits, run.val_pixels.targets)),
            "train_loss": run.history[-1]["loss"],
            "adapter_bytes": adapter, "knowledge_bytes": knowledge, "head_bytes": head,
            "task": task, "pruned": run.pruned, "importance": run.importance, "borrowed": run.sources,
            "scales": [round(float(s), 4) for s in run.adapters.scales().values()],
        }  # fmt: skip
        if plan.test:
            pixels = run.pixels["test"]
            found = routed(backbone, task, pixels)
            row |= {"test_top1": top1(found, pixels.targets), "right": bits(found, pixels.targets)}
        return row

    def trained(self, plan: Plan, config: TrainConfig, base: Task | None = None, bank: Sequence[Task] = ()) -> StudyRun:
        """A run at its end, from the epochs before pruning if another had the same. The last run is kept."""
        if self._ended is not None and self._ended[0] == plan.training and base is None and not bank:
            return self._ended[1]
        if plan.backbone not in self._adapted:
            self._adapted[plan.backbone] = on_device(self.backbone(plan.backbone), config.device)
        adapted = self._adapted[plan.backbone]
        if base is not None or bank:
            run = StudyRun(config, adapted, self.data(plan.dataset), base, bank)
            self._steps(run, config.epochs * run.batches)
            return run
        key = plan.before_pruning
        if self._kept is None or self._kept[0] != key or config.method == "linear":
            run = StudyRun(config, adapted, self.data(plan.dataset), base, bank)
            initialise(run.adapters, plan.options.get("init", ""))
            if plan.options.get("init") == "q and v alone":
                leave_k(run.adapters)
            stop = (
                config.epochs if config.method == "linear" else TrainConfig(task="x", epochs=config.epochs).pruned_after
            )
            self._steps(run, (config.prune_epoch or stop) * run.batches - 1)
            self._kept = (key, run)
        run = self._kept[1].fork(config)
        if plan.options.get("init") == "q and v alone":  # hooks are not copied
            leave_k(run.adapters)
        self._steps(run, config.epochs * run.batches)
        self._ended = (plan.training, run)
        return run

    def _steps(self, run: StudyRun, until: int) -> None:
        """Steps up to number `until` of the run; the step before pruning is the last that can be shared."""
        while (run.epoch - 1) * run.batches + run.batch < until and not run.finished:
            step_together([(run, next_batch(run))])
            run.after_step()

    @torch.no_grad()
    def logits(self, run: TaskRun, pixels: Pixels) -> Tensor:
        return torch.cat([run.head(run.features(pixels, rows)).cpu() for rows in in_batches(pixels)])

    # ---- peers --------------------------------------------------------------------------------

    def peer(self, plan: Plan) -> dict[str, Any]:
        """HF PEFT's tuners, full fine-tuning: the same batches, schedule and epochs, by plain torch."""
        config, data = self.config(plan), self.data(plan.dataset)
        record = preprocess_record(self.backbone(plan.backbone), config.img_size)
        train, val = (Pixels(split, Preprocess(record)) for split in (data.train, data.val))
        torch.manual_seed(plan.seed)
        kwargs: dict[str, Any] = {"img_size": config.img_size} if config.img_size else {}
        model: Any = timm.create_model(self.backbone(plan.backbone).name, num_classes=0, **kwargs)
        state = self.backbone(plan.backbone).sized(tuple(record["input_size"][1:])).state_dict()
        model.load_state_dict(state)
        for part in model.modules():
            if hasattr(part, "fused_attn"):
                part.fused_attn = False  # as for our own runs: the faster one here
        body, count = adapt(model, plan.peer or "")
        head = nn.Linear(model.num_features, len(data.classes))
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        parameters = [p for p in body.parameters() if p.requires_grad] + list(head.parameters())
        optimiser = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
        generator = torch.Generator().manual_seed(plan.seed)
        batches = -(-len(train) // config.batch_size)
        steps, warmup = config.epochs * batches, max(1, round(config.warmup * config.epochs * batches))
        body.eval()  # as the frozen backbones of our runs are
        precision = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(config.dtype, fast_precision(DEVICE))

        def features(images: Tensor) -> Tensor:
            with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                found: Tensor = body(images)
            return found.float()

        for epoch in range(config.epochs):
            order = torch.randperm(len(train), generator=generator)
            total = 0.0
            for batch in range(batches):
                rows = order[batch * config.batch_size : (batch + 1) * config.batch_size]
                step = epoch * batches + batch
                cosine = 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (step - warmup) / max(1, steps - warmup)))))
                for group in optimiser.param_groups:
                    group["lr"] = config.lr * ((step + 1) / warmup if step < warmup else cosine)
                loss = F.cross_entropy(head(features(train.images(rows))), train.targets[rows])
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                optimiser.step()
                total += float(loss.detach()) * len(rows)

        @torch.no_grad()
        def logits(pixels: Pixels) -> Tensor:
            return torch.cat([head(features(pixels.images(rows))) for rows in in_batches(pixels)])

        found = logits(val)
        row: dict[str, Any] = {
            "val_top1": top1(found, val.targets), "val_loss": float(F.cross_entropy(found, val.targets)),
            "train_loss": total / len(train), "adapter_bytes": 2 * count, "knowledge_bytes": 0,
            "head_bytes": 2 * sum(p.numel() for p in head.parameters()),
        }  # fmt: skip
        if plan.test:
            assert data.test is not None
            pixels = Pixels(data.test, Preprocess(record))
            found = logits(pixels)
            row |= {"test_top1": top1(found, pixels.targets), "right": bits(found, pixels.targets)}
        return row


def routed(backbone: Backbone, task: Task, pixels: Pixels) -> Tensor:
    """Logits of a written task, through the router: [image, class]."""
    router = Router(backbone)
    router.add(task)
    parts = [router.run(pixels.images(rows), task.name).logits for rows in in_batches(pixels)]
    return torch.cat([torch.stack(list(part)) for part in parts])


def top1(logits: Tensor, targets: Tensor) -> float:
    return float((logits.argmax(1) == targets).float().mean())


def bits(logits: Tensor, targets: Tensor) -> str:
    """Which images were right, packed, for bootstraps over images."""
    right = (logits.argmax(1) == targets).to(torch.uint8).tolist()
    return f"{len(right)}:{int(''.join(map(str, right)), 2):x}"


# ---- plans ------------------------------------------------------------------------------------


BASE: dict[str, Any] = {"epochs": 8, "dtype": "bfloat16"}


def shape() -> Iterator[Plan]:
    """Where, how wide, how much of it and how fast, beside LoRA; DeiT-tiny, four sets; val only."""
    inf = float("inf")
    ours: tuple[tuple[str, int, float | None, float, dict[str, Any]], ...] = (
        # positions, rank, ratio (None: unpruned), lr, what else
        *(("blocks", r, q, lr, {"max_grad_norm": inf}) for r, q, lr in (
            (8, 0.75, 5e-3), (16, 0.92, 5e-3), (8, None, 5e-3), (8, 0.75, 1e-2), (16, 0.92, 1e-2), (24, 0.96, 5e-3))),
        *(("qkv", r, q, lr, {"max_grad_norm": inf}) for r, q, lr in (
            (8, 0.75, 1e-2), (16, 0.92, 1e-2), (16, 0.92, 2e-2), (8, None, 1e-2), (4, 0.5, 1e-2),
            (12, 0.84, 1e-2))),
        ("linear", 6, 0.92, 5e-3, {"max_grad_norm": inf}),
        ("qkv", 8, 0.75, 1e-2, {"max_grad_norm": inf, "prune_epoch": 5}),
        ("qkv", 8, 0.75, 1e-2, {"max_grad_norm": inf, "drop_branch": 0.1}),
        ("qkv", 8, 0.75, 1e-2, {}), ("qkv", 8, None, 1e-2, {}),
        ("blocks", 24, 0.96, 5e-3, {}), ("blocks", 24, 0.96, 1e-2, {}), ("blocks", 24, 0.96, 2e-3, {}),
        ("blocks", 16, 0.92, 5e-3, {}),
        *(("mlp", 4, None, lr, {"activation": "relu"}) for lr in (5e-3, 1e-2, 2e-2)),  # the form of AdaptFormer
        *(("qkv,mlp", r, q, lr, more) for r, q, lr, more in (
            (8, 0.85, 5e-3, {}), (8, 0.85, 5e-3, {"seed": 1}), (8, 0.85, 7e-3, {}), (8, 0.92, 5e-3, {}),
            (8, 0.85, 5e-3, {"sharing": "none", "knowledge": "none"}), (8, None, 5e-3, {}),
            (12, 0.92, 5e-3, {}), (12, 0.92, 5e-3, {"seed": 1}), (12, 0.92, 7e-3, {}), (16, 0.92, 5e-3, {}),
            (12, 0.92, 5e-3, {"sharing": "none", "knowledge": "none"}), (12, 0.92, 5e-3, {"importance": "random"}),
            (2, None, 2e-2, {}), (2, None, 1e-2, {}), (2, None, 5e-3, {}), (1, None, 1e-2, {}), (1, None, 2e-2, {}))),
    )  # fmt: skip
    for positions, rank, ratio, lr, more in ours:
        pruning = {"method": "adapters"} if ratio is None else {"ratio": ratio}
        yield from shaped({"positions": positions, "rank": rank, "lr": lr, **pruning, **more})
    for rank, lr, more in (
        (2, 2e-2, {"max_grad_norm": inf}), (2, 1e-2, {"max_grad_norm": inf}), (8, 1e-2, {"max_grad_norm": inf}),
        (8, 2e-2, {"max_grad_norm": inf}), (2, 2e-2, {}), (2, 2e-2, {"seed": 1}), (8, 1e-2, {}),
    ):  # fmt: skip
        yield from shaped({"lr": lr, **more}, f"lora-qkv:{rank}")
    for peer, rates in (
        ("full", (1e-4, 3e-4, 1e-3)),
        ("vera:64", (2e-2, 5e-2, 1e-1)),
        ("vblora:4", (5e-3, 2e-2, 5e-2)),
        ("lora:1", (5e-3, 1e-2, 2e-2)),
        ("lora:2", (5e-3, 1e-2)),
    ):
        for lr in rates:
            yield from shaped({"lr": lr}, peer)


PEERS = {"lora-qkv": "LoRA qkv", "lora": "LoRA all Linears", "vera": "VeRA qkv", "vblora": "VB-LoRA",
         "full": "full fine-tuning"}  # fmt: skip


def shaped(told: dict[str, Any], peer: str | None = None) -> Iterator[Plan]:
    """A row of `shape` on its four sets, named by its options."""
    options = {**BASE, **told}
    seed = options.pop("seed", 0)
    rest = {k: v for k, v in options.items() if k not in ("positions", "rank", "ratio", "method", "lr", *BASE)}
    if rest.get("max_grad_norm") == float("inf"):
        rest = {"unclipped": "", **{k: v for k, v in rest.items() if k != "max_grad_norm"}}
    what = "unpruned" if options.get("method") == "adapters" else f"pear {options.get('ratio')}"
    if peer:
        kind, _, rank = peer.partition(":")
        name = PEERS[kind] + (f" r={rank}" if rank else "")
    else:
        name = f"{options['positions']} r={options['rank']}, {what}"
    name += f", lr {options['lr']:g}" + "".join(f", {key} {value}".rstrip() for key, value in rest.items())
    for dataset in SWEEP_SETS:
        yield Plan("shape", name, "deit96", dataset, seed, options, peer)


OURS: dict[str, Any] = {"positions": "qkv,mlp", "rank": 8, "lr": 5e-3}
"""Of the final table; lr the better of two or more on val, as of everything there."""


def final() -> Iterator[Plan]:
    """The table: 12 sets, DeiT-tiny at 96 pixels; test, once."""
    pear = {
        **OURS,
        "method": "pear",
        "sharing": "nearest",
        "borrow": "core",
        "knowledge": "fold",
        "importance": "taylor",
    }
    small = {**pear, "rank": 12, "ratio": 0.92}
    ours: dict[str, dict[str, Any]] = {
        "unpruned r=8": {**OURS, "method": "adapters"},
        "pear r=8, 0.5": {**pear, "ratio": 0.5},
        "pear r=8, 0.75": {**pear, "ratio": 0.75},
        "pear r=8, 0.75, random importance": {**pear, "ratio": 0.75, "importance": "random"},
        "pear r=8, 0.75, no sharing": {**pear, "ratio": 0.75, "sharing": "none", "knowledge": "none"},
        "pear r=12, 0.92": small,
        "pear r=12, 0.92, no sharing": {**small, "sharing": "none", "knowledge": "none"},
        "pear r=12, 0.92, random importance": {**small, "importance": "random"},
        "unpruned r=2": {**OURS, "method": "adapters", "rank": 2, "lr": 1e-2},
        "unpruned r=1": {**OURS, "method": "adapters", "rank": 1, "lr": 2e-2},
        "linear": {"method": "linear", "epochs": 60, "lr": 1e-2},
    }  # fmt: skip
    lora = {2: 2e-2, 8: 1e-2}
    for seed in range(SEEDS):
        for dataset in SETS:
            for rank, lr in lora.items():
                name, options = f"LoRA qkv r={rank}", {**BASE, "lr": lr}
                yield Plan("final", name, "deit96", dataset, seed, options, f"lora-qkv:{rank}", True)
            for name, options in ours.items():
                yield Plan("final", name, "deit96", dataset, seed, {**BASE, **options}, None, True)


def tuned() -> Iterator[Plan]:
    """A first try with weight decay chosen as well, on val of four sets (`knobs`, `decay`); one seed."""
    rows: dict[str, tuple[dict[str, Any], str | None]] = {
        "LoRA qkv r=2, weight_decay 1": ({**BASE, "lr": 2e-2, "weight_decay": 1.0}, "lora-qkv:2"),
        "pear r=12, 0.92, weight_decay 0.1": ({**BASE, **OURS, "rank": 12, "ratio": 0.92, "weight_decay": 0.1}, None),
        "LoRA qkv r=8, weight_decay 1": ({**BASE, "lr": 1e-2, "weight_decay": 1.0}, "lora-qkv:8"),
    }
    for name, (options, peer) in rows.items():
        for dataset in SETS:
            yield Plan("tuned", name, "deit96", dataset, 0, options, peer, True)


def chosen_rows() -> dict[str, tuple[dict[str, Any], str | None]]:
    """The final table's rows, with the options that `recipe` chose: options, and the peer if it is one."""

    def chosen(lr: float, weight_decay: float, warmup: float) -> dict[str, Any]:
        return {**BASE, "lr": lr, "weight_decay": weight_decay, "warmup": warmup}

    wide = {"positions": "qkv,mlp", "rank": 12, "ratio": 0.92, **chosen(1e-2, 1.0, 0.3)}
    eight = {"positions": "qkv,mlp", "rank": 8, **chosen(1e-2, 1.0, 0.1)}
    small = {"positions": "qkv,mlp", "method": "adapters", **chosen(2e-2, 1.0, 0.1)}
    return {
        "pear r=12, 0.92": (wide, None),
        "LoRA qkv r=2": (chosen(2e-2, 1.0, 0.1), "lora-qkv:2"),
        "unpruned r=8": ({**eight, "method": "adapters"}, None),
        "LoRA qkv r=8": (chosen(1e-2, 1.0, 0.3), "lora-qkv:8"),
        "pear r=12, 0.92, random importance": ({**wide, "importance": "random"}, None),
        "pear r=12, 0.92, no sharing": ({**wide, "sharing": "none", "knowledge": "none"}, None),
        "pear r=8, 0.5": ({**eight, "ratio": 0.5}, None),
        "pear r=8, 0.75": ({**eight, "ratio": 0.75}, None),
        "unpruned r=1": ({**small, "rank": 1}, None),
        "unpruned r=2": ({**small, "rank": 2}, None),
        "linear": ({"method": "linear", **chosen(1e-2, 0.1, 0.1), "epochs": 60}, None),
    }


def table() -> Iterator[Plan]:
    """The final table; test, once."""
    for seed in range(SEEDS):
        for dataset in SETS:
            for name, (options, peer) in chosen_rows().items():
                yield Plan("table", name, "deit96", dataset, seed, options, peer, True)


def sharing() -> Iterator[Plan]:
    """What a pruned position may have, where most are pruned; DeiT-tiny, four sets; val only."""
    base = {**BASE, **OURS, "rank": 12, "ratio": 0.92}
    forms: dict[str, dict[str, Any]] = {
        "nothing": {"sharing": "none", "knowledge": "none"},
        "plain: top, scale 1, fixed": {"sharing": "top", "borrow": "scale", "knowledge": "none", "borrowed_scale": 1.0,
                                       "train_borrowed_scale": False},
        "scale from 0": {"borrow": "scale", "knowledge": "none"},
        "scale, fold": {"borrow": "scale", "knowledge": "fold"},
        "core from 0": {"borrow": "core", "knowledge": "none"},
        "core, fold": {"borrow": "core", "knowledge": "fold"},
        "core, 1-bit copy": {"borrow": "core", "knowledge": "lowbit"},
        "core, fold; by magnitude": {"importance": "magnitude"},
        "core, fold; by gradient": {"importance": "gradient"},
        "core, fold; at random": {"importance": "random"},
    }  # fmt: skip
    for dataset in SWEEP_SETS:
        for name, options in forms.items():
            yield Plan("sharing", name, "deit96", dataset, 0, {**base, **options})


def init() -> Iterator[Plan]:
    """How adapters start, and q and v alone, beside the final table's Pear; DeiT-tiny, four sets; val only."""
    options, _ = chosen_rows()["pear r=12, 0.92"]
    for dataset in SWEEP_SETS:
        for how in ("the default", "down 3 times as large", "up random", "q and v alone"):
            yield Plan("init", how, "deit96", dataset, 0, {**options, "init": how})


def codes() -> Iterator[Plan]:
    """Adapters and heads in few bits: 12 sets, one seed; test, beside the table's `pear r=12, 0.92`."""
    for dataset in SETS:
        for adapter, head in (("Q8", "Q8"), ("Q4", "Q4"), ("Q1", "Q4")):
            options = {**BASE, **OURS, "rank": 12, "ratio": 0.92, "tensor_dtype": adapter, "head_dtype": head}
            yield Plan("codes", f"adapters {adapter}, head {head}", "deit96", dataset, 0, options, None, True)


def few() -> Iterator[Plan]:
    """Few bytes: with the final table's options Pear in few bits and LoRA of rank 1; and other peers; test."""
    options, _ = chosen_rows()["pear r=12, 0.92"]
    lora, _ = chosen_rows()["LoRA qkv r=2"]  # not chosen anew for rank 1
    for seed in range(SEEDS):
        for dataset in SETS:
            told = {**options, "tensor_dtype": "Q4", "head_dtype": "Q4"}
            yield Plan("few", "pear r=12, 0.92: adapters Q4, head Q4", "deit96", dataset, seed, told, None, True)
    eight, _ = chosen_rows()["pear r=8, 0.75"]
    unpruned, _ = chosen_rows()["unpruned r=8"]
    four = {"tensor_dtype": "Q4", "head_dtype": "Q4"}
    all_four = {**four, "core_dtype": "Q4"}
    forms = {
        "pear r=12, 0.92: adapters, cores and head Q4": {**options, **all_four},
        "pear r=5, 0.92: adapters, cores and head Q4": {**options, **all_four, "rank": 5},
        "pear r=8, 0.75: adapters, cores and head Q4": {**eight, **all_four},
        "pear r=8, 0.67: adapters, cores and head Q4": {**eight, **all_four, "ratio": 0.67},
        "pear r=8, 0.67: adapters Q4": {**eight, "tensor_dtype": "Q4", "ratio": 0.67},
        "unpruned r=3: adapters and head Q4": {**unpruned, **four, "rank": 3},
    }  # 9, 3, 15, 20, 22 and 22 KB
    for name, told in forms.items():
        for seed in range(SEEDS):
            for dataset in SETS:
                yield Plan("few", name, "deit96", dataset, seed, told, None, True)
    for seed in range(SEEDS):
        for dataset in SETS:
            yield Plan("few", "LoRA qkv r=1", "deit96", dataset, seed, lora, "lora-qkv:1", True)
    others = {
        "LoRA-XS, r=16": ("lora-xs:16", {"lr": 2e-2, "weight_decay": 1.0}),
        "VB-LoRA r=4": ("vblora:4", {"lr": 2e-2}),
        "VeRA qkv r=64": ("vera:64", {"lr": 0.1}),
    }
    for name, (peer, told) in others.items():  # the best on val, in `peers`, `shape` or `decay`
        for seed in range(SEEDS):
            for dataset in SETS:
                yield Plan("few", name, "deit96", dataset, seed, {**BASE, **told}, peer, True)


ROUNDED: dict[str, dict[str, Any]] = {
    "as trained": {},
    "all rounded to 4 bits": {"tensor_dtype": "Q4", "core_dtype": "Q4", "head_dtype": "Q4"},
    "all rounded to 8 bits": {"tensor_dtype": "Q8", "core_dtype": "Q8", "head_dtype": "Q8"},
    "all rounded to 2 bits": {"tensor_dtype": "Q2", "core_dtype": "Q2", "head_dtype": "Q2"},
    "adapters rounded to 4 bits": {"tensor_dtype": "Q4"},
    "cores rounded to 4 bits": {"core_dtype": "Q4"},
    "head rounded to 4 bits": {"head_dtype": "Q4"},
}


def rounded() -> Iterator[Plan]:
    """Finished Pear tasks rounded to fewer bits, as `pear-train --round` does it; beside the same runs; test."""
    options, _ = chosen_rows()["pear r=12, 0.92"]
    for seed in range(SEEDS):
        for dataset in SETS:
            for way, formats in ROUNDED.items():
                told = {**options, "rounded": formats}
                yield Plan("rounded", f"pear r=12, 0.92: {way}", "deit96", dataset, seed, told, None, True)


def knobs() -> Iterator[Plan]:
    """One option at a time from the default, where no other stage turns it; DeiT-tiny, four sets; val only."""
    default: dict[str, Any] = {**BASE, **OURS, "rank": 12, "ratio": 0.92}
    unpruned: dict[str, Any] = {"method": "adapters"}
    turned: dict[str, dict[str, Any]] = {
        "the default": {},
        **{f"prune_epoch {n} of 8 (default 3)": {"prune_epoch": n} for n in (1, 2, 5, 6)},
        **{f"ratio {ratio} (default 0.92)": {"ratio": ratio} for ratio in (0.5, 0.75, 0.84)},
        **{f"positions {one} (default qkv,mlp)": {"positions": one} for one in ("attn", "blocks", "mlp")},
        "unpruned": unpruned,
        **{f"scale {scale} (default 1)": {"scale": scale} for scale in (0.5, 2.0)},
        **{f"warmup {share} (default 0.1)": {"warmup": share} for share in (0.0, 0.3)},
        **{f"weight_decay {decay} (default 1e-4)": {"weight_decay": decay} for decay in (0.1, 1.0)},
        "drop_branch 0.1 (default 0)": {"drop_branch": 0.1},
        **{f"augment {augment} (default none)": {"augment": augment} for augment in ("flip", "crop")},
        **{f"sharing {rule} (default nearest)": {"sharing": rule} for rule in ("top", "similar")},
        "importance taylor_abs (default taylor)": {"importance": "taylor_abs"},
        "knowledge lowbit, 4 bits (default fold)": {"knowledge": "lowbit", "knowledge_bits": 4},
        "knowledge exact (default fold)": {"knowledge": "exact"},
        **{f"unpruned, activation {name}": {**unpruned, "activation": name} for name in ("relu", "gelu")},
        "unpruned, augment crop": {**unpruned, "augment": "crop"},
        "unpruned, down common": {**unpruned, "down": "common"},
        "lr 0.0025 (default 0.005)": {"lr": 2.5e-3},
        "epochs 16 (default of the study: 8)": {"epochs": 16},
        "unpruned r=8, epochs 16": {**unpruned, "rank": 8, "epochs": 16},
    }  # fmt: skip
    for dataset in SWEEP_SETS:
        for name, options in turned.items():
            yield Plan("knobs", name, "deit96", dataset, 0, {**default, **options})
        for decay in (1e-4, 0.1, 0.3, 1.0):
            more: dict[str, Any] = {} if decay == 1e-4 else {"weight_decay": decay}
            rows: dict[str, tuple[dict[str, Any], str | None]] = {
                "unpruned r=8": ({**default, **unpruned, "rank": 8}, None),
                "LoRA qkv r=2": ({**BASE, "lr": 2e-2}, "lora-qkv:2"),
                "LoRA qkv r=8": ({**BASE, "lr": 1e-2}, "lora-qkv:8"),
            }
            if decay == 0.1:
                rows["ratio 0.5"] = {**default, "ratio": 0.5}, None
                rows["prune_epoch 2"] = {**default, "weight_decay": decay, "prune_epoch": 2}, None
            if decay == 0.3:
                rows["pear"] = default, None
            for what, (options, peer) in rows.items():
                name = what + (f", weight_decay {decay:g}" if more else "")
                yield Plan("knobs", name, "deit96", dataset, 0, {**options, **more}, peer)


def decay() -> Iterator[Plan]:
    """Learning rate and weight decay together, for ours and for peers; DeiT-tiny, four sets; val only."""
    pear: dict[str, Any] = {**BASE, **OURS, "rank": 12, "ratio": 0.92}
    unpruned: dict[str, Any] = {**BASE, **OURS, "method": "adapters"}
    rows: tuple[tuple[str, dict[str, Any], str | None, tuple[tuple[float, float], ...]], ...] = (
        ("pear r=12, 0.92", pear, None, ((5e-3, 3), (1e-2, 0.3), (1e-2, 1), (1e-2, 3), (2e-2, 1))),
        ("LoRA qkv r=2", BASE, "lora-qkv:2", ((2e-2, 3), (1e-2, 1), (4e-2, 1))),
        ("LoRA qkv r=8", BASE, "lora-qkv:8", ((1e-2, 3), (2e-2, 1))),
        ("unpruned r=8", {**unpruned, "rank": 8}, None, ((5e-3, 3), (1e-2, 1))),
        ("unpruned r=1", {**unpruned, "rank": 1}, None, ((2e-2, 1),)),
        ("unpruned r=2", {**unpruned, "rank": 2}, None, ((1e-2, 1), (2e-2, 1))),
        ("VeRA qkv r=64", BASE, "vera:64", ((0.1, 0.1), (0.1, 1))),
        ("VB-LoRA r=4", BASE, "vblora:4", ((2e-2, 0.1), (2e-2, 1))),
        ("LoRA-XS, r=16", BASE, "lora-xs:16", ((2e-2, 0.1), (2e-2, 1), (4e-2, 1))),
    )
    for dataset in SWEEP_SETS:
        for name, options, peer, pairs in rows:
            for lr, weight_decay in pairs:
                told = {**options, "lr": lr, "weight_decay": float(weight_decay)}
                yield Plan(
                    "decay", f"{name}, lr {lr:g}, weight_decay {weight_decay:g}", "deit96", dataset, 0, told, peer
                )


def recipe() -> Iterator[Plan]:
    """Learning rate, weight decay, warm-up of the table's rows, with equal effort; 12 sets, one seed; val only."""
    pear: dict[str, Any] = {**BASE, **OURS, "rank": 12, "ratio": 0.92}
    rows: tuple[tuple[str, dict[str, Any], str | None, tuple[tuple[float, float, float], ...]], ...] = (
        ("pear r=12, 0.92", pear, None,
         ((7e-3, 1, 0.1), (1e-2, 1, 0.3), (14e-3, 1, 0.3), (1e-2, 2, 0.3))),
        ("unpruned r=8", {**BASE, **OURS, "method": "adapters", "rank": 8}, None,
         ((1e-2, 1, 0.1), (5e-3, 1, 0.1), (1e-2, 1, 0.3), (1e-2, 2, 0.1))),
        ("LoRA qkv r=2", BASE, "lora-qkv:2",
         ((2e-2, 0.3, 0.1), (2e-2, 1, 0.3), (3e-2, 1, 0.3), (2e-2, 2, 0.1))),
        ("LoRA qkv r=8", BASE, "lora-qkv:8",
         ((2e-2, 1, 0.1), (1e-2, 1, 0.3), (1e-2, 0.3, 0.1), (1e-2, 2, 0.3))),
        *((f"unpruned r={r}", {**BASE, **OURS, "method": "adapters", "rank": r}, None, ((2e-2, 1, 0.1),))
          for r in (1, 2)),
        ("linear", {**BASE, "method": "linear", "epochs": 60}, None, ((1e-2, 0.1, 0.1), (1e-2, 1, 0.1))),
        ("pear r=8, 0.92", {**pear, "rank": 8}, None, ((1e-2, 1, 0.1), (14e-3, 1, 0.3))),
        ("LoRA qkv r=1", BASE, "lora-qkv:1", ((2e-2, 1, 0.1), (4e-2, 1, 0.1))),
        ("pear r=4, 0.92", {**pear, "rank": 4}, None, ((2e-2, 1, 0.1), (14e-3, 1, 0.1))),
    )  # fmt: skip
    for turn in range(4):
        for name, options, peer, triples in (row for row in rows if turn < len(row[3])):
            lr, weight_decay, warmup = triples[turn]
            told = {**options, "lr": lr, "weight_decay": weight_decay, "warmup": warmup}
            what = f"{name}, lr {lr:g}, weight_decay {weight_decay:g}, warmup {warmup:g}"
            for dataset in SETS:
                yield Plan("recipe", what, "deit96", dataset, 0, told, peer)


def peers() -> Iterator[Plan]:
    """Forms of other papers at about the default's bytes or fewer, some learning rates each; DeiT-tiny, four sets; val
    only. `shape` has other rates of VeRA and VB-LoRA."""
    usual = (5e-3, 1e-2, 2e-2)
    forms = {"adapter+:3": ("Adapter+, r=3", usual), "repadapter:2": ("RepAdapter, r=2", usual),
             "fact:10": ("FacT-TT, r=10", usual), "lora-xs:16": ("LoRA-XS, r=16", (2e-3, *usual)),
             "vera:64": ("VeRA qkv r=64", (0.2, 0.4)), "vblora:4": ("VB-LoRA r=4", (1e-2,))}  # fmt: skip
    for dataset in SWEEP_SETS:
        for peer, (name, rates) in forms.items():
            for lr in rates:
                yield Plan("peers", f"{name}, lr {lr:g}", "deit96", dataset, 0, {**BASE, "lr": lr}, peer)


def pixels() -> Iterator[Plan]:
    """224 pixels: three sets, one seed; test. Options as at 96 pixels, nothing tuned again."""
    for dataset in ("dtd10", "rsscn7", "mnist_location16"):
        for name in ("pear r=12, 0.92", "LoRA qkv r=2", "linear", "unpruned r=8"):
            options, peer = chosen_rows()[name]
            yield Plan("pixels", name, "deit224", dataset, 0, options, peer, True)


GROUP_EACH = ("dtd10", "rsscn7", "mnist", "mnist_count8")


@dataclass(frozen=True)
class Upon:
    """How tasks come one after another: from a bank of those before, or upon a base set trained for `base`."""

    bank: bool = False
    base: tuple[str, ...] = ()
    order: int | None = None

    @property
    def sets(self) -> list[str]:
        return list(SETS) if self.order is None else random.Random(self.order).sample(SETS, len(SETS))


UPON = {
    "base of 12 tasks": Upon(base=SETS),
    "base of 4 tasks": Upon(base=GROUP_EACH),
    **{f"bank, order {order}": Upon(bank=True, order=order) for order in range(3)},
}


def across(study: "Study", kept: Path, process: int, processes: int, dtype: str) -> None:
    """Tasks added one after another in three orders, each borrowing from the bank of those before it; and all tasks
    upon a base set, whose lowest four blocks they share. Tasks are kept in `kept`, from which a run goes on."""
    for number, (name, how) in enumerate(UPON.items()):
        plans = [replace(plan, options={**plan.options, "dtype": dtype}) for plan in plans_upon(name)]
        if number % processes != process or all(plan.key in study.done for plan in plans):
            continue
        base, folder = None, kept / name.replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        if how.base:
            path = folder / "base.safetensors"
            if not path.exists():
                configs = [study.config(plan) for member in how.base for plan in plans if plan.dataset == member]
                data = [open_dataset(str(study.shared / "data" / f"{member}.npz")) for member in how.base]
                train_base(configs, study.backbone("deit96"), data, path)
            base = read_checkpoint(path)
        upon(study, plans, folder / "store", base, how.bank)


def plans_upon(name: str) -> list[Plan]:
    how, (options, _) = UPON[name], chosen_rows()["pear r=12, 0.92"]
    return [Plan("across", name, "deit96", one, 0, options, None, True) for one in how.sets]


def upon(study: "Study", plans: list[Plan], kept: Path, base: Task | None, bank: bool) -> None:
    """Trains the tasks in order, each with what is there by then; rows say what each adds to a store."""
    sets = [plan.dataset for plan in plans]
    with Store.create(kept) as store:
        router = Router(study.backbone("deit96"), store)
        for number, plan in enumerate(plans, 1):
            before = [store.get(s) for s in sets[: number - 1]] if bank else []
            if plan.key in study.done:
                continue
            known = {t.digest for one in store.tasks() for t in store.get(one.task).tensors.values()}
            began = time.perf_counter()
            row = study.ours(plan, base, before)
            task = row.pop("task")
            fresh = {t.digest: t.size_bytes for t in task.tensors.values() if t.digest not in known}
            head = sum(fresh.get(t.digest, 0) for n, t in task.tensors.items() if n.startswith("head"))
            store.add(task)
            row |= {"number": number, "new_adapter_bytes": sum(fresh.values()) - head}
            if number == len(sets):
                row["compute_saved"] = compute_saved(router, sets)
            row["seconds"] = round(time.perf_counter() - began, 1)
            study.write(plan, row)
            click.echo(f"{plan.name} {number}/{len(sets)} {plan.dataset}: test {100 * row['test_top1']:.1f}")


def compute_saved(router: Router, tasks: list[str]) -> float:
    """The share of the blocks' work that run_all saves over a forward for each task, counted in rows that blocks give:
    one in which tasks part counts as not shared."""
    router.refresh()
    images = torch.zeros(1, 3, 96, 96)
    router.run_all(images, tasks[:1])
    module = router._adapted._module((96, 96))
    blocks = [part for name, part in module.named_modules() if name.rpartition(".")[0] == "blocks"]
    rows: list[int] = []
    hooks = [block.register_forward_hook(lambda _, __, given: rows.append(len(given))) for block in blocks]
    router.run_all(images, tasks)
    for hook in hooks:
        hook.remove()
    return 1 - sum(rows) / (len(blocks) * len(tasks))


STAGES: dict[str, Callable[[], Iterator[Plan]]] = {
    stage.__name__: stage
    for stage in (shape, knobs, decay, recipe, sharing, init, codes, few, rounded, peers, pixels, final, tuned, table)
}


@click.command(help=__doc__)
@click.argument("stage", type=click.Choice((*STAGES, "across")))
@click.option("--shared", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--seeds", default=1, show_default=True, help="Of the final table.")
@click.option("--dtype", type=click.Choice(("bfloat16", "float32")), default="bfloat16", show_default=True)
@click.option("--process", default=0, show_default=True, help="This process's number of --processes.")
@click.option("--processes", default=1, show_default=True, help="How many share the work, by data sets.")
def main(stage: str, shared: Path, results: Path, seeds: int, dtype: str, process: int, processes: int) -> None:
    global SEEDS
    SEEDS = seeds
    if stage == "across":
        across(Study(shared, results), Path("runs/across"), process, processes, dtype)
        return
    plans = [replace(plan, options={**plan.options, "dtype": dtype}) for plan in STAGES[stage]()]
    sets = list(dict.fromkeys(plan.dataset for plan in plans))
    Study(shared, results).do([plan for plan in plans if sets.index(plan.dataset) % processes == process])


SEEDS = 1

if __name__ == "__main__":
    main()
