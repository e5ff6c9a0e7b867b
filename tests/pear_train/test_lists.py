"""Lists of images and folders of Hugging Face's datasets, as data to train and evaluate with."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
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
    with pytest.raises(DataError, match="line 14 of the list: expected 3 fields, as in the header, found 4"):
        open_dataset(str(path))
    with pytest.raises(DataError, match="column 'label' is missing: expected image and label, found image, split"):
        open_dataset(write(path, [{"image": "p/1.png", "split": "train"}]))
    with pytest.raises(DataError, match="no row is of split train: found 'test'"):
        open_dataset(write(path, [{**row, "split": "test"} for row in ROWS]))
    assert set(open_labelled(str(path), needs_train=False).splits) == {"test"}


def test_pictures_of_test_that_are_in_train_too_are_said(pictures: Path) -> None:
    rows = [*ROWS, {"image": "p/0.png", "label": "cat", "split": "test"}]
    found = open_dataset(write(pictures / "l.csv", rows))
    assert found.cautions == ("pictures of test that are in train, too (1): 'p/0.png'",) and not found.notes
    assert "Warning: l.csv: pictures of test that are in train, too (1)" in found.summary("l.csv")
    other = {"image": "p/../p/4.png", "label": "cat", "split": "test"}
    (caution,) = open_dataset(write(pictures / "l.csv", [*ROWS, other])).cautions
    assert caution.startswith("pictures of test that are in val, too (1)")


def test_a_picture_has_one_label_and_is_taken_once(pictures: Path) -> None:
    again = {"image": "./p/0.png", "label": "cat", "split": "training"}
    found = open_dataset(write(pictures / "l.csv", [*ROWS, again]))
    assert found.counts["train"] == [2, 2]
    assert found.notes == ("rows that repeat earlier rows (1): './p/0.png'",) and not found.cautions
    with pytest.raises(DataError, match=r"row 13: 'p/0.png' is 'dog', but in row 1 it is 'cat': expected one label"):
        open_dataset(write(pictures / "l.csv", [*ROWS, {"image": "p/0.png", "label": "dog", "split": "test"}]))
    within = [{**row, "image": (pictures / row["image"]).read_bytes()} for row in ROWS]
    within.append({**within[0], "label": "dog", "split": "test"})
    found = open_dataset(write(pictures / "l.parquet", within))
    assert found.cautions == (
        "pictures of test that are in train, too (1): '13'", "pictures that equal others with another label (1): '13'",
    )  # fmt: skip


def test_spaces_around_a_label_are_no_part_of_it(pictures: Path) -> None:
    rows = [{**row, "label": row["label"] + " " * (i % 3)} for i, row in enumerate(ROWS)]
    for ending in (".csv", ".jsonl", ".parquet"):
        assert open_dataset(write(pictures / f"l{ending}", rows)).classes == ("cat", "dog")
    with pytest.raises(DataError, match="row 1 has no label"):
        open_dataset(write(pictures / "l.csv", [{**ROWS[0], "label": "  "}, *ROWS[1:]]))


def test_labels_of_thousands_of_digits_are_sorted_by_size(pictures: Path) -> None:
    """Python refuses to read a number of more than 4,300."""
    labels = ["9" * 5000, "1" + "0" * 5000, "07"]
    found = open_labelled(write(pictures / "l.csv", [{**row, "label": labels[i % 3]} for i, row in enumerate(ROWS)]))
    assert found.classes == ("07", labels[0], labels[1])


def test_labels_that_look_alike_are_named(pictures: Path) -> None:
    labels = ("1", "1.0", "01", "2")
    found = open_dataset(write(pictures / "l.csv", [{**row, "label": labels[i % 4]} for i, row in enumerate(ROWS)]))
    assert "classes whose names differ only by case, spaces or zeros: '01', '1', '1.0'" in [*found.warnings()]
    found = open_dataset(
        write(pictures / "m.csv", [{**row, "label": ("1", "01")[i % 2]} for i, row in enumerate(ROWS)])
    )
    assert found.classes == ("1", "01"), "always in this order"


def test_a_list_without_rows_and_one_of_another_encoding_are_one_line(pictures: Path) -> None:
    for text, told in (
        (b"image,label\n", "l.csv: an image list: has no rows"),
        ("image,label\n".encode("utf-16"), "save the list as UTF-8"),
    ):
        (pictures / "l.csv").write_bytes(text)
        with pytest.raises(DataError, match=told) as refused:
            open_dataset(str(pictures / "l.csv"))
        assert "\n" not in str(refused.value)


# ---- datasets of Hugging Face --------------------------------------------------------------------


def table_of(pictures: Path, numbers: range, **columns: Any) -> pa.Table:
    """Pictures with names that other splits have, too."""
    images = [{"bytes": (pictures / "p" / f"{i}.png").read_bytes(), "path": f"{i % 4}.png"} for i in numbers]
    return pa.table({"image": images, "label": [("cat", "dog")[i % 2] for i in numbers], **columns})


def write_saved(folder: Path, splits: dict[str, pa.Table]) -> Path:
    """What `save_to_disk` of `datasets` writes, without that package."""
    folder.mkdir()
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    for name, table in splits.items():
        (folder / name).mkdir()
        (folder / name / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
        (folder / name / "dataset_info.json").write_text(json.dumps({"features": None}))
        with pa.OSFile(str(folder / name / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as rows:
            rows.write_table(table)
    return folder


def write_hub(folder: Path, splits: dict[str, pa.Table]) -> Path:
    """Parquet as the Hub has it."""
    (folder / "data").mkdir(parents=True)
    for name, table in splits.items():
        pq.write_table(table, folder / "data" / f"{name}-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("write_splits", [write_saved, write_hub])
def test_pictures_of_one_name_are_in_two_splits_only_if_they_are_equal(pictures: Path, write_splits: Any) -> None:
    """They are compared by their bytes, or, where there are none, by their paths."""
    apart = {"train": table_of(pictures, range(4)), "validation": table_of(pictures, range(4, 8))}
    apart["test"] = table_of(pictures, range(8, 12))
    found = open_dataset(str(write_splits(pictures / "apart", apart)))
    assert found.val.names == found.train.names == ("0.png", "1.png", "2.png", "3.png")
    assert not found.cautions and not found.notes
    shared = open_dataset(str(write_splits(pictures / "shared", {**apart, "test": table_of(pictures, range(2, 6))})))
    assert shared.cautions == (
        "pictures of test that are in train, too (2): '2.png', '3.png'",
        "pictures of test that are in val, too (2): '0.png', '1.png'",
    )
    unnamed = {
        name: table.set_column(0, "image", pc.struct_field(table.column(0), "bytes")) for name, table in apart.items()
    }
    found = open_dataset(str(write_splits(pictures / "unnamed", unnamed)))
    assert found.val.names == found.train.names == ("0", "1", "2", "3") and not found.cautions
    paths = {
        name: pa.table(
            {
                "image": pa.array([str(pictures / "p" / f"{i}.png") for i in rows], pa.large_string()),
                "label": table.column("label"),
            }
        )
        for (name, table), rows in zip(apart.items(), (range(4), range(4, 8), range(3, 7)), strict=True)
    }
    cautions = open_dataset(str(write_splits(pictures / "paths", paths))).cautions
    assert [caution.split(":")[0] for caution in cautions] == [
        "pictures of test that are in train, too (1)", "pictures of test that are in val, too (3)",
    ]  # fmt: skip


def make_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def corrupt_offsets(file: Path) -> None:
    """Says that the first picture begins far behind the file's end."""
    data = bytearray(file.read_bytes())
    with pa.memory_map(str(file)) as mapped:
        lengths = [len(image["bytes"]) for image in pa.ipc.open_stream(mapped).read_all()["image"].to_pylist()]
    offsets = np.cumsum([0, *lengths]).astype(np.int32).tobytes()
    start = data.index(offsets)
    data[start + 4 : start + 8] = np.int32(2**30).tobytes()
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda at: (at / "dataset_dict.json").write_text('{"splits": []}'), "dataset_dict.json: expected a list of s"),
        (lambda at: (at / "dataset_dict.json").write_text("[1"), "dataset_dict.json: cannot be read"),
        (lambda at: shutil.rmtree(at / "test"), "test/state.json: no such file"),
        (lambda at: (at / "test" / "data.arrow").unlink(), "test/data.arrow: no such file"),
        (lambda at: (at / "test" / "data.arrow").write_bytes(b""), "test/data.arrow: cannot be read as Arrow"),
        (lambda at: os.truncate(at / "test" / "data.arrow", 900), "test/data.arrow: cannot be read as Arrow"),
        (lambda at: corrupt_offsets(at / "test" / "data.arrow"), "test/data.arrow: cannot be read as Arrow"),
        (lambda at: make_pipe(at / "test" / "data.arrow"), "a pipe: expected"),
        (lambda at: (at / "test" / "state.json").write_text('{"_data_files": 1}'), "expected a list of data files"),
        (lambda at: (at / "test" / "dataset_info.json").unlink(), "dataset_info.json: no such file"),
    ],
)  # fmt: skip
def test_a_damaged_folder_of_datasets_is_one_clear_line(pictures: Path, damage: Any, told: str) -> None:
    splits = {"train": table_of(pictures, range(8)), "test": table_of(pictures, range(8, 12))}
    damage(write_saved(pictures / "saved", splits))
    with pytest.raises(DataError) as refused:
        open_dataset(str(pictures / "saved"))
    assert told in str(refused.value) and "\n" not in str(refused.value)
    assert str(refused.value).count(str(pictures)) == 1, "names the file once"


