"""A pear-serve under more load than it can serve, with clients of every bad kind, for as long as you like.

    python -m benchmarks.serve.soak --seconds 900

First the server's rate is measured. Then requests come at 120 % of it, whether or not others were answered. Most are
good. Others are cut off in the middle, given up, garbage, too large, for unknown tasks, or sent slowly. Meanwhile
versions and tasks come and go in the store, and SIGHUPs arrive. The script ends with 1 if

- a request got no answer, or one whose status is not documented for its kind,
- the server's memory at the end differs by more than 5 % from that of minute 3 (or of the first fifth),
- more file descriptors are left than before, or more threads than its pools may have, or it does not end with 0.
"""

import argparse
import asyncio
import base64
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pear_store import RawTensor, Store, Task, make_task
from router import load_backbone
from router.serve.flow import LOOKUPS

TASKS, IN_SLOTS = 40, 12
BODY_BYTES = 300_000
OVERLOAD = 1.2
POOLED = LOOKUPS + min(32, (os.cpu_count() or 1) + 4)
"""Threads that the server's pools start when they first need them: for looking up, and asyncio's own"""
WAIT_S = 60.0
"""Whoever has no answer by then counts as not answered."""
BUSY = {429, 503, 504}
"""Documented for every request of a server that has too much to do."""


def task_of(name: str, seed: int, backbone: dict[str, str]) -> Task:
    """A random task for pear_tiny."""
    chosen = np.random.default_rng(seed)

    def tensor(*shape: int) -> RawTensor:
        values = (chosen.standard_normal(shape) / 14).astype(np.float32)
        return RawTensor("F32", shape, values.tobytes())

    classes = 2 + seed % 5
    tensors = {"down": tensor(192, 4), "up": tensor(4, 192), "weight": tensor(classes, 192), "bias": tensor(classes)}
    record: dict[str, Any] = {
        "format": "pear-task/1",
        "task": name,
        "backbone": backbone,
        "activation": "identity",
        "adapters": {"a": {"down": "down", "up": "up"}},
        "positions": {"blocks.1.attn": [["a", 1.0]], "blocks.4.attn": [["a", 0.5]]},
        "head": {"weight": "weight", "bias": "bias"},
        "labels": [f"class {i}" for i in range(classes)],
        "preprocess": {
            "input_size": [3, 48 + 16 * (seed % 2), 48 + 16 * (seed % 2)],
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "squash",
        },
        "metrics": {},
        "training": {},
    }
    return make_task(record, tensors)


def pictures() -> list[bytes]:
    found = []
    for seed in range(12):
        chosen = np.random.default_rng(seed)
        pixels = chosen.integers(0, 255, (60 + 20 * seed, 80 + 10 * seed, 3), dtype=np.uint8)
        file = BytesIO()
        Image.fromarray(pixels).save(file, "JPEG" if seed % 2 else "PNG")
        found.append(file.getvalue())
    return found


