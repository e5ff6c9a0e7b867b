"""The options of one training run."""

from dataclasses import Field, dataclass, fields
from typing import Any

from pear_store.format.checkpoint import TASK_NAME
from pear_train.choices import (
    Activation,
    Balance,
    Borrow,
    CoreDtype,
    Down,
    Dtype,
    HeadDtype,
    Importance,
    Knowledge,
    KnowledgeBits,
    Method,
    Select,
    Sharing,
    TensorDtype,
)
from pear_train.errors import ConfigError
from pear_train.options import check_option, kinds, parse_augment


@dataclass(frozen=True)
class TrainConfig:
    """Options of one run; docs/training.md says how to choose them."""

    task: str
    method: Method = "pear"
    """pear (prune and share), adapters (no pruning) or linear (head only)."""
    epochs: int = 20
    prune_epoch: int | None = None
    """Epochs before pruning; None for two fifths of all."""
    positions: str = "auto"
    """Comma-separated presets (blocks, attn, mlp, qkv, linear, whole, pointwise) or patterns of module paths; auto:
    the first of qkv,mlp; blocks; whole; pointwise that a backbone has and runs."""
    rank: int = 12
    """Of an adapter; of a run on common bases, theirs is."""
    activation: Activation = "identity"
    scale: float = 1.0
    """Factor of a branch."""
    ratio: float = 0.92
    """Share of the adapters of each shape that is pruned, below 1."""
    down: Down = "own"
    """own: trained; common: frozen, the same for all tasks of a backbone, so that only `up` is new to a store."""
    importance: Importance = "taylor"
    """What ranks adapters (pear_train/importance.py), or random as a control."""
    sharing: Sharing = "nearest"
    """How a pruned position finds the kept adapter that it borrows; none leaves it empty."""
    borrow: Borrow = "core"
    """What a borrowed branch has of its own: a core, a matrix of rank x rank between down and up, or only a scale."""
    borrowed_scale: float = 0.0
    """Where a borrowed branch's scale starts, as a multiple of `scale`; with a core, where that starts as so many times
    the identity. A fold says itself where they start."""
    train_borrowed_scale: bool = True
    scale_lr: float = 10.0
    """Learning rate of trained scales, as a multiple of `lr`."""
    knowledge: Knowledge = "fold"
    """What is preserved of a pruned adapter at its own position."""
    knowledge_bits: KnowledgeBits = 1
    """Bits of a low-bit knowledge checkpoint: 1 or 4."""
    lr: float = 1e-2
    weight_decay: float = 1.0
    """Of AdamW: a step shrinks weights by the learning rate times this."""
    warmup: float = 0.3
    """Share of the steps over which the learning rate rises; it then falls along a cosine."""
    max_grad_norm: float = 1.0
    """Gradients of all weights together are scaled down to this norm."""
    drop_branch: float = 0.0
    """Probability that a position's branches are left out of a training step."""
    augment: str = "none"
    """What training images undergo: none, or of flip, crop, rotate, zoom, color and mixup some joined by +."""
    balance: Balance = "none"
    """Of uneven classes: weights (in the loss, as if all were equally frequent) or sampling (rare ones come more
    often); none takes them as they are."""
    label_smoothing: float = 0.0
    """Share of each label that is spread evenly over all classes."""
    batch_size: int = 32
    seed: int = 0
    img_size: int | None = None
    """Pixels of a side; None for the backbone's own."""
    device: str | None = None
    dtype: Dtype = "auto"
    """Precision of the forward in training: float32, bfloat16 (autocast), or auto: bfloat16 where it is faster."""
    tensor_dtype: TensorDtype = "F16"
    """What adapters are written in: F32, F16, BF16, or codes of 8, 4, 2 or 1 bits (Q8, Q4, Q2, Q1), trained as such."""
    core_dtype: CoreDtype = "auto"
    """What cores are written in: auto (as adapters are, or F16 beside codes), floats, or codes of 8, 4 or 2 bits."""
    head_dtype: HeadDtype = "F16"
    """What the head is written in: F32, F16, BF16, or a weight of codes of 8, 4 or 2 bits (Q8, Q4, Q2)."""
    select: Select = "best"
    """The epoch that is kept: best (top-1 on val), macro_f1 (on val), or last. Of those after pruning; of equals, the
    later."""
    patience: int | None = None
    """Stop after so many epochs without a better val (by what `select` looks at, counted after pruning); None never."""
    threshold_accuracy: float | None = None
    """How often answers are to be right: the task gets the lowest confidence, `threshold`, from which its answers on
    val are. None: no threshold."""
    base_blocks: int = 4
    """Of a run with a base set: how many of the lowest blocks take the base's adapters frozen."""
    bank_share: int = 1
    """Of a run with a bank: stored adapters that a pruned position borrows."""
    own_rank: int = 0
    """Of a run on common bases: rank of the adapters that positions have of their own beside their cores; 0: none, or
    1 where `own_bytes` is given."""
    own_bytes: int | None = None
    """Of a run on common bases: bytes that these adapters may take as written. The most important are kept, as many as
    fit; None: all."""
    core_lr: float = 2.0
    """Learning rate of cores in common bases, and of adapters beside them, as a multiple of `lr`."""
    bases_lr: float = 0.3
    """Learning rate of common bases that are trained on, as a multiple of `lr`."""

    def __post_init__(self) -> None:
        if not isinstance(self.task, str) or not TASK_NAME.fullmatch(self.task):
            raise ConfigError(f"task name {self.task!r}: expected up to 100 letters, digits, '.', '_', '-'")
        for name, option in OPTIONS.items():
            value = getattr(self, name)
            check_option(name.replace("_", " "), option, value)
            if "float" in kinds(option) and value is not None:
                object.__setattr__(self, name, float(value))  # 1 and 1.0 are the same option
        parse_augment(self.augment)
        if self.own_bytes is not None and self.own_rank == 0:
            object.__setattr__(self, "own_rank", 1)
        if self.method != "pear":
            return
        if self.epochs < 2:
            raise ConfigError("epochs 1: method 'pear' needs at least 2, before and after pruning")
        if not 0 < self.pruned_after < self.epochs:
            raise ConfigError(
                f"prune epoch {self.pruned_after} of {self.epochs} epochs: expected at least 1 before it (scores are 0 "
                "while nothing is trained) and 1 after it"
            )
        if self.knowledge == "fold" and self.activation != "identity":
            raise ConfigError(
                f"knowledge 'fold' needs activation 'identity', found {self.activation!r}: choose knowledge 'none'"
            )
        if self.knowledge == "fold" and self.down == "common":
            raise ConfigError("knowledge 'fold' rewrites down, which down 'common' forbids: choose knowledge 'none'")

    def unused(self, base: bool, bank: bool, bases: bool = False) -> list[str]:
        """Options that differ from their defaults and say nothing in such a run.

        Args:
            base, bank, bases: whether the run is given a base set, stored adapters, common bases.
        """
        silent: set[str] = {"bases_lr"} if bank else {"bases_lr", "bank_share"}
        silent |= set() if base else {"base_blocks"}
        if bases:
            silent |= {"ratio", "sharing", "knowledge_bits", *_BORROWING}
            silent |= set() if self.own_bytes is not None else {"prune_epoch", "importance", "knowledge"}
        else:
            silent |= {"own_rank", "own_bytes", "core_lr"}
        if self.method != "pear":
            silent |= {"prune_epoch", "ratio", "importance", "sharing", "knowledge", "bank_share", *_BORROWING}
        if self.method == "linear":
            silent |= {"positions", "rank", "activation", "scale", "down", "drop_branch", "tensor_dtype", "base_blocks"}
            silent |= {"augment"}  # features are computed once
        if self.sharing == "none" and not bank:
            silent |= set(_BORROWING) - {"knowledge_bits"}
        if self.knowledge != "lowbit":
            silent |= {"knowledge_bits"}
        if self.knowledge == "fold" and not bank:
            silent |= {"borrowed_scale"}
        if self.method != "pear" or (self.borrow != "core" and not bases):
            silent |= {"core_dtype"}
        if self.borrow == "core":
            silent |= {"scale_lr", "train_borrowed_scale"}
        return [name for name, option in OPTIONS.items() if name in silent and getattr(self, name) != option.default]

    @property
    def pruned_after(self) -> int:
        """Epochs before pruning."""
        return default_prune_epoch(self.epochs) if self.prune_epoch is None else self.prune_epoch


def default_prune_epoch(epochs: int) -> int:
    """Epochs before pruning, where nothing is said."""
    return max(1, round(0.4 * epochs))


OPTIONS: dict[str, Field[Any]] = {field.name: field for field in fields(TrainConfig) if field.name != "task"}
"""Every option by its name; each has a default."""

_BORROWING = ("borrow", "borrowed_scale", "train_borrowed_scale", "scale_lr", "knowledge_bits")
