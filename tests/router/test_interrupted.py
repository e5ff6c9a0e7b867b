"""Ctrl-C or want of memory at every line of the router: what it answers afterwards is what a fresh router answers."""

import linecache
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

import router as package
from pear_store import Store, Task
from router import AdaptedBackbone, Backbone, ClosedError, Router
from tests.helpers.predictions import whole

pytestmark = pytest.mark.slow

Maker = Callable[..., Task]
Act = Callable[[Router], object]
INTERRUPTS = int(os.environ.get("PEAR_INTERRUPTS", "5"))
"""How many of a call's lines are interrupted, each when it runs first and when it runs last."""
ROUTER = str(Path(package.__file__).parent) + os.sep
LINEARS = ("blocks.0.attn.qkv", "blocks.3.attn.proj")
IMAGES = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
ONE = IMAGES[:1].expand(4, -1, -1, -1)
NAMES = ["p", "q", "r", "lin"]
LEVELS: dict[str, AdaptedBackbone] = {}


class Lines:
    """Counts the lines of router that run, and raises an error at one of them.

    Where a `with` statement is left, Python traces its line once more, before what leaves it has been called. No signal
    arrives there, so these events do not count: an error there would leave any lock locked.

    Args:
        threads: look at threads that start now, too.
    """

    def __init__(self, stop_at: int = -1, error: type[BaseException] = KeyboardInterrupt, threads: bool = True) -> None:
        self.seen: list[tuple[str, int]] = []
        self._stop_at, self._error, self._threads = stop_at, error, threads
        self._lines: dict[FrameType, int] = {}

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(ROUTER):
            return None
        before, now = self._lines.get(frame, 0), frame.f_lineno
        self._lines[frame] = now
        leaves = before > now and linecache.getline(frame.f_code.co_filename, now).lstrip().startswith("with ")
        if event == "line" and not leaves:
            self.seen.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.seen) - 1 == self._stop_at:
                raise self._error
        return self._trace

    def __enter__(self) -> "Lines":
        self._before = sys.gettrace()
        if self._threads:
            threading.settrace(self._trace)
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)
        threading.settrace(None)
        self._lines.clear()  # of frames, which hold all that they hold


