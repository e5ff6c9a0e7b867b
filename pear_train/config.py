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
    """Options of one run. docs/training.md says how to choose them.

    Raises:
        ConfigError: a value has the wrong type or range, or two options contradict each other.
    """

    task: str
    """Name of the task: up to 100 letters, digits, '.', '_', '-'."""
    method: Method = "pear"
    """pear (prune and share), adapters (no pruning) or linear (only the head)."""
    epochs: int = 20
    prune_epoch: int | None = None
    """Epochs before pruning. None: two fifths of all."""
    positions: str = "auto"
    """Comma-separated presets (blocks, attn, mlp, qkv, linear, whole, pointwise) or patterns of module paths. auto: the
    first of these that the backbone has and runs: qkv,mlp; blocks; whole; pointwise."""
    rank: int = 12
    """Rank of an adapter. A run on common bases uses their rank."""
    activation: Activation = "identity"
    """Function between an adapter's `down` and `up`: identity, relu or gelu."""
    scale: float = 1.0
    """Factor of a branch."""
    ratio: float = 0.92
    """Share of the adapters of each shape that is pruned, at least 0 and below 1."""
    down: Down = "own"
    """own: trained. common: frozen, the same for all tasks of a backbone, so a store keeps it once."""
    importance: Importance = "taylor"
    """How adapters are ranked (pear_train/importance.py). random and first are controls."""
    sharing: Sharing = "nearest"
    """Which kept adapter a pruned position borrows: nearest, top, similar (pear_train/prune.py) or none."""
    borrow: Borrow = "core"
    """What a borrowed branch trains of its own: a core [rank, rank] between down and up, or only a scale."""
    borrowed_scale: float = 0.0
    """Start of a borrowed branch's scale, as a multiple of `scale`. A core starts as this multiple of the identity. A
    fold computes the start itself."""
    train_borrowed_scale: bool = True
    """Whether a borrowed branch's scale is trained."""
    scale_lr: float = 10.0
    """Learning rate of trained scales, as a multiple of `lr`."""
    knowledge: Knowledge = "fold"
    """What a pruned position keeps of its adapter: none, fold, lowbit or exact (pear_train/knowledge.py)."""
    knowledge_bits: KnowledgeBits = 1
    """Bits of a low-bit knowledge checkpoint: 1 or 4."""
    lr: float = 1e-2
    """Highest learning rate of AdamW."""
    weight_decay: float = 1.0
    """Of AdamW: each step shrinks a weight by the learning rate times this."""
    warmup: float = 0.3
    """Share of the steps, 0 to 1, in which the learning rate rises. After them it falls along a cosine."""
    max_grad_norm: float = 1.0
    """Largest norm of all gradients together. Larger ones are scaled down to it."""
    drop_branch: float = 0.0
    """Probability that a training step leaves a position's branches out, at least 0 and below 1."""
    augment: str = "none"
    """Random changes of training images: none, or some of flip, crop, rotate, zoom, color and mixup, joined by +."""
    balance: Balance = "none"
    """What is done about rare classes. none: nothing. weights: they weigh more in the loss, as if all classes were
    equally frequent. sampling: they come more often."""
    label_smoothing: float = 0.0
    """Share of each label that is spread evenly over all classes, at least 0 and below 1."""
    batch_size: int = 32
    """Images per step."""
    seed: int = 0
    """Seed of every random choice."""
    img_size: int | None = None
    """Height and width of images in pixels. None: the backbone's own."""
    device: str | None = None
    """Device of torch, such as cuda:0. None: a GPU if there is one."""
    dtype: Dtype = "auto"
    """Precision of the forward in training: float32, bfloat16 (autocast), or auto: bfloat16 where it is faster."""
    tensor_dtype: TensorDtype = "F16"
    """How adapters are written: F32, F16, BF16, or codes of 8, 4, 2 or 1 bits (Q8, Q4, Q2, Q1). Codes are trained as
    such."""
    core_dtype: CoreDtype = "auto"
    """How cores are written: floats, codes of 8, 4 or 2 bits, or auto: the floats of the adapters, or F16 if those are
    codes."""
    head_dtype: HeadDtype = "F16"
    """How the head is written: F32, F16, BF16, or a weight of codes of 8, 4 or 2 bits (Q8, Q4, Q2)."""
    select: Select = "best"
    """The epoch to keep: best (by top-1 on val), macro_f1 (by macro F1 on val), or last. Only epochs after pruning
    count. Of equal ones the later is kept."""
    patience: int | None = None
    """Stop after this many epochs without a better val, by the figure that `select` names. Epochs before pruning do not
    count. None: never stop early."""
    threshold_accuracy: float | None = None
    """Share of answers, above 0 and at most 1, that must be right. The task's `threshold` becomes the lowest confidence
    at which that holds on val. None: no threshold."""
    base_blocks: int = 4
    """With a base set: how many of the lowest blocks use the base's adapters frozen."""
    bank_share: int = 1
    """With a bank: how many stored adapters a pruned position borrows."""
    own_rank: int = 0
    """On common bases: rank of the adapters that each position has beside its core. 0: none, or rank 1 if `own_bytes`
    is given."""
    own_bytes: int | None = None
    """On common bases: bytes that these adapters may take as written. The most important that fit are kept. None: all
    are kept."""
    core_lr: float = 2.0
    """On common bases: learning rate of cores and of the adapters beside them, as a multiple of `lr`."""
    bases_lr: float = 0.3
    """While common bases are made: their learning rate, as a multiple of `lr`."""

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

    def prunes(self, on_bases: bool) -> bool:
        """Whether such a run prunes. A task on common bases does so only if it has `own_bytes`."""
        return self.method == "pear" and (not on_bases or self.own_bytes is not None)

    def check_pruning(self) -> None:
        """Checks what only a run that prunes needs.

        Raises:
            ConfigError: no epoch is before or after pruning, or what is pruned cannot be kept as `knowledge` says.
        """
        if self.epochs < 2:
            raise ConfigError("epochs 1: method 'pear' needs at least 2, before and after pruning")
        if not 0 < self.pruned_after < self.epochs:
            raise ConfigError(
                f"prune epoch {self.pruned_after} of {self.epochs} epochs: expected at least 1 epoch before it "
                "(untrained adapters all score 0) and 1 after it"
            )
        if self.knowledge == "fold" and self.activation != "identity":
            raise ConfigError(
                f"knowledge 'fold' needs activation 'identity', found {self.activation!r}: choose knowledge 'none'"
            )
        if self.knowledge == "fold" and self.down == "common":
            raise ConfigError("knowledge 'fold' rewrites down, which down 'common' forbids: choose knowledge 'none'")

    def unused(self, base: bool, bank: bool, bases: bool = False) -> list[str]:
        """Names of options that differ from their defaults although such a run ignores them.

        Args:
            base, bank, bases: whether the run uses a base set, stored adapters, common bases.
        """
        silent: set[str] = {"bases_lr"} if bank else {"bases_lr", "bank_share"}
        silent |= set() if base else {"base_blocks"}
        if bases:
            silent |= {"ratio", "sharing", "knowledge_bits", *_BORROWING}
            silent |= set() if self.own_bytes is not None else {"prune_epoch", "importance", "knowledge"}
            of_cores = self.core_dtype == "auto" and not self.tensor_dtype.startswith("Q")  # cores have its floats
            silent |= set() if self.own_rank else {"down"} | (set() if of_cores else {"tensor_dtype"})
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

    def unused_by_bases(self, trained: bool) -> list[str]:
        """Names of options that differ from their defaults although common bases are made without them.

        Args:
            trained: whether the bases are also trained on data sets.
        """
        used = {*_OF_BASES, *(OF_TRAINED_BASES if trained else ())}
        return [name for name, option in OPTIONS.items() if name not in used and getattr(self, name) != option.default]

    @property
    def pruned_after(self) -> int:
        """Epochs before pruning, the default resolved."""
        return default_prune_epoch(self.epochs) if self.prune_epoch is None else self.prune_epoch


def default_prune_epoch(epochs: int) -> int:
    """Epochs before pruning if the option is not given."""
    return max(1, round(0.4 * epochs))


OPTIONS: dict[str, Field[Any]] = {field.name: field for field in fields(TrainConfig) if field.name != "task"}
"""Every option but `task`, by its name. Each has a default."""

_OF_BASES = ("positions", "rank", "activation", "img_size", "device", "tensor_dtype")
OF_TRAINED_BASES = (
    "epochs", "scale", "lr", "weight_decay", "warmup", "max_grad_norm", "drop_branch", "augment", "balance",
    "label_smoothing", "batch_size", "seed", "dtype", "core_dtype", "core_lr", "bases_lr",
)  # fmt: skip
_BORROWING = ("borrow", "borrowed_scale", "train_borrowed_scale", "scale_lr", "knowledge_bits")
