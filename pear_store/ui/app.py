"""Serves the page, and the JSON that it asks for, over HTTP. Nothing can be changed, and only this machine may ask."""

import asyncio
import re
from collections.abc import Callable
from typing import Any, get_args

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pear_store.errors import NotFoundError, PearStoreError
from pear_store.listing import Query, SortKey
from pear_store.readable import ReadableStore
from pear_store.ui.overview import Overview, Watched
from pear_store.webpage import page_files, page_policy

HOSTS = ("127.0.0.1", "localhost")
"""The host names that a request may have. A foreign page whose DNS name points to this machine sends another one."""
MOST_ROWS = 200
HEADERS = {
    "Content-Security-Policy": page_policy(),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_NAME_PART = re.compile(r"[A-Za-z0-9._-]{0,100}")


class Guard:
    """Adds the security headers to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, send_guarded)


class Refused(Exception):
    """A request that is not understood. The text says what was expected."""


def create_app(store: ReadableStore) -> Starlette:
    """An ASGI app that shows a store."""
    watched = Watched(store)
    files = page_files("pear_store.ui")

    def answer(question: Callable[[Request], Callable[[Overview], Any]]) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            return JSONResponse(await asyncio.to_thread(watched.ask, question(request)))

        return endpoint

    async def show_page(request: Request) -> Response:
        return Response(files["index.html"].data, media_type=files["index.html"].kind)

    async def show_file(request: Request) -> Response:
        if (name := request.path_params["file"]) not in files:
            raise NotFoundError("no such file of the page")
        return Response(files[name].data, media_type=files[name].kind)

    return Starlette(
        routes=[
            Route("/", show_page),
            Route("/page/{file}", show_file),
            Route("/v1/store", answer(lambda request: lambda overview: overview.totals)),
            Route("/v1/tasks", answer(_list)),
            Route("/v1/tasks/{task}", answer(_task)),
            Route("/v1/map", answer(_map)),
        ],
        middleware=[
            Middleware(Guard),
            Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS), www_redirect=False),
        ],
        exception_handlers={Refused: _refuse, PearStoreError: _fail},
    )


def _list(request: Request) -> Callable[[Overview], Any]:
    asked = request.query_params
    text, part = asked.get("sort", "name"), asked.get("search", "").strip()
    sort: SortKey | None = next((key for key in get_args(SortKey) if key == text), None)
    if sort is None:
        raise Refused(f"sort={text[:100]!r}: expected one of {', '.join(get_args(SortKey))}")
    first, count = _number(request, "first", 0, 10**9), _number(request, "count", 25, MOST_ROWS)
    query = Query((_pattern(part),), sort=sort, reverse=asked.get("reverse") == "true")
    return lambda overview: overview.tasks(query, asked.get("backbone") or None, first, count)


def _pattern(part: str) -> str:
    """A pattern of the names that contain a text, in any case. Texts that no name can contain match nothing."""
    if not _NAME_PART.fullmatch(part):
        return "[!-.0-9A-Za-z_]*"
    return "*" + "".join(f"[{c.lower()}{c.upper()}]" if c.isalpha() else c for c in part) + "*"


def _task(request: Request) -> Callable[[Overview], Any]:
    name = request.path_params["task"]
    return lambda overview: overview.task(name)


def _map(request: Request) -> Callable[[Overview], Any]:
    digest = request.query_params.get("backbone") or None
    return lambda overview: overview.map(digest)


def _number(request: Request, name: str, default: int, most: int) -> int:
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 11 and int(text) <= most):
        raise Refused(f"{name}={text[:100]!r}: expected a whole number up to {most}")
    return int(text)


async def _refuse(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": str(error)}, 422)


async def _fail(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": str(error)}, 404 if isinstance(error, NotFoundError) else 500)
