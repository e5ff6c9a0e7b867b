"""Backbones: loading, digest, sizes, positions."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from router import (
    AdaptedBackbone,
    Backbone,
    BackboneError,
    ImageError,
    PositionWeights,
    choose_positions,
    load_backbone,
)
from router.backbone import backbone_digest
from router.models.pear_tiny import WEIGHTS
from tests.conftest import SHARED

CPU = torch.device("cpu")


def small(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **options)


def test_digest_is_as_defined(backbone: Backbone) -> None:
    lines = b""
    for name, tensor in sorted(backbone.module.state_dict().items()):
        data = tensor.numpy().astype("<f4").tobytes()
        shape = ",".join(map(str, tensor.shape))
        digest = hashlib.sha256(f"F32 {shape}\n".encode() + data).hexdigest()
        lines += f"{name} sha256:{digest}\n".encode()
    assert backbone.digest == "sha256:" + hashlib.sha256(lines).hexdigest()


def test_the_ways_to_load_agree(backbone: Backbone, tmp_path: Path) -> None:
    by_file = load_backbone("pear_tiny", WEIGHTS)
    by_module = load_backbone(timm.create_model("pear_tiny", pretrained=True, num_classes=7))
    assert by_file.digest == by_module.digest == backbone.digest
    assert by_module.name == "pear_tiny"
    model: Any = timm.create_model("pear_tiny", num_classes=9)  # a file that has a classifier, too
    model.load_state_dict(load_file(WEIGHTS), strict=False)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    assert load_backbone("pear_tiny", tmp_path / "w.safetensors").digest == backbone.digest


def test_the_given_module_is_left_as_it_was() -> None:
    model = small("pear_tiny").train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = AdaptedBackbone(load_backbone(model), CPU, torch.bfloat16)
    adapted.attach(["blocks.0.attn"])
    adapted.features(torch.zeros(1, 3, 96, 96), {})
    assert model.training
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in model.parameters())
    assert model.num_classes == 5
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_weights_are_shared_not_copied(backbone: Backbone) -> None:
    adapted = AdaptedBackbone(backbone, CPU, torch.float32)
    adapted.features(torch.zeros(1, 3, 48, 48), {})
    adapted.features(torch.zeros(1, 3, 64, 64), {})
    pointer = backbone.module.get_parameter("blocks.0.attn.qkv.weight").data_ptr()
    assert len(adapted._sized) == 2
    for one in adapted._sized.values():
        assert one.module.get_parameter("blocks.0.attn.qkv.weight").data_ptr() == pointer


def test_digest_ignores_classifier_and_knows_weights() -> None:
    model = small("pear_tiny")
    first = load_backbone(model).digest
    with torch.no_grad():
        model.head.weight.zero_()
    assert load_backbone(model).digest == first
    with torch.no_grad():
        model.blocks[3].mlp.fc1.bias[0] += 1
    assert load_backbone(model).digest != first


def test_integers_are_hashed_as_such() -> None:
    class Counter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.tensor(3, dtype=torch.int32))

    data = torch.tensor(3).numpy().tobytes()
    line = f"steps sha256:{hashlib.sha256(b'I64 ' + bytes([10]) + data).hexdigest()}\n"
    assert backbone_digest(Counter()) == "sha256:" + hashlib.sha256(line.encode()).hexdigest()


def test_low_precision_and_other_sizes_are_refused() -> None:
    with pytest.raises(BackboneError, match=r"is bfloat16: give the float32 module, and choose .* with dtype="):
        load_backbone(small("pear_tiny").bfloat16())
    with pytest.raises(BackboneError, match="native 48 x 48 pixels, found one for 64 x 64: give the native module"):
        load_backbone(small("pear_tiny", img_size=64))


def test_other_sizes_resample_as_timm_does() -> None:
    model: Any = timm.create_model("pear_tiny", pretrained=True).eval()
    at_64: Any = timm.create_model("pear_tiny", pretrained=True).eval()
    at_64.set_input_size(img_size=(64, 64))
    images = torch.randn(2, 3, 64, 64)
    adapted = AdaptedBackbone(load_backbone(model), CPU, torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(adapted.features(images, {}), at_64(images), atol=1e-5, rtol=1e-5)


def test_a_size_that_cannot_be_is_said() -> None:
    adapted = AdaptedBackbone(load_backbone(small("pear_tiny")), CPU, torch.float32)
    with pytest.raises(ImageError, match="backbone pear_tiny cannot take 50 x 50 pixels: .*multiples of 8"):
        adapted.features(torch.zeros(1, 3, 50, 50), {})


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("pear_tinny", None, "timm has no model of that name; did you mean pear_tiny"),
        ("pear_tiny", "nowhere.safetensors", "nowhere.safetensors: no such file"),
        ("deit_tiny_patch16_224", WEIGHTS, "are these another model's weights"),
    ],
)
def test_loading_mistakes(name: str, weights: str | None, message: str) -> None:
    with pytest.raises(BackboneError, match=message) as caught:
        load_backbone(name, weights)
    assert "\n" not in str(caught.value)


def test_weights_with_foreign_tensors_or_a_pickle_are_refused(tmp_path: Path) -> None:
    save_file({**load_file(WEIGHTS), "lora.down": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(BackboneError, match="pear_tiny has no tensor 'lora.down'"):
        load_backbone("pear_tiny", tmp_path / "w.safetensors")
    (tmp_path / "w.pth").write_bytes(b"PK\x03\x04" + bytes(50))
    with pytest.raises(BackboneError, match="expected a whole safetensors file"):
        load_backbone("pear_tiny", tmp_path / "w.pth")


def test_presets_and_patterns(backbone: Backbone) -> None:
    assert choose_positions(backbone.module, "blocks")[:3] == ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn"]
    assert len(choose_positions(backbone.module, "blocks")) == 12
    assert choose_positions(backbone.module, "qkv") == [f"blocks.{i}.attn.qkv" for i in range(6)]
    assert len(choose_positions(backbone.module, "linear")) == 24
    assert choose_positions(backbone.module, "blocks.[01].mlp.fc1, blocks.5.attn") == [
        "blocks.0.mlp.fc1", "blocks.1.mlp.fc1", "blocks.5.attn",
    ]  # fmt: skip
    both = choose_positions(backbone.module, "qkv, mlp,blocks.5.attn")
    assert len(both) == 13
    assert both[:2] == ["blocks.0.attn.qkv", "blocks.0.mlp"]
    assert both[-3:] == ["blocks.5.attn", "blocks.5.attn.qkv", "blocks.5.mlp"]
    with pytest.raises(BackboneError, match="positions 'layers' match no module: expected one of the presets blocks"):
        choose_positions(backbone.module, "layers")
    with pytest.raises(BackboneError, match="positions 'nope' match no module"):
        choose_positions(backbone.module, "qkv,nope")


FAMILIES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32},
    "deit_tiny_distilled_patch16_224": {"img_size": 32},
    "vit_small_patch14_reg4_dinov2": {"img_size": 28, "depth": 2, "embed_dim": 48, "num_heads": 3},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 2)},
    "convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (16, 24, 24, 24)},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_run_their_positions_row_by_row(name: str) -> None:
    """Each image's own branch at every position equals that image alone through a plain hook."""
    model = small(name, **FAMILIES[name]).eval()
    with torch.no_grad():  # layer scale starts near zero and would hide what a branch adds
        for key, parameter in model.named_parameters():
            if key.endswith("gamma"):
                parameter.fill_(1.0)
    size = FAMILIES[name].get("img_size", 64)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, size, size)}
    wrapped = load_backbone(model)
    adapted = AdaptedBackbone(wrapped, CPU, torch.float32)
    pattern = "stages.*.blocks.*.mlp" if name.startswith("convnext") else "blocks"
    positions = choose_positions(wrapped.module, pattern)[:4]
    adapted.attach(positions)
    images = torch.randn(3, 3, size, size)
    down = {p: torch.randn(3, adapted.widths[p][0], 2) / 8 for p in positions}
    up = {p: torch.randn(3, 2, adapted.widths[p][1]) / 8 for p in positions}
    with torch.inference_mode():
        mixed = adapted.features(images, {p: PositionWeights(down[p], up[p], "identity") for p in positions})
        plain = adapted.features(images, {})
        assert (mixed - plain).abs().max() > 1e-3
        for row in range(3):
            hooks = [
                wrapped.module.get_submodule(p).register_forward_hook(
                    lambda _, args, y, p=p, row=row: y + args[0] @ down[p][row] @ up[p][row]
                )
                for p in positions
            ]
            alone = wrapped.module(images[row : row + 1])
            for hook in hooks:
                hook.remove()
            torch.testing.assert_close(mixed[row : row + 1], alone, atol=2e-5, rtol=1e-4)


