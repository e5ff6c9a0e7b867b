"""A task as a plain timm model: merged adapters, the head in place, and logits equal to the router's."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data.transforms_factory import create_transform

from pear_store import PearStoreError, Store, Task, make_task
from router import Backbone, Router, choose_positions
from router.exports import export_timm
from tests.conftest import SHARED
from tests.helpers.backbones import random_module, random_task, saved
from tests.pear_store.test_cli import run
from tests.router.test_cores import on_bases

Maker = Callable[..., Task]
LINEARS = ("blocks.3.attn.qkv", "blocks.4.mlp.fc2")


def made_by_timm(file: Path) -> tuple[Any, dict[str, Any]]:
    """The model of a file, as docs/export.md makes it."""
    about = json.loads(Path(f"{file}.json").read_text())
    model = timm.create_model(**about["create_model"]).eval()
    model.load_state_dict(load_file(file))
    return model, about


def answers(backbone: Backbone, task: Task, images: Any) -> torch.Tensor:
    with Router(backbone, device="cpu", merge=False) as router:
        logits = router.run(images, router.add(task)).logits
    assert isinstance(logits, torch.Tensor)
    return logits


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [
        ("test_vit", None, 7),
        ("test_vit", (96, 96), 200),
        ("test_vit3", None, 7),
        ("test_convnext3", (96, 64), 200),
        pytest.param("mobilevit_xxs", (96, 96), 200, marks=pytest.mark.slow),
        ("test_vit_relpos", None, 7),
    ],
)
def test_timm_loads_it_with_equal_logits(name: str, size: tuple[int, int] | None, count: int, tmp_path: Path) -> None:
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    module = random_module(name)
    backbone = Backbone(module, name)
    positions = [
        p for p, m in module.named_modules() if type(m) is torch.nn.Linear and ("blocks" in p or "stages" in p)
    ]
    task = random_task(backbone, positions[:6], size=size)
    weights = saved(module, tmp_path / "weights.safetensors")
    result = export_timm(task, tmp_path / "out", weights=weights)
    model, about = made_by_timm(tmp_path / "out")
    assert about["create_model"]["num_classes"] == 5 and about["labels"] == [f"t-{i}" for i in range(5)]
    images = torch.randn(count, 3, *(size or backbone.input_size), generator=torch.Generator().manual_seed(9))
    expected = answers(backbone, task, images)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=1e-4)
    assert expected.std(0).min() > 1e-3  # else the answers for other images would be as good
    assert result["max_difference"] < 1e-4 * max(1, float(expected.abs().max()))
    assert (answers(backbone, random_task(backbone, [], size=size), images) - expected).abs().max() > 0.01


@pytest.mark.parametrize(
    "options",
    [{}, {"own": 2, "cores": 2}, {"bits": 4}, {"bits": 1, "own": 1}],
    ids=["common bases", "own adapters beside", "4 bits", "1 bit"],
)
def test_cores_codes_and_own_parts_are_merged(options: dict[str, Any], backbone: Backbone, tmp_path: Path) -> None:
    task = on_bases("t", 3, positions=LINEARS, **options)
    export_timm(task, tmp_path / "out")
    model, _ = made_by_timm(tmp_path / "out")
    images = torch.randn(4, 3, 48, 48)
    expected = answers(backbone, task, images)
    with torch.inference_mode():
        bound = 1e-4 * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(model(images), expected, atol=bound, rtol=0)


SNIPPET = (Path(__file__).parents[3] / "docs" / "export.md").read_text().split("```python\n")[1].split("```")[0]


def test_without_pear_the_docs_lines_give_the_routers_answer_for_a_picture(
    store: Store, backbone: Backbone, tmp_path: Path
) -> None:
    task = on_bases("dtd", 5, positions=LINEARS, own=2)
    store.add(task)
    done = run("--store", store.path, "export-timm", "dtd", tmp_path / "dtd-timm.safetensors", "--json")
    told = json.loads(done.stdout)
    assert (told["task"], told["version"], told["create_model"]["num_classes"]) == ("dtd", 1, 3)
    assert {row["file"] for row in told["files"]} == {
        f"{tmp_path}/dtd-timm.safetensors",
        f"{tmp_path}/dtd-timm.safetensors.json",
    }
    assert all(Path(row["file"]).stat().st_size == row["bytes"] for row in told["files"])
    pixels = np.random.default_rng(0).integers(0, 256, (61, 83, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    code = SNIPPET + (
        "\nimport sys\nours = sorted({'pear_store', 'router'} & set(sys.modules))"
        "\nprint(json.dumps([logits[0].tolist(), about['labels'], ours]))"
    )
    done_alone = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    logits, labels, ours = json.loads(done_alone.stdout.splitlines()[-1])
    assert ours == [] and labels == list(task.labels)
    expected = answers(backbone, task, [tmp_path / "photo.png"])[0]
    torch.testing.assert_close(torch.tensor(logits), expected, atol=1e-4, rtol=1e-4)


def test_the_json_has_the_task_s_threshold(backbone: Backbone, tmp_path: Path) -> None:
    task = on_bases("t", 1, positions=LINEARS)
    export_timm(task, tmp_path / "plain")
    export_timm(make_task({**task.record, "threshold": 0.75}, task.tensors), tmp_path / "x")
    told = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("plain", "x")]
    assert [about.get("threshold") for about in told] == [None, 0.75]
    assert "threshold" not in told[0]


def test_what_cannot_be_merged_is_refused_with_the_reason(
    backbone: Backbone, task_maker: Maker, store: Store, tmp_path: Path
) -> None:
    store.add(task_maker("blocks"))
    done = run("--store", store.path, "export-timm", "blocks", tmp_path / "x")
    assert done.exit_code == 1 and not list(tmp_path.glob("x*"))
    assert (
        "task 'blocks' cannot be merged: positions 'blocks.0.attn', 'blocks.2.mlp', 'blocks.5.attn' are whole modules"
        in (done.stderr)
    )
    assert "'pear-store export-onnx' takes any task; 'pear-train --positions linear'" in done.stderr
    with pytest.raises(PearStoreError, match="adapters have the activation 'relu', expected 'identity'; .*export-onnx"):
        export_timm(on_bases("t", 1, positions=LINEARS, activation="relu"), tmp_path / "x")


def test_a_task_of_another_backbone_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    task = on_bases("t", 1, positions=LINEARS)
    other = {"model": "pear_tiny", "digest": "sha256:" + "1" * 64}
    with pytest.raises(PearStoreError, match="task 't' was made for backbone pear_tiny"):
        export_timm(Task({**task.record, "backbone": other}, task.tensors), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_model_with_other_logits_is_not_written(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unmerged(module: torch.nn.Module, task: Task, position: str) -> torch.Tensor:
        return module.get_submodule(position).get_parameter("weight")

    monkeypatch.setattr("router.exports.plain.merged_weight", unmerged)
    with pytest.raises(
        PearStoreError, match=r"logits of the timm model differ from the router's by \d.*expected at most"
    ):
        export_timm(on_bases("t", 1, positions=LINEARS), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_classifier_that_is_no_plain_linear_is_refused(tmp_path: Path) -> None:
    """levit's classifiers begin with a norm."""
    module = random_module("levit_128s")
    task = random_task(Backbone(module, "levit_128s"), [])
    weights = saved(module, tmp_path / "w")
    with pytest.raises(
        PearStoreError, match=r"levit_128s has no place for a plain linear classifier \(Missing key.*bn"
    ):
        export_timm(task, tmp_path / "x", weights=weights)
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_a_task_without_a_head_gives_features(backbone: Backbone, tmp_path: Path) -> None:
    task = on_bases("t", 1, positions=LINEARS)
    tensors = {key: value for key, value in task.tensors.items() if not key.startswith("head")}
    task = Task({**task.record, "head": None, "labels": []}, tensors)
    export_timm(task, tmp_path / "x")
    model, about = made_by_timm(tmp_path / "x")
    images = torch.randn(2, 3, 48, 48)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), answers(backbone, task, images), atol=1e-4, rtol=1e-4)
    assert about["create_model"]["num_classes"] == 0


