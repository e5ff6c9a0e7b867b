"""Pictures that cannot be read: all are named before the first epoch, or left out and counted."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pear_store import read_checkpoint
from pear_train import DataError, Dataset, Split, open_dataset
from pear_train.cli import main
from pear_train.data import DataOptions, Pixels, read_pictures
from router import Preprocess
from tests.helpers.makers import record
from tests.pear_train.test_data import folder, vtab

PREPROCESS = Preprocess(record()["preprocess"])


def broken(root: Path) -> list[str]:
    """Splits of two classes with a fault in each way; the paths of the faulty pictures."""
    for split in ("train", "val", "test"):
        folder(root / split, count=6)
    truncated = root / "train" / "cat" / "1.png"
    truncated.write_bytes(truncated.read_bytes()[:45])
    (root / "train" / "dog" / "2.png").write_text("no picture")
    (root / "val" / "cat" / "0.png").write_bytes(b"")
    (root / "test" / "dog" / "5.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    return ["train/cat/1.png", "train/dog/2.png", "val/cat/0.png", "test/dog/5.png"]


@pytest.mark.parametrize("cache", [4 * 1024**3, 0])
def test_all_are_named_at_once(tmp_path: Path, cache: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pear_train.data.pixels.CACHE_BYTES", cache)
    names = broken(tmp_path)
    data = open_dataset(str(tmp_path))
    with pytest.raises(DataError, match="4 of 36 images cannot be read: repair .*--skip-unreadable") as e:
        read_pictures(data, PREPROCESS)
    lines = str(e.value).splitlines()[1:]
    assert len(lines) == 4
    for line, name in zip(lines, names, strict=True):
        assert line.startswith(f"  {name.split('/')[0]}: ") and str(tmp_path / name) in line


@pytest.mark.parametrize("cache", [4 * 1024**3, 0])
def test_or_left_out_and_counted(tmp_path: Path, cache: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pear_train.data.pixels.CACHE_BYTES", cache)
    names = broken(tmp_path)
    data = open_dataset(str(tmp_path), options=DataOptions(skip_unreadable=True))
    left, pixels = read_pictures(data, PREPROCESS)
    assert [len(split) for split in left.splits.values()] == [len(read) for read in pixels.values()] == [10, 11, 11]
    assert len(left.unreadable) == 4 and left.fingerprint == data.fingerprint
    kept = {name for split in left.splits.values() for name in split.names}
    assert kept == {name for split in data.splits.values() for name in split.names}.difference(names)
    for name, split in left.splits.items():
        one_by_one = PREPROCESS([split.image(i) for i in range(len(split))])
        assert torch.equal(pixels[name].images(torch.arange(len(split))), one_by_one)
        assert pixels[name].targets.tolist() == split.targets.tolist()


def test_held_out_pictures_stay_where_they_are_without_the_unreadable(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", count=12)
    before = open_dataset(str(root), options=DataOptions(skip_unreadable=True))
    bad = before.train.names[3]
    (root / bad).write_text("no picture")
    left, _ = read_pictures(open_dataset(str(root), options=DataOptions(skip_unreadable=True)), PREPROCESS)
    assert left.train.names == tuple(name for name in before.train.names if name != bad)
    assert (left.val.names, left.test and left.test.names) == (before.val.names, before.test and before.test.names)


def test_a_class_that_nothing_is_left_of_is_refused(tmp_path: Path) -> None:
    for split in ("train", "val"):
        folder(tmp_path / split, count=2)
    for i in range(2):
        (tmp_path / "train" / "dog" / f"{i}.png").write_text("no picture")
    data = open_dataset(str(tmp_path), options=DataOptions(skip_unreadable=True))
    with pytest.raises(DataError, match="class 'dog' has no training image"):
        read_pictures(data, PREPROCESS)


def gone(root: Path) -> None:
    (root / "images" / "test" / "000001.jpg").unlink()


def pipe(root: Path) -> None:
    gone(root)
    os.mkfifo(root / "images" / "test" / "000001.jpg")


@pytest.mark.parametrize("fault", [gone, pipe])
def test_lists_of_pictures_that_are_not_there(tmp_path: Path, fault: Callable[[Path], None]) -> None:
    fault(vtab(tmp_path))
    data = open_dataset(str(tmp_path))
    assert len(data.fingerprint) == 64
    with pytest.raises(DataError, match="1 of 9 images cannot be read(.|\n)*test: .*000001.jpg"):
        read_pictures(data, PREPROCESS)


def test_whatever_a_reader_raises_is_named(tmp_path: Path) -> None:
    def image(number: int) -> np.ndarray:
        if number == 1:
            raise RuntimeError("decoder\nfailed")
        return np.zeros((4, 4, 3), np.uint8) if number else np.zeros((4, 4), np.float64)

    split = Split(image, torch.tensor([0, 1, 1]), ("a/1", "b/1", "b/2"))
    with pytest.raises(DataError) as caught:
        read_pictures(Dataset("made: up", ("a", "b"), split, split, None), PREPROCESS)
    assert "train: image b/1: cannot be read: decoder failed\n" in str(caught.value)
    assert "val: image a/1: array image float64 [4, 4]: expected uint8" in str(caught.value)
    with pytest.raises(DataError, match="2 faults in the data"):
        Pixels(split, PREPROCESS)


def test_the_command(tmp_path: Path) -> None:
    names = broken(tmp_path / "d")
    args = ["t", "--data", str(tmp_path / "d"), "--out", str(tmp_path / "t"), "--method", "linear", "--epochs", "1",
            "--img-size", "32"]  # fmt: skip
    failed = CliRunner().invoke(main, args)
    assert failed.exit_code == 1 and not (tmp_path / "t").exists()
    assert all(f"{tmp_path}/d/{name}" in failed.stderr for name in names) and "Traceback" not in failed.stderr
    done = CliRunner().invoke(main, [*args, "--skip-unreadable"])
    assert done.exit_code == 0, done.stderr
    assert read_checkpoint(tmp_path / "t").record["training"]["unreadable"] == {"train": 2, "val": 1, "test": 1}
