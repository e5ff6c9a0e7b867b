"""The prune epoch of a run: it scores adapters, prunes some, and gives their positions kept ones to borrow."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pear_train.adapters import AdapterSet, TrainedBranch
from pear_train.bank import Bank
from pear_train.config import TrainConfig
from pear_train.data import Pixels
from pear_train.dtypes import written_bytes
from pear_train.evaluate import in_batches
from pear_train.importance import gradient_scores, magnitude_scores, place_scores
from pear_train.knowledge import exact_copy, fold, fold_cores, in_common_bases, lowbit_copy
from pear_train.prune import choose_pruned, choose_sources, choose_within, matrix_similarity, output_similarity
from router import AdaptedBackbone, PositionWeights, add_branch

logger = logging.getLogger(__name__)

SCORE_BATCH = 50
"""Images of one Taylor term. It is fixed because the mean of squares depends on it."""
SIMILARITY_IMAGES = 200


@dataclass(frozen=True, eq=False)
class Pruned:
    """What was pruned, and what it borrows."""

    positions: list[str]
    """Positions that lost their adapter."""
    sources: dict[str, str]
    """Pruned position -> the kept position that it borrows from."""
    banked: dict[str, list[str]]
    """Pruned position -> the stored adapters that it borrows, by their names in the bank."""
    changed: set[Tensor]
    """Weights that other positions now use, too."""


@dataclass(frozen=True)
class Pruning:
    """The prune epoch of one run: first `score`, then `prune`, which rewrites `adapters`."""

    config: TrainConfig
    adapted: AdaptedBackbone
    adapters: AdapterSet
    head: nn.Module
    pixels: Pixels
    """Of the train split."""
    bank: Bank
    generator: torch.Generator

    def score(self) -> dict[str, float]:
        """Importance of every position's own adapter, in forward order."""
        began = time.perf_counter()
        own, kind = self.adapters.own, self.config.importance
        if kind == "random":
            scores = {position: float(torch.rand((), generator=self.generator)) for position in own}
        elif kind == "first":
            scores = place_scores(own)
        elif kind == "magnitude":
            with torch.no_grad():
                scores = magnitude_scores({position: self.adapters.matrices(name) for position, name in own.items()})
        else:
            ups = {position: self.adapters.up[name] for position, name in own.items()}
            scores = gradient_scores(kind, ups, self._losses())
        seconds = time.perf_counter() - began
        logger.debug("%s: scored %d adapters by %s in %.2f s", self.config.task, len(own), kind, seconds)
        return scores

    def prune(self, importance: Mapping[str, float]) -> Pruned:
        """Prunes the least important adapters. Their positions borrow kept ones, and keep a knowledge checkpoint."""
        began = time.perf_counter()
        config, adapters = self.config, self.adapters
        if adapters.on_bases:
            return self._prune_on_bases(importance)
        widths = {position: self.adapted.widths[position] for position in adapters.own}
        positions = choose_pruned(importance, widths, config.ratio)
        similarity = self._similarity(positions) if config.sharing == "similar" else None
        sources = choose_sources(config.sharing, positions, importance, widths, similarity)
        banked = self.bank.choose(positions, adapters, self._losses, config.bank_share) if self.bank else {}
        self._rewrite_branches(positions, sources, banked)
        changed: set[Tensor] = {p for s in sources.values() for p in adapters.matrices(adapters.own[s])}
        adapters.drop_unused()
        logger.debug(
            "%s: pruned %d of %d adapters in %.2f s: positions that borrow from this task: %d, from the bank: %d",
            config.task, len(positions), len(importance), time.perf_counter() - began, len(sources), len(banked),
        )  # fmt: skip
        return Pruned(positions, sources, banked, changed)

    @torch.no_grad()
    def _prune_on_bases(self, importance: Mapping[str, float]) -> Pruned:
        """Keeps the most important own adapters that fit `own_bytes`. With knowledge 'fold', the cores absorb the rest
        as far as they can."""
        config, adapters = self.config, self.adapters
        assert config.own_bytes is not None
        sizes = {position: self._written_bytes(name) for position, name in adapters.own.items()}
        positions = choose_within(importance, sizes, config.own_bytes)
        for position in positions:
            (common, *_), name = adapters.branches[position], adapters.own[position]
            if config.knowledge == "fold" and common.core is not None:
                core = in_common_bases(*adapters.matrices(name), *adapters.matrices(common.adapter))
                common.core.add_(core.to(common.core.device))
            adapters.branches[position] = [common]
        adapters.drop_unused()
        logger.debug(
            "%s: %d of %d adapters of its own fit into %d bytes",
            config.task, len(importance) - len(positions), len(importance), config.own_bytes,
        )  # fmt: skip
        return Pruned(positions, {}, {}, set())

    def _written_bytes(self, adapter: str) -> int:
        down, up = (tuple(matrix.shape) for matrix in self.adapters.matrices(adapter))
        dtype = self.config.tensor_dtype
        return written_bytes((down[0], down[1]), dtype, 1) + written_bytes((up[0], up[1]), dtype, 0)

    # ---- inputs of scores and similarity --------------------------------------------------------

    def _losses(self) -> Iterator[Callable[[], Tensor]]:
        """The loss of every batch of the train split, in order, float32."""
        for rows in in_batches(self.pixels, SCORE_BATCH):

            def loss(rows: Tensor = rows) -> Tensor:
                images = self.pixels.images(rows)
                features = self.adapted.features(images, self.adapters.position_weights())
                return F.cross_entropy(self.head(features), self.pixels.targets[rows].to(self.adapted.device))

            yield loss

    @torch.no_grad()
    def _similarity(self, pruned: list[str]) -> Callable[[str, str], float]:
        """similarity(pruned, kept): the cosine of matrices for identity, else of outputs on train images."""
        adapters = self.adapters
        pairs = {
            position: (adapters.down[name].detach(), adapters.up[name].detach())
            for position, name in adapters.own.items()
        }
        if self.config.activation == "identity":
            return lambda p, k: matrix_similarity(pairs[p], pairs[k])
        images = self.pixels.images(torch.arange(min(SIMILARITY_IMAGES, len(self.pixels))))
        inputs = self.adapted.inputs(images, adapters.position_weights(), pruned)

        def branch(at: str, of: str) -> Tensor:
            down, up = pairs[of]
            x = inputs[at]
            y = torch.zeros(*x.shape[:-1], up.shape[1], device=x.device, dtype=x.dtype)
            return add_branch(y, x, PositionWeights(down, up, self.config.activation))

        return lambda p, k: output_similarity(branch(p, p), branch(p, k))

    # ---- new branches of positions --------------------------------------------------------------

    @torch.no_grad()
    def _rewrite_branches(self, pruned: list[str], sources: Mapping[str, str], banked: Mapping[str, list[str]]) -> None:
        folded = self._fold(sources) if self.config.knowledge == "fold" else {}
        for position in pruned:
            branches = [self._borrow_banked(name) for name in banked.get(position, [])]
            if position in folded:
                branches.append(folded[position])
            elif position in sources:
                branches.append(self._borrow(self.adapters.own[sources[position]]))
            self.adapters.branches[position] = branches + self._kept_knowledge(position)
        for position, branch in folded.items():  # a fold also changes the branches of sources
            if position not in pruned:
                self.adapters.branches[position] = [branch]

    def _borrow_banked(self, name: str) -> TrainedBranch:
        self.adapters.frozen[name] = self.bank.adapters[name].to(self.adapted.device)
        return self._borrow(name)

    def _borrow(self, adapter: str) -> TrainedBranch:
        """A borrowed branch at its start."""
        config = self.config
        if config.borrow == "scale":
            return TrainedBranch(adapter, self._scale(config.borrowed_scale * config.scale))
        down, up = self.adapters.matrices(adapter)
        core = config.borrowed_scale * torch.eye(down.shape[1], up.shape[0], device=self.adapted.device)
        return TrainedBranch(adapter, config.scale, nn.Parameter(core))

    def _scale(self, value: float) -> float | nn.Parameter:
        """A borrowed branch's scale: a parameter if it is trained, else a number."""
        if not self.config.train_borrowed_scale:
            return value
        return nn.Parameter(torch.tensor(float(value), device=self.adapted.device))

    def _kept_knowledge(self, position: str) -> list[TrainedBranch]:
        """A frozen copy of a pruned adapter at its own position, for knowledge 'lowbit' and 'exact'."""
        config, own = self.config, self.adapters.own[position]
        down, up = self.adapters.matrices(own)
        if config.knowledge == "lowbit":
            copy = lowbit_copy(down, up, config.knowledge_bits)
        elif config.knowledge == "exact":
            copy = exact_copy(down, up)
        else:
            return []
        name = "k" + own.removeprefix("a")
        self.adapters.frozen[name] = copy.to(self.adapted.device)
        return [TrainedBranch(name, config.scale)]

    def _fold(self, sources: Mapping[str, str]) -> dict[str, TrainedBranch]:
        """Folds pruned adapters into their sources. Returns the new branch of every position concerned."""
        config, adapters = self.config, self.adapters
        branches: dict[str, TrainedBranch] = {}
        for source in dict.fromkeys(sources.values()):
            group = [source, *(position for position, s in sources.items() if s == source)]
            pairs = [adapters.matrices(adapters.own[position]) for position in group]
            name = adapters.own[source]
            old_down, old_up = adapters.matrices(name)
            if config.borrow == "core":
                down, up, cores = fold_cores(pairs)
                folded = [TrainedBranch(name, config.scale, nn.Parameter(core)) for core in cores]
            else:
                down, up, scales = fold(pairs)
                folded = [TrainedBranch(name, self._scale(config.scale * scale)) for scale in scales]
            old_down.copy_(down)
            old_up.copy_(up)
            branches.update(zip(group, folded, strict=True))
        return branches
