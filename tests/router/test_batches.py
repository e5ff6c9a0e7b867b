"""From images and tasks to batches: what may be given, what is decoded once, and errors that stay in their rows."""

import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import router.preprocess as preprocess_module
from pear_store import Store, Task, make_task
from router import (
    Backbone,
    ImageError,
    Router,
    RouterError,
    SlotBudgetError,
    UnknownTaskError,
    WrongBackboneError,
    prepare,
)
from tests.helpers.predictions import whole

Maker = Callable[..., Task]
PIXELS = np.random.default_rng(0).integers(0, 255, (50, 40, 3), dtype=np.uint8)


def png(pixels: Any = PIXELS) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def router(backbone: Backbone, task_maker: Maker) -> Router:
    router = Router(backbone)
    for i, name in enumerate("abc"):
        router.add(task_maker(name, seed=i, classes=3 if name != "c" else 5))
    return router


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each image that is decoded."""
    count: list[int] = []
    decode_one = preprocess_module._decode_one

    def counted(asked: Any, **options: Any) -> Any:
        count.append(1)
        return decode_one(asked, **options)

    monkeypatch.setattr(preprocess_module, "_decode_one", counted)
    return count


def test_an_image_may_be_anything_that_holds_one_and_need_not_be_in_a_list(router: Router, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png())
    with (tmp_path / "x.png").open("rb") as file:
        file.seek(3)  # somebody looked at its first bytes
        given: list[Any] = [
            PIXELS, Image.fromarray(PIXELS), str(tmp_path / "x.png"), tmp_path / "x.png", png(), io.BytesIO(png()),
            file,
        ]  # fmt: skip
        right = whole(router.run([PIXELS], "a"))
        for image in given:
            assert torch.equal(whole(router.run(image, "a")), right), image
            assert len(router.run([image], "a")) == 1
            assert torch.equal(whole(router.run_all(image, ["a"])["a"]), right)
    grey = PIXELS[:, :, 0]
    torch.testing.assert_close(whole(router.run(grey, "a")), whole(router.run([grey], "a")))
    one = torch.randn(3, 48, 48)
    torch.testing.assert_close(whole(router.run(one, "a")), whole(router.run(one.unsqueeze(0), "a")))


def test_files_that_cannot_be_read(router: Router, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("text")
    with (tmp_path / "x.txt").open() as text:
        message = r"image of file '.*x.txt': expected a file of bytes, found one of str: open it with 'rb'"
        with pytest.raises(ImageError, match=message):
            router.run(text, "a")  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="image of file .*: not an image that Pillow can read"):
        router.run(io.BytesIO(b"no image"), "a")


@pytest.mark.parametrize("form", ["bytes", "file", "path", "array"])
def test_an_image_given_for_several_tasks_is_decoded_once(
    router: Router, decoded: list[int], tmp_path: Path, form: str
) -> None:
    (tmp_path / "x.png").write_bytes(png())
    file = io.BytesIO(png())
    pair: Any = {
        "bytes": [png(), png()],  # equal, but two objects
        "file": [file, file],
        "path": [str(tmp_path / "x.png"), tmp_path / "x.png"],
        "array": [PIXELS, PIXELS],
    }[form]
    assert pair[0] is not pair[1] or form != "bytes"
    router.run(pair, ["a", "b"])
    assert len(decoded) == 1


def test_tasks_of_one_size_and_unlike_preprocessing_share_a_forward(router: Router, task_maker: Maker) -> None:
    plain = task_maker("other", seed=9)
    preprocess = {**plain.record["preprocess"], "mean": [0.1, 0.2, 0.3], "std": [0.9, 0.8, 0.7]}
    router.add(make_task({**plain.record, "preprocess": preprocess}, plain.tensors))
    router.add(task_maker("large", seed=4, size=64))
    images = [PIXELS, PIXELS[::-1].copy(), PIXELS[:, ::-1].copy(), PIXELS]
    tasks = ["a", "other", "large", "other"]
    alone = [router.run(image, task).logits[0] for image, task in zip(images, tasks, strict=True)]
    rows: list[int] = []
    for size in ((48, 48), (64, 64)):
        norm = router._adapted._module(size).get_submodule("norm")
        norm.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    mixed = router.run(images, tasks)
    assert rows == [3, 1]
    for found, right in zip(mixed.logits, alone, strict=True):
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)


def test_prepare_keeps_each_row_with_its_image(task_maker: Maker, router: Router) -> None:
    way = router._find("a").preprocess
    (batch,), errors = prepare([PIXELS, b"no image", PIXELS, PIXELS[::-1]], [way] * 4)
    assert (batch.rows.tolist(), batch.image_of.tolist(), len(batch.images)) == ([0, 2, 3], [0, 0, 1], 2)
    assert list(errors) == [1]
    found = router.run_batch(batch, ["a", "b", "a"])
    for row, (image, task) in enumerate([(PIXELS, "a"), (PIXELS, "b"), (PIXELS[::-1], "a")]):
        torch.testing.assert_close(found[row].logits, router.run(image, task)[0].logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(ImageError, match="a batch of 3 rows but 1 task: expected one for each row"):
        router.run_batch(batch, ["a"])


# ---- errors in their rows -------------------------------------------------------------------------


def test_what_fails_fails_its_own_rows(
    backbone: Backbone, task_maker: Maker, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add(task_maker("a", seed=1))
    store.add(task_maker("b", seed=2))
    foreign = task_maker("foreign")
    digest = {"model": "vit_huge", "digest": "sha256:" + "a" * 64}
    store.add(make_task({**foreign.record, "backbone": digest}, foreign.tensors))
    router = Router(backbone, store)
    images: list[Any] = [PIXELS, b"no image", PIXELS, PIXELS, "nowhere.png", PIXELS, 3]
    tasks = ["a", "a", "gone", "foreign", "b", "b@1", "b"]
    found = router.run(images, tasks, on_error="return")
    kinds = {row: type(error) for row, error in found.failures.items()}
    assert kinds == {
        1: ImageError, 2: UnknownTaskError, 3: WrongBackboneError, 4: ImageError, 6: ImageError
    }  # fmt: skip
    assert [one.error is None for one in found] == [row not in kinds for row in range(7)]
    assert found.errors[4] == "nowhere.png: no such file"
    assert found.versions == [1, 1, None, None, 1, 1, 1]
    assert found[2].classes == () and found[2].label is None and found[2].topk(3) == []
    assert found[1].logits.isnan().all() and found[1].label is None
    for row in (0, 5):
        torch.testing.assert_close(found[row].logits, router.run(PIXELS, tasks[row])[0].logits, atol=1e-5, rtol=1e-5)
    every = router.run_all(images, ["a", "gone", "b"], on_error="return")
    assert [[one.error is None for one in every[name]] for name in ("a", "gone", "b")] == [
        [True, False, True, True, False, True, False], [False] * 7, [True, False, True, True, False, True, False],
    ]  # fmt: skip
    for call in (lambda: router.run(images, tasks), lambda: router.run_all(images, ["a"])):
        with pytest.raises(RouterError):
            call()
    nothing = router.run([PIXELS], "gone", on_error="return")
    assert [one.error for one in nothing] == [str(nothing.failures[0])]


def test_a_task_that_the_store_cannot_read_again_fails_its_own_rows(
    backbone: Backbone, task_maker: Maker, store: Store
) -> None:
    """It was looked up, evicted, and is gone when it is to be loaded again."""
    for i, name in enumerate("ab"):
        store.add(task_maker(name, seed=i))
    with Router(backbone, store) as probe:
        probe.run(PIXELS, "a")
        size = probe.stats().size_bytes
    router = Router(backbone, store, slot_bytes=size * 3 // 2)
    router.run(PIXELS, "a")
    router.run(PIXELS, "b")
    store.remove("a")
    store.gc(repack_all=True)
    found = router.run([PIXELS] * 3, ["a", "b", "a"], on_error="return")
    assert [type(found.failures.get(row)) for row in range(3)] == [UnknownTaskError, type(None), UnknownTaskError]
    assert found[1].label is not None


def test_tasks_too_large_fail_alone_and_others_take_turns(backbone: Backbone, task_maker: Maker) -> None:
    tasks = {name: task_maker(name, seed=i) for i, name in enumerate("abc")} | {"wide": task_maker("wide", rank=40)}
    with Router(backbone) as probe:
        probe.add(tasks["a"])
        probe.run(PIXELS, "a")
        size = probe.stats().size_bytes
    router = Router(backbone, slot_bytes=size * 3 // 2)
    for task in tasks.values():
        router.add(task)
    found = router.run([PIXELS] * 4, ["a", "wide", "b", "c"], on_error="return")
    assert {row: type(error) for row, error in found.failures.items()} == {1: SlotBudgetError}
    for row, name in ((0, "a"), (2, "b"), (3, "c")):
        torch.testing.assert_close(found[row].logits, router.run(PIXELS, name)[0].logits, atol=1e-5, rtol=1e-5)


def test_mistakes_of_the_whole_call_are_raised(router: Router) -> None:
    with pytest.raises(RouterError, match="on_error 'ignore': expected 'raise' or 'return'"):
        router.run(PIXELS, "a", on_error="ignore")  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="2 images but 1 task:"):
        router.run([PIXELS] * 2, ["a"], on_error="return")
    with pytest.raises(ImageError, match="images: expected 48 x 48 pixels, found 40 x 40"):
        router.run(torch.zeros(1, 3, 40, 40), "a", on_error="return")
    router.close()
    with pytest.raises(RouterError, match="closed"):
        router.run(PIXELS, "a", on_error="return")


# ---- predictions ------------------------------------------------------------------------------------


def test_predictions_are_a_sequence_and_say_versions(backbone: Backbone, task_maker: Maker, store: Store) -> None:
    store.add(task_maker("t", seed=1))
    store.add(task_maker("t", seed=2))
    store.tag("t@1", "prod")
    router = Router(backbone, store)
    router.add(task_maker("added", seed=3, classes=4))
    router.add(task_maker("bare", seed=3, headless=True))
    names = ["t", "t@prod", "added", "t@1", "bare"]
    found = router.run([PIXELS] * 5, names)
    assert [one.version for one in found] == found.versions == [2, 1, None, 1, None]
    assert [one.task for one in found] == names
    assert torch.equal(found[-1].logits, found[4].logits)
    assert (found[4] == found[4], found == router.run([PIXELS] * 5, names)) == (False, False)  # neither raises
    assert [one.task for one in found[1:3]] == ["t@prod", "added"]
    assert torch.equal(found[1].logits, found[3].logits)
    for row, one in enumerate(found):
        assert (one.label, one.topk(2), one.error) == (found.labels[row], found.topk(2)[row], found.errors[row])
        assert torch.equal(one.probs, found.probs[row])
    assert found[4].classes == () and found[4].label is None and found[4].error is None
    with pytest.raises(IndexError):
        found[5]
    with pytest.raises(RouterError, match="k 0: expected at least 1"):
        found[0].topk(0)


# ---- what nobody waits for --------------------------------------------------------------------------


class SlowStore:
    """A store whose tasks take their time, all but some."""

    def __init__(self, store: Store, quick: set[str]) -> None:
        self._store, self._quick = store, quick
        self.asked, self.go_on = threading.Event(), threading.Event()
        self.resolve = store.resolve

    def get(self, reference: str, copy: bool = True) -> Task:
        if reference.partition("@")[0] not in self._quick:
            self.asked.set()
            assert self.go_on.wait(60)
        return self._store.get(reference, copy)


def test_a_batch_of_cold_tasks_delays_no_other(backbone: Backbone, task_maker: Maker, store: Store) -> None:
    """However many they are, looked up or known already: what waits for the disk holds no lock."""
    names = [f"t{i}" for i in range(40)]
    for i, name in enumerate(names):
        store.add(task_maker(name, seed=i))
    slow: Any = SlowStore(store, {*names})
    router = Router(backbone, slow, merge=True)
    for name in names:
        router.check(name)  # looked up; what was read is not kept for all
    images = torch.randn(len(names), 3, 48, 48)
    right = whole(router.run(images[:1], "t0"))
    slow._quick.clear()
    with ThreadPoolExecutor(1) as pool:
        cold = pool.submit(router.run, images, names)
        try:
            assert slow.asked.wait(60)
            for _ in range(3):
                torch.testing.assert_close(whole(router.run(images[:1], "t0")), right, atol=1e-5, rtol=1e-5)
        finally:
            slow.go_on.set()
        assert len(cold.result(60)) == len(names)


def test_a_dry_forward_of_new_positions_delays_no_batch(
    backbone: Backbone, task_maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = Router(backbone)
    router.add(task_maker("a"))
    router.run(PIXELS, "a")
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        inside.set()
        assert go_on.wait(60)

    router._adapted._base.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        added = pool.submit(router.add, task_maker("new", positions=("blocks.1.mlp",)))
        try:
            assert inside.wait(60)
            router.run(PIXELS, "a")
        finally:
            go_on.set()
        assert added.result(60) == "new"
    assert router.run(PIXELS, "new").labels


def test_merging_delays_no_batch(backbone: Backbone, task_maker: Maker, store: Store) -> None:
    linears = ("blocks.0.attn.qkv", "blocks.3.attn.proj")
    made = task_maker("m", positions=linears)
    positions = {p: branches for p, branches in made.record["positions"].items() if p in linears}
    store.add(make_task({**made.record, "positions": positions}, made.tensors))
    store.add(task_maker("a"))
    slow: Any = SlowStore(store, {"m", "a"})
    router = Router(backbone, slow, merge=True)
    router.preload(["m", "a"]).result(60)
    slow._quick.clear()
    with ThreadPoolExecutor(1) as pool:
        merging = pool.submit(router.run, PIXELS, "m")
        try:
            assert slow.asked.wait(60)
            router.run(PIXELS, "a")
            router.run(PIXELS, "m")  # unmerged, meanwhile
        finally:
            slow.go_on.set()
        found = merging.result(60)
    torch.testing.assert_close(
        found.logits, Router(backbone, store, merge=False).run(PIXELS, "m").logits, atol=1e-4, rtol=1e-4
    )
    assert router._merger.merges == 1


def test_names_of_one_version_share_a_slot(backbone: Backbone, task_maker: Maker, store: Store) -> None:
    store.add(task_maker("t", seed=1))
    store.tag("t@1", "prod")
    router = Router(backbone, store)
    router.add(task_maker("added", seed=3))
    reads: list[str] = []

    class Counted:
        resolve, refresh = store.resolve, store.refresh

        def get(self, reference: str, copy: bool = True) -> Task:
            reads.append(reference)
            return store.get(reference, copy)

    counted: Any = Counted()
    router.store = counted
    for name in ("t", "t@1", "t@prod"):
        router.run(PIXELS, name)
    router.run([PIXELS] * 3, ["t", "t@1", "t@prod"])
    assert reads == ["t@1"]
    assert (router.stats().tasks, router.stats().loads) == (1, 1)
    store.add(task_maker("t", seed=2))
    assert router.refresh() == {"t": 2}
    router.run(PIXELS, "t@1")
    assert router.stats().loads == 1, "what other names still mean stays loaded"
    router.run(PIXELS, "t@2")
    router.run(PIXELS, "t")
    assert reads == ["t@1", "t@2"]


def test_what_is_known_of_tasks_is_bounded_and_found_again(
    backbone: Backbone, task_maker: Maker, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.registry.KNOWN_TASKS", 3)
    monkeypatch.setattr("router.registry.NAMES", 4)
    names = [f"t{i}" for i in range(8)]
    for i, name in enumerate(names):
        store.add(task_maker(name, seed=i))
    with Router(backbone, store) as probe:
        right = {name: whole(probe.run(PIXELS, name)) for name in names}
        size = probe.stats().size_bytes // len(names)
    router = Router(backbone, store, slot_bytes=size * 5 // 2)
    router.pin("t7")
    for name in [*names, *reversed(names)]:
        torch.testing.assert_close(whole(router.run(PIXELS, name)), right[name], atol=1e-5, rtol=1e-5)
        assert len(router._registry._known) <= 3 + 2, "a few more, where the oldest are loaded or pinned"
        assert len(router._registry._versions) <= 4 + 5
        assert len(router._registry._read) <= 16
    assert router.refresh() == {}


def test_loads_are_logged(
    backbone: Backbone, task_maker: Maker, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    store.add(task_maker("t"))
    with caplog.at_level("DEBUG", "router"):
        Router(backbone, store).run(PIXELS, "t")
    said = [entry.getMessage() for entry in caplog.records]
    assert any(line.startswith("looked task t up: version 1 in ") for line in said)
    assert any(line.startswith("loaded task t: ") and "bytes in" in line for line in said)
    before = len(caplog.records)
    with caplog.at_level("DEBUG", "router"):
        router = Router(backbone, store)
        router.run(PIXELS, "t")
        quiet = len(caplog.records)
        router.run(PIXELS, "t")
    assert len(caplog.records) == quiet > before, "nothing is logged of a batch whose tasks are loaded"
