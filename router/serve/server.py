"""One process that serves: uvicorn with our ends, signals and timers."""

import asyncio
import logging
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pear_store import PearStoreError
from router.errors import RouterError
from router.serve.app import Service

HEADER_BYTES = 64 * 1024
"""Of one request's line and headers together; what is longer is cut off."""
HEADER_S = 10.0
"""How long a client may take to send them, and to begin after it connected."""
CONNECTIONS = 4096
"""More are answered with 503 at once."""

log = logging.getLogger(__name__)


class Protocol(HttpToolsProtocol):
    """uvicorn's, with limits for clients that send headers slowly or without end."""

    _header_bytes = 0
    _reads_headers = True
    _slow: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._slow = self.loop.call_later(HEADER_S, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._header_bytes += len(data)
        if self._reads_headers and self._header_bytes > HEADER_BYTES:
            self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_time()
        self._reads_headers, self._header_bytes = True, 0
        self._slow = self.loop.call_later(HEADER_S, self.transport.close)

    def on_headers_complete(self) -> None:
        self._in_time()
        self._reads_headers = False
        super().on_headers_complete()

    def _in_time(self) -> None:
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None


class Server(uvicorn.Server):
    """Ends when it is told to, or when the device's thread ended."""

    def __init__(self, app: Starlette, drain_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                loop="uvloop",
                http=Protocol,
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=CONNECTIONS,
                timeout_graceful_shutdown=max(1, round(drain_s)),
            )
        )
        self._batcher = app.state.service.batcher

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """None: `serve_until_told` handles them. uvicorn's own would end the process by the signal, not with 0."""
        yield

    async def on_tick(self, counter: int) -> bool:
        if self._batcher.failed is not None:
            self.should_exit = True
        return await super().on_tick(counter)


async def serve_until_told(app: Starlette, listener: socket.socket, drain_s: float, refresh_s: float) -> bool:
    """Serves until SIGTERM or SIGINT, then finishes what waits. SIGHUP, and every `refresh_s` seconds: refreshes.

    Args:
        refresh_s: 0 for never.
    Returns:
        Whether all that waited was finished.

    Raises:
        RouterError: the device's thread ended.
    """
    service: Service = app.state.service
    server = Server(app, drain_s)
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    def end() -> None:
        server.force_exit = server.should_exit  # at the second time
        server.should_exit = True
        service.batcher.drain()

    def hang_up() -> None:
        task = loop.create_task(_refresh(service))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    for number, handler in ((signal.SIGTERM, end), (signal.SIGINT, end), (signal.SIGHUP, hang_up)):
        loop.add_signal_handler(number, handler)
    ticking = loop.create_task(_refresh_every(service, refresh_s)) if refresh_s else None
    try:
        await server.serve([listener])
    finally:
        for task in (*tasks, *([ticking] if ticking else [])):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
    if service.batcher.failed is not None:
        raise RouterError(f"the device's thread ended: {service.batcher.failed}")
    return service.drained and not service.batcher.busy


async def _refresh_every(service: Service, seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        await _refresh(service)


async def _refresh(service: Service) -> None:
    try:
        await service.refresh()
    except (PearStoreError, RouterError) as error:
        log.error("the store could not be refreshed, what was known is served on: %s", error)
