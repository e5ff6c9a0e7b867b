"""What tests of lists of images need."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from pear_store import Store, Task, make_task


def make_list_folder(folder: Path, task_maker: Callable[..., Task], shapes: Iterable[tuple[int, ...]]) -> None:
    """A store `s` with tasks that run (a, b) and some that do not, images `0.png` and on, and `broken.png`."""
    with Store.create(folder / "s") as store:
        good = task_maker("a", seed=1)
        store.add(good)
        store.add(task_maker("b", seed=2, classes=5, size=64))
        store.add(task_maker("features", seed=3, headless=True))
        other = {**good.record, "task": "foreign", "backbone": {"model": "vit_huge", "digest": "sha256:" + "a" * 64}}
        store.add(make_task(other, good.tensors))
    rng = np.random.default_rng(0)
    for i, shape in enumerate(shapes):
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"not an image")
