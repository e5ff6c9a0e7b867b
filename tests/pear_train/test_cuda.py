"""Training on a GPU: what it learns runs on a CPU, alone and beside other tasks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pear_store import read_checkpoint
from pear_train.cli import main
from router import Router
from tests.helpers.predictions import whole

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU at hand")]


def colours(path: Path, seed: int) -> None:
    """Three classes: noise with more red, green or blue."""
    rng = np.random.default_rng(seed)
    parts: dict[str, Any] = {}
    for split, count in (("train", 48), ("val", 24), ("test", 24)):
        targets = np.arange(count) % 3
        images = rng.integers(0, 120, (count, 48, 48, 3))
        images[np.arange(count), :, :, targets] += 100
        parts |= {f"x_{split}": images.astype(np.uint8), f"y_{split}": targets}
    np.savez(path, **parts)


@pytest.mark.parametrize("method", ["pear", "adapters", "linear"])
def test_a_task_trained_on_a_gpu_runs_on_a_cpu(tmp_path: Path, method: str) -> None:
    colours(tmp_path / "d.npz", 0)
    out = tmp_path / "t.safetensors"
    args = ["t", "--data", str(tmp_path / "d.npz"), "--backbone", "pear_tiny", "--epochs", "4", "--img-size", "48"]
    done = CliRunner().invoke(main, [*args, "--device", "cuda", "--method", method, "--out", str(out)])
    assert done.exit_code == 0, done.output
    task = read_checkpoint(out)
    assert task.record["training"]["machines"][0]["device"] == "cuda"
    data = np.load(tmp_path / "d.npz")
    routers = [Router("pear_tiny", device="cpu"), Router("pear_tiny", device="cuda")]
    for router in routers:
        router.add(task)
    cpu, cuda = (whole(router.run(data["x_test"], "t")) for router in routers)
    assert (cpu - cuda).abs().max() < 0.02
    accuracy = float((cpu.argmax(-1).numpy() == data["y_test"]).mean())
    assert abs(accuracy - task.record["metrics"]["test_top1"]) <= 1 / 24 and accuracy > 0.6


def test_many_tasks_train_together_on_a_gpu(tmp_path: Path) -> None:
    lines = ["epochs = 2", "img-size = 48"]
    for i in range(3):
        colours(tmp_path / f"{i}.npz", i)
        lines += [f"[tasks.t{i}]", f'data = "{i}.npz"']
    (tmp_path / "tasks.toml").write_text("\n".join(lines))
    args = ["--tasks", str(tmp_path / "tasks.toml"), "--out", str(tmp_path / "out"), "--device", "cuda"]
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 0, done.output
    for i in range(3):
        assert read_checkpoint(tmp_path / "out" / f"t{i}.safetensors").record["metrics"]
