"""The demo's images and picture; `make demo` itself runs the rest."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tools.demo import TASKS, empty_folder, main, write_folder


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_images_are_real_and_splits_are_apart(task: str, tmp_path: Path) -> None:
    made = TASKS[task]()
    labels = {split: {label for _, label in pictures} for split, pictures in made.items()}
    assert labels["train"] == labels["val"] == labels["test"]
    assert all(len(pictures) >= 36 for pictures in made.values())
    seen: dict[bytes, str] = {}
    for split, pictures in made.items():
        for picture, _ in pictures:
            if picture.std() > 4:  # plain sky may look alike anywhere
                assert seen.setdefault(picture.tobytes(), split) == split
    write_folder(tmp_path, {"train": made["train"][:3]})
    assert len(list(tmp_path.rglob("*.png"))) == 3


def test_the_demo_removes_only_what_it_made(tmp_path: Path) -> None:
    out = tmp_path / "mine"
    (out / "data").mkdir(parents=True)
    (out / "data" / "thesis.txt").write_text("mine")
    done = CliRunner().invoke(main, ["--out", str(out)])
    assert (done.exit_code, "mine: holds files that the demo did not make" in done.stderr) == (1, True)
    assert (out / "data" / "thesis.txt").read_text() == "mine"
    out = tmp_path / "demo"
    empty_folder(out)
    write_folder(out / "data" / "digits", {"train": [(np.zeros((4, 4), np.uint8), "0")]})
    (out / "table.txt").write_text("table")
    (out / "pear.store").symlink_to(tmp_path / "mine")
    empty_folder(out)
    assert [path.name for path in out.iterdir()] == [".pear-demo"]
    assert (tmp_path / "mine" / "data" / "thesis.txt").exists()
    (out / "notes.txt").write_text("mine")
    done = CliRunner().invoke(main, ["--out", str(out)])
    assert (done.exit_code, "demo: holds 'notes.txt', which is not the demo's" in done.stderr) == (1, True)
    assert (out / "notes.txt").read_text() == "mine"
