"""Bodies of the Open Inference Protocol, version 2: reads images from requests, and writes predictions.

A request has one input: `image` (files' bytes) or `pixels` (normalised). Binary tensors follow the JSON; a header has
the JSON's length. Each binary BYTES element has its length in four bytes before it. In JSON, bytes are base64.
"""

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from router.errors import RouterError
from router.predictions import Prediction, Threshold, check_threshold
from router.serve.bodies import from_base64, is_text, read_json
from router.serve.limits import RequestLimits
from router.serve.parts import Sent
from router.serve.problems import Problem
from router.threads import computing_alone

Json = dict[str, Any]

PIXEL_TYPES: dict[str, tuple[int, Callable[[bytes], NDArray[np.float32]]]] = {
    "FP32": (4, lambda data: np.frombuffer(data, "<f4").astype(np.float32)),
    "FP16": (2, lambda data: np.frombuffer(data, "<f2").astype(np.float32)),
    "BF16": (2, lambda data: (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)),
}
"""Data type of `pixels` -> bytes of a number, and the function that reads them."""
NOT_DONE = ("classification", "shared_memory_region")
"""Parameters of other servers' extensions. They are refused, because they would change the request's meaning."""


@dataclass(frozen=True)
class Call:
    """An inference request."""

    id: str | None
    images: list[Sent]
    outputs: list[tuple[str, bool]] | None
    """The requested outputs: (name, whether as a binary tensor). None: all."""
    binary: bool
    """Whether outputs are binary tensors by default."""
    threshold: Threshold = "stored"


def read_call(body: bytes, json_bytes: str | None, limits: RequestLimits) -> Call:
    """Reads a request.

    Args:
        json_bytes: the header with the JSON's length; "0": the whole body is one image file; None: it is all JSON.
    Raises:
        Problem: the body cannot be read, or asks for something that is not supported.
    """
    length = len(body)
    if json_bytes is not None:
        if not (json_bytes.isascii() and json_bytes.isdigit() and len(json_bytes) < 12 and int(json_bytes) <= length):
            raise Problem(400, f"Inference-Header-Content-Length {json_bytes!r:.40}: the body has {length} bytes")
        length = int(json_bytes)
        if length == 0:
            return Call(None, [_not_empty(body, 0)], None, False)
    found = _object(read_json(body[:length]), "the body")
    name, inputs = found.get("id"), found.get("inputs")
    if name is not None and not (isinstance(name, str) and is_text(name)):
        raise Problem(400, '"id": expected text')
    if not isinstance(inputs, list) or len(inputs) != 1:
        raise Problem(400, '"inputs": expected one input: "image" or "pixels"')
    parameters = _parameters(found, "the body")
    binary, threshold = _flag(parameters, "binary_data_output", False), _threshold(parameters)
    images = _images(_object(inputs[0], "the input"), body[length:], limits)
    return Call(name, images, _outputs(found, binary), binary, threshold)


def _outputs(found: Json, binary: bool) -> list[tuple[str, bool]] | None:
    outputs = found.get("outputs")
    if not outputs and isinstance(outputs, list | None):
        return None
    if not isinstance(outputs, list):
        raise Problem(400, '"outputs": expected a list')
    asked = []
    for output in outputs:
        name = _object(output, "an output").get("name")
        if not isinstance(name, str):
            raise Problem(400, '"outputs": expected a "name" in each')
        asked.append((name, _flag(_parameters(output, f"output {name!r:.100}"), "binary_data", binary)))
    if len({name for name, _ in asked}) < len(asked):
        raise Problem(400, '"outputs": expected each output once')
    return asked


