"""Runs requests, each an image and its tasks, in mixed batches. It knows no HTTP.

submit ─► waiting ─► decoded in a pool ─► tasks in slots ─► ready ─► one forward at a time ─► answers
"""

import asyncio
import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import torch

from router.errors import RouterError
from router.predictions import Prediction
from router.registry import Known
from router.router import Router
from router.serve.errors import DeadlineError, DeviceFailedError, DrainingError, QueueFullError
from router.serve.flow import Flow, Watch
from router.serve.parts import Named, Outcome, Request, Sent, line_of, name_of
from router.serve.turns import Turns


class Batcher:
    """Answers requests for any tasks in mixed batches. Use it on one event loop.

    A batch takes what is ready when the device becomes free: at most `max_batch` rows, with images of one size and
    tasks that fit into the slots together. Tasks take turns, so a very popular task delays others by one image a turn.
    If the queue is full, a new image of a task with few waiting images displaces the newest image of the task with the
    most. The tasks of a request stay together, so that they share its image's trunk.

    A request that is cancelled, or past its time limit, leaves the queue at once. It costs no forward.

    Args:
        router: looks up and runs tasks. The batcher does not close it.
        max_batch: most rows of a batch. A request with more tasks is a batch of its own.
        max_wait_ms: most milliseconds that a batch waits to become full while the device is free.
        queue: most images that may wait.
        workers: threads that decode images; None: one per processor.
        watch: receives events.
    Raises:
        RouterError: a number is out of range.
    """

    def __init__(
        self,
        router: Router,
        *,
        max_batch: int = 64,
        max_wait_ms: float = 0,
        queue: int = 1024,
        workers: int | None = None,
        watch: Watch | None = None,
    ) -> None:
        for name, value in (("max_batch", max_batch), ("queue", queue), ("workers", 1 if workers is None else workers)):
            if value < 1:
                raise RouterError(f"{name} {value}: expected at least 1")
        if not 0 <= max_wait_ms < math.inf:
            raise RouterError(f"max_wait_ms {max_wait_ms}: expected at least 0")
        self.router, self.queue = router, queue
        self.failed: BaseException | None = None
        """The error that ended the device's thread. None: it runs. After an error only a new process can go on."""
        workers = workers or os.cpu_count() or 1
        self._flow = Flow(router, watch or Watch(), max_batch, max_wait_ms / 1000, workers, self._fail)
        self._open: dict[Request, None] = {}
        self._idle: asyncio.Event | None = None

    @property
    def waiting(self) -> int:
        """The number of waiting images: all that were admitted and are not in the current batch."""
        return len(self._open) - len({part.request for part in self._flow.running}.intersection(self._open))

    @property
    def draining(self) -> bool:
        """Whether it is closing, and admits no more requests."""
        return self._flow.draining

    async def lookup(self, task: str) -> Known:
        """Looks up what a name means now. A task that is slow to fetch does not delay other requests.

        Raises:
            RouterError, PearStoreError: as for `Router.lookup`.
            DrainingError: this batcher is closed.
        """
        if self._flow.closed:
            raise DrainingError
        return await asyncio.get_running_loop().run_in_executor(self._flow.lookups, self.router.lookup, task)

    async def predict(self, image: Sent, task: Named, *, timeout_s: float | None = None) -> Prediction:
        """A task's prediction for an image, as `Router.run` would give it.

        Args:
            image: an image as for `Router.run`, or a float tensor [3, h, w], normalised as the task expects.
            task: a name, or a result of `Router.lookup`, whose version is then run.
            timeout_s: most seconds until the answer; None: no limit.
        Raises:
            RouterError, PearStoreError: as for `Router.run`.
            ServeError: there is no answer for another reason.
        """
        (outcome,) = await self._wait(image, [task], timeout_s)
        if isinstance(outcome, Prediction):
            return outcome
        raise outcome

    async def predict_all(
        self, image: Sent, tasks: Sequence[Named], *, timeout_s: float | None = None
    ) -> list[Prediction]:
        """The predictions of several tasks for one image, which share its trunk. A task that fails has an `error`.

        Args:
            image, timeout_s: as for `predict`.
            tasks: names, or results of `Router.lookup`.
        Raises:
            ServeError: there is no answer.
        """
        outcomes = await self._wait(image, tasks, timeout_s)
        return [
            outcome
            if isinstance(outcome, Prediction)
            else Prediction(name_of(task), None, torch.empty(0), (), str(outcome))
            for task, outcome in zip(tasks, outcomes, strict=True)
        ]

    async def _wait(self, image: Sent, tasks: Sequence[Named], timeout_s: float | None) -> list[Outcome]:
        (answer,) = self.submit([(image, tasks)])
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            if timeout_s is None or not answer.cancelled():
                raise
            raise DeadlineError(timeout_s) from None

    def submit(self, asked: Sequence[tuple[Sent, Sequence[Named]]]) -> "list[asyncio.Future[list[Outcome]]]":
        """Admits images, each for some tasks. It admits all of them or none.

        Returns:
            For each image a future of its tasks' results. Cancel a future to give up its image.
        Raises:
            RouterError: an image has no task, or this is another event loop than before.
            QueueFullError: the queue has no room for so many images. A future raises it if its image is displaced.
            DrainingError: this batcher is closing.
            DeviceFailedError: the device's thread ended.
        """
        loop = asyncio.get_running_loop()
        if self._flow.loop is None:
            self._flow.loop, self._idle = loop, asyncio.Event()
        if self._flow.loop is not loop:
            raise RouterError("this batcher works on another event loop: make one for each")
        if not all(tasks for _, tasks in asked):
            raise RouterError("expected at least one task for each image, found an image without one")
        if self.failed is not None:
            raise DeviceFailedError(self.failed)
        if self.draining:
            raise DrainingError
        if (surplus := self.waiting + len(asked) - self.queue) > 0:
            self._make_room(surplus, [line_of(tasks) for _, tasks in asked])
        now = time.perf_counter()
        requests = [Request(image, list(tasks), loop.create_future(), now) for image, tasks in asked]
        for request in requests:
            self._open[request] = None
            self._flow.put(request)
            request.answer.add_done_callback(partial(self._settled, request))
        self._flow.pump()
        return [request.answer for request in requests]

    def _make_room(self, surplus: int, lines: Sequence[str]) -> None:
        """Refuses the newest images in the longest line, if that is much longer than the new images' lines.

        Raises:
            QueueFullError: there is no such line.
        """
        error = QueueFullError(self.waiting, self.queue, self.retry_after_s)
        queues = (self._flow.waiting, self._flow.looking)
        own = max(sum(queue.length(line) for queue in queues) for line in lines)
        refused = max(queues, key=Turns.longest).latecomers(surplus, len(lines) + own)
        if not refused:
            raise error
        for request in refused:
            if not request.answer.done():  # else it was just cancelled
                request.answer.set_exception(error)
            self._settled(request, None)

    @property
    def retry_after_s(self) -> int:
        """About the seconds until all waiting images are done, from 1 to 60."""
        return max(1, min(60, math.ceil(self._flow.row_s * self.waiting)))

    async def warm_up(self) -> None:
        """Runs the backbone once on the device's thread.

        Raises:
            RouterError: the backbone does not run.
        """
        await asyncio.get_running_loop().run_in_executor(self._flow.device, self.router.warm_up)

    def drain(self) -> None:
        """Admits no more requests. Batches no longer wait to become full."""
        self._flow.draining = True
        self._flow.pump()

    @property
    def busy(self) -> bool:
        """Whether a batch is running."""
        return bool(self._flow.running)

    async def close(self, limit_s: float | None = None) -> bool:
        """Admits no more requests and finishes those that wait. After `limit_s` the rest fail with a DrainingError.

        Args:
            limit_s: seconds; None: no limit.
        Returns:
            Whether all requests were finished.
        """
        self.drain()
        if self._open and self._idle is not None:
            self._idle.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(limit_s):
                    await self._idle.wait()
        finished = not self._open
        self._flow.close()
        self._refuse(DrainingError())
        return finished

    def _settled(self, request: Request, _: object) -> None:
        """Drops a request that was answered or cancelled."""
        self._open.pop(request, None)
        self._flow.discard(request)
        self._flow.pump()
        if not self._open and self._idle is not None:
            self._idle.set()

    def _fail(self, error: BaseException) -> None:
        """Fails all waiting requests, because nothing can run any more."""
        self.failed = error
        self._refuse(DeviceFailedError(error))

    def _refuse(self, error: RouterError) -> None:
        for request in list(self._open):
            if not request.answer.done():
                request.answer.set_exception(error)
