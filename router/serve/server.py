"""One process that serves: uvicorn with Pear's limits, signals and timers."""

import asyncio
import logging
import math
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pear_store.pools import ThreadPool
from router.errors import RouterError
from router.serve.app import Service

HEADER_BYTES = 64 * 1024
"""Most bytes of a request's line and headers together. A connection with more is closed."""
HEADER_S = 10.0
"""Most seconds for a client to send them, and to start after it connected."""
UNREAD_S = 10.0
"""Most seconds for a client to leave answers unread, and to keep sending a body after linger.py has stopped waiting."""
KEEP_ALIVE_S = 65
"""Most seconds that a connection may be idle. It is longer than clients and proxies keep theirs (nginx: 60 s), because
a request gets no answer if it is sent while the server closes the connection."""
CONNECTIONS = 4096
"""Most connections. Further ones get 503 at once."""

log = logging.getLogger(__name__)


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol, with limits for clients that send slowly or without end, or do not read."""

    _header_bytes = 0
    _reads_headers = True
    _in_message = False
    _slow: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._limit(HEADER_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        self._is_read()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._header_bytes += len(data)
        if self._reads_headers and self._header_bytes > HEADER_BYTES:
            self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._reads_headers, self._in_message, self._header_bytes = True, True, 0
        self._limit(HEADER_S)

    def on_headers_complete(self) -> None:
        self._in_time()
        self._reads_headers = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_time()
        self._in_message = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_message and self.cycle.response_complete and not self.transport.is_closing():
            self._limit(UNREAD_S)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._is_read()
        self._unread = self.loop.call_later(UNREAD_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._is_read()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """No further request came. If the client does not read its answers now, the connection is cut."""
        super().timeout_keep_alive_handler()
        self._is_read()
        self._unread = self.loop.call_later(UNREAD_S, self.transport.abort)

    def _limit(self, seconds: float) -> None:
        self._in_time()
        self._slow = self.loop.call_later(seconds, self.transport.abort)

    def _in_time(self) -> None:
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None

    def _is_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


class Server(uvicorn.Server):
    """A server that ends on request, or when the device's thread ended."""

    def __init__(self, app: Starlette, drain_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                loop="uvloop",
                http=Protocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=CONNECTIONS,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=math.ceil(drain_s) + 1,  # later, so that waiting requests get an error first
            )
        )
        self._batcher = app.state.service.batcher

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Captures none, because `serve_until_told` does. uvicorn would end the process by the signal, not with 0."""
        yield

    async def on_tick(self, counter: int) -> bool:
        if self._batcher.failed is not None:
            self.should_exit = True
        return await super().on_tick(counter)


async def serve_until_told(app: Starlette, listener: socket.socket, drain_s: float, refresh_s: float) -> bool:
    """Serves until SIGTERM or SIGINT, then finishes waiting requests. It refreshes on SIGHUP and every `refresh_s`.

    Args:
        drain_s: most seconds for waiting requests at the end.
        refresh_s: seconds between refreshes; 0: never.
    Returns:
        Whether all waiting requests were finished.
    Raises:
        RouterError: the device's thread ended.
    """
    service: Service = app.state.service
    server = Server(app, drain_s)
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPool(thread_name_prefix="pear-serve"))
    tasks: set[asyncio.Task[None]] = set()

    def keep(task: asyncio.Task[None]) -> None:
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def end() -> None:
        server.force_exit = server.should_exit  # a second signal forces the exit
        server.should_exit = True
        keep(loop.create_task(service.end()))

    def hang_up() -> None:
        keep(loop.create_task(service.try_refresh()))

    for number, handler in ((signal.SIGTERM, end), (signal.SIGINT, end), (signal.SIGHUP, hang_up)):
        loop.add_signal_handler(number, handler)
    ticking = loop.create_task(service.refresh_every(refresh_s)) if refresh_s else None
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
