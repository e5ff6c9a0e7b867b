"""pear-eval's figures for tasks of the demo are scikit-learn's, from the router's own predictions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    precision_recall_fscore_support,
)

from pear_store import read_checkpoint
from pear_train import cli as train
from pear_train.evaluation import cli as evaluation
from router import Backbone, Router
from tools.demo import TASKS, write_folder


def run(command: Any, *args: object) -> Any:
    done = CliRunner().invoke(command, [*map(str, args), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["textures", "upright"])
def test_figures_of_the_demo_are_those_of_scikit_learn(task: str, tmp_path: Path, backbone: Backbone) -> None:
    data, file = tmp_path / "data", tmp_path / f"{task}.safetensors"
    write_folder(data, TASKS[task]())
    run(train.main, task, "--data", data, "--out", file, "--epochs", 2)
    (found,) = run(evaluation.main, file, "--data", data, "--split", "test")["tasks"]
    made = read_checkpoint(file)
    images = sorted((data / "test").rglob("*.png"))
    with Router(backbone, device="cpu") as router:
        predicted = router.run(images, router.add(made)).labels
    truth, labels = [image.parent.name for image in images], list(made.labels)
    wrong = sum(was != label for was, label in zip(predicted, truth, strict=True))
    assert 0 < wrong < len(truth), "else hardly any mistake in the figures would be seen"
    assert found["images"] == len(truth)
    assert found["top1"] == pytest.approx(accuracy_score(truth, predicted))
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, predicted))
    assert found["confusion"] == confusion_matrix(truth, predicted, labels=labels).tolist()
    assert [one["label"] for one in found["classes"]] == labels
    expected = precision_recall_fscore_support(truth, predicted, labels=labels, zero_division=np.nan)
    for key, values in zip(("precision", "recall", "f1", "images"), expected, strict=True):
        told = [np.nan if one[key] is None else one[key] for one in found["classes"]]
        assert told == pytest.approx(values.tolist(), nan_ok=True), key