def _images(found: Json, binary: bytes, limits: RequestLimits) -> list[Sent]:
    name, kind, shape = found.get("name"), found.get("datatype"), found.get("shape")
    what = f"input {name!r:.100}"
    if not isinstance(shape, list) or not all(type(side) is int and 0 < side < 2**31 for side in shape):
        raise Problem(400, f"{what}: expected a shape of whole numbers from 1")
    size = _parameters(found, what).get("binary_data_size")
    if (size is not None and (type(size) is not int or "data" in found)) or (size is None and "data" not in found):
        raise Problem(400, f'{what}: expected either "data" or the parameter "binary_data_size"')
    if (size or 0) != len(binary):
        raise Problem(400, f"{what}: {len(binary)} bytes follow the JSON: expected {size or 0}")
    if name == "image":
        if kind != "BYTES" or shape[1:] not in ([], [1]) or not shape:
            raise Problem(400, f"{what}: {kind!r:.40} {shape!r:.100}: expected 'BYTES' [n] or [n, 1]")
        _check_count(shape[0], limits)
        files = _elements(binary) if size is not None else _decoded(found["data"])
        if len(files) != shape[0]:
            raise Problem(400, f"{what}: {len(files)} elements: its shape says {shape[0]}")
        return [_not_empty(file, number) for number, file in enumerate(files)]
    if name == "pixels":
        if not isinstance(kind, str) or kind not in PIXEL_TYPES or len(shape) != 4 or shape[1] != 3:
            raise Problem(400, f"{what}: {kind!r:.40} {shape!r:.100}: expected FP32, FP16 or BF16 [n, 3, h, w]")
        _check_count(shape[0], limits)
        return list(_pixels(found, kind, shape, binary if size is not None else None, what))
    raise Problem(400, f'{what}: expected "image" or "pixels"')


def _pixels(found: Json, kind: str, shape: list[int], binary: bytes | None, what: str) -> torch.Tensor:
    """The input `pixels` as float32 [n, 3, h, w]."""
    count = shape[0] * shape[1] * shape[2] * shape[3]
    if binary is not None:
        width, read = PIXEL_TYPES[kind]
        if len(binary) != count * width:
            raise Problem(400, f"{what}: {len(binary)} bytes: {kind} {shape} has {count * width}")
        return torch.from_numpy(read(binary).reshape(shape))
    if kind != "FP32":
        raise Problem(400, f"{what}: {kind} in JSON: send it as a binary tensor, or FP32")
    try:
        # dtype object, because in an array of texts each text takes the bytes of the longest one
        numbers = np.asarray(found["data"], dtype=object)
        if numbers.size != count or not all(type(number) in (int, float) for number in numbers.flat):
            raise ValueError
        with np.errstate(over="ignore"):  # infinite pixels get an error as their answer
            return torch.from_numpy(numbers.astype(np.float32).reshape(shape))
    except (ValueError, OverflowError):  # also for lists of different lengths or too deep, and for too large numbers
        raise Problem(400, f'{what}: "data": expected {count} numbers, in one list or in lists of its shape') from None


def _elements(binary: bytes) -> list[bytes]:
    """The elements of a binary BYTES tensor."""
    found, place = [], 0
    while place < len(binary):
        if len(binary) - place < 4:
            raise Problem(400, "the binary tensor ends within an element's length")
        (length,) = struct.unpack_from("<I", binary, place)
        if length > len(binary) - place - 4:
            raise Problem(400, f"the binary tensor ends before an element of {length} bytes does")
        found.append(binary[place + 4 : place + 4 + length])
        place += 4 + length
    return found


def _decoded(data: object) -> list[bytes]:
    """The elements of a BYTES tensor in JSON."""
    if not isinstance(data, list):
        raise Problem(400, '"data": expected a list')
    flat = [item[0] if isinstance(item, list) and len(item) == 1 else item for item in data]
    if not all(isinstance(item, str) for item in flat):
        raise Problem(400, '"data": expected images in base64, or send them as a binary tensor')
    return [from_base64(item, f"image {number}") for number, item in enumerate(flat)]


def _not_empty(file: bytes, number: int) -> bytes:
    if not file:
        raise Problem(400, f"image {number}: expected a file's bytes, found none")
    return file


