"""The batcher: answers, batches, fairness, refusals, ends."""

import asyncio
import gc
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from pear_store import Store, Task
from router import Backbone, ImageError, Prediction, Router, RouterError, UnknownTaskError, WrongBackboneError
from router.registry import Known
from router.serve.batcher import Batcher
from router.serve.errors import (
    DeadlineError,
    DeviceFailedError,
    DrainingError,
    OutOfMemoryError,
    QueueFullError,
    ServeError,
)
from router.serve.flow import Watch
from tests.router.serve.conftest import PICTURES, HeldRouter, run, until


def assert_same(found: Prediction, expected: Prediction) -> None:
    assert (found.task, found.version, found.classes, found.error) == (
        expected.task, expected.version, expected.classes, expected.error,
    )  # fmt: skip
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)


def test_an_answer_is_what_run_says_of_image_and_task_alone(shared: Router) -> None:
    tasks = ["a", "b@1", "wide", "features", "c", "d", "a", "wide@1"]

    async def work() -> list[Prediction]:
        batcher = Batcher(shared)
        found = await asyncio.gather(*(batcher.predict(PICTURES[i % 6], task) for i, task in enumerate(tasks)))
        assert await batcher.close(10)
        return found

    for i, (task, found) in enumerate(zip(tasks, run(work()), strict=True)):
        assert_same(found, shared.run(PICTURES[i % 6], task)[0])


@pytest.mark.slow
def test_many_clients_while_tasks_come_go_and_get_new_versions(
    tmp_path: Path, backbone: Backbone, task_maker: Callable[..., Task]
) -> None:
    """Every answer is that of the version it names, which is one that was there."""
    count, clients, each = 24, 32, 10
    names = [f"t{i}" for i in range(count)]
    with Store.create(tmp_path / "s") as store:
        for seed, name in enumerate(names):
            store.add(task_maker(name, seed=seed, classes=2 + seed % 3, size=32 + 16 * (seed % 2)))
        size = store.resolve("t0").size_bytes
    changes: list[int] = []
    answers: list[tuple[int, str, Prediction]] = []

    async def client(number: int, batcher: Batcher) -> None:
        chosen = random.Random(number)
        for _ in range(each):
            image, task = chosen.randrange(6), chosen.choice(names)
            if chosen.random() < 0.1:
                some = chosen.sample(names, 5)
                found = await batcher.predict_all(PICTURES[image], some)
                answers.extend((image, name, one) for name, one in zip(some, found, strict=True))
            else:
                answers.append((image, task, await batcher.predict(PICTURES[image], task)))

    async def change(router: Router, done: asyncio.Event) -> None:
        with Store(tmp_path / "s") as store:
            while not done.is_set():
                name = names[len(changes) % count]
                # the size of pictures changes, too
                store.add(task_maker(name, seed=100 + len(changes), classes=2, size=32 + 16 * (len(changes) % 2)))
                await asyncio.to_thread(router.refresh)
                changes.append(1)
                await asyncio.sleep(0.02)

    async def work(router: Router) -> None:
        batcher, done = Batcher(router, max_batch=16), asyncio.Event()
        changing = asyncio.create_task(change(router, done))
        await asyncio.gather(*(client(number, batcher) for number in range(clients)))
        done.set()
        await changing
        assert await batcher.close(10)

    with Router(backbone, tmp_path / "s", slot_bytes=8 * size) as router:
        run(work(router))
        assert router.stats().evictions > 0
    assert len(answers) >= clients * each
    assert len(changes) > 3
    assert any(found.version != 1 for _, _, found in answers)
    with Router(backbone, tmp_path / "s") as alone:
        for image, task, found in answers:
            expected = alone.run(PICTURES[image], f"{task}@{found.version}")[0]
            assert found.task == task
            assert (found.classes, found.error) == (expected.classes, None)
            torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)


def test_what_waits_when_the_device_becomes_free_is_one_batch(held: HeldRouter) -> None:
    async def work() -> None:
        held.preload(list("abcd")).result()
        batcher = Batcher(held, max_batch=4, workers=1)
        first = asyncio.create_task(batcher.predict(PICTURES[0], "a"))
        await until(lambda: batcher._flow.running)  # a lone request does not wait for others
        later = [asyncio.create_task(batcher.predict(PICTURES[i], task)) for i, task in enumerate("bcdab")]
        await until(lambda: len(batcher._flow.ready) == 5)
        assert batcher.waiting == 5
        held.go.set()
        await asyncio.gather(first, *later)
        await batcher.close()

    run(work())
    assert held.ran == [["a"], ["b", "c", "d", "a"], ["b"]]


