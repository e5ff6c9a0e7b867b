"""One task in training: its adapters, head, optimiser and schedule, and the pruning (docs/design.md, section 4)."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pear_store import Task
from pear_store.format.manifest import manifest_hash, to_manifest
from pear_train.adapters import AdapterSet, TrainedBranch
from pear_train.bank import Bank, base_adapters
from pear_train.config import CODE_BITS, DTYPES, TrainConfig
from pear_train.data import Dataset, Pixels, augment, read_pictures
from pear_train.errors import ConfigError, DivergedError
from pear_train.finished import Identity, identity
from pear_train.importance import gradient_scores, magnitude_scores
from pear_train.knowledge import exact_copy, fold, fold_cores, lowbit_copy
from pear_train.prune import choose_pruned, choose_sources, matrix_similarity, output_similarity
from router import AdaptedBackbone, Backbone, BackboneError, PositionWeights, Preprocess, add_branch, choose_positions
from router.pictures import READING
from router.precision import fast_precision

EVAL_BATCH = 100
SCORE_BATCH = 50
"""Images of one Taylor term; fixed, because the mean of squares depends on it."""
SIMILARITY_IMAGES = 200


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
        "reading": READING,
    }


def run_identity(config: TrainConfig, backbone: Backbone, dataset: Dataset, given: str | None) -> Identity:
    """What a run to come depends on. Reads the data."""
    preprocess = preprocess_record(backbone, config.img_size)
    return identity(config, backbone.digest, preprocess, dataset.fingerprint, given)


class TaskRun:
    """What training one task takes, a batch at a time; who calls computes the features (pear_train/loop.py).

    Args:
        adapted: the backbone on its device; may be shared by several runs.
        base: a task whose adapters the lowest `config.base_blocks` blocks use frozen, and the others start from.
        bank: stored tasks whose adapters pruned positions may borrow.
    """

    def __init__(
        self,
        config: TrainConfig,
        adapted: AdaptedBackbone,
        dataset: Dataset,
        base: Task | None = None,
        bank: Sequence[Task] = (),
    ) -> None:
        self.config, self.adapted = config, adapted
        self.record = preprocess_record(adapted.backbone, config.img_size)
        self.device = adapted.device
        self.precision = config.dtype
        if config.dtype == "auto":
            self.precision = str(fast_precision(self.device)).removeprefix("torch.")
        """Of the forward, float32 or bfloat16; a run that goes on keeps it, whatever is fast where it does."""
        self.machines = [machine(self.device)]
        """Where the run went on, in order: with one, the same options and seed give the same bytes there."""
        self.generator = torch.Generator().manual_seed(config.seed)
        self.dropping = torch.Generator().manual_seed(config.seed)
        self.given = given_digest(base, bank)
        self.identity = run_identity(config, adapted.backbone, dataset, self.given)
        self.adapters = self._make_adapters(base).to(self.device)
        self.bank = Bank(bank, adapted, config.activation, cores=config.borrow == "core")
        self.head = nn.Linear(adapted.feature_width, len(dataset.classes)).to(self.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.dataset, self.pixels = read_pictures(dataset, Preprocess(self.record, dataset.limits))
        self.train_pixels, self.val_pixels = self.pixels["train"], self.pixels["val"]
        self.batches = -(-len(self.train_pixels) // config.batch_size)
        """Steps of an epoch."""
        self._frozen_features: dict[int, Tensor] = {}
        matrices = [*self.adapters.trained().values(), *self.head.parameters()]
        self.optimiser = torch.optim.AdamW(matrices, lr=config.lr, weight_decay=config.weight_decay)
        self.optimiser.param_groups.append({**self.optimiser.param_groups[0], "params": [], "weight_decay": 0.0})
        self.optimiser.param_groups[1]["factor"] = config.scale_lr
        self.importance: dict[str, float] = {}
        self.sources: dict[str, str] = {}
        self.banked: dict[str, list[str]] = {}
        """The stored adapters that each pruned position borrows: names as `bank` gives them."""
        self.pruned: list[str] = []
        self.recall: dict[str, list[float | None]] = {}
        """For each split that was evaluated at the end, the recall of each class."""
        self.history: list[dict[str, float]] = []
        """For each epoch: loss and top-1 on train while it went on, top-1 on val at its end."""
        self.epoch, self.batch, self.order = 1, 0, torch.empty(0, dtype=torch.long)
        self.best, self.best_epoch, self.best_state = -1.0, 0, self.state()
        self.finished = False
        self._sums = [0.0, 0, 0]

    def _make_adapters(self, base: Task | None) -> AdapterSet:
        config, adapted = self.config, self.adapted
        positions = [] if config.method == "linear" else attached(adapted, config.positions)
        common, bits = config.down == "common", CODE_BITS.get(config.tensor_dtype)
        given = None if base is None else base_adapters(base, adapted, positions, config)
        trained = [p for p in positions if given is None or p not in given.frozen]
        if positions and not trained:
            raise ConfigError(f"positions {config.positions!r}: all lie in blocks that take the base set frozen")
        widths = {position: adapted.widths[position] for position in trained}
        made = AdapterSet(widths, config.rank, config.activation, config.scale, self.generator, common, bits)
        if given is not None:
            with torch.no_grad():
                for position, (down, up) in given.start.items():
                    made.down[made.own[position]].copy_(down)
                    made.up[made.own[position]].copy_(up / config.scale)
            made.frozen.update({name: adapter.to(self.device) for name, adapter in given.adapters.items()})
            own = made.branches
            made.branches = {}
            for position in positions:  # in forward order
                frozen = given.frozen.get(position)
                made.branches[position] = (
                    own[position] if frozen is None else [TrainedBranch(one.adapter, one.scale) for one in frozen]
                )
        return made

    # ---- steps --------------------------------------------------------------------------------

    @property
    def pears(self) -> bool:
        return self.config.method == "pear"

    def next_rows(self) -> Tensor:
        """Row numbers of the batch to come."""
        if self.batch == 0:
            self.order = torch.randperm(len(self.train_pixels), generator=self.generator)
            self._sums = [0.0, 0, 0]
        return self.order[self.batch * self.config.batch_size : (self.batch + 1) * self.config.batch_size]

    def images(self, rows: Tensor) -> Tensor:
        """Normalised float32 [batch, 3, h, w] of train, augmented."""
        return augment(self.train_pixels.images(rows), self.config.augment, self.generator)

    def step_weights(self) -> dict[str, PositionWeights]:
        """What positions add in a training step: some are left out where the configuration says so."""
        weights = self.adapters.position_weights()
        drop = self.config.drop_branch
        if not drop:
            return weights
        kept = {}
        for position, one in weights.items():
            if float(torch.rand((), generator=self.dropping)) >= drop:
                kept[position] = PositionWeights(one.down, one.up / (1 - drop), one.activation)
        return kept

    def loss(self, features: Tensor, rows: Tensor) -> Tensor:
        """The batch's mean loss, counted into the epoch's."""
        logits, targets = self.head(features), self.train_pixels.targets[rows].to(self.device)
        loss = F.cross_entropy(logits, targets)
        self._sums[0] += float(loss.detach()) * len(rows)
        self._sums[1] += int((logits.detach().argmax(1) == targets).sum())
        self._sums[2] += len(rows)
        return loss

    def before_step(self) -> None:
        """Sets the learning rate of this step and clears gradients."""
        step, steps = (self.epoch - 1) * self.batches + self.batch, self.config.epochs * self.batches
        warmup = max(1, round(self.config.warmup * steps))
        if step < warmup:
            factor = (step + 1) / warmup
        else:
            factor = 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (step - warmup) / max(1, steps - warmup)))))
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.lr * factor * group.get("factor", 1.0)
        self.optimiser.zero_grad(set_to_none=True)

    def after_step(self) -> bool:
        """Moves the weights; at an epoch's end evaluates, prunes, keeps the best. Returns whether an epoch ended.

        Raises:
            DivergedError: the loss, a weight or a logit is no finite number any more.
        """
        if not math.isfinite(self.running_loss):
            raise self._diverged(f"the loss became {self.running_loss} in epoch {self.epoch}")
        self.move()
        self.batch += 1
        if self.batch < self.batches:
            return False
        self.check_finite()
        val_top1 = self.accuracy(self.val_pixels)
        self.history.append({"loss": self.running_loss, "train_top1": self.train_top1, "val_top1": val_top1})
        before_pruning = self.pears and self.epoch <= self.config.pruned_after
        if self.pears and self.epoch == self.config.pruned_after:
            self.prune()
        if not before_pruning and val_top1 >= self.best:
            self.best, self.best_epoch, self.best_state = val_top1, self.epoch, self.state()
        patience = self.config.patience
        stalled = patience is not None and not before_pruning and self._stalled() >= patience
        self.finished = self.epoch == self.config.epochs or stalled
        self.epoch, self.batch = self.epoch + 1, 0
        return True

    def move(self) -> None:
        """A step of the optimiser along the gradients, which are clipped."""
        trained = [parameter for group in self.optimiser.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(trained, self.config.max_grad_norm)
        self.optimiser.step()

    def check_finite(self) -> None:
        """Raises a DivergedError unless all that trains is finite, also in the precision that it is written in."""
        for name, tensor in self.tensors().items():
            dtype = self.config.head_dtype if name.startswith("head.") else self.config.tensor_dtype
            if name.startswith("scale."):
                dtype = "F32"
            written = tensor.detach().to(DTYPES.get(dtype, torch.float16))  # codes have scales in float16
            if not bool(torch.isfinite(written).all()):
                raise self._diverged(f"after epoch {self.epoch}, {name} is not finite as {dtype}")

    def _diverged(self, found: str) -> DivergedError:
        return DivergedError(self.config.task, found, self.config.lr)

    def _stalled(self) -> int:
        """Epochs since val got better than it had ever been (after pruning)."""
        first = self.config.pruned_after if self.pears else 0
        values = [one["val_top1"] for one in self.history[first:]]
        return len(values) - 1 - values.index(max(values))

    @property
    def running_loss(self) -> float:
        return self._sums[0] / max(1, self._sums[2])

    @property
    def train_top1(self) -> float:
        return self._sums[1] / max(1, self._sums[2])

    @torch.no_grad()
    def accuracy(self, pixels: Pixels) -> float:
        """Top-1 of the weights as they are.

        Raises:
            DivergedError: a logit is not finite, so that the likeliest class means nothing.
        """
        right = 0
        for rows in in_batches(pixels):
            logits = self.head(self.features(pixels, rows))
            if not bool(torch.isfinite(logits).all()):
                raise self._diverged(f"after epoch {self.epoch}, logits on val are not finite")
            right += int((logits.argmax(1).cpu() == pixels.targets[rows]).sum())
        return right / len(pixels)

    def features(self, pixels: Pixels, rows: Tensor) -> Tensor:
        """Pooled features of this task alone, as evaluation computes them; without adapters computed but once."""
        if self.adapters.branches:
            weights = self.adapters.position_weights()
            return self.adapted.features(pixels.images(rows), weights, self.autocast)
        if id(pixels) not in self._frozen_features:
            with torch.no_grad():
                parts = [self.adapted.features(pixels.images(part), {}, self.autocast) for part in in_batches(pixels)]
            self._frozen_features[id(pixels)] = torch.cat(parts)
        return self._frozen_features[id(pixels)][rows.to(self.device)]

    @property
    def autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.precision == "bfloat16" else None

    # ---- pruning and sharing ------------------------------------------------------------------

    def prune(self) -> None:
        """Scores, prunes, shares, preserves; moments of what changed roles are forgotten."""
        config, adapters = self.config, self.adapters
        widths = {position: self.adapted.widths[position] for position in adapters.own}
        self.importance = self._scores()
        if odd := [position for position, score in self.importance.items() if not math.isfinite(score)]:
            raise self._diverged(f"after epoch {self.epoch}, the importance of {odd[0]} is {self.importance[odd[0]]}")
        self.pruned = choose_pruned(self.importance, widths, config.ratio)
        similarity = self._similarity() if config.sharing == "similar" else None
        self.sources = choose_sources(config.sharing, self.pruned, self.importance, widths, similarity)
        if self.bank:
            self.banked = self.bank.choose(self.pruned, adapters, self._losses, config.bank_share)
        with torch.no_grad():
            folded = self._fold() if config.knowledge == "fold" else {}
            for position in self.pruned:
                adapters.branches[position] = self._pruned_branches(position, folded.get(position))
            for position, branch in folded.items():  # a fold changes what sources use, too
                if position not in self.pruned:
                    adapters.branches[position] = [branch]
        changed = {p for s in self.sources.values() for p in adapters.matrices(adapters.own[s])}
        adapters.drop_unused()
        self.tell_optimiser(changed)

    def tell_optimiser(self, changed: set[Tensor] | frozenset[Tensor] = frozenset()) -> None:
        """Gives the optimiser what trains now; forgets moments of what does not, or changed its role."""
        matrices, scales = self.optimiser.param_groups
        trained, cores = self.adapters.trained(), self.adapters.cores()
        matrices["params"] = [*trained.values(), *cores.values(), *self.head.parameters()]
        scales["params"] = list(self.adapters.scales().values())
        training = {*matrices["params"], *scales["params"]}
        for parameter in list(self.optimiser.state):
            if parameter in changed or parameter not in training:
                del self.optimiser.state[parameter]

    def _scale(self, value: float) -> float | nn.Parameter:
        """A borrowed branch's scale, in the branch's own units."""
        if not self.config.train_borrowed_scale:
            return value
        return nn.Parameter(torch.tensor(float(value), device=self.device))

    def _borrowed(self, adapter: str) -> TrainedBranch:
        """A branch that borrows, before it has learnt anything."""
        config = self.config
        if config.borrow == "scale":
            return TrainedBranch(adapter, self._scale(config.borrowed_scale * config.scale))
        down, up = self.adapters.matrices(adapter)
        core = config.borrowed_scale * torch.eye(down.shape[1], up.shape[0], device=self.device)
        return TrainedBranch(adapter, config.scale, nn.Parameter(core))

    def _pruned_branches(self, position: str, folded: TrainedBranch | None) -> list[TrainedBranch]:
        config, adapters = self.config, self.adapters
        branches = []
        for name in self.banked.get(position, []):
            adapters.frozen[name] = self.bank.adapters[name].to(self.device)
            branches.append(self._borrowed(name))
        if position in self.sources:
            branches.append(self._borrowed(adapters.own[self.sources[position]]) if folded is None else folded)
        if config.knowledge in ("lowbit", "exact"):
            own = adapters.own[position]
            down, up = adapters.matrices(own)
            copy = (
                lowbit_copy(down, up, config.knowledge_bits) if config.knowledge == "lowbit" else exact_copy(down, up)
            )
            name = "k" + own.removeprefix("a")
            adapters.frozen[name] = copy.to(self.device)
            branches.append(TrainedBranch(name, config.scale))
        return branches

    def _fold(self) -> dict[str, TrainedBranch]:
        """Folds pruned adapters into their sources; what every position concerned uses from now on."""
        config, adapters = self.config, self.adapters
        branches: dict[str, TrainedBranch] = {}
        for source in dict.fromkeys(self.sources.values()):
            group = [source, *(position for position, s in self.sources.items() if s == source)]
            pairs = [adapters.matrices(adapters.own[position]) for position in group]
            name = adapters.own[source]
            old_down, old_up = adapters.matrices(name)
            if config.borrow == "core":
                down, up, cores = fold_cores(pairs)
                made = [TrainedBranch(name, config.scale, nn.Parameter(core)) for core in cores]
            else:
                down, up, scales = fold(pairs)
                made = [TrainedBranch(name, self._scale(config.scale * scale)) for scale in scales]
            old_down.copy_(down)
            old_up.copy_(up)
            branches.update(zip(group, made, strict=True))
        return branches

    def _scores(self) -> dict[str, float]:
        """Importance of every position's own adapter, in forward order."""
        own, kind = self.adapters.own, self.config.importance
        if kind == "random":
            return {position: float(torch.rand((), generator=self.generator)) for position in own}
        if kind == "magnitude":
            with torch.no_grad():
                return magnitude_scores({position: self.adapters.matrices(name) for position, name in own.items()})
        ups = {position: self.adapters.up[name] for position, name in own.items()}
        return gradient_scores(kind, ups, self._losses())

    def _losses(self) -> Iterator[Callable[[], Tensor]]:
        """The loss of every batch of the train split, in order, float32."""
        for rows in in_batches(self.train_pixels, SCORE_BATCH):

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

    # ---- state --------------------------------------------------------------------------------

    def tensors(self) -> dict[str, nn.Parameter]:
        """Everything that trains, by name."""
        named = dict(self.adapters.named_parameters())
        named.update({f"scale.{name}": scale for name, scale in self.adapters.scales().items()})
        named.update({f"core.{name}": core for name, core in self.adapters.cores().items()})
        named.update({f"head.{name}": parameter for name, parameter in self.head.named_parameters()})
        return named

    def state(self) -> dict[str, Tensor]:
        """A copy of :meth:`tensors`."""
        return {name: tensor.detach().clone() for name, tensor in self.tensors().items()}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.tensors().items():
            tensor.copy_(state[name])


