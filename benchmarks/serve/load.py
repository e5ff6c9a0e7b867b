"""A client that loads a server over HTTP/1.1, in a process of its own.

Reads a plan from standard input, and writes what came of it to standard output, both JSON:

    {"port": 8090, "images": FOLDER, "seconds": 10, "warm_s": 2, "server_pid": 123, "streams": {
        "flood": {"path": "/v1/tasks/TASK/predict", "tasks": ["a"], "connections": 32},
        "others": {"path": "/predict", "body": "{\"task\": \"TASK\", \"image\": \"IMAGE\"}", "tasks": ["b", "c"],
                   "rate": 20}}}

A stream with `connections` is a closed loop: each connection asks again as soon as it is answered, or 0.1 s after it
was refused; with `"abandon": true` all hang up at the end, else they wait for their answers. A stream with `rate` is
open: requests come by chance (Poisson), as many a second, whether or not earlier ones were answered; their time counts
from when they were due. Tasks are equally likely, or by `weights`; a stream may have a `port` of its own. TASK and
IMAGE (base64) in path and body are replaced; without a body the image's bytes are.
"""

import asyncio
import base64
import json
import os
import random
import sys
import time
from collections import Counter
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import click
import httptools
import uvloop

REFUSED_S = 0.1
"""After which a client asks again that was refused."""
LIMIT_S = 300.0
"""How long the answers to what was asked may take."""


class Connection(asyncio.Protocol):
    """One connection, on which one request at a time is asked."""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def ask(self, request: bytes) -> "asyncio.Future[int]":
        """The status of the answer, once all of it is there."""
        self.body = b""
        self._answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        if not self._answer.done():
            self._answer.set_result(self._parser.get_status_code())

    def connection_lost(self, error: Exception | None) -> None:
        if hasattr(self, "_answer") and not self._answer.done():
            self._answer.set_exception(error or ConnectionResetError("the server closed the connection"))

    def close(self) -> None:
        self._transport.close()


async def connect(port: int) -> Connection:
    _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    return connection


class Stream:
    """Requests of one kind, and the times of their answers."""

    def __init__(self, plan: dict[str, Any], port: int, images: list[bytes], seed: int) -> None:
        self.plan, self.port, self.images = plan, plan.get("port", port), images
        self.weights = list(accumulate(plan["weights"])) if "weights" in plan else None
        self.random = random.Random(seed)
        self.answers: list[tuple[float, float, int]] = []
        """When each was due, when it was answered, and its status."""

    def request(self) -> bytes:
        (task,) = self.random.choices(self.plan["tasks"], cum_weights=self.weights)
        image = self.random.choice(self.images)
        path = self.plan["path"].replace("TASK", task)
        kind, body = "image/jpeg", image
        if self.plan.get("body"):
            text = self.plan["body"].replace("TASK", task).replace("IMAGE", base64.b64encode(image).decode())
            kind, body = "application/json", text.encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    async def run(self, end: float) -> None:
        if "rate" in self.plan:
            await self._run_open(end)
        else:
            await asyncio.gather(*(self._run_closed(end) for _ in range(self.plan["connections"])))

    async def _ask(self, connection: Connection, due: float) -> int:
        status = await connection.ask(self.request())
        self.answers.append((due, time.perf_counter(), status))
        return status

    async def _run_closed(self, end: float) -> None:
        connection = await connect(self.port)
        with suppress(TimeoutError):
            async with asyncio.timeout(end - time.perf_counter() if self.plan.get("abandon") else None):
                while (now := time.perf_counter()) < end:
                    if await self._ask(connection, now) != 200:
                        await asyncio.sleep(REFUSED_S)
        connection.close()

    async def _run_open(self, end: float) -> None:
        idle: list[Connection] = []
        asked: set[asyncio.Task[None]] = set()
        due = time.perf_counter()

        async def ask(due: float) -> None:
            connection = idle.pop() if idle else await connect(self.port)
            await self._ask(connection, due)
            idle.append(connection)

        while (due := due + self.random.expovariate(self.plan["rate"])) < end:
            await asyncio.sleep(due - time.perf_counter())
            task = asyncio.create_task(ask(due))
            asked.add(task)
            task.add_done_callback(asked.discard)
        await asyncio.gather(*asked)
        for connection in idle:
            connection.close()

    def figures(self, begin: float, end: float) -> dict[str, Any]:
        """Of what was due from `begin` to `end`.

        Answers come a batch at a time, so counting those of a window tells little where it holds few batches. The rate
        of a closed loop is therefore its connections over the mean time (Little's law).
        """
        seconds = [done - due for due, done, status in self.answers if begin <= due <= end and status == 200]
        if "rate" in self.plan:
            rate = len(seconds) / (end - begin)
        else:
            rate = self.plan["connections"] * len(seconds) / sum(seconds) if seconds else 0.0
        return {
            "rate": rate,
            "seconds": seconds,
            "statuses": dict(Counter(str(status) for _, _, status in self.answers)),
        }


def cpu_s(root: int) -> float:
    """What a process and all its descendants have used of the processors so far."""
    ticks: dict[int, tuple[int, int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(") ")[2].split()
            except OSError:
                continue
            ticks[int(folder.name)] = (int(fields[1]), int(fields[11]) + int(fields[12]))
    family = {root}
    for _ in ticks:
        grown = family | {pid for pid, (parent, _) in ticks.items() if parent in family}
        if grown == family:
            break
        family = grown
    return sum(ticks[pid][1] for pid in family if pid in ticks) / os.sysconf("SC_CLK_TCK")


def all_cpu_s() -> float:
    """What everything on this machine has used of the processors so far."""
    fields = [int(ticks) for ticks in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")  # but idle and iowait


async def run(plan: dict[str, Any]) -> dict[str, Any]:
    images = [file.read_bytes() for file in sorted(Path(plan["images"]).glob("*.jpg"))]
    streams = {
        name: Stream(one, plan["port"], images, plan.get("seed", 0) + number)
        for number, (name, one) in enumerate(plan["streams"].items())
    }
    start = time.perf_counter()
    begin, end = start + plan["warm_s"], start + plan["warm_s"] + plan["seconds"]
    used: list[tuple[float, float, float]] = []

    def note() -> None:
        used.append((cpu_s(plan["server_pid"]), time.process_time(), all_cpu_s()))

    loop = asyncio.get_running_loop()
    for moment in (begin, end):
        loop.call_later(moment - start, note)
    async with asyncio.timeout(plan["warm_s"] + plan["seconds"] + LIMIT_S):
        await asyncio.gather(*(stream.run(end) for stream in streams.values()))
    if len(used) < 2:
        note()
    server_s, client_s, all_s = (after - before for before, after in zip(*used[:2], strict=True))
    return {
        "streams": {name: stream.figures(begin, end) for name, stream in streams.items()},
        "server_cpu_s": server_s,
        "client_cpu_s": client_s,
        "others_cpu_s": max(0.0, all_s - server_s - client_s),
    }


@click.command(help=__doc__)
def main() -> None:
    print(json.dumps(uvloop.run(run(json.load(sys.stdin)))))


if __name__ == "__main__":
    main()
