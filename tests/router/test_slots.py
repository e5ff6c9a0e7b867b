"""Slots: eviction, pinning, loading ahead, counters."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pear_store import Store, Task, Version
from router import Backbone, ClosedError, Router, SlotBudgetError, UnknownTaskError
from router.matrices import Gathered, Pool
from tests.helpers.predictions import whole

Maker = Callable[..., Task]
IMAGE = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def four(task_maker: Maker) -> dict[str, Task]:
    return {name: task_maker(name, seed=i) for i, name in enumerate("pqrs")}


def with_room_for(count: float, backbone: Backbone, tasks: dict[str, Task]) -> Router:
    with Router(backbone) as probe:
        probe.add(tasks["p"])
        probe.run(IMAGE, "p")
        size = probe.stats().size_bytes
    router = Router(backbone, slot_bytes=int(count * size))
    for task in tasks.values():
        router.add(task)
    return router


def test_counters(backbone: Backbone, four: dict[str, Task]) -> None:
    router = with_room_for(2.5, backbone, four)
    for name in "ppqpr":  # r takes the place of q
        router.run(IMAGE, name)
    found = router.stats()
    assert (found.hits, found.misses, found.loads, found.evictions, found.tasks) == (2, 3, 3, 1, 2)
    assert found.budget_bytes is not None
    assert 0 < found.size_bytes <= found.budget_bytes
    router.run(IMAGE, "q")
    assert router.stats().misses == 4


def test_pinned_tasks_stay(backbone: Backbone, four: dict[str, Task]) -> None:
    router = with_room_for(2.5, backbone, four)
    router.pin("p")
    for name in "qrsqrs":
        router.run(IMAGE, name)
    before = router.stats()
    router.run(IMAGE, "p")
    assert router.stats().hits == before.hits + 1
    with pytest.raises(SlotBudgetError):
        router.run(IMAGE.repeat(2, 1, 1, 1), ["q", "r"])
    with pytest.raises(SlotBudgetError):
        router.pin(["q", "r"])
    router.unpin(["p", "never pinned"])
    router.run(IMAGE.repeat(2, 1, 1, 1), ["q", "r"])
    router.run(IMAGE, "p")
    assert router.stats().misses > before.misses + 2
    with pytest.raises(UnknownTaskError, match="no task 'x'"):
        router.pin(["p", "x"])


def test_a_pin_follows_the_newest_version(backbone: Backbone, task_maker: Maker, store: Store) -> None:
    store.add(task_maker("t", seed=1))
    router = Router(backbone, store)
    router.pin("t")
    old = whole(router.run(IMAGE, "t"))
    store.add(task_maker("t", seed=2))
    router.refresh()
    assert not torch.allclose(whole(router.run(IMAGE, "t")), old)
    assert router.stats().tasks == 1


def test_loading_ahead_spares_a_miss_and_says_what_failed(backbone: Backbone, four: dict[str, Task]) -> None:
    router = with_room_for(2.5, backbone, four)
    router.preload(["p", "q"]).result(10)
    assert (router.stats().loads, router.stats().misses) == (2, 0)
    router.run(IMAGE.repeat(2, 1, 1, 1), ["p", "q"])
    assert (router.stats().hits, router.stats().misses) == (2, 0)
    with pytest.raises(UnknownTaskError, match="no task 'x'"):
        router.preload("x").result(10)
    with pytest.raises(SlotBudgetError):
        router.preload(list("pqr")).result(10)


@pytest.mark.slow
def test_loading_ahead_does_not_wait_for_the_forward(backbone: Backbone, four: dict[str, Task]) -> None:
    router = with_room_for(4, backbone, four)
    router.run(IMAGE, "q")  # positions are attached
    inside, go_on = threading.Event(), threading.Event()

    def block(*_: object) -> None:
        inside.set()
        assert go_on.wait(10)

    handle = router._adapted._module((48, 48)).get_submodule("blocks.3").register_forward_pre_hook(block)
    thread = threading.Thread(target=router.run, args=(IMAGE, "q"))
    thread.start()
    assert inside.wait(10)
    router.preload("p").result(10)
    assert router.stats().tasks == 2
    go_on.set()
    thread.join()
    handle.remove()


def test_a_budget_too_small_is_said_before_images_are_read(backbone: Backbone, four: dict[str, Task]) -> None:
    router = with_room_for(1.5, backbone, four)
    with pytest.raises(SlotBudgetError, match="the tasks of this batch need"):
        router.run(["nowhere.png"] * 2, ["p", "q"])
    with pytest.raises(SlotBudgetError):
        with_room_for(0.5, backbone, four).check("p")
    with pytest.raises(SlotBudgetError):
        with_room_for(0.5, backbone, four).run_all(IMAGE, ["p", "q"])
    everything = router.run_all(IMAGE, list("pqrs"))  # in parts
    for name, found in everything.items():
        torch.testing.assert_close(found.logits, router.run(IMAGE, name).logits, atol=1e-5, rtol=1e-5)


def test_refresh_keeps_what_did_not_change_and_says_what_did(
    backbone: Backbone, four: dict[str, Task], task_maker: Maker, store: Store
) -> None:
    for task in four.values():
        store.add(task)
    store.tag("r@1", "prod")
    router = Router(backbone, store)
    router.add(task_maker("added", seed=9))
    router.pin("q")
    router.preload(["p", "r@prod", "s", "added"]).result(10)
    assert router.refresh() == {}
    before = router.stats()
    store.add(task_maker("q", seed=11))
    store.add(task_maker("r", seed=12))
    store.remove("s")
    assert router.refresh() == {"q": 2, "s": None}
    after = router.stats()
    assert after.tasks == before.tasks - 1
    assert after.loads == before.loads + 1, "the pinned task's newer version, at once"
    assert after.evictions == 0, "only those for want of room are counted"
    store.tag("r@2", "prod")
    assert router.refresh() == {"r@prod": 2}
    assert router.stats().tasks == before.tasks - 2
    with Router(backbone, store) as fresh:
        for name in ("p", "q", "r@prod"):
            torch.testing.assert_close(router.run(IMAGE, name).logits, fresh.run(IMAGE, name).logits)
    with pytest.raises(UnknownTaskError, match="no task 's'"):
        router.run(IMAGE, "s")
    store.remove("q")
    assert router.refresh() == {"q": None}, "and no error, although it is pinned"


class SlowStore:
    """A store that has nothing to say of a task until it is told to go on."""

    def __init__(self, store: Store, task: str) -> None:
        self._store, self._task = store, task
        self.asked, self.go_on = threading.Event(), threading.Event()

    def resolve(self, reference: str) -> Version:
        found = self._store.resolve(reference)
        if reference == self._task:
            self.asked.set()
            assert self.go_on.wait(10)
        return found

    def get(self, reference: str, copy: bool = True) -> Task:
        return self._store.get(reference, copy)

    def refresh(self) -> None:
        self._store.refresh()


def test_nobody_waits_for_another_task_to_be_looked_up(
    backbone: Backbone, four: dict[str, Task], task_maker: Maker, store: Store
) -> None:
    for task in four.values():
        store.add(task)
    slow: Any = SlowStore(store, "q")
    router = Router(backbone, slow)
    router.run(IMAGE, "p")
    with ThreadPoolExecutor(1) as pool:
        cold = pool.submit(router.run, IMAGE, "q")
        try:
            assert slow.asked.wait(10)
            router.run(IMAGE, "p")
            router.run(IMAGE, "r")
            store.add(task_maker("q", seed=11))
            router.refresh()
        finally:
            slow.go_on.set()
        found = cold.result(10)
    with Router(backbone, store) as fresh:
        torch.testing.assert_close(found.logits, fresh.run(IMAGE, "q@2").logits)  # what was found before is too old


def test_closed(backbone: Backbone, four: dict[str, Task]) -> None:
    with with_room_for(4, backbone, four) as router:
        router.preload(list("pq"))
        router.run(IMAGE, "p")
    assert router.stats().size_bytes == 0
    for call in (
        lambda: router.run(IMAGE, "p"), lambda: router.run_all(IMAGE, ["p"]), lambda: router.preload("p"),
        lambda: router.pin("p"), lambda: router.check("p"),
    ):  # fmt: skip
        with pytest.raises(ClosedError, match="this router is closed"):
            call()
    router.close()


def test_a_batch_may_be_gathered_into_the_memory_of_another(backbone: Backbone, task_maker: Maker) -> None:
    """As recorded forwards do: of any mix of the same form."""
    router = Router(backbone)
    for i, name in enumerate("abc"):
        router.add(task_maker(name, seed=i, rank=(4, 3, 2)[i], activation=("identity", "relu", "gelu")[i]))
    router.preload(list("abc")).result(60)
    uses = [router._find(name).use for name in "abc"]

    def gathered(order: list[int], into: Gathered | None = None) -> Gathered:
        loaded = router._slots.find([uses[i] for i in dict.fromkeys(order)])
        assert loaded is not None
        numbers = {number: i for i, number in enumerate(dict.fromkeys(order))}
        runs = np.array([*(numbers[i] for i in order), -1])
        units = dict.fromkeys(router._adapted.widths, runs)
        return router._slots.matrices.gather(loaded, units, padded=True, into=into)

    held = gathered([0, 1, 2])
    for order in ([2, 2, 1], [1, 0, 0], [0, 0, 0], [2, 1, 0]):
        fresh, again = gathered(order), gathered(order, held)
        assert again is held
        for position, weights in fresh.weights.items():
            kept = held.weights[position]
            assert torch.equal(kept.down, weights.down) and torch.equal(kept.up, weights.up)
            assert isinstance(kept.activation, dict) and isinstance(weights.activation, dict)
            for name, mask in weights.activation.items():
                assert torch.equal(kept.activation[name], mask)


def test_rows_that_were_taken_keep_no_others_in_memory() -> None:
    pool = Pool(2, torch.device("cpu"), torch.float32)
    rows = pool.take(3)
    assert rows.base is None
    assert rows.tolist() == [1, 2, 3]


@given(st.lists(st.one_of(st.integers(1, 40), st.none()), max_size=30))
def test_pools_keep_what_was_put(steps: list[int | None]) -> None:
    """Against a dict: put a block, or free the oldest but one; no row is given twice, row 0 stays zero."""
    pool = Pool(2, torch.device("cpu"), torch.float32)
    held: list[tuple[list[int], float]] = []
    for number, count in enumerate(steps, 1):
        if count is not None:
            rows = pool.take(count)
            pool.put(rows, torch.full((count, 2), float(number)))
            held.append((rows.tolist(), float(number)))
        elif held:
            freed, _ = held.pop(1 if len(held) > 1 else 0)
            pool.free([torch.tensor(freed).numpy()])
    taken = [row for rows, _ in held for row in rows]
    assert len(set(taken)) == len(taken)
    assert 0 not in taken
    assert not pool.rows[0].any()
    for kept, value in held:
        assert (pool.rows[kept] == value).all()