def test_rows_of_unlike_preprocessing_and_size(held: HeldRouter) -> None:
    async def work() -> None:
        held.preload(["a", "b", "c", "wide"]).result()
        batcher = Batcher(held, workers=1)
        asked = [asyncio.create_task(batcher.predict(PICTURES[0], t)) for t in ("a", "wide", "b", "wide@1", "c")]
        await until(lambda: len(batcher._flow.ready) + len(batcher._flow.running) == 5)
        held.go.set()
        await asyncio.gather(*asked)
        await batcher.close()

    run(work())
    assert held.ran == [["a"], ["wide", "wide"], ["b", "c"]]


def test_one_image_through_many_tasks_is_one_batch(held: HeldRouter) -> None:
    tasks = ["a", "b", "zebra", "c", "d", "a@1", "foreign"]
    held.go.set()

    async def work() -> list[Prediction]:
        batcher = Batcher(held, max_batch=2)
        found = await batcher.predict_all(PICTURES[1], tasks)
        await batcher.close()
        return found

    found = run(work())
    assert held.ran == [["a", "b", "c", "d", "a"]]
    expected = held.run([PICTURES[1]] * len(tasks), tasks, on_error="return")
    for one, other in zip(found, expected, strict=True):
        if other.error is None:
            assert_same(one, other)
        else:
            assert (one.task, one.error, one.label) == (other.task, other.error, None)


def test_a_flood_of_one_task_starves_no_other(held: HeldRouter) -> None:
    async def work() -> None:
        batcher = Batcher(held, max_batch=4, workers=1)
        flood = [asyncio.create_task(batcher.predict(PICTURES[0], f"a@{1}" if i % 2 else "a")) for i in range(60)]
        await until(lambda: len(batcher._flow.waiting))
        others = [asyncio.create_task(batcher.predict(PICTURES[0], task)) for task in "bcd"]
        await until(lambda: batcher.waiting == 62)
        held.go.set()
        await asyncio.gather(*others)
        assert sum(task.done() for task in flood) < 30
        await asyncio.gather(*flood)
        await batcher.close()

    run(work())
    # what was decoded before the others came is at most two batches
    assert {"b", "c", "d"} <= {task for batch in held.ran[:5] for task in batch}


def test_a_flood_that_fills_the_queue_shuts_no_other_task_out(held: HeldRouter) -> None:
    async def work() -> None:
        batcher = Batcher(held, max_batch=1, queue=12, workers=1)
        flood = [batcher.submit([(PICTURES[0], ["a"])])[0] for _ in range(12)]
        await until(lambda: batcher.waiting == 11)
        flood += batcher.submit([(PICTURES[0], ["a"])])
        with pytest.raises(QueueFullError):  # of its own kind, none gives way
            batcher.submit([(PICTURES[0], ["a"])])
        flood[12].cancel()
        (other,) = batcher.submit([(PICTURES[0], ["b"])])  # before the batcher has heard of it
        pair = asyncio.create_task(batcher.predict_all(PICTURES[0], ["c", "d"]))
        await until(lambda: sum(one.done() for one in flood) == 2)
        assert [number for number, one in enumerate(flood) if one.done()] == [11, 12]  # the newest
        assert batcher.waiting == 12
        held.go.set()
        found = await asyncio.gather(*flood, return_exceptions=True)
        assert not any(isinstance(one, BaseException) for one in found[:11])
        assert [type(one) for one in found[11:]] == [QueueFullError, asyncio.CancelledError]
        assert isinstance((await other)[0], Prediction)
        assert [one.error for one in await pair] == [None, None]
        await batcher.close()

    run(work())


def test_max_wait_only_adds(held: HeldRouter) -> None:
    held.go.set()

    async def work() -> None:
        batcher = Batcher(held, max_batch=3, max_wait_ms=3_600_000, workers=1)
        asked = [asyncio.create_task(batcher.predict(PICTURES[0], task)) for task in "ab"]
        await until(lambda: len(batcher._flow.ready) == 2)
        await asyncio.sleep(0.05)
        assert not held.ran
        await asyncio.gather(*asked, batcher.predict(PICTURES[0], "c"))  # now it is full
        last = asyncio.create_task(batcher.predict(PICTURES[0], "d"))
        await until(lambda: len(batcher._flow.ready) == 1)
        assert await batcher.close(10)  # nothing more will come
        await last
        soon = Batcher(held, max_wait_ms=5)
        await soon.predict(PICTURES[0], "a")
        await soon.close()

    run(work())
    assert held.ran == [["a", "b", "c"], ["d"], ["a"]]