class Server:
    """pear-serve in a process of its own, and what the system says of it."""

    def __init__(self, store: Path, slot_bytes: int, log: Path) -> None:
        args = [
            "--store", str(store), "--port", "0", "--device", "cpu", "--slot-bytes", str(slot_bytes), "--queue", "64",
            "--max-body-bytes", str(BODY_BYTES), "--timeout-s", "5", "--refresh-s", "7", "--drain-s", "20",
        ]  # fmt: skip
        self._log = log
        with log.open("w") as file:
            self.process = subprocess.Popen([sys.executable, "-m", "router.serve", *args], stderr=file)
        self.port = 0
        for _ in range(600):
            if (found := re.search(r"serving on http://127.0.0.1:(\d+)", self.said())) is not None:
                self.port = int(found[1])
                return
            time.sleep(0.1)
        raise SystemExit(f"the server does not start: {self.said()}")

    def said(self) -> str:
        return self._log.read_text()

    def memory_mb(self) -> dict[str, float]:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        kib = {key: int(number) for key, number in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
        return {"rss": kib["VmRSS"] / 1024, "anonymous": kib["RssAnon"] / 1024}

    def counts(self) -> dict[str, int]:
        where = Path(f"/proc/{self.process.pid}")
        return {"descriptors": len(os.listdir(where / "fd")), "threads": len(os.listdir(where / "task"))}


@dataclass
class Client:
    """Requests of all kinds, each on a connection of its own."""

    port: int
    files: list[bytes]
    names: list[str]
    seen: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Kind and what became of it -> how often."""
    wrong: list[str] = field(default_factory=list)
    chosen: random.Random = field(default_factory=lambda: random.Random(0))

    async def good(self) -> None:
        kind = self.chosen.randrange(4)
        file, task = self.chosen.choice(self.files), self.chosen.choice(self.names)
        if kind == 0:
            asked = {"images": [{"image": base64.b64encode(file).decode(), "tasks": self.chosen.sample(self.names, 3)}]}
            await self._ask("good", "/v1/predict", json.dumps(asked).encode(), "application/json", {200})
        elif kind == 1:
            more = {"Inference-Header-Content-Length": "0"}
            await self._ask("good", f"/v2/models/{task}/infer", file, "application/octet-stream", {200, 404}, more)
        else:
            await self._ask("good", f"/v1/tasks/{task}/predict", file, "image/jpeg", {200, 404})

    async def garbage(self) -> None:
        body = self.chosen.randbytes(self.chosen.randrange(1, 3000))
        kind = self.chosen.choice(["image/png", "application/json", "multipart/form-data; boundary=x", "text/plain"])
        await self._ask("garbage", f"/v1/tasks/{self.chosen.choice(self.names)}/predict", body, kind, {400, 404, 415})

    async def unknown(self) -> None:
        file = self.chosen.choice(self.files)
        await self._ask("unknown", f"/v1/tasks/none{self.chosen.random()}/predict", file, "image/png", {404})

    async def too_large(self) -> None:
        await self._ask("too large", "/v1/predict?tasks=all", bytes(BODY_BYTES + 1), "image/png", {413}, sent=10_000)

    async def gone_in_the_middle(self) -> None:
        await self._leave("gone in the middle", sent=0.5, after_s=0)

    async def given_up(self) -> None:
        await self._leave("given up", sent=1, after_s=self.chosen.random() * 0.1)

    async def slow(self) -> None:
        """A body that comes in pieces, but comes."""
        file = min(self.files, key=len)
        await self._ask(
            "slow", f"/v1/tasks/{self.chosen.choice(self.names)}/predict", file, "image/png", {200, 404}, pieces=8
        )

    async def refreshed(self) -> None:
        await self._ask("refresh", "/v1/refresh", b"", "application/json", {200})

    async def metrics(self) -> None:
        await self._ask("metrics", "/metrics", b"", "", {200}, method="GET")

    async def _leave(self, kind: str, sent: float, after_s: float) -> None:
        file = self.chosen.choice(self.files)
        head = self._head("POST", f"/v1/tasks/{self.chosen.choice(self.names)}/predict", len(file), "image/png", {})
        reader, writer = await self._connect(kind)
        if writer is None or reader is None:
            return
        writer.write(head + file[: int(sent * len(file))])
        await asyncio.sleep(after_s)
        writer.transport.abort()
        self.seen[kind, "left"] += 1

    async def _connect(self, kind: str) -> tuple[asyncio.StreamReader | None, asyncio.StreamWriter | None]:
        try:
            async with asyncio.timeout(WAIT_S):
                return await asyncio.open_connection("127.0.0.1", self.port)
        except (OSError, TimeoutError) as error:
            self.seen[kind, "not connected"] += 1
            self.wrong.append(f"{kind}: not connected: {error!r}")
            return None, None

    def _head(self, method: str, url: str, length: int, kind: str, more: dict[str, str]) -> bytes:
        headers = {"Host": "x", "Content-Length": str(length), "Content-Type": kind, "Connection": "close", **more}
        lines = [f"{method} {url} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode()

    async def _ask(
        self,
        kind: str,
        url: str,
        body: bytes,
        content_type: str,
        expected: set[int],
        more: dict[str, str] | None = None,
        *,
        method: str = "POST",
        sent: int | None = None,
        pieces: int = 1,
    ) -> None:
        reader, writer = await self._connect(kind)
        if reader is None or writer is None:
            return
        began = time.perf_counter()
        try:
            async with asyncio.timeout(WAIT_S):
                writer.write(self._head(method, url, len(body), content_type, more or {}))
                size = -(-len(body) // pieces) or 1
                for start in range(0, len(body) if sent is None else sent, size):
                    writer.write(body[start : start + size][:sent])
                    await writer.drain()
                    await asyncio.sleep(0.25 if pieces > 1 else 0)
                answer = await reader.read()
        except (OSError, TimeoutError) as error:
            answer = b""
            self.wrong.append(f"{kind} {url}: no answer after {time.perf_counter() - began:.1f} s: {error!r}")
        finally:
            writer.transport.abort()
        status = int(answer[9:12]) if re.match(rb"HTTP/1.1 \d{3} ", answer) else 0
        self.seen[kind, str(status or "no answer")] += 1
        if status not in expected | BUSY and len(self.wrong) < 1000:
            self.wrong.append(f"{kind} {url}: {status}: {answer[-300:]!r}")


async def change_store(server: Server, store: Store, backbone: dict[str, str], names: list[str]) -> None:
    """Versions come twice a second; tasks come and go."""
    number = 1000
    while True:
        number += 1
        await asyncio.to_thread(store.add, task_of(random.choice(names), number, backbone))
        if number % 5 == 0:
            await asyncio.to_thread(store.add, task_of(f"temporary{number % 3}", number, backbone))
        if number % 5 == 2:
            for version in [one for one in store.tasks() if one.task.startswith("temporary")]:
                await asyncio.to_thread(store.remove, version.task)
        if number % 3 == 0:
            server.process.send_signal(signal.SIGHUP)
        await asyncio.sleep(0.5)


async def rate_of(client: Client, seconds: float) -> float:
    """Good requests a second with 32 clients that wait for their answers."""
    end = time.perf_counter() + seconds

    async def one() -> None:
        while time.perf_counter() < end:
            await client.good()

    await asyncio.gather(*(one() for _ in range(32)))
    return sum(client.seen.values()) / seconds


async def soak(server: Server, store: Store, backbone: dict[str, str], seconds: float) -> dict[str, Any]:
    client = Client(server.port, pictures(), [f"task{i}" for i in range(TASKS)] + [f"temporary{i}" for i in range(3)])
    rate = await rate_of(client, min(10, seconds / 4))
    await asyncio.sleep(1)
    before = server.counts()
    most = {**before, "threads": before["threads"] + POOLED}
    kinds: list[tuple[int, Callable[[], Coroutine[Any, Any, None]]]] = [
        (800, client.good), (40, client.gone_in_the_middle), (40, client.given_up), (40, client.garbage),
        (30, client.too_large), (20, client.unknown), (20, client.slow), (5, client.metrics), (5, client.refreshed),
    ]  # fmt: skip
    weights = [weight for weight, _ in kinds]
    changing = asyncio.create_task(change_store(server, store, backbone, client.names[:TASKS]))
    began, sent = time.perf_counter(), 0
    requests: set[asyncio.Task[None]] = set()
    samples: list[dict[str, float]] = []
    while (now := time.perf_counter() - began) < seconds:
        while sent < now * rate * OVERLOAD:
            (kind,) = client.chosen.choices([kind for _, kind in kinds], weights)
            request = asyncio.create_task(kind())
            requests.add(request)
            request.add_done_callback(requests.discard)
            sent += 1
        if now >= len(samples):
            samples.append({"second": round(now, 1), **server.memory_mb(), **server.counts(), "open": len(requests)})
        await asyncio.sleep(0.01)
    changing.cancel()
    await asyncio.gather(*requests)
    for _ in range(60):  # idle connections end after some seconds
        await asyncio.sleep(0.5)
        after = server.counts()
        if all(after[name] <= most[name] for name in after):
            break
    settled = samples[min(len(samples) - 1, 180, int(seconds / 5))]
    last = samples[-1]
    grown = {name: last[name] / settled[name] - 1 for name in ("rss", "anonymous")}
    faults = list(dict.fromkeys(client.wrong))[:20]
    faults += [f"{name}: {before[name]} before, {after[name]} after" for name in after if after[name] > most[name]]
    if abs(grown["rss"]) > 0.05:
        faults.append(f"memory: {settled['rss']:.1f} MB, then {last['rss']:.1f}")
    return {
        "seconds": seconds,
        "good_requests_a_second": round(rate, 1),
        "sent": sent,
        "seen": {f"{kind}: {status}": count for (kind, status), count in sorted(client.seen.items())},
        "unanswered": sum(count for (_, status), count in client.seen.items() if status.startswith("no")),
        "versions_added": store.resolve("task0").version,
        "settled": settled,
        "end": last,
        "grown": {name: round(value, 4) for name, value in grown.items()},
        "before": before,
        "after": after,
        "samples": samples[:: max(1, len(samples) // 30)],
        "faults": faults,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = load_backbone("pear_tiny")
    backbone = {"model": model.name, "digest": model.digest}
    with tempfile.TemporaryDirectory() as folder, Store.create(Path(folder) / "s") as store:
        for number in range(TASKS):
            store.add(task_of(f"task{number}", number, backbone))
        server = Server(store.path, IN_SLOTS * store.resolve("task0").size_bytes, Path(folder) / "log")
        try:
            report = asyncio.run(soak(server, store, backbone, args.seconds))
            server.process.send_signal(signal.SIGTERM)
            report["exit_code"] = server.process.wait(60)
        finally:
            server.process.kill()
            server.process.wait()
        if report["exit_code"]:
            report["faults"].append(f"it ended with {report['exit_code']}")
        if "Traceback" in (said := server.said()):
            report["faults"].append(said[said.index("Traceback") :][:2000])
    text = json.dumps(report, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")
    sys.exit(1 if report["faults"] else 0)


if __name__ == "__main__":
    main()
