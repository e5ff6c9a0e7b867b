"""The Ray Serve application: answers of one router, a task in one replica, new versions taken up. Ray Serve is real."""

import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from pear_store import Store, Task
from router import Backbone, Router, RouterError
from tests.helpers.cluster import Cluster, end, wait_until
from tests.helpers.drivers import WAIT_S, end_with
from tests.helpers.lists import make_list_folder

pytest.importorskip("ray.serve", reason="needs ray: pip install 'pear-adapters[ray]'")

TASKS = [f"t{i}" for i in range(20)]
"""So many that no chance gives all of them to one of two replicas."""
TOKENS: dict[str, Any] = {"use_token": "a-token-to-use-tasks", "manage_token": "a-token-to-manage"}


Served = Callable[..., AbstractContextManager[httpx.Client]]


@pytest.fixture(scope="module")
def served(cluster: Cluster) -> Iterator[Served]:
    """Makes an application that lives as long as its client. One Ray Serve has them, one after the other."""
    command = [sys.executable, "-m", "tests.helpers.served", cluster.address]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    told: dict[str, Any] = {"env": cluster.environment, "preexec_fn": partial(end_with, os.getpid())}
    with subprocess.Popen(command, text=True, bufsize=1, **pipes, **told) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        sent, said = process.stdin, process.stdout

        @contextmanager
        def serve(**settings: Any) -> Iterator[httpx.Client]:
            sent.write(json.dumps(settings) + "\n")
            assert select.select([said], [], [], WAIT_S)[0], "no replica came"
            port = int(said.readline())
            try:
                with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                    yield client
            finally:
                sent.write("end\n")

        try:
            yield serve
        finally:
            sent.close()
            end(process)


def stored(folder: Path, task_maker: Callable[..., Task]) -> bytes:
    """Stores the tasks in the folder's `s`; returns an image for them."""
    make_list_folder(folder, task_maker, [(100, 90, 3)])
    with Store(folder / "s") as store:
        list(store.add_many(task_maker(name, seed=i) for i, name in enumerate(TASKS)))
    return (folder / "0.png").read_bytes()


@pytest.mark.slow
def test_two_replicas_answer_as_one_router_and_share_the_tasks(
    tmp_path: Path, backbone: Backbone, task_maker: Callable[..., Task], served: Served
) -> None:
    image = stored(tmp_path, task_maker)
    settings = {"backbone": "pear_tiny", "store": str(tmp_path / "s"), "fewest": 2, "most": 2, "refresh_s": 0.5}
    with Store(tmp_path / "s") as store, served(**settings, **TOKENS) as client:

        def predict(task: str) -> dict[str, Any]:
            answer = client.post(
                f"/v1/tasks/{task}/predict", content=image, headers={**token, "Content-Type": "image/png"}
            )
            assert answer.status_code == 200, answer.text
            result: dict[str, Any] = answer.json()["results"][0]
            return result

        token: dict[str, str] = {}
        assert client.post("/v1/tasks/t0/predict", content=image).status_code == 401
        token = {"Authorization": f"Bearer {TOKENS['use_token']}"}
        expected = Router(backbone, store).run([image] * len(TASKS), TASKS)
        for task, prediction in zip(TASKS, expected, strict=True):
            for _ in range(3):
                found = predict(task)
                assert (found["version"], found["label"]) == (1, prediction.label)
                assert found["top"][0]["probability"] == pytest.approx(prediction.topk(1)[0][1], abs=1e-5)
        assert client.get("/v2/models/t0/ready", headers=token).status_code == 200
        assert client.get("/v1/tasks/nothing", headers=token).status_code == 404
        assert client.post("/v1/refresh", headers=token).status_code == 403
        manages = {"Authorization": f"Bearer {TOKENS['manage_token']}"}
        assert client.post("/v1/refresh", headers=manages).status_code == 200

        until = time.monotonic() + 120
        replicas: set[frozenset[str]] = set()
        while len(replicas) < 2:  # the one that answers is left to chance
            metrics = client.get("/metrics", headers=token).text
            replicas.add(frozenset(re.findall(r'pear_images_total\{task="(\w+)"\} 3\.0', metrics)))
            assert time.monotonic() < until
        one, other = replicas
        assert one | other == set(TASKS)
        assert not one & other

        store.add(task_maker("t0", seed=77))
        while predict("t0")["version"] != 2:
            assert time.monotonic() < until
            time.sleep(0.1)


