"""deploy/nginx and deploy/envoy in the real nginx and Envoy: which replica is asked, and what if it cannot answer."""

import json
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from pear_store import Store, Task
from router.serve.cli import LIMITS
from router.serve.problems import TITLES
from router.serve.server import HEADER_BYTES, HEADER_S, KEEP_ALIVE_S
from tests.helpers.proxies import ENVOY, NGINX, Envoy, Nginx, Replica, envoy, nginx, replicas
from tests.router.serve.conftest import PICTURES
from tests.router.serve.test_serving import RAW, Process, served

Proxy = Callable[[Sequence[int]], AbstractContextManager[Nginx | Envoy]]
both = pytest.mark.parametrize("proxy", [nginx, envoy])
NAMES = [f"task-{number}.v_{number % 7}" for number in range(60)]


def place(client: httpx.Client, path: str, method: str = "POST", **options: Any) -> int:
    """The replica that answers."""
    answer = client.request(method, path, content=b"image", **options)
    assert answer.status_code == 200, answer.text
    return int(answer.headers["X-Replica"])


def places(client: httpx.Client) -> dict[str, int]:
    return {name: place(client, f"/v1/tasks/{name}/predict") for name in NAMES}


def setting(name: str) -> str:
    (value,) = re.findall(rf"^    {name} (.+);", NGINX.read_text(), re.MULTILINE)
    return str(value)


def test_limits_and_times_agree_with_the_server_s_own() -> None:
    assert int(setting("client_max_body_size").removesuffix("m")) * 1024**2 == LIMITS.body_bytes
    assert setting("client_header_timeout") == f"{HEADER_S:.0f}s"
    assert setting("client_body_timeout") == f"{LIMITS.body_timeout_s:.0f}s"
    count, size = setting("large_client_header_buffers").split()
    assert int(count) * int(size.removesuffix("k")) * 1024 == HEADER_BYTES
    (idle,) = re.findall(r"^    keepalive_timeout (\d+)s;", NGINX.read_text(), re.MULTILINE)
    assert int(idle) < KEEP_ALIVE_S, "a connection is closed while a request is sent on it"
    assert int(setting("proxy_read_timeout").removesuffix("s")) > LIMITS.timeout_s + 10
    for code, body in re.findall(r"return (\d+) '(.*)';", NGINX.read_text()):
        problem = json.loads(body)
        assert problem["status"] == int(code)
        assert problem["title"] == TITLES[int(code)] or code == "403"


def test_envoy_s_limits_and_times_agree_with_the_server_s_own() -> None:
    resources = yaml.safe_load(ENVOY.read_text())["static_resources"]
    (listener,), (cluster,) = resources["listeners"], resources["clusters"]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    (host,) = manager["route_config"]["virtual_hosts"]
    for place_of in (
        listener["per_connection_buffer_limit_bytes"],
        manager["http_filters"][0]["typed_config"]["max_request_bytes"],
        host["request_body_buffer_limit"],
    ):
        assert place_of == LIMITS.body_bytes
    assert manager["max_request_headers_kb"] * 1024 == HEADER_BYTES
    assert manager["request_headers_timeout"] == f"{HEADER_S:.0f}s"
    options = cluster["typed_extension_protocol_options"]["envoy.extensions.upstreams.http.v3.HttpProtocolOptions"]
    assert int(options["common_http_protocol_options"]["idle_timeout"].removesuffix("s")) < KEEP_ALIVE_S
    times = [int(route["route"]["timeout"].removesuffix("s")) for route in host["routes"] if "route" in route]
    assert min(times) > LIMITS.timeout_s + 10


