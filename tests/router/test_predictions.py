"""Answers that count as unknown, because the likeliest class has a probability below the task's or the caller's."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pear_store import Task, make_task
from router import Backbone, Batch, Predictions, Router, RouterError
from router.predictions import Prediction, read_threshold
from tests.helpers.makers import floats
from tests.helpers.predictions import whole

IMAGES = torch.randn(6, 3, 48, 48, generator=torch.Generator().manual_seed(3))
MIXED = ["plain", "low", "high", "all", "headless", "high"]
"""A task for each image."""


def with_threshold(task: Task, threshold: float) -> Task:
    return make_task({**task.record, "threshold": threshold}, task.tensors)


@pytest.fixture(scope="module")
def made(backbone: Backbone, task_maker: Callable[..., Task]) -> Router:
    """`plain` has no threshold. `low` and `high` have ones a little below and above what any image's best class has."""
    router = Router(backbone)
    for name, seed in (("plain", 1), ("low", 1), ("high", 2), ("all", 3)):
        task = unsure(task_maker(name, seed=seed))
        router.add(task)
        best = whole(router.run(IMAGES, name)).softmax(-1).amax(-1)
        assert best.max() < 0.99
        thresholds = {"low": float(best.min()) - 1e-3, "high": float(best.max()) + 1e-3, "all": 0}
        if name in thresholds:
            router.add(with_threshold(task, thresholds[name]))
    router.add(task_maker("headless", seed=4, headless=True))
    return router


def unsure(task: Task) -> Task:
    """The same with small logits, whose probabilities are far from 1."""
    weight = task.tensors["head.weight"]
    small = floats(0.05 * np.frombuffer(weight.data, "<f4").reshape(weight.shape))
    return make_task(task.record, {**task.tensors, "head.weight": small})


def test_each_row_of_a_mixed_batch_is_held_against_its_own_task_s_threshold(made: Router) -> None:
    found = made.run(IMAGES, MIXED)
    assert found.known == [True, True, False, True, None, False]
    assert [label is not None for label in found.labels] == [True, True, False, True, False, False]
    assert [one.threshold is None for one in found] == [True, False, False, False, True, False]
    for row, name in enumerate(MIXED):
        alone = made.run(IMAGES[row : row + 1], name)[0]
        assert (alone.known, alone.label, alone.threshold) == (
            found[row].known, found[row].label, found[row].threshold,
        )  # fmt: skip
        torch.testing.assert_close(alone.logits, found[row].logits, rtol=1e-4, atol=1e-4)
    top = found[2].topk(2)
    assert [label for label, _ in top] and top[0][1] == pytest.approx(float(found[2].probs.max()))
    assert [one.known for one in found[1:3]] == [True, False]


def test_tasks_without_a_threshold_are_as_ever(made: Router) -> None:
    found = made.run(IMAGES, "plain")
    assert found.known == [True] * 6
    assert found.labels == [found.classes[0][int(row.argmax())] for row in whole(found)]
    assert found.thresholds == ()
    assert "threshold" not in made.lookup("plain").task.record


def test_a_caller_s_threshold_comes_before_the_tasks_own(made: Router) -> None:
    none = [True, True, True, True, None, True]
    every = [False, False, False, False, None, False]
    assert made.run(IMAGES, MIXED, threshold=None).known == made.run(IMAGES, MIXED, threshold=0).known == none
    assert made.run(IMAGES, MIXED, threshold=1).known == every
    assert made.run(IMAGES, MIXED, threshold="stored").known == made.run(IMAGES, MIXED).known
    names = list(dict.fromkeys(MIXED))
    assert [made.run_all(IMAGES, names, threshold=1)[name].known[0] for name in names] == [*[False] * 4, None]
    assert [made.run_all(IMAGES, names)[name].known[2] for name in names] == [True, True, False, True, None]
    batch = Batch(IMAGES, np.arange(6), np.arange(6))
    assert made.run_batch(batch, MIXED, threshold=1).known == every
    assert made.run_batch(batch, MIXED, without_heads=True, threshold=1).known == [None] * 6


def test_a_probability_at_the_threshold_is_known_and_one_below_is_not(made: Router) -> None:
    found = made.run(IMAGES[:1], "plain")[0]
    best = float(found.probs.max())
    assert found.with_threshold(best).known is True
    above = found.with_threshold(min(1.0, best + 1e-6))
    assert (above.known, above.label) == (False, None)
    assert above.with_threshold(None).label == found.label


def test_a_row_that_failed_is_neither_known_nor_unknown(made: Router) -> None:
    images = IMAGES.clone()
    images[2] = torch.nan
    found = made.run(images, ["nowhere", *MIXED[1:]], on_error="return")
    assert found.known == [None, True, None, True, None, False]
    assert found.errors[0] is not None and found.errors[2] is not None
    assert made.run(images[:1], ["nowhere"], on_error="return", threshold=0.5).known == [None]


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan"), float("inf"), True, "0.5", "none", [0.5]])
def test_what_is_no_threshold_is_refused_before_anything_runs(made: Router, bad: Any) -> None:
    calls: list[Callable[[], object]] = [
        lambda: made.run(["/no/such/picture"], "plain", threshold=bad),
        lambda: made.run_all(["/no/such/picture"], ["plain"], threshold=bad),
        lambda: Prediction("t", None, torch.zeros(2), ("a", "b"), None).with_threshold(bad),
    ]
    for call in calls:
        with pytest.raises(RouterError, match=r"^threshold .*: expected a number from 0 to 1, None for none, or"):
            call()


def test_what_users_write() -> None:
    assert [read_threshold(text) for text in ("none", "0", "1", "0.75", "1e-3")] == [None, 0.0, 1.0, 0.75, 0.001]
    for bad in ("", "nan", "-1", "1.5", "inf", "None", "stored", "75%", "x\ny"):
        with pytest.raises(RouterError, match=r"^threshold .*: expected a number from 0 to 1, or none$"):
            read_threshold(bad)


def test_predictions_without_thresholds_can_be_made_by_hand() -> None:
    found = Predictions(torch.tensor([[0.0, 1.0]]), ["t"], [("a", "b")], [None])
    assert (found.labels, found.known) == (["b"], [True])
