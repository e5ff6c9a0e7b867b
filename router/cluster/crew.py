"""Workers on a Ray cluster, and the batches handed out to them. The batches of a dead worker go to others."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import (
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
"""Most batches of a worker. The last one waits, so that the worker never waits. This bounds the run's memory."""
DEATHS = 6
"""A batch is given up after this many deaths of its workers, because it may itself kill them. So is a run, if no worker
is up and this many in a row died as they started."""
ALONE_AFTER = 3
"""After this many deaths a batch gets a worker to itself, so that it is not blamed for another batch."""
_LOST = (RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError, OutOfMemoryError)


@dataclass(eq=False)
class Order:
    """A batch to serve."""

    asks: list[Ask]
    images: Any = None
    """Ray's reference to its images, or to their pixels if Ray tasks decode them."""
    spent: Any = None
    """Ray's reference to the time that Ray tasks took to decode them."""
    deaths: int = 0
    """Number of workers that died with it."""

    @property
    def alone(self) -> bool:
        """Whether it gets a worker to itself, because it may kill workers."""
        return self.deaths >= ALONE_AFTER


@dataclass(eq=False)
class _Member:
    """A worker and its orders. If the worker dies, another member takes its place."""

    actor: Any
    is_up: bool = False
    orders: list[Order] = field(default_factory=list)

    def takes(self, order: Order) -> bool:
        if order.alone:
            return self.is_up and not self.orders
        return self.is_up and len(self.orders) < IN_FLIGHT and not any(other.alone for other in self.orders)


@dataclass
class Crew:
    """Equal workers. If one dies, or its machine, another is made as soon as the cluster has room.

    Args:
        count: number of workers. Those without room start as soon as the cluster has room.
        cpus, gpus: cores and GPUs of each worker.
        apart: whether Ray tasks decode images on any core. Else the workers decode them.
    """

    settings: Settings
    count: int
    cpus: int
    gpus: int
    apart: bool
    retries: int = 0
    """Number of orders that were handed out again."""
    members: list[_Member] = field(default_factory=list)
    _died_at_start: int = 0
    """Number of workers that died as they started, since one was last ready."""
    _flying: dict[Any, tuple[Order, _Member]] = field(default_factory=dict)
    _starting: dict[Any, _Member] = field(default_factory=dict)
    _again: deque[Order] = field(default_factory=deque)

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        for member in self.members:
            ray.kill(member.actor)

    def _assemble(self) -> None:
        # no restarts by Ray, which does not tell how many it made
        options = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_restarts": 0, "max_concurrency": AT_ONCE}
        self._worker: Any = ray.remote(Worker).options(**options)
        self.members = [self._start() for _ in range(self.count)]
        decode: Any = ray.remote(decoded)
        self._decode = decode.options(num_cpus=1, num_returns=2)

    def _start(self) -> _Member:
        member = _Member(self._worker.remote(self.settings))
        self._starting[member.actor.ready.remote()] = member  # Ray holds this call until the worker is ready
        return member

    def _replace(self, member: _Member) -> None:
        """Makes another worker in the place of one that is lost, if that was not done yet."""
        if member in self.members:
            member.is_up = False
            ray.kill(member.actor)  # it may only be out of reach, and hold its cores
            self.members[self.members.index(member)] = self._start()

    @property
    def up(self) -> int:
        """The number of workers that are ready now."""
        return sum(member.is_up for member in self.members)

    def serve(self, orders: Iterable[Order]) -> Iterator[tuple[Order, Answer]]:
        """Serves orders. Answers come in any sequence. The next order is taken when a worker has room for it.

        Raises:
            ClusterError: a worker cannot be made or fails, or an order's workers died DEATHS times.
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
        """The worker with the fewest orders that can take this order. None if no worker can."""
        free = [member for member in self.members if member.takes(order)]
        return min(free, key=lambda member: len(member.orders), default=None)

    def _join(self, reference: Any) -> None:
        member = self._starting.pop(reference)
        try:
            ray.get(reference)
        except RayTaskError as error:
            raise ClusterError(f"a worker cannot be made: {reason_of(error)}") from None
        except RayActorError:
            self._died_at_start += 1
            if self._died_at_start >= DEATHS and not self.up:
                raise ClusterError(
                    f"{DEATHS} workers died as they started, and none is left: see Ray's logs for the reason (often "
                    "too little memory), and run the same command again (finished parts are kept)"
                ) from None
            self._replace(member)
        else:
            self._died_at_start = 0
            member.is_up = True

    def _send(self, order: Order, member: _Member) -> None:
        if order.images is None:
            images = [ask.image for ask in order.asks]
            if self.apart:
                order.spent, order.images = self._decode.remote(images, [ask.way for ask in order.asks])
            else:
                order.images = ray.put(images)
        asks = [replace(ask, image=b"") for ask in order.asks]
        self._flying[member.actor.serve.remote(asks, [order.images], order.spent)] = order, member
        member.orders.append(order)

    def _receive(self, reference: Any) -> tuple[Order, Answer] | None:
        order, member = self._flying.pop(reference)
        member.orders.remove(order)
        try:
            return order, ray.get(reference)
        except _LOST as error:
            if isinstance(error, RayActorError):
                self._replace(member)
            self._retry(order)
        except RayTaskError as error:
            if not isinstance(error.cause, _LOST):
                raise ClusterError(f"a worker failed: {reason_of(error)}") from None
            self._retry(order)
        return None

    def _retry(self, order: Order) -> None:
        """Queues an order again after its worker, or its decoding, was lost."""
        order.images = order.spent = None
        order.deaths += 1
        if order.deaths >= DEATHS:
            image = order.asks[0].image
            name = "an image that the list holds" if isinstance(image, bytes) else image
            raise ClusterError(
                f"workers died {DEATHS} times with a batch that begins with {name}: see Ray's logs for the reason, and "
                "run the same command again (finished parts are kept)"
            )
        self.retries += 1
        self._again.append(order)


def make_crew(settings: Settings, workers: int | None, cpus_per_worker: int | None, decode: str) -> Crew:
    """Makes a crew.

    Args:
        workers: number of workers; None: as many as the cluster has room for.
        cpus_per_worker: cores of each worker; None: see :func:`router.cluster.session.room`.
        decode: where images are decoded. "apart": by Ray tasks on any core. "beside": in the workers. "auto": apart if
            the workers have GPUs.
    Raises:
        ClusterError: the cluster has no room for a worker, or no core is left to decode images.
    """
    on_gpus = settings.device.startswith("cuda")
    count, cpus = room(on_gpus, cpus_per_worker, workers)
    if not on_gpus:
        settings = replace(settings, threads=cpus)
    apart = decode == "apart" or (decode == "auto" and on_gpus)
    if apart and 0 < cores() <= count * cpus:
        raise ClusterError(
            f"{count} workers of {cpus} cores leave none to decode images on: give fewer --workers, a "
            "smaller --cpus-per-worker, or --decode beside"
        )
    return Crew(settings, count, cpus, int(on_gpus), apart)
