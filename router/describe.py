"""Describes a timm model for the exchange of adapters: names, widths, its classifier and its own preprocessing."""

from pathlib import Path
from typing import Any

from timm.data.config import resolve_data_config
from torch import nn

from router.backbone import load_backbone


def describe(model: str, weights: str | Path | None = None) -> dict[str, Any]:
    """Describes a backbone. pear_store finds this function by its entry point, because it never imports router.

    Args:
        model: a timm name.
        weights: a local safetensors file with its weights; None: timm loads them.
    Returns:
        "model", "digest", "head" (the classifier's module path in the whole timm model; None if it has several),
        "linears" ({module path: (d_in, d_out)} of the backbone), "preprocess" (the model's own evaluation transform,
        as a task's record has it) and "hub" (the repository that timm loaded the weights from; None if none).
    Raises:
        BackboneError: the model is unknown, or its weights cannot be loaded.
    """
    backbone = load_backbone(model, weights)
    classifier = backbone.config.get("classifier", "head")
    own = resolve_data_config(pretrained_cfg=dict(backbone.config))
    return {
        "model": backbone.name,
        "digest": backbone.digest,
        "hub": backbone.config.get("hf_hub_id") if weights is None else None,
        "head": classifier if isinstance(classifier, str) else None,
        "linears": {
            name: (module.in_features, module.out_features)
            for name, module in backbone.module.named_modules()
            if isinstance(module, nn.Linear)
        },
        "preprocess": {
            "input_size": list(own["input_size"]),
            "mean": list(own["mean"]),
            "std": list(own["std"]),
            "interpolation": own["interpolation"],
            "crop_pct": own["crop_pct"],
            "crop_mode": own["crop_mode"],
        },
    }
