"""A task as an ONNX file: logits in onnxruntime equal to the router's, for any task and any batch."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data.transforms_factory import create_transform

from pear_store import PearStoreError, Store, Task
from pear_store.exchange import models
from router import Backbone
from router.exports import export_onnx
from tests.conftest import SHARED
from tests.helpers.backbones import random_module, random_task, saved
from tests.pear_store.test_cli import run
from tests.router.exports.test_timm_file import answers
from tests.router.test_cores import on_bases

Maker = Callable[..., Task]
SNIPPET = (Path(__file__).parents[3] / "docs" / "export.md").read_text().split("```python\n")[2].split("```")[0]


def logits(file: Path, images: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": images.numpy()})[0]
    assert found.dtype == np.float32
    return torch.from_numpy(found)


def agree(file: Path, backbone: Backbone, task: Task, counts: tuple[int, ...] = (1, 2, 7)) -> None:
    _, height, width = task.preprocess["input_size"]
    for count in counts:
        images = torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(100 + count))
        expected = answers(backbone, task, images)
        bound = 1e-4 * max(1.0, float(expected.abs().max()))
        assert count < 7 or expected.std(0).min() > 1e-3  # else the answers for other images would be as good
        torch.testing.assert_close(logits(file, images), expected, atol=bound, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_vit", "test_convnext3", "mobilevit_xxs", "test_byobnet"])
def test_random_backbones(name: str, tmp_path: Path) -> None:
    """Of the last one only the head is the task's: it has no linear layers."""
    module = random_module(name)
    backbone = Backbone(module, name)
    positions = [p for p, m in module.named_modules() if type(m) is torch.nn.Linear and p.split(".")[0] != "head"][:4]
    task = random_task(backbone, positions, size=(96, 96))
    export_onnx(task, tmp_path / "x.onnx", weights=saved(module, tmp_path / "w"))
    agree(tmp_path / "x.onnx", backbone, task, (1, 2, 200))


@pytest.mark.slow
def test_whole_blocks_activations_and_bases(
    store: Store, backbone: Backbone, task_maker: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = task_maker("blocks", activation="gelu")
    store.add(blocks)
    file = tmp_path / "dtd.onnx"
    done = run("--store", store.path, "export-onnx", "blocks", file)
    assert done.exit_code == 0, done.stderr
    assert f"wrote blocks@1 to {file} (" in done.stdout and "; opset 18; logits differ from the router's" in done.stdout
    agree(file, backbone, blocks)
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert [(one.domain, one.version) for one in model.opset_import if one.domain == ""] == [("", 18)]
    dims = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert isinstance(dims[0], str) and dims[1:] == [3, 48, 48]
    said = {one.key: one.value for one in model.metadata_props}
    assert said["task"] == "blocks@1" and json.loads(said["labels"]) == list(blocks.labels)
    assert json.loads(said["preprocess"]) == dict(blocks.preprocess)
    beside = json.loads(Path(f"{file}.json").read_text())
    assert beside == {key: value if key == "task" else json.loads(value) for key, value in said.items()}
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(SNIPPET, scope)
    assert scope["logits"].shape == (4, 3) and scope["labels"] == list(blocks.labels)

    cored = on_bases("cored", 2, own=2, cores=2, bits=4, activation="relu")
    headless = Task(
        {**cored.record, "head": None, "labels": []},
        {key: value for key, value in cored.tensors.items() if not key.startswith("head")},
    )
    export_onnx(headless, tmp_path / "features.onnx")
    agree(tmp_path / "features.onnx", backbone, headless)
    assert [one.name for one in onnx.load(tmp_path / "features.onnx").graph.output] == ["features"]


def test_what_is_refused(backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    task = on_bases("t", 1)
    monkeypatch.setattr("router.exports.onnx_file.MAX_BYTES", 1_000_000)
    with pytest.raises(PearStoreError, match=r"pear_tiny: 7,\d+,\d+ bytes of weights, an ONNX file holds less"):
        export_onnx(task, tmp_path / "x")
    (tmp_path / "x").write_text("mine")
    with pytest.raises(PearStoreError, match="x exists; --force replaces it"):
        export_onnx(task, tmp_path / "x")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(PearStoreError, match=r"export-onnx needs onnx: pip install 'pear-adapters\[onnx\]'"):
        export_onnx(task, tmp_path / "y")
    store.add(task)
    monkeypatch.setattr(models, "EXPORTS", "nobody.exports")
    done = run("--store", store.path, "export-onnx", "t", tmp_path / "y")
    assert (done.exit_code, done.stderr) == (
        1, "Error: nothing installed here writes onnx models: reinstall pear-adapters\n",
    )  # fmt: skip
    assert [path.name for path in tmp_path.glob("[xy]*")] == ["x"]


def test_both_files_have_the_mode_that_the_user_s_mask_gives(backbone: Backbone, tmp_path: Path, mask: int) -> None:
    export_onnx(on_bases("t", 1), tmp_path / "x")
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == dict.fromkeys(
        ("x", "x.json"), 0o666 & ~mask
    )


def test_what_torch_cannot_export_says_why(backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("data-dependent\n  branch")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(PearStoreError, match="task 't': torch cannot export pear_tiny: data-dependent branch"):
        export_onnx(on_bases("t", 1), tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared with DeiT-tiny's weights and pictures")
def test_real_weights_and_200_pictures(tmp_path: Path) -> None:
    name, weights = "deit_tiny_patch16_224", SHARED / "weights" / "deit_tiny_patch16_224.safetensors"
    module = timm.create_model(name)
    module.load_state_dict(load_file(weights))
    backbone = Backbone(module, name)
    positions = [f"blocks.{i}.{part}" for i in range(12) for part in ("attn.qkv", "mlp")]  # the default ones
    task = random_task(backbone, positions, size=(96, 96), scale=0.1)
    export_onnx(task, tmp_path / "x", weights=weights)
    about = json.loads((tmp_path / "x.json").read_text())
    transform = create_transform(**about["create_transform"])
    pictures = [Image.fromarray(pixels) for pixels in np.load(SHARED / "data" / "dtd10.npz")["x_test"][:200]]
    expected = answers(backbone, task, pictures)
    found = logits(tmp_path / "x", torch.stack([transform(picture) for picture in pictures]))
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
    assert torch.equal(found.argmax(1), expected.argmax(1)) and expected.std(0).min() > 0.1
