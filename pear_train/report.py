"""What a run reports: each step, the result, or why it failed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pear_store import Task
from pear_train.choices import Method
from pear_train.config import default_prune_epoch
from pear_train.recall import by_class


@dataclass(frozen=True)
class Step:
    """Progress of a run. The callback gets one after every step."""

    task: str
    epoch: int
    """Number of the epoch, from 1."""
    epochs: int
    """Epochs of the whole run."""
    batch: int
    """Steps of this epoch so far."""
    batches: int
    """Steps of an epoch."""
    loss: float
    """Mean loss of this epoch so far."""
    train_top1: float
    """Top-1 on the train images of this epoch so far, 0 to 1."""
    val_top1: float | None
    """Top-1 on val, 0 to 1, after the last step of an epoch; else None."""
    history: Sequence[Mapping[str, float]] = ()
    """Figures of all epochs so far, after the last step of an epoch; else empty. Keys are those of `Result.history`."""
    finished: bool = False
    """Whether this was the run's last step, also if it stops early."""
    precision: str = ""
    """Precision of the forward, such as float32."""
    device: str = ""
    """Device of torch, such as cuda:0."""


@dataclass(frozen=True)
class Result:
    """The result of a run. Bytes count each distinct tensor once. Top-1 is measured from the written file."""

    task: str
    method: Method
    val_top1: float
    """0 to 1."""
    test_top1: float | None
    """0 to 1; None without a test split."""
    trainable_params: int
    adapter_bytes: int
    """Bytes of the task's own adapters and cores, without common bases."""
    knowledge_bytes: int
    """Bytes of knowledge checkpoints."""
    head_bytes: int
    file_bytes: int
    """Size of the checkpoint file."""
    epochs: int
    """Epochs that were trained."""
    best_epoch: int
    """The epoch that was kept, from 1."""
    seconds: float
    importance: dict[str, float]
    """Score of every position. Empty if nothing was scored."""
    borrowed: dict[str, str]
    """Pruned position -> the position of this task that it borrows from."""
    banked: dict[str, list[str]]
    """Pruned position -> the adapters that it borrows from the bank."""
    pruned: list[str]
    """Positions that lost their adapter."""
    history: list[dict[str, float]]
    """Figures of each epoch: loss and train_top1 over its steps, val_top1 and val_macro_f1 at its end."""
    classes: dict[str, dict[str, Any]]
    """Class -> `images`, `recall`, `precision` and `f1`, each by split. A figure is None if it is not defined."""
    bases_bytes: int = 0
    """Bytes of common bases. A store keeps them once for all tasks that use them."""
    prune_epoch: int | None = None
    """The epoch after which adapters were pruned; None if none were."""
    threshold: float | None = None
    """The lowest confidence at which a share `threshold_accuracy` of answers on val is right."""

    @property
    def passed_over(self) -> list[str]:
        """Pruned positions that are more important than some kept position of another shape."""
        kept = [score for position, score in self.importance.items() if position not in self.pruned]
        return [position for position in self.pruned if kept and self.importance[position] > min(kept)]


@dataclass(frozen=True)
class Failed:
    """A task that could not be trained."""

    task: str
    error: str
    """Why, in one line."""


def result_of(task: Task, file_bytes: int, seconds: float = 0.0) -> Result:
    """The result of the run that wrote a checkpoint, from the checkpoint's own record."""
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
    """(adapter, knowledge, head) tensor bytes of a task. Each distinct tensor counts once, common bases do not."""
    parts = _bytes_by_part(task)
    return parts["adapter"], parts["knowledge"], parts["head"]


def bases_bytes(task: Task) -> int:
    """Tensor bytes of the common bases that a task uses."""
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
