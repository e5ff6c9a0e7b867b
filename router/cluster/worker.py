"""What runs on the cluster's machines: workers, each with one router, and the decoding of images on any core."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pear_store import Store
from pear_store.pools import ThreadPool
from pear_store.remote.cache import CacheSettings
from router import ImageError, Router, decode
from router.cluster.session import ClusterError
from router.infer.plan import AHEAD, Ask, Result, Work, load
from router.infer.work import serve
from router.predictions import Threshold
from router.threads import computing_alone

AT_ONCE = 1 + AHEAD
"""Batches in a worker: one in its forward, and those that are decoded meanwhile."""
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Settings:
    """What makes all workers alike."""

    backbone: str
    weights: str | None
    digest: str
    """Of the backbone as the run began with it."""
    store: str
    """A folder that all machines see, or a URL."""
    cache_bytes: int | None
    device: str
    dtype: str
    slot_bytes: int | None
    top: int
    """Classes in `topk`."""
    threshold: Threshold
    threads: int | None = None
    """That a forward computes with; None: as torch has it."""


@dataclass(frozen=True)
class Answer:
    """A batch that was served."""

    results: list[list[Result]]
    """For each ask, those of its tasks."""
    decode_s: float
    device_s: float


class Worker:
    """A router, and one batch after the other. Images of the next ones are decoded beside the forward.

    Raises:
        RouterError, PearStoreError: the router cannot be made.
    """

    def __init__(self, settings: Settings) -> None:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        # what names a version is known, or asked at once: the run may know a version that came a moment ago
        cache = CacheSettings(limit_bytes=settings.cache_bytes, ttl_s=0.0)
        store = Store.open(settings.store, cache=cache)
        self._router = Router(
            settings.backbone, store, weights=settings.weights, device=settings.device,
            dtype=getattr(torch, settings.dtype), slot_bytes=settings.slot_bytes,
        )  # fmt: skip
        if self._router.backbone.digest != settings.digest:
            raise ClusterError(f"backbone {settings.backbone}: a worker has other weights than the run began with")
        self._store, self._top, self._threshold = store, settings.top, settings.threshold
        self._forwards = ThreadPool(1, "pear-forward")
        """One thread, because each one that computes has a team of threads of its own."""

    def ready(self) -> None:
        """Returns when the router is made."""

    def serve(self, asks: list[Ask], pixels: Sequence[Pixels | str] | None = None) -> Answer:
        """Runs a batch.

        Args:
            pixels: of each ask, as `decoded` gives them; None: the images are decoded here.
        """
        began = time.perf_counter()
        names = dict.fromkeys(task for ask in asks for task in ask.tasks if isinstance(task, str))
        self._store.prefetch(list(names))
        images = _decode(asks) if pixels is None else _tensors(pixels)
        with computing_alone():
            works = list(load(asks, images, self._router.device))
        loaded = time.perf_counter()
        device_s = self._forwards.submit(self._run, works).result()
        return Answer([ask.results for ask in asks], loaded - began, device_s)

    def _run(self, works: list[Work]) -> float:
        began = time.perf_counter()
        for work in works:
            serve(self._router, work, self._top, self._threshold)
        return time.perf_counter() - began


def decoded(asks: list[Ask]) -> list[Pixels | str]:
    """The pixels of each ask's image; of one that cannot be read, the error's text.

    Rows of one image and preprocessing are given the same array.
    """
    arrays: dict[int, Pixels] = {}
    return [
        str(image) if isinstance(image, ImageError) else arrays.setdefault(id(image), image.numpy())
        for image in _decode(asks)
    ]


def _decode(asks: list[Ask]) -> list[torch.Tensor | ImageError]:
    return decode([ask.image for ask in asks], [ask.way for ask in asks])


def _tensors(pixels: Sequence[Pixels | str]) -> list[torch.Tensor | ImageError]:
    """As `decode` gave them, before they were sent."""
    tensors: dict[int, torch.Tensor] = {}
    found: list[torch.Tensor | ImageError] = []
    for image in pixels:
        if isinstance(image, str):
            found.append(ImageError(image))
            continue
        if id(image) not in tensors:
            tensors[id(image)] = torch.from_numpy(image.copy())  # what came through Ray may not be written
        found.append(tensors[id(image)])
    return found


def shared_path(path: str | Path) -> str:
    """A path as the cluster's machines are told it; a URL as it is."""
    return str(path) if "://" in str(path) else str(Path(path).absolute())