@both
def test_a_task_s_requests_reach_one_replica_whatever_form_they_have(proxy: Proxy) -> None:
    with replicas(3) as made, proxy([one.port for one in made]) as front, front.client() as client:
        found = places(client)
        counts = [list(found.values()).count(one.port) for one in made]
        assert min(counts) >= len(NAMES) / 3 / 3, f"not spread: {counts}"
        for name, port in found.items():
            for path in (
                f"/v1/tasks/{name}/predict?top=3",
                f"/v1/tasks/{name}@2/predict",
                f"/v1/tasks/{name}%40prod/predict?tasks=other",
                f"/v1/predict?tasks={name}",
                f"/v1/predict?top=1&tasks={name}@prod,other",
                f"/v1/predict?tasks={name}%2Cother",
                f"/v1/predict?top=1&tasks={name}&tasks=other",
                f"/v2/models/{name}/infer",
                f"/v2/models/{name}/versions/2/infer",
            ):
                assert place(client, path) == port, path
            assert place(client, f"/v1/tasks/{name}", "GET") == port
        # what names no task: pictures go anywhere, and what a page reads comes from one
        assert {place(client, "/v1/predict") for _ in range(60)} == {one.port for one in made}
        pages = ("/", "/metrics", "/v1/tasks", "/v1/server", "/livez", "/v2/health/ready")
        assert len({place(client, path, "GET") for path in pages * 3}) == 1


def spelled(path: str) -> list[str]:
    """Other ways to write a path, of which pear-serve or the proxy makes the same one."""
    first, rest = path[1], path[2:]
    return [
        f"/{path}", path.replace("/", "//"), f"/.{path}", f"/x/..{path}", f"/x/%2E%2E{path}",
        f"/%{ord(first):02x}{rest}", path[0] + path[1:].replace("/", "%2F"), path[0] + path[1:].replace("/", "%2f", 1),
    ]  # fmt: skip


@both
def test_no_spelling_of_a_path_leads_elsewhere(proxy: Proxy) -> None:
    with replicas(3) as made, proxy([one.port for one in made]) as front, front.client() as client:

        def ask(target: str) -> httpx.Response:
            return client.post("/", extensions={"target": target.encode()})  # as it is: httpx would tidy it up

        for name in NAMES[:12]:
            path = f"/v1/tasks/{name}/predict"
            port = place(client, path)
            encoded = path.replace(name, f"%{ord(name[0]):02X}{name[1:]}")
            for other in (encoded, *spelled(path), *spelled(encoded)):
                for one in made:
                    one.seen.clear()
                assert ask(other).headers["X-Replica"] == str(port), other
                if isinstance(front, Envoy):
                    assert [seen["path"] for one in made for seen in one.seen] == [path]
        for one in made:
            one.seen.clear()
        for other in ("/v1/refresh", "/v1/%72efresh", "/v1/refres%68?x=1", *spelled("/v1/refresh")):
            assert ask(other).status_code == 403, other
        assert [one.seen for one in made] == [[], [], []]


@both
def test_what_is_sent_arrives_as_it_was(proxy: Proxy) -> None:
    with replicas(1) as (replica,), proxy([replica.port]) as front, front.client() as client:
        path = "/v1/predict?tasks=a%2Cb&top=2"
        headers = {"Authorization": "Bearer some-token", "Inference-Header-Content-Length": "0", "Host": "pear.example"}
        body = bytes(3 * 1024**2)  # more than is held in memory
        assert client.post(path, content=body, headers=headers).status_code == 200
        (seen,) = replica.seen
        assert seen["path"] == path
        assert seen["bytes"] == len(body)
        assert headers.items() <= {name.title(): value for name, value in seen["headers"].items()}.items()
        if not isinstance(front, Nginx):
            return
        client.post("/v1/tasks/a/predict")
        client.get("/livez")
        assert f'key=a replicas="127.0.0.1:{replica.port}" statuses="200"' in front.access()
        assert "some-token" not in front.access()


@both
def test_a_proxy_s_own_refusals_are_problems(proxy: Proxy) -> None:
    with replicas(1) as (replica,), proxy([replica.port]) as front, front.client() as client:
        large = client.post("/v1/tasks/a/predict", content=bytes(LIMITS.body_bytes + 1))
        assert large.status_code == 413
        assert large.headers["Content-Type"] == "application/problem+json"
        assert large.json()["status"] == 413 and large.json()["error"]
        assert client.post("/v1/tasks/a/predict", content=bytes(LIMITS.body_bytes)).status_code == 200
        refused = client.post("/v1/refresh")
        assert refused.status_code == 403
        assert "each replica" in refused.json()["detail"]
        assert [one["path"] for one in replica.seen] == ["/v1/tasks/a/predict"]