def test_an_output_that_is_its_input_is_not_written_to() -> None:
    """A dropout in eval mode returns what it is given, which the model may go on using."""
    wrapped = load_backbone(small("pear_tiny"))
    adapted = AdaptedBackbone(wrapped, CPU, torch.float32)
    adapted.attach(["blocks.0.mlp.drop1", "blocks.0.mlp.fc1"])
    seen: list[bool] = []
    module = adapted._module((48, 48))
    given: list[torch.Tensor] = []
    module.get_submodule("blocks.0.mlp.drop1").register_forward_pre_hook(lambda _, args: given.append(args[0]))
    weights = PositionWeights(torch.ones(384, 1), torch.ones(1, 384), "identity")
    with torch.inference_mode():
        module.get_submodule("blocks.0.mlp.drop1").register_forward_hook(
            lambda _, args, y: seen.append(y.data_ptr() == args[0].data_ptr())
        )
        adapted.features(torch.randn(1, 3, 48, 48), {"blocks.0.mlp.drop1": weights})
    assert seen == [False]
    assert adapted._owned == {"blocks.0.mlp.fc1"}


def test_a_model_that_cannot_be_probed_shares_no_block() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.mean((2, 3))
            found: torch.Tensor = self.blocks(x) * (1 + 0 * float(x.sum()))  # no value on the meta device
            return found

        def reset_classifier(self, classes: int) -> None:
            pass

    adapted = AdaptedBackbone(load_backbone(Odd()), CPU, torch.float32)
    assert adapted.levels.blocks == ()
    assert set(adapted.levels.of.values()) == {0}


