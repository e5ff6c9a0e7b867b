"""What folders are taken for: splits in any spelling, classes of any name, and what is asked rather than guessed."""

import os
from pathlib import Path

import pytest

from pear_train import DataError, open_dataset
from pear_train.data import DataOptions
from pear_train.data.layout import split_of
from tests.pear_train.test_data import folder, picture

CLASSES = ("cat", "dog")


def pictures(root: Path, *paths: str) -> Path:
    for value, path in enumerate(paths):
        picture(root / path, value)
    return root


def flat(root: Path, *names: str) -> Path:
    """Class folders of four pictures each."""
    return folder(root, classes=names, count=4)


def splits(root: Path, *names: str, classes: tuple[str, ...] = CLASSES) -> Path:
    for name in names:
        folder(root / name, classes=classes, count=4)
    return root


SPELLINGS = [
    ("train", "val", "test"),
    ("Train", None, "Test"),
    ("TRAIN", "VALID", "TEST"),
    ("training_set", None, "test_set"),
    ("train_data", "val_data", "test_data"),
    ("seg_train", None, "seg_test"),
    ("Training", None, "Testing"),
    ("train", "dev", "test"),
    ("train", "eval", None),
    ("train", "validate", "test1"),
    ("train", "validation", "tests"),
    ("trainset", "valset", "testset"),
    ("train2017", "val2017", "test2017"),
    ("training-images", "validation-images", None),
    ("TrainData", "ValData", "TestData"),
    ("01_train", "02_val", "03_test"),
]


@pytest.mark.parametrize("names", SPELLINGS)
def test_splits_in_any_usual_spelling(tmp_path: Path, names: tuple[str | None, ...]) -> None:
    root = splits(tmp_path / "d", *filter(None, names))
    data = open_dataset(str(root))
    assert data.classes == CLASSES
    assert len(data.train) == (6 if names[1] is None else 8)  # val is held out of train
    assert (data.test is None) == (names[2] is None)
    assert all(f"{name}/" in data.description for name in filter(None, names))


@pytest.mark.parametrize(
    "name", ["trainer", "trains_and_buses", "valley", "devil", "tester", "contest", "data", "protest"]
)
def test_names_that_only_look_alike_are_classes(tmp_path: Path, name: str) -> None:
    assert split_of(name) is None
    assert open_dataset(str(flat(tmp_path / "d", name, "other"))).classes == tuple(sorted((name, "other")))