def attached(adapted: AdaptedBackbone, choice: str) -> list[str]:
    """The positions of a choice, attached; of `auto` those of qkv and mlp if they run, else those of blocks."""
    module = adapted.backbone.module
    if choice != "auto":
        positions = choose_positions(module, choice)
        adapted.attach(positions)
        return positions
    with suppress(BackboneError):
        return attached(adapted, "qkv,mlp")
    return attached(adapted, "blocks")


def given_digest(base: Task | None, bank: Sequence[Task]) -> str | None:
    """A sha256 of what base and bank are; None without either."""
    lines = [f"bank {manifest_hash(to_manifest(task)).hex()}" for task in bank]
    if base is not None:
        lines.append(f"base {manifest_hash(to_manifest(base)).hex()}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest() if lines else None


def machine(device: torch.device) -> dict[str, Any]:
    """What rounding depends on besides a run's identity: another one may give other bytes."""
    found: dict[str, Any] = {"torch": torch.__version__, "device": device.type}
    if device.type == "cuda":
        return {**found, "gpu": torch.cuda.get_device_name(device)}
    return {**found, "threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()}


def in_batches(pixels: Pixels, size: int = EVAL_BATCH) -> list[Tensor]:
    """Row numbers of a split in order, `size` at a time."""
    return [torch.arange(start, min(start + size, len(pixels))) for start in range(0, len(pixels), size)]
