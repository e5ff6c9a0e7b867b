"""Exports a task as an ONNX file that takes images and gives logits. It may have adapters of any kind."""

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pear_store import PearStoreError, Task
from router.exports.plain import PlainModel, compare, fitting_backbone, image_size
from router.exports.writing import about, check_free, write

OPSET = 18
"""Version of the ONNX operators."""
MAX_BYTES = 2**31 - 2**24
"""Most bytes of weights. An ONNX file is a protobuf message, which holds less than 2 GiB."""


def export_onnx(
    task: Task, file: str | Path, *, name: str | None = None, weights: str | Path | None = None, force: bool = False
) -> dict[str, Any]:
    """Writes an ONNX file, and FILE.json beside it. Before anything is written, the graph runs in onnxruntime.

    Input "images" is normalised float32 [batch, 3, height, width]. Output "logits" is float32 [batch, classes]; for a
    task without a head it is "features" [batch, d]. The batch may have any size. The file's metadata holds "labels",
    "preprocess" and "backbone" as JSON, and "task".

    Args:
        task: a task with its tensors' bytes.
        file: the ONNX file to write.
        name: name of the task with its version; None: the task's own name.
        weights: a local safetensors file of the backbone's weights; None: timm loads them.
        force: replace existing files.
    Returns:
        "files" ({path: bytes}), "opset" and "max_difference", the largest difference of a logit from the router's.
    Raises:
        PearStoreError: onnx, onnxscript or onnxruntime is not installed, torch cannot export this backbone, the graph's
            logits are not the router's, or a file cannot be written.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError:
        raise PearStoreError("export-onnx needs onnx: pip install 'pear-adapters[onnx]'") from None
    file = Path(file)
    check_free(file, force)
    backbone = fitting_backbone(task, weights)
    if backbone.size_bytes > MAX_BYTES:
        raise PearStoreError(
            f"{backbone.name}: {backbone.size_bytes:,} bytes of weights, an ONNX file holds less than 2 GiB: choose "
            "another export"
        )
    said = about(task, name or task.name)
    model = _graph(PlainModel(backbone, task), task)
    properties = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in said.items()}
    onnx.helper.set_model_props(model, properties)
    data = model.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    difference = compare(
        backbone, task, lambda images: session.run(None, {"images": images.numpy()})[0], "the ONNX graph"
    )
    return {"files": write(file, partial(onnx.save, model), said), "opset": OPSET, "max_difference": difference}


def _graph(module: PlainModel, task: Task) -> Any:
    """The module as an ONNX model of onnx's own type."""
    output = "features" if task.head is None else "logits"
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter warns about its own packages
            program = torch.onnx.export(
                module,
                (torch.zeros(2, 3, *image_size(task)),),
                dynamo=True,  # the other exporter, by TorchScript, is deprecated
                input_names=["images"],
                output_names=[output],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=OPSET,
                verbose=False,
            )
    except Exception as error:  # whatever torch raises for a model that it cannot trace
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PearStoreError(f"task {task.name!r}: torch cannot export {task.backbone_model}: {reason:.300}") from error
    assert program is not None
    return program.model_proto
