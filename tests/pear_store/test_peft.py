"""Exchange with the real peft package, on timm models."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from pear_store import CheckpointError, NotFoundError, PearStoreError, RawTensor, Task, make_task
from pear_store.exchange import peft
from pear_store.exchange.peft import describe_backbone, export_peft, import_peft
from pear_store.format.manifest import to_manifest
from router import Backbone, Router
from router.describe import describe
from router.tensors import from_torch, quantise, to_torch
from tests.helpers.makers import floats, record

pytest.importorskip("peft", reason="needs peft: pip install 'pear-adapters[dev]'")
from peft import LoraConfig, PeftModel, get_peft_model

LABELS = ["oak", "elm", "ash"]
IMAGES = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(1))
PLAIN: dict[str, Any] = {"target_modules": ["qkv"], "modules_to_save": ["head"]}


@pytest.fixture(scope="module")
def description() -> dict[str, Any]:
    return describe("pear_tiny")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft")
    lora(pear_tiny(), **PLAIN).save_pretrained(str(folder))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "lora"))


def pear_tiny(classes: int = 3) -> nn.Module:
    model: nn.Module = timm.create_model("pear_tiny", pretrained=True, num_classes=classes)
    return model.eval()


def lora(model: nn.Module, **config: Any) -> PeftModel:
    """The model with random LoRA weights; PEFT's own start is up = 0."""
    torch.manual_seed(2)
    adapted = get_peft_model(model, LoraConfig(**config)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.1)
    return adapted


def logits(task: Task, backbone: Backbone | nn.Module, images: torch.Tensor = IMAGES) -> torch.Tensor:
    router = Router(backbone)
    found = router.run(images, task=router.add(task)).logits
    assert isinstance(found, torch.Tensor)
    return found


