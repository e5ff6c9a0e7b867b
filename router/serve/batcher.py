"""From requests, each an image and its tasks, to mixed batches and back. Knows no HTTP.

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
    """Answers requests of any tasks in mixed batches. Used on one event loop.

    A batch is whatever is ready when the device becomes free: at most `max_batch` rows, of images of one size and of
    tasks that fit into the slots together. Tasks take turns: one that is asked for very often delays the others by one
    image a turn. If the queue is full, an image of a task for which few wait displaces the newest of the task for which
    most wait. A request of many tasks stays together, so that they share its image's trunk.

    A request that is cancelled, or past its time limit, leaves the queue at once, and no forward is spent on it.

    Args:
        router: tasks are looked up in it, and run. It is not closed by the batcher.
        max_batch: the most rows of a batch; a request of more tasks is a batch of its own.
        max_wait_ms: how long a batch that is not full waits for more while the device is free.
        queue: the most images that wait.
        workers: threads that decode images; as many as there are processors unless given.
        watch: is told what happens.
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
        """Why the device's thread ended; None while all is well. There is no way back: make a new process."""
        workers = workers or os.cpu_count() or 1
        self._flow = Flow(router, watch or Watch(), max_batch, max_wait_ms / 1000, workers, self._fail)
        self._open: dict[Request, None] = {}
        self._idle: asyncio.Event | None = None

    @property
    def waiting(self) -> int:
        """How many images wait: all that were admitted and are not in the batch under way."""
        return len(self._open) - len({part.request for part in self._flow.running}.intersection(self._open))

    @property
    def draining(self) -> bool:
        """Whether it is being closed, and admits nothing."""
        return self._flow.draining

    async def lookup(self, task: str) -> Known:
        """What a name means now; of a task that is slow to fetch, nobody waits who did not ask for such a one.

        Raises:
            RouterError, PearStoreError: see `Router.lookup`.
            DrainingError: this batcher was closed.
        """
        if self._flow.closed:
            raise DrainingError
        return await asyncio.get_running_loop().run_in_executor(self._flow.lookups, self.router.lookup, task)

    async def predict(self, image: Sent, task: Named, *, timeout_s: float | None = None) -> Prediction:
        """What a task says of an image: what `Router.run` says of them alone.

        Args:
            image: as `Router.run` takes it; or a float tensor [3, h, w], normalised as the task expects.
            task: a name, or what `Router.lookup` returned: then that version is run, whatever is taken up meanwhile.

        Raises:
            ImageError, UnknownTaskError, RouterError, PearStoreError: see `Router.run`.
            ServeError: there is no answer for another reason.
        """
        (outcome,) = await self._wait(image, [task], timeout_s)
        if isinstance(outcome, Prediction):
            return outcome
        raise outcome

    async def predict_all(
        self, image: Sent, tasks: Sequence[Named], *, timeout_s: float | None = None
    ) -> list[Prediction]:
        """What each of some tasks says of an image, whose trunk they share; one that fails has `error`.

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
        """Admits images, each for some tasks: all of them or none.

        Returns:
            For each image a future of what became of it and each task. Cancel it to give it up.

        Raises:
            RouterError: an image is for no task, or this is another event loop than before.
            QueueFullError: so many images cannot wait now. A future has it if its image was displaced later.
            DrainingError: it was closed.
            DeviceFailedError: the device's thread ended.
        """
        loop = asyncio.get_running_loop()
        if self._flow.loop is None:
            self._flow.loop, self._idle = loop, asyncio.Event()
        if self._flow.loop is not loop:
            raise RouterError("this batcher works on another event loop: make one for each")
        if not all(tasks for _, tasks in asked):
            raise RouterError("no task: expected at least one for each image")
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
        """Refuses the newest that wait for the task with the longest line, in favour of tasks with much shorter ones.

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
            if not request.answer.done():  # else it was given up just now
                request.answer.set_exception(error)
            self._settled(request, None)

    @property
    def retry_after_s(self) -> int:
        """In how many seconds what waits now will be done, from 1 to 60."""
        return max(1, min(60, math.ceil(self._flow.row_s * self.waiting)))

    async def warm_up(self) -> None:
        """Runs the backbone once on the device's thread.

        Raises:
            RouterError: it does not run.
        """
        await asyncio.get_running_loop().run_in_executor(self._flow.device, self.router.warm_up)

    def drain(self) -> None:
        """Admits nothing more; what waits is run at once."""
        self._flow.draining = True
        self._flow.pump()

    @property
    def busy(self) -> bool:
        """Whether a batch is under way."""
        return bool(self._flow.running)

    async def close(self, limit_s: float | None = None) -> bool:
        """Admits nothing more, and finishes what waits; what is not done within `limit_s` fails with a DrainingError.

        Returns:
            Whether all was finished.
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
        """Forgets a request that was answered or given up."""
        self._open.pop(request, None)
        self._flow.discard(request)
        self._flow.pump()
        if not self._open and self._idle is not None:
            self._idle.set()

    def _fail(self, error: BaseException) -> None:
        """Says to all who wait that nothing can run any more."""
        self.failed = error
        self._refuse(DeviceFailedError(error))

    def _refuse(self, error: RouterError) -> None:
        for request in list(self._open):
            if not request.answer.done():
                request.answer.set_exception(error)
