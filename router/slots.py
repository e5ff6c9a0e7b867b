"""Adapters on the device, by digest.

A pool holds rank rows of one width; row 0 is zero. A tensor lies in a pool once, whatever number of tasks and
positions use it; a branch is a list of row numbers and a scale. So concatenation, mixed ranks and scales of a
position are index operations.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pear_store import Task
from router.errors import SlotBudgetError
from router.ops import Activation, PositionWeights
from router.tensors import dequantise, to_torch

Key = tuple[str, bool]
"""Digest of the stored tensor, and whether its columns (`down`) or its rows (`up`) are the rank rows."""


@dataclass(frozen=True)
class PositionRows:
    """A task's branches at one position as rows of two pools, with each row's scale. Axes: rank."""

    down: list[int]
    up: list[int]
    scale: list[float]


@dataclass(frozen=True)
class LoadedTask:
    """A task in its slots."""

    task: Task
    positions: dict[str, PositionRows]
    weight: Tensor | None
    bias: Tensor | None
    keys: tuple[Key, ...]
    head_bytes: int


@dataclass
class _Entry:
    width: int
    rows: list[int]
    uses: int


class Pool:
    """float32 [capacity, width] on the device, with the rows that are free; grows by doubling."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.rows = torch.zeros(64, width, device=device)
        self._free = list(range(63, 0, -1))

    def put(self, values: Tensor) -> list[int]:
        count = len(values)
        while len(self._free) < count:
            old = len(self.rows)
            self.rows = torch.cat([self.rows, torch.zeros_like(self.rows)])
            self._free = list(range(2 * old - 1, old - 1, -1)) + self._free
        taken = [self._free.pop() for _ in range(count)]
        self.rows[torch.tensor(taken, device=self.rows.device)] = values.to(self.rows)
        return taken

    def free(self, rows: list[int]) -> None:
        self._free += rows


