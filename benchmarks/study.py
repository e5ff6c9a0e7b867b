#!/usr/bin/env python3
"""The study behind pear-train's defaults, its peers and its controls, on 12 real data sets.

Each run is one row of benchmarks/results/study.jsonl; what is there is not repeated, so the script may be stopped
and started at will. Sweeps look at val only, with the weights of the last epoch; test is looked at in the
stage `final` alone. Runs that differ only in what happens after pruning share the epochs before it,
which are the same to the bit. benchmarks/study_report.py makes the tables and plots.

    python benchmarks/study.py sweep --shared ../shared
    python benchmarks/study.py final --shared ../shared --seeds 1
"""

import copy
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pear_train import Dataset, TrainConfig, open_dataset
from pear_train.data import Pixels
from pear_train.loop import _Trainer
from pear_train.record import stored_bytes, to_task
from pear_train.run import TaskRun, in_batches, preprocess_record
from router import Backbone, Preprocess, Router, load_backbone

RESULTS = Path(__file__).parent / "results" / "study.jsonl"
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
           "train_borrowed_scale")  # fmt: skip
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
        return json.dumps([self.stage, self.name, self.backbone, self.dataset, self.seed, self.options, self.peer])

    @property
    def before_pruning(self) -> str:
        """What the epochs before pruning depend on."""
        told = {name: value for name, value in self.options.items() if name not in (*PRUNING, "method")}
        return json.dumps(
            [self.backbone, self.dataset, self.seed, told, self.peer, self.options.get("method") == "linear"]
        )


class StudyRun(TaskRun):
    """A run that looks at val once, at the last epoch."""

    def accuracy(self, pixels: Pixels) -> float:
        return super().accuracy(pixels) if self.epoch == self.config.epochs else 0.0

    def fork(self, config: TrainConfig) -> "StudyRun":
        """A copy that goes on with other options."""
        shared = (self.adapted, self.train_pixels, self.val_pixels, self.dataset, self.bank)
        memo: dict[int, Any] = {id(one): one for one in shared}
        for generator in (self.generator, self.dropping):
            memo[id(generator)] = generator.clone_state()
        made = copy.deepcopy(self, memo)
        made.config = config
        made.optimiser.param_groups[1]["factor"] = config.scale_lr
        return made


