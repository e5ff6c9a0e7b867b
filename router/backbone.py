"""Backbones: frozen timm models, how they are loaded, and the digest that identifies one."""

import copy
import difflib
import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors.torch import load_file
from timm.data.constants import DEFAULT_CROP_PCT, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

import router.models.pear_tiny  # noqa: F401  (registers the embedded backbone with timm)
from pear_store import Digest, tensor_digest
from router.device import check_process
from router.errors import BackboneError, ImageError
from router.pictures import READING
from router.tensors import from_torch
from router.threads import computing_alone


class Backbone:
    """A frozen timm model without classifier: its module, name and digest.

    `module` copies the structure of the given module and shares its weights. They are never changed.

    Args:
        module: a timm model in float32.
        name: its name in messages and in task checkpoints.
        source: (timm name, file of weights or None), by which another process can load it again. None: the module was
            given.
    Raises:
        BackboneError: the module is not a timm model, or a weight is NaN or infinite.
    """

    def __init__(self, module: nn.Module, name: str, source: tuple[str, str | None] | None = None) -> None:
        self.module = _without_classifier(module)
        self.name, self.source = name, source
        _check_finite(self.module, name)
        self.digest = backbone_digest(self.module)
        config: Mapping[str, Any] = getattr(self.module, "pretrained_cfg", {}) or {}
        self.config = config
        self.input_size: tuple[int, int] = tuple(config.get("input_size", (3, 224, 224))[1:])

    @property
    def preprocess(self) -> dict[str, Any]:
        """timm's evaluation transform of this model (crop, mean and std), in the form of a task's `preprocess`."""
        return {
            "input_size": [3, *self.input_size],
            "mean": list(self.config.get("mean", IMAGENET_DEFAULT_MEAN)),
            "std": list(self.config.get("std", IMAGENET_DEFAULT_STD)),
            "interpolation": self.config.get("interpolation", "bicubic"),
            "crop_pct": float(self.config.get("crop_pct") or DEFAULT_CROP_PCT),
            "crop_mode": self.config.get("crop_mode") or "center",
            "reading": READING,
        }

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights in float32."""
        return sum(4 * parameter.numel() for parameter in self.module.parameters())

    def sized(self, size: tuple[int, int]) -> nn.Module:
        """The module for images [batch, 3, *size]. It shares the weights, except for resampled position embeddings.

        Args:
            size: (height, width) in pixels.
        Raises:
            ImageError: this model cannot take that size.
        """
        module = share(self.module)
        if size == self.input_size:
            return module
        try:
            if hasattr(module, "set_input_size"):
                cast(Any, module).set_input_size(img_size=size)
                patch = getattr(getattr(module, "patch_embed", None), "patch_size", (1, 1))
                if size[0] % patch[0] or size[1] % patch[1]:
                    raise ValueError(f"its patches need multiples of {patch[0]}")
            elif self.config.get("fixed_input_size"):
                raise ValueError(f"it takes {self.input_size[0]} x {self.input_size[1]} only")
        except (AssertionError, ValueError, RuntimeError) as error:
            raise ImageError(f"backbone {self.name} cannot take {size[0]} x {size[1]} pixels: {error}") from None
        return module


@computing_alone()
def load_backbone(backbone: str | nn.Module | Backbone, weights: str | Path | None = None) -> Backbone:
    """Loads a backbone by its timm name, or makes one of a timm module.

    Args:
        backbone: a timm name, a timm module in float32 at its native size, or a Backbone, which is returned.
        weights: a safetensors file with the weights of a backbone given by name. None: timm loads pretrained ones.
    Raises:
        BackboneError: timm has no such model, the weights do not fit it or are not finite, or the module is not in
            float32 at its native size.
        ForkedError: this process was forked from one that has used a backbone.
    """
    check_process()
    if isinstance(backbone, Backbone):
        return backbone
    if isinstance(backbone, nn.Module):
        config = getattr(backbone, "pretrained_cfg", None) or {}
        name = ".".join(filter(None, (config.get("architecture"), config.get("tag")))) or type(backbone).__name__
        _check_native(backbone, name)
        return Backbone(backbone, name)
    try:
        if weights is None:
            return Backbone(timm.create_model(backbone, pretrained=True), backbone, (backbone, None))
        module = timm.create_model(backbone)
    except RuntimeError as error:
        if "Unknown model" not in str(error):
            raise BackboneError(f"backbone {backbone!r}: {error}") from None
        known = timm.list_models()
        near = ", ".join(difflib.get_close_matches(backbone.partition(".")[0], known, 5))
        hint = f"; did you mean {near}?" if near else "; timm.list_models() has the names"
        raise BackboneError(f"backbone {backbone!r}: timm has no model of that name{hint}") from None
    except BackboneError:
        raise
    except Exception as error:  # whatever a download can raise: hub, requests, urllib, OSError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BackboneError(
            f"backbone {backbone!r}: its pretrained weights could not be loaded ({reason}): "
            "give a local file of them with weights (--weights)"
        ) from None
    cast(Any, module).reset_classifier(0)
    _load_weights(module, backbone, Path(weights))
    return Backbone(module, backbone, (backbone, str(Path(weights).absolute())))


def _load_weights(module: nn.Module, name: str, path: Path) -> None:
    if not os.path.isfile(path):
        raise BackboneError(f"{path}: no such file: expected the weights of {name}")
    try:
        state = load_file(path)
    except Exception as error:  # safetensors raises a bare Exception type of its own
        raise BackboneError(
            f"{path}: expected a whole safetensors file (pickles are never read): {error}: take a good copy"
        ) from None
    expected = module.state_dict()
    for key, value in expected.items():
        if key not in state:
            raise BackboneError(f"{path}: tensor {key!r} of {name} is missing; are these another model's weights?")
        if state[key].shape != value.shape:
            found = f"{list(state[key].shape)}, expected {list(value.shape)}"
            raise BackboneError(f"{path}: tensor {key!r} is {found} for {name}; are these another model's weights?")
    classifiers = (getattr(module, "pretrained_cfg", None) or {}).get("classifier", "head")
    prefixes = tuple(f"{c}." for c in ([classifiers] if isinstance(classifiers, str) else classifiers))
    for key in state.keys() - expected.keys():
        if not key.startswith(prefixes):
            raise BackboneError(f"{path}: {name} has no tensor {key!r}; are these another model's weights?")
    module.load_state_dict({key: state[key] for key in expected})


def backbone_digest(module: nn.Module) -> Digest:
    """The digest of a backbone without classifier: sha256 over lines ``{name} {tensor digest}\\n``, sorted by name.

    Floats are hashed as F32, integers as I64.
    """
    lines = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        raw = from_torch(tensor.float() if tensor.is_floating_point() else tensor.long())
        lines.update(f"{name} {tensor_digest(raw.dtype, raw.shape, raw.data)}\n".encode())
    return Digest("sha256:" + lines.hexdigest())


def _check_finite(module: nn.Module, name: str) -> None:
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = (float(end) for end in torch.aminmax(tensor))
            if not (math.isfinite(low) and math.isfinite(high)):
                raise BackboneError(
                    f"backbone {name}: tensor {key!r} holds NaN or infinity: expected finite weights; take a good copy"
                )


def _check_native(module: nn.Module, name: str) -> None:
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise BackboneError(
                f"backbone {name}: {key!r} is {str(tensor.dtype).removeprefix('torch.')}: give the float32 module, "
                "and choose the compute precision with dtype="
            )
    native = (getattr(module, "pretrained_cfg", None) or {}).get("input_size", (3, 0, 0))[1:]
    built = getattr(getattr(module, "patch_embed", None), "img_size", None)
    if built is not None and tuple(built) != tuple(native):
        raise BackboneError(
            f"backbone {name}: expected a module for its native {native[0]} x {native[1]} pixels, found one for "
            f"{built[0]} x {built[1]}: give the native module, which takes images of other sizes, too"
        )


def share(module: nn.Module) -> nn.Module:
    """A frozen copy in eval mode. Its parameters and buffers share the original's memory."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    memo.update({id(buffer): buffer for buffer in module.buffers()})
    return copy.deepcopy(module, memo).eval()


def _without_classifier(module: nn.Module) -> nn.Module:
    module = share(module)
    if not hasattr(module, "reset_classifier"):
        raise BackboneError(f"{type(module).__name__}: expected a timm model, found one without reset_classifier")
    cast(Any, module).reset_classifier(0)
    return module
