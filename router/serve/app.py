"""The HTTP interface: an ASGI app that runs by itself or is mounted into another app."""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pear_store import PearStoreError
from router.errors import RouterError, UnknownTaskError
from router.predictions import Prediction, Threshold, read_threshold
from router.router import Router
from router.serve.batcher import Batcher
from router.serve.bodies import Asked, images_of, read_body
from router.serve.errors import DeadlineError, DrainingError, FetchError
from router.serve.fetching import Fetcher
from router.serve.front import page_routes
from router.serve.hosts import Hosts
from router.serve.life import Life
from router.serve.limits import RequestLimits
from router.serve.linger import Linger
from router.serve.openapi import document
from router.serve.parts import Answer, Named, Outcome, Sent
from router.serve.problems import DEVICE_FAILED, TITLES, Problem, problem_of
from router.serve.tokens import Tokens
from router.serve.v2 import error_response, is_v2, v2_routes

MOST_TOP = 1000
MOST_NEAR = 8
"""Most unknown tasks of a request for which similar names are searched."""
PAGE = 1000
"""Most tasks in one answer of a list."""
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
log = logging.getLogger(__name__)


class Service(Life):
    """The endpoints of one app."""

    async def show_server(self, request: Request) -> Response:
        """The backbone, the device, and the limits of a request."""
        router, limits = self.router, self.limits
        shown = {"images": limits.images, "tasks": limits.tasks, "body_bytes": limits.body_bytes}
        return JSONResponse(
            {
                "backbone": {"model": router.backbone.name, "digest": router.backbone.digest},
                "device": str(router.device),
                "limits": {**shown, "timeout_s": limits.timeout_s},
            }
        )

    async def live(self, request: Request) -> Response:
        if self.batcher.failed is not None:
            raise Problem(503, DEVICE_FAILED)
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        self.start()
        if (reason := self.why_not_ready) is not None:
            raise Problem(503, reason, headers={"Retry-After": "1"})
        return JSONResponse({"ready": True})

    async def list_tasks(self, request: Request) -> Response:
        count = whole_number(request, "limit", 100, 1, PAGE)
        after, part = request.query_params.get("after", ""), request.query_params.get("search", "").lower()
        return JSONResponse(await asyncio.to_thread(self.catalogue.page, count, after, part))

    async def show_task(self, request: Request) -> Response:
        task = request.path_params["task"]
        try:
            return JSONResponse(await asyncio.to_thread(self.catalogue.describe, task))
        except (RouterError, PearStoreError) as error:
            raise await self.problem(error, task) from None

    async def take_up(self, request: Request) -> Response:
        try:
            changed = await self.refresh()
        except PearStoreError as error:
            log.error("the store cannot be read: %s", error)
            raise Problem(500, "the store cannot be read, so nothing changed; the server's log says why") from None
        return JSONResponse({"changed": changed})

    async def predict_task(self, request: Request) -> Response:
        """Any number of images for the task in the path."""
        return await self._predict(request, [request.path_params["task"]], is_fixed=True)

    async def predict(self, request: Request) -> Response:
        """Any number of images, each for its own tasks, or all for the tasks of the query."""
        named = request.query_params.getlist("tasks")  # once with commas, or once for each
        return await self._predict(request, ",".join(named).split(",") if named else None, is_fixed=False)

    async def _predict(self, request: Request, tasks: list[str] | None, is_fixed: bool) -> Response:
        top = whole_number(request, "top", 5, 1, MOST_TOP)
        probabilities = request.query_params.get("probabilities", "false")
        if probabilities not in ("true", "false"):
            raise Problem(422, f"probabilities={probabilities!r:.100}: expected true or false")
        threshold = _threshold(request)
        await self.must_be_ready()
        with self.held.share() as count:
            body = await read_body(request, self.limits, count)
            asked = await images_of(body, request.headers.get("content-type"), self.limits, self.parser)
            wanted = [(one, await self._tasks_of(one, number, tasks, is_fixed)) for number, one in enumerate(asked)]
            images = await self.fetcher.images([one.image for one in asked], count)
            outcomes = await self.outcomes(
                request, [(image, names) for image, (_, names) in zip(images, wanted, strict=True)]
            )
        rows = [
            (one, number, task, outcome)
            for number, ((one, names), found) in enumerate(zip(wanted, outcomes, strict=True))
            for task, outcome in zip(names, found, strict=True)
        ]
        told: dict[str, Problem] = {}
        results = [
            await self._row(one, number, task, _judged(outcome, threshold), top, probabilities == "true", told)
            for one, number, task, outcome in rows
        ]
        if len(rows) == 1 and isinstance(problem := results[0].get("error"), dict):
            raise await self._problem_of(rows[0][3], rows[0][2], problem, told)
        return JSONResponse({"results": results})

    async def _tasks_of(self, asked: Asked, number: int, tasks: list[str] | None, is_fixed: bool) -> list[str]:
        """The tasks for an image, without repetitions."""
        if tasks is not None and asked.tasks is not None and asked.name is None:
            raise Problem(400, f"image {number}: expected tasks in the body or in the URL, found both")
        names = tasks if tasks is not None else asked.tasks
        if names is None:
            raise Problem(
                422,
                f"image {number}: no task: give ?tasks=a,b or ?tasks=all, or name its task beside it in JSON or a form",
            )
        if not is_fixed and names == ["all"]:
            names = list(await asyncio.to_thread(self.catalogue.tasks))
            if not names:
                raise Problem(422, "the store has no task for this server's backbone")
        names = list(dict.fromkeys(name.strip() for name in names))
        if len(names) > self.limits.tasks:
            raise Problem(413, f"{len(names)} tasks: the limit is {self.limits.tasks} for an image")
        return names

    async def outcomes(
        self, request: Request, wanted: Sequence[tuple[Sent | FetchError, Sequence[Named]]]
    ) -> list[list[Outcome]]:
        """The results of all images. They are cancelled if the client goes away or the time limit is reached."""
        there = [(image, names) for image, names in wanted if not isinstance(image, FetchError)]
        found = iter(await self._wait_for(request, there))
        return [[image] * len(names) if isinstance(image, FetchError) else next(found) for image, names in wanted]

    async def _wait_for(self, request: Request, wanted: Sequence[tuple[Sent, Sequence[Named]]]) -> list[list[Outcome]]:
        if not wanted:
            return []
        answers = self.batcher.submit(wanted)
        every = asyncio.gather(*answers)
        leaving = asyncio.create_task(_left(request))
        leaving.add_done_callback(lambda _: every.cancel())
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                return await every
        except TimeoutError:
            raise DeadlineError(self.limits.timeout_s) from None
        except asyncio.CancelledError:
            if leaving.done() and not leaving.cancelled():
                raise Problem(400, "the client went away") from None
            raise
        finally:
            leaving.cancel()
            for answer in answers:
                answer.cancel()

    async def _row(
        self,
        asked: Asked,
        number: int,
        task: str,
        outcome: Outcome,
        top: int,
        probabilities: bool,
        told: dict[str, Problem],
    ) -> dict[str, Any]:
        row: dict[str, Any] = {"image": number, "file": asked.name, "task": task, "version": None, "label": None}
        row |= {"known": None, "threshold": None, "top": [], "batch": None, "error": None}
        if not isinstance(outcome, Prediction):
            row["error"] = (await self.problem(outcome, task, told)).members()
            return row
        row["version"] = outcome.version
        if isinstance(outcome, Answer):
            batch = outcome.batch
            row["batch"] = {"rows": batch.rows, "tasks": batch.tasks, "ms": round(1000 * batch.seconds, 3)}
        if outcome.error is not None:
            row["error"] = Problem(422, outcome.error).members()
        elif not outcome.classes:
            row["features"] = outcome.logits.tolist()
        else:
            best = outcome.topk(top)
            row |= {"label": outcome.label, "known": outcome.known, "threshold": outcome.threshold}
            row["top"] = [{"label": label, "probability": probability} for label, probability in best]
            if probabilities:
                row["probabilities"] = outcome.probs.tolist()
        return row

    async def _problem_of(
        self, outcome: Outcome, task: str, members: dict[str, Any], told: dict[str, Problem]
    ) -> Problem:
        if isinstance(outcome, Prediction):
            return Problem(members["status"], members["detail"])
        return await self.problem(outcome, task, told)

    async def problem(self, error: Exception, task: str, told: dict[str, Problem] | None = None) -> Problem:
        """The error answer for a task: without paths of this machine, and with similar names for an unknown task.

        Args:
            told: unknown task -> its answer, within the same response. It saves repeated searches of similar names.
        """
        if isinstance(error, UnknownTaskError):
            told = {} if told is None else told
            if task not in told:
                text = str(error)
                if text.startswith("no task "):
                    text = f"no task {task.partition('@')[0]!r:.110}"
                near = await asyncio.to_thread(self.catalogue.near, task) if len(told) < MOST_NEAR else []
                told[task] = Problem(404, text, {"near": near})
            return told[task]
        if isinstance(error, PearStoreError):
            log.error("task %r: %s", task, error)
        return problem_of(error)


