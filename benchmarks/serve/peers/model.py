"""What the peers' servers run: a timm model with the LoRA adapters of all tasks, by PEFT's documentation.

Settings come from $PEAR_PEERS as JSON: model, weights, adapters (a folder with PEFT's folder of each task), dtype,
device, threads, max_batch, and how a batch of several tasks runs:

    switch   grouped by task: `set_adapter`, then a forward of the group
    names    as a whole, by `adapter_names`, PEFT's way to run a mixed batch
"""

import base64
import inspect
import json
import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import timm
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from timm.data.transforms_factory import create_transform
from torch import Tensor

SETTINGS: dict[str, Any] = json.loads(os.environ.get("PEAR_PEERS", "{}"))
MAX_BATCH: int = SETTINGS.get("max_batch", 16)


class Classifier:
    """All tasks on one backbone."""

    def __init__(self) -> None:
        torch.set_num_threads(SETTINGS["threads"])
        self.device, self.dtype = torch.device(SETTINGS["device"]), getattr(torch, SETTINGS["dtype"])
        folders = sorted(Path(SETTINGS["adapters"]).iterdir())
        sidecars = {folder.name: json.loads((folder / "pear.json").read_text()) for folder in folders}
        self.labels = {name: sidecar["labels"] for name, sidecar in sidecars.items()}
        classes = len(self.labels[folders[0].name])
        backbone = timm.create_model(SETTINGS["model"], num_classes=classes)
        backbone.load_state_dict(load_file(SETTINGS["weights"]), strict=False)
        model = PeftModel.from_pretrained(backbone, folders[0], adapter_name=folders[0].name)
        for folder in folders[1:]:
            model.load_adapter(folder, folder.name)
        self.model: Any = model.to(self.device, self.dtype).eval()
        prepared = sidecars[folders[0].name]["preprocess"]
        self._transform = create_transform(
            prepared["input_size"], interpolation=prepared["interpolation"], mean=prepared["mean"],
            std=prepared["std"], crop_pct=prepared["crop_pct"], crop_mode=prepared["crop_mode"],
        )  # fmt: skip
        # what PEFT offers where nothing is trained: no gradients are switched on and off
        offered = "inference_mode" in inspect.signature(self.model.set_adapter).parameters
        self._options = {"inference_mode": True} if offered else {}

    def decode(self, image: str) -> Tensor:
        """float32 [3, h, w] from a file in base64."""
        found: Tensor = self._transform(Image.open(BytesIO(base64.b64decode(image))).convert("RGB"))
        return found

    @torch.inference_mode()
    def predict(self, images: Sequence[Tensor], tasks: Sequence[str]) -> list[dict[str, Any]]:
        batch = torch.stack(list(images)).to(self.device, self.dtype)
        if SETTINGS["mode"] == "names":
            logits = self.model(batch, adapter_names=list(tasks)).float()
        else:
            logits = torch.empty(len(tasks), len(self.labels[tasks[0]]), device=self.device)
            for task in dict.fromkeys(tasks):
                rows = [row for row, name in enumerate(tasks) if name == task]
                self.model.set_adapter(task, **self._options)
                logits[rows] = self.model(batch[rows]).float()
        probabilities, indices = logits.softmax(-1).topk(5)
        return [
            {
                "task": task,
                "top": [
                    {"label": self.labels[task][index], "probability": probability}
                    for probability, index in zip(row, places, strict=True)
                ],
            }
            for task, row, places in zip(tasks, probabilities.tolist(), indices.tolist(), strict=True)
        ]
