"""The demo's images and picture; `make demo` itself runs the rest."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from pear_store import Task, make_task, write_checkpoint
from tools import adapter_map
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
    assert (done.exit_code, "mine: holds files, and the demo did not make it" in done.stderr) == (1, True)
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


def test_the_map_is_drawn(task_maker: Callable[..., Task], tmp_path: Path) -> None:
    task = task_maker("a")
    borrowed = {**task.record["training"], "borrowed": {"blocks.5.attn": "blocks.0.attn"}}
    task = make_task({**task.record, "training": borrowed}, task.tensors)
    write_checkpoint(tmp_path / "a.safetensors", task)
    done = CliRunner().invoke(adapter_map.main, [str(tmp_path / "a.safetensors"), "--out", str(tmp_path / "m.png")])
    assert done.exit_code == 0, done.output
    assert np.asarray(Image.open(tmp_path / "m.png").convert("L")).std() > 10
    missing = CliRunner().invoke(adapter_map.main, ["nowhere", "--out", str(tmp_path / "m.png")])
    assert "nowhere: no such file" in missing.stderr