def test_blocks_that_something_bypasses_do_not_grow() -> None:
    class Inner(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = x + self.steps(x)
            return found

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = torch.nn.Linear(3, 4)
            self.blocks = torch.nn.Sequential(Inner(), Inner())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.blocks(self.stem(x.mean((2, 3))))
            return found

        def reset_classifier(self, classes: int) -> None:
            pass

    levels = AdaptedBackbone(load_backbone(Model()), CPU, torch.float32).levels
    assert levels.blocks == ("blocks.0", "blocks.1")
    assert levels.of["stem"] == 0
    assert levels.of["blocks.0.steps.1"] == 1
    assert levels.of["blocks.1"] == levels.of["blocks.1.steps.0"] == 2


def test_positions_that_never_run_or_are_not_there_are_refused() -> None:
    eva = small("eva02_tiny_patch14_224", img_size=28, depth=1)
    eva.pretrained_cfg = {**eva.pretrained_cfg, "input_size": (3, 28, 28)}
    adapted = AdaptedBackbone(load_backbone(eva), CPU, torch.float32)
    silent = [n for n, m in eva.named_modules() if n.endswith("attn.qkv")]
    convnext = AdaptedBackbone(
        load_backbone(small("convnext_atto", depths=(1, 1, 1, 1), dims=(16, 16, 16, 16))), CPU, torch.float32
    )
    if silent:
        with pytest.raises(BackboneError, match=r"runs 0 times in a forward, expected once"):
            adapted.attach(silent[:1])
    for stage in ("stages.0", "stages.0.blocks.0", "stages.0.blocks.0.mlp", "stem.1", "stages.0.blocks.0.conv_dw"):
        convnext.attach([stage])
        assert convnext.widths[stage] == (16, 16)
    with pytest.raises(BackboneError, match="has no module 'stages.9'"):
        convnext.attach(["stages.9"])


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared with DeiT-tiny's weights")
def test_real_weights_load() -> None:
    loaded = load_backbone("deit_tiny_patch16_224", SHARED / "weights" / "deit_tiny_patch16_224.safetensors")
    adapted = AdaptedBackbone(loaded, CPU, torch.float32)
    assert adapted.feature_width == 192
    assert adapted.features(torch.zeros(1, 3, 96, 96), {}).shape == (1, 192)
