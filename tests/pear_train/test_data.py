"""The layouts that --data takes, and what is said of those it does not."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pear_store import SourceError
from pear_train import DataError, Split, open_dataset
from pear_train.data import Pixels, augment, open_labelled
from router import Preprocess
from tests.helpers.makers import record


def picture(path: Path, value: int, grey: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (12, 10) if grey else (12, 10, 3)
    Image.fromarray(np.full(shape, value % 256, np.uint8)).save(path)


def folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 10, suffix: str = ".png") -> Path:
    for label, name in enumerate(classes):
        for i in range(count):
            picture(root / name / f"{i}{suffix}", 100 * label + i, grey=i % 2 == 0)
    return root


def size(split: Split | None) -> int:
    assert split is not None
    return len(split)


def images_of(split: Split | None) -> list[object]:
    assert split is not None
    return [split.image(i) for i in range(len(split))]


def test_folder_of_classes_is_held_out_always_alike(tmp_path: Path) -> None:
    data = open_dataset(str(folder(tmp_path / "d", count=20)))
    assert data.classes == ("cat", "dog")
    assert (size(data.train), size(data.val), size(data.test)) == (33, 4, 3)
    parts = [set(images_of(split)) for split in (data.train, data.val, data.test)]
    assert len(set.union(*parts)) == 40
    assert "an image folder (about a tenth of each class held out" in data.description
    again = open_dataset(str(tmp_path / "d"))
    assert [images_of(s) for s in (again.train, again.val)] == [images_of(s) for s in (data.train, data.val)]
    assert min(min(counts) for counts in data.counts.values()) >= 1


def test_an_image_that_comes_or_goes_moves_no_other(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", count=40)
    for i in range(40):
        picture(root / "dog" / "more" / f"{i}.png", i)
    where = membership(root)
    alone = [name for name, split in where.items() if [where[n] for n in where if n[:3] == name[:3]].count(split) == 1]
    for name in sorted(where)[::7]:
        if name in alone:
            continue
        (root / name).rename(tmp_path / "aside.png")
        assert membership(root) == {other: split for other, split in where.items() if other != name}
        (tmp_path / "aside.png").rename(root / name)
    picture(root / "cat" / "new.png", 1)
    (root / "bird").symlink_to(root / "cat")
    moved = {name for name, split in membership(root).items() if where.get(name, split) != split}
    assert not moved
    few = membership(folder(tmp_path / "few", classes=("a", "b", "c"), count=3))
    for label in "abc":  # a small class has one of each
        assert sorted(split for name, split in few.items() if name.startswith(label)) == ["test", "train", "val"]


def membership(root: Path) -> dict[str, str]:
    data = open_dataset(str(root))
    return {name: split for split, images in data.splits.items() for name in images.names}


def test_folder_with_splits(tmp_path: Path) -> None:
    for split, count in (("train", 8), ("validation", 3), ("test", 2)):
        folder(tmp_path / "d" / split, count=count, suffix=".jpg")
    data = open_dataset(str(tmp_path / "d"))
    assert (size(data.train), size(data.val), size(data.test)) == (16, 6, 4)
    assert "an image folder with train/, validation/, test/" in data.description


def test_folder_with_train_only(tmp_path: Path) -> None:
    folder(tmp_path / "d" / "train", count=10)
    data = open_dataset(str(tmp_path / "d"))
    assert (len(data.train), len(data.val), data.test) == (18, 2, None)


def vtab(root: Path, count: int = 4) -> Path:
    for name, size in (("train800", count), ("val200", 2), ("test", 3)):
        lines = []
        for i in range(size):
            picture(root / "images" / name / f"{i:06}.jpg", i)
            lines.append(f"images/{name}/{i:06}.jpg {i % 2}")
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def test_vtab(tmp_path: Path) -> None:
    data = open_dataset(str(vtab(tmp_path / "v")))
    assert data.classes == ("0", "1")
    assert (size(data.train), size(data.val), size(data.test)) == (4, 2, 3)
    assert "a VTAB-1k folder" in data.description
    (tmp_path / "v" / "val200.txt").write_text("images/a.jpg\n")
    with pytest.raises(DataError, match=r"val200.txt, line 1: 'images/a.jpg': expected an image path, a space"):
        open_dataset(str(tmp_path / "v"))
    (tmp_path / "v" / "val200.txt").write_bytes(b"images/val200/000000.jpg 0\nimages/caf\xe9.jpg 1\n")
    with pytest.raises(SourceError, match="val200.txt: line 2: byte 0xe9 is not UTF-8; save the file as UTF-8"):
        open_dataset(str(tmp_path / "v"))
    (tmp_path / "v" / "val200.txt").write_text("images/val200/000000.jpg 0\n", "utf-16")
    with pytest.raises(SourceError, match="val200.txt: is UTF-16: expected UTF-8; save it as UTF-8"):
        open_dataset(str(tmp_path / "v"))
    for label in ("100000", "1" * 20, "1" * 5000):
        (tmp_path / "v" / "val200.txt").write_text(f"images/val200/000000.jpg {label}\n")
        with pytest.raises(DataError, match="expected 0 to 99999|expected an image path"):
            open_dataset(str(tmp_path / "v"))
    (tmp_path / "v" / "val200.txt").unlink()
    with pytest.raises(DataError, match=r"val200.txt: no such file: a VTAB-1k folder needs"):
        open_dataset(str(tmp_path / "v"))


def test_vtab_lists_with_a_byte_order_mark_and_other_line_ends(tmp_path: Path) -> None:
    root = vtab(tmp_path / "v")
    before = open_dataset(str(root))
    for name in ("train800.txt", "val200.txt", "test.txt"):
        (root / name).write_bytes(b"\xef\xbb\xbf" + (root / name).read_bytes().replace(b"\n", b"\r\n"))
    data = open_dataset(str(root))
    assert images_of(data.train) == images_of(before.train) and data.fingerprint == before.fingerprint


def archive(path: Path, **changes: Any) -> Path:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {"classes": np.array(["one", "two"])}
    for name, count in (("train", 20), ("val", 4), ("test", 6)):
        arrays[f"x_{name}"] = rng.integers(0, 255, (count, 9, 9, 1), dtype=np.uint8)
        arrays[f"y_{name}"] = np.arange(count) % 2
    arrays.update(changes)
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def test_npz(tmp_path: Path) -> None:
    data = open_dataset(str(archive(tmp_path / "d.npz")))
    assert data.classes == ("one", "two")
    assert (size(data.train), size(data.val), size(data.test)) == (20, 4, 6)
    bare = open_dataset(
        str(archive(tmp_path / "b.npz", x_val=None, y_val=None, x_test=None, y_test=None, classes=None))
    )
    assert (bare.classes, len(bare.train), len(bare.val), bare.test) == (("0", "1"), 18, 2, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_train": None}, "y_train is missing: expected x_train and y_train"),
        ({"x_train": None, "y_train": None}, "expected x_train and y_train"),
        ({"x_val": np.zeros((4, 9, 9, 1), np.float32)}, r"x_val is float32 \[4, 9, 9, 1\]: expected uint8"),
        ({"y_val": np.zeros(3, np.int64)}, r"y_val is int64 \[3\]: expected integers \[4\]"),
        ({"y_val": np.full(4, 7)}, r"val labels 7\.\.7, expected 0\.\.1"),
        ({"y_train": np.zeros(20, np.int64)}, "class 'two' has no training image"),
        ({"y_train": np.zeros(20, np.int64), "classes": None}, r"val labels 0\.\.1, expected 0\.\.0"),
        (
            {"y_train": np.zeros(20, int), "classes": None, "y_val": np.zeros(4, int), "y_test": np.zeros(6, int)},
            "only one class, '0'",
        ),
        ({"y_train": np.arange(20) * 10**6, "classes": None}, r"d\.npz: class number 19000000: expected 0 to 99999"),
        ({"classes": np.array(["a", "a"])}, "class 'a' is named 2 times: expected different names"),
        ({"classes": np.array("ab")}, r"classes is <U2 \[\]: expected a list of names"),
        ({"classes": np.array([{"a": 1}], dtype=object)}, "not a NumPy archive: Object arrays cannot be loaded"),
    ],
)
def test_bad_npz(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset(str(archive(tmp_path / "d.npz", **changes)))


def test_labels_without_a_class_are_refused_to_evaluate_with(tmp_path: Path) -> None:
    """A negative one would be taken for a class counted from the end."""
    for labels in (np.full(6, -1), np.full(6, 2)):
        with pytest.raises(
            DataError, match=rf"a NumPy archive: test labels {labels[0]}\.\.{labels[0]}, expected 0\.\.1"
        ):
            open_labelled(str(archive(tmp_path / "d.npz", y_test=labels)), needs_train=False)


def test_what_is_no_archive_of_arrays_is_one_line(tmp_path: Path) -> None:
    whole = archive(tmp_path / "d.npz").read_bytes()
    np.save(tmp_path / "one.npy", np.zeros((3, 4, 4), np.uint8))
    with zipfile.ZipFile(tmp_path / "texts.npz", "w") as file:
        file.writestr("x_train", "no array")
    with zipfile.ZipFile(tmp_path / "heads.npz", "w") as file:
        file.writestr("x_train.npy", b"\x93NUMPY\x01\x00\x02\x00{(")
    files = {
        "one": (tmp_path / "one.npy").read_bytes(), "cut": whole[: len(whole) // 2], "none": b"",
        "damaged": whole[:100] + bytes(100) + whole[200:],
    }  # fmt: skip
    for name, data in files.items():
        (tmp_path / f"{name}.npz").write_bytes(data)
    for name in (*files, "heads"):
        with pytest.raises(DataError, match=rf"{name}\.npz: not a NumPy archive: ") as refused:
            open_dataset(str(tmp_path / f"{name}.npz"))
        assert "\n" not in str(refused.value)
    with pytest.raises(DataError, match="'x_train' is not an array: expected an archive that numpy.savez wrote"):
        open_dataset(str(tmp_path / "texts.npz"))


def test_npz_class_names_may_be_bytes(tmp_path: Path) -> None:
    assert open_dataset(str(archive(tmp_path / "d.npz", classes=np.array([b"one", b"two"])))).classes == ("one", "two")


def test_names_that_timm_knows(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        folder(tmp_path / split, count=10)
    data = open_dataset("torch/image_folder", tmp_path)
    assert data.classes == ("cat", "dog")
    assert (size(data.train), size(data.val), size(data.test)) == (18, 2, 20)
    assert "a data set that timm knows" in data.description
    with pytest.raises(DataError, match="torch/nothing_such: timm could not open its train split"):
        open_dataset("torch/nothing_such", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="--data-root .*file: the folder cannot be made: File exists"):
        open_dataset("torch/image_folder", tmp_path / "file")


def test_what_readers_print_is_no_part_of_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def create(*args: object, **settings: object) -> None:
        print("downloading")
        raise ImportError("no such package")

    monkeypatch.setattr("pear_train.data.timm_data.create_dataset", create)
    with pytest.raises(DataError, match="no such package"):
        open_dataset("tfds/x", tmp_path)
    assert capsys.readouterr() == ("", "downloading\n")


def test_what_is_none_of_these_says_what_was_looked_for(tmp_path: Path) -> None:
    looked = "expected a folder with one folder of images per class"
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="data '': expected a file, a folder or a name"):
        open_dataset("")
    for data in (tmp_path / "nowhere", tmp_path / "notes.txt", tmp_path / "empty", tmp_path / ("x" * 5000)):
        with pytest.raises(DataError, match=looked):
            open_dataset(str(data))


def test_folder_mistakes(tmp_path: Path) -> None:
    root = folder(tmp_path / "d")
    (root / "empty").mkdir()
    with pytest.raises(DataError, match=r"d/empty: class folder without images: add some, or remove the folder"):
        open_dataset(str(root))
    folder(tmp_path / "s" / "train")
    folder(tmp_path / "s" / "test", classes=("cat", "bird"))
    with pytest.raises(DataError, match="classes 'bird', 'dog' are not in both"):
        open_dataset(str(tmp_path / "s"))
    folder(tmp_path / "t" / "test")
    with pytest.raises(DataError, match=r"has test/ but no train/"):
        open_dataset(str(tmp_path / "t"))
    one = folder(tmp_path / "one", count=1)
    with pytest.raises(DataError, match="split is empty|has no training image"):
        open_dataset(str(one))


def test_pixels_are_what_the_router_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_dataset(str(folder(tmp_path / "d", count=20)))
    preprocess = Preprocess(record()["preprocess"])
    rows = torch.tensor([3, 0, 7])
    cached = Pixels(data.train, preprocess).images(rows)
    monkeypatch.setattr("pear_train.data.pixels.CACHE_BYTES", 0)
    assert torch.equal(Pixels(data.train, preprocess).images(rows), cached)
    assert torch.equal(preprocess([data.train.image(i) for i in (3, 0, 7)]), cached)


def test_augmentation_flips_and_shifts_and_leaves_its_input_alone() -> None:
    images = torch.arange(2 * 3 * 16 * 16, dtype=torch.float32).reshape(2, 3, 16, 16).repeat(8, 1, 1, 1)
    before = images.clone()
    generator = torch.Generator().manual_seed(0)
    assert augment(images, "none", generator) is images
    flipped = augment(images, "flip", generator)
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    assert bool((same ^ mirrored).all()) and 0 < int(mirrored.sum()) < 16
    shifted = augment(images, "crop", generator)
    assert shifted.shape == images.shape
    inner = shifted[:, :, 4:12, 4:12]
    offsets = {
        (dy, dx)
        for one, image in zip(inner, images, strict=True)
        for dy in range(-2, 3)
        for dx in range(-2, 3)
        if torch.equal(one, image[:, 4 + dy : 12 + dy, 4 + dx : 12 + dx])
    }
    assert len(offsets) > 4  # up to an eighth of 16 pixels either way
    assert all(
        any(
            torch.equal(one, image[:, 4 + dy : 12 + dy, 4 + dx : 12 + dx]) for dy in range(-2, 3) for dx in range(-2, 3)
        )
        for one, image in zip(inner, images, strict=True)
    )
    assert torch.equal(images, before)
