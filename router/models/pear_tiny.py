"""pear_tiny: a 1.8 M parameter ViT whose weights ship with the package, for machines without a hub.

Importing this module registers the model with timm, so that
``timm.create_model("pear_tiny", pretrained=True)`` works offline. How the weights were made and what
they are worth: docs/pear_tiny.md; the script: tools/pretrain_pear_tiny.py.
"""

from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

WEIGHTS = Path(__file__).parent / "weights" / "pear_tiny.safetensors"

default_cfgs = generate_default_cfgs(
    {
        "pear_tiny": {
            "file": str(WEIGHTS),
            "license": "apache-2.0",
            "num_classes": 0,
            "input_size": (3, 48, 48),
            "fixed_input_size": True,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
    }
)


SETTINGS: dict[str, Any] = {
    "img_size": 48,
    "patch_size": 8,
    "embed_dim": 192,
    "depth": 6,
    "num_heads": 3,
    "mlp_ratio": 2.0,
}
AS_TIMM: dict[str, Any] = {"model_name": "vit_tiny_patch16_224", **SETTINGS}
"""Arguments of timm.create_model that give the same structure where Pear is not installed."""


@register_model
def pear_tiny(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT with 48 x 48 input, patch 8, 6 blocks of width 192, 3 heads, MLP ratio 2; no classifier."""
    settings = {**SETTINGS, **kwargs}
    model: VisionTransformer = build_model_with_cfg(
        VisionTransformer, "pear_tiny", pretrained, pretrained_filter_fn=checkpoint_filter_fn, **settings
    )
    return model
