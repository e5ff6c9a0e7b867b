"""Metrics for Prometheus. Labels are bounded: the most requested tasks, and "other"."""

import threading
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from router.router import Router
from router.serve.batcher import Batcher
from router.serve.flow import Watch

TASKS = 100
"""Most tasks with their own label, because each series costs Prometheus memory."""
COUNTED = 100 * TASKS
"""Most tasks whose answers are counted, to find the most requested ones."""
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Labels:
    """The labels of the most requested tasks. All other tasks are "other".

    A task replaces another one once it was answered clearly more often. Then the other's series end, and its own start
    at 0. So no series ever goes down.

    Args:
        most: most tasks with a label.
        ended: is called with a task that loses its label.
    """

    def __init__(self, most: int, ended: Callable[[str], None]) -> None:
        self._most, self._ended = most, ended
        self._counts: dict[str, int] = {}
        self._labelled: set[str] = set()

    def of(self, task: str, answered: bool) -> str:
        """The label of a task. A task that was never answered gets none, so invented names make no series."""
        if answered and task != "other":  # a task called "other" is counted with the rest
            self._count(task)
        return task if not task or task in self._labelled else "other"

    def _count(self, task: str) -> None:
        count = self._counts[task] = self._counts.get(task, 0) + 1
        if task not in self._labelled:
            if len(self._labelled) < self._most:
                self._labelled.add(task)
            else:
                least = min(self._labelled, key=self._counts.__getitem__)
                if count > 2 * self._counts[least] + 10:
                    self._labelled.remove(least)
                    self._labelled.add(task)
                    self._ended(least)
        if len(self._counts) > COUNTED:
            halved = {name: count // 2 for name, count in self._counts.items()}
            self._counts = {name: count for name, count in halved.items() if count or name in self._labelled}


class Metrics(Watch):
    """The metrics of one server, in its own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._labels = Labels(TASKS, self._end)
        self._lock = threading.Lock()
        self._requests = Counter(
            "pear_requests", "Requests that were answered.", ["path", "task", "status"], registry=self.registry
        )
        self._images = Counter("pear_images", "Images that a task answered.", ["task"], registry=self.registry)
        self._versions = Gauge(
            "pear_task_version", "The version in which a task answered last.", ["task"], registry=self.registry
        )
        self._seconds = self._histogram("pear_request_seconds", "From a request's start to its answer.", SECONDS)
        self._waited = self._histogram("pear_queue_wait_seconds", "From an image's admission to its batch.", SECONDS)
        self._rows = self._histogram("pear_batch_rows", "Rows of a batch.", SIZES)
        self._of_batch = self._histogram("pear_batch_tasks", "Different tasks of a batch.", SIZES)
        self._decode = self._histogram("pear_decode_seconds", "To decode an image and prepare it.", SECONDS)
        self._load = self._histogram("pear_load_seconds", "To load a task while others run.", SECONDS)
        self._forward = self._histogram("pear_forward_seconds", "Of a batch on the device.", SECONDS)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)

    def counted(self, path: str, task: str, status: int, seconds: float) -> None:
        """Counts a request."""
        with self._lock:
            label = self._labels.of(task.partition("@")[0], status == 200)
            self._requests.labels(path, label, str(status)).inc()
        self._seconds.observe(seconds)

    def answered(self, task: str, version: int | None, rows: int) -> None:
        with self._lock:
            label = self._labels.of(task, True)
            self._images.labels(label).inc(rows)
            if label == task != "other" and version is not None:
                self._versions.labels(task).set(version)

    def _end(self, task: str) -> None:
        """Ends a task's series."""
        for metric in (self._requests, self._images, self._versions):
            metric.remove_by_labels({"task": task})

    def decoded(self, seconds: float) -> None:
        self._decode.observe(seconds)

    def loaded(self, seconds: float) -> None:
        self._load.observe(seconds)

    def ran(self, rows: int, tasks: int, seconds: float, waited_s: Sequence[float]) -> None:
        self._rows.observe(rows)
        self._of_batch.observe(tasks)
        self._forward.observe(seconds)
        for wait in waited_s:
            self._waited.observe(max(0.0, wait))

    def route(self, router: Router, batcher: Batcher) -> Route:
        """The route `/metrics`, which also reads the current state of a router and a batcher."""
        self.registry.register(_Now(router, batcher))

        async def show(request: Request) -> Response:
            return Response(generate_latest(self.registry), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

        return Route("/metrics", show)


class _Now(Collector):
    """Metrics that are read when Prometheus asks."""

    def __init__(self, router: Router, batcher: Batcher) -> None:
        self._router, self._batcher = router, batcher

    def collect(self) -> Iterator[Metric]:
        stats = self._router.stats()
        yield GaugeMetricFamily("pear_queue_images", "Images that wait.", value=self._batcher.waiting)
        yield GaugeMetricFamily("pear_queue_limit_images", "Most images that may wait.", value=self._batcher.queue)
        yield GaugeMetricFamily("pear_loaded_tasks", "Tasks in slots.", value=stats.tasks)
        yield GaugeMetricFamily("pear_loaded_bytes", "Of adapters and heads in slots.", value=stats.size_bytes)
        if stats.budget_bytes is not None:
            yield GaugeMetricFamily("pear_slot_bytes", "The most that loaded tasks may take.", value=stats.budget_bytes)
        yield CounterMetricFamily("pear_slot_hits", "Tasks of batches that were loaded already.", value=stats.hits)
        yield CounterMetricFamily("pear_slot_misses", "Tasks that batches had to load.", value=stats.misses)
        yield CounterMetricFamily("pear_slot_loads", "Tasks that were loaded.", value=stats.loads)
        yield CounterMetricFamily("pear_slot_evictions", "Tasks that were evicted.", value=stats.evictions)
