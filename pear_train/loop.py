"""Training one task: adapters, pruning, sharing, the task checkpoint (docs/design.md, section 4)."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pear_store import RawTensor, Task, make_task, read_checkpoint, write_checkpoint
from pear_train.adapters import AdapterSet, TrainedBranch
from pear_train.config import TrainConfig
from pear_train.data import Dataset, Pixels
from pear_train.errors import DataError
from pear_train.importance import taylor_scores
from pear_train.knowledge import exact_copy, fold, lowbit_copy
from pear_train.prune import choose_pruned, choose_sources, matrix_similarity, output_similarity
from router import AdaptedBackbone, Backbone, Preprocess, Router, add_branch, choose_positions
from router.backbone import open_device
from router.ops import PositionWeights
from router.tensors import from_torch, quantise

EVAL_BATCH = 100
SCORE_BATCH = 50
"""Images of one Taylor term; fixed, because the mean of squares depends on it."""
SIMILARITY_IMAGES = 200


@dataclass(frozen=True)
class Step:
    """Progress, given to the callback after every batch; `val_top1` after the last batch of an epoch."""

    epoch: int
    batch: int
    batches: int
    loss: float
    train_top1: float
    val_top1: float | None


@dataclass(frozen=True)
class Result:
    """What a run gave. Bytes are of the tensors as written, each distinct one once; top-1 in 0..1, from the file."""

    task: str
    method: str
    val_top1: float
    test_top1: float | None
    trainable_params: int
    adapter_bytes: int
    knowledge_bytes: int
    head_bytes: int
    file_bytes: int
    epochs: int
    best_epoch: int
    seconds: float
    importance: dict[str, float]
    borrowed: dict[str, str]
    """Source position of each pruned position that borrows."""
    pruned: list[str]


def train(
    config: TrainConfig,
    backbone: Backbone,
    dataset: Dataset,
    out: Path,
    progress: Callable[[Step], None] | None = None,
) -> Result:
    """Trains one task and writes its checkpoint; evaluates from the written file, through the router.

    A fixed seed gives the same file on one machine. The epoch with the best val top-1 is kept (of those after the
    pruning, the later one of equals); test is looked at once, at the end.

    Raises:
        PearTrainError, RouterError, PearStoreError: options, data, backbone or disk do not allow it.
    """
    return _Run(config, backbone, dataset).train(out, progress)


def preprocess_record(backbone: Backbone, img_size: int | None) -> dict[str, Any]:
    """The whole image, resized to the input size (as VTAB does), normalised as the backbone was."""
    config = backbone.config
    height, width = (img_size, img_size) if img_size else backbone.input_size
    return {
        "input_size": [3, height, width],
        "mean": list(config.get("mean", (0.485, 0.456, 0.406))),
        "std": list(config.get("std", (0.229, 0.224, 0.225))),
        "interpolation": config.get("interpolation", "bicubic"),
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }


def fast_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes it faster than float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


class _Run:
    """One training run's state."""

    def __init__(self, config: TrainConfig, backbone: Backbone, dataset: Dataset) -> None:
        self.config, self.backbone, self.dataset = config, backbone, dataset
        self.device = open_device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        wanted = {"auto": fast_precision(self.device), "float32": torch.float32, "bfloat16": torch.bfloat16}
        self.autocast = None if wanted[config.dtype] == torch.float32 else wanted[config.dtype]
        self.record = preprocess_record(backbone, config.img_size)
        self.adapted = AdaptedBackbone(backbone, self.device, torch.float32, for_training=True)
        positions = [] if config.method == "linear" else choose_positions(backbone.module, config.positions)
        self.adapted.attach(positions)
        self.generator = torch.Generator().manual_seed(config.seed)
        widths = {position: self.adapted.widths[position] for position in positions}
        self.adapters = AdapterSet(widths, config.rank, config.activation, config.scale, self.generator).to(self.device)
        self.head = nn.Linear(self.adapted.feature_width, len(dataset.classes)).to(self.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        preprocess = Preprocess(self.record)
        self.train_pixels, self.val_pixels = Pixels(dataset.train, preprocess), Pixels(dataset.val, preprocess)
        self._frozen_features: dict[int, Tensor] = {}
        parameters = [*self.adapters.parameters(), *self.head.parameters()]
        self.optimiser = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
        self.importance: dict[str, float] = {}
        self.sources: dict[str, str] = {}
        self.pruned: list[str] = []

    def train(self, out: Path, progress: Callable[[Step], None] | None) -> Result:
        began = time.perf_counter()
        config = self.config
        count = len(self.train_pixels)
        batches = -(-count // config.batch_size)
        best, best_epoch, best_state = -1.0, 0, self._state()
        for epoch in range(1, config.epochs + 1):
            order = torch.randperm(count, generator=self.generator)
            seen, right, running = 0, 0, 0.0
            for batch in range(batches):
                rows = order[batch * config.batch_size : (batch + 1) * config.batch_size]
                self._set_lr((epoch - 1) * batches + batch, config.epochs * batches)
                logits = self._logits(self.train_pixels, rows)
                targets = self.train_pixels.targets[rows].to(self.device)
                loss = F.cross_entropy(logits, targets)
                self.optimiser.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                self.optimiser.step()
                seen += len(rows)
                right += int((logits.argmax(1) == targets).sum())
                running += float(loss.detach()) * len(rows)
                if progress is not None and batch < batches - 1:
                    progress(Step(epoch, batch + 1, batches, running / seen, right / seen, None))
            if not running < float("inf"):
                raise DataError(f"the loss became {running}: lower the learning rate, it is {config.lr}")
            val_top1 = self._accuracy(self.val_pixels)
            if progress is not None:
                progress(Step(epoch, batches, batches, running / seen, right / seen, val_top1))
            if config.method == "pear" and epoch == config.pruned_after:
                self._prune()
                best = -1.0
            if val_top1 >= best and not (config.method == "pear" and epoch <= config.pruned_after):
                best, best_epoch, best_state = val_top1, epoch, self._state()
        trainable = sum(p.numel() for group in self.optimiser.param_groups for p in group["params"])
        self._restore(best_state)
        return self._write(out, best_epoch, trainable, began)

    def _set_lr(self, step: int, steps: int) -> None:
        warmup = max(1, round(self.config.warmup * steps))
        if step < warmup:
            factor = (step + 1) / warmup
        else:
            factor = 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (step - warmup) / max(1, steps - warmup)))))
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.lr * factor

    def _logits(self, pixels: Pixels, rows: Tensor) -> Tensor:
        return self.head(self._features(pixels, rows))  # type: ignore[no-any-return]

    def _features(self, pixels: Pixels, rows: Tensor) -> Tensor:
        if self.adapters.branches:
            weights = self.adapters.position_weights()
            return self.adapted.features(pixels.images(rows), weights, self.autocast)
        if id(pixels) not in self._frozen_features:  # nothing changes them: once is enough
            with torch.no_grad():
                parts = [self.adapted.features(pixels.images(part), {}, self.autocast) for part in _batches(pixels)]
            self._frozen_features[id(pixels)] = torch.cat(parts)
        return self._frozen_features[id(pixels)][rows.to(self.device)]

    @torch.no_grad()
    def _accuracy(self, pixels: Pixels) -> float:
        right = 0
        for rows in _batches(pixels):
            predicted = self._logits(pixels, rows).argmax(1).cpu()
            right += int((predicted == pixels.targets[rows]).sum())
        return right / len(pixels)

    # ---- pruning and sharing ------------------------------------------------------------------

    def _prune(self) -> None:
        config, adapters = self.config, self.adapters
        widths = {position: self.adapted.widths[position] for position in adapters.own}
        self.importance = self._scores()
        self.pruned = choose_pruned(self.importance, widths, config.ratio)
        similarity = self._similarity() if config.sharing == "similar" else None
        self.sources = choose_sources(config.sharing, self.pruned, self.importance, widths, similarity)
        with torch.no_grad():
            scales = self._fold() if config.knowledge == "fold" else {}
            for position in self.pruned:
                adapters.branches[position] = self._pruned_branches(position, scales.get(position))
            for position, scale in scales.items():  # fold gives sources a scale of their own, too
                if position not in self.pruned:
                    adapters.branches[position] = [TrainedBranch(adapters.own[position], self._scale(scale))]
        changed = {p for s in self.sources.values() for p in adapters.matrices(adapters.own[s])}
        adapters.drop_unused()
        for parameter in list(self.optimiser.state):
            if parameter in changed:  # their role changed: the old moments say nothing of it
                del self.optimiser.state[parameter]
        group = self.optimiser.param_groups[0]
        group["params"] = [*adapters.parameters(), *self.head.parameters()]
        for parameter in set(self.optimiser.state) - set(group["params"]):
            del self.optimiser.state[parameter]
        if adapters.scales():
            self.optimiser.add_param_group({"params": adapters.scales(), "weight_decay": 0.0})

    def _scale(self, value: float) -> float | nn.Parameter:
        """A borrowed branch's scale, in the branch's own units."""
        if not self.config.train_borrowed_scale:
            return value
        return nn.Parameter(torch.tensor(value, device=self.device))

    def _pruned_branches(self, position: str, folded: float | None) -> list[TrainedBranch]:
        config, adapters = self.config, self.adapters
        branches = []
        if position in self.sources:
            start = config.borrowed_scale * config.scale if folded is None else folded
            branches.append(TrainedBranch(adapters.own[self.sources[position]], self._scale(start)))
        if config.knowledge in ("lowbit", "exact"):
            own = adapters.own[position]
            down, up = adapters.matrices(own)
            copy = (
                lowbit_copy(down, up, config.knowledge_bits) if config.knowledge == "lowbit" else exact_copy(down, up)
            )
            name = "k" + own.removeprefix("a")
            adapters.frozen[name] = type(copy)(copy.down.to(self.device), copy.up.to(self.device), copy.bits)
            branches.append(TrainedBranch(name, config.scale))
        return branches

    def _fold(self) -> dict[str, float]:
        """Folds pruned adapters into their sources; gives every position concerned its scale."""
        adapters, scales = self.adapters, {}
        for source in dict.fromkeys(self.sources.values()):
            group = [source, *(position for position, s in self.sources.items() if s == source)]
            down, up, fitted = fold([adapters.matrices(adapters.own[position]) for position in group])
            old_down, old_up = adapters.matrices(adapters.own[source])
            old_down.copy_(down)
            old_up.copy_(up)
            scales.update({p: self.config.scale * scale for p, scale in zip(group, fitted, strict=True)})
        return scales

    def _scores(self) -> dict[str, float]:
        """Importance of every position's adapter, in forward order."""
        own = self.adapters.own
        if self.config.importance == "random":
            return {position: float(torch.rand((), generator=self.generator)) for position in own}
        ups = {position: self.adapters.up[name] for position, name in own.items()}
        return taylor_scores(ups, self._losses())

    def _losses(self) -> Iterator[Callable[[], Tensor]]:
        """The loss of every batch of the train split, in order, float32."""
        for rows in _batches(self.train_pixels, SCORE_BATCH):

            def loss(rows: Tensor = rows) -> Tensor:
                images = self.train_pixels.images(rows)
                features = self.adapted.features(images, self.adapters.position_weights())
                return F.cross_entropy(self.head(features), self.train_pixels.targets[rows].to(self.device))

            yield loss

    @torch.no_grad()
    def _similarity(self) -> Callable[[str, str], float]:
        """similarity(pruned position, kept position): of matrices for identity, else of outputs on train images."""
        adapters = self.adapters
        pairs = {
            position: (adapters.down[name].detach(), adapters.up[name].detach())
            for position, name in adapters.own.items()
        }
        if self.config.activation == "identity":
            return lambda p, k: matrix_similarity(pairs[p], pairs[k])
        images = self.train_pixels.images(torch.arange(min(SIMILARITY_IMAGES, len(self.train_pixels))))
        inputs = self.adapted.inputs(images, adapters.position_weights(), self.pruned)

        def branch(at: str, of: str) -> Tensor:
            down, up = pairs[of]
            x = inputs[at]
            y = torch.zeros(*x.shape[:-1], up.shape[1], device=x.device, dtype=x.dtype)
            return add_branch(y, x, PositionWeights(down, up, self.config.activation))

        return lambda p, k: output_similarity(branch(p, p), branch(p, k))

    # ---- state and the file -------------------------------------------------------------------

    def _state(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self._tensors()]

    def _restore(self, state: list[Tensor]) -> None:
        with torch.no_grad():
            for tensor, value in zip(self._tensors(), state, strict=True):
                tensor.copy_(value)

    def _tensors(self) -> list[Tensor]:
        return [*self.adapters.parameters(), *self.adapters.scales(), *self.head.parameters()]

    def _write(self, out: Path, best_epoch: int, trainable: int, began: float) -> Result:
        task = self._task({})
        write_checkpoint(out, task)
        written = read_checkpoint(out)
        router = Router(self.backbone, device=self.device)
        router.add(written)
        val_top1 = _top1(router, written.name, self.val_pixels)
        metrics: dict[str, Any] = {"val_top1": val_top1}
        test_top1 = None
        if self.dataset.test is not None:
            test_top1 = _top1(router, written.name, Pixels(self.dataset.test, Preprocess(self.record)))
            metrics["test_top1"] = test_top1
        task = self._task(metrics)
        file_bytes = write_checkpoint(out, task)
        adapter_bytes, knowledge_bytes, head_bytes = stored_bytes(task)
        return Result(
            self.config.task, self.config.method, val_top1, test_top1, trainable, adapter_bytes, knowledge_bytes,
            head_bytes, file_bytes, self.config.epochs, best_epoch, round(time.perf_counter() - began, 2),
            self.importance, self.sources, sorted(self.pruned, key=list(self.adapters.own).index),
        )  # fmt: skip

    def _task(self, metrics: dict[str, Any]) -> Task:
        """The task as it stands, tensors in the dtype to be written."""
        config, adapters = self.config, self.adapters
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[config.tensor_dtype]
        tensors: dict[str, RawTensor] = {}
        entries: dict[str, Any] = {}
        for name in adapters.used():
            down, up = adapters.matrices(name)
            entry: dict[str, Any] = {"down": f"{name}.down", "up": f"{name}.up"}
            frozen = adapters.frozen.get(name)
            if frozen is not None:
                entry["role"] = "knowledge"
            if frozen is not None and frozen.bits is not None:
                entry["quant"] = {"bits": frozen.bits}
                for side, matrix, rank_axis in (("down", down, 1), ("up", up, 0)):
                    packed, scale = quantise(matrix, frozen.bits, rank_axis)
                    tensors[f"{name}.{side}"] = from_torch(packed)
                    tensors[f"{name}.{side}.scale"] = from_torch(scale)
                    entry["quant"][side] = {"shape": list(matrix.shape), "scale": f"{name}.{side}.scale"}
            else:
                kept = torch.float16 if frozen is not None else dtype
                tensors[f"{name}.down"], tensors[f"{name}.up"] = from_torch(down.to(kept)), from_torch(up.to(kept))
            entries[name] = entry
        tensors["head.weight"] = from_torch(self.head.weight.to(dtype))
        tensors["head.bias"] = from_torch(self.head.bias.to(dtype))
        training: dict[str, Any] = {
            **{key: value for key, value in asdict(config).items() if key not in ("task", "device")},
            "data": self.dataset.description.partition(": ")[2],
            "importance": self.importance,
            "pruned": sorted(self.pruned, key=list(adapters.own).index),
            "borrowed": self.sources,
        }
        record = {
            "format": "pear-task/1",
            "task": config.task,
            "backbone": {"model": self.backbone.name, "digest": self.backbone.digest},
            "activation": config.activation,
            "adapters": entries,
            "positions": {
                position: [[branch.adapter, float(torch.as_tensor(branch.scale).detach())] for branch in branches]
                for position, branches in adapters.branches.items()
                if branches
            },
            "head": {"weight": "head.weight", "bias": "head.bias"},
            "labels": list(self.dataset.classes),
            "preprocess": self.record,
            "metrics": metrics,
            "training": training,
        }
        return make_task(record, tensors, config.task)