def test_a_replica_that_is_added_or_taken_away_moves_only_its_tasks() -> None:
    with replicas(4) as made, nginx([one.port for one in made[:3]]) as front:
        with front.client() as client:
            before = places(client)
        front.change([one.port for one in made])
        with front.client() as client:
            after = places(client)
        moved = {name for name in NAMES if before[name] != after[name]}
        assert moved == {name for name in NAMES if after[name] == made[3].port}
        assert 0 < len(moved) < len(NAMES) / 2
        front.change([one.port for one in made[1:]])
        with front.client() as client:
            last = places(client)
        assert all(last[name] == after[name] for name in NAMES if after[name] != made[0].port)


@both
def test_what_is_tried_again(proxy: Proxy) -> None:
    """503 and a replica that is away; no other status, for the answer would be the same, or the load larger."""
    with replicas(3) as made, proxy([one.port for one in made]) as front, front.client() as client:
        at = {one.port: one for one in made}
        first = at[place(client, "/v1/tasks/a/predict")]
        for status in (400, 404, 422, 429, 500, 502, 504):
            first.status = status
            for one in made:
                one.seen.clear()
            for _ in range(4):  # more than max_fails: none of these marks a replica as away
                answer = client.post("/v1/tasks/a/predict")
                assert (answer.status_code, answer.text) == (status, str(status))
            assert [len(one.seen) for one in made if one is not first] == [0, 0]
        first.status = 503
        second = at[place(client, "/v1/tasks/a/predict")]
        assert second is not first
        second.close()
        third = at[place(client, "/v1/tasks/a/predict")]
        assert third not in (first, second)
        third.status = 503
        answer = client.post("/v1/tasks/a/predict")
        assert (answer.status_code, answer.text) == (503, "503"), "the last replica's own answer"
        third.close()
        first.close()
        away = client.post("/v1/tasks/a/predict")
        assert away.status_code == 503
        assert away.headers["Content-Type"] == "application/problem+json"
        assert away.json()["detail"]
        if isinstance(front, Nginx):
            assert away.json()["detail"] == "no replica can answer now"
            assert away.headers["Retry-After"] == "1"


@both
def test_the_only_good_replica_is_found_whatever_the_task(proxy: Proxy) -> None:
    with replicas(3) as made, proxy([one.port for one in made]) as front, front.client() as client:
        made[0].status = 503
        made[1].close()
        assert {*places(client).values()} == {made[2].port}


@both
def test_a_replica_comes_back_by_itself(proxy: Proxy) -> None:
    with replicas(2) as made, proxy([one.port for one in made]) as front, front.client() as client:
        first = next(one for one in made if one.port == place(client, "/v1/tasks/a/predict"))
        first.status = 503
        pause = threading.Event()
        for _ in range(200):
            asked = len(first.seen)
            assert place(client, "/v1/tasks/a/predict") != first.port
            if len(first.seen) == asked:
                break
            pause.wait(0.1)
        else:
            raise AssertionError("it is asked each time, though it fails")
        first.status = 200
        for _ in range(200):
            if place(client, "/v1/tasks/a/predict") == first.port:
                break
            pause.wait(0.1)
        else:
            raise AssertionError("it is not asked any more")


@contextmanager
def held(front: Nginx | Envoy, made: Sequence[Replica], count: int) -> Iterator[list[int]]:
    """So many requests for one task, each sent when the one before has reached a replica; and then their statuses."""
    for one in made:
        one.go.clear()
    answers: list[int] = []

    def ask() -> None:
        with front.client() as client:
            answers.append(client.post("/v1/tasks/a/predict").status_code)

    threads = [threading.Thread(target=ask) for _ in range(count)]
    pause = threading.Event()
    try:
        for sent, thread in enumerate(threads, 1):
            thread.start()
            for _ in range(3000):
                if sum(len(one.seen) for one in made) == sent:
                    break
                pause.wait(0.01)
        yield answers
    finally:
        for one in made:
            one.go.set()
        for thread in threads:
            thread.join(60)


