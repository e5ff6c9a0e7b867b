"""Workers on a Ray cluster, and batches handed out to them: a few ahead for each, again where a worker died."""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from router.cluster.session import ClusterError, cores, reason_of, room
from router.cluster.worker import AT_ONCE, Answer, Settings, Worker, decoded
from router.infer.plan import Ask

IN_FLIGHT = AT_ONCE + 1
"""Batches that a worker has: the last one waits, so that the worker never does. This bounds the run's memory."""
DEATHS = 6
"""How often a batch is tried whose worker dies. Then something of it may be what kills workers."""
ALONE_AFTER = 3
"""After so many deaths a batch has a worker to itself: it is not blamed for what another one did."""
_LOST = (RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError, OutOfMemoryError)


@dataclass(eq=False)
class Order:
    """A batch to be served."""

    asks: list[Ask]
    pixels: Any = None
    """A reference to its decoded images, where tasks of Ray's decode them."""
    deaths: int = 0
    """Of workers that had it."""

    @property
    def alone(self) -> bool:
        """Whether it may be what kills workers."""
        return self.deaths >= ALONE_AFTER


@dataclass(eq=False)
class _Member:
    """A worker, and the orders that it has."""

    actor: Any
    is_up: bool = False
    orders: list[Order] = field(default_factory=list)

    def takes(self, order: Order) -> bool:
        if order.alone:
            return self.is_up and not self.orders
        return self.is_up and len(self.orders) < IN_FLIGHT and not any(other.alone for other in self.orders)


@dataclass
class Crew:
    """Workers that are alike. Ray starts each again if it or its machine dies.

    Args:
        count: how many workers; those that the cluster has no room for begin when it has.
        cpus, gpus: what each worker takes.
        apart: images are decoded by tasks of Ray's on any core, not in the workers.
    """

    settings: Settings
    count: int
    cpus: int
    gpus: int
    apart: bool
    retries: int = 0
    """Orders that were given out again."""
    members: list[_Member] = field(default_factory=list)
    _flying: dict[Any, tuple[Order, _Member]] = field(default_factory=dict)
    _starting: dict[Any, _Member] = field(default_factory=dict)
    _again: deque[Order] = field(default_factory=deque)

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        for member in self.members:
            ray.kill(member.actor)

    def _assemble(self) -> None:
        kind: Any = ray.remote(Worker)
        options = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_restarts": -1, "max_concurrency": AT_ONCE}
        self.members = [_Member(kind.options(**options).remote(self.settings)) for _ in range(self.count)]
        for member in self.members:
            self._start(member)
        decode: Any = ray.remote(decoded)
        self._decode = decode.options(num_cpus=1)

    @property
    def up(self) -> int:
        """How many workers are there now."""
        return sum(member.is_up for member in self.members)

    def serve(self, orders: Iterable[Order]) -> Iterator[tuple[Order, Answer]]:
        """Serves orders, in any order. Takes the next one when a worker has too few.

        Raises:
            ClusterError: a worker cannot be made or fails, or an order's workers died again and again.
        """
        left = iter(orders)
        following = next(left, None)
        if following is not None:
            self._assemble()
        while following is not None or self._again or self._flying:
            while (order := self._again[0] if self._again else following) and (member := self._idlest(order)):
                self._send(order, member)
                if self._again:
                    self._again.popleft()
                else:
                    following = next(left, None)
            done, _ = ray.wait([*self._starting, *self._flying], num_returns=1)
            for reference in done:
                if reference in self._starting:
                    self._join(reference)
                else:
                    answered = self._receive(reference)
                    if answered is not None:
                        yield answered

    def _idlest(self, order: Order) -> _Member | None:
        """Of those that take this order, who has the fewest; None: nobody takes it now."""
        free = [member for member in self.members if member.takes(order)]
        return min(free, key=lambda member: len(member.orders), default=None)

    def _start(self, member: _Member) -> None:
        member.is_up = False
        # held by Ray until the worker is there
        self._starting[member.actor.ready.options(max_task_retries=-1).remote()] = member

    def _join(self, reference: Any) -> None:
        member = self._starting.pop(reference)
        try:
            ray.get(reference)
        except ActorDiedError as error:
            raise ClusterError(f"a worker cannot be made: {reason_of(error)}") from None
        except RayActorError:
            time.sleep(0.5)  # Ray is about to start it again
            self._start(member)
        else:
            member.is_up = True

    def _send(self, order: Order, member: _Member) -> None:
        asks = order.asks
        if self.apart:
            if order.pixels is None:
                order.pixels = self._decode.remote(asks)
            asks = [replace(ask, image=b"") for ask in asks]  # which the worker does not need
        self._flying[member.actor.serve.remote(asks, order.pixels)] = order, member
        member.orders.append(order)

    def _receive(self, reference: Any) -> tuple[Order, Answer] | None:
        order, member = self._flying.pop(reference)
        member.orders.remove(order)
        try:
            return order, ray.get(reference)
        except _LOST as error:
            if isinstance(error, RayActorError) and member.is_up:
                self._start(member)
            self._retry(order)
        except RayTaskError as error:
            if not isinstance(error.cause, _LOST):
                raise ClusterError(f"a worker failed: {reason_of(error)}") from None
            self._retry(order)
        return None

    def _retry(self, order: Order) -> None:
        """Has an order served again whose worker, or whose decoding, was lost."""
        order.pixels = None
        order.deaths += 1
        if order.deaths >= DEATHS:
            image = order.asks[0].image
            name = "an image that the list holds" if isinstance(image, bytes) else image
            raise ClusterError(
                f"workers died {DEATHS} times with a batch that begins with {name}: finished parts are kept; see "
                "Ray's logs for why, and run the same command again"
            )
        self.retries += 1
        self._again.append(order)


def make_crew(settings: Settings, workers: int | None, cpus_per_worker: int | None, decode: str) -> Crew:
    """As many workers as are wanted, or as the cluster has room for.

    Args:
        decode: where images are decoded: "apart", by tasks of Ray's on any core, or "beside", in the workers; "auto":
            apart if the workers have GPUs.

    Raises:
        ClusterError: the cluster has room for none.
    """
    on_gpus = settings.device.startswith("cuda")
    count, cpus = room(on_gpus, cpus_per_worker)
    if not on_gpus:
        settings = replace(settings, threads=cpus)
    apart = decode == "apart" or (decode == "auto" and on_gpus)
    if apart and (workers or count) * cpus >= cores():
        raise ClusterError(
            f"{workers or count} workers of {cpus} cores leave none to decode images on: give fewer --workers, a "
            "smaller --cpus-per-worker, or --decode beside"
        )
    return Crew(settings, workers or count, cpus, int(on_gpus), apart)
