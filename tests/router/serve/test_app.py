"""The HTTP interface: what is answered, what is refused and how, who may do what."""

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from starlette.applications import Starlette
from starlette.routing import Mount, Route

from pear_store import Store, Task, make_task
from pear_store.errors import PlaceError
from router import Backbone, Prediction, Router, RouterError
from router.serve.app import Service, create_app
from router.serve.batcher import Batcher
from router.serve.limits import RequestLimits
from router.serve.problems import TITLES, problem_of
from tests.router.serve.conftest import PICTURES, HeldRouter, picture, run, until

BASE64 = [base64.b64encode(one).decode() for one in PICTURES]
RAW = {"Content-Type": "image/png"}


@asynccontextmanager
async def client_of(app: Starlette, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an app that has started."""
    service: Service = app.state.service
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with service.lifespan(app), httpx.AsyncClient(transport=transport, base_url="http://t", **options) as client:
        await service.start()
        yield client


def app_of(client: httpx.AsyncClient) -> Starlette:
    transport = client._transport
    assert isinstance(transport, httpx.ASGITransport) and isinstance(transport.app, Starlette)
    return transport.app


def service_of(client: httpx.AsyncClient) -> Service:
    service: Service = app_of(client).state.service
    return service


def serve(
    router: Router, work: Callable[[httpx.AsyncClient], Awaitable[None]], *, limit_s: float = 60, **options: Any
) -> None:
    async def started() -> None:
        async with client_of(create_app(router, **options)) as client:
            await work(client)

    run(started(), limit_s)


def results(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["results"]
    return found


def assert_row(row: dict[str, Any], expected: Prediction, top: int = 5) -> None:
    assert (row["task"], row["version"], row["label"], row["error"]) == (
        expected.task, expected.version, expected.label, None,
    )  # fmt: skip
    assert [one["label"] for one in row["top"]] == [label for label, _ in expected.topk(top)]
    found = torch.tensor([one["probability"] for one in row["top"]])
    torch.testing.assert_close(found, torch.tensor([p for _, p in expected.topk(top)]), rtol=1e-5, atol=1e-5)


def assert_problem(response: httpx.Response, status: int, detail: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    found: dict[str, Any] = response.json()
    assert (found["type"], found["title"], found["status"]) == ("about:blank", TITLES[status], status)
    assert re.search(detail, found["detail"]), found["detail"]
    assert "\n" not in found["detail"]
    return found


def test_every_form_of_a_request(shared: Router) -> None:
    alone = {task: shared.run(PICTURES[0], task)[0] for task in ("a", "b", "a@1", "wide", "features")}
    other = shared.run(PICTURES[1], "b")[0]

    async def work(client: httpx.AsyncClient) -> None:
        url = "/v1/tasks/a/predict"
        for content_type in ("image/png", "image/whatever", "application/octet-stream"):
            (row,) = results(await client.post(url, content=PICTURES[0], headers={"Content-Type": content_type}))
            assert_row(row, alone["a"])
        (row,) = results(await client.post("/v1/tasks/a@1/predict?top=2", content=PICTURES[0], headers=RAW))
        assert_row(row, alone["a@1"], 2)
        for body in ({"image": BASE64[0]}, {"images": [BASE64[0]]}, {"images": [{"image": BASE64[0]}]},
                     {"image": f"data:image/png;base64,{BASE64[0]}"}):  # fmt: skip
            (row,) = results(await client.post(url, json=body))
            assert_row(row, alone["a"])
        files = [("x", ("one.png", PICTURES[0])), ("y", ("two.png", PICTURES[0]))]
        rows = results(await client.post(url, files=files, data={"note": "not read"}))
        assert [row["file"] for row in rows] == ["one.png", "two.png"]
        for row in rows:
            assert_row(row, alone["a"])
        # each image with its own task
        rows = results(await client.post("/v1/predict", files={"a": ("1", PICTURES[0]), "b": ("2", PICTURES[1])}))
        assert_row(rows[0], alone["a"])
        assert_row(rows[1], other)
        asked = [{"image": BASE64[0], "task": "wide"}, {"image": BASE64[0], "tasks": ["a", "b"]}]
        rows = results(await client.post("/v1/predict", json={"images": asked}))
        assert [row["image"] for row in rows] == [0, 1, 1]
        for row, task in zip(rows, ("wide", "a", "b"), strict=True):
            assert_row(row, alone[task])
        # one image through many
        rows = results(await client.post("/v1/predict?tasks=a,b,%20a", content=PICTURES[0], headers=RAW))
        assert [row["task"] for row in rows] == ["a", "b"]
        rows = results(await client.post("/v1/predict?tasks=b,c&tasks=a", content=PICTURES[0], headers=RAW))
        assert [row["task"] for row in rows] == ["b", "c", "a"]
        rows = results(await client.post("/v1/predict?tasks=all", content=PICTURES[0], headers=RAW))
        assert [row["task"] for row in rows] == ["a", "b", "c", "d", "features", "wide"]
        assert rows[4]["label"] is None
        torch.testing.assert_close(torch.tensor(rows[4]["features"]), alone["features"].logits, rtol=1e-5, atol=1e-5)
        # all probabilities, in the labels' order
        (row,) = results(await client.post(f"{url}?probabilities=true", content=PICTURES[0], headers=RAW))
        torch.testing.assert_close(torch.tensor(row["probabilities"]), alone["a"].probs, rtol=1e-5, atol=1e-5)

    serve(shared, work)


NAMES = ("a", "mild", "strict", "features")


def test_an_answer_below_its_task_s_threshold_is_unknown(judging: Router) -> None:
    expected = {name: judging.run(PICTURES[0], name)[0] for name in NAMES}
    assert [expected[name].known for name in NAMES] == [True, True, False, None]

    async def ask(client: httpx.AsyncClient, query: str = "") -> list[dict[str, Any]]:
        asked = [{"image": BASE64[0], "task": name} for name in NAMES]
        return results(await client.post(f"/v1/predict{query}", json={"images": asked}))

    async def work(client: httpx.AsyncClient) -> None:
        rows = await ask(client)
        for name, row in zip(NAMES, rows, strict=True):
            assert_row(row, expected[name])
            assert (row["known"], row["threshold"]) == (expected[name].known, expected[name].threshold)
        assert rows[2]["label"] is None and len(rows[2]["top"]) == 3, "the likeliest are told all the same"
        # what a request asks for is its own, whatever batch it shares
        lax, hard = await asyncio.gather(ask(client, "?threshold=none"), ask(client, "?threshold=1"))
        assert [row["known"] for row in lax] == [True, True, True, None]
        assert [row["known"] for row in hard] == [False, False, False, None]
        assert [row["threshold"] for row in lax + hard] == [None] * 4 + [1, 1, 1, None]
        assert [row["label"] for row in hard] == [None] * 4
        url = "/v1/tasks/strict/predict?probabilities=true&threshold="
        (row,) = results(await client.post(f"{url}0.0", content=PICTURES[0], headers=RAW))
        assert row["known"] is True and row["label"] == row["top"][0]["label"] and len(row["probabilities"]) == 3
        for bad in ("", "-0.1", "1.1", "nan", "inf", "None", "stored"):
            answer = await client.post(f"{url}{bad}", content=PICTURES[0], headers=RAW)
            assert_problem(answer, 422, "^threshold '.*': expected a number from 0 to 1, or none$")
        told = [(await client.get(f"/v1/tasks/{name}")).json()["threshold"] for name in NAMES]
        assert told == [expected[name].threshold for name in NAMES]

    serve(judging, work)


def test_one_bad_image_of_many_costs_only_its_row(shared: Router) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        asked = [
            {"image": BASE64[0], "task": "a"},
            {"image": base64.b64encode(b"no image").decode(), "task": "a"},
            {"image": BASE64[0], "task": "zebra"},
            {"image": BASE64[0], "task": "foreign"},
            {"image": BASE64[1], "task": "b"},
        ]
        rows = results(await client.post("/v1/predict", json={"images": asked}))
        assert_row(rows[0], shared.run(PICTURES[0], "a")[0])
        assert_row(rows[4], shared.run(PICTURES[1], "b")[0])
        assert [row["error"] and row["error"]["status"] for row in rows] == [None, 400, 404, 422, None]
        assert "not an image" in rows[1]["error"]["detail"]
        assert all(row["label"] is None for row in rows[1:4])

    serve(shared, work)


@pytest.mark.parametrize(
    ("url", "content_type", "body", "status", "detail"),
    [
        ("/v1/tasks/a/predict", "image/png", b"GIF nonsense", 400, "not an image"),
        ("/v1/tasks/a/predict", "image/png", PICTURES[0][:300], 400, "cannot be read"),
        ("/v1/tasks/a/predict", "image/png", b"", 400, "expected a file's bytes"),
        ("/v1/tasks/zebra/predict", "image/png", PICTURES[0], 404, "^no task 'zebra'$"),
        ("/v1/tasks/a@7/predict", "image/png", PICTURES[0], 404, "no version 7"),
        ("/v1/tasks/a@prod/predict", "image/png", PICTURES[0], 404, "no tag 'prod'"),
        ("/v1/tasks/..%00/predict", "image/png", PICTURES[0], 404, "is no task or version"),
        ("/v1/tasks/foreign/predict", "image/png", PICTURES[0], 422, "vit_huge"),
        ("/v1/tasks/a/predict", "text/plain", PICTURES[0], 415, "text/plain"),
        ("/v1/tasks/a/predict", "application/x-www-form-urlencoded", PICTURES[0], 415, "with curl"),
        ("/v1/tasks/a/predict?top=0", "image/png", PICTURES[0], 422, "top='0': expected a whole number from 1 to 1000"),
        ("/v1/tasks/a/predict?top=x", "image/png", PICTURES[0], 422, "top='x'"),
        ("/v1/tasks/a/predict?probabilities=1", "image/png", PICTURES[0], 422, "expected true or false"),
        ("/v1/tasks/a/predict", "application/json", b"{", 400, "is not JSON"),
        ("/v1/tasks/a/predict", "application/json", b"[" * 100_000, 400, "is not JSON"),
        ("/v1/tasks/a/predict", "application/json", b"\xff\xfe\x00", 400, "is not JSON"),
        ("/v1/tasks/a/predict", "application/json", b"[1]", 400, 'either "image" or "images"'),
        ("/v1/tasks/a/predict", "application/json", b'{"images": 3}', 400, "expected a list"),
        ("/v1/tasks/a/predict", "application/json", b'{"images": []}', 400, "expected at least one image"),
        ("/v1/tasks/a/predict", "application/json", b'{"images": [3]}', 400, "image 0: expected base64"),
        ("/v1/tasks/a/predict", "application/json", b'{"image": "http://x/a.png"}', 400, "expected base64"),
        ("/v1/tasks/a/predict", "application/json", b'{"image": "/etc/passwd"}', 400, "not an image|base64"),
        ("/v1/tasks/a/predict", "application/json", b'{"image": "file:///a.png"}', 400, "expected base64"),
        ("/v1/tasks/a/predict", "application/json", b'{"image": "AA==", "task": "b"}', 400, "in the body or in"),
        ("/v1/predict", "application/json", b'{"image": "AAAA", "task": "b", "tasks": ["a"]}', 400, 'either "task" or'),
        ("/v1/predict", "application/json", b'{"image": "AAAA", "tasks": []}', 400, "at least one"),
        ("/v1/predict", "application/json", b'{"image": "AAAA", "task": [[]]}', 400, "expected names"),
        ("/v1/predict", "image/png", PICTURES[0], 422, "no task: give"),
        ("/v1/predict?tasks=", "image/png", PICTURES[0], 404, "is no task or version"),
        ("/v1/predict", "multipart/form-data", PICTURES[0], 400, "boundary"),
        ("/v1/predict", "multipart/form-data; boundary=x", b"nothing", 400, "is not a form"),
        ("/v1/predict", "multipart/form-data; boundary=x", b"--x\r\n", 400, "is not a form"),
        ("/v1/predict", "multipart/form-data; boundary=x", b"--x\r\n\r\n1\r\n--x--\r\n", 400, "expected at least one"),
        ("/v3/nowhere", "image/png", b"", 404, "no such path"),
        ("/v1/tasks", "image/png", b"", 405, "does not take this method"),
    ],
)  # fmt: skip
def test_what_is_refused(shared: Router, url: str, content_type: str, body: bytes, status: int, detail: str) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        assert_problem(await client.post(url, content=body, headers={"Content-Type": content_type}), status, detail)

    serve(shared, work)


def test_no_path_or_url_of_a_request_is_opened(shared: Router, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret.png").write_bytes(PICTURES[0])
    opened: list[object] = []
    monkeypatch.setattr("router.pictures.open_source", lambda *args: opened.append(args))
    path = str(tmp_path / "secret.png")

    async def work(client: httpx.AsyncClient) -> None:
        for text in (path, f"file://{path}", "http://127.0.0.1/a.png", base64.b64encode(path.encode()).decode()):
            assert_problem(await client.post("/v1/tasks/a/predict", json={"image": text}), 400, "")
            assert_problem(await client.post("/v1/tasks/a/predict", content=text.encode(), headers=RAW), 400, "")
        files = {"a": (path, b"x")}
        assert_problem(await client.post("/v1/predict", files=files), 400, "not an image")

    serve(shared, work)
    assert not opened


def test_limits_of_a_request(backbone: Backbone, filled: Path) -> None:
    limits = RequestLimits(body_bytes=20_000, images=2, tasks=2)
    with Router(backbone, filled, max_pixels=2500) as router:

        async def work(client: httpx.AsyncClient) -> None:
            url = "/v1/tasks/a/predict"

            async def chunks() -> AsyncIterator[bytes]:
                for _ in range(30):
                    yield bytes(1000)

            assert_problem(await client.post(url, content=bytes(20_001), headers=RAW), 413, "20000 bytes")
            assert_problem(await client.post(url, content=chunks(), headers=RAW), 413, "20000 bytes")
            big = picture(0, "JPEG", 60)
            assert_problem(await client.post(url, content=big, headers=RAW), 413, "70 x 60 pixels: the limit is 2500")
            small = base64.b64encode(b"x").decode()
            assert_problem(await client.post(url, json={"images": [small] * 3}), 413, "limit is 2 in a request")
            files = [("a", (str(i), b"x")) for i in range(3)]
            assert_problem(await client.post(url, files=files), 413, "limit is 2 in a request")
            fields = {f"f{i}": "x" for i in range(30)}
            many = {"a": ("1", b"x")}
            assert_problem(await client.post(url, files=many, data=fields), 413, "too many parts")
            three = await client.post("/v1/predict?tasks=a,b,c", content=PICTURES[0][:100], headers=RAW)
            assert_problem(three, 413, "3 tasks: the limit is 2")
            every = await client.post("/v1/predict?tasks=all", content=PICTURES[0][:100], headers=RAW)
            assert_problem(every, 413, "6 tasks: the limit is 2")

        serve(router, work, limits=limits)
    with pytest.raises(RouterError, match="images 0: expected more than 0"):
        RequestLimits(images=0)


def test_bodies_that_are_held_are_bounded_and_slow_ones_end(held: HeldRouter) -> None:
    limits = RequestLimits(held_bytes=30_000, body_timeout_s=0.2)
    held.go.set()

    async def work(client: httpx.AsyncClient) -> None:
        go = asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield bytes(20_000)
            await go.wait()

        waiting = asyncio.create_task(client.post("/v1/tasks/a/predict", content=slow(), headers=RAW))
        service = service_of(client)
        await until(lambda: service.held.size_bytes == 20_000)
        refused = await client.post("/v1/tasks/a/predict", content=bytes(10_001), headers=RAW)
        assert_problem(refused, 429, "fill the memory")
        assert refused.headers["Retry-After"] == "1"
        assert_problem(await waiting, 408, "did not arrive within 0.2 s")
        results(await client.post("/v1/tasks/a/predict", content=PICTURES[0], headers=RAW))
        assert service.held.size_bytes == 0

    serve(held, work, limits=limits)


def test_a_full_queue_says_when_to_come_back(held: HeldRouter) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        batcher = service_of(client).batcher
        running = asyncio.create_task(client.post("/v1/tasks/a/predict", content=PICTURES[0], headers=RAW))
        await until(lambda: batcher._flow.running)
        waiting = asyncio.create_task(client.post("/v1/tasks/a/predict", content=PICTURES[0], headers=RAW))
        await until(lambda: batcher.waiting == 1)
        full = await client.post("/v1/tasks/b/predict", content=PICTURES[0], headers=RAW)
        assert_problem(full, 429, "images that wait: 1, the limit is 1")
        assert int(full.headers["Retry-After"]) >= 1
        held.go.set()
        for response in await asyncio.gather(running, waiting):
            results(response)

    serve(held, work, batcher=Batcher(held, queue=1))


def test_a_request_whose_time_is_up_is_told_so_and_given_up(held: HeldRouter) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        batcher = service_of(client).batcher
        late = await client.post("/v1/tasks/a/predict", content=PICTURES[0], headers=RAW)
        assert_problem(late, 504, "no answer within 0.05 s")
        await until(lambda: not batcher.waiting)
        held.go.set()

    serve(held, work, limits=RequestLimits(timeout_s=0.05))


def test_a_client_that_goes_away_gives_its_images_up(held: HeldRouter) -> None:
    async def work() -> None:
        app = create_app(held, limits=RequestLimits(timeout_s=3600))
        service: Service = app.state.service
        async with service.lifespan(app):
            await service.start()
            gone = asyncio.Event()
            told = False

            async def receive() -> dict[str, Any]:
                nonlocal told
                if told:
                    await gone.wait()
                    return {"type": "http.disconnect"}
                told = True
                return {"type": "http.request", "body": PICTURES[0], "more_body": False}

            async def send(message: Any) -> None:
                pass

            running = asyncio.create_task(service.batcher.predict(PICTURES[0], "b"))
            await until(lambda: service.batcher._flow.running)
            scope = {"type": "http", "method": "POST", "path": "/v1/tasks/a/predict", "query_string": b"",
                     "headers": [(b"content-type", b"image/png")], "root_path": ""}  # fmt: skip
            request = asyncio.create_task(app(scope, receive, send))
            await until(lambda: service.batcher.waiting == 1)
            gone.set()
            await asyncio.wait_for(asyncio.shield(request), 20)
            await until(lambda: service.batcher.waiting == 0)
            held.go.set()
            await running

    run(work())
    assert held.ran == [["b"]]


def test_tasks_are_listed_and_described(router: Router, filled: Path, task_maker: Callable[..., Task]) -> None:
    router.add(task_maker("mine", seed=7))

    async def work(client: httpx.AsyncClient) -> None:
        page = (await client.get("/v1/tasks?limit=3")).json()
        assert [one["name"] for one in page["tasks"]] == ["a", "b", "c"]
        assert (page["total"], page["matching"], page["next"]) == (7, 7, "c")
        rest = (await client.get("/v1/tasks?limit=1000&after=c")).json()
        assert [one["name"] for one in rest["tasks"]] == ["d", "features", "mine", "wide"]
        assert rest["next"] is None
        found = (await client.get("/v1/tasks?search=EAT")).json()
        assert [one["name"] for one in found["tasks"]] == ["features"]
        assert (found["total"], found["matching"], found["next"]) == (7, 1, None)
        assert_problem(await client.get("/v1/tasks?limit=0"), 422, "limit='0'")
        task = (await client.get("/v1/tasks/b@1")).json()
        assert (task["name"], task["version"], task["labels"]) == ("b", 1, ["b-0", "b-1", "b-2", "b-3"])
        assert task["preprocess"]["input_size"] == [3, 48, 48]
        assert task["metrics"] == {"val_top1": 0.5}
        assert router.store is not None
        assert task["size_bytes"] == router.store.resolve("b").size_bytes
        assert (task["shared_bytes"], task["classes"]) == (0, 4)
        assert task["loaded"] is False
        await client.post("/v1/tasks/b/predict", content=PICTURES[0], headers=RAW)
        assert (await client.get("/v1/tasks/b@1")).json()["loaded"] is True
        assert (await client.get("/v1/tasks/mine")).json()["version"] is None
        assert_problem(await client.get("/v1/tasks/foreign"), 422, "vit_huge")

    serve(router, work)


def test_what_tasks_share_is_counted_as_a_comparison_counts_it(
    router: Router, filled: Path, task_maker: Callable[..., Task]
) -> None:
    made = task_maker("half", seed=0, classes=3)
    other = task_maker("half", seed=60, classes=3)
    mixed = {name: (made if "down" in name else other).tensors[name] for name in made.tensors}
    with Store(filled) as store:
        store.add(make_task(made.record, mixed))
        store.add(task_maker("b", seed=61))
        common = store.diff("half", "a").shared_bytes

    async def work(client: httpx.AsyncClient) -> None:
        async def shared() -> dict[str, int]:
            tasks = (await client.get("/v1/tasks?limit=1000")).json()["tasks"]
            return {task["name"]: task["shared_bytes"] for task in tasks}

        found = await shared()
        assert 0 < common == found["half"] == found["a"]
        assert found["c"] == 0
        assert (await client.get("/v1/tasks/half")).json()["shared_bytes"] == common
        assert (await client.get("/v1/tasks/b@1")).json()["shared_bytes"] is None  # it is not served by that name
        with Store(filled) as store:
            store.remove("half")
        await client.post("/v1/refresh")
        assert (await shared())["a"] == 0

    serve(router, work)


def test_an_answer_says_which_batch_it_was_in(held: HeldRouter) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        batcher = service_of(client).batcher
        ask = partial(client.post, content=PICTURES[0], headers=RAW)
        first = asyncio.create_task(ask("/v1/tasks/c/predict"))
        await until(lambda: batcher.busy)
        later = [asyncio.create_task(ask(url)) for url in ("/v1/predict?tasks=a,b", "/v1/tasks/a/predict")]
        await until(lambda: len(batcher._flow.ready) == 2)
        held.go.set()
        (alone,) = results(await first)
        rows = [row for one in later for row in results(await one)]
        assert (alone["batch"]["rows"], alone["batch"]["tasks"]) == (1, 1)
        assert len(rows) == 3
        for row in rows:
            assert (row["batch"]["rows"], row["batch"]["tasks"]) == (3, 2)
            assert row["batch"]["ms"] > 0
        bad = results(await client.post("/v1/predict?tasks=a,zebra", content=PICTURES[0], headers=RAW))[1]
        assert bad["batch"] is None

    serve(held, work)


def test_the_page_and_its_files_need_no_token_and_nothing_from_elsewhere(shared: Router) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        page = await client.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        policy = page.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "require-trusted-types-for 'script'" in policy
        links = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
        assert all(re.fullmatch(r"page/\w+\.(css|js|svg)", link) for link in links), links
        assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?! type=\"module\" src)", page.text)
        for link in links:
            file = await client.get("/" + link)
            assert file.status_code == 200
            assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|innerHTML|outerHTML|\beval\b", file.text), link
            asked = {f"page/{name}" for name in re.findall(r' from "./([^"]+)"', file.text)}
            links += asked - set(links)
        assert "page/elements.js" in links
        for name in ("zebra.js", "..%2Ffront.py", "__init__.py", "%2e%2e"):
            assert (await client.get(f"/page/{name}")).status_code == 404
        assert_problem(await client.get("/v1/server"), 401, "TOKEN")
        server = (await client.get("/v1/server", headers={"Authorization": "Bearer x"})).json()
        assert server["backbone"]["model"] == "pear_tiny"
        assert server["limits"]["tasks"] == 256

    serve(shared, work, use_token="x")


def test_an_error_of_our_own_is_answered_counted_and_logged_like_others(
    router: Router, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    counted: list[tuple[str, int]] = []

    async def work(client: httpx.AsyncClient) -> None:
        def fail(*_: Any) -> None:
            raise ValueError("a secret")

        monkeypatch.setattr(service_of(client).catalogue, "page", fail)
        answer = await client.get("/v1/tasks")
        assert_problem(answer, 500, "")
        assert "secret" not in answer.text
        assert answer.headers["x-content-type-options"] == "nosniff"

    serve(router, work, counted=lambda path, task, status, seconds: counted.append((path, status)))
    assert counted == [("/v1/tasks", 500)]
    assert "a secret" in caplog.text and "Traceback" in caplog.text


def test_near_names_are_sought_for_few_unknown_tasks_of_a_request(
    router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each takes milliseconds."""

    async def work(client: httpx.AsyncClient) -> None:
        sought: list[str] = []

        def near(name: str) -> list[str]:
            sought.append(name)
            return ["wide"]

        monkeypatch.setattr(service_of(client).catalogue, "near", near)
        names = [f"none{i}" for i in range(20)]
        answer = await client.post(f"/v1/predict?tasks={','.join(names)}", content=PICTURES[0], headers=RAW)
        found = [row["error"]["near"] for row in answer.json()["results"]]
        assert found == [["wide"]] * 8 + [[]] * 12
        assert sought == names[:8]
        sought.clear()
        assert_problem(await client.post("/v1/tasks/none/predict", content=PICTURES[0], headers=RAW), 404, "no task")
        assert sought == ["none"]

    serve(router, work)


def test_unknown_tasks_are_answered_with_near_names_and_without_paths(router: Router, filled: Path) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        for response in (
            await client.get("/v1/tasks/feature"),
            await client.post("/v1/tasks/feature@2/predict", content=PICTURES[0], headers=RAW),
        ):
            assert assert_problem(response, 404, "^no task 'feature'$")["near"] == ["features"]
            assert str(filled) not in response.text
        rows = results(await client.post("/v1/predict?tasks=a,wid", content=PICTURES[0], headers=RAW))
        assert rows[1]["error"]["near"] == ["wide"]

    serve(router, work)


def test_a_refresh_takes_up_new_versions_and_removals_count_from_then(
    router: Router, filled: Path, task_maker: Callable[..., Task]
) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        async def versions() -> list[Any]:
            rows = results(await client.post("/v1/predict?tasks=a,b", content=PICTURES[0], headers=RAW))
            return [row["version"] for row in rows]

        assert await versions() == [1, 1]
        assert (await client.get("/v1/tasks")).json()["total"] == 6
        with Store(filled) as store:
            store.add(task_maker("a", seed=70))
            store.add(task_maker("new", seed=71))
            store.remove("b")
        assert await versions() == [1, 1]
        assert [one["name"] for one in (await client.get("/v1/tasks")).json()["tasks"]][:2] == ["a", "b"]
        assert (await client.post("/v1/refresh")).json() == {"changed": {"a": 2, "b": None}}
        assert await versions() == [2, None]
        names = [one["name"] for one in (await client.get("/v1/tasks")).json()["tasks"]]
        assert "new" in names
        assert "b" not in names

    serve(router, work)


def test_tokens_say_who_may_do_what(shared: Router, caplog: pytest.LogCaptureFixture) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        use, manage = {"Authorization": "Bearer use-me"}, {"Authorization": "bearer manage-me"}
        for said in (None, "Basic use-me", "Bearer use-m", "Bearer ", "Bearer usé"):
            unknown = {} if said is None else {b"Authorization": said.encode("latin-1")}
            for method, url in (("GET", "/v1/tasks"), ("GET", "/v1/tasks/a"), ("POST", "/v1/refresh"),
                                ("POST", "/v1/predict"), ("POST", "/v1/tasks/a/predict")):  # fmt: skip
                refused = await client.request(method, url, headers=unknown)
                assert_problem(refused, 401, "token|Bearer TOKEN")
                assert refused.headers["WWW-Authenticate"] == "Bearer"
        for headers in (use, manage):
            results(await client.post("/v1/tasks/a/predict", content=PICTURES[0], headers={**RAW, **headers}))
            assert (await client.get("/v1/tasks", headers=headers)).status_code == 200
        assert_problem(await client.post("/v1/refresh", headers=use), 403, "manage")
        assert (await client.post("/v1/refresh", headers=manage)).status_code == 200
        for url in ("/livez", "/readyz", "/openapi.json"):
            assert (await client.get(url)).status_code == 200

    caplog.set_level("DEBUG")
    serve(shared, work, use_token="use-me", manage_token="manage-me")
    assert "use-me" not in caplog.text
    assert "manage-me" not in caplog.text
    with pytest.raises(RouterError, match="not empty"):
        create_app(shared, use_token="")


@pytest.mark.parametrize(
    ("names", "host", "is_answered"),
    [
        ((), "evil.example:8090", False),
        ((), "localhost.evil.example", False),
        ((), "127.0.0.1.evil.example", False),
        ((), "evil.example:80@localhost:", False),
        ((), "[::1", False),
        ((), "", False),
        ((), "LocalHost:8090", True),
        ((), "127.0.0.1:8090", True),
        ((), "[::1]:8090", True),
        ((), "192.168.3.4", True),
        (("pear.Example.com",), "Pear.example.com:443", True),
        (("pear.example.com",), "localhost", True),
        (("pear.example.com",), "www.pear.example.com", False),
        (("*",), "evil.example", True),
        (None, "evil.example", True),
    ],
)
def test_a_name_that_was_made_to_lead_here_is_refused(
    shared: Router, names: tuple[str, ...] | None, host: str, is_answered: bool
) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        for method, url in (("GET", "/v1/tasks"), ("POST", "/v1/refresh"), ("POST", "/v1/tasks/a/predict")):
            answer = await client.request(method, url, content=PICTURES[0], headers={**RAW, "Host": host})
            if is_answered:
                assert answer.status_code == 200, answer.text
            else:
                assert_problem(answer, 421, f"Host {host!r}".replace("[", r"\[") + ": expected localhost, an address")
        v2 = await client.get("/v2/models/a", headers={"Host": host})
        assert (v2.status_code, "error" in v2.json()) == ((200, False) if is_answered else (421, True))
        for url in ("/livez", "/readyz", "/"):  # a proxy's checks say any name
            assert (await client.get(url, headers={"Host": host})).status_code == 200
        document = (await client.get("/openapi.json")).json()
        assert ("421" in document["paths"]["/v1/tasks"]["get"]["responses"]) == (names not in (None, ("*",)))

    serve(shared, work, allowed_hosts=names)


def test_with_one_token_nothing_is_managed(shared: Router) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        assert_problem(await client.post("/v1/refresh", headers={"Authorization": "Bearer x"}), 403, "manage")

    serve(shared, work, use_token="x")


def test_tokens_are_compared_in_constant_time(shared: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append(len(a) - len(b))
        return a == b

    monkeypatch.setattr("router.serve.tokens.hmac.compare_digest", compare)

    async def work(client: httpx.AsyncClient) -> None:
        for token in ("", "x", "much longer than it is", "right"):
            await client.get("/v1/tasks", headers={"Authorization": f"Bearer {token}"})

    serve(shared, work, use_token="right", manage_token="other")
    assert compared == [0] * 8


def test_ready_once_the_backbone_ran_and_not_while_it_ends(held: HeldRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    warm_up = held.warm_up
    monkeypatch.setattr(held, "warm_up", lambda: (held.go.wait(60), warm_up()))

    async def work() -> None:
        app = create_app(held)
        service: Service = app.state.service
        async with client_of_starting(app) as client:
            assert (await client.get("/livez")).status_code == 200
            not_yet = assert_problem(await client.get("/readyz"), 503, "has not run yet")
            assert not_yet["status"] == 503
            refused = await client.post("/v1/tasks/a/predict", content=PICTURES[0], headers=RAW)
            assert_problem(refused, 503, "has not run yet")
            assert refused.headers["Retry-After"]
            held.go.set()
            await service.start()
            assert (await client.get("/readyz")).json() == {"ready": True}
            await service.batcher.close()
            assert_problem(await client.get("/readyz"), 503, "shutting down")
            assert (await client.get("/livez")).status_code == 200

    run(work())


@asynccontextmanager
async def client_of_starting(app: Starlette) -> AsyncIterator[httpx.AsyncClient]:
    service: Service = app.state.service
    async with (
        service.lifespan(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client,
    ):
        yield client


def test_a_device_that_fails_is_seen(held: HeldRouter) -> None:
    held.error = RuntimeError("CUDA error")
    held.go.set()

    async def work(client: httpx.AsyncClient) -> None:
        failed = await client.post("/v1/tasks/a/predict", content=PICTURES[0], headers=RAW)
        assert_problem(failed, 503, "the device has failed")
        for url in ("/livez", "/readyz"):
            assert_problem(await client.get(url), 503, "the device has failed")

    serve(held, work)


def test_it_mounts_into_another_app(shared: Router) -> None:
    async def work() -> None:
        inner = create_app(shared)
        outer = Starlette(routes=[Mount("/pear", inner)])
        transport = httpx.ASGITransport(outer)
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            (row,) = results(await client.post("/pear/v1/tasks/a/predict", content=PICTURES[0], headers=RAW))
            assert_row(row, shared.run(PICTURES[0], "a")[0])
            assert (await client.get("/pear/readyz")).status_code == 200
        await inner.state.service.batcher.close()

    run(work())


def test_the_document_says_what_there_is(shared: Router) -> None:
    counted: list[tuple[str, str, int]] = []

    async def work(client: httpx.AsyncClient) -> None:
        found = (await client.get("/openapi.json")).json()
        assert found["openapi"] == "3.1.0"
        routes = [route for route in app_of(client).routes if isinstance(route, Route)]
        assert len(routes) == len(app_of(client).routes)
        served = {(one.path, method.lower()) for one in routes for method in (one.methods or set()) - {"HEAD"}}
        assert served == {(path, method) for path, methods in found["paths"].items() for method in methods}
        names = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(found)))
        assert names == set(found["components"]["schemas"])
        statuses = {
            code for methods in found["paths"].values() for one in methods.values() for code in one["responses"]
        }
        assert statuses - {"200"} <= {str(status) for status in TITLES}
        assert found["paths"]["/v1/refresh"]["post"]["security"]
        assert "security" not in found["paths"]["/livez"]["get"]

    serve(shared, work, use_token="x", counted=lambda path, task, status, seconds: counted.append((path, task, status)))
    assert counted == [("/openapi.json", "", 200)]


def test_answers_carry_security_headers(shared: Router) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        for response in (await client.get("/livez"), await client.get("/nowhere"), await client.get("/v1/tasks")):
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert "default-src 'none'" in response.headers["Content-Security-Policy"]
            assert "Access-Control-Allow-Origin" not in response.headers

    serve(shared, work)


def test_a_remote_that_is_away_is_said_to_be_away_and_not_named() -> None:
    problem = problem_of(PlaceError("s3://team-bucket/pear", "no answer"))
    assert problem.status == 502 and problem.headers["Retry-After"]
    assert "team-bucket" not in problem.detail
