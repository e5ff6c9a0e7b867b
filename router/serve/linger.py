"""Keeps reading a request's body after an early answer, so that the client gets the answer.

If a connection is closed while it holds unread bytes, the system resets it, and the client may lose the answer.
"""

import asyncio
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

LINGER_S = 10.0
"""Most seconds that a client may keep sending after its answer."""


class Linger:
    """Wraps an app. The end of an answer waits until the request's body has arrived, at most LINGER_S."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        is_whole = False

        async def receive_noting() -> Message:
            nonlocal is_whole
            message = await receive()
            is_whole = is_whole or not message.get("more_body", False)
            return message

        async def send_lingering(message: Message) -> None:
            if is_whole or message["type"] != "http.response.body" or message.get("more_body", False):
                await send(message)
                return
            await send({**message, "more_body": True})
            with suppress(TimeoutError):
                async with asyncio.timeout(LINGER_S):
                    while not is_whole:
                        await receive_noting()
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        await self._app(scope, receive_noting, send_lingering)


def _has_body(scope: Scope) -> bool:
    """Whether a body will come. A client with an Expect header sends none after an early answer."""
    headers = dict(scope["headers"])
    comes = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
    return comes and b"expect" not in headers