def chosen(seen: list[tuple[str, int]]) -> list[int]:
    first = {line: i for i, line in reversed(list(enumerate(seen)))}
    last = {line: i for i, line in enumerate(seen)}
    events = sorted({*first.values(), *last.values()})
    return events[:: max(1, len(events) // INTERRUPTS)]


def with_levels(router: Router, backbone: Backbone) -> Router:
    """A router that knows already where its backbone's blocks lie: finding that takes longer than all else."""
    known = LEVELS.setdefault("known", AdaptedBackbone(backbone, torch.device("cpu"), torch.float32))
    router._adapted.__dict__.update(_blocks=known._blocks, levels=known.levels)
    return router


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, task_maker: Maker) -> Iterator[tuple[Store, Store]]:
    """Of the second, q is newer, and s is gone."""
    where = tmp_path_factory.mktemp("interrupted")
    with Store.create(where / "old") as old, Store.create(where / "new") as new:
        for store, seed in ((old, 2), (new, 7)):
            store.add(task_maker("p", seed=1))
            store.add(task_maker("q", seed=seed, activation="relu", rank=3))
            store.add(task_maker("r", seed=3, positions=("blocks.1.mlp", "blocks.2.mlp")))
            store.add(linear(task_maker, "lin"))
            if store is old:
                store.add(task_maker("s", seed=1, classes=5))
        yield old, new


def linear(task_maker: Maker, name: str) -> Task:
    made = task_maker(name, seed=4, positions=LINEARS)
    return Task({**made.record, "positions": {p: made.record["positions"][p] for p in LINEARS}}, made.tensors)


def answers(router: Router) -> list[torch.Tensor]:
    mixed = router.run(IMAGES, NAMES).logits
    shared = router.run_all(ONE[:2], NAMES[:3])
    alone = router.run(IMAGES, "lin").logits  # merged, where the router merges
    return [*mixed, *(values for found in shared.values() for values in found.logits), *alone]


def check_books(router: Router) -> None:
    """Every row of a pool is free or of an entry that a task uses, never both."""
    slots = router._slots
    size = slots.stats.size_bytes
    used = {entry.key: part.size_bytes for loaded in slots._tasks.values() for part, entry in loaded.parts}
    assert size == sum(used.values())
    assert slots._entries.keys() == used.keys()
    for (side, width), pool in slots.matrices.pools.items():
        taken = [
            entry.values
            for loaded in slots._tasks.values()
            for part, entry in loaded.parts
            if (part.side, part.shape[1]) == (side, width)
        ]
        busy = np.unique(np.concatenate([np.arange(1), *taken]))
        assert sorted([*busy.tolist(), *pool._free.tolist()]) == list(range(len(pool.rows)))
        assert not pool.rows[0].any()


def load(router: Router) -> object:
    return router.run(IMAGES[:2], ["p", "q"])


def attach(router: Router) -> object:
    return router.run(IMAGES[:1], "r")


def share(router: Router) -> object:
    return router.run_all(ONE[:2], ["p", "q", "r"])


def evict(router: Router) -> object:
    return router.run(IMAGES[:2], ["r", "lin"])


def preload(router: Router) -> object:
    return router.preload(["p", "q"]).result(30)


def pin(router: Router) -> None:
    router.pin(["q", "r"])


def merge(router: Router) -> object:
    return router.run(IMAGES, "lin")


def forward(router: Router) -> object:
    return router.run(IMAGES, NAMES)


WAYS: dict[str, tuple[Act, Act, dict[str, Any]]] = {
    "load": (lambda router: None, load, {}),
    "attach": (load, attach, {}),
    "levels": (load, share, {}),
    "share": (load, share, {}),
    "evict": (load, evict, {"slot_bytes": 120_000}),
    "preload": (lambda router: None, preload, {}),
    "pin": (load, pin, {"slot_bytes": 120_000}),
    "merge": (load, merge, {"merge": True}),
    "merged": (merge, merge, {"merge": True}),
    "forward": (forward, forward, {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_call_that_is_interrupted_at_any_line_changes_no_answer(
    backbone: Backbone, stores: tuple[Store, Store], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.adapted.PART_BYTES", 60_000)
    before, act, options = WAYS[way]
    options = {"merge": False, **options}
    roomy = {**options, "slot_bytes": None}
    with Router(backbone, stores[0], **roomy) as fresh:
        expected = answers(fresh)

    def make() -> Router:
        router = Router(backbone, stores[0], **options)
        return router if way == "levels" else with_levels(router, backbone)

    for _ in range(2):  # the first one fills the process's caches
        with make() as router:
            before(router)
            with Lines() as lines:
                act(router)
    interrupted = 0
    for number, stop_at in enumerate(chosen(lines.seen)):
        error = (KeyboardInterrupt, MemoryError)[number % 2]
        with make() as router:
            before(router)
            try:
                with Lines(stop_at, error):
                    act(router)
            except error:
                interrupted += 1
            if router._slots._budget is None:
                found = answers(router)
            else:  # not all fit at once
                found = [router.run(IMAGES[i : i + 1], NAMES[i]).logits[0] for i in range(4)]
            where = f"interrupted at {lines.seen[stop_at]}, event {stop_at}"
            for one, right in zip(found, expected, strict=False):
                assert torch.allclose(one, right, atol=1e-6), where
            check_books(router)
    assert interrupted > number // 2, "caches of the process may spare a few lines, not more"


def test_an_interrupted_refresh_serves_old_or_new_versions_and_can_be_repeated(
    backbone: Backbone, stores: tuple[Store, Store]
) -> None:
    old, new = stores
    names = ["p", "q", "r"]
    right = []
    for store in stores:
        with Router(backbone, store, merge=False) as fresh:
            right.append(whole(fresh.run(IMAGES[:3], names)))

    def make() -> Router:
        router = Router(backbone, old, merge=False)
        router.pin("q")
        router.run(IMAGES, [*names, "s"])
        router.store = new
        return router

    with make() as router, Lines() as lines:
        assert router.refresh() == {"p": 1, "q": 1, "r": 1, "s": None} or router.refresh() == {}
    for stop_at in chosen(lines.seen):
        with make() as router:
            with pytest.raises(KeyboardInterrupt), Lines(stop_at):
                router.refresh()
            for row, found in enumerate(router.run(IMAGES[:3], names).logits):
                assert any(torch.allclose(found, logits[row], atol=1e-6) for logits in right)
            router.refresh()
            assert torch.allclose(whole(router.run(IMAGES[:3], names)), right[1], atol=1e-6)
            assert router.stats().tasks == 3
            check_books(router)


def test_an_interrupted_add_has_added_or_not(backbone: Backbone, task_maker: Maker) -> None:
    tasks = task_maker("t", seed=1), task_maker("t", seed=2, positions=("blocks.1.mlp",), activation="gelu")
    right = []
    for task in tasks:
        with Router(backbone, merge=False) as fresh:
            fresh.add(task)
            right.append(whole(fresh.run(IMAGES, "t")))

    def make() -> Router:
        router = Router(backbone, merge=False)
        router.add(tasks[0])
        router.run(IMAGES, "t")
        return router

    with make() as router, Lines() as lines:
        router.add(tasks[1])
    for stop_at in chosen(lines.seen):
        with make() as router:
            with pytest.raises(MemoryError), Lines(stop_at, MemoryError):
                router.add(tasks[1])
            found = whole(router.run(IMAGES, "t"))
            assert any(torch.allclose(found, logits, atol=1e-6) for logits in right)
            router.add(tasks[1])
            assert torch.allclose(whole(router.run(IMAGES, "t")), right[1], atol=1e-6)


def test_an_interrupted_close_can_be_repeated(backbone: Backbone, stores: tuple[Store, Store]) -> None:
    def make() -> Router:
        router = Router(backbone, stores[0].path)
        router.preload("p").result(30)
        return router

    with make() as router, Lines() as lines:
        router.close()
    for stop_at in chosen(lines.seen):
        router = make()
        with pytest.raises(KeyboardInterrupt), Lines(stop_at):
            router.close()
        router.close()
        assert router.stats().size_bytes == 0
        with pytest.raises(ClosedError):
            router.run(IMAGES, "p")


def test_threads_are_served_right_while_others_are_interrupted(backbone: Backbone, stores: tuple[Store, Store]) -> None:
    """One thread's calls are interrupted at random lines, while others load, evict and run."""
    names = ["p", "q", "r", "lin"]
    with Router(backbone, stores[0], merge=False) as fresh:
        right = {name: whole(fresh.run(IMAGES[:2], name)) for name in names}
    wrong: list[str] = []
    stop = threading.Event()
    choice = np.random.default_rng(0)
    with Router(backbone, stores[0], slot_bytes=120_000, merge=False) as router:

        def ask(number: int) -> None:
            turn = number
            while not stop.is_set():
                turn += 1
                name = names[turn % 4]
                if not torch.allclose(whole(router.run(IMAGES[:2], name)), right[name], atol=1e-5):
                    wrong.append(name)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(int(os.environ.get("PEAR_INTERRUPTED_CALLS", "60"))):
                asked = [names[i] for i in choice.integers(4, size=2)]
                with suppress(KeyboardInterrupt), Lines(int(choice.integers(400)), threads=False):
                    router.run(IMAGES[:2], asked)
        finally:
            stop.set()
            for thread in threads:
                thread.join(60)
        assert wrong == []
        check_books(router)