@pytest.mark.parametrize(
    "names", [("bus", "car", "train"), ("Train", "bus"), ("beaker", "test_tube"), ("bus_station", "train_station")]
)
def test_classes_called_like_splits_among_others(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert open_dataset(str(flat(tmp_path / "d", *names))).classes == tuple(sorted(names))


UNSURE = {
    "two candidates": ("train", "val", "dev"),
    "two trains": ("train", "train_data", "test"),
    "two cases": ("train", "Train"),
    "more in the names": ("flowers_train", "flowers_test"),
    "another with the same classes": ("train", "test", "extra"),
    "holdout": ("train_x", "holdout"),
}


@pytest.mark.parametrize("names", UNSURE.values(), ids=UNSURE)
def test_what_looks_like_splits_is_refused_with_the_remedy(tmp_path: Path, names: tuple[str, ...]) -> None:
    root = str(splits(tmp_path / "d", *names))
    with pytest.raises(DataError, match="look like splits, .*--train-split NAME.*or give --no-splits") as caught:
        open_dataset(root)
    assert sum(f"{name}/" in str(caught.value) for name in names) >= 2
    named = open_dataset(root, options=DataOptions(train_split=names[0], val_split="none", test_split=names[-1]))
    assert named.classes == CLASSES and len(named.train) + len(named.val) == 8
    assert named.test is not None and len(named.test) == 8
    as_classes = open_dataset(root, options=DataOptions(no_splits=True))
    assert as_classes.classes == tuple(sorted(names))


def test_flat_folders_called_like_splits_are_refused(tmp_path: Path) -> None:
    for number, names in enumerate([("train", "test"), ("cat", "dog", "test"), ("cat", "dog", "val", "train")]):
        with pytest.raises(DataError, match="look like splits"):
            open_dataset(str(flat(tmp_path / str(number), *names)))
    unlabelled = splits(tmp_path / "kaggle", "train")
    pictures(unlabelled, "test/1.png", "test/2.png")
    with pytest.raises(DataError, match="test/ has no class folders"):
        open_dataset(str(unlabelled))
    data = open_dataset(str(unlabelled), options=DataOptions(test_split="none"))
    assert data.test is None and "folders that are not a split (1): test/" in data.notes


def test_a_split_named_by_hand_must_be_there_and_sure(tmp_path: Path) -> None:
    root = str(splits(tmp_path / "d", "a", "b"))
    for options, message in (
        (DataOptions(train_split="c"), "--train-split c: expected a folder with pictures, found a/, b/"),
        (DataOptions(test_split="b"), "no folder is recognised as train, found "),
        (DataOptions(train_split="a", val_split="a"), "expected a folder for each split, found one for two: a/"),
    ):
        with pytest.raises(DataError, match=message):
            open_dataset(root, options=options)
    data = open_dataset(root, options=DataOptions(train_split="a", test_split="b/"))
    assert "with a/, b/" in data.description
    deep = splits(tmp_path / "deep" / "x", "one", "two")
    data = open_dataset(str(deep.parent), options=DataOptions(train_split="x/one", val_split="x/two"))
    assert (len(data.train), len(data.val)) == (8, 8)
    with pytest.raises(DataError, match="not an image folder"):
        open_dataset("torch/cifar10", options=DataOptions(no_splits=True))


def test_splits_inside_of_classes_are_not_mixed(tmp_path: Path) -> None:
    for name in ("bottle", "cable"):
        splits(tmp_path / name, "train", "test", classes=("good",))
    with pytest.raises(DataError, match="bottle/ holds test/, train/, which look like splits inside of a class"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize("wrapped", [("images",), ("pets", "images"), ("train",)])
def test_a_wrapping_folder_is_gone_into_and_said(tmp_path: Path, wrapped: tuple[str, ...]) -> None:
    inner = splits(tmp_path.joinpath(*wrapped), "train", "test")
    (tmp_path / "__MACOSX").mkdir()
    data = open_dataset(str(tmp_path))
    assert data.classes == CLASSES and data.test is not None
    assert f"in its only folder {wrapped[0]}/" in data.description
    assert data.notes == ("hidden or left by a system (1): __MACOSX/",)
    assert data.fingerprint == open_dataset(str(inner)).fingerprint


def test_a_wrapping_folder_of_classes_and_doubled_splits(tmp_path: Path) -> None:
    flat(tmp_path / "w" / "flowers", *CLASSES)
    assert open_dataset(str(tmp_path / "w")).classes == CLASSES
    for split in ("seg_train", "seg_test"):
        flat(tmp_path / "intel" / split / split, *CLASSES)
    data = open_dataset(str(tmp_path / "intel"))
    assert data.classes == CLASSES and data.test is not None


def test_one_class_is_refused(tmp_path: Path) -> None:
    for root in (flat(tmp_path / "a", "cat"), splits(tmp_path / "b", "train", classes=("cat",)),
                 splits(tmp_path / "c", "train", "val", classes=("cat",))):  # fmt: skip
        with pytest.raises(DataError, match="only one class, 'cat': expected at least two"):
            open_dataset(str(root))


def test_what_systems_leave_behind_is_ignored_and_counted(tmp_path: Path) -> None:
    root = flat(tmp_path / "d", *CLASSES)
    pictures(
        root, ".ipynb_checkpoints/cat-checkpoint.png", ".Trash/1.png", "__pycache__/1.png", "__MACOSX/cat/1.png",
        "@eaDir/1.png", "cat/._1.png", "cat/@eaDir/2.png", "cat/.ipynb_checkpoints/1.png", "stray.png",
    )  # fmt: skip
    for name in ("cat/Thumbs.db", "cat/desktop.ini", "cat/notes.txt", "dog/README", "dog/a.HEIC", "dog/b.heic",
                 "dog/clip.mpg", "dog/set.h5", "labels.csv"):  # fmt: skip
        (root / name).write_bytes(b"x")
    os.mkfifo(root / "cat" / "pipe.png")
    (root / "cat" / "gone.png").symlink_to("nowhere")
    (root / "cat" / "itself.png").symlink_to("itself.png")
    (root / "cat" / "folder.jpg").mkdir()
    picture(root / "dog" / "folder.jpg" / "9.png", 9)
    data = open_dataset(str(root))
    assert data.classes == CLASSES
    assert data.counts["train"] == [2, 3] and sum(map(len, data.splits.values())) == 9
    assert data.notes == (
        "files ending in .csv (1): labels.csv",
        "files ending in .h5 (1): dog/set.h5",
        "files ending in .heic (2): dog/a.HEIC, dog/b.heic",
        "files ending in .mpg (1): dog/clip.mpg",
        "files ending in .txt (1): cat/notes.txt",
        "files without an ending (1): dog/README",
        "folders without pictures whose names end like a picture's (1): cat/folder.jpg/",
        "hidden or left by a system (10): .Trash/, .ipynb_checkpoints/, @eaDir/, …",
        "links to nothing (2): cat/gone.png, cat/itself.png",
        "pictures outside of class folders (1): stray.png",
        "pipes, sockets and devices (1): cat/pipe.png",
    )


def test_links_are_followed_and_never_in_circles(tmp_path: Path) -> None:
    root = flat(tmp_path / "d", "cat")
    (root / "dog").symlink_to(flat(tmp_path / "elsewhere", "hounds") / "hounds")
    more = pictures(tmp_path / "more", "1.png", "2.png")
    (root / "cat" / "more").symlink_to(more)
    (root / "cat" / "up").symlink_to(root)
    (root / "cat" / "here").symlink_to(root / "cat")
    data = open_dataset(str(root))
    assert data.classes == ("cat", "dog")
    assert [sum(column) for column in zip(*data.counts.values(), strict=True)] == [6, 4]
    assert data.notes == ("folders that links lead to in a circle or too often (2): cat/up/, cat/here/",)
    linked = splits(tmp_path / "s", "train")
    (linked / "val").symlink_to("train")
    assert len(open_dataset(str(linked)).val) == 8


def test_links_upon_links_do_not_multiply_without_bound(tmp_path: Path) -> None:
    root = flat(tmp_path / "d", *CLASSES)
    deep = tmp_path / "deep"
    for level in range(30):
        (deep / str(level)).mkdir(parents=True)
        for side in "ab":
            (deep / str(level) / side).symlink_to(deep / str(level + 1))
    (deep / "30").mkdir()
    (root / "cat" / "links").symlink_to(deep / "0")
    data = open_dataset(str(root))
    assert sum(map(len, data.splits.values())) == 8
    assert "folders that links lead to in a circle or too often" in data.notes[0]


def test_an_empty_class_says_what_it_holds_instead(tmp_path: Path) -> None:
    root = flat(tmp_path / "d", *CLASSES)
    for name in ("phone/1.HEIC", "phone/2.HEIC"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"x")
    (root / "empty").mkdir()
    with pytest.raises(DataError, match="2 faults in the data:") as caught:
        open_dataset(str(root))
    assert "d/empty: class folder without images: add some" in str(caught.value)
    assert "d/phone: class folder without images (files ending in .heic (2): phone/1.HEIC, " in str(caught.value)


def test_faults_of_all_splits_come_at_once(tmp_path: Path) -> None:
    root = splits(tmp_path / "d", "train")
    splits(root, "val", classes=("cat", "wolf"))
    splits(root, "test", classes=("cat", "Dog"))
    (root / "train" / "empty").mkdir()
    with pytest.raises(DataError, match="3 faults in the data:") as caught:
        open_dataset(str(root))
    for part in (
        "train/empty: class folder",
        "val: classes 'dog', 'wolf' are not in both",
        "test: classes 'Dog', 'dog'",
    ):
        assert part in str(caught.value)


def test_class_names_that_a_checkpoint_cannot_hold_are_found_at_once(tmp_path: Path) -> None:
    root = flat(tmp_path / "d", *CLASSES)
    for name in (b"two\nlines", b"caf\xe9"):
        os.mkdir(os.path.join(os.fsencode(root), name))
        picture(Path(os.fsdecode(os.path.join(os.fsencode(root), name))) / "1.png", 1)
    with pytest.raises(DataError, match="2 faults") as caught:
        open_dataset(str(root))
    assert "'two\\nlines': expected a name in UTF-8 without line breaks" in str(caught.value)
    assert "'caf\\udce9'" in str(caught.value)


def test_warnings_name_the_classes_and_their_counts(tmp_path: Path) -> None:
    root = folder(tmp_path / "d" / "train", classes=("common", "Common"), count=30)
    folder(root, classes=("rare",), count=1)
    for split in ("val", "test"):
        folder(tmp_path / "d" / split, classes=("common", "Common", "rare"), count=1)
    data = open_dataset(str(tmp_path / "d"))
    assert list(data.warnings()) == [
        "fewer than 2 training images: 'rare'",
        "classes whose names differ only by case: 'Common', 'common'",
        "uneven classes: 30 training images of 'Common', 1 of 'rare'. Top-1 hides the mistakes in rare classes: look "
        "at the recall of each class, and try --balance",
    ]
    assert data.table() == "train/val/test: Common 30/1/1, common 30/1/1, rare 1/1/1"
    assert list(open_dataset(str(flat(tmp_path / "even", *CLASSES))).warnings()) == []
