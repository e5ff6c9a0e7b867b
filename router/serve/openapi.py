"""The OpenAPI document of the HTTP interface."""

from typing import Any

from router.serve.limits import RequestLimits
from router.serve.openapi_v2 import v2_errors, v2_paths, v2_schemas
from router.serve.problems import TITLES

Json = dict[str, Any]


def document(limits: RequestLimits, *, with_hosts: bool, with_tokens: bool) -> Json:
    """The OpenAPI 3.1 document of `/openapi.json`."""
    found: Json = {
        "openapi": "3.1.0",
        "info": {
            "title": "pear-serve",
            "version": "1",
            "description": "Serves any task of a store. Requests for different tasks share batches.",
        },
        "paths": {**_paths(limits), **v2_paths()},
        "components": {"schemas": {**_schemas(), **v2_schemas()}},
    }
    if with_tokens:
        found["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    guards = [*((401, 403) if with_tokens else ()), *((421,) if with_hosts else ())]
    for path, methods in found["paths"].items():
        for operation in methods.values():
            if operation.pop("x-guarded"):
                operation["responses"] |= (v2_errors if path.startswith("/v2") else _problems)(*guards)
                if with_tokens:
                    operation["security"] = [{"token": []}]
    return found


def _paths(limits: RequestLimits) -> Json:
    task = {"name": "task", "in": "path", "required": True, "schema": _ref("Reference")}
    top = _query("top", {"type": "integer", "minimum": 1, "maximum": 1000, "default": 5}, "Classes in `top`.")
    probabilities = _query("probabilities", {"type": "boolean", "default": False}, "Also those of all classes.")
    threshold = _query(
        "threshold",
        {"oneOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"const": "none"}]},
        "The probability below which the likeliest class counts as unknown. By default each task's stored threshold.",
    )
    tasks = _query(
        "tasks",
        {"type": "string"},
        "Comma-separated names, or `all`, for every image. If it is repeated, it names more.",
    )
    predict = _problems(400, 404, 408, 413, 415, 422, 429, 500, 502, 503, 504)
    results = {"200": _answer("One row for each image and task.", _ref("Results")), **predict}
    gone = _problems(503)
    whole = {"type": "integer", "minimum": 1, "maximum": 1000}
    return {
        "/livez": {"get": _operation("Whether the process is alive", {"200": _answer("Yes.")} | gone, token=False)},
        "/readyz": {"get": _operation("Whether predictions are made", {"200": _answer("Yes.")} | gone, token=False)},
        "/openapi.json": {"get": _operation("This document", {"200": _answer("It.")}, token=False)},
        "/": {"get": _operation("A page to try tasks on", {"200": _file("HTML.", "text/html")}, token=False)},
        "/page/{file}": {
            "get": _operation(
                "A file of that page",
                {"200": _file("Its text.", "text/*")} | _problems(404),
                [{"name": "file", "in": "path", "required": True, "schema": {"type": "string"}}],
                token=False,
            )
        },
        "/v1/server": {
            "get": _operation("What is served", {"200": _answer("The backbone and the limits.", _ref("Server"))})
        },
        "/v1/tasks": {
            "get": _operation(
                "The tasks for this backbone, by name",
                {"200": _answer("A page of them.", _ref("Tasks"))} | _problems(422, 500),
                [
                    _query("limit", whole | {"default": 100}, "Tasks of a page."),
                    _query("after", {"type": "string"}, "The last name of the page before: its `next`."),
                    _query("search", {"type": "string"}, "Part of the names."),
                ],
            )
        },
        "/v1/tasks/{task}": {
            "get": _operation(
                "One task", {"200": _answer("What is known of it.", _ref("Task"))} | _problems(404, 422, 500), [task]
            )
        },
        "/v1/tasks/{task}/predict": {
            "post": _operation(
                "Predict with one task", results, [task, top, probabilities, threshold], _body(limits, own_tasks=False)
            )
        },
        "/v1/predict": {
            "post": _operation(
                "Predict with any tasks", results, [tasks, top, probabilities, threshold], _body(limits, own_tasks=True)
            )
        },
        "/v1/refresh": {
            "post": _operation(
                "Take over changes of the store",
                {"200": _answer("The references that changed, and their versions now.", _ref("Changed"))}
                | _problems(500),
            )
        },
    }


def _body(limits: RequestLimits, own_tasks: bool) -> Json:
    binary = {"schema": {"type": "string", "format": "binary"}}
    tasks: Json = {}
    if own_tasks:
        tasks["task"] = _ref("Reference")
        tasks["tasks"] = {"oneOf": [{"const": "all"}, {"type": "array", "items": _ref("Reference"), "minItems": 1}]}
    places = {
        "image": _base64(),
        "path": {"type": "string", "description": "Path of a file below the server's --root, if it has one."},
        "url": {"type": "string", "description": "http or https, if the server has --allow-urls."},
    }
    one_of = [
        {"type": "object", "required": [name], "properties": {name: schema, **tasks}} for name, schema in places.items()
    ]
    many = {"type": "array", "items": {"oneOf": [_base64(), *one_of]}, "minItems": 1}
    field = (
        "Files. The name of a field is the task of its file, unless the query names tasks." if own_tasks else "Files."
    )
    return {
        "required": True,
        "description": f"At most {limits.body_bytes} bytes and {limits.images} images.",
        "content": {
            "image/*": binary,
            "application/octet-stream": binary,
            "multipart/form-data": {
                "schema": {"type": "object", "description": field, "additionalProperties": binary["schema"]}
            },
            "application/json": {
                "schema": {
                    "oneOf": [*one_of, {"type": "object", "required": ["images"], "properties": {"images": many}}]
                }
            },
        },
    }


def _base64() -> Json:
    return {"type": "string", "contentEncoding": "base64", "description": "An image file, or a data URL of one."}


def _schemas() -> Json:
    text, number, whole = {"type": "string"}, {"type": "number"}, {"type": "integer"}
    maybe_text, maybe_whole = {"type": ["string", "null"]}, {"type": ["integer", "null"]}
    result = {
        "image": {"type": "integer", "description": "Its number in the request."},
        "file": maybe_text,
        "task": text,
        "version": maybe_whole,
        "label": {**maybe_text, "description": "Name of the likeliest class; null if the answer is unknown."},
        "known": {
            "type": ["boolean", "null"],
            "description": "false: the likeliest class has a probability below `threshold`. null: no classes.",
        },
        "threshold": {"type": ["number", "null"], "description": "The threshold of this answer; null: none."},
        "top": {"type": "array", "items": _object({"label": text, "probability": number})},
        "batch": {
            "oneOf": [{"type": "null"}, _object({"rows": whole, "tasks": whole, "ms": number})],
            "description": "The batch of this row, and its milliseconds on the device.",
        },
        "error": {"oneOf": [{"type": "null"}, _ref("Problem")]},
    }
    summary = {
        "name": text,
        "version": maybe_whole,
        "size_bytes": maybe_whole,
        "shared_bytes": {
            **maybe_whole,
            "description": "Of these, bytes that other tasks use; for newest versions only.",
        },
        "classes": whole,
        "metrics": {"type": "object", "additionalProperties": number},
        "tags": {"type": "array", "items": text},
    }
    problem = {"type": text, "title": text, "status": {"type": "integer"}, "detail": text}
    return {
        "Reference": {
            "type": "string",
            "description": "A task's name, `name@2` or `name@tag`.",
            "examples": ["dtd@prod"],
        },
        "Problem": {**_object(problem), "description": "RFC 9457. `near` offers names for an unknown task."},
        "Results": _object({"results": {"type": "array", "items": _result(result)}}),
        "Tasks": _object(
            {
                "tasks": {"type": "array", "items": _object(summary)},
                "total": whole,
                "matching": {**whole, "description": "Tasks that the search finds, on all pages."},
                "next": maybe_text,
            }
        ),
        "Task": _object(
            {
                **summary,
                "labels": {"type": "array", "items": text},
                "threshold": {"type": ["number", "null"], "description": "Stored threshold; null: none."},
                "preprocess": {"type": "object"},
                "metrics": {"type": "object"},
                "backbone": _object({"model": text, "digest": text}),
                "loaded": {"type": "boolean"},
            }
        ),
        "Server": _object(
            {
                "backbone": _object({"model": text, "digest": text}),
                "device": text,
                "limits": _object({"images": whole, "tasks": whole, "body_bytes": whole, "timeout_s": number}),
            }
        ),
        "Changed": _object({"changed": {"type": "object", "additionalProperties": maybe_whole}}),
    }


def _result(properties: Json) -> Json:
    numbers = {"type": "array", "items": {"type": "number"}}
    found = _object(properties)
    found["properties"] = properties | {
        "probabilities": {**numbers, "description": "In the order of the task's labels; if asked for."},
        "features": {**numbers, "description": "Features of a task without classes."},
    }
    return found


def _object(properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _query(name: str, schema: Json, description: str) -> Json:
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": description}


def _answer(description: str, schema: Json | None = None) -> Json:
    return {"description": description, "content": {"application/json": {"schema": schema or {"type": "object"}}}}


def _file(description: str, media_type: str) -> Json:
    return {"description": description, "content": {media_type: {"schema": {"type": "string"}}}}


def _problems(*statuses: int) -> Json:
    content = {"application/problem+json": {"schema": _ref("Problem")}}
    return {str(status): {"description": TITLES[status], "content": content} for status in statuses}


def _operation(
    summary: str, responses: Json, parameters: list[Json] | None = None, body: Json | None = None, *, token: bool = True
) -> Json:
    found: Json = {"summary": summary, "responses": dict(responses), "x-guarded": token}
    if parameters:
        found["parameters"] = parameters
    if body:
        found["requestBody"] = body
    return found