def _check_count(count: int, limits: RequestLimits) -> None:
    if count > limits.images:
        raise Problem(413, f"{count} images: the limit is {limits.images} in a request")


def _object(value: object, what: str) -> Json:
    if not isinstance(value, dict):
        raise Problem(400, f"{what}: expected a JSON object")
    return value


def _parameters(found: Json, what: str) -> Json:
    parameters = _object(found.get("parameters") or {}, f'"parameters" of {what}')
    for name in NOT_DONE:
        if name in parameters:
            raise Problem(400, f"{what}: the parameter {name!r} is not known here")
    return parameters


def _flag(parameters: Json, name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise Problem(400, f'"{name}": expected true or false')
    return value


def _threshold(parameters: Json) -> Threshold:
    value = parameters.get("threshold", "stored")
    if value == "none":
        return None
    try:
        check_threshold(value if value is not None else "")
    except RouterError:
        raise Problem(400, f'"threshold": {value!r:.80}: expected a number from 0 to 1, "none" or "stored"') from None
    threshold: Threshold = value
    return threshold


# ---- answers ----------------------------------------------------------------------------------


def output_names(is_headless: bool) -> list[str]:
    return ["features"] if is_headless else ["label", "known", "class", "probabilities"]


def check_outputs(call: Call, is_headless: bool) -> None:
    """Raises a Problem unless a task has all requested outputs."""
    names = output_names(is_headless)
    for name, _ in call.outputs or ():
        if name not in names:
            raise Problem(400, f"no output {name!r:.100}: this task has {', '.join(names)}")


@computing_alone()
def answer_of(call: Call, model: str, version: int | None, predictions: Sequence[Prediction]) -> tuple[bytes, int]:
    """The body of an answer, and the length of its JSON in bytes.

    Args:
        predictions: predictions of one version of one task, without errors. The task has the requested outputs.
    """
    if call.threshold != "stored":
        predictions = [prediction.with_threshold(call.threshold) for prediction in predictions]
    names = output_names(not predictions[0].classes)
    asked = [(name, call.binary) for name in names] if call.outputs is None else call.outputs
    outputs: list[Json] = []
    tail: list[bytes] = []
    for name, binary in asked:
        output, data = _output(name, predictions, binary)
        outputs.append(output)
        tail.append(data)
    found: Json = {"model_name": model, "outputs": outputs}
    if version is not None:
        found["model_version"] = str(version)
    if call.id is not None:
        found["id"] = call.id
    head = json.dumps(found, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    return b"".join([head, *tail]), len(head)


def _output(name: str, predictions: Sequence[Prediction], binary: bool) -> tuple[Json, bytes]:
    count = len(predictions)
    if name == "label":
        labels = [prediction.label or "" for prediction in predictions]
        head, values = {"name": name, "datatype": "BYTES", "shape": [count]}, labels
        data = b"".join(struct.pack("<I", len(text)) + text for text in (label.encode() for label in labels))
    elif name == "known":
        known = np.array([prediction.known for prediction in predictions], np.bool_)
        head, values, data = {"name": name, "datatype": "BOOL", "shape": [count]}, known.tolist(), known.tobytes()
    elif name == "class":
        classes = np.array([int(prediction.logits.argmax()) for prediction in predictions], "<i8")
        head, values, data = {"name": name, "datatype": "INT64", "shape": [count]}, classes.tolist(), classes.tobytes()
    else:
        rows = [prediction.probs if name == "probabilities" else prediction.logits for prediction in predictions]
        numbers = torch.stack(rows).numpy().astype("<f4")
        head = {"name": name, "datatype": "FP32", "shape": list(numbers.shape)}
        values, data = numbers.ravel().tolist(), numbers.tobytes()
    if binary:
        return {**head, "parameters": {"binary_data_size": len(data)}}, data
    return {**head, "data": values}, b""
