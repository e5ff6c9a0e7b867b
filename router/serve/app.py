"""The HTTP interface: an ASGI app, which runs by itself or is mounted into another."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
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
from router.predictions import Prediction
from router.router import Router
from router.serve.batcher import Batcher
from router.serve.bodies import Asked, Held, images_of, read_body
from router.serve.catalogue import Catalogue
from router.serve.errors import DeadlineError
from router.serve.limits import RequestLimits
from router.serve.openapi import document
from router.serve.parts import Outcome
from router.serve.problems import TITLES, Problem, problem_of
from router.serve.tokens import Tokens

MOST_TOP = 1000
PAGE = 1000
"""Most tasks in one answer of a list."""
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
log = logging.getLogger(__name__)


class Service:
    """What the endpoints of one app have in common.

    Args:
        drain_s: how long what waits may take when the app ends.
    """

    def __init__(self, router: Router, batcher: Batcher, limits: RequestLimits, tokens: Tokens, drain_s: float) -> None:
        self.router, self.batcher, self.limits, self.tokens = router, batcher, limits, tokens
        self.catalogue = Catalogue(router)
        self.held = Held(limits.held_bytes)
        self.drained = True
        """Whether all that waited when the app ended was finished."""
        self._drain_s = drain_s
        self._warming: asyncio.Task[None] | None = None
        self._refreshing = asyncio.Lock()

    # ---- life ---------------------------------------------------------------------------------

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Of an app that runs by itself; one that is mounted begins with its first request."""
        self.start()
        yield
        self.drained = await self.batcher.close(self._drain_s)

    def start(self) -> "asyncio.Task[None]":
        """Begins to run the backbone once, unless that was begun."""
        if self._warming is None:
            self._warming = asyncio.get_running_loop().create_task(self._warm_up())
        return self._warming

    async def _warm_up(self) -> None:
        try:
            await self.batcher.warm_up()
        except Exception as error:
            log.error("the backbone does not run: %s", error)
            self.batcher.failed = error

    @property
    def why_not_ready(self) -> str | None:
        """Why no prediction can be made now; None if one can."""
        if self.batcher.failed is not None:
            return "the device has failed: this server is about to end"
        if self.batcher.draining:
            return "this server is shutting down"
        if self._warming is None or not self._warming.done():
            return "this server is starting: the backbone has not run yet"
        return None

    async def refresh(self) -> dict[str, int | None]:
        """Takes up what changed in the store, see `Router.refresh`.

        Raises:
            PearStoreError: it cannot be read; nothing changed.
        """
        async with self._refreshing:
            changed = await asyncio.to_thread(self.router.refresh)
            self.catalogue.forget()
        if changed:
            log.info("refreshed: %s", ", ".join(f"{name} is now {version}" for name, version in changed.items()))
        return changed

    # ---- endpoints ----------------------------------------------------------------------------

    async def live(self, request: Request) -> Response:
        if self.batcher.failed is not None:
            raise Problem(503, "the device has failed: this server is about to end")
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        self.start()
        if (reason := self.why_not_ready) is not None:
            raise Problem(503, reason, headers={"Retry-After": "1"})
        return JSONResponse({"ready": True})

    async def list_tasks(self, request: Request) -> Response:
        count = whole_number(request, "limit", 100, 1, PAGE)
        after, part = request.query_params.get("after", ""), request.query_params.get("search", "").lower()
        tasks = await asyncio.to_thread(self.catalogue.tasks)
        found = [(name, version) for name, version in tasks.items() if name > after and part in name.lower()]
        shown = [self.catalogue.summary(name, version) for name, version in found[:count]]
        following = found[count - 1][0] if len(found) > count else None
        return JSONResponse({"tasks": shown, "total": len(tasks), "next": following})

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
            raise Problem(500, "the store cannot be read; nothing changed; the server's log says why") from None
        return JSONResponse({"changed": changed})

    async def predict_task(self, request: Request) -> Response:
        """Any number of images for the task in the path."""
        return await self._predict(request, [request.path_params["task"]], is_fixed=True)

    async def predict(self, request: Request) -> Response:
        """Any number of images, each for its own tasks, or all for those that the query names."""
        named = request.query_params.get("tasks")
        return await self._predict(request, None if named is None else named.split(","), is_fixed=False)

    async def _predict(self, request: Request, tasks: list[str] | None, is_fixed: bool) -> Response:
        top = whole_number(request, "top", 5, 1, MOST_TOP)
        probabilities = request.query_params.get("probabilities", "false")
        if probabilities not in ("true", "false"):
            raise Problem(422, f"probabilities={probabilities!r:.100}: expected true or false")
        await self._must_be_ready()
        body = await read_body(request, self.limits, self.held)
        try:
            asked = await images_of(body, request.headers.get("content-type"), self.limits)
            wanted = [(one, await self._tasks_of(one, number, tasks, is_fixed)) for number, one in enumerate(asked)]
            outcomes = await self._outcomes(request, wanted)
        finally:
            self.held.give_back(len(body))
        rows = [
            (one, number, task, outcome)
            for number, ((one, names), found) in enumerate(zip(wanted, outcomes, strict=True))
            for task, outcome in zip(names, found, strict=True)
        ]
        results = [
            await self._row(one, number, task, outcome, top, probabilities == "true")
            for one, number, task, outcome in rows
        ]
        if len(rows) == 1 and isinstance(problem := results[0].get("error"), dict):
            raise await self._problem_of(rows[0][3], rows[0][2], problem)
        return JSONResponse({"results": results})

    async def _must_be_ready(self) -> None:
        if self._warming is None:  # mounted: nobody has started it
            await asyncio.shield(self.start())
        if (reason := self.why_not_ready) is not None:
            raise Problem(503, reason, headers={"Retry-After": "1"})

    async def _tasks_of(self, asked: Asked, number: int, tasks: list[str] | None, is_fixed: bool) -> list[str]:
        """The tasks that an image goes through, each once."""
        if tasks is not None and asked.tasks is not None and asked.name is None:
            raise Problem(400, f"image {number}: its tasks are named in the body and in the URL: expected one of these")
        names = tasks if tasks is not None else asked.tasks
        if names is None:
            raise Problem(
                422,
                f"image {number}: no task: say ?tasks=a,b or ?tasks=all, or name its task beside it in JSON or a form",
            )
        if not is_fixed and names == ["all"]:
            names = list(await asyncio.to_thread(self.catalogue.tasks))
            if not names:
                raise Problem(422, "there is no task for this backbone")
        names = list(dict.fromkeys(name.strip() for name in names))
        if len(names) > self.limits.tasks:
            raise Problem(413, f"{len(names)} tasks: the limit is {self.limits.tasks} for an image")
        return names

    async def _outcomes(self, request: Request, wanted: Sequence[tuple[Asked, list[str]]]) -> list[list[Outcome]]:
        """What became of all images; they are given up if the client goes away, or time is up."""
        answers = self.batcher.submit([(one.image, names) for one, names in wanted])
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
        self, asked: Asked, number: int, task: str, outcome: Outcome, top: int, probabilities: bool
    ) -> dict[str, Any]:
        row: dict[str, Any] = {"image": number, "file": asked.name, "task": task, "version": None, "label": None}
        row |= {"top": [], "error": None}
        if not isinstance(outcome, Prediction):
            row["error"] = (await self.problem(outcome, task)).members()
            return row
        row["version"] = outcome.version
        if outcome.error is not None:
            row["error"] = Problem(422, outcome.error).members()
        elif not outcome.classes:
            row["features"] = outcome.logits.tolist()
        else:
            best = outcome.topk(top)
            row["label"] = best[0][0]
            row["top"] = [{"label": label, "probability": probability} for label, probability in best]
            if probabilities:
                row["probabilities"] = outcome.probs.tolist()
        return row

    async def _problem_of(self, outcome: Outcome, task: str, members: dict[str, Any]) -> Problem:
        if isinstance(outcome, Prediction):
            return Problem(members["status"], members["detail"])
        return await self.problem(outcome, task)

    async def problem(self, error: Exception, task: str) -> Problem:
        """What a client is told of a task's error: without this machine's paths, with names that it may have meant."""
        if isinstance(error, UnknownTaskError):
            text = str(error)
            if text.startswith("no task "):
                text = f"no task {task.partition('@')[0]!r:.110}"
            return Problem(404, text, {"near": await asyncio.to_thread(self.catalogue.near, task)})
        if isinstance(error, PearStoreError):
            log.error("task %r: %s", task, error)
        return problem_of(error)


