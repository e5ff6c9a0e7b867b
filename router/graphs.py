"""Forwards of small batches on a GPU, recorded as CUDA graphs.

For a small batch, Python takes longer to launch the kernels than the GPU takes to run them. A graph is all launches of
a forward, recorded once and launched as one. It reads and writes the memory that it was recorded with, so images and
matrices are copied there. Batches are padded to powers of two, and to the ranks of all tasks loaded so far. So one
graph serves every mix of tasks.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from router.matrices import Gathered

PIXELS = 32 * 224 * 224
"""Most pixels of a batch that is recorded. With a larger batch the GPU takes longer than the launches."""
MOST = 16
"""Most graphs that are kept. The least recently used one goes first. They share all memory but that of images."""

log = logging.getLogger(__name__)
Forward = Callable[[Tensor, Gathered], Tensor]
"""Gives features [row, d] of images [row, 3, h, w]."""


@dataclass(frozen=True, eq=False)
class _Recorded:
    graph: Any
    images: Tensor
    gathered: Gathered
    features: Tensor


class Graphs:
    """The recorded forwards of one backbone on a GPU. Not thread-safe.

    Args:
        forward: runs a batch eagerly.
    """

    def __init__(self, forward: Forward, device: torch.device, dtype: torch.dtype) -> None:
        self._forward, self._device, self._dtype = forward, device, dtype
        self._form: Hashable = None
        self._recorded: OrderedDict[Hashable, _Recorded] = OrderedDict()
        self._seen: set[Hashable] = set()
        self._pool: Any = None
        self.refused: str | None = None
        """Why this backbone cannot be recorded. None: it can, or that is not known yet."""

    def __len__(self) -> int:
        return len(self._recorded)

    def held(self, form: Hashable, key: Hashable) -> Gathered | None:
        """The memory into which to gather for a batch. None if no such batch is recorded.

        Args:
            form: form of the adapters. If it differs from the last one, all graphs are dropped.
            key: number of rows, and size of the images.
        """
        if form != self._form:
            self._form = form
            self._recorded.clear()
            self._seen.clear()
        recorded = self._recorded.get(key)
        return None if recorded is None else recorded.gathered

    def features(self, key: Hashable, images: Tensor, gathered: Gathered) -> Tensor:
        """Features of a batch, [row, d]. It replays a graph or runs eagerly, and records a key at its second time.

        The next batch of the same key overwrites the result.

        Args:
            key: number of rows, and size of the images.
            images: normalised, [row, 3, h, w].
            gathered: weights of the form last given to `held`, in the memory that `held` returned.
        """
        recorded = self._recorded.get(key)
        if recorded is None and self.refused is None and key in self._seen:
            recorded = self._record(key, images, gathered)
        if recorded is None:
            self._seen.add(key)
            return self._forward(images, gathered)
        self._recorded.move_to_end(key)
        recorded.images.copy_(images)
        recorded.graph.replay()
        return recorded.features

    def clear(self) -> None:
        """Frees the memory."""
        self._recorded.clear()
        self._seen.clear()
        self._pool = None

    def _record(self, key: Hashable, images: Tensor, gathered: Gathered) -> _Recorded | None:
        began = time.perf_counter()
        static = torch.empty(images.shape, device=self._device, dtype=self._dtype)
        static.copy_(images)
        gathered = gathered.own()
        try:
            side = torch.cuda.Stream(self._device)
            side.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(side):  # a first run outside of the graph lets libraries plan and compile kernels
                self._forward(static, gathered)
            torch.cuda.current_stream(self._device).wait_stream(side)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                features = self._forward(static, gathered)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a model that waits for the GPU or copies to the CPU
            self.refused = " ".join(str(error).split())[:200]
            log.info("small batches are not recorded as CUDA graphs: %s", self.refused)
            return None
        while len(self._recorded) >= MOST:
            self._recorded.popitem(last=False)
        recorded = self._recorded[key] = _Recorded(graph, static, gathered, features)
        log.debug("recorded a forward of %d rows in %.3f s", len(images), time.perf_counter() - began)
        return recorded