@pytest.mark.parametrize(
    ("image", "task", "kind", "text"),
    [
        (b"not an image", "a", ImageError, "not an image"),
        (PICTURES[0][:200], "a", ImageError, "cannot be read"),
        (PICTURES[0], "zebra", UnknownTaskError, "no task 'zebra'"),
        (PICTURES[0], "a@7", UnknownTaskError, "no version 7"),
        (PICTURES[0], "../a", UnknownTaskError, "is no task or version"),
        (PICTURES[0], "foreign", WrongBackboneError, "vit_huge"),
    ],
)
def test_what_is_bad_ends_alone(shared: Router, image: bytes, task: str, kind: type[Exception], text: str) -> None:
    async def work() -> list[Any]:
        batcher = Batcher(shared)
        asked = [(PICTURES[0], "a"), (image, task), (PICTURES[1], "b")]
        found = await asyncio.gather(*(batcher.predict(*one) for one in asked), return_exceptions=True)
        await batcher.close()
        return found

    first, bad, last = run(work())
    assert isinstance(bad, kind)
    assert text in str(bad)
    assert_same(first, shared.run(PICTURES[0], "a")[0])
    assert_same(last, shared.run(PICTURES[1], "b")[0])


def test_a_task_that_cannot_be_loaded_answers_for_itself(held: HeldRouter, filled: Path) -> None:
    """Its version was removed after it was looked up, and its pack is gone."""

    async def work() -> list[Any]:
        batcher = Batcher(held)
        blocked = asyncio.create_task(batcher.predict(PICTURES[0], "a"))
        await until(lambda: batcher._flow.running)
        held.lookup("b")
        held._registry._read.clear()
        with Store(filled) as store:
            store.remove("b")
            store.gc()
        asked = [asyncio.create_task(batcher.predict(PICTURES[0], task)) for task in "bc"]
        await until(lambda: len(batcher._flow.ready) == 2)
        held.go.set()
        found = await asyncio.gather(blocked, *asked, return_exceptions=True)
        assert batcher.failed is None
        await batcher.close()
        return found

    a, b, c = run(work())
    assert isinstance(b, UnknownTaskError)
    assert isinstance(a, Prediction)
    assert isinstance(c, Prediction)


def test_a_full_queue_refuses_at_once_and_all_or_none(held: HeldRouter) -> None:
    async def work() -> None:
        batcher = Batcher(held, queue=3, workers=1)
        running = asyncio.create_task(batcher.predict(PICTURES[0], "a"))
        await until(lambda: batcher._flow.running)
        asked = [asyncio.create_task(batcher.predict(PICTURES[0], "a")) for _ in range(2)]
        await until(lambda: batcher.waiting == 2)
        with pytest.raises(QueueFullError, match=r"^images that wait: 2, the limit is 3: try again in 1 s$"):
            batcher.submit([(PICTURES[0], ["a"])] * 2)
        assert batcher.waiting == 2
        asked.append(asyncio.create_task(batcher.predict(PICTURES[0], "b")))
        await until(lambda: batcher.waiting == 3)
        with pytest.raises(QueueFullError):
            await batcher.predict(PICTURES[0], "c")
        asked.pop().cancel()  # whoever gives up makes room
        await until(lambda: batcher.waiting == 2)
        asked.append(asyncio.create_task(batcher.predict(PICTURES[0], "d")))
        await until(lambda: len(batcher._flow.ready) == 3)
        held.go.set()
        await asyncio.gather(running, *asked)
        await batcher.close()

    run(work())
    assert sorted(task for batch in held.ran for task in batch) == ["a", "a", "a", "d"]


