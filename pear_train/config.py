"""The options of one training run."""

from dataclasses import dataclass

from pear_train.errors import ConfigError

METHODS = ("pear", "adapters", "linear")
SHARING = ("nearest", "top", "similar", "none")
KNOWLEDGE = ("none", "fold", "lowbit", "exact")
BORROW = ("core", "scale")
IMPORTANCE = ("taylor", "taylor_abs", "magnitude", "gradient", "random")
DOWN = ("own", "common")
AUGMENT = ("none", "flip", "crop", "flip+crop")
SELECT = ("best", "last")
TENSOR_DTYPES = ("F16", "BF16", "F32", "Q8", "Q4", "Q1")
CODE_BITS = {"Q8": 8, "Q4": 4, "Q1": 1}
HEAD_DTYPES = ("F16", "BF16", "F32", "Q8", "Q4")


@dataclass(frozen=True)
class TrainConfig:
    """Options of one run; docs/training.md says how to choose them."""

    task: str
    method: str = "pear"
    """pear (prune and share), adapters (no pruning) or linear (head only)."""
    epochs: int = 20
    prune_epoch: int | None = None
    """Epochs before pruning; None for two fifths of all."""
    positions: str = "auto"
    """Comma-separated presets (blocks, attn, mlp, qkv, linear) or patterns of module paths; auto: qkv,mlp, or blocks
    where a backbone has no such modules that run."""
    rank: int = 12
    activation: str = "identity"
    scale: float = 1.0
    """Factor of a branch."""
    ratio: float = 0.92
    """Share of the adapters of each shape that is pruned, below 1."""
    down: str = "own"
    """own: trained; common: frozen, the same for all tasks of a backbone, so that only `up` is new to a store."""
    importance: str = "taylor"
    """What ranks adapters (pear_train/importance.py), or random as a control."""
    sharing: str = "nearest"
    """How a pruned position finds the kept adapter that it borrows; none leaves it empty."""
    borrow: str = "core"
    """What a borrowed branch has of its own: a core, a matrix of rank x rank between down and up, or only a scale."""
    borrowed_scale: float = 0.0
    """Where a borrowed branch's scale starts, as a multiple of `scale`; with a core, where that starts as so many times
    the identity. A fold says itself where they start."""
    train_borrowed_scale: bool = True
    scale_lr: float = 10.0
    """Learning rate of trained scales, as a multiple of `lr`."""
    knowledge: str = "fold"
    """What is preserved of a pruned adapter at its own position."""
    knowledge_bits: int = 1
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
    """What training images undergo: none, flip (left to right), crop (shifted by up to an eighth), flip+crop."""
    batch_size: int = 32
    seed: int = 0
    img_size: int | None = None
    """Pixels of a side; None for the backbone's own."""
    device: str | None = None
    dtype: str = "auto"
    """Precision of the forward in training: float32, bfloat16 (autocast), or auto: bfloat16 where it is faster."""
    tensor_dtype: str = "F16"
    """What adapters are written in: F32, F16, BF16, or codes of 8, 4 or 1 bits (Q8, Q4, Q1), trained as such."""
    head_dtype: str = "F16"
    """What the head is written in: F32, F16, BF16, or a weight of codes of 8 or 4 bits (Q8, Q4)."""
    select: str = "best"
    """The epoch that is kept: the best on val (of those after pruning, the later of equals), or the last."""
    patience: int | None = None
    """Stop after so many epochs without a better val top-1 (counted after pruning); None never."""
    base_blocks: int = 4
    """Of a run with a base set: how many of the lowest blocks take the base's adapters frozen."""
    bank_share: int = 1
    """Of a run with a bank: stored adapters that a pruned position borrows."""

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("method", self.method, METHODS),
            ("sharing", self.sharing, SHARING),
            ("knowledge", self.knowledge, KNOWLEDGE),
            ("importance", self.importance, IMPORTANCE),
            ("activation", self.activation, ("identity", "relu", "gelu")),
            ("dtype", self.dtype, ("auto", "float32", "bfloat16")),
            ("down", self.down, DOWN),
            ("borrow", self.borrow, BORROW),
            ("augment", self.augment, AUGMENT),
            ("select", self.select, SELECT),
            ("tensor dtype", self.tensor_dtype, TENSOR_DTYPES),
            ("head dtype", self.head_dtype, HEAD_DTYPES),
            ("knowledge bits", self.knowledge_bits, (1, 4)),
        ):
            if value not in allowed:
                raise ConfigError(f"{name} {value!r}: expected one of {', '.join(map(str, allowed))}")
        for name, number, low in (
            ("epochs", self.epochs, 1),
            ("rank", self.rank, 1),
            ("batch size", self.batch_size, 1),
            ("image size", self.img_size or 1, 1),
            ("patience", 1 if self.patience is None else self.patience, 1),
            ("base blocks", self.base_blocks, 0),
            ("bank share", self.bank_share, 1),
        ):
            if number < low:
                raise ConfigError(f"{name} {number}: expected at least {low}")
        if not 0 <= self.ratio < 1:
            raise ConfigError(f"ratio {self.ratio}: expected at least 0 and below 1")
        for name, rate in (("lr", self.lr), ("scale lr", self.scale_lr), ("max grad norm", self.max_grad_norm)):
            if not rate > 0:
                raise ConfigError(f"{name} {rate}: expected above 0")
        if not 0 <= self.drop_branch < 1:
            raise ConfigError(f"drop branch {self.drop_branch}: expected at least 0 and below 1")
        if self.method == "pear" and self.epochs < 2:
            raise ConfigError("epochs 1: method 'pear' needs at least 2, before and after pruning")
        if self.method == "pear" and not 0 < self.pruned_after < self.epochs:
            raise ConfigError(
                f"prune epoch {self.pruned_after} of {self.epochs} epochs: expected at least 1 before it (scores are 0 "
                "while nothing is trained) and 1 after it"
            )
        if self.method == "pear" and self.knowledge == "fold" and self.activation != "identity":
            raise ConfigError(
                f"knowledge 'fold' needs activation 'identity', found {self.activation!r}: choose knowledge 'none'"
            )
        if self.method == "pear" and self.knowledge == "fold" and self.down == "common":
            raise ConfigError("knowledge 'fold' rewrites down, which down 'common' forbids: choose knowledge 'none'")

    @property
    def pruned_after(self) -> int:
        """Epochs before pruning."""
        return max(1, round(0.4 * self.epochs)) if self.prune_epoch is None else self.prune_epoch
