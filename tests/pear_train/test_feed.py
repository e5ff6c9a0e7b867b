"""What training images undergo, uneven classes, smoothed labels, and the threshold that is stored."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pear_store import read_checkpoint
from pear_train import ConfigError, TrainConfig, open_dataset, train
from pear_train.data import Dataset, Pixels, augment
from pear_train.data.augment import mix
from pear_train.evaluate import threshold_for
from pear_train.feed import Feed
from pear_train.options import parse_augment
from router import Backbone, Preprocess, Router
from tests.helpers.makers import record

COUNTS = [30, 9, 3]


@pytest.fixture(scope="module")
def skewed(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Three classes of unlike frequency, told apart by their grey, with much noise."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {"classes": np.array(["many", "some", "few"])}
    for name, counts in (("train", COUNTS), ("val", [8, 8, 8])):
        y = np.repeat(np.arange(3), counts)
        noise = rng.normal(0, 40, (len(y), 24, 24))
        arrays[f"x_{name}"] = np.clip(100 + 20 * y[:, None, None] + noise, 0, 255).astype(np.uint8)
        arrays[f"y_{name}"] = y
    path = tmp_path_factory.mktemp("skewed") / "d.npz"
    np.savez(path, **arrays)
    return open_dataset(str(path))


def feed(dataset: Dataset, seed: int = 0, **changes: Any) -> tuple[Feed, Pixels]:
    pixels = Pixels(dataset.train, Preprocess(record()["preprocess"]))
    config = TrainConfig(task="t", **changes)
    return Feed(config, pixels, 3, torch.Generator().manual_seed(seed)), pixels


# ---- augmentation -------------------------------------------------------------------------------


def test_augment_takes_words_and_refuses_others() -> None:
    assert parse_augment("none") == () and parse_augment("color+flip") == ("flip", "color")
    for text in ("flop", "flip+flip", "", "flip+none", "flip,crop"):
        with pytest.raises(ConfigError, match="expected none, or some of flip, crop, rotate, zoom, color, mixup"):
            TrainConfig(task="t", augment=text)


@pytest.mark.parametrize("how", ["rotate", "zoom", "color", "flip+rotate+zoom+color"])
def test_each_image_is_changed_by_itself_and_alike_from_one_seed(how: str) -> None:
    picture = torch.randint(0, 255, (1, 3, 32, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    images = picture.expand(6, -1, -1, -1)
    state = torch.random.get_rng_state()
    changed = augment(images, how, torch.Generator().manual_seed(0))
    assert torch.equal(torch.random.get_rng_state(), state), "torch's own generator is left alone"
    assert changed.shape == images.shape and changed.dtype == torch.uint8
    assert len({bytes(image.numpy().tobytes()) for image in changed}) == 6
    assert torch.equal(changed, augment(images, how, torch.Generator().manual_seed(0)))
    assert not torch.equal(changed, augment(images, how, torch.Generator().manual_seed(1)))


def test_a_turned_picture_keeps_its_middle_and_a_zoomed_one_is_a_part() -> None:
    images = torch.zeros(8, 3, 40, 40, dtype=torch.uint8)
    images[:, :, 15:25, 15:25] = 250
    turned = augment(images, "rotate", torch.Generator().manual_seed(0))
    assert int(turned[:, :, 18:22, 18:22].min()) > 240 and {int(v) for v in turned[:, 0, 0, 0]} & {124}
    zoomed = augment(images, "zoom", torch.Generator().manual_seed(0))
    assert float(zoomed.float().mean()) > float(images.float().mean())
    dyed = augment(torch.full((8, 3, 8, 8), 100, dtype=torch.uint8), "color", torch.Generator().manual_seed(0))
    assert len(set(dyed[:, 0, 0, 0].tolist())) > 4 and float(dyed.float().std(dim=(1, 2, 3)).max()) < 1


def test_mixup_mixes_classes_as_it_mixes_images(skewed: Dataset) -> None:
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    mixed, shares = mix(images, torch.arange(4), 4, torch.Generator().manual_seed(3))
    assert torch.allclose(shares.sum(1), torch.ones(4))
    assert torch.allclose(mixed[:, 0, 0, 0], shares @ torch.arange(4.0)), "the same shares of images and classes"
    assert int((shares > 0).sum(1).min()) == 2
    fed, pixels = feed(skewed, augment="mixup")
    rows = torch.tensor([0, 35, 40, 1])
    images = fed.images(rows)
    targets = fed.targets(rows)
    assert targets.shape == (4, 3) and not torch.equal(images, pixels.images(rows))
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fed.loss(logits, targets), F.cross_entropy(logits, targets))
    assert torch.equal(fed.targets(torch.tensor([0, 35])), torch.tensor([0, 1])), "of images that were not mixed"


# ---- uneven classes and labels -------------------------------------------------------------------


def test_without_balance_each_image_comes_once(skewed: Dataset) -> None:
    fed, _ = feed(skewed)
    assert sorted(fed.order().tolist()) == list(range(sum(COUNTS)))
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 0, 1, 2, 0])
    assert torch.equal(fed.loss(logits, targets), F.cross_entropy(logits, targets))


def test_sampling_draws_classes_equally_often(skewed: Dataset) -> None:
    fed, pixels = feed(skewed, balance="sampling")
    drawn = torch.cat([fed.order() for _ in range(60)])
    assert len(drawn) == 60 * sum(COUNTS)
    shares = torch.bincount(pixels.targets[drawn], minlength=3) / len(drawn)
    assert torch.allclose(shares, torch.full((3,), 1 / 3), atol=0.04)
    assert torch.equal(feed(skewed, balance="sampling")[0].order(), feed(skewed, balance="sampling")[0].order())


def test_weights_make_a_rare_image_count_as_much_as_its_class_is_rare(skewed: Dataset) -> None:
    fed, _ = feed(skewed, balance="weights")
    assert torch.allclose(fed.weights * torch.tensor(COUNTS), torch.full((3,), 14.0))
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 0, 0, 2])
    each = F.cross_entropy(logits, targets, reduction="none")
    by_hand = (each[:3].sum() / 30 + each[3] / 3) / (3 / 30 + 1 / 3)
    assert float(fed.loss(logits, targets)) == pytest.approx(float(by_hand), rel=1e-5)


def test_smoothed_labels_are_spread_over_all_classes(skewed: Dataset) -> None:
    fed, _ = feed(skewed, label_smoothing=0.3)
    logits, targets = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1, 0])
    spread = 0.7 * F.one_hot(targets, 3).float() + 0.1
    by_hand = -(spread * logits.log_softmax(1)).sum(1).mean()
    assert float(fed.loss(logits, targets)) == pytest.approx(float(by_hand), rel=1e-5)


# ---- what is kept ---------------------------------------------------------------------------------


def test_the_epoch_of_the_best_macro_f1_is_kept(skewed: Dataset, backbone: Backbone, tmp_path: Path) -> None:
    told: dict[str, Any] = {"task": "t", "method": "linear", "img_size": 48, "epochs": 8, "lr": 0.05}
    kept = {}
    for select in ("best", "macro_f1"):
        result = train(TrainConfig(**{**told, "select": select}), backbone, skewed, tmp_path / select)
        by = "val_top1" if select == "best" else "val_macro_f1"
        best = max(epoch[by] for epoch in result.history)
        kept[select] = result.best_epoch
        assert result.history[result.best_epoch - 1][by] == best
        assert all(epoch[by] < best for epoch in result.history[result.best_epoch :]), "of equals the later"


@pytest.mark.parametrize(
    ("right", "wanted", "threshold"),
    [
        ([1, 1, 0, 1], 0.75, 0.4),
        ([1, 1, 0, 1], 0.9, 0.8),
        ([0, 1, 1, 1], 0.99, None),
        ([1, 0, 1, 1], 0.99, 0.9),
        ([1, 1, 1, 1], 1.0, 0.4),
    ],
)
def test_the_threshold_is_the_lowest_that_reaches_it(right: list[int], wanted: float, threshold: float | None) -> None:
    confidence = torch.tensor([0.9, 0.8, 0.6, 0.4])
    found = threshold_for(torch.tensor(right).bool(), confidence, wanted)
    assert found == (None if threshold is None else pytest.approx(threshold))


def test_equal_confidences_are_answered_together_or_not_at_all() -> None:
    right, confidence = torch.tensor([True, True, False]), torch.tensor([0.9, 0.5, 0.5])
    assert threshold_for(right, confidence, 0.9) == pytest.approx(0.9)


def test_a_stored_threshold_holds_on_val(skewed: Dataset, backbone: Backbone, tmp_path: Path) -> None:
    told: dict[str, Any] = {"task": "t", "method": "linear", "img_size": 48, "epochs": 4, "threshold_accuracy": 0.8}
    train(TrainConfig(**told), backbone, skewed, tmp_path / "t")
    task = read_checkpoint(tmp_path / "t")
    threshold = task.record["threshold"]
    assert 0 <= threshold <= 1
    router = Router(backbone)
    router.add(task)
    found = router.run([skewed.val.image(i) for i in range(len(skewed.val))], "t")
    answered = [(p.label, float(p.probs.max())) for p in found]
    right = [label == task.labels[t] for (label, p), t in zip(answered, skewed.val.targets.tolist(), strict=True)
             if p >= threshold]  # fmt: skip
    assert right and sum(right) / len(right) >= 0.8
    train(TrainConfig(**{**told, "threshold_accuracy": None}), backbone, skewed, tmp_path / "n")
    assert "threshold" not in read_checkpoint(tmp_path / "n").record
