"""Common bases fitted to the adapters of tasks, or taken from the backbone's own weights."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pear_store import Task
from pear_store.format.codes import matrix_values, up_values
from pear_train.bases import is_bases
from pear_train.errors import ConfigError
from pear_train.knowledge import common_bases, in_common_bases
from router import AdaptedBackbone
from router.positions import is_linear

Pairs = dict[str, tuple[Tensor, Tensor]]
"""Position -> `down` [d_in, r] and `up` [r, d_out] of a task or of bases, all branches there together."""


def fitting_tasks(
    sources: Sequence[Task],
    adapted: AdaptedBackbone,
    positions: Sequence[str],
    say: Callable[[str], None] | None = None,
) -> dict[str, Pairs]:
    """The adapters of each task that fits, at those of `positions` that it has.

    Raises:
        ConfigError: no task fits, or a position is in none of them.
    """
    found: dict[str, Pairs] = {}
    for task in sources:
        if task.backbone_digest != adapted.backbone.digest:
            problem = "another backbone"
        elif task.activation != "identity":
            problem = f"its activation is {task.activation!r}"
        elif is_bases(task):
            problem = "common bases"
        elif not (pairs := _pairs(task, adapted, positions)):
            problem = "no adapter at these positions"
        else:
            found[task.name if task.name not in found else f"{task.name} {len(found)}"] = pairs
            continue
        if say is not None:
            say(f"note      {task.name} is skipped: {problem}")
    if not found:
        raise ConfigError(
            f"bases: none of {len(sources)} stored tasks fits {adapted.backbone.name} and the positions: give tasks "
            "that were trained on this backbone at these positions"
        )
    if lacking := [position for position in positions if not any(position in pairs for pairs in found.values())]:
        raise ConfigError(f"bases: no stored task has an adapter at {lacking[0]!r}: choose other positions")
    return found


def _pairs(task: Task, adapted: AdaptedBackbone, positions: Sequence[str]) -> Pairs:
    """Each position's branches concatenated along the rank, with scales and cores multiplied into `up`."""
    found: Pairs = {}
    for position in positions:
        branches = task.positions.get(position, [])
        if not branches or any(task.adapters[b.adapter].shape != adapted.widths[position] for b in branches):
            continue
        adapters = [task.adapters[branch.adapter] for branch in branches]
        downs = [matrix_values(adapter.down, task.tensors).astype("f4") for adapter in adapters]
        ups = [
            up_values(adapter, task.tensors).astype("f4") * np.float32(branch.scale)
            for adapter, branch in zip(adapters, branches, strict=True)
        ]
        found[position] = torch.from_numpy(np.concatenate(downs, 1)), torch.from_numpy(np.concatenate(ups))
    return found


def singular_bases(module: nn.Module, positions: Sequence[str], rank: int) -> Pairs:
    """D [d_in, rank] and U [rank, d_out] of each position, from the singular vectors of its own weight [d_out, d_in].

        W = Q · S · Vᵀ        D = V, U = S · Qᵀ, the first `rank` of each

    Raises:
        ConfigError: a position is neither a Linear nor a 1x1 convolution.
    """
    found: Pairs = {}
    for position in positions:
        part = module.get_submodule(position)
        if not is_linear(part):
            raise ConfigError(
                f"bases: expected a Linear or a 1x1 convolution at {position!r}, found {type(part).__name__}: give "
                "positions such as linear, or make bases from tasks"
            )
        weight = part.get_parameter("weight").detach().flatten(1)
        left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
        scaled = left[:, :rank] * values[:rank]
        found[position] = right[:rank].t().cpu().contiguous(), scaled.t().cpu().contiguous()
    return found


def fit_bases(
    tasks: Mapping[str, Pairs], positions: Sequence[str], rank: int, say: Callable[[str], None] | None = None
) -> Pairs:
    """Orthonormal D [d_in, rank] and U [rank, d_out] of each position. Each task's adapters are first scaled to norm 1.

    Args:
        say: receives a line for a person if tasks have directions in common, so that bases are partly arbitrary.
    Raises:
        ConfigError: at a position the tasks' ranks together are below `rank`, or the tasks add nothing.
    """
    norms = {name: _energy(pairs) ** 0.5 or 1.0 for name, pairs in tasks.items()}
    bases: Pairs = {}
    fewer: dict[str, int] = {}
    for position in positions:
        scaled = [
            (pairs[position][0], pairs[position][1] / norms[name]) for name, pairs in tasks.items() if position in pairs
        ]
        columns, directions = sum(down.shape[1] for down, _ in scaled), _directions(scaled)
        if columns < rank or directions == 0:
            raise ConfigError(
                f"bases: expected at least {rank} directions, the rank, at {position!r}, found "
                f"{min(columns, directions)} in {len(scaled)} task(s): give more tasks, or a smaller rank"
            )
        if directions < rank:
            fewer[position] = directions
        bases[position] = common_bases(scaled, rank)
    if fewer and say is not None:
        least = min(fewer, key=fewer.__getitem__)
        say(
            f"note      at {len(fewer)} of {len(bases)} positions the tasks have fewer directions than the rank, "
            f"{rank}: {fewer[least]} at {least!r}. There the others are arbitrary"
        )
    return bases


def _directions(pairs: Sequence[tuple[Tensor, Tensor]]) -> int:
    """The dimension of the spaces that all down · up read and write, the smaller of both.

    A direction with less than a hundred thousandth of the strongest one's norm does not count: no task has learnt it.
    """
    found = []
    for side in (pairs, [(up.t(), down.t()) for down, up in pairs]):
        weighted = torch.cat([first @ torch.linalg.qr(second.t()).R.t() for first, second in side], 1)
        strengths = torch.linalg.svdvals(weighted)
        found.append(int((strengths > 1e-5 * strengths[0]).sum()))
    return min(found)


def _energy(pairs: Pairs) -> float:
    """The squared norm of all down · up. The products are never formed."""
    return sum(float(((down.t() @ down) * (up @ up.t())).sum().clamp_min(0)) for down, up in pairs.values())


def held_energy(pairs: Pairs, bases: Pairs) -> float:
    """The share, 0 to 1, of a task's adapters that common bases hold, by squared norm."""
    cores = {p: in_common_bases(*pair, *bases[p]) for p, pair in pairs.items()}
    held = sum(float((bases[p][0] @ core @ bases[p][1]).square().sum()) for p, core in cores.items())
    return min(held / (_energy(pairs) or 1.0), 1.0)  # rounding