NO_TEXT = pa.StringArray.from_buffers(1, pa.array([0, 1], pa.int32()).buffers()[1], pa.py_buffer(b"\xff"))


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"image": [b"x"], "label": [[1]]}, "column 'label' holds list<"),
        ({"image": [b"x"], "label": [b"a"]}, "column 'label' holds binary: expected one number or text for each row"),
        ({"image": [b"x"], "label": [math.nan]}, "test, row 0: expected a label that names a class"),
        ({"image": [b"x"], "label": NO_TEXT}, "parquet: cannot be read as Parquet: "),
        ({"image": [b"x"]}, "expected a column 'label', found 'image'"),
        ({"image": [], "label": []}, "the test split is empty"),
        ({"image": [1, 2], "label": ["cat", "dog"]}, "row 0: expected a picture, found none"),
        (None, "parquet: cannot be read as Parquet: "),
    ],
)
def test_a_damaged_folder_of_parquet_is_one_clear_line(pictures: Path, columns: Any, told: str) -> None:
    splits = {"train": table_of(pictures, range(8)), "test": table_of(pictures, range(8, 12))}
    file = write_hub(pictures / "hub", splits) / "data" / "test-00000-of-00001.parquet"
    if columns is None:
        os.truncate(file, 300)
    else:
        pq.write_table(pa.table(columns), file)
    with pytest.raises(DataError) as refused:
        open_dataset(str(pictures / "hub")).splits["test"].image(0)
    assert told in str(refused.value) and "\n" not in str(refused.value)
    pq.write_table(splits["test"], file)
    pq.write_table(pa.table({"image": [b"x"], "label": [1]}), file.with_name("test-00001-of-00001.parquet"))
    with pytest.raises(DataError, match="test-00001-of-00001.parquet: expected the columns of test-00000"):
        open_dataset(str(pictures / "hub"))


