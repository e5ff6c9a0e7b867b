"""What a name meant when it was looked up is run, whatever it means by now."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pear_store import Store, Task
from router import (
    Backbone,
    Batch,
    ClosedError,
    Predictions,
    Router,
    RouterError,
    SlotBudgetError,
    TooManyPixelsError,
    UnknownTaskError,
    prepare,
)
from router.batches import put_together
from router.preprocess import decode


@pytest.fixture
def where(tmp_path: Path, task_maker: Callable[..., Task]) -> Path:
    with Store.create(tmp_path / "s") as store:
        store.add(task_maker("a", seed=1))
        store.add(task_maker("b", seed=2, size=64))
    return tmp_path / "s"


IMAGES = [np.random.default_rng(seed).integers(0, 255, (40, 50, 3), dtype=np.uint8) for seed in range(3)]


def test_a_batch_runs_the_versions_that_were_looked_up(
    where: Path, backbone: Backbone, task_maker: Callable[..., Task]
) -> None:
    with Router(backbone, where) as router, Store(where) as store:
        old = router.lookup("a")
        assert (old.version and old.version.version, old.task.labels, old.preprocess.size) == (
            1,
            ("a-0", "a-1", "a-2"),
            (48, 48),
        )
        expected = router.run(IMAGES[0], "a")
        store.add(task_maker("a", seed=5, classes=4))
        router.refresh()
        new = router.lookup("a")
        batch, _ = prepare([IMAGES[0]] * 3, [old.preprocess, new.preprocess, new.preprocess])
        found = router.run_batch(batch[0], [old, new, "a"])
        assert found.versions == [1, 2, 2]
        assert found.tasks == ["a", "a", "a"]
        torch.testing.assert_close(found[0].logits, expected[0].logits, rtol=1e-5, atol=1e-5)
        assert not router.is_loaded(old), "no name means it any more: it is given up after the batch"
        assert router.is_loaded(new)
        torch.testing.assert_close(found[1].logits, router.run(IMAGES[0], "a")[0].logits, rtol=1e-5, atol=1e-5)
        router.preload(old).result()
        assert router.is_loaded(old)
        router.check([old, new, "b"])


def test_what_is_loaded_and_what_fits(where: Path, backbone: Backbone) -> None:
    with Router(backbone, where) as router:
        assert not router.is_loaded("a")
        router.preload("a").result()
        assert router.is_loaded("a@1")
        size = router.stats().size_bytes
        with pytest.raises(UnknownTaskError, match="no task 'zebra'"):
            router.lookup("zebra")
    with Router(backbone, where, slot_bytes=size) as router:
        router.check("a")
        router.check(["a", "a@1", router.lookup("a")])
        with pytest.raises(SlotBudgetError):
            router.check(["a", "b"])


def test_what_was_added_is_named(backbone: Backbone, task_maker: Callable[..., Task]) -> None:
    with Router(backbone) as router:
        router.add(task_maker("mine"))
        assert router.added() == ["mine"]


def test_the_backbone_can_be_run_ahead(backbone: Backbone) -> None:
    router = Router(backbone)
    router.warm_up()
    router.close()
    with pytest.raises(ClosedError):
        router.warm_up()


def test_tasks_are_loaded_and_run_ahead_in_batches_of_each_size(
    where: Path, backbone: Backbone, task_maker: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Router(backbone, where) as router:
        ran: list[tuple[int, list[str]]] = []
        run_batch = router.run_batch

        def noted(batch: Batch, tasks: list[str], **options: Any) -> Predictions:
            ran.append((len(batch.images), tasks))
            return run_batch(batch, tasks, **options)

        monkeypatch.setattr(router, "run_batch", noted)
        with Store(where) as store:
            store.add(task_maker("c", seed=3))
        router.warm_up(["a", "b", "c"], batch_sizes=[1, 3, 3])  # b's images are of another size
        assert all(map(router.is_loaded, "abc"))
        assert ran == [(1, ["a"]), (3, ["a", "c", "a"]), (1, ["b"]), (3, ["b", "b", "b"])]
        for bad in (0, -1, 1.5, True, "2"):
            with pytest.raises(RouterError, match=r"^batch size .*: expected a whole number of at least 1$"):
                router.warm_up(["a"], batch_sizes=[1, bad])  # type: ignore[list-item]
        with pytest.raises(UnknownTaskError, match="no task 'zebra'"):
            router.warm_up("zebra")
        assert len(ran) == 4


def test_decoded_images_are_put_together_as_prepare_does(where: Path, backbone: Backbone) -> None:
    with Router(backbone, where) as router:
        ways = [router.lookup(name).preprocess for name in ("a", "b", "a", "a")]
    images = [IMAGES[0], IMAGES[1], IMAGES[2], IMAGES[0]]
    pixels = [found for found in decode(images, ways) if isinstance(found, torch.Tensor)]
    expected, _ = prepare(images, ways)
    for one, other in zip(put_together(dict(enumerate(pixels)), ways), expected, strict=True):
        assert torch.equal(one.images, other.images)
        assert one.rows.tolist() == other.rows.tolist()
        assert one.image_of.tolist() == other.image_of.tolist()


def test_a_picture_that_is_too_large_has_an_error_of_its_own(where: Path, backbone: Backbone) -> None:
    with (
        Router(backbone, where, max_pixels=1999) as router,
        pytest.raises(TooManyPixelsError, match="50 x 40") as error,
    ):
        router.run(IMAGES[0], "a")
    assert (error.value.width, error.value.height, error.value.max_pixels) == (50, 40, 1999)


def test_a_version_is_loaded_again_after_an_equal_one_was_removed(
    where: Path, backbone: Backbone, task_maker: Callable[..., Task]
) -> None:
    """It has the key of the removed one, which is still in use, but is read under its own number."""
    with Router(backbone, where) as router:
        router.preload(["b"]).result()
        budget = router.stats().size_bytes
    with Router(backbone, where, slot_bytes=budget) as router, Store(where) as store:
        expected, old = router.run(IMAGES[0], "a"), router.lookup("a")
        store.add(task_maker("a", seed=5))
        store.add(task_maker("a", seed=1))
        store.remove("a@1")
        router.refresh()
        assert (router.lookup("a").key, router.lookup("a").version) == (old.key, store.resolve("a@3"))
        router.run(IMAGES[0], "b")
        assert not router.is_loaded("a")
        assert torch.equal(router.run(IMAGES[0], "a")[0].logits, expected[0].logits)
