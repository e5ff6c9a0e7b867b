"""Right under load: 64 clients, 200 tasks that come and go in the slots, new versions; each answer is checked.

PEAR_SERVE_ANSWERS sets how many; `make faults` asks for 20,000.
"""

import asyncio
import base64
import json
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from pear_store import Store, Task
from router import Backbone, Router
from tests.router.serve.conftest import PICTURES, run
from tests.router.serve.test_serving import RAW, Process, served

ANSWERS = int(os.environ.get("PEAR_SERVE_ANSWERS", "1000"))
CLIENTS, TASKS, IN_SLOTS = 64, 200, 24
NAMES = [f"t{i}" for i in range(TASKS)]


@dataclass(frozen=True)
class Answer:
    picture: int
    task: str
    version: int
    label: str
    probabilities: tuple[float, ...]


class Client:
    """Asks in every way that there is."""

    def __init__(self, number: int, http: httpx.AsyncClient, answers: list[Answer]) -> None:
        self._random, self._http, self._answers = random.Random(number), http, answers

    async def work(self) -> None:
        ways = [self._one, self._one, self._one, self._many, self._several, self._v2]
        while len(self._answers) < ANSWERS:
            await self._random.choice(ways)()

    def _picture(self) -> int:
        return self._random.randrange(len(PICTURES))

    async def _post(self, url: str, **request: Any) -> Any:
        response = await self._http.post(url, **request)
        assert response.status_code == 200, response.text
        return response.json()

    def _take(self, rows: list[dict[str, Any]], pictures: list[int]) -> None:
        for row in rows:
            assert row["error"] is None, row
            numbers = tuple(row["probabilities"])
            self._answers.append(Answer(pictures[row["image"]], row["task"], row["version"], row["label"], numbers))

    async def _one(self) -> None:
        picture, task = self._picture(), self._random.choice(NAMES)
        url = f"/v1/tasks/{task}/predict?probabilities=true"
        self._take((await self._post(url, content=PICTURES[picture], headers=RAW))["results"], [picture])

    async def _many(self) -> None:
        """One image through some tasks."""
        picture, tasks = self._picture(), self._random.sample(NAMES, 5)
        url = f"/v1/predict?probabilities=true&tasks={','.join(tasks)}"
        self._take((await self._post(url, content=PICTURES[picture], headers=RAW))["results"], [picture])

    async def _several(self) -> None:
        """Images, each with its task."""
        pictures = [self._picture() for _ in range(4)]
        asked = [
            {"image": base64.b64encode(PICTURES[one]).decode(), "task": self._random.choice(NAMES)} for one in pictures
        ]
        self._take((await self._post("/v1/predict?probabilities=true", json={"images": asked}))["results"], pictures)

    async def _v2(self) -> None:
        picture, task = self._picture(), self._random.choice(NAMES)
        headers = {"Inference-Header-Content-Length": "0"}
        found = await self._post(f"/v2/models/{task}/infer", content=PICTURES[picture], headers=headers)
        outputs = {output["name"]: output["data"] for output in found["outputs"]}
        version, numbers = int(found["model_version"]), tuple(outputs["probabilities"])
        self._answers.append(Answer(picture, task, version, outputs["label"][0], numbers))


async def change(store: Store, process: Process, task_maker: Callable[..., Task], changes: list[str]) -> None:
    """New versions all the time; their size of pictures and number of classes change, too."""
    while True:
        number = len(changes)
        name = NAMES[number * 7 % TASKS]
        task = task_maker(name, seed=1000 + number, classes=2 + number % 4, size=32 + 16 * (number % 2))
        await asyncio.to_thread(store.add, task)
        process.process.send_signal(signal.SIGHUP)
        changes.append(name)
        await asyncio.sleep(0.1)


@pytest.mark.slow
def test_every_answer_under_load_is_that_of_its_image_and_task_alone(
    tmp_path: Path, backbone: Backbone, task_maker: Callable[..., Task], capsys: pytest.CaptureFixture[str]
) -> None:
    with Store.create(tmp_path / "s") as store:
        for seed, name in enumerate(NAMES):
            store.add(task_maker(name, seed=seed, classes=2 + seed % 4, size=32 + 16 * (seed % 2)))
        size = store.resolve("t0").size_bytes
        answers: list[Answer] = []
        changes: list[str] = []

        async def work(process: Process) -> str:
            limits = httpx.Limits(max_connections=CLIENTS)
            options: dict[str, Any] = {"timeout": 120, "trust_env": False, "limits": limits}
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{process.port}", **options) as http:
                changing = asyncio.create_task(change(store, process, task_maker, changes))
                await asyncio.gather(*(Client(number, http, answers).work() for number in range(CLIENTS)))
                changing.cancel()
                return (await http.get("/metrics")).text

        args = ("--store", str(tmp_path / "s"), "--slot-bytes", str(2 * IN_SLOTS * size), "--refresh-s", "0")
        with served(*args, "--max-batch", "32", "--timeout-s", "100") as process:
            metrics = run(work(process), limit_s=60 + ANSWERS / 10)
    evictions = int(float(metrics.split("\npear_slot_evictions_total ")[1].split("\n")[0]))
    wrong = wrong_ones(answers, backbone, tmp_path / "s")
    newer = sum(answer.version > 1 for answer in answers)
    report = {"answers": len(answers), "wrong": len(wrong), "of_new_versions": newer, "new_versions": len(changes)}
    with capsys.disabled():
        print(json.dumps({**report, "evictions": evictions, "tasks": len({answer.task for answer in answers})}))
    assert len(answers) >= ANSWERS
    assert evictions > ANSWERS / 20
    assert newer
    assert not wrong, wrong[:5]


def wrong_ones(answers: list[Answer], backbone: Backbone, where: Path) -> list[Answer]:
    """The answers that are not what a router says of image and task alone."""
    by_question: dict[tuple[int, str, int], list[Answer]] = {}
    for answer in answers:
        by_question.setdefault((answer.picture, answer.task, answer.version), []).append(answer)
    wrong = []
    with Router(backbone, where, merge=False) as alone:
        for (picture, task, version), same in by_question.items():
            expected = alone.run(PICTURES[picture], f"{task}@{version}")[0]
            top = expected.topk(len(expected.classes))
            best = {label for label, found in top if found > top[0][1] - 1e-5}
            for answer in same:
                found = torch.tensor(answer.probabilities)
                is_same = found.shape == expected.probs.shape and torch.allclose(found, expected.probs, 1e-5, 1e-5)
                if not (is_same and answer.label in best):
                    wrong.append(answer)
    return wrong