def test_what_is_given_up_costs_no_forward(held: HeldRouter) -> None:
    async def work() -> None:
        batcher = Batcher(held, workers=1)
        running = asyncio.create_task(batcher.predict(PICTURES[0], "a"))
        await until(lambda: batcher._flow.running)
        cancelled = asyncio.create_task(batcher.predict(PICTURES[0], "b"))
        late = asyncio.create_task(batcher.predict(PICTURES[0], "c", timeout_s=0.01))
        kept = asyncio.create_task(batcher.predict(PICTURES[0], "d", timeout_s=60))
        await until(lambda: len(batcher._flow.ready) + late.done() == 3)
        cancelled.cancel()
        with pytest.raises(
            DeadlineError, match=r"^no answer within 0.01 s: try again later, or send fewer images at once$"
        ):
            await late
        held.go.set()
        await asyncio.gather(running, kept)
        assert cancelled.cancelled()
        assert not batcher._open
        await batcher.close()

    run(work())
    assert held.ran == [["a"], ["d"]]


def test_one_that_is_given_up_in_its_batch_harms_nobody(held: HeldRouter) -> None:
    async def work() -> None:
        batcher = Batcher(held, workers=1)
        first = asyncio.create_task(batcher.predict(PICTURES[0], "a"))
        await until(lambda: batcher._flow.running)
        first.cancel()
        second = asyncio.create_task(batcher.predict(PICTURES[0], "b"))
        await until(lambda: len(batcher._flow.ready))
        assert batcher.waiting == 1
        held.go.set()
        await second
        await batcher.close()

    run(work())


def test_tasks_are_loaded_while_others_run(held: HeldRouter) -> None:
    loads = []

    class Noting(Watch):
        def loaded(self, seconds: float) -> None:
            loads.append(seconds)

    async def work() -> None:
        batcher = Batcher(held, watch=Noting())
        running = asyncio.create_task(batcher.predict(PICTURES[0], "a"))
        await until(lambda: batcher._flow.running)
        later = asyncio.create_task(batcher.predict(PICTURES[0], "b"))
        await until(lambda: len(batcher._flow.ready))
        assert held.is_loaded("b")
        assert not held.ran
        held.go.set()
        await asyncio.gather(running, later)
        await batcher.close()

    run(work())
    assert len(loads) == 2
    assert held.stats().misses == 0


def test_a_batch_has_only_tasks_that_fit_the_slots(backbone: Backbone, filled: Path) -> None:
    with Router(backbone, filled) as probe:
        probe.preload(["a", "b"]).result()
        size = probe.stats().size_bytes
    with HeldRouter(backbone, filled, slot_bytes=size) as held:

        async def work() -> None:
            batcher = Batcher(held)
            asked = [asyncio.create_task(batcher.predict(PICTURES[0], task)) for task in "abcdabcd"]
            await until(
                lambda: len(batcher._flow.running) + len(batcher._flow.ready) + len(batcher._flow.prepared) == 8
            )
            held.go.set()
            await asyncio.gather(*asked)
            # tasks that do not fit together at all take turns within the batch
            found = await batcher.predict_all(PICTURES[0], list("abcd"))
            assert not [one.error for one in found if one.error]
            await batcher.close()

        run(work())
        assert all(len(set(batch)) <= 2 for batch in held.ran[:-1])
        assert held.ran[-1] == list("abcd")


def test_closing_finishes_what_waits(held: HeldRouter) -> None:
    async def work() -> None:
        batcher = Batcher(held, max_batch=1, workers=1)
        asked = [asyncio.create_task(batcher.predict(PICTURES[0], task)) for task in "abc"]
        await until(lambda: batcher._flow.running)
        closing = asyncio.create_task(batcher.close(30))
        await until(lambda: batcher.draining)
        with pytest.raises(DrainingError):
            await batcher.predict(PICTURES[0], "d")
        held.go.set()
        assert await closing
        assert all(one.label for one in await asyncio.gather(*asked))

    run(work())
    assert sorted(task for batch in held.ran for task in batch) == list("abc")  # loaded in any order


def test_what_is_not_finished_in_time_is_told_so(held: HeldRouter) -> None:
    async def work() -> None:
        batcher = Batcher(held, workers=1)
        asked = [asyncio.create_task(batcher.predict(PICTURES[0], task)) for task in "ab"]
        await until(lambda: batcher._flow.running)
        assert not await batcher.close(0.01)
        for one in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(one, DrainingError)
        held.go.set()

    run(work())


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: device-side assert"), SystemExit(3), KeyError("x")])
def test_a_device_that_fails_fails_all_who_wait(held: HeldRouter, error: BaseException) -> None:
    held.error = error

    async def work() -> None:
        batcher = Batcher(held, workers=1)
        asked = [asyncio.create_task(batcher.predict(PICTURES[0], task)) for task in "ab"]
        await until(lambda: batcher._flow.running)
        assert batcher.failed is None
        held.go.set()
        for one in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(one, DeviceFailedError)
            assert str(one).startswith("the device's thread ended: ")
        assert batcher.failed is error
        with pytest.raises(DeviceFailedError):
            await batcher.predict(PICTURES[0], "a")
        await batcher.close(1)

    run(work())


