"""A TCP proxy on loopback with the faults of a network: it delays, cuts and stalls.

python -m tests.pear_store.remote.proxy PORT_OF_THE_SERVER DELAY_MS
(for measurements; prints its own port, and for each line of its input the bytes that passed so far, both ways)
"""

import asyncio
import socket
import struct
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass

_CHUNK_BYTES = 64 << 10


@dataclass
class Faults:
    """What happens to each connection. Bytes are counted from its beginning; "up" is from client to server."""

    delay_up_s: float = 0.0
    delay_down_s: float = 0.0
    cut_up_bytes: int | None = None
    """After so many the connection is reset (RST) on both sides"""
    cut_down_bytes: int | None = None
    stall_up_bytes: int | None = None
    """After so many nothing more is passed on, and the connection stays open"""
    stall_down_bytes: int | None = None
    connections: int | None = None
    """So many connections are cut or stalled, and then no more; None: all"""


class Proxy:
    """Listens on `port` from :meth:`start` to :meth:`stop`; `faults` may be replaced, for new connections."""

    def __init__(self, target: int, faults: Faults | None = None) -> None:
        self.target, self.faults = target, faults or Faults()
        self.port = self.accepted = self.harmed = self.bytes_up = self.bytes_down = 0
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    def start(self) -> "Proxy":
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        ready.wait()
        return self

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def __enter__(self) -> "Proxy":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self, ready: threading.Event) -> None:
        server = self._loop.run_until_complete(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        for writer in self._writers:
            writer.transport.abort()
        self._loop.run_until_complete(asyncio.sleep(0.01))
        self._loop.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self._writers.add(writer)
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            self._reset(writer)
            return
        self._writers.add(server_writer)
        faults = self.faults
        both = (writer, server_writer)
        is_harmed = faults.connections is None or self.harmed < faults.connections
        up_cut, up_stall, down_cut, down_stall = (
            (faults.cut_up_bytes, faults.stall_up_bytes, faults.cut_down_bytes, faults.stall_down_bytes)
            if is_harmed
            else (None, None, None, None)
        )
        with suppress(asyncio.CancelledError):  # of what is open at the end
            await asyncio.gather(
                self._pass(reader, server_writer, "bytes_up", faults.delay_up_s, up_cut, up_stall, both),
                self._pass(server_reader, writer, "bytes_down", faults.delay_down_s, down_cut, down_stall, both),
            )

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counter: str, delay_s: float,
        cut: int | None, stall: int | None, both: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
    ) -> None:  # fmt: skip
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(256)
        sender = asyncio.ensure_future(self._send(waiting, writer))
        passed = 0
        try:
            while data := await reader.read(_CHUNK_BYTES):
                limit = cut if cut is not None else stall
                if limit is not None and passed + len(data) > limit:
                    self.harmed += 1
                    await waiting.put((self._loop.time() + delay_s, data[: limit - passed]))
                    await waiting.join()
                    if cut is None:
                        await asyncio.sleep(3600)
                    for one in both:
                        self._reset(one)
                    return
                passed += len(data)
                setattr(self, counter, getattr(self, counter) + len(data))
                await waiting.put((self._loop.time() + delay_s, data))
            await waiting.put((self._loop.time() + delay_s, b""))
            await sender
        except OSError:
            for one in both:
                self._reset(one)
        finally:
            sender.cancel()

    async def _send(self, waiting: "asyncio.Queue[tuple[float, bytes]]", writer: asyncio.StreamWriter) -> None:
        while True:
            due, data = await waiting.get()
            if (left := due - self._loop.time()) > 0:
                await asyncio.sleep(left)
            try:
                if not data:
                    writer.write_eof()
                    return
                writer.write(data)
                await writer.drain()
            except (OSError, RuntimeError):
                return
            finally:
                waiting.task_done()

    def _reset(self, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        if connection is not None and connection.fileno() >= 0:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()


if __name__ == "__main__":
    half_s = float(sys.argv[2]) / 2000
    with Proxy(int(sys.argv[1]), Faults(half_s, half_s)) as proxy:
        print(proxy.port, flush=True)
        for _ in sys.stdin:
            print(proxy.bytes_up + proxy.bytes_down, flush=True)
