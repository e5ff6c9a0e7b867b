"""The Open Inference Protocol, version 2 (KServe, Triton), beside /v1. A model of the protocol is a task."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pear_store import NotFoundError, PearStoreError
from router.errors import RouterError
from router.predictions import Prediction
from router.registry import Known
from router.router import Router
from router.serve.batcher import Batcher
from router.serve.bodies import Held, Parser, read_body
from router.serve.limits import RequestLimits
from router.serve.parts import Named, Outcome, Sent
from router.serve.problems import Problem
from router.serve.v2_tensors import answer_of, check_outputs, read_call

Endpoint = Callable[[Request], Awaitable[Response]]
JSON_BYTES = "Inference-Header-Content-Length"


try:
    _OURS = version("pear-adapters")
except PackageNotFoundError:  # it runs from a folder without an installation
    _OURS = "unknown"


class Serving(Protocol):
    """The part of Service that the endpoints need."""

    router: Router
    batcher: Batcher
    limits: RequestLimits
    held: Held
    parser: Parser

    async def must_be_ready(self) -> None: ...
    async def live(self, request: Request) -> Response: ...
    async def ready(self, request: Request) -> Response: ...
    async def problem(self, error: Exception, task: str, told: dict[str, Problem] | None = None) -> Problem: ...
    async def outcomes(
        self, request: Request, wanted: Sequence[tuple[Sent, Sequence[Named]]]
    ) -> list[list[Outcome]]: ...


def v2_routes(service: Serving, use: Callable[[Endpoint], Endpoint]) -> list[Route]:
    """The protocol's paths.

    Args:
        use: wraps each endpoint that needs a token.
    """
    endpoints = _Endpoints(service)
    routes = [
        Route("/v2", use(endpoints.about)),
        Route("/v2/health/live", _unlike(service.live)),
        Route("/v2/health/ready", _unlike(service.ready)),
    ]
    for model in ("/v2/models/{task}", "/v2/models/{task}/versions/{version}"):
        routes += [
            Route(model, use(endpoints.describe)),
            Route(f"{model}/ready", use(endpoints.model_ready)),
            Route(f"{model}/infer", use(endpoints.infer), methods=["POST"]),
        ]
    return routes


def is_v2(request: Request) -> bool:
    path = str(request.scope["path"]).removeprefix(str(request.scope.get("root_path", "")))
    return path == "/v2" or path.startswith("/v2/")


def error_response(problem: Problem) -> Response:
    """An error in the protocol's form."""
    near = problem.more.get("near")
    text = f"{problem.detail}; there are: {', '.join(near)}" if near else problem.detail
    return JSONResponse({"error": text}, problem.status, headers=dict(problem.headers))


def _unlike(endpoint: Endpoint) -> Endpoint:
    """A separate endpoint that does the same, so that its path is counted apart."""

    async def call(request: Request) -> Response:
        return await endpoint(request)

    return call


class _Endpoints:
    def __init__(self, service: Serving) -> None:
        self._service = service

    async def about(self, request: Request) -> Response:
        return JSONResponse({"name": "pear-serve", "version": _OURS, "extensions": ["binary_tensor_data"]})

    async def describe(self, request: Request) -> Response:
        known = await self._known(request)
        return JSONResponse(await asyncio.to_thread(self._metadata, request.path_params["task"], known))

    async def model_ready(self, request: Request) -> Response:
        await self._service.must_be_ready()
        await self._known(request)
        return JSONResponse({"name": request.path_params["task"], "ready": True})

    async def infer(self, request: Request) -> Response:
        service = self._service
        await service.must_be_ready()
        with service.held.share() as count:
            body = await read_body(request, service.limits, count)
            known = await self._known(request)
            call = await service.parser.read(read_call, body, request.headers.get(JSON_BYTES), service.limits)
            check_outputs(call, is_headless=not known.labels)
            outcomes = await service.outcomes(request, [(image, [known]) for image in call.images])
        task = request.path_params["task"]
        predictions = [await self._checked(found, number, task) for number, (found,) in enumerate(outcomes)]
        number = None if known.version is None else known.version.version
        answer, json_bytes = await asyncio.to_thread(answer_of, call, task, number, predictions)
        if json_bytes == len(answer):
            return Response(answer, media_type="application/json")
        return Response(answer, headers={JSON_BYTES: str(json_bytes)}, media_type="application/octet-stream")

    async def _checked(self, outcome: Outcome, number: int, task: str) -> Prediction:
        """An image's prediction. If it failed, the whole request fails: the protocol has no partial answers."""
        if isinstance(outcome, Prediction) and outcome.error is None:
            return outcome
        problem = (
            Problem(422, outcome.error or "")
            if isinstance(outcome, Prediction)
            else await self._service.problem(outcome, task)
        )
        raise Problem(problem.status, f"image {number}: {problem.detail}", problem.more, problem.headers)

    async def _known(self, request: Request) -> Known:
        """The current meaning of the path's model and version. All images of a request run in this version."""
        task, number = request.path_params["task"], request.path_params.get("version")
        if number is not None:
            if "@" in task:
                raise Problem(400, f"model {task!r:.100} and a version: expected one of /models/NAME@V and /versions/V")
            task = f"{task}@{number}"
        try:
            return await self._service.batcher.lookup(task)
        except (RouterError, PearStoreError) as error:
            raise await self._service.problem(error, task) from None

    def _metadata(self, name: str, known: Known) -> dict[str, Any]:
        height, width = known.preprocess.size
        count = len(known.labels)
        image = [
            {"name": "image", "datatype": "BYTES", "shape": [-1]},
            {"name": "pixels", "datatype": "FP32", "shape": [-1, 3, height, width]},
        ]
        outputs = [
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
            {"name": "known", "datatype": "BOOL", "shape": [-1]},
            {"name": "class", "datatype": "INT64", "shape": [-1]},
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, count]},
        ]
        if not count:
            outputs = [{"name": "features", "datatype": "FP32", "shape": [-1, -1]}]
        found = {"name": name, "platform": "pear", "inputs": image, "outputs": outputs}
        return found if known.version is None else {**found, "versions": self._versions(known)}

    def _versions(self, known: Known) -> list[str]:
        assert known.version is not None and self._service.router.store is not None
        try:
            versions = self._service.router.store.versions(known.name)
        except NotFoundError:  # it was removed, but is served until the next refresh
            versions = [known.version]
        return [str(version.version) for version in versions]
