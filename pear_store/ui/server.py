"""The page's server: one process that listens on the loopback address only."""

import asyncio
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager

import uvicorn

from pear_store.errors import PearStoreError
from pear_store.pools import ThreadPool
from pear_store.readable import ReadableStore
from pear_store.ui.app import create_app

HOST = "127.0.0.1"


class Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Captures no signals: `serve` handles them. With uvicorn's own handlers, the exit code would not be 0."""
        yield


def listen(port: int) -> socket.socket:
    """A socket that only this machine can reach. Port 0 takes any free port.

    Raises:
        PearStoreError: the port is taken, or may not be used.
    """
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        problem = error.strerror or str(error)
        raise PearStoreError(f"--port {port}: cannot listen there: {problem}; --port 0 takes a free one") from None


def serve(store: ReadableStore, listener: socket.socket) -> None:
    """Serves until SIGINT or SIGTERM."""
    asyncio.run(_serve(store, listener))


async def _serve(store: ReadableStore, listener: socket.socket) -> None:
    config = uvicorn.Config(
        create_app(store), lifespan="off", ws="none", log_config=None, access_log=False, server_header=False,
        proxy_headers=False, limit_concurrency=64, timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = Server(config)
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPool())

    def end() -> None:
        server.force_exit = server.should_exit  # the second signal does not wait for open requests
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    await server.serve([listener])
