"""Lists of images and folders of Hugging Face's datasets, as data to train and evaluate with."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pear_train import DataError, open_dataset
from pear_train.data import open_labelled
from router import open_image
from router.pictures import ImageLike


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twelve pictures, each of its own grey, in folder `p`."""
    (tmp_path / "p").mkdir()
    for i in range(12):
        Image.fromarray(np.full((6, 8, 3), 20 * i, np.uint8)).save(tmp_path / "p" / f"{i}.png")
    return tmp_path


def grey(image: ImageLike) -> int:
    return int(np.asarray(open_image(image)).mean())


ROWS = [{"image": f"p/{i}.png", "label": ("cat", "dog")[i % 2], "split": ("train", "Validation", "test")[i // 4]}
        for i in range(12)]  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix.lower() == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix.lower() == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        between = {".csv": ";", ".tsv": "\t"}[path.suffix.lower()]
        path.write_text("\n".join([between.join(rows[0]), *(between.join(map(str, row.values())) for row in rows)]))
    return str(path)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet", ".CSV", ".Tsv", ".JSONL", ".PARQUET"])
def test_a_list_is_data_with_its_splits(pictures: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths begin in the list's folder, wherever the command runs."""
    monkeypatch.chdir("/")
    data = open_dataset(write(pictures / f"l{ending}", ROWS))
    assert data.classes == ("cat", "dog")
    assert data.counts == {"train": [2, 2], "val": [2, 2], "test": [2, 2]}
    assert data.val.names == ("p/4.png", "p/5.png", "p/6.png", "p/7.png")
    assert [grey(data.val.image(i)) for i in range(4)] == [80, 100, 120, 140]
    assert "an image list" in data.description


def test_without_a_split_a_tenth_of_each_class_is_held_out(pictures: Path) -> None:
    rows = [{key: row[key] for key in ("image", "label")} for row in ROWS]
    data = open_dataset(write(pictures / "l.csv", rows))
    assert data.counts == {"train": [4, 4], "val": [1, 1], "test": [1, 1]}
    assert set(open_labelled(str(pictures / "l.csv")).splits) == {"all"}


def test_labels_that_are_numbers_are_sorted_by_size(pictures: Path) -> None:
    data = open_dataset(write(pictures / "l.csv", [{**row, "label": (10, 2)[i % 2]} for i, row in enumerate(ROWS)]))
    assert data.classes == ("2", "10")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"label": ""}, "row 3 has no label"),
        ({"image": ""}, "row 3 has no image"),
        ({"split": "x1"}, "row 3: split 'x1': expected train, val or test"),
    ],
)
def test_a_row_that_says_too_little_is_named(pictures: Path, change: dict[str, str], told: str) -> None:
    rows = [dict(row) for row in ROWS]
    rows[2] |= change
    with pytest.raises(DataError, match=told):
        open_dataset(write(pictures / "l.csv", rows))


def test_a_line_that_is_no_row_and_a_column_that_is_missing_are_named(pictures: Path) -> None:
    path = pictures / "l.csv"
    path.write_text(Path(write(path, ROWS)).read_text() + "\np/1.png;cat;train;more")
    with pytest.raises(DataError, match="line 14 of the list has 4 fields, the header 3"):
        open_dataset(str(path))
    with pytest.raises(DataError, match="column 'label' is missing: expected image and label, found image, split"):
        open_dataset(write(path, [{"image": "p/1.png", "split": "train"}]))
    with pytest.raises(DataError, match="no row is of split train: found 'test'"):
        open_dataset(write(path, [{**row, "split": "test"} for row in ROWS]))
    assert set(open_labelled(str(path), needs_train=False).splits) == {"test"}


def test_pictures_of_test_that_are_in_train_too_are_said(pictures: Path) -> None:
    rows = [*ROWS, {"image": "p/0.png", "label": "cat", "split": "test"}]
    assert open_dataset(write(pictures / "l.csv", rows)).notes == ("1 pictures of test are in train, too: 'p/0.png'",)


# ---- datasets of Hugging Face --------------------------------------------------------------------


@pytest.fixture
def splits(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `datasets` itself makes of the pictures: a DatasetDict, whose test split has no labels."""
    monkeypatch.setenv("HF_HOME", str(pictures / "home"))
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])})

    def part(first: int, labels: list[int]) -> Any:
        files = [str(pictures / "p" / f"{i}.png") for i in range(first, first + 4)]
        return datasets.Dataset.from_dict({"image": files, "label": labels}, features=features)

    return datasets.DatasetDict(
        {"train": part(0, [1, 0, 1, 0]), "validation": part(4, [1, 0, 1, 0]), "test": part(8, [-1] * 4)}
    )


@pytest.mark.slow
def test_a_folder_that_datasets_saved_is_data(pictures: Path, splits: Any) -> None:
    splits.save_to_disk(str(pictures / "saved"))
    data = open_dataset(str(pictures / "saved"))
    assert data.classes == ("dog", "cat")  # in the order of their numbers
    assert data.counts["train"] == [2, 2] and data.counts["val"] == [2, 2]
    assert data.test is None and "split test: its pictures have no labels" in data.notes
    assert [grey(data.val.image(i)) for i in range(4)] == [80, 100, 120, 140]
    assert data.train.names == ("0.png", "1.png", "2.png", "3.png")
    assert data.fingerprint == open_dataset(str(pictures / "saved")).fingerprint
    within = splits["train"].map(lambda row: {"image": row["image"].copy()})  # a picture without a file
    within.save_to_disk(str(pictures / "alone"))
    shutil.rmtree(pictures / "p")
    alone = open_labelled(str(pictures / "alone")).splits
    assert set(alone) == {"all"} and grey(alone["all"].image(3)) == 60
    assert alone["all"].names == ("0", "1", "2", "3")
    (pictures / "saved" / "train" / "state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
    with pytest.raises(DataError, match=r"'\.\./x\.arrow': expected the name of a file"):
        open_dataset(str(pictures / "saved"))
    (pictures / "saved" / "train" / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    (pictures / "saved" / "train" / "data.arrow").write_bytes(b"no arrow")
    with pytest.raises(DataError, match=r"data\.arrow: cannot be read as Arrow"):
        open_dataset(str(pictures / "saved"))


@pytest.mark.slow
def test_parquet_as_the_hub_has_it_is_data(pictures: Path, splits: Any) -> None:
    (pictures / "hub" / "data").mkdir(parents=True)
    for name in ("train", "validation"):
        splits[name].to_parquet(str(pictures / "hub" / "data" / f"{name}-00000-of-00001.parquet"))
    data = open_dataset(str(pictures / "hub"))
    assert data.classes == ("dog", "cat") and data.counts == {"train": [2, 2], "val": [2, 2]}
    lone = open_labelled(str(pictures / "hub" / "data" / "train-00000-of-00001.parquet"))
    assert lone.classes == ("dog", "cat"), "the same file as a list: the numbers have names"
    capital = Path(shutil.copy(pictures / "hub" / "data" / "train-00000-of-00001.parquet", pictures / "T.PARQUET"))
    assert open_labelled(str(capital)).classes == ("dog", "cat")
    splits["test"].to_parquet(str(pictures / "t.parquet"))
    with pytest.raises(DataError, match="row 1: label '-1': expected the number of one of 2 classes"):
        open_dataset(str(pictures / "t.parquet"))
