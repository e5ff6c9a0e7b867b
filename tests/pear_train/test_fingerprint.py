"""A data set's fingerprint: the same for the same pictures wherever they lie, another after any change."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pear_train import open_dataset
from tests.pear_train.test_data import archive, folder, picture, vtab


def splits(root: Path) -> Path:
    for split in ("train", "val", "test"):
        folder(root / split, count=3)
    return root


def fingerprint(root: Path) -> str:
    return open_dataset(str(root)).fingerprint


def test_it_is_of_the_pictures_and_not_of_where_they_lie(tmp_path: Path) -> None:
    root = splits(tmp_path / "d")
    data = open_dataset(str(root))
    before = data.fingerprint
    assert len(before) == 64 and before == fingerprint(root)
    shutil.copytree(root, tmp_path / "elsewhere")
    os.utime(root / "train" / "cat" / "0.png", (1, 1))
    assert fingerprint(root) == fingerprint(tmp_path / "elsewhere") == before
    shutil.rmtree(root)
    assert data.fingerprint == before  # kept once computed


def repaint(root: Path) -> None:
    picture(root / "train" / "cat" / "1.png", 250)


def rename_class(root: Path) -> None:
    for split in ("train", "val", "test"):
        (root / split / "dog").rename(root / split / "wolf")


CHANGES: list[Callable[[Path], object]] = [
    repaint,
    rename_class,
    lambda root: (root / "train" / "cat" / "0.png").unlink(),
    lambda root: picture(root / "test" / "cat" / "9.png", 9),
    lambda root: (root / "train" / "cat" / "0.png").rename(root / "val" / "cat" / "8.png"),
    lambda root: (root / "val" / "cat" / "0.png").rename(root / "val" / "dog" / "8.png"),
    lambda root: (root / "test" / "cat" / "0.png").rename(root / "test" / "cat" / "00.png"),
    lambda root: shutil.rmtree(root / "test"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_of_pictures_classes_or_splits_shows(tmp_path: Path, change: Callable[[Path], object]) -> None:
    root = splits(tmp_path / "d")
    before = fingerprint(root)
    change(root)
    assert fingerprint(root) != before


def test_of_arrays_lists_and_named_data_sets(tmp_path: Path) -> None:
    first = open_dataset(str(archive(tmp_path / "a.npz")))
    assert first.fingerprint == open_dataset(str(archive(tmp_path / "b.npz"))).fingerprint
    x_test = np.random.default_rng(1).integers(0, 255, (6, 9, 9, 1), dtype=np.uint8)
    assert open_dataset(str(archive(tmp_path / "c.npz", x_test=x_test))).fingerprint != first.fingerprint
    listed = vtab(tmp_path / "v")
    before = fingerprint(listed)
    Image.new("RGB", (12, 10), "red").save(listed / "images" / "val200" / "000001.jpg")
    assert fingerprint(listed) != before
    for split in ("train", "validation"):
        folder(tmp_path / "named" / split, count=10)
    named = open_dataset("torch/image_folder", tmp_path / "named").fingerprint
    assert open_dataset("torch/image_folder", tmp_path / "named").fingerprint == named
    picture(tmp_path / "named" / "train" / "dog" / "3.png", 7)
    assert open_dataset("torch/image_folder", tmp_path / "named").fingerprint != named


def test_pictures_are_read_where_there_is_no_thread_more(tmp_path: Path, few_threads: Callable[[int], None]) -> None:
    root = splits(tmp_path / "d")
    before = fingerprint(root)
    few_threads(0)
    assert fingerprint(root) == before
