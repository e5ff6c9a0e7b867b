"""What a caller is told of a run: each step, the result, or why there is none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pear_store import Task
from pear_train.choices import Method
from pear_train.config import default_prune_epoch
from pear_train.recall import by_class


@dataclass(frozen=True)
class Step:
    """Progress, given to the callback after every batch; `val_top1` and `history` after the last batch of an epoch."""

    task: str
    epoch: int
    epochs: int
    batch: int
    batches: int
    loss: float
    train_top1: float
    val_top1: float | None
    history: Sequence[Mapping[str, float]] = ()
    """Of all epochs so far."""
    finished: bool = False
    """This was the last step, be it that val got no better."""
    precision: str = ""
    """Of the forward, such as float32."""
    device: str = ""


@dataclass(frozen=True)
class Result:
    """What a run gave. Bytes are of the tensors as written, each distinct one once; top-1 in 0..1, from the file."""

    task: str
    method: Method
    val_top1: float
    test_top1: float | None
    trainable_params: int
    adapter_bytes: int
    """But for common bases: what is this task's own."""
    knowledge_bytes: int
    head_bytes: int
    file_bytes: int
    epochs: int
    best_epoch: int
    seconds: float
    importance: dict[str, float]
    borrowed: dict[str, str]
    """Source position of each pruned position that borrows from this task."""
    banked: dict[str, list[str]]
    """What each pruned position borrows from the bank."""
    pruned: list[str]
    history: list[dict[str, float]]
    """For each epoch: loss, train_top1 (while it went on), val_top1 (at its end)."""
    classes: dict[str, dict[str, Any]]
    """For each class, `images` and `recall` by split; recall is None where a split has no image of the class."""
    bases_bytes: int = 0
    """Of common bases, which a store keeps once for all tasks on them."""
    prune_epoch: int | None = None
    """The epoch at whose end it was pruned."""
    threshold: float | None = None
    """The confidence from which answers on val are right as often as was asked."""

    @property
    def passed_over(self) -> list[str]:
        """Pruned positions that are more important than some that are kept, of another kind."""
        kept = [score for position, score in self.importance.items() if position not in self.pruned]
        return [position for position in self.pruned if kept and self.importance[position] > min(kept)]


@dataclass(frozen=True)
class Failed:
    """A task that could not be trained; the others were."""

    task: str
    error: str


def result_of(task: Task, file_bytes: int, seconds: float = 0.0) -> Result:
    """What the run gave that wrote a checkpoint, as the checkpoint says."""
    training, metrics = task.record["training"], task.record["metrics"]
    adapter_bytes, knowledge_bytes, head_bytes = stored_bytes(task)
    return Result(
        task.name, training["method"], metrics["val_top1"], metrics.get("test_top1"), training["trainable_params"],
        adapter_bytes, knowledge_bytes, head_bytes, file_bytes, len(training["history"]), training["kept_epoch"],
        seconds, training["importance"], training["borrowed"], training["banked"], training["pruned"],
        training["history"], by_class(task.labels, training), bases_bytes(task),
        _prune_epoch(training), task.record.get("threshold"),
    )  # fmt: skip


def _prune_epoch(training: Mapping[str, Any]) -> int | None:
    if not training["pruned"]:
        return None
    said: int | None = training["prune_epoch"]
    return default_prune_epoch(training["epochs"]) if said is None else said


def stored_bytes(task: Task) -> tuple[int, int, int]:
    """(adapter, knowledge, head) tensor bytes of a task, each distinct tensor once; common bases are not counted."""
    parts = _bytes_by_part(task)
    return parts["adapter"], parts["knowledge"], parts["head"]


def bases_bytes(task: Task) -> int:
    """Tensor bytes of the common bases that a task stands on."""
    return _bytes_by_part(task)["bases"]


def _bytes_by_part(task: Task) -> dict[str, int]:
    counted: dict[str, tuple[str, int]] = {}

    def count(part: str, name: str) -> None:
        tensor = task.tensors[name]
        counted.setdefault(tensor.digest, (part, tensor.size_bytes))

    on_bases = "bases" in task.record["training"]
    for adapter in task.adapters.values():
        part = "knowledge" if adapter.role == "knowledge" else "adapter"
        for name in sorted(name for matrix in adapter.matrices for name in matrix.names):
            own = adapter.core is None or name in adapter.core.names
            count(part if own or not on_bases else "bases", name)
    for name in task.head.names if task.head is not None else ():
        count("head", name)
    parts = dict.fromkeys(("adapter", "knowledge", "head", "bases"), 0)
    for part, size in counted.values():
        parts[part] += size
    return parts
