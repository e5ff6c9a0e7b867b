"""What the pear-train command prints is text, whatever files and tasks are called."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from pear_train.cli import main


@pytest.mark.slow
def test_names_with_escape_sequences_do_not_reach_the_terminal(tmp_path: Path) -> None:
    data = tmp_path / "red\x1b[31m"
    for label in ("a", "b"):
        (data / label).mkdir(parents=True)
        for i in range(12):
            pixels = np.full((16, 16, 3), 20 * i, np.uint8)
            Image.fromarray(pixels).save(data / label / f"{i}.png")
    (data / "a" / "x\x1b]0;title\x07\nError: forged.png").write_bytes(b"no picture")
    (data / "b" / "y.png").write_bytes(b"no picture")
    args = ["t", "--data", str(data), "--method", "linear", "--epochs", "1", "--img-size", "48"]
    args += ["--out", str(tmp_path / "t\x1b[2J.safetensors")]
    refused = CliRunner().invoke(main, args)
    assert refused.exit_code == 1 and "\\x1b[31m" in refused.output
    done = CliRunner().invoke(main, [*args, "--skip-unreadable"])
    assert done.exit_code == 0, done.output
    assert "t\\x1b[2J.safetensors" in done.output
    for output in (refused.output, done.output):
        assert all(line.isprintable() for line in output.replace("\r", "\n").split("\n"))
        assert not any(line.startswith("Error: forged") for line in output.split("\n"))


def test_a_run_that_succeeds_returns_to_who_called_the_command(tmp_path: Path) -> None:
    """As the demo does, which runs one after the other."""
    images, targets = np.zeros((8, 16, 16, 3), np.uint8), np.arange(8) % 2
    np.savez(tmp_path / "d.npz", x_train=images, y_train=targets, x_val=images, y_val=targets)
    args = ["t", "--data", str(tmp_path / "d.npz"), "--method", "linear", "--epochs", "1", "--img-size", "48"]
    for _ in range(2):  # trained, then found to be trained
        assert main.main([*args, "--out", str(tmp_path / "t")], standalone_mode=False) is None
