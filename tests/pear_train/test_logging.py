"""What is logged: by whom, how much, and that nobody else's settings are touched."""

import ast
import logging
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pear_train import TrainConfig, open_dataset, train
from router import Backbone

PACKAGE = Path(__file__).parents[2] / "pear_train"


@pytest.mark.slow
def test_importing_changes_no_settings_of_others() -> None:
    code = (
        "import logging, sys, warnings, torch, torchvision, timm, pear_store, router, tqdm, click\n"
        "root, filters = logging.getLogger(), list(warnings.filters)\n"
        "before = (root.level, list(root.handlers), warnings.showwarning)\n"
        "import pear_train, pear_train.cli, pear_train.data.timm_data\n"
        "assert filters == list(warnings.filters)\n"
        "assert before == (root.level, list(root.handlers), warnings.showwarning)\n"
        "ours = {n: l for n, l in root.manager.loggerDict.items() if n.startswith('pear_train')}\n"
        "set_up = [n for n, l in ours.items() if getattr(l, 'handlers', []) or getattr(l, 'level', 0)]\n"
        "print(sorted(ours), set_up)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, set_up = done.stdout.strip().rsplit(" ", 1)
    assert "'pear_train.run'" in names and set_up == "[]"


def test_loggers_have_their_modules_names_and_nothing_is_set_up() -> None:
    refused = {"basicConfig", "addHandler", "setLevel", "simplefilter", "filterwarnings", "captureWarnings", "disable"}
    count = 0
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                assert node.attr not in refused, f"{file}:{node.lineno}"
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("getLogger"):
                count += 1
                assert ast.unparse(node) == "logging.getLogger(__name__)", f"{file}:{node.lineno}"
    assert count >= 5


def test_a_run_tells_seconds_and_bytes_and_is_silent_in_its_steps(
    tmp_path: Path, backbone: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    images, targets = np.zeros((32, 16, 16, 3), np.uint8), np.arange(32) % 2
    np.savez(tmp_path / "d.npz", x_train=images, y_train=targets, x_val=images[:4], y_val=targets[:4])

    def messages(batch_size: int) -> list[str]:
        caplog.clear()
        config = TrainConfig(task="t", epochs=2, batch_size=batch_size, rank=2, positions="blocks.[01].attn", ratio=0.5,
                             img_size=32, dtype="float32")  # fmt: skip
        out = tmp_path / f"{batch_size}"
        with caplog.at_level(logging.DEBUG, "pear_train"):
            train(config, backbone, open_dataset(str(tmp_path / "d.npz")), out)
        assert all(re.match(r"pear_train(\.\w+)+$", record.name) for record in caplog.records)
        assert [record.levelname for record in caplog.records].count("INFO") <= 1
        assert f"wrote {out}, {out.stat().st_size} bytes, in " in caplog.text
        return [record.getMessage() for record in caplog.records if record.name.startswith("pear_train")]

    few, many = messages(32), messages(4)
    assert len(few) == len(many), "a message for every step would slow the loop, and bury the rest"
    for text in (
        r"decoded 36 images in [\d.]+ s, kept 110592 bytes",
        r"t: ready to train in [\d.]+ s",
        r"t: scored 2 adapters by taylor in [\d.]+ s",
        r"t: pruned 1 of 2 adapters in [\d.]+ s: positions that borrow from this task: 1, from the bank: 0",
        r"t: epoch 1 of 2 in [\d.]+ s",
        r"t: kept the state, \d+ bytes, in [\d.]+ s",
        r"t: evaluated the written task in [\d.]+ s",
        r"t: trained in [\d.]+ s",
    ):
        assert any(re.search(text, message) for message in few), text


def test_a_library_call_prints_nothing(tmp_path: Path, backbone: Backbone, capfd: pytest.CaptureFixture[str]) -> None:
    images, targets = np.zeros((8, 16, 16, 3), np.uint8), np.arange(8) % 2
    np.savez(tmp_path / "d.npz", x_train=images, y_train=targets, x_val=images, y_val=targets)
    config = TrainConfig(task="t", method="linear", epochs=1, img_size=32, dtype="float32")
    train(config, backbone, open_dataset(str(tmp_path / "d.npz")), tmp_path / "t")
    assert capfd.readouterr() == ("", "")