def test_a_batch_without_memory_is_halved(backbone: Backbone, filled: Path) -> None:
    class Small(HeldRouter):
        def run_batch(self, batch: Any, tasks: Any, **options: Any) -> Any:
            found = super().run_batch(batch, tasks, **options)
            if len(tasks) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return found

    with Small(backbone, filled) as held:

        async def work() -> None:
            batcher = Batcher(held, workers=1)
            asked = [asyncio.create_task(batcher.predict(PICTURES[0], task)) for task in "abcd"]
            await until(lambda: len(batcher._flow.running) + len(batcher._flow.ready) == 4)
            held.go.set()
            assert all(one.label for one in await asyncio.gather(*asked))
            (answer,) = batcher.submit([(PICTURES[0], ["a", "b"])])
            assert all(isinstance(one, OutOfMemoryError) for one in await answer)
            assert batcher.failed is None
            await batcher.close()

        run(work())


def test_arguments_are_checked(shared: Router) -> None:
    for options in ({"max_batch": 0}, {"queue": 0}, {"workers": 0}, {"max_wait_ms": -1}, {"max_wait_ms": float("nan")}):
        with pytest.raises(RouterError, match="expected at least"):
            Batcher(shared, **options)
    batcher = Batcher(shared)

    async def none() -> None:
        with pytest.raises(RouterError, match="expected at least one task for each image"):
            await batcher.predict_all(PICTURES[0], [])
        await batcher.warm_up()

    async def other() -> None:
        with pytest.raises(RouterError, match="another event loop"):
            await batcher.predict(PICTURES[0], "a")
        await batcher.close()

    run(none())
    run(other())
    assert issubclass(ServeError, RouterError)


def test_closed_batchers_leave_no_thread(shared: Router) -> None:
    async def work() -> None:
        batcher = Batcher(shared)
        await batcher.predict(PICTURES[0], "a")
        await batcher.close()

    run(work())
    gc.collect()
    mine = [thread for thread in threading.enumerate() if thread.name.startswith("pear-serve")]
    for thread in mine:
        thread.join(10)
        assert not thread.is_alive()


def test_images_whose_tasks_are_being_looked_up_shut_no_other_task_out(held: HeldRouter) -> None:
    looking = threading.Event()
    plain = held.lookup

    def slow(task: str) -> Known:
        if task == "a":
            assert looking.wait(30)
        return plain(task)

    async def work() -> None:
        batcher = Batcher(held, max_batch=1, queue=12, workers=1)
        near = held.is_near
        with patch.object(held, "lookup", slow), patch.object(held, "is_near", lambda one: one != "a" and near(one)):
            flood = [batcher.submit([(PICTURES[0], ["a"])])[0] for _ in range(12)]
            with pytest.raises(QueueFullError):
                batcher.submit([(PICTURES[0], ["a"])])
            (other,) = batcher.submit([(PICTURES[0], ["b"])])
            assert [number for number, one in enumerate(flood) if one.done()] == [11]
            held.go.set()
            assert isinstance((await other)[0], Prediction)
            looking.set()
            found = await asyncio.gather(*flood, return_exceptions=True)
        assert [type(one) for one in found[11:]] == [QueueFullError]
        assert not any(isinstance(one, BaseException) for one in found[:11])
        assert len(batcher._flow.looking) == 0
        await batcher.close()

    run(work())


def test_names_that_are_slow_to_look_up_hold_up_no_other_work_of_the_loop(held: HeldRouter) -> None:
    go = threading.Event()

    def slow(task: str) -> None:
        assert go.wait(30)

    async def work() -> None:
        batcher = Batcher(held)
        with patch.object(held, "lookup", slow):
            asked = [asyncio.create_task(batcher.lookup("a")) for _ in range(16)]
            await asyncio.sleep(0)
            assert await asyncio.wait_for(asyncio.to_thread(str, 1), 10) == "1"
            go.set()
            await asyncio.gather(*asked)
        held.go.set()
        await batcher.close(10)
        with pytest.raises(DrainingError):
            await batcher.lookup("a")

    run(work())
