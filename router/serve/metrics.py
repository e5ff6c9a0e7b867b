"""What Prometheus is told. Labels are bounded: the tasks that are asked for most, and "other"."""

import threading
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
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
"""Most tasks that have a label of their own: the first that were answered. A series costs Prometheus memory."""
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics(Watch):
    """Counts and times of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._tasks: set[str] = set()
        self._lock = threading.Lock()
        self._requests = Counter(
            "pear_requests", "Requests that were answered.", ["path", "task", "status"], registry=self.registry
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
        """Counts a request. A task has a label of its own only once it was answered, so names made up make none."""
        self._requests.labels(path, self._label(task, status), str(status)).inc()
        self._seconds.observe(seconds)

    def _label(self, task: str, status: int) -> str:
        name = task.partition("@")[0]
        if not name or name in self._tasks:
            return name
        with self._lock:
            if status == 200 and len(self._tasks) < TASKS:
                self._tasks.add(name)
                return name
        return "other"

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
        """`/metrics`, also of what a router and a batcher hold now."""
        self.registry.register(_Now(router, batcher))

        async def show(request: Request) -> Response:
            return Response(generate_latest(self.registry), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

        return Route("/metrics", show)


class _Now(Collector):
    """What is read when Prometheus asks."""

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
