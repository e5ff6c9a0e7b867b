"""Exports a task as a plain state dict of its timm model: adapters merged into weights, its head as the classifier."""

from functools import partial
from pathlib import Path
from typing import Any, cast

import timm
from safetensors.torch import save_file
from torch import Tensor, nn

from pear_store import PearStoreError, Task
from pear_store.format.checkpoint import natural_key
from router.backbone import Backbone
from router.exports.plain import PlainModel, compare, fitting_backbone, image_size
from router.exports.writing import about, check_free, write
from router.merge import unmergeable
from router.models import pear_tiny

ONNX_INSTEAD = "'pear-store export-onnx' takes any task; 'pear-train --positions linear' trains one that can be merged"


def export_timm(
    task: Task, file: str | Path, *, name: str | None = None, weights: str | Path | None = None, force: bool = False
) -> dict[str, Any]:
    """Writes a safetensors file that the timm model loads, and FILE.json beside it.

    `timm.create_model(**create_model)` makes the model; the JSON has "create_model": the name, the number of classes,
    and the image size if it is not the model's own. Before anything is written, the model is compared with the router.

    Args:
        task: a task with its tensors' bytes.
        file: the safetensors file to write.
        name: name of the task with its version, for the JSON; None: the task's own name.
        weights: a local safetensors file of the backbone's weights; None: timm loads them.
        force: replace existing files.
    Returns:
        "files" ({path: bytes}), "create_model", and "max_difference", the largest difference of a logit from the
        router's.
    Raises:
        PearStoreError: a position is neither a Linear nor a 1x1 convolution, the task has an activation, the timm model
            has no place for the head, its logits are not the router's, or a file cannot be written.
    """
    file = Path(file)
    check_free(file, force)
    backbone = fitting_backbone(task, weights)
    _check_mergeable(backbone, task)
    arguments = _arguments(backbone, task)
    model = timm.create_model(**arguments).eval()
    state = _state(backbone, task, model)
    difference = compare(backbone, task, model, "the timm model")
    metadata = {"format": "pt", "task": name or task.name}
    said = {**about(task, name or task.name), "create_model": arguments}
    files = write(file, partial(save_file, state, metadata=metadata), said)
    return {"files": files, "create_model": arguments, "max_difference": difference}


def _check_mergeable(backbone: Backbone, task: Task) -> None:
    if task.activation != "identity":
        raise PearStoreError(
            f"task {task.name!r} cannot be merged: its adapters have the activation {task.activation!r}, expected "
            f"'identity'; {ONNX_INSTEAD}"
        )
    if apart := sorted(unmergeable(backbone.module, task), key=natural_key):
        some = ", ".join(map(repr, apart[:3])) + (f" and {len(apart) - 3} more" if len(apart) > 3 else "")
        raise PearStoreError(
            f"task {task.name!r} cannot be merged: positions {some} are whole modules, expected Linears or 1x1 "
            f"convolutions; {ONNX_INSTEAD}"
        )


def _arguments(backbone: Backbone, task: Task) -> dict[str, Any]:
    """Arguments of timm.create_model for a model with the task's image size and classes."""
    arguments: dict[str, Any] = {"model_name": backbone.name}
    if backbone.name == "pear_tiny":
        arguments = dict(pear_tiny.AS_TIMM)
    if image_size(task) != backbone.input_size and hasattr(backbone.module, "set_input_size"):
        arguments["img_size"] = list(image_size(task))
    return {**arguments, "num_classes": len(task.labels)}


def _state(backbone: Backbone, task: Task, model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model that gives the task's logits. It is also loaded into `model`."""
    plain = PlainModel(backbone, task)
    state: dict[str, Tensor] = dict(plain.backbone.state_dict())
    if task.head is not None:
        classifiers = backbone.config.get("classifier", "head")
        for path in [classifiers] if isinstance(classifiers, str) else classifiers:
            state |= {f"{path}.{leaf}": value for leaf, value in plain.head.state_dict().items()}
    try:
        cast(Any, model).load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n", 1)[-1].split())
        raise PearStoreError(
            f"task {task.name!r}: {backbone.name} has no place for a plain linear classifier ({reason:.200}); "
            "'pear-store export-onnx' takes any task"
        ) from None
    return {key: value.detach().clone().contiguous() for key, value in state.items()}
