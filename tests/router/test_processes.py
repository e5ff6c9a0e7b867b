"""Routers and processes: a forked child is told no at once, a spawned one makes the router anew."""

import copy
import multiprocessing
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import timm
import torch

import pear_store
import router as package
from pear_store import Store, Task
from router import Backbone, BackboneError, Router, RouterError, SlotBudgetError

Maker = Callable[..., Task]
IMAGES = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))

FORKED = """
import multiprocessing, sys, time
import torch
from torch.utils.data import DataLoader
from router import ForkedError, Router

torch.set_num_threads(2)
images = torch.zeros(8, 3, 48, 48)
router = Router("pear_tiny", sys.argv[1])
right = router.run(images, "t").logits

def child(pipe):
    calls = [
        lambda: router.run(images, "t"), lambda: router.run_all(images, ["t"]), lambda: router.check("t"),
        lambda: router.preload("t"), lambda: router.pin("t"), lambda: router.unpin("t"), lambda: router.refresh(),
        lambda: router.stats(), lambda: router.add("t.safetensors"), lambda: Router("pear_tiny", sys.argv[1]),
    ]
    said = []
    for call in calls:
        began = time.monotonic()
        try:
            call()
            said.append("nothing")
        except ForkedError as error:
            said.append("spawn" in str(error) and time.monotonic() - began < 5)
    router.close()
    torch.set_num_threads(1)
    said.append(torch.allclose(Router("pear_tiny", sys.argv[1]).run(images, "t").logits, right, atol=1e-5))
    pipe.send(said)

class Images:
    def __len__(self):
        return 2

    def __getitem__(self, i):
        return router.run(images[:1], "t").logits[0]

# as if other threads were in the middle of something
with router._registry.lock, router._adapted.turn, router._slots.lock:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    process.start()
    assert ours.poll(60), "the child hangs"
    assert ours.recv() == [True] * 11
    process.join(10)
    assert process.exitcode == 0
    try:
        list(DataLoader(Images(), num_workers=1, timeout=60, multiprocessing_context="fork"))
    except ForkedError as error:
        assert "spawn" in str(error)
        error.__traceback__ = None  # its frames hold the loader's iterator, which as garbage waits 5 s for its worker
    else:
        raise AssertionError("no word from the worker")
assert torch.equal(router.run(images, "t").logits, right)
print("fine")
"""


@pytest.fixture
def store_path(tmp_path: Path, task_maker: Maker) -> Path:
    with Store.create(tmp_path / "s") as store:
        store.add(task_maker("t", seed=1))
    return tmp_path / "s"


@pytest.mark.slow
def test_a_forked_child_is_told_to_spawn_and_never_hangs(store_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(FORKED), store_path],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout == "fine\n", done.stderr


def serve(router: Router, names: list[str]) -> torch.Tensor:
    logits = router.run(IMAGES, names).logits
    assert isinstance(logits, torch.Tensor)
    return logits


@pytest.mark.slow
def test_a_router_is_made_anew_in_a_spawned_process(store_path: Path, task_maker: Maker) -> None:
    with Store(store_path) as store, Router("pear_tiny", store, merge=False, slot_bytes=10**6) as router:
        router.add(task_maker("added", seed=2))
        router.add(store.get("t", copy=False))  # its tensors are maps
        right = serve(router, ["t", "added"])
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(serve, router, ["t", "added"]).result(120)
            with pytest.raises(SlotBudgetError) as caught:
                raise pool.submit(SlotBudgetError, 2, 1).result(60)
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)
    assert caught.value.needed_bytes == 2


def test_what_a_pickled_router_keeps_and_what_it_refuses(
    store_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Router(backbone, store_path, dtype=torch.bfloat16, merge=True, slot_bytes=999) as router:
        make, arguments = router.__reduce__()  # what a pickle holds
        with make(*arguments) as again:
            assert again._options == router._options
            assert isinstance(again.store, Store)
            assert isinstance(router.store, Store)
            assert again.store.path == router.store.path.absolute()
            assert again.store is not router.store
            assert again.backbone.digest == router.backbone.digest
    with (
        Router(timm.create_model("pear_tiny", pretrained=True)) as router,
        pytest.raises(RouterError, match="cannot be pickled: its backbone pear_tiny was given as a module: give its"),
    ):
        copy.copy(router)
    monkeypatch.setattr("router.router.load_backbone", lambda *_: Backbone(timm.create_model("pear_tiny"), "pear_tiny"))
    with pytest.raises(BackboneError, match="expected the weights of the process that this router came from"):
        make(*arguments)


@pytest.mark.parametrize("module", [package, pear_store])
def test_errors_can_be_pickled(module: object) -> None:
    """A pool of processes hangs for ever at an error that it cannot read."""
    errors = [e for e in vars(module).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(errors) > 5
    for kind in errors:
        error = kind.__new__(kind, "text")
        error.__dict__.update(needed_bytes=3)
        assert pickle.dumps(error)
        again = copy.copy(error)  # made of what the pickle holds
        assert (type(again), str(again), vars(again)["needed_bytes"]) == (kind, "text", 3)
