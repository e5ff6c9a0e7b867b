"""The code that runs on a cluster's machines: workers with one router each, and decoding of images on any core."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from pear_store import PearStoreError, Store
from pear_store.pools import ThreadPool
from pear_store.remote.cache import CacheSettings
from router import ImageError, Router, decode
from router.cluster.session import ClusterError, one_line
from router.errors import RouterError
from router.infer.plan import AHEAD, Ask, Result, Times, Work, load
from router.infer.work import serve
from router.pictures import ImageLike
from router.predictions import Threshold
from router.preprocess import Preprocess, Spent
from router.threads import computing_alone

AT_ONCE = 1 + AHEAD
"""Batches in a worker at once: one in its forward, and those that are decoded meanwhile."""
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Settings:
    """The settings of all workers."""

    backbone: str
    weights: str | None
    digest: str
    """Digest of the backbone in the main process."""
    store: str
    """A folder that all machines see, or a URL."""
    cache_bytes: int | None
    device: str
    dtype: str
    slot_bytes: int | None
    top: int
    """Number of classes in `topk`."""
    threshold: Threshold
    threads: int | None = None
    """Number of threads of a forward. None: torch's default."""


@dataclass(frozen=True)
class Answer:
    """The answers for a batch."""

    results: list[list[Result]]
    """For each ask, the results of its tasks."""
    seconds: dict[str, float]
    """Where the time went: `Times.seconds` of this batch."""


class Worker:
    """Serves batches with one router, one after another. Images of the next batches are decoded during a forward."""

    def __init__(self, settings: Settings) -> None:
        self._failed: str | None = None
        """Why the router cannot be made. Ray would print a whole trace if this raised it."""
        try:
            self._make(settings)
        except (RouterError, PearStoreError) as error:
            self._failed = str(error)
        except Exception as error:
            self._failed = f"{type(error).__name__}: {one_line(error)}"

    def _make(self, settings: Settings) -> None:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        # ttl_s=0: the main process may know a version that is newer than this worker's last look at the remote
        cache = CacheSettings(limit_bytes=settings.cache_bytes, ttl_s=0.0)
        store = Store.open(settings.store, cache=cache)
        self._router = Router(
            settings.backbone, store, weights=settings.weights, device=settings.device,
            dtype=getattr(torch, settings.dtype), slot_bytes=settings.slot_bytes,
        )  # fmt: skip
        if self._router.backbone.digest != settings.digest:
            raise ClusterError(
                f"backbone {settings.backbone}: expected digest {settings.digest[:19]}…, a worker has "
                f"{self._router.backbone.digest[:19]}…: give all machines the same weights"
            )
        self._store, self._top, self._threshold = store, settings.top, settings.threshold
        self._forwards = ThreadPool(1, "pear-forward")
        """Only one thread, because each thread that computes gets its own team of threads."""

    def ready(self) -> None:
        """Returns when the router is made.

        Raises:
            ClusterError: it cannot be made.
        """
        if self._failed is not None:
            raise ClusterError(f"on {socket.gethostname()}: {self._failed}")

    def serve(self, asks: list[Ask], images: list[Any], spent: tuple[float, float] | None = None) -> Answer:
        """Runs a batch.

        Args:
            asks: without their images.
            images: one reference of Ray's, to the images or to what `decoded` made of them. It comes in a list, so
                that this call fetches it and not Ray before the call: then its time can be told.
            spent: seconds that reading and decoding took; None: the images are to be decoded here.
        """
        self.ready()
        times = Times(spent=Spent(*spent or ()))
        names = dict.fromkeys(task for ask in asks for task in ask.tasks if isinstance(task, str))
        self._store.prefetch(list(names))
        found = times.timed("transfer_s", ray.get, images[0])
        pixels = decode(found, [ask.way for ask in asks], times.spent) if spent is None else _tensors(found)
        with computing_alone():
            works: list[Work] = times.timed("transfer_s", list, load(asks, pixels, self._router.device))
        self._forwards.submit(times.timed, "device_s", self._run, works).result()
        return Answer([ask.results for ask in asks], times.seconds())

    def _run(self, works: list[Work]) -> None:
        for work in works:
            serve(self._router, work, self._top, self._threshold)


def decoded(images: list[ImageLike], ways: list[Preprocess]) -> tuple[tuple[float, float], list[Pixels | str]]:
    """Seconds that reading and decoding took, and each image's pixels, uint8 [3, h, w], or its error's text.

    One path or object with the same preprocessing gives one array.
    """
    arrays: dict[int, Pixels] = {}
    spent = Spent()
    pixels = [
        str(image) if isinstance(image, ImageError) else arrays.setdefault(id(image), image.numpy())
        for image in decode(images, ways, spent)
    ]
    return (spent.read_s, spent.decode_s), pixels


def _tensors(pixels: Sequence[Pixels | str]) -> list[torch.Tensor | ImageError]:
    """The images as `decode` gave them, made again after Ray sent them."""
    tensors: dict[int, torch.Tensor] = {}
    found: list[torch.Tensor | ImageError] = []
    for image in pixels:
        if isinstance(image, str):
            found.append(ImageError(image))
            continue
        if id(image) not in tensors:
            tensors[id(image)] = torch.from_numpy(image.copy())  # arrays from Ray are read-only
        found.append(tensors[id(image)])
    return found


def shared_path(path: str | Path) -> str:
    """The absolute path, for other machines. A URL stays the same."""
    return str(path) if "://" in str(path) else str(Path(path).absolute())
