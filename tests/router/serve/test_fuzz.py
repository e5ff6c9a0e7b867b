"""Bodies and requests that nobody would send: only documented answers, and always one.

PEAR_SERVE_BODIES sets how many bodies, PEAR_SERVE_SEED which ones; PEAR_SERVE_CASES how many cases schemathesis tries
for each operation.
"""

import asyncio
import base64
import json
import os
import random
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from router import Router
from router.serve.limits import RequestLimits
from tests.router.serve.conftest import PICTURES, picture
from tests.router.serve.test_app import serve
from tests.router.serve.test_serving import served

pytestmark = pytest.mark.slow

BODIES = int(os.environ.get("PEAR_SERVE_BODIES", "1000"))
CASES = os.environ.get("PEAR_SERVE_CASES", "10")
DOCUMENTED = {200, 400, 404, 413, 415, 422}
ODD: list[Any] = [None, True, -1, 0, 2**63, 10**400, 1e308, "", "x", "\ud800", "all", [], {}, [[]], {"image": {}}]


class Bodies:
    """Valid requests, and what becomes of them by chance."""

    def __init__(self, seed: int) -> None:
        self.chosen = random.Random(seed)
        encoded = base64.b64encode(PICTURES[0]).decode()
        pixels = {"name": "pixels", "datatype": "FP32", "shape": [1, 3, 48, 48]}
        binary = {"parameters": {"binary_data_size": 4 * 3 * 48 * 48}}
        self.values: list[tuple[str, Any]] = [
            ("/v1/predict", {"images": [{"image": encoded, "task": "a"}, {"image": encoded, "tasks": ["a", "b"]}]}),
            ("/v1/tasks/a/predict", {"image": encoded}),
            ("/v1/tasks/a/predict", {"images": [encoded, {"path": "x.png"}, {"url": "http://127.0.0.1/"}]}),
            (
                "/v2/models/a/infer",
                {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [encoded]}], "id": "x",
                 "outputs": [{"name": "label"}]},
            ),
            ("/v2/models/a/infer", {"inputs": [{**pixels, "data": [0.5] * (3 * 48 * 48)}]}),
        ]  # fmt: skip
        form = b'--x\r\nContent-Disposition: form-data; name="a"; filename="f"\r\n\r\n' + PICTURES[0] + b"\r\n--x--\r\n"
        file = {"name": "image", "shape": [1], "datatype": "BYTES"}
        size = {"parameters": {"binary_data_size": 4 + len(PICTURES[1])}}
        heads = [
            (json.dumps({"inputs": [{**pixels, **binary}]}).encode(), bytes(4 * 3 * 48 * 48)),
            (json.dumps({"inputs": [{**file, **size}]}).encode(), struct.pack("<I", len(PICTURES[1])) + PICTURES[1]),
        ]
        self.seeds: list[tuple[str, dict[str, str], bytes]] = [
            *(("/v1/tasks/a/predict", {"Content-Type": "image/png"}, one) for one in PICTURES[:2]),
            *(("/v1/tasks/wide/predict", {"Content-Type": "image/x"}, picture(9, kind)) for kind in KINDS),
            *(
                (url, {"Content-Type": "multipart/form-data; boundary=x"}, form)
                for url in ("/v1/predict", "/v1/tasks/b/predict")
            ),
            *((url, {"Content-Type": "application/json"}, json.dumps(value).encode()) for url, value in self.values),
            *(("/v2/models/a/infer", {"Inference-Header-Content-Length": str(len(h))}, h + tail) for h, tail in heads),
            ("/v2/models/a/infer", {"Inference-Header-Content-Length": "0"}, PICTURES[2]),
        ]

    def next(self) -> tuple[str, dict[str, str], bytes]:
        if self.chosen.random() < 0.3:
            url, value = self.chosen.choice(self.values)
            changed = self._changed(json.loads(json.dumps(value)))
            return url, {"Content-Type": "application/json"}, json.dumps(changed).encode()
        url, headers, seed = self.chosen.choice(self.seeds)
        body = bytearray(seed)
        for _ in range(self.chosen.choice((0, 1, 1, 2, 4, 16))):
            self._mutate(body)
        if self.chosen.random() < 0.05:
            headers = {name: self.chosen.choice(["", "x", "-1", "5", "image/", "a;b=c", "ä"]) for name in headers}
        if self.chosen.random() < 0.05:
            url += self.chosen.choice(["?top=0", "?top=3&top=x", "?probabilities=true", "?tasks=a,,b", "?%ff=%00"])
        return url, headers, bytes(body)

    def _mutate(self, body: bytearray) -> None:
        place = self.chosen.randrange(len(body) + 1)
        length = self.chosen.choice((1, 1, 2, 4, 30, 2000))
        match self.chosen.randrange(5):
            case 0:
                body[place : place + 1] = bytes([self.chosen.randrange(256)])
            case 1:
                del body[place : place + length]
            case 2:
                body[place:place] = self.chosen.randbytes(length)
            case 3:
                other = self.chosen.choice(self.seeds)[2]
                start = self.chosen.randrange(len(other))
                body[place:place] = other[start : start + length]
            case 4:
                body[place : place + length] = bytes([self.chosen.choice((0, 255, 0x7F))]) * min(length, 8)

    def _changed(self, value: Any) -> Any:
        """A JSON value with one of its parts replaced."""
        if isinstance(value, dict) and value and self.chosen.random() < 0.85:
            key = self.chosen.choice(list(value))
            if self.chosen.random() < 0.1:
                del value[key]
            else:
                value[key] = self._changed(value[key])
            return value
        if isinstance(value, list) and value and self.chosen.random() < 0.85:
            place = self.chosen.randrange(len(value))
            value[place] = self._changed(value[place])
            return value * self.chosen.choice((1, 1, 1, 2)) if len(value) < 100 else value
        return self.chosen.choice(ODD)