class Slots:
    """Loaded tasks, least recently used first out when `budget_bytes` is reached. Not thread-safe."""

    def __init__(self, device: torch.device, widths: dict[str, tuple[int, int]], budget_bytes: int | None) -> None:
        self._device, self._widths, self._budget = device, widths, budget_bytes
        self._pools: dict[int, Pool] = {}
        self._entries: dict[Key, _Entry] = {}
        self._tasks: OrderedDict[Hashable, LoadedTask] = OrderedDict()
        self.used_bytes = 0

    def load(self, wanted: Sequence[tuple[Hashable, Task]]) -> list[LoadedTask]:
        """The tasks of one batch, loaded where they are not yet; none of them is evicted for another.

        Raises:
            SlotBudgetError: together they do not fit.
        """
        pinned = {key for key, _ in wanted}
        for key, task in wanted:
            if key in self._tasks:
                self._tasks.move_to_end(key)
            else:
                self._tasks[key] = self._put(task)
            while self._budget is not None and self.used_bytes > self._budget:
                victim = next((k for k in self._tasks if k not in pinned), None)
                if victim is None:
                    needed = self.used_bytes
                    self.evict(key)
                    raise SlotBudgetError(needed, self._budget)
                self.evict(victim)
        return [self._tasks[key] for key, _ in wanted]

    def evict(self, key: Hashable) -> None:
        """Forgets a task; tensors that no other loaded task uses give up their rows."""
        loaded = self._tasks.pop(key, None)
        if loaded is None:
            return
        self.used_bytes -= loaded.head_bytes
        for name in loaded.keys:
            entry = self._entries[name]
            entry.uses -= 1
            if entry.uses == 0:
                self._pools[entry.width].free(entry.rows)
                self.used_bytes -= 4 * entry.width * len(entry.rows)
                del self._entries[name]

    def weights(self, tasks: Sequence[LoadedTask], row_task: Tensor | None) -> dict[str, PositionWeights]:
        """What each position adds, gathered once for a forward.

        Args:
            tasks: the distinct tasks of the batch.
            row_task: index into `tasks` of every image, int64 [batch] on the device; None if there is one task.
        """
        positions = list(dict.fromkeys(position for loaded in tasks for position in loaded.positions))
        if not positions:
            return {}
        down, up, scales = {}, {}, {}
        for position in positions:
            rows = [loaded.positions.get(position, PositionRows([], [], [])) for loaded in tasks]
            rank = max(len(one.scale) for one in rows)
            pad = [[0] * (rank - len(one.scale)) for one in rows]
            down[position] = torch.tensor([one.down + zeros for one, zeros in zip(rows, pad, strict=True)])
            up[position] = torch.tensor([one.up + zeros for one, zeros in zip(rows, pad, strict=True)])
            scales[position] = torch.tensor([one.scale + zeros for one, zeros in zip(rows, pad, strict=True)])
        gathered_down = self._gather(down, {p: self._widths[p][0] for p in positions}, row_task)
        gathered_up = self._gather(up, {p: self._widths[p][1] for p in positions}, row_task)
        activations = [loaded.task.activation for loaded in tasks]
        activation: Activation = activations[0]
        if row_task is not None and len(set(activations)) > 1:
            activation = {
                name: torch.tensor([a == name for a in activations], device=self._device)[row_task].view(-1, 1, 1)
                for name in set(activations)
            }
        weights = {}
        for position in positions:
            scale = scales[position].to(self._device)
            scale = scale[0] if row_task is None else scale[row_task]
            rows_up = gathered_up[position] * scale.unsqueeze(-1)
            weights[position] = PositionWeights(gathered_down[position].transpose(-1, -2), rows_up, activation)
        return weights

    def _gather(self, rows: dict[str, Tensor], widths: dict[str, int], row_task: Tensor | None) -> dict[str, Tensor]:
        """[rank, width] or [batch, rank, width] of each position: one index_select for each width."""
        out: dict[str, Tensor] = {}
        for width in set(widths.values()):
            positions = [position for position in rows if widths[position] == width]
            index = torch.cat([rows[position] for position in positions], dim=1).to(self._device)
            index = index[0] if row_task is None else index[row_task]
            values = self._pools[width].rows[index]
            ranks = [rows[position].shape[1] for position in positions]
            out.update(zip(positions, torch.split(values, ranks, dim=-2), strict=True))
        return out

    def _put(self, task: Task) -> LoadedTask:
        keys: list[Key] = []
        rows: dict[str, tuple[list[int], list[int]]] = {}
        for name, entry in task.record["adapters"].items():
            sides = []
            for side in ("down", "up"):
                key = (_stored_key(task, entry, side), side == "down")
                if key not in self._entries:
                    values = adapter_matrix(task, name, side)
                    values = values.t() if side == "down" else values
                    pool = self._pools.setdefault(values.shape[1], Pool(values.shape[1], self._device))
                    self._entries[key] = _Entry(values.shape[1], pool.put(values), 0)
                    self.used_bytes += 4 * values.numel()
                self._entries[key].uses += 1
                keys.append(key)
                sides.append(self._entries[key].rows)
            rows[name] = (sides[0], sides[1])
        positions = {}
        for position, branches in task.positions.items():
            ranks = [len(rows[branch.adapter][0]) for branch in branches]
            positions[position] = PositionRows(
                [row for branch in branches for row in rows[branch.adapter][0]],
                [row for branch in branches for row in rows[branch.adapter][1]],
                [branch.scale for branch, rank in zip(branches, ranks, strict=True) for _ in range(rank)],
            )
        weight = bias = None
        if (head := task.record["head"]) is not None:
            weight = to_torch(task.tensors[head["weight"]]).float().to(self._device)
            bias = to_torch(task.tensors[head["bias"]]).float().to(self._device)
        head_bytes = 0 if weight is None or bias is None else 4 * (weight.numel() + bias.numel())
        self.used_bytes += head_bytes
        return LoadedTask(task, positions, weight, bias, tuple(keys), head_bytes)


def _stored_key(task: Task, entry: dict[str, object], side: str) -> str:
    """Names the matrix that an adapter's side stands for: by digest, and for quantised ones by scale and form too."""
    digest = task.tensors[str(entry[side])].digest
    quant = entry.get("quant")
    if not isinstance(quant, dict):
        return digest
    scale = task.tensors[quant[side]["scale"]].digest
    return f"{digest} {scale} {quant['bits']} {quant[side]['shape']}"


def adapter_matrix(task: Task, adapter: str, side: str) -> Tensor:
    """`down` [d_in, rank] or `up` [rank, d_out] of one adapter, float32, dequantised."""
    entry = task.record["adapters"][adapter]
    stored = to_torch(task.tensors[entry[side]])
    if "quant" not in entry:
        return stored.float()
    one = entry["quant"][side]
    scale = to_torch(task.tensors[one["scale"]])
    return dequantise(stored, scale, tuple(one["shape"]), entry["quant"]["bits"], 1 if side == "down" else 0)