def assert_same_outputs(model: Any, found: torch.Tensor, images: torch.Tensor = IMAGES) -> None:
    with torch.inference_mode():
        expected = model(images)
        with model.disable_adapter():
            assert (expected - model(images)).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, **changes: Any) -> None:
    """Replaces tensors, named without prefix and with __ for a dot; None removes one."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, value in changes.items():
        key = "base_model.model." + name.replace("__", ".")
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    save_file(tensors, path)


def take(folder: Path, description: dict[str, Any], **changes: Any) -> Task:
    told = {"name": "trees", "backbone": description, "labels": LABELS, "preprocess": description.get("preprocess")}
    return import_peft(folder, **{**told, **changes})


EVERYWHERE: dict[str, Any] = {
    "target_modules": ["qkv", "attn.proj", "fc1", "fc2"],
    "modules_to_save": ["head"],
    "r": 3,
    "lora_alpha": 5,
    # the first that matches counts; in sorted order, because PEFT sorts them when it saves
    "rank_pattern": {"blocks.0.mlp.fc1": 7, r"blocks\.[0-2]\.mlp\.fc.": 2, "qkv": 4},
    "alpha_pattern": {"^blocks.0.attn.qkv": 3, r"mlp\.fc(1|2)": 1, "proj": 16},
}


@pytest.mark.parametrize(
    "config",
    [
        PLAIN,
        EVERYWHERE,
        {**EVERYWHERE, "use_rslora": True},
        {**PLAIN, "target_modules": r"blocks\.(1|3)\.mlp\.fc1", "lora_dropout": 0.5},
        {**PLAIN, "target_modules": ["qkv", "fc1"], "exclude_modules": ["blocks.0.attn.qkv"], "lora_alpha": 0.5},
    ],
    ids=["qkv", "everywhere", "rslora", "regex", "excluded"],
)
def test_an_imported_lora_gives_pefts_logits(
    config: dict[str, Any], tmp_path: Path, backbone: Backbone, description: dict[str, Any]
) -> None:
    model = lora(pear_tiny(), **config)
    model.save_pretrained(str(tmp_path))
    task = take(tmp_path, description)
    assert task.labels == tuple(LABELS) and task.preprocess == description["preprocess"]
    assert_same_outputs(model, logits(task, backbone))


def test_without_saved_modules_there_is_no_head(
    tmp_path: Path, backbone: Backbone, description: dict[str, Any]
) -> None:
    model = lora(pear_tiny(classes=0), target_modules=["qkv"])
    model.save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match="no classifier .*--features-only"):
        take(tmp_path, description, labels=None)
    task = take(tmp_path, description, labels=None, features_only=True)
    assert task.record["head"] is None and task.labels == ()
    assert_same_outputs(model, logits(task, backbone))


def test_a_classifier_inside_a_head_and_channels_last_linears(tmp_path: Path) -> None:
    base: Any = timm.create_model("test_convnext", num_classes=3).eval()
    adapted = lora(copy.deepcopy(base), target_modules=["fc1", "mlp.fc2"], modules_to_save=["head.fc"])
    adapted.save_pretrained(str(tmp_path / "in"))
    size = base.pretrained_cfg["input_size"]
    backbone = {"model": "test_convnext", "digest": Router(base).backbone.digest, "head": "head.fc"}
    preprocess = {**record()["preprocess"], "input_size": list(size)}
    task = take(tmp_path / "in", backbone, preprocess=preprocess)
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(3))
    found = logits(task, base, images)
    assert_same_outputs(adapted, found, images)
    export_peft(task, tmp_path / "out", linears=None, head="head.fc")
    assert_same_outputs(PeftModel.from_pretrained(base, tmp_path / "out").eval(), found, images)


def test_a_missing_bias_is_zeros(folder: Path, backbone: Backbone, description: dict[str, Any]) -> None:
    edit_tensors(folder, head__bias=None)
    task = take(folder, description)
    bias = task.tensors["head.bias"]
    assert (bias.dtype, bias.shape, bytes(bias.data)) == ("F32", (3,), bytes(12))


def test_a_model_wrapped_by_transformers(folder: Path, description: dict[str, Any]) -> None:
    edit_config(folder, alpha_pattern={"^blocks.0.attn.qkv": 2})
    expected = take(folder, description)
    assert expected.positions["blocks.0.attn.qkv"][0].scale == 0.25
    path = folder / "adapter_model.safetensors"
    renamed = {key.replace("model.model.", "model.model.timm_model."): t for key, t in load_file(path).items()}
    save_file(renamed, path)
    edit_config(folder, alpha_pattern={"^timm_model.blocks.0.attn.qkv": 2})
    assert to_manifest(take(folder, description)) == to_manifest(expected)


def test_the_sidecar_says_what_arguments_do_not(folder: Path, description: dict[str, Any]) -> None:
    identity = {key: description[key] for key in ("model", "digest")}
    preprocess = record()["preprocess"]
    told = {"task": "told", "backbone": identity, "labels": ["a", "b", "c"], "preprocess": preprocess}
    (folder / "pear.json").write_text(json.dumps({**told, "metrics": {"val_top1": 0.25}, "training": {"seed": 3}}))
    task = import_peft(folder)
    assert {key: task.record[key] for key in told} == told
    assert task.record["metrics"] == {"val_top1": 0.25} and task.record["training"] == {"seed": 3}
    task = take(folder, description, preprocess={**preprocess, "crop_pct": 0.5})
    assert (task.name, task.labels, task.preprocess["crop_pct"]) == ("trees", tuple(LABELS), 0.5)


# ---- export


def pear_task(description: dict[str, Any]) -> Task:
    """Every kind of branch: shared, alone in three dtypes, several at once, and quantised."""
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, RawTensor] = {}
    adapters: dict[str, Any] = {}

    def adapter(name: str, d_in: int, d_out: int, rank: int, dtype: torch.dtype = torch.float32, bits: int = 0) -> None:
        down = torch.randn(d_in, rank, generator=generator) / d_in**0.5
        up = torch.randn(rank, d_out, generator=generator) / rank**0.5
        adapters[name] = {"down": f"{name}.down", "up": f"{name}.up"}
        if bits:
            adapters[name] |= {"role": "knowledge", "quant": {"bits": bits}}
        for side, matrix, axis in (("down", down, 1), ("up", up, 0)):
            if bits:
                packed, scale = quantise(matrix, bits, axis)
                tensors[f"{name}.{side}"], tensors[f"{name}.{side}.scale"] = from_torch(packed), from_torch(scale)
                adapters[name]["quant"][side] = {"shape": list(matrix.shape), "scale": f"{name}.{side}.scale"}
            else:
                tensors[f"{name}.{side}"] = from_torch(matrix.to(dtype))

    adapter("shared", 192, 576, 4)
    adapter("half", 192, 192, 3, torch.float16)
    adapter("brain", 192, 384, 5, torch.bfloat16)
    adapter("other", 192, 192, 2)
    adapter("k1", 384, 192, 4, bits=1)
    adapter("k4", 192, 192, 3, bits=4)
    tensors["head.weight"] = floats(torch.randn(3, 192, generator=generator).numpy() / 14)
    tensors["head.bias"] = floats([0.1, -0.2, 0.3])
    made = record(
        "trees",
        backbone={key: description[key] for key in ("model", "digest")},
        adapters=adapters,
        positions={
            "blocks.0.attn.qkv": [["shared", 1.0]],
            "blocks.1.attn.qkv": [["shared", -0.3]],
            "blocks.5.attn.qkv": [["shared", 1.0], ["shared", 0.5]],
            "blocks.2.attn.proj": [["half", 0.7]],
            "blocks.3.attn.proj": [["half", 0.5], ["other", 2.0], ["k4", 0.9]],
            "blocks.4.mlp.fc1": [["brain", 1.0]],
            "blocks.4.mlp.fc2": [["k1", 0.6]],
        },
        labels=LABELS,
    )
    return make_task(made, tensors)


def test_cores_and_quantised_heads_are_exported_multiplied_out(
    tmp_path: Path, backbone: Backbone, description: dict[str, Any]
) -> None:
    task = pear_task(description)
    weight, scale = quantise(to_torch(task.tensors["head.weight"]), 8, 0)
    found = {**task.tensors, "head.weight": from_torch(weight), "s": from_torch(scale),
             "core": floats(np.linspace(-1, 1, 16).reshape(4, 4))}  # fmt: skip
    made = {
        **task.record,
        "adapters": {**task.record["adapters"], "c": {"down": "shared.down", "up": "core", "basis": "shared.up"}},
        "positions": {**task.record["positions"], "blocks.1.attn.qkv": [["c", 0.8]]},
        "head": {**task.record["head"], "quant": {"bits": 8, "weight": {"shape": [3, 192], "scale": "s"}}},
    }  # fmt: skip
    cored = make_task(made, found)
    export_peft(cored, tmp_path / "lora", linears=description["linears"])
    model = PeftModel.from_pretrained(pear_tiny(), tmp_path / "lora").eval()
    assert_same_outputs(model, logits(cored, backbone))


def by_position(task: Task) -> dict[str, list[tuple[str, str, float]]]:
    """Digests and scales at each position, whatever adapters are called."""
    adapters = task.record["adapters"]

    def digest(adapter: str, side: str) -> str:
        return task.tensors[adapters[adapter][side]].digest

    return {
        position: [(digest(b.adapter, "down"), digest(b.adapter, "up"), b.scale) for b in branches]
        for position, branches in task.positions.items()
    }


def test_peft_loads_an_export_with_our_logits(tmp_path: Path, backbone: Backbone, description: dict[str, Any]) -> None:
    task = pear_task(description)
    export_peft(task, tmp_path / "lora", linears=description["linears"])
    model = PeftModel.from_pretrained(pear_tiny(), tmp_path / "lora").eval()
    assert_same_outputs(model, logits(task, backbone))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora"]


def test_a_round_trip_keeps_tensors_ties_and_record(tmp_path: Path, description: dict[str, Any]) -> None:
    plain = pear_task(description)
    export_peft(plain, tmp_path / "plain", linears=None)
    assert "threshold" not in import_peft(tmp_path / "plain").record
    task = make_task({**plain.record, "threshold": 0.75}, plain.tensors)
    export_peft(task, tmp_path / "lora", linears=None)
    back = import_peft(tmp_path / "lora")
    kept = ("task", "backbone", "labels", "preprocess", "metrics", "training", "activation", "threshold")
    assert {key: back.record[key] for key in kept} == {key: task.record[key] for key in kept}
    assert back.tensors["head.weight"].digest == task.tensors["head.weight"].digest
    alone = {position for position, branches in task.positions.items() if len(branches) == 1} - {"blocks.4.mlp.fc2"}
    expected, found = by_position(task), by_position(back)
    assert found.keys() == expected.keys()
    for position in alone:
        assert found[position] == [pytest.approx(branch) for branch in expected[position]]
    assert back.positions["blocks.0.attn.qkv"][0].adapter == back.positions["blocks.1.attn.qkv"][0].adapter
    assert len(back.record["adapters"]) == 6  # seven positions, of which two are tied
    export_peft(back, tmp_path / "again", linears=None)
    assert to_manifest(import_peft(tmp_path / "again")) == to_manifest(back)


def test_a_headless_task_exports_without_saved_modules(
    tmp_path: Path, backbone: Backbone, description: dict[str, Any]
) -> None:
    task = pear_task(description)
    tensors = {name: tensor for name, tensor in task.tensors.items() if not name.startswith("head.")}
    task = make_task({**task.record, "head": None, "labels": []}, tensors)
    (tmp_path / "lora").mkdir()
    export_peft(task, tmp_path / "lora", linears=description["linears"])
    model = PeftModel.from_pretrained(pear_tiny(classes=0), tmp_path / "lora").eval()
    assert_same_outputs(model, logits(task, backbone))
    assert import_peft(tmp_path / "lora").record["head"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "relu"}, "trees: field 'activation': expected 'identity', found 'relu': PEFT's LoRA has no a"),
        ({"positions": {"blocks.0.attn": [["half", 1.0]]}}, "trees: positions 'blocks.0.attn': expected Linear mod"),
        ({"positions": {"blocks.0.attn.qkv": [["half", 1.0]]}}, r"'blocks.0.attn.qkv': widths \(192, 192\), the back"),
        ({"positions": {"blocks.0.attn.proj": [["half", 1e29], ["half", -1.0]]}}, "exceed float32 once scaled"),
        ({"positions": {}}, "field 'positions': expected an adapter, found none"),
    ],
)
def test_what_peft_cannot_hold_is_not_exported(
    changes: dict[str, Any], message: str, tmp_path: Path, description: dict[str, Any]
) -> None:
    task = pear_task(description)
    big = floats(np.full((3, 192), 1e20))
    task = make_task({**task.record, **changes}, {**task.tensors, "half.up": big})
    with pytest.raises(CheckpointError, match=message):
        export_peft(task, tmp_path / "lora", linears=description["linears"])
    assert not list(tmp_path.iterdir())


def test_an_export_replaces_nothing(tmp_path: Path, description: dict[str, Any]) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "mine").write_text("kept")
    for folder in (tmp_path / "lora", tmp_path / "lora" / "mine"):
        with pytest.raises(PearStoreError, match="exists and is no empty folder"):
            export_peft(pear_task(description), folder, linears=None)
    with pytest.raises(PearStoreError, match="No such file"):
        export_peft(pear_task(description), tmp_path / "none" / "lora", linears=None)
    assert [path.name for path in tmp_path.rglob("*")] == ["lora", "mine"]


def test_an_export_to_a_full_disk_leaves_nothing(small_disk: Path, description: dict[str, Any]) -> None:
    task = pear_task(description)
    wide = {"half.down": floats(np.ones((192, 2000))), "half.up": floats(np.ones((2000, 192)))}
    with pytest.raises(PearStoreError, match="no space left"):
        export_peft(make_task(task.record, {**task.tensors, **wide}), small_disk / "lora", linears=None)
    assert not list(small_disk.iterdir())


# ---- refusals of import


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, r"lora/adapter_config.json: field 'peft_type': expected 'LORA', found 'LOHA'"),
    ({"use_dora": True}, "field 'use_dora': expected plain LoRA, without this variant, found True"),
    ({"lora_bias": True}, "field 'lora_bias': expected plain LoRA"),
    ({"layer_replication": [[0, 4], [2, 5]]}, "field 'layer_replication': expected plain LoRA"),
    ({"a_variant_of_tomorrow": {"x": 1}}, "field 'a_variant_of_tomorrow': expected plain LoRA"),
    ({"bias": "lora_only"}, "field 'bias': expected 'none'.* found 'lora_only'"),
    ({"fan_in_fan_out": True}, "field 'fan_in_fan_out': expected false"),
    ({"init_lora_weights": "pissa_niter_4"}, "field 'init_lora_weights': expected one that leaves .* 'pissa_niter_4'"),
    ({"r": 0}, "field 'r': expected a rank, found 0"),
    (
        {"r": 5},
        r"'base_model.model.blocks.0.attn.qkv': lora_A \[8, 192\] and .*: expected \[5, d_in\] and \[d_out, 5\]",
    ),
    ({"lora_alpha": "8"}, "field 'lora_alpha': expected a number, found '8'"),
    ({"rank_pattern": {"qkv": 8.0}}, "field 'rank_pattern': expected module patterns with numbers"),
    ({"rank_pattern": {"(": 8}}, r"field 'rank_pattern': expected a regular expression .* found '\('"),
    ({"alpha_pattern": {"(?=.+)x": 8}}, r"field 'alpha_pattern': .* that RE2 takes, found"),
    ({"modules_to_save": None}, "tensor 'base_model.model.head.bias': expected lora_A.weight or lora_B.weight"),
    ({"modules_to_save": "head"}, "field 'modules_to_save': expected a list of modules, found 'head'"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGS)
def test_a_config_of_anything_but_plain_lora_is_refused(
    changes: dict[str, Any], message: str, folder: Path, description: dict[str, Any]
) -> None:
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        take(folder, description)


QKV = "blocks__0__attn__qkv"
ones = np.ones


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{QKV}__lora_B__bias": ones(576)}, "tensor 'base_model.model.blocks.0.attn.qkv.lora_B.bias': expected"),
        ({f"{QKV}__lora_magnitude_vector": ones(576)}, "lora_magnitude_vector': expected lora_A"),
        ({"pos__lora_embedding_A": ones((8, 5))}, "lora_embedding_A': expected lora_A"),
        ({f"{QKV}__lora_B__weight": None}, r"tensor 'base_model.model.blocks.0.attn.qkv.lora_B.weight' is missing"),
        ({f"{QKV}__lora_A__weight": ones((8, 5))}, r"qkv': widths \(d_in, d_out\) \(5, 576\), .* are \(192, 576\)"),
        ({f"{QKV}__lora_B__weight": ones((576, 7))}, r"lora_A \[8, 192\] and lora_B \[576, 7\]: expected \[8, d_in\]"),
        ({f"{QKV}__lora_B__weight": ones((0, 8))}, r"lora_B \[0, 8\]: empty"),
        ({f"{QKV}__lora_A__weight": np.full((8, 192), np.nan)}, "tensor 'blocks.0.attn.qkv.down': holds NaN"),
        ({f"{QKV}__lora_A__weight": ones((8, 192), np.int8)}, "is I8: expected F32 or F16 or BF16"),
        (
            {"head__bias": None, "head__weight": None},
            "weights of head are missing, which field 'modules_to_save' names",
        ),
        ({"fc_norm__weight": ones(192)}, "modules_to_save: expected the classifier alone, found fc_norm, head"),
        ({"head__weight": None}, r"'head': expected weight \[classes, d\] and bias \[classes\], found bias \[3\]"),
        ({"head__bias": ones(2)}, r"found weight \[3, 192\], bias \[2\]"),
        ({"head__weight": ones((4, 192)), "head__bias": ones(4)}, "3 labels, the head has 4 rows"),
        ({"other__lora_A__weight": ones((8, 3)), "other__lora_B__weight": ones((3, 8))}, "'other': expected a Linear"),
        ({"head__lora_A__weight": ones((8, 192)), "head__lora_B__weight": ones((3, 8))}, "'head': LoRA on the classif"),
    ],
)
def test_tensors_that_a_task_cannot_hold_are_refused(
    changes: dict[str, Any], message: str, folder: Path, description: dict[str, Any]
) -> None:
    edit_tensors(
        folder, **{k: v.astype(np.float32) if v is not None and v.dtype.kind == "f" else v for k, v in changes.items()}
    )
    with pytest.raises(CheckpointError, match=message):
        take(folder, description)


def test_lora_of_the_patch_embedding_is_refused(tmp_path: Path, description: dict[str, Any]) -> None:
    lora(pear_tiny(), target_modules=["proj"]).save_pretrained(str(tmp_path))  # means patch_embed.proj too
    with pytest.raises(CheckpointError, match=r"patch_embed.proj': lora_A \[8, 3, 8, 8\] .* are of a convolution"):
        take(tmp_path, description)


@pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape")  # what peft says of its own lora_bias
@pytest.mark.parametrize("variant", [{"use_dora": True}, {"bias": "lora_only"}, {"lora_bias": True}])
def test_what_peft_saves_of_a_variant_is_refused(
    variant: dict[str, Any], tmp_path: Path, description: dict[str, Any]
) -> None:
    lora(pear_tiny(), **PLAIN, **variant).save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match=f"field '{next(iter(variant))}': expected"):
        take(tmp_path, description)


def test_what_neither_arguments_nor_sidecar_say_is_asked_for(folder: Path, description: dict[str, Any]) -> None:
    for missing, message in (
        ({"labels": None}, r"field 'labels': the classifier has 3 rows and no names .*: give labels \(--labels\)"),
        ({"name": None}, r"field 'task' is missing: give name \(--name\)"),
        ({"backbone": None}, "field 'backbone' is missing: give backbone"),
        ({"preprocess": None}, r"field 'preprocess': nothing says which .* \(--preprocess timm for the model's own"),
    ):
        with pytest.raises(CheckpointError, match=message):
            take(folder, description, **missing)


def test_a_sidecar_of_another_backbone_is_refused(folder: Path, description: dict[str, Any]) -> None:
    other = {"model": "other", "digest": "sha256:" + "0" * 64}
    (folder / "pear.json").write_text(json.dumps({"backbone": other}))
    with pytest.raises(CheckpointError, match="pear.json: field 'backbone': expected pear_tiny sha256:.*found other"):
        take(folder, description)


def test_another_module_than_the_classifier_is_refused(folder: Path, description: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="expected the classifier 'head.fc' of pear_tiny, found 'head'"):
        take(folder, {**description, "head": "head.fc"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "adapter_config.json: expected a JSON object, found list"),
        ('{"r": 8, "r": 4}', "not valid JSON: duplicate key 'r'"),
        ("{", "adapter_config.json: not valid JSON"),
        ('{"r": %s}' % ("8" * 5000), "adapter_config.json: not valid JSON: a number has more than 4,300 digits$"),
        (" " * (16 * 1024 * 1024 + 1), "larger files are not read"),
    ],
)
def test_a_config_that_is_no_object_is_refused(
    text: str, message: str, folder: Path, description: dict[str, Any]
) -> None:
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        take(folder, description)


def test_missing_files_are_named(folder: Path, description: dict[str, Any]) -> None:
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(NotFoundError, match="adapter_model.safetensors: no such file"):
        take(folder, description)
    (folder / "adapter_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match="adapter_model.bin: a pickle, which is never read: expected adapter_mo"):
        take(folder, description)
    with pytest.raises(NotFoundError, match="none/adapter_config.json: no such file; expected a folder that PEFT"):
        take(folder / "none", description)


# ---- descriptions of backbones


def test_a_description_has_what_an_exchange_needs(description: dict[str, Any], backbone: Backbone) -> None:
    assert (description["model"], description["digest"], description["head"]) == ("pear_tiny", backbone.digest, "head")
    assert description["linears"]["blocks.5.mlp.fc1"] == (192, 384) and len(description["linears"]) == 24
    assert make_task(record(preprocess=description["preprocess"], adapters={}, positions={}, head=None, labels=[]), {})


def test_backbones_are_described_through_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "stub-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stub\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[stub.backbones]\ntimm = router.describe:describe\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(peft, "BACKBONES", "stub.backbones")
    assert describe_backbone("pear_tiny") == describe("pear_tiny")
    with pytest.raises(PearStoreError, match="backbone 'pear_tinny': timm has no model of that name"):
        describe_backbone("pear_tinny")
    monkeypatch.setattr(peft, "BACKBONES", "nobody.backbones")
    assert describe_backbone("pear_tiny") is None


def test_importing_costs_neither_numpy_nor_torch() -> None:
    code = "import sys, pear_store.exchange.peft; print(sorted({'torch', 'numpy', 'timm', 'peft'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