def stored_bytes(task: Task) -> tuple[int, int, int]:
    """(adapter, knowledge, head) tensor bytes of a task, each distinct tensor once."""
    counted: dict[str, tuple[str, int]] = {}

    def count(kind: str, name: str) -> None:
        tensor = task.tensors[name]
        counted.setdefault(tensor.digest, (kind, tensor.size_bytes))

    for entry in task.record["adapters"].values():
        kind = "knowledge" if entry.get("role") == "knowledge" else "adapter"
        for side in ("down", "up"):
            count(kind, entry[side])
            if "quant" in entry:
                count(kind, entry["quant"][side]["scale"])
    if task.record["head"] is not None:
        for side in ("weight", "bias"):
            count("head", task.record["head"][side])
    adapter, knowledge, head = (
        sum(size for kind, size in counted.values() if kind == wanted) for wanted in ("adapter", "knowledge", "head")
    )
    return adapter, knowledge, head


def _top1(router: Router, task: str, pixels: Pixels) -> float:
    right = 0
    for rows in _batches(pixels):
        logits = router.run(pixels.images(rows), task).logits
        assert isinstance(logits, Tensor)
        right += int((logits.argmax(1) == pixels.targets[rows]).sum())
    return right / len(pixels)


def _batches(pixels: Pixels, size: int = EVAL_BATCH) -> list[Tensor]:
    """Row numbers of a split in order, `size` at a time."""
    return [torch.arange(start, min(start + size, len(pixels))) for start in range(0, len(pixels), size)]
