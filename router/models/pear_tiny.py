"""pear_tiny: a ViT with 1.8 M parameters whose weights are in the package, for machines without a model hub.

Importing this module registers the model with timm. So ``timm.create_model("pear_tiny", pretrained=True)`` works
offline. docs/pear_tiny.md says how good the weights are; tools/pretrain_pear_tiny.py made them.
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
"""Arguments of timm.create_model that give the same structure without Pear."""


@register_model
def pear_tiny(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """A ViT for 48 x 48 pixels with patch 8, 6 blocks of width 192, 3 heads, MLP ratio 2, and no classifier."""
    settings = {**SETTINGS, **kwargs}
    model: VisionTransformer = build_model_with_cfg(
        VisionTransformer, "pear_tiny", pretrained, pretrained_filter_fn=checkpoint_filter_fn, **settings
    )
    return model
