"""The options of one training run."""

from dataclasses import dataclass

from pear_train.errors import ConfigError

METHODS = ("pear", "adapters", "linear")
SHARING = ("nearest", "top", "similar", "none")
KNOWLEDGE = ("none", "fold", "lowbit", "exact")
IMPORTANCE = ("taylor", "random")


@dataclass(frozen=True)
class TrainConfig:
    """Options of one run; docs/results has what the defaults give on four tasks."""

    task: str
    method: str = "pear"
    """pear (prune and share), adapters (no pruning) or linear (head only)."""
    epochs: int = 20
    prune_epoch: int | None = None
    """Epochs before pruning; None for two fifths of all."""
    positions: str = "blocks"
    """A preset (blocks, attn, mlp, qkv, linear) or comma-separated patterns of module paths."""
    rank: int = 8
    activation: str = "identity"
    scale: float = 1.0
    """Factor of a branch."""
    ratio: float = 0.5
    """Share of the adapters of each shape that is pruned, below 1."""
    importance: str = "taylor"
    """What ranks adapters: taylor, or random as a control."""
    sharing: str = "nearest"
    """How a pruned position finds the kept adapter that it borrows; none leaves it empty."""
    borrowed_scale: float = 0.0
    """Where a borrowed branch's scale starts, as a multiple of `scale`."""
    train_borrowed_scale: bool = True
    knowledge: str = "none"
    """What is preserved of a pruned adapter at its own position."""
    knowledge_bits: int = 1
    """Bits of a low-bit knowledge checkpoint: 1 or 4."""
    lr: float = 3e-3
    weight_decay: float = 1e-4
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises; it then falls along a cosine."""
    batch_size: int = 32
    seed: int = 0
    img_size: int | None = None
    """Pixels of a side; None for the backbone's own."""
    device: str | None = None
    dtype: str = "auto"
    """Precision of the forward in training: float32, bfloat16 (autocast), or auto: bfloat16 where it is fast."""
    tensor_dtype: str = "F16"
    """What the task checkpoint's tensors are written in: F32, F16 or BF16."""

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("method", self.method, METHODS),
            ("sharing", self.sharing, SHARING),
            ("knowledge", self.knowledge, KNOWLEDGE),
            ("importance", self.importance, IMPORTANCE),
            ("activation", self.activation, ("identity", "relu", "gelu")),
            ("dtype", self.dtype, ("auto", "float32", "bfloat16")),
            ("tensor dtype", self.tensor_dtype, ("F32", "F16", "BF16")),
            ("knowledge bits", self.knowledge_bits, (1, 4)),
        ):
            if value not in allowed:
                raise ConfigError(f"{name} {value!r}: expected one of {', '.join(map(str, allowed))}")
        for name, number, low in (
            ("epochs", self.epochs, 1),
            ("rank", self.rank, 1),
            ("batch size", self.batch_size, 1),
            ("image size", self.img_size or 1, 1),
        ):
            if number < low:
                raise ConfigError(f"{name} {number}: expected at least {low}")
        if not 0 <= self.ratio < 1:
            raise ConfigError(f"ratio {self.ratio}: expected at least 0 and below 1")
        if not self.lr > 0:
            raise ConfigError(f"lr {self.lr}: expected above 0")
        if self.method == "pear" and self.epochs < 2:
            raise ConfigError("epochs 1: method 'pear' needs at least 2, before and after pruning")
        if self.method == "pear" and not 0 < self.pruned_after < self.epochs:
            raise ConfigError(
                f"prune epoch {self.pruned_after} of {self.epochs} epochs: expected at least 1 before it (scores are 0 "
                "while nothing is trained) and 1 after it"
            )
        if self.knowledge == "fold" and self.activation != "identity":
            raise ConfigError(f"knowledge 'fold' needs activation 'identity', found {self.activation!r}: no matrix")
        if self.knowledge == "fold" and self.sharing == "none":
            raise ConfigError("knowledge 'fold' puts pruned adapters into their sources: sharing 'none' has no sources")

    @property
    def pruned_after(self) -> int:
        """Epochs before pruning."""
        return max(1, round(0.4 * self.epochs)) if self.prune_epoch is None else self.prune_epoch
