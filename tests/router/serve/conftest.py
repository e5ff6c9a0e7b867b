"""A store of tasks, pictures, and a router that can be held up."""

import asyncio
import shutil
import threading
from collections.abc import Callable, Coroutine, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from PIL import Image

from pear_store import Store, Task, make_task
from router import Backbone, Batch, Predictions, Router

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T], limit_s: float = 60) -> T:
    """Runs a test's coroutine; one that hangs fails."""

    async def limited() -> T:
        async with asyncio.timeout(limit_s):
            return await work

    return asyncio.run(limited())


async def until(condition: Callable[[], object]) -> None:
    """Waits until something holds; the test's own limit ends it otherwise."""
    while not condition():
        await asyncio.sleep(0.002)


def picture(seed: int, kind: str = "PNG", side: int = 40) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side + 10, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


PICTURES = [picture(seed) for seed in range(6)]


class HeldRouter(Router):
    """A router whose batches wait for `go`, and are noted; or fail with `error`."""

    go: threading.Event
    error: BaseException | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.go = threading.Event()
        self.ran: list[list[str]] = []

    def run_batch(self, batch: Batch, tasks: Any, **options: Any) -> Predictions:
        assert self.go.wait(60)
        self.ran.append([task.task.name for task in tasks])
        if self.error is not None:
            raise self.error
        return super().run_batch(batch, tasks, **options)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory, task_maker: Callable[..., Task]) -> Path:
    """A store that nobody changes: a to d for 48 pixels, wide for 64, features without head, foreign for another
    backbone."""
    where = tmp_path_factory.mktemp("serve") / "s"
    with Store.create(where) as store:
        for seed, name in enumerate("abcd"):
            store.add(task_maker(name, seed=seed, classes=3 + seed % 2))
        store.add(task_maker("wide", seed=9, classes=5, size=64))
        store.add(task_maker("features", seed=3, headless=True))
        good = task_maker("foreign", seed=4)
        other = {**good.record, "backbone": {"model": "vit_huge", "digest": "sha256:" + "a" * 64}}
        store.add(make_task(other, good.tensors))
    return where


@pytest.fixture(scope="session")
def shared(backbone: Backbone, template: Path) -> Iterator[Router]:
    """A router of that store, for tests that change neither."""
    with Router(backbone, template) as made:
        yield made


@pytest.fixture
def filled(tmp_path: Path, template: Path) -> Path:
    """A copy of that store."""
    return shutil.copytree(template, tmp_path / "s")


@pytest.fixture
def held(backbone: Backbone, filled: Path) -> Iterator[HeldRouter]:
    with HeldRouter(backbone, filled) as router:
        yield router
        router.go.set()


@pytest.fixture(scope="session")
def judging(backbone: Backbone, task_maker: Callable[..., Task]) -> Iterator[Router]:
    """A router of tasks whose thresholds the first picture's answer reaches (mild), or not (strict); a has none."""
    with Router(backbone) as made:
        for seed, name in enumerate(("a", "mild", "strict")):
            task = task_maker(name, seed=seed)
            made.add(task)
            best = made.run(PICTURES[0], name)[0].topk(1)[0][1]
            threshold = {"mild": best / 2, "strict": (1 + best) / 2}.get(name)
            if threshold is not None:
                made.add(make_task({**task.record, "threshold": threshold}, task.tensors))
        made.add(task_maker("features", seed=3, headless=True))
        yield made


@pytest.fixture
def router(backbone: Backbone, filled: Path) -> Iterator[Router]:
    with Router(backbone, filled) as made:
        yield made