async def _left(request: Request) -> None:
    """Returns when the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def whole_number(request: Request, name: str, default: int, least: int, most: int) -> int:
    """A number of the query.

    Raises:
        Problem: it is none, or out of range.
    """
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
        raise Problem(422, f"{name}={text!r:.100}: expected a whole number from {least} to {most}")
    return int(text)


class Guard:
    """Around every request: headers that browsers obey, and the count of requests."""

    def __init__(
        self, app: ASGIApp, paths: Mapping[object, str], counted: Callable[[str, str, int, float], None]
    ) -> None:
        self._app, self._paths, self._counted = app, paths, counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive, send_guarded)
        finally:
            path = self._paths.get(scope.get("endpoint"), "other")
            task = scope.get("path_params", {}).get("task", "")
            self._counted(path, task, status, time.perf_counter() - began)


def guarded(
    endpoint: Callable[[Request], Awaitable[Response]], tokens: Tokens, *, manage: bool = False
) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that asks for a token first."""

    async def call(request: Request) -> Response:
        tokens.check(request.headers.get("authorization"), manage=manage)
        return await endpoint(request)

    return call


async def _problem(request: Request, error: Exception) -> Response:
    problem = problem_of(error)
    if problem.status == 500:
        log.error("%s %s: %r", request.method, request.url.path, error)
    return problem.response()