@pytest.mark.slow
def test_replicas_come_with_the_load_and_go_without_it_and_no_request_fails(
    tmp_path: Path, task_maker: Callable[..., Task], served: Served, cluster: Cluster
) -> None:
    image = stored(tmp_path, task_maker)
    settings = {"backbone": "pear_tiny", "store": str(tmp_path / "s"), "fewest": 1, "most": 2, "waiting": 2}
    headers = {"Authorization": f"Bearer {TOKENS['use_token']}", "Content-Type": "image/png"}
    with served(**settings, **TOKENS) as client:
        loaded, ended = threading.Event(), threading.Event()
        loaded.set()
        statuses: list[int] = []

        def ask(number: int) -> None:
            """One request after the other; only the first one of all goes on when the load ends."""
            while not ended.is_set() and (number == 0 or loaded.is_set()):
                task = TASKS[len(statuses) % len(TASKS)]
                statuses.append(client.post(f"/v1/tasks/{task}/predict", content=image, headers=headers).status_code)

        def replicas() -> int:
            return len(cluster.workers("ServeReplica"))

        def images() -> float:
            """Of the replica that happens to answer."""
            metrics = client.get("/metrics", headers=headers).text
            return sum(map(float, re.findall(r"^pear_images_total\{.*\} (\S+)$", metrics, re.MULTILINE)))

        counts = [0.0]

        def both_answer() -> bool:
            """That of one replica only grows: a smaller one is another's."""
            counts.append(images())
            return 0 < counts[-1] < max(counts)

        assert replicas() == 1
        with ThreadPoolExecutor() as pool:
            askers = [pool.submit(ask, number) for number in range(8)]
            try:
                wait_until(lambda: replicas() == 2)
                wait_until(both_answer)
                loaded.clear()
                asked = len(statuses)
                wait_until(lambda: replicas() == 1)
                again = len(statuses)
                wait_until(lambda: len(statuses) > again + len(TASKS))
            finally:
                ended.set()
            for asker in askers:
                asker.result()
        assert asked < again
        assert set(statuses) == {200}


def test_the_task_of_a_path() -> None:
    from router.cluster.deployment import task_of

    named = {
        "/v1/tasks/dtd/predict": "dtd",
        "/prefix/v1/tasks/dtd@3/predict": "dtd",
        "/v2/models/dtd/infer": "dtd",
        "/v2/models/dtd/versions/2/infer": "dtd",
        "/v1/tasks/a%20b/predict": "a b",
        "/v1/predict": None,
        "/v1/tasks/dtd": None,
        "/metrics": None,
    }
    assert {path: task_of(path) for path in named} == named


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "other machines can reach Ray Serve: give use_token, or no_auth=True if something else checks clients"),
        ({"use_token": ""}, "use_token: expected a token of at least 16 printable ASCII characters"),
        ({"use_token": "short"}, "use_token: expected a token of at least 16 printable ASCII characters"),
        ({"use_token": "a-token-to-use-täsks"}, "use_token: expected a token of at least 16 printable ASCII"),
        ({**TOKENS, "manage_token": "short"}, "manage_token: expected a token of at least 16 printable ASCII"),
        ({"manage_token": TOKENS["manage_token"]}, "manage_token is given without use_token: give both"),
        ({**TOKENS, "affinity": "tasks"}, "affinity 'tasks': expected 'task' or 'none'"),
        ({**TOKENS, "dtype": "bf16"}, "dtype 'bf16': expected 'float32' or 'bfloat16' or 'float16' or 'auto'"),
    ],
)
def test_replicas_are_as_guarded_as_pear_serve(settings: dict[str, Any], message: str) -> None:
    from router.cluster.deployment import Replicas

    with pytest.raises(RouterError, match=message) as raised:
        Replicas("pear_tiny", "s", **settings)
    assert not any(token and token in str(raised.value) for token in TOKENS.values())
    assert Replicas("pear_tiny", "s", no_auth=True).use_token is None


def test_numbers_of_replicas_that_cannot_be() -> None:
    from router.cluster import ClusterError
    from router.cluster.deployment import Replicas

    with pytest.raises(ClusterError, match="fewest 3, most 2: expected 1 <= fewest <= most"):
        Replicas("pear_tiny", "s", **TOKENS, fewest=3, most=2)
    with pytest.raises(ClusterError, match="waiting 65: expected more than 0 and at most at_once, 64"):
        Replicas("pear_tiny", "s", **TOKENS, waiting=65)
    with pytest.raises(ClusterError, match="waiting 0: expected more than 0"):
        Replicas("pear_tiny", "s", **TOKENS, waiting=0)


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("cpus", 0, 1), ("gpus", -1, 0), ("at_once", 0, 1), ("max_batch", 0, 1), ("drain_s", float("nan"), 0),
        ("refresh_s", -1, 0), ("cache_bytes", 0, 1), ("slot_bytes", -1, 1),
    ],
)  # fmt: skip
def test_a_value_that_no_replica_could_take_is_refused_before_one_starts(name: str, value: float, least: int) -> None:
    from router.cluster.deployment import Replicas

    settings: dict[str, Any] = {**TOKENS, name: value}
    with pytest.raises(RouterError, match=f"replicas: {name} {value}: expected at least {least}"):
        Replicas("pear_tiny", "s", **settings)


def test_paths_of_replicas_start_in_the_folder_of_who_makes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from router.cluster.deployment import Replicas

    monkeypatch.chdir(tmp_path)
    replicas = Replicas("pear_tiny", "s", "w.safetensors", **TOKENS)
    assert (replicas.store, replicas.weights) == (f"{tmp_path}/s", f"{tmp_path}/w.safetensors")
    assert Replicas("pear_tiny", "s3://bucket/pear", **TOKENS).store == "s3://bucket/pear"