def test_files_are_replaced_only_by_force(backbone: Backbone, tmp_path: Path) -> None:
    task = on_bases("t", 1, positions=LINEARS)
    for name in ("x", "x.json"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(PearStoreError, match=f"{name} exists; --force replaces it"):
            export_timm(task, tmp_path / "x")
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    (tmp_path / "x").write_text("mine")
    export_timm(task, tmp_path / "x", force=True)
    assert made_by_timm(tmp_path / "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(PearStoreError, match="folder exists; it is a directory"):
        export_timm(task, tmp_path / "folder", force=True)


def test_both_files_have_the_mode_that_the_user_s_mask_gives(backbone: Backbone, tmp_path: Path, mask: int) -> None:
    export_timm(on_bases("t", 1, positions=LINEARS), tmp_path / "x")
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == dict.fromkeys(
        ("x", "x.json"), 0o666 & ~mask
    )


@pytest.mark.parametrize("command", ["export-timm", "export-onnx", "export", "export-peft", "export-hub", "plot"])
def test_a_file_without_a_name_is_refused_in_a_line(command: str, store: Store, tmp_path: Path) -> None:
    store.add(on_bases("t", 1, positions=LINEARS))
    where = [""] if command == "plot" else ["t", ""]
    done = run("--store", store.path, command, *where)
    assert done.exit_code == 2
    assert "expected a path, found an empty text" in done.stderr


def test_a_path_that_names_no_file_is_refused(backbone: Backbone) -> None:
    for path in ("", ".", "/"):
        with pytest.raises(PearStoreError, match=r"^[./]: expected a file's name$"):
            export_timm(on_bases("t", 1, positions=LINEARS), path)


def test_a_full_disk_leaves_nothing(small_disk: Path, backbone: Backbone) -> None:
    with pytest.raises(PearStoreError, match="cannot be written|no space left"):
        export_timm(on_bases("t", 1, positions=LINEARS), small_disk / "x")
    assert not list(small_disk.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared with DeiT-tiny's weights and pictures")
def test_real_weights_and_200_pictures(tmp_path: Path) -> None:
    name, weights = "deit_tiny_patch16_224", SHARED / "weights" / "deit_tiny_patch16_224.safetensors"
    module = timm.create_model(name)
    module.load_state_dict(load_file(weights))
    backbone = Backbone(module, name)
    task = random_task(backbone, choose_positions(backbone.module, "linear"), size=(96, 96), scale=0.1)
    export_timm(task, tmp_path / "x", weights=weights)
    model, about = made_by_timm(tmp_path / "x")
    transform = create_transform(**about["create_transform"])
    pictures = [Image.fromarray(pixels) for pixels in np.load(SHARED / "data" / "dtd10.npz")["x_test"][:200]]
    expected = answers(backbone, task, pictures)
    with torch.inference_mode():
        found = model(torch.stack([transform(picture) for picture in pictures]))
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
    assert torch.equal(found.argmax(1), expected.argmax(1)) and expected.std(0).min() > 0.1