def test_a_lone_split_that_is_not_train_is_not_trained_on(pictures: Path) -> None:
    folder = write_hub(pictures / "hub", {"test": table_of(pictures, range(12))})
    with pytest.raises(DataError, match="has 'test': expected a split train"):
        open_dataset(str(folder))
    assert set(open_labelled(str(folder), needs_train=False).splits) == {"test"}


def test_a_stray_parquet_beside_class_folders_changes_nothing(pictures: Path) -> None:
    """And pictures beside Parquet files are named."""
    for i in range(12):
        (pictures / "set" / ("cat", "dog")[i % 2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures / "p" / f"{i}.png", pictures / "set" / ("cat", "dog")[i % 2])
    table = table_of(pictures, range(12))
    for stray in ("notes.parquet", "train.parquet", "data/train-00000-of-00001.parquet"):
        (pictures / "set" / stray).parent.mkdir(exist_ok=True)
        pq.write_table(table, pictures / "set" / stray)
        if stray.startswith("data"):
            shutil.rmtree(pictures / "set" / "data")
    found = open_dataset(str(pictures / "set"))
    assert "an image folder" in found.description and found.classes == ("cat", "dog")
    assert found.notes == ("files ending in .parquet (2): notes.parquet, train.parquet",)
    hub = write_hub(pictures / "hub", {"train": table})
    shutil.copytree(pictures / "p", hub / "card")
    found = open_dataset(str(hub))
    assert "a folder of Parquet files" in found.description
    assert found.notes == ("pictures beside the Parquet files (12): card/0.png, card/1.png, card/10.png, …",)


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
