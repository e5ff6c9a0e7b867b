"""What a router keeps of a task: enough to make it again, and little beside what tasks of one layout share."""

import gc
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pear_store import RawTensor, Store, Task, make_task
from pear_store.format.manifest import to_manifest
from router import Backbone, Router
from router.layout import Layouts
from router.preprocess import Preprocess
from router.use import Use
from tests.helpers.makers import floats, record
from tests.router.test_cores import on_bases

Maker = Callable[..., Task]
POSITIONS = [f"blocks.{block}.{part}" for block in range(6) for part in ("attn", "mlp")]
WARM, TASKS = 70, 130
OBJECT_BYTES = 15_000
"""The most that a loaded task may take in Python objects. A layout for each task would make it 55,000."""


def use_of(task: Task, layouts: Layouts, read: Callable[[], Task] | None = None) -> Use:
    return Use.of(task, to_manifest(task), layouts, Preprocess(task.preprocess), read)


def bases() -> dict[str, RawTensor]:
    random = np.random.default_rng(0)
    return {"b.down": floats(random.normal(size=(12, 192, 2))), "b.up": floats(random.normal(size=(12, 2, 192)))}


def small(number: int, backbone: Backbone, common: dict[str, RawTensor]) -> Task:
    """A task as pear-train writes it: cores on stacked bases, and a record of its training."""
    random = np.random.default_rng(number)
    values = {"c.up": (12, 2, 2), "head.weight": (2, 192), "head.bias": (2,)}
    made = record(
        f"t{number}",
        format="pear-task/2",
        backbone={"model": backbone.name, "digest": backbone.digest},
        adapters={"c": {"down": "b.down", "up": "c.up", "basis": "b.up", "stack": 12}},
        positions={position: [["c", 1.0, place]] for place, position in enumerate(POSITIONS)},
        labels=[f"{number} no", f"{number} yes"],
        training={"method": "pear", "history": [{"loss": epoch / 7, "val_top1": 0.5} for epoch in range(50)]},
    )
    return make_task(made, {**common, **{name: floats(random.normal(size=size)) for name, size in values.items()}})


@pytest.mark.parametrize("source", ["added", "store"])
def test_a_loaded_task_takes_few_bytes_of_objects(backbone: Backbone, tmp_path: Path, source: str) -> None:
    common = bases()
    with Store.create(tmp_path / "s") as store:
        if source == "store":
            list(store.add_many(small(number, backbone, common) for number in range(WARM + TASKS)))
        router = Router(backbone, store, merge=False)

        def load(first: int, count: int) -> int:
            numbers = range(first, first + count)
            for number in numbers if source == "added" else ():
                router.add(small(number, backbone, common))
            names = [f"t{number}" for number in numbers]
            router.preload(names).result(120)
            router.run(torch.zeros(1, 3, 48, 48).expand(count, -1, -1, -1), names)
            store.add(small(1000 + first, backbone, common))  # so that the store forgets what it read
            router.refresh()
            router.preload(f"t{1000 + first}").result(120)
            gc.collect()
            return tracemalloc.get_traced_memory()[0]

        tracemalloc.start()
        try:
            before = load(0, WARM)
            a_task = (load(WARM, TASKS) - before) / TASKS
        finally:
            tracemalloc.stop()
        assert router.stats().tasks == WARM + TASKS + 2
        assert a_task < OBJECT_BYTES, a_task


def variants(task_maker: Maker) -> list[Task]:
    made = [
        on_bases("own", 1, own=2),
        on_bases("twice", 2, cores=2, activation="relu"),
        on_bases("codes", 3, bits=4),
        task_maker("plain", seed=4),
        task_maker("headless", seed=5, headless=True),
    ]
    unknown = {**made[0].record, "threshold": 0.25, "more": {"é": [1, 0.1, None, True]}}
    return [*made, make_task({**unknown, "task": "unknown"}, made[0].tensors)]


def test_a_task_can_be_made_again(task_maker: Maker) -> None:
    layouts = Layouts(torch.float32)
    for task in variants(task_maker):
        use = use_of(task, layouts)
        for made in (use.task, use.read()):
            assert to_manifest(made) == to_manifest(task)
            assert {raw.digest: bytes(raw.data) for raw in made.tensors.values()} == {
                raw.digest: bytes(raw.data) for raw in task.tensors.values()
            }
            made.record["positions"].clear()  # it is the caller's own
        assert to_manifest(use.task) == to_manifest(task)
        assert (use.name, use.labels, use.threshold) == (task.name, task.labels, task.threshold)


def test_a_stored_task_has_its_record_and_no_bytes(backbone: Backbone, store: Store, task_maker: Maker) -> None:
    store.add(task_maker("t"))
    expected = store.get("t")
    found = Router(backbone, store).lookup("t")
    assert found.task.record == expected.record
    shapes = {name: (raw.dtype, raw.shape, raw.digest) for name, raw in expected.tensors.items()}
    assert {name: (raw.dtype, raw.shape, raw.digest) for name, raw in found.task.tensors.items()} == shapes
    assert not any(raw.data for raw in found.task.tensors.values())
    assert all(raw.data for raw in found.use.read().tensors.values())


def test_tasks_of_one_form_share_a_layout(task_maker: Maker) -> None:
    layouts = Layouts(torch.float32)
    one, other = use_of(on_bases("a", 1), layouts), use_of(on_bases("b", 2, bases="v2"), layouts)
    assert one.layout is other.layout
    assert one.stands is not other.stands
    assert one.stands is use_of(on_bases("c", 3), layouts).stands
    assert not set(one.keys()) & set(other.keys())
    changed: list[dict[str, Any]] = [{"classes": 4}, {"activation": "relu"}, {"own": 1}, {"rank": (6, 5)}, {"bits": 8}]
    for change in changed:
        assert use_of(on_bases("d", 4, **change), layouts).layout is not one.layout
    assert len(layouts._layouts) == 1, "a layout goes with its last task"


def test_equal_tensors_make_another_layout() -> None:
    """Two positions that have one core are not two positions with a core each."""
    task = on_bases("a", 1)
    same = make_task(task.record, {**task.tensors, "c1.0": task.tensors["c0.0"]})
    layouts = Layouts(torch.float32)
    uses = [use_of(one, layouts) for one in (task, same)]
    assert uses[0].layout is not uses[1].layout
    assert len(uses[0].keys()) == len(uses[1].keys()) + 1