def test_a_task_that_is_asked_for_too_much_spreads() -> None:
    with replicas(3) as made, nginx([one.port for one in made], max_conns=2) as front, front.client() as client:
        with held(front, made, 6) as answers:
            assert [len(one.seen) for one in made] == [2, 2, 2], "each took as many as it may"
            full = client.post("/v1/tasks/b/predict")
            assert full.status_code == 503
            assert full.json()["detail"] == "no replica can answer now"
        assert answers == [200] * 6
        assert len({place(client, "/v1/tasks/a/predict") for _ in range(6)}) == 1


def test_with_envoy_no_replica_takes_much_more_than_the_mean() -> None:
    with replicas(3) as made, envoy([one.port for one in made]) as front:
        with held(front, made, 12) as answers:
            assert max(len(one.seen) for one in made) <= 12 / 3 * 1.5 + 1
        assert answers == [200] * 12


class Clients:
    """Asks for tasks in turn, from several threads, until told to end; keeps what was not 200."""

    def __init__(self, front: Nginx, names: list[str], count: int = 4) -> None:
        self.front, self.names = front, names
        self.failed: list[str] = []
        self.lock = threading.Lock()
        self._missing: set[str] = set()  # of the newest round; a request that was sent before counts for an older one
        self._whole = threading.Event()
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(count)]

    def _ask(self, number: int) -> None:
        with self.front.client() as client:
            while not self._end.is_set():
                name = self.names[number % len(self.names)]
                missing = self._missing
                try:
                    answer = client.post(f"/v1/tasks/{name}/predict", content=PICTURES[0], headers=RAW)
                    problem = "" if answer.status_code == 200 else f"{answer.status_code} {answer.text}"
                except httpx.HTTPError as error:
                    problem = repr(error)
                with self.lock:
                    self.failed += [problem] if problem else []
                    missing.discard(name)
                    if not self._missing:
                        self._whole.set()
                number += 1

    def round(self) -> None:
        """Waits until each task has been asked for once more, and answered."""
        with self.lock:
            self._whole.clear()
            self._missing = set(self.names)
        assert self._whole.wait(60), f"no answer for {sorted(self._missing)}"

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(120)


def loaded(process: Process, names: list[str]) -> set[str]:
    with process.client() as client:
        return {name for name in names if client.get(f"/v1/tasks/{name}").json()["loaded"]}


@pytest.mark.slow
def test_a_fleet_loses_no_request_when_a_replica_is_killed_or_drained(
    filled: Path, task_maker: Callable[..., Task]
) -> None:
    # "pear" is what the clients call nginx, which passes that on
    args = ("--store", str(filled), "--refresh-s", "0", "--allowed-host", "pear")
    names = [f"t{number}" for number in range(16)]
    with Store(filled) as store:
        list(store.add_many([task_maker(name, seed=number) for number, name in enumerate(names)]))
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        fleet = {process.port: process for process in pool.map(lambda _: stack.enter_context(served(*args)), range(2))}
        with nginx(list(fleet)) as front, Clients(front, names) as clients:
            clients.round()
            held = {port: loaded(process, names) for port, process in fleet.items()}
            assert sorted(name for found in held.values() for name in found) == sorted(names), "each is loaded once"
            killed, drained = held
            assert held[killed] and held[drained]
            fleet[killed].process.kill()
            clients.round()
            stack.enter_context(served(*args, "--port", str(killed)))
            before = len(front.access())
            while f'replicas="127.0.0.1:{killed}"' not in front.access()[before:]:  # not before fail_timeout
                clients.round()
            fleet[drained].process.send_signal(signal.SIGTERM)
            assert fleet[drained].ended() == 0
            clients.round()
            clients.end()
            assert clients.failed == []
            assert re.search(r'replicas="[^"]+,', front.access()), "no request had to be tried again"
            # what was killed and started anew has its tasks again
            last = dict(re.findall(r'key=(t\d+) replicas="127\.0\.0\.1:(\d+)"', front.access()))
            assert {last[name] for name in held[killed]} == {str(killed)}
