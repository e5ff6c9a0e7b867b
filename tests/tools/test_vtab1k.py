"""The VTAB-1k command on a tiny fake of the layout."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from pear_store import read_checkpoint
from tools.vtab1k import GROUPS, main


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """All 19 folders, two classes each, with the four lists."""
    rng = np.random.default_rng(0)
    for name in (name for group in GROUPS.values() for name in group):
        lines: dict[str, list[str]] = {"train800": [], "val200": [], "test": []}
        for split, count in (("train800", 4), ("val200", 2), ("test", 2)):
            folder = tmp_path / "vtab" / name / "images" / split
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(folder / f"{i:06}.jpg")
                label = (
                    0 if name == "sun397" and split != "test" else i % 2
                )  # a class that train lacks, as the real one
                lines[split].append(f"images/{split}/{i:06}.jpg {label}")
        for split, found in (*lines.items(), ("train800val200", lines["train800"] + lines["val200"])):
            (tmp_path / "vtab" / name / f"{split}.txt").write_text("\n".join(found) + "\n")
    return tmp_path / "vtab"


def run(*args: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, [str(arg) for arg in args])
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.slow
def test_all_19_tasks_and_the_table(layout: Path, tmp_path: Path) -> None:
    options = ("--backbone", "pear_tiny", "--set", "epochs=2", "--set", "rank=1", "--together", 4)
    code, out, err = run(layout, "--out", tmp_path / "out", *options)
    assert code == 0, err
    assert "average of the group means" in out and "Convpass 76.4" in out
    task = read_checkpoint(tmp_path / "out" / "kitti.safetensors")
    assert task.record["training"]["select"] == "last"
    assert "train and val together are train" in task.record["training"]["data"]
    code, out, _ = run(layout, "--out", tmp_path / "out", *options, "--json")
    table = json.loads(out)
    assert set(table["tasks"]) == {name for group in GROUPS.values() for name in group}
    means = [np.mean([table["tasks"][name] for name in members]) for members in GROUPS.values()]
    assert table["average"] == pytest.approx(np.mean(means), abs=0.02)


def test_tuning_trains_on_800_and_never_shows_test(layout: Path, tmp_path: Path) -> None:
    options = ("--backbone", "pear_tiny", "--set", "epochs=2", "--tune", "--tasks", "cifar,kitti")
    code, out, err = run(layout, "--out", tmp_path / "out", *options)
    assert code == 0, err
    assert "val, %" in out and "test" not in out
    record = read_checkpoint(tmp_path / "out" / "cifar.safetensors").record
    assert "together" not in record["training"]["data"]
    assert set(record["metrics"]) == {"val_top1", "val_macro_f1"}


def test_mistakes(layout: Path, tmp_path: Path) -> None:
    for args, message in (
        (("--tasks", "cifar100"), "cifar100: no such folder: put VTAB-1k's task"),
        (("--set", "epoch=3"), "--set: unknown option 'epoch': expected one of method"),
        (("--set", "lr=high"), "--set: lr = 'high': expected float"),
        (("--set", "ratio=2"), "ratio = 2: expected at least 0 and below 1"),
    ):
        code, _, err = run(layout, "--out", tmp_path / "out", "--backbone", "pear_tiny", *args)
        assert code == 1 and message in err
