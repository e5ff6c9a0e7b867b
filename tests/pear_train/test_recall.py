"""Figures of each class: a rare class that is never recognised is said, whatever top-1 says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from sklearn.metrics import f1_score, precision_recall_fscore_support

from pear_store import Store, read_checkpoint
from pear_store.cli import main as store_main
from pear_train.cli import main
from pear_train.evaluation.cli import main as evaluate
from pear_train.recall import by_class, recall_rows, recall_warnings, scores_of


def test_figures_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    targets = torch.from_numpy(rng.integers(0, 5, 200))
    predicted = torch.where(torch.from_numpy(rng.random(200) < 0.6), targets, torch.from_numpy(rng.integers(0, 6, 200)))
    found = scores_of(predicted, targets, 7)  # class 5 has no images, class 6 is not even predicted
    expected = precision_recall_fscore_support(targets, predicted, labels=range(7), zero_division=np.nan)
    for values, wanted in zip((found.precision, found.recall, found.f1), expected, strict=False):
        assert values == [None if np.isnan(value) else round(value, 4) for value in wanted.tolist()]
    assert found.recall[5:] == [None, None] and found.f1[5:] == [0.0, None]
    macro = f1_score(targets, predicted, labels=range(5), average="macro", zero_division=0)
    assert found.macro_f1 == pytest.approx(macro) and found.top1 == float((predicted == targets).double().mean())


def test_a_class_that_is_never_recognised_is_named_with_its_counts() -> None:
    training = {"images": {"train": [285, 15], "val": [28, 2]}, "recall": {"val": [1.0, 0.0]}}
    told = by_class(["common", "rare"], training)
    assert list(recall_warnings(told)) == [
        "class 'rare': none of its 2 val images is recognised. It has 15 of 300 training images"
    ]
    assert recall_rows(told)[1] == {"class": "rare", "train": 15, "val": 2, "val recall %": "0.0"}
    assert by_class(["a"], {}) == {"a": {"images": {}, "recall": {}}}  # of a checkpoint without them
    assert list(recall_warnings(by_class(["a"], {}))) == [] and recall_rows(by_class(["a"], {})) == [{"class": "a"}]


def test_long_names_of_classes_fill_no_table(tmp_path: Path) -> None:
    """They are cut where people read them, and whole in JSON and files."""
    rng = np.random.default_rng(0)
    labels = ["x" * 5000, "a" * 60]
    arrays: dict[str, Any] = {"classes": np.array(labels)}
    for split, count in (("train", 20), ("val", 4), ("test", 4)):
        arrays[f"x_{split}"] = rng.integers(0, 255, (count, 32, 32, 3), dtype=np.uint8)
        arrays[f"y_{split}"] = (np.arange(count) % 4 > 0).astype(np.int64)
    np.savez(tmp_path / "d.npz", **arrays)
    out = str(tmp_path / "t.safetensors")
    args = ["t", "--data", str(tmp_path / "d.npz"), "--method", "linear", "--epochs", "1", "--img-size", "32"]
    trained = CliRunner().invoke(main, [*args, "--out", out], catch_exceptions=False)
    asked = [out, "--data", str(tmp_path / "d.npz")]
    evaluated = CliRunner().invoke(evaluate, asked, catch_exceptions=False)
    with Store.create(tmp_path / "s") as store:
        store.add(out)
    shown = CliRunner().invoke(store_main, ["--store", str(tmp_path / "s"), "show", "t"], catch_exceptions=False)
    for done in (trained, evaluated, shown):
        assert done.exit_code == 0, done.stderr
        assert f"{'x' * 59}…" in done.stdout and "a" * 60 in done.stdout
        assert "x" * 60 not in done.output
    as_json = CliRunner().invoke(evaluate, [*asked, "--json"], catch_exceptions=False)
    assert labels[0] in as_json.stdout and list(read_checkpoint(out).labels) == labels


def test_the_command_reports_each_class(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {"classes": np.array(["common", "rare"])}
    for split, count in (("train", 48), ("val", 24), ("test", 24)):
        arrays[f"x_{split}"] = rng.integers(0, 255, (count, 32, 32, 3), dtype=np.uint8)  # nothing to learn
        arrays[f"y_{split}"] = (np.arange(count) % 24 == 0).astype(np.int64)
    np.savez(tmp_path / "d.npz", **arrays)
    args = ["t", "--data", str(tmp_path / "d.npz"), "--method", "linear", "--epochs", "1", "--img-size", "32"]
    done = CliRunner().invoke(main, [*args, "--out", str(tmp_path / "t")])
    assert done.exit_code == 0, done.stderr
    assert "classes   train/val/test: common 46/23/23, rare 2/1/1" in done.stderr
    assert "uneven classes: 46 training images of 'common', 2 of 'rare'" in done.stderr
    assert "class 'rare': none of its 1 val images is recognised. It has 2 of 48 training images" in done.stderr
    assert "val recall %" in done.stdout and "rare" in done.stdout
    training = read_checkpoint(tmp_path / "t").record["training"]
    assert training["images"] == {"train": [46, 2], "val": [23, 1], "test": [23, 1]}
    assert training["recall"] == {"val": [1.0, 0.0], "test": [1.0, 0.0]}
    as_json = CliRunner().invoke(main, [*args, "--out", str(tmp_path / "j"), "--json"])
    told = json.loads(as_json.stdout)["classes"]
    assert told["rare"]["images"] == {"train": 2, "val": 1, "test": 1}
    assert told["rare"]["recall"] == told["rare"]["f1"] == {"val": 0.0, "test": 0.0}
    assert told["rare"]["precision"] == {"val": None, "test": None}, "it is never predicted"
    assert training["f1"]["val"][1] == 0.0 and 0.9 < training["class_precision"]["val"][0] < 1.0
    assert json.loads(as_json.stdout)["history"][0]["val_macro_f1"] == pytest.approx(training["f1"]["val"][0] / 2, 1e-3)


def test_splits_have_one_order_whatever_that_of_the_record() -> None:
    """In a file they are sorted by name."""
    training = {"images": {"test": [1], "train": [2], "val": [3]}, "recall": {"test": [0.5], "val": [1.0]}}
    told = by_class(["cat"], training)["cat"]
    assert list(told["images"].items()) == [("train", 2), ("val", 3), ("test", 1)]
    assert list(told["recall"]) == ["val", "test"]