async def _http_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = error.status_code if error.status_code in TITLES else 400
    details = {404: "no such path; /openapi.json lists what there is", 405: "another method than this path takes"}
    return Problem(status, details.get(status, str(error.detail)), headers=error.headers or {}).response()


def _ignored(path: str, task: str, status: int, seconds: float) -> None:
    pass


def create_app(
    router: Router,
    *,
    batcher: Batcher | None = None,
    limits: RequestLimits | None = None,
    use_token: str | None = None,
    manage_token: str | None = None,
    drain_s: float = 30,
    counted: Callable[[str, str, int, float], None] = _ignored,
    more_routes: Sequence[Route] = (),
) -> Starlette:
    """An ASGI app that serves a router's tasks; `app.state.service` is its Service.

    Run by itself, it runs the backbone once when it starts, and finishes what waits when it ends. Mounted into another
    app, it does the former at its first request; close its batcher yourself.

    Args:
        batcher: made with its defaults unless given.
        limits: of one request.
        use_token: whoever calls must send it as a bearer token; None to let everybody.
        manage_token: for `POST /v1/refresh`; it may do all else, too.
        drain_s: how long what waits may take when the app ends.
        counted: is told each request's path, task, status and seconds.
        more_routes: served beside the API, behind the same token.

    Raises:
        RouterError: an empty token.
    """
    if "" in (use_token, manage_token) or not 0 <= drain_s < math.inf:
        raise RouterError("expected tokens that are not empty, and drain_s of at least 0")
    tokens = Tokens(use_token, manage_token)
    limits = limits or RequestLimits()
    service = Service(router, Batcher(router) if batcher is None else batcher, limits, tokens, drain_s)
    openapi = document(limits, with_tokens=use_token is not None or manage_token is not None)

    async def show_openapi(request: Request) -> Response:
        return JSONResponse(openapi)

    def use(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        return guarded(endpoint, tokens)

    routes = [
        Route("/livez", service.live),
        Route("/readyz", service.ready),
        Route("/openapi.json", show_openapi),
        Route("/v1/tasks", use(service.list_tasks)),
        Route("/v1/tasks/{task}", use(service.show_task)),
        Route("/v1/tasks/{task}/predict", use(service.predict_task), methods=["POST"]),
        Route("/v1/predict", use(service.predict), methods=["POST"]),
        Route("/v1/refresh", guarded(service.take_up, tokens, manage=True), methods=["POST"]),
        *(Route(route.path, use(route.endpoint), methods=list(route.methods or ["GET"])) for route in more_routes),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Guard, paths={route.endpoint: route.path for route in routes}, counted=counted)],
        exception_handlers={
            Problem: _problem,
            RouterError: _problem,
            PearStoreError: _problem,
            HTTPException: _http_problem,
            Exception: _problem,
        },
        lifespan=service.lifespan,
    )
    app.state.service = service
    return app
