"""A Ray Serve application around `router.serve`: replicas that share one store (docs/cluster.md).

    from ray import serve
    from router.cluster.deployment import Replicas, application

    serve.run(application(Replicas(backbone="pear_tiny", store="s3://bucket/pear", use_token=TOKEN)))

Each replica has a router, a batcher and the routes of pear-serve. Consistent hashing gives each task a replica. A
request with a task in its path goes to that replica, so each replica loads only some tasks.
"""

import asyncio
import math
import re
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, get_args
from urllib.parse import unquote

import torch
from ray import cloudpickle, serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from starlette.applications import Starlette

from pear_store import Store
from pear_store.remote.cache import CacheSettings
from router import Router
from router.cluster.session import ClusterError
from router.cluster.worker import shared_path
from router.serve.app import create_app
from router.serve.batcher import Batcher
from router.serve.limits import RequestLimits
from router.serve.metrics import Metrics
from router.serve.tokens import check_tokens
from router.threads import compute_alone

Dtype = Literal["float32", "bfloat16", "float16", "auto"]
Affinity = Literal["task", "none"]
_TASK = re.compile(r"/v1/tasks/([^/]+)/predict|/v2/models/([^/]+)(?:/versions/[^/]+)?/infer")
"""The paths of predictions that name a task."""


def task_of(path: str) -> str | None:
    """The name of the task in a request's path, without its version. None if there is none."""
    found = _TASK.search(path)
    return unquote(found[1] or found[2]).partition("@")[0] if found is not None else None


class TaskRouter(ConsistentHashRouter):
    """Sends requests for one task to one replica. If that replica is full, the next replicas get them."""

    def _routing_key(self, pending_request: Any) -> str | None:
        if pending_request is not None and pending_request.metadata.is_http_request:
            request = cloudpickle.loads(pending_request.args[0])  # safe: this process, Serve's proxy, pickled it
            if (task := task_of(request._asgi_scope["path"])) is not None:
                return task
        return super()._routing_key(pending_request)


@dataclass(frozen=True)
class Replicas:
    """What replicas serve, and how many there are.

    Args:
        store: a URL, or a folder that all machines see. A relative path starts in the folder of this process.
        fewest, most: limits of the number of replicas. Ray chooses it by the number of waiting requests.
        cpus, gpus: cores and GPUs of each replica.
        waiting: the average number of requests per replica above which Ray starts another replica.
        at_once: the most requests of one replica. Further requests go to another one.
        drain_s: seconds for waiting requests when a replica ends.
        refresh_s: seconds between two refreshes from the store; 0: never.
        affinity: "task": requests for one task go to one replica. "none": to any replica.
        use_token, manage_token: tokens to use tasks and to refresh, of at least 16 characters, as for pear-serve.
        no_auth: serve without a token, because something else checks clients.
    Raises:
        RouterError: a value is out of range, or there is neither a token nor `no_auth`.
    """

    backbone: str
    store: str
    weights: str | None = None
    cache_bytes: int | None = None
    device: str | None = None
    dtype: Dtype = "float32"
    slot_bytes: int | None = None
    fewest: int = 1
    most: int = 1
    cpus: int = 1
    gpus: int = 0
    waiting: float = 16
    at_once: int = 64
    max_batch: int = 64
    drain_s: float = 30.0
    refresh_s: float = 60.0
    affinity: Affinity = "task"
    use_token: str | None = field(default=None, repr=False)
    manage_token: str | None = field(default=None, repr=False)
    no_auth: bool = False
    limits: RequestLimits = field(default_factory=RequestLimits)

    def __post_init__(self) -> None:
        check_tokens(self.use_token, self.manage_token)
        if self.use_token is None and not self.no_auth:
            raise ClusterError(
                "replicas: other machines can reach Ray Serve: give use_token, or no_auth=True if something else "
                "checks clients"
            )
        for name, allowed in (("dtype", Dtype), ("affinity", Affinity)):
            if (value := getattr(self, name)) not in get_args(allowed):
                raise ClusterError(f"replicas: {name} {value!r}: expected {' or '.join(map(repr, get_args(allowed)))}")
        least = {"cpus": 1, "gpus": 0, "at_once": 1, "max_batch": 1, "drain_s": 0, "refresh_s": 0}
        for name, smallest in {**least, "cache_bytes": 1, "slot_bytes": 1}.items():
            if (value := getattr(self, name)) is not None and not smallest <= value < math.inf:
                raise ClusterError(f"replicas: {name} {value}: expected at least {smallest}")
        if not 1 <= self.fewest <= self.most:
            raise ClusterError(f"replicas: fewest {self.fewest}, most {self.most}: expected 1 <= fewest <= most")
        if not 0 < self.waiting <= self.at_once:
            raise ClusterError(
                f"replicas: waiting {self.waiting}: expected more than 0 and at most at_once, {self.at_once}"
            )
        for name in ("store", "weights"):  # replicas have working folders of their own
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, shared_path(path))


@serve.ingress()
class Replica:
    """One router behind the routes of pear-serve.

    Raises:
        RouterError, PearStoreError: the router cannot be made.
    """

    def __init__(self, settings: Replicas) -> None:
        compute_alone()  # forwards have a thread of their own
        self._settings = settings
        self._store = Store.open(settings.store, cache=CacheSettings(limit_bytes=settings.cache_bytes))
        device = settings.device or ("cuda" if settings.gpus else "cpu")
        if device == "cpu":
            torch.set_num_threads(settings.cpus)
        self._router = Router(
            settings.backbone, self._store, weights=settings.weights, device=device, slot_bytes=settings.slot_bytes,
            dtype="auto" if settings.dtype == "auto" else getattr(torch, settings.dtype),
        )  # fmt: skip
        self._refreshing: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> Starlette:
        settings, metrics = self._settings, Metrics()
        batcher = Batcher(self._router, max_batch=settings.max_batch, watch=metrics)
        app = create_app(
            self._router, batcher=batcher, limits=settings.limits, use_token=settings.use_token,
            manage_token=settings.manage_token, drain_s=settings.drain_s, counted=metrics.counted,
            more_routes=[metrics.route(self._router, batcher)],
        )  # fmt: skip
        self._batcher = batcher
        if settings.refresh_s:
            refreshing = app.state.service.refresh_every(settings.refresh_s)
            self._refreshing = asyncio.get_running_loop().create_task(refreshing)
        return app

    def check_health(self) -> None:
        """Raises an error if the device failed. Ray then starts a new replica."""
        if self._batcher.failed is not None:
            raise self._batcher.failed

    async def __del__(self) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
            with suppress(asyncio.CancelledError):
                await self._refreshing
        self._store.close()


def application(replicas: Replicas, name: str = "pear") -> Any:
    """The application, for `serve.run` or for `import_path` of a Serve config file."""
    options: dict[str, Any] = {
        "name": name, "max_ongoing_requests": replicas.at_once, "graceful_shutdown_timeout_s": replicas.drain_s + 5,
        "ray_actor_options": {"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
    }  # fmt: skip
    if replicas.fewest == replicas.most:
        options["num_replicas"] = replicas.fewest
    else:
        options["autoscaling_config"] = AutoscalingConfig(
            min_replicas=replicas.fewest, max_replicas=replicas.most, target_ongoing_requests=replicas.waiting
        )
    if replicas.affinity == "task":
        by_task: Any = TaskRouter  # the type that Ray gives this field is wrong
        options["request_router_config"] = RequestRouterConfig(request_router_class=by_task)
    return serve.deployment(**options)(Replica).bind(replicas)