class Study:
    def __init__(self, shared: Path, results: Path) -> None:
        self.shared, self.results = shared, results
        self.done = (
            {json.loads(line)["key"] for line in results.read_text().splitlines()} if results.exists() else set()
        )
        self._backbones: dict[str, Backbone] = {}
        self._kept: tuple[str, StudyRun] | None = None
        self._trainers: dict[str, _Trainer] = {}
        self._data: tuple[str, Dataset] | None = None

    def backbone(self, name: str) -> Backbone:
        if name not in self._backbones:
            model = {"tiny": "pear_tiny", "deit": "deit_tiny_patch16_224"}[name.rstrip("0123456789")]
            weights = None if model == "pear_tiny" else self.shared / "weights" / f"{model}.safetensors"
            self._backbones[name] = load_backbone(model, weights)
        return self._backbones[name]

    def data(self, name: str) -> Dataset:
        if self._data is None or self._data[0] != name:
            self._data = (name, open_dataset(str(self.shared / "data" / f"{name}.npz")))
        return self._data[1]

    def config(self, plan: Plan) -> TrainConfig:
        pixels = plan.backbone.lstrip("abcdefghijklmnopqrstuvwxyz")
        common = {
            "task": plan.dataset,
            "select": "last",
            "seed": plan.seed,
            "img_size": int(pixels) if pixels else None,
        }
        return TrainConfig(**{**common, **plan.options})

    def do(self, plans: list[Plan]) -> None:
        """Does what is not done yet, runs with common first epochs one after another."""
        todo = [plan for plan in plans if plan.key not in self.done]
        order = {before: i for i, before in reversed(list(enumerate(plan.before_pruning for plan in todo)))}
        for number, plan in enumerate(sorted(todo, key=lambda plan: order[plan.before_pruning])):
            began = time.perf_counter()
            row = self.peer(plan) if plan.peer else self.ours(plan)
            row["seconds"] = round(time.perf_counter() - began, 1)
            self.write(plan, row)
            shown = f"{100 * row['val_top1']:.1f}" + (f" test {100 * row['test_top1']:.1f}" if plan.test else "")
            click.echo(
                f"{number + 1}/{len(todo)} {plan.stage} {plan.backbone} {plan.dataset} {plan.seed} {plan.name}: {shown}"
            )

    def write(self, plan: Plan, row: dict[str, Any]) -> None:
        versions = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, timm {timm.__version__}"
        record = {**asdict(plan), "key": plan.key, **row, "machine": versions}
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with open(self.results, "a") as file:
            file.write(json.dumps(record) + "\n")
        self.done.add(plan.key)

    # ---- ours ---------------------------------------------------------------------------------

    def ours(self, plan: Plan, base: Any = None, bank: Any = ()) -> dict[str, Any]:
        config, backbone = self.config(plan), self.backbone(plan.backbone)
        run = self.trained(plan, config, base, bank)
        task = to_task(run, {})
        adapter, knowledge, head = stored_bytes(task)
        logits = self.logits(run, run.val_pixels)
        row = {
            "val_top1": top1(logits, run.val_pixels.targets),
            "val_loss": float(F.cross_entropy(logits, run.val_pixels.targets)),
            "train_loss": run.history[-1]["loss"],
            "adapter_bytes": adapter, "knowledge_bytes": knowledge, "head_bytes": head,
            "pruned": run.pruned, "importance": run.importance, "borrowed": run.sources,
            "scales": [round(float(s), 4) for s in run.adapters.scales().values()],
        }  # fmt: skip
        if plan.test:
            router = Router(backbone, device=run.device)
            router.add(task)
            assert run.dataset.test is not None
            pixels = Pixels(run.dataset.test, Preprocess(run.record))
            found = torch.cat([router.run(pixels.images(rows), plan.dataset).logits for rows in in_batches(pixels)])
            row |= {"test_top1": top1(found, pixels.targets), "right": bits(found, pixels.targets)}
        return row

    def trained(self, plan: Plan, config: TrainConfig, base: Any = None, bank: Any = ()) -> StudyRun:
        """A run at its end, from the epochs before pruning if another had the same."""
        key = plan.before_pruning + repr((base, [t.name for t in bank]))
        trainer = self._trainers.setdefault(plan.backbone, _Trainer(self.backbone(plan.backbone), config))
        if self._kept is None or self._kept[0] != key or config.method == "linear":
            run = StudyRun(config, trainer.adapted, self.data(plan.dataset), base, bank)
            stop = (
                config.epochs if config.method == "linear" else TrainConfig(task="x", epochs=config.epochs).pruned_after
            )
            self._steps(trainer, run, (config.prune_epoch or stop) * run.batches - 1)
            self._kept = (key, run)
        run = self._kept[1].fork(config)
        self._steps(trainer, run, config.epochs * run.batches)
        return run

    def _steps(self, trainer: _Trainer, run: StudyRun, until: int) -> None:
        """Steps up to number `until` of the run; the step before pruning is the last that can be shared."""
        while (run.epoch - 1) * run.batches + run.batch < until and not run.finished:
            trainer.step([(run, trainer.batch(run))])
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
        kwargs = {"img_size": config.img_size} if config.img_size else {}
        model = timm.create_model(self.backbone(plan.backbone).name, num_classes=0, **kwargs)
        state = self.backbone(plan.backbone).sized(tuple(record["input_size"][1:])).state_dict()  # type: ignore[arg-type]
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
        for epoch in range(config.epochs):
            order = torch.randperm(len(train), generator=generator)
            total = 0.0
            for batch in range(batches):
                rows = order[batch * config.batch_size : (batch + 1) * config.batch_size]
                step = epoch * batches + batch
                cosine = 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (step - warmup) / max(1, steps - warmup)))))
                for group in optimiser.param_groups:
                    group["lr"] = config.lr * ((step + 1) / warmup if step < warmup else cosine)
                loss = F.cross_entropy(head(body(train.images(rows))), train.targets[rows])
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                total += float(loss.detach()) * len(rows)

        @torch.no_grad()
        def logits(pixels: Pixels) -> Tensor:
            return torch.cat([head(body(pixels.images(rows))) for rows in in_batches(pixels)])

        found = logits(val)
        row = {
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


def adapt(model: nn.Module, peer: str) -> tuple[nn.Module, int]:
    """A model with what the peer trains, and how many numbers it has to keep for a task."""
    if peer == "full":
        return model, sum(p.numel() for p in model.parameters())
    import peft

    kind, *numbers = peer.split(":")
    linears = ["qkv"] if kind.endswith("-qkv") or kind == "vera" else ["qkv", "proj", "fc1", "fc2"]
    rank = int(numbers[0])
    targets = r"blocks\.\d+\..*(" + "|".join(linears) + ")"
    config: Any
    if kind.startswith("lora"):
        config = peft.LoraConfig(
            r=rank, lora_alpha=int(numbers[1]) if len(numbers) > 1 else rank, target_modules=targets
        )
    elif kind == "vera":
        config = peft.VeraConfig(r=rank, target_modules=targets, save_projection=False)
    elif kind.startswith("vblora"):
        config = peft.VBLoRAConfig(r=rank, target_modules=targets, num_vectors=90, vector_length=64)
    else:
        raise click.ClickException(f"unknown peer {peer!r}")
    made = peft.get_peft_model(model, config)
    count = sum(p.numel() for p in made.parameters() if p.requires_grad)
    return made, count


def top1(logits: Tensor, targets: Tensor) -> float:
    return float((logits.argmax(1) == targets).float().mean())


def bits(logits: Tensor, targets: Tensor) -> str:
    """Which images were right, packed, for bootstraps over images."""
    right = (logits.argmax(1) == targets).to(torch.uint8).tolist()
    return f"{len(right)}:{int(''.join(map(str, right)), 2):x}"


# ---- plans ------------------------------------------------------------------------------------


def sweep() -> Iterator[Plan]:
    """Learning rates on pear_tiny, four sets (one a group, and one more), one seed, 10 epochs; val only."""
    for lr in (5e-3, 1e-2):
        for name, options in (
            ("unpruned", {"method": "adapters"}),
            ("pear 0.5", {"ratio": 0.5}),
            ("pear 0.75", {"ratio": 0.75}),
        ):
            for dataset in SWEEP_SETS:
                yield Plan("sweep", f"{name}, lr {lr:g}", "tiny", dataset, 0, {"epochs": 10, "lr": lr, **options})
    for lr in (1e-2, 2e-2):
        for name, options, peer in (("LoRA qkv r=2", {}, "lora-qkv:2"), ("unpruned r=2", {"method": "adapters"}, None)):
            for dataset in SWEEP_SETS:
                options = options if peer else {"method": "adapters", "rank": 2}
                yield Plan("sweep", f"{name}, lr {lr:g}", "tiny", dataset, 0, {"epochs": 10, "lr": lr, **options}, peer)


FINAL: dict[str, Any] = {"epochs": 8}
LR = {"ours": 5e-3, "r=2": 1e-2, "lora 2": 2e-2, "lora 8": 1e-2, "qkv": 1e-2}
"""Each the better of two on val in the sweep; those of rank 8 at qkv were not swept: half of LoRA's at rank 2."""


def final() -> Iterator[Plan]:
    """The table: 12 sets, DeiT-tiny at 96 pixels; test, once."""
    ours = {
        "unpruned r=8": {"method": "adapters"},
        "pear 0.5": {},
        "pear 0.75": {"ratio": 0.75},
        "pear 0.75, no sharing": {"ratio": 0.75, "sharing": "none", "knowledge": "none"},
        "linear": {"method": "linear", "epochs": 60, "lr": 1e-2},
        "pear 0.5, qkv": {"positions": "qkv", "lr": LR["qkv"]},
        "pear 0.75, qkv": {"positions": "qkv", "lr": LR["qkv"], "ratio": 0.75},
    }
    controls = {
        "pear 0.75, random importance": {"ratio": 0.75, "importance": "random"},
        "unpruned r=2": {"method": "adapters", "rank": 2, "lr": LR["r=2"]},
    }

    def plan(name: str, dataset: str, seed: int, options: dict[str, Any], peer: str | None = None) -> Plan:
        return Plan("final", name, "deit96", dataset, seed, {**FINAL, "lr": LR["ours"], **options}, peer, True)

    for seed in range(SEEDS):
        for dataset in SETS:
            for rank in (2, 8):
                yield plan(f"LoRA qkv r={rank}", dataset, seed, {"lr": LR[f"lora {rank}"]}, f"lora-qkv:{rank}")
            for name, options in ours.items():
                yield plan(name, dataset, seed, options)
    for seed in range(SEEDS):
        for dataset in SETS:
            for name, options in controls.items():
                yield plan(name, dataset, seed, options)


def sharing() -> Iterator[Plan]:
    """What a pruned position may have: pear_tiny, four sets, one seed, ratio 0.75; val only."""
    base = {"epochs": 10, "lr": 5e-3, "ratio": 0.75}
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
            yield Plan("sharing", name, "tiny", dataset, 0, {**base, **options})


STAGES: dict[str, Callable[[], Iterator[Plan]]] = {"sweep": sweep, "sharing": sharing, "final": final}


@click.command(help=__doc__)
@click.argument("stage", type=click.Choice(tuple(STAGES)))
@click.option("--shared", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--seeds", default=1, show_default=True, help="Of the final table.")
def main(stage: str, shared: Path, results: Path, seeds: int) -> None:
    global SEEDS
    SEEDS = seeds
    Study(shared, results).do(list(STAGES[stage]()))


SEEDS = 1

if __name__ == "__main__":
    main()
