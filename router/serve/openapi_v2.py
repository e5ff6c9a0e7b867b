"""The part of the OpenAPI document for the Open Inference Protocol."""

from typing import Any

from router.serve.problems import TITLES

Json = dict[str, Any]

INFER = (400, 404, 408, 413, 415, 422, 429, 500, 502, 503, 504)


def v2_paths() -> Json:
    """The paths below /v2."""
    task = _in_path("task", "A task's name, `name@2` or `name@tag`.")
    number = _in_path("version", "A version of the task.")
    gone, unknown = v2_errors(503), v2_errors(400, 404, 422, 500, 502)
    found: Json = {
        "/v2": {"get": _get("About this server", _ref("V2Server"), {})},
        "/v2/health/live": {"get": _get("Whether the process is alive", _object({"live": _BOOLEAN}), gone, False)},
        "/v2/health/ready": {"get": _get("Whether predictions are made", _object({"ready": _BOOLEAN}), gone, False)},
    }
    for path, where in (("/v2/models/{task}", [task]), ("/v2/models/{task}/versions/{version}", [task, number])):
        ready = _object({"name": _TEXT, "ready": _BOOLEAN})
        found[path] = {"get": _get("What a task takes and gives", _ref("V2Model"), unknown) | {"parameters": where}}
        found[f"{path}/ready"] = {
            "get": _get("Whether a task can be asked", ready, unknown | gone) | {"parameters": where}
        }
        found[f"{path}/infer"] = {"post": _infer(where)}
    return found


def _infer(where: list[Json]) -> Json:
    size = {
        "name": "Inference-Header-Content-Length",
        "in": "header",
        "required": False,
        "schema": {"type": "string"},
        "description": "Bytes of the JSON; binary tensors follow it. With 0, the whole body is one image file.",
    }
    binary = {"schema": {"type": "string", "format": "binary"}}
    answer = {"application/json": {"schema": _ref("V2Answer")}, "application/octet-stream": binary}
    return {
        "summary": "Predict with one task",
        "description": "All images of a request run in one version. An image that fails fails its request.",
        "parameters": [*where, size],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _ref("V2Request")}, "application/octet-stream": binary},
        },
        "responses": {"200": {"description": "The outputs.", "content": answer}, **v2_errors(*INFER)},
        "x-guarded": True,
    }


def v2_errors(*statuses: int) -> Json:
    content = {"application/json": {"schema": _ref("V2Error")}}
    return {str(status): {"description": TITLES[status], "content": content} for status in statuses}


def v2_schemas() -> Json:
    shape = {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 1, "maxItems": 4}
    tensor = _object({"name": _TEXT, "datatype": _TEXT, "shape": {"type": "array", "items": {"type": "integer"}}})
    parameters = {"type": "object"}
    binary = _object({"binary_data": _BOOLEAN}, [])
    asked = {"name": _TEXT, "shape": shape, "datatype": _TEXT}
    image = asked | {
        "name": {"const": "image"},
        "datatype": {"const": "BYTES"},
        "data": {"type": "array", "items": {"type": "string", "contentEncoding": "base64"}},
        "parameters": parameters,
    }
    pixels = asked | {
        "name": {"const": "pixels"},
        "datatype": {"enum": ["FP32", "FP16", "BF16"]},
        "data": {"type": "array", "description": "Numbers, in one list or in lists of its shape; of FP32."},
        "parameters": parameters,
    }
    inputs = [_object(of, list(asked)) for of in (image, pixels)]
    threshold = {
        "oneOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"enum": ["none", "stored"]}],
        "description": "The probability below which the likeliest class counts as unknown: `label` is empty then.",
    }
    request = {
        "id": _TEXT,
        "parameters": _object({"binary_data_output": _BOOLEAN, "threshold": threshold}, []),
        "inputs": {"type": "array", "items": {"oneOf": inputs}, "minItems": 1, "maxItems": 1},
        "outputs": {"type": "array", "items": _object({"name": _TEXT, "parameters": binary}, ["name"])},
    }
    given = {**tensor["properties"], "data": {"type": "array"}, "parameters": parameters}
    outputs = {"type": "array", "items": _object(given, list(tensor["properties"]))}
    answer = {"model_name": _TEXT, "model_version": _TEXT, "id": _TEXT, "outputs": outputs}
    tensors = {"type": "array", "items": _ref("V2Tensor")}
    model = {"name": _TEXT, "platform": _TEXT, "inputs": tensors, "outputs": tensors, "versions": _TEXTS}
    return {
        "V2Error": _object({"error": _TEXT}),
        "V2Server": _object({"name": _TEXT, "version": _TEXT, "extensions": _TEXTS}),
        "V2Tensor": tensor,
        "V2Model": _object(model, ["name", "platform", "inputs", "outputs"])
        | {"description": "It takes one of its inputs: image files, or normalised pixels."},
        "V2Request": _object(request, ["inputs"]),
        "V2Answer": _object(answer, ["model_name", "outputs"]),
    }


_TEXT: Json = {"type": "string"}
_TEXTS: Json = {"type": "array", "items": _TEXT}
_BOOLEAN: Json = {"type": "boolean"}


def _object(properties: Json, required: list[str] | None = None) -> Json:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
    }


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _in_path(name: str, description: str) -> Json:
    return {"name": name, "in": "path", "required": True, "schema": _TEXT, "description": description}


def _get(summary: str, schema: Json, errors: Json, token: bool = True) -> Json:
    done = {"description": "Yes.", "content": {"application/json": {"schema": schema}}}
    return {"summary": summary, "responses": {"200": done, **errors}, "x-guarded": token}