KINDS = ("JPEG", "GIF", "WEBP", "BMP", "TIFF")


@pytest.mark.filterwarnings("default")  # Pillow warns of what it then reads or refuses
def test_bodies_of_any_bytes_give_only_documented_refusals(shared: Router, capsys: pytest.CaptureFixture[str]) -> None:
    bodies = Bodies(int(os.environ.get("PEAR_SERVE_SEED", "0")))
    seen: Counter[int] = Counter()

    async def work(client: httpx.AsyncClient) -> None:
        left = iter(range(BODIES))

        async def ask() -> None:
            for _ in left:
                url, headers, body = bodies.next()
                async with asyncio.timeout(60):
                    sent = {name.encode(): value.encode("latin-1") for name, value in headers.items()}
                    response = await client.post(url, content=body, headers=sent)
                seen[response.status_code] += 1
                assert response.status_code in DOCUMENTED, (response.text, url, headers, body)
                if response.status_code == 200 and url.startswith("/v1"):
                    for row in response.json()["results"]:
                        assert row["error"] is None or row["error"]["status"] in DOCUMENTED, (row, url, headers, body)

        await asyncio.gather(*(ask() for _ in range(8)))

    run_s = 60 + BODIES / 50
    serve(shared, work, limit_s=run_s, limits=RequestLimits(body_bytes=200_000))
    assert {200, 400} <= set(seen)
    with capsys.disabled():
        print(dict(seen))


@pytest.mark.slow
def test_schemathesis_finds_nothing(filled: Path, tmp_path: Path) -> None:
    """All its checks but one: what fits the schema may still be no image, or name no task."""
    with served("--store", str(filled), "--refresh-s", "0") as process:
        command = [
            str(Path(sys.executable).with_name("schemathesis")), "run", f"http://127.0.0.1:{process.port}/openapi.json",
            "--exclude-checks", "positive_data_acceptance", "--max-examples", CASES, "--no-color", "--seed", "1",
            "--suppress-health-check", "all", "--generation-database", "none",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=1800)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