async def _left(request: Request) -> None:
    """Returns when the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def whole_number(request: Request, name: str, default: int, least: int, most: int) -> int:
    """A whole number of the query.

    Raises:
        Problem: it is not a whole number, or out of range.
    """
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
        raise Problem(422, f"{name}={text!r:.100}: expected a whole number from {least} to {most}")
    return int(text)


def _threshold(request: Request) -> Threshold:
    """The threshold of the query. By default each task's own."""
    text = request.query_params.get("threshold")
    try:
        return "stored" if text is None else read_threshold(text)
    except RouterError as error:
        raise Problem(422, str(error)) from None


def _judged(outcome: Outcome, threshold: Threshold) -> Outcome:
    """The result of an image, with the request's threshold."""
    if threshold == "stored" or not isinstance(outcome, Prediction):
        return outcome
    return outcome.with_threshold(threshold)


class Guard:
    """Wraps every request: adds security headers, counts requests, and answers errors that nothing else caught."""

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        paths: Mapping[object, str],
        counted: Callable[[str, str, int, float], None],
    ) -> None:
        self._app, self._service, self._paths, self._counted = app, service, paths, counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, ended, status = time.perf_counter(), None, 500

        async def send_guarded(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status, ended = message["status"], time.perf_counter()
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive, send_guarded)
        except asyncio.CancelledError:  # the server ends, and this request has reached the time limit
            if not self._service.batcher.draining:
                raise
            if ended is None:
                response = await _problem(Request(scope), DrainingError())
                await response(scope, receive, send_guarded)
        except Exception as error:
            if ended is not None:  # a part of the answer is sent: the server cuts the connection
                raise
            response = await _problem(Request(scope), error)
            await response(scope, receive, send_guarded)
        finally:
            path = self._paths.get(scope.get("endpoint"), "other")
            task = scope.get("path_params", {}).get("task", "")
            self._counted(path, task, status, (ended or time.perf_counter()) - began)


