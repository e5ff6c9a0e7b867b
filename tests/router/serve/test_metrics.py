"""Series stay few, whatever is asked; those that are asked for most have their own."""

from pathlib import Path

import httpx
from prometheus_client import generate_latest

from router import Router
from router.serve.batcher import Batcher
from router.serve.metrics import COUNTED, TASKS, Labels, Metrics
from tests.router.serve.conftest import PICTURES
from tests.router.serve.test_app import RAW, serve

PATH = "/v1/tasks/{task}/predict"


def text_of(metrics: Metrics) -> str:
    return generate_latest(metrics.registry).decode()


def test_labels_are_bounded() -> None:
    metrics = Metrics()
    for i in range(3 * TASKS):
        metrics.counted(PATH, f"unknown{i}", 404, 0.1)
    for i in range(2 * TASKS):
        metrics.counted(PATH, f"task{i}@{i}", 200, 0.1)
        metrics.counted(PATH, f"task{i}", 400, 0.1)
        metrics.answered(f"task{i}", i, 1)
    text = text_of(metrics)
    lines = [line for line in text.splitlines() if line.startswith("pear_requests_total")]
    assert len(lines) == 2 * TASKS + 3
    assert f'status="404",task="other"}} {3 * TASKS}.0' in text
    assert f'status="200",task="other"}} {TASKS}.0' in text
    assert 'status="200",task="task0"} 1.0' in text
    assert "unknown" not in text
    assert sum(line.startswith("pear_task_version{") for line in text.splitlines()) == TASKS


def test_a_task_that_is_asked_for_most_gets_a_label_and_the_rarest_ends() -> None:
    metrics = Metrics()
    for i in range(TASKS):
        for _ in range(2 if i else 1):
            metrics.counted(PATH, f"early{i}", 200, 0.1)
    for i in range(20):
        metrics.answered("late", 3, 1)
        metrics.counted(PATH, "late", 200, 0.1)
        assert ('pear_task_version{task="late"} 3.0' in text_of(metrics)) == (2 * i + 1 > 12)
    text = text_of(metrics)
    assert 'task="early0"' not in text
    assert 'task="early1"' in text
    assert f'pear_requests_total{{path="{PATH}",status="200",task="other"}} 6.0' in text
    assert f'pear_requests_total{{path="{PATH}",status="200",task="late"}} 14.0' in text


def test_what_is_counted_is_bounded_too() -> None:
    labels = Labels(TASKS, lambda task: None)
    for i in range(3 * COUNTED):
        labels.of(f"task{i}", True)
    assert len(labels._counts) <= COUNTED
    assert labels.of("task0", False) == "task0"


def test_versions_slots_and_images_are_told(router: Router, filled: Path) -> None:
    metrics = Metrics()
    batcher = Batcher(router, watch=metrics)

    async def work(client: httpx.AsyncClient) -> None:
        await client.post("/v1/predict?tasks=a,b", content=PICTURES[0], headers=RAW)
        await client.post("/v2/models/a/infer", content=PICTURES[0], headers={"Inference-Header-Content-Length": "0"})
        text = (await client.get("/metrics")).text
        for line in (
            'pear_images_total{task="a"} 2.0',
            'pear_task_version{task="b"} 1.0',
            'pear_requests_total{path="/v2/models/{task}/infer",status="200",task="a"} 1.0',
            "pear_slot_loads_total 2.0",
            "pear_slot_hits_total 3.0",
            "pear_slot_misses_total 0.0",
            "pear_slot_evictions_total 0.0",
            f"pear_loaded_bytes {router.stats().size_bytes:.1f}",
        ):
            assert line in text or line.replace(".0", "") in text, (line, text)

    serve(router, work, batcher=batcher, counted=metrics.counted, more_routes=[metrics.route(router, batcher)])


def test_a_task_named_as_the_rest_is_counted_with_it() -> None:
    metrics = Metrics()
    metrics.answered("other", 3, 2)
    assert 'pear_images_total{task="other"} 2.0' in text_of(metrics)
    assert "pear_task_version{" not in text_of(metrics)