def guarded(
    endpoint: Callable[[Request], Awaitable[Response]], hosts: Hosts, tokens: Tokens, *, manage: bool = False
) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint behind a check of the Host header and of the token."""

    async def call(request: Request) -> Response:
        hosts.check(request.headers.get("host", ""))
        tokens.check(request.headers.get("authorization"), manage=manage)
        return await endpoint(request)

    return call


async def _problem(request: Request, error: Exception) -> Response:
    problem = problem_of(error)
    if problem.status == 500:
        log.error("%s %s: %r", request.method, request.url.path, error, exc_info=error)
    return error_response(problem) if is_v2(request) else problem.response()


async def _http_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = error.status_code if error.status_code in TITLES else 400
    details = {404: "no such path; /openapi.json lists all paths", 405: "this path does not take this method"}
    return await _problem(request, Problem(status, details.get(status, str(error.detail)), headers=error.headers or {}))


def _ignored(path: str, task: str, status: int, seconds: float) -> None:
    pass


def create_app(
    router: Router,
    *,
    batcher: Batcher | None = None,
    limits: RequestLimits | None = None,
    use_token: str | None = None,
    manage_token: str | None = None,
    allowed_hosts: Collection[str] | None = None,
    root: str | Path | None = None,
    allow_urls: bool = False,
    drain_s: float = 30,
    counted: Callable[[str, str, int, float], None] = _ignored,
    more_routes: Sequence[Route] = (),
) -> Starlette:
    """Makes an ASGI app that serves a router's tasks. `app.state.service` is its Service.

    If it runs by itself, it runs the backbone once at its start, and finishes waiting requests at its end. Mounted into
    another app, it runs the backbone at its first request. Then close its batcher yourself.

    Args:
        batcher: None: one with default options.
        limits: limits of a request; None: the defaults.
        use_token: bearer token that clients must send; None: no token is needed.
        manage_token: bearer token for `POST /v1/refresh`. It allows everything else, too.
        allowed_hosts: names that requests may have in their Host header, beside localhost and addresses; "*" or None:
            any. Without a token, strangers' web pages may otherwise ask a server that a browser reaches.
        root: requests may name files below this directory; None: no files.
        allow_urls: whether requests may name http and https URLs of public addresses.
        drain_s: most seconds for waiting requests when the app ends.
        counted: is called with each request's path, task, status and seconds.
        more_routes: further routes, behind the same token.
    Raises:
        RouterError: a token is empty, a host is not a name, `drain_s` is negative, or `root` is not a directory.
    """
    if "" in (use_token, manage_token) or not 0 <= drain_s < math.inf:
        raise RouterError("expected tokens that are not empty, and drain_s of at least 0")
    tokens, hosts = Tokens(use_token, manage_token), Hosts(allowed_hosts)
    limits = limits or RequestLimits()
    fetcher = Fetcher(None if root is None else Path(root), allow_urls, limits.body_bytes)
    service = Service(router, Batcher(router) if batcher is None else batcher, limits, fetcher, drain_s)
    openapi = document(
        limits, with_hosts=hosts.are_checked, with_tokens=use_token is not None or manage_token is not None
    )

    async def show_openapi(request: Request) -> Response:
        return JSONResponse(openapi)

    def use(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        return guarded(endpoint, hosts, tokens)

    routes = [
        Route("/livez", service.live),
        Route("/readyz", service.ready),
        Route("/openapi.json", show_openapi),
        *page_routes(),
        Route("/v1/server", use(service.show_server)),
        Route("/v1/tasks", use(service.list_tasks)),
        Route("/v1/tasks/{task}", use(service.show_task)),
        Route("/v1/tasks/{task}/predict", use(service.predict_task), methods=["POST"]),
        Route("/v1/predict", use(service.predict), methods=["POST"]),
        Route("/v1/refresh", guarded(service.take_up, hosts, tokens, manage=True), methods=["POST"]),
        *v2_routes(service, use),
        *(Route(route.path, use(route.endpoint), methods=list(route.methods or ["GET"])) for route in more_routes),
    ]
    paths: dict[object, str] = {route.endpoint: route.path for route in routes}
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Linger), Middleware(Guard, service=service, paths=paths, counted=counted)],
        exception_handlers={
            Problem: _problem,
            RouterError: _problem,
            PearStoreError: _problem,
            HTTPException: _http_problem,
        },
        lifespan=service.lifespan,
    )
    app.state.service = service
    return app
