"""The way of requests: waiting, decoded, tasks in slots, in a batch, answered.

Only the event loop's thread changes this state. Threads of the pools get arguments and return results.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from pear_store import PearStoreError
from pear_store.errors import PlaceError
from pear_store.pools import ThreadPool
from router.errors import RouterError
from router.predictions import Prediction
from router.registry import Known
from router.router import Router
from router.serve.parts import Decoded, Part, Ran, Request, decode_for, look_up, run_parts
from router.serve.turns import Turns
from router.threads import side_threads

LOOKUPS = 32
"""Most tasks that are looked up in a remote at once."""
A = TypeVar("A")
R = TypeVar("R")


class Watch:
    """Receives events, on the event loop's thread. This base class ignores them."""

    def decoded(self, seconds: float) -> None:
        """An image was decoded, or could not be read."""

    def loaded(self, seconds: float) -> None:
        """A task was loaded while other work went on."""

    def ran(self, rows: int, tasks: int, seconds: float, waited_s: Sequence[float]) -> None:
        """A batch ran.

        Args:
            waited_s: for each of its images, the seconds from its admission to the start of the batch.
        """

    def answered(self, task: str, version: int | None, rows: int) -> None:
        """A task answered some rows of a batch. `version` is None for an added task."""


class Flow:
    """Moves requests from their admission to their answers.

    Args:
        failed: is called with the error if the device's thread ends. Then nothing moves any more.
    """

    def __init__(
        self,
        router: Router,
        watch: Watch,
        max_batch: int,
        max_wait_s: float,
        workers: int,
        failed: Callable[[BaseException], None],
    ) -> None:
        self._router, self._watch, self._tell_failed = router, watch, failed
        self._max_batch, self._max_wait_s, self._workers = max_batch, max_wait_s, workers
        self._is_limited = router.stats().budget_bytes is not None
        self._decoders = side_threads(workers, "pear-serve-decode")
        self.lookups = side_threads(LOOKUPS, "pear-serve-lookup")
        """Separate from the decoders, so that a task that is slow to fetch does not block other images."""
        self._asked: dict[str, list[Request]] = {}
        """Task that is being looked up in a remote -> the requests that wait for it."""
        self.looking: Turns[Request] = Turns()
        """All requests that wait for a look-up."""
        self.device = ThreadPool(1, "pear-serve-device")
        self.loop: asyncio.AbstractEventLoop | None = None
        self.waiting: Turns[Request] = Turns()
        """Requests that wait to be decoded."""
        self._decoding = 0
        self.prepared: Turns[Part] = Turns()
        """Decoded parts that wait until their tasks fit into the slots."""
        self._loading: dict[Part, None] = {}
        self.ready: Turns[Part] = Turns()
        self.running: list[Part] = []
        self.row_s = 0.0
        """Recent average of seconds per row."""
        self.draining = False
        """Whether no more requests will come. Then batches do not wait to become full."""
        self.closed = False
        self._timer: asyncio.TimerHandle | None = None

    def put(self, request: Request) -> None:
        """Admits a request. After its answer is set or cancelled, call `discard` and then `pump`."""
        named = dict.fromkeys(task for task in request.tasks if isinstance(task, str))
        unknown = [task for task in named if not self._router.is_near(task)]
        request.unknown = len(unknown)
        if not unknown:
            self.waiting.put(request.line, request)
        else:
            self.looking.put(request.line, request)
        for task in unknown:
            waiters = self._asked.setdefault(task, [])
            waiters.append(request)
            if len(waiters) == 1:
                self._start(self.lookups, partial(look_up, self._router), task, self._looked_up)

    def discard(self, request: Request) -> None:
        """Drops a request that was answered or cancelled."""
        self.looking.discard(request.line, request)
        self.waiting.discard(request.line, request)
        for part in request.parts:
            self.prepared.discard(request.line, part)
            self.ready.discard(request.line, part)
        request.image = None

    def close(self) -> None:
        """Starts no more work. The threads end after their current work."""
        self.closed = True
        for pool in (self.lookups, self._decoders, self.device):
            pool.shutdown(wait=False, cancel_futures=True)

    def pump(self) -> None:
        """Starts all work that can start now."""
        if self.closed:
            return
        while (request := self.waiting.first()) is not None and self._may_decode():
            self.waiting.take(request.line, request)
            self._decoding += 1
            self._start(self._decoders, partial(decode_for, self._router), request, self._decoded)
        while (part := self.prepared.first()) is not None and self._fits(part):
            self.prepared.take(part.request.line, part)
            self._prepare(part)
        self._dispatch()

    # ---- looking up ---------------------------------------------------------------------------

    def _looked_up(self, task: str, done: "Future[Known | RouterError | PearStoreError]") -> None:
        error = _error(done)
        for request in self._asked.pop(task):
            if request.answer.done():  # it was cancelled meanwhile
                continue
            if error is not None:
                request.answer.set_exception(error)
                continue
            request.looked_up[task] = done.result()
            request.unknown -= 1
            if not request.unknown:
                self.looking.discard(request.line, request)
                self.waiting.put(request.line, request)
        self.pump()

    # ---- decoding -----------------------------------------------------------------------------

    def _may_decode(self) -> bool:
        """Whether a thread is free, and fewer images than two batches hold are decoded."""
        held = self._decoding + len(self.prepared) + len(self.ready)
        return self._decoding < self._workers and held < 2 * self._max_batch

    def _decoded(self, request: Request, done: "Future[Decoded]") -> None:
        self._decoding -= 1
        request.image = None
        if (error := _error(done)) is not None:
            if not request.answer.done():
                request.answer.set_exception(error)
            self.pump()
            return
        found = done.result()
        if not request.answer.done():
            self._watch.decoded(found.seconds)
            request.parts = found.parts
            for part in found.parts:
                self.prepared.put(request.line, part)
            request.settle(found.failures)
        self.pump()

    # ---- loading ------------------------------------------------------------------------------

    def _fits(self, part: Part) -> bool:
        """Whether a part's tasks fit into the slots together with those that run, are ready or load. If there are none,
        always."""
        if not self._is_limited:
            return True
        held = {one: None for other in (*self.running, *self.ready, *self._loading) for one in other.known}
        if not held or all(one in held for one in part.known):
            return True
        try:
            self._router.check([*held, *part.known])
        except (RouterError, PearStoreError):
            return False
        return True

    def _prepare(self, part: Part) -> None:
        """Prepares a part for a batch. Missing tasks are loaded while other parts run."""
        try:
            missing = [one for one in part.known if not self._router.is_loaded(one)]
            loaded = self._router.preload(missing) if missing else None
        except RouterError:  # the batch will report it
            loaded = None
        if loaded is None:
            self.ready.put(part.request.line, part)
            return
        began = time.perf_counter()
        self._loading[part] = None
        loaded.add_done_callback(lambda done: self._post(self._loaded, part, began, done))

    def _loaded(self, part: Part, began: float, done: "Future[None]") -> None:
        """Makes a loaded part ready. After an error the batch tries again and reports it, unless a remote is away."""
        del self._loading[part]
        self._watch.loaded(time.perf_counter() - began)
        error = _error(done)
        if isinstance(error, PlaceError) and len(part.known) == 1:
            part.request.settle(dict.fromkeys(part.numbers, error))
        elif not part.request.answer.done():
            self.ready.put(part.request.line, part)
        self.pump()

    # ---- batches ------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Starts the next batch, if the device is free and there is one."""
        if self.closed or self.running or not len(self.ready) or self._must_wait():
            return
        self.running = self._take()
        if self.running:
            self._start(self.device, partial(run_parts, self._router), list(self.running), self._ran)

    def _must_wait(self) -> bool:
        """Whether the next batch waits for more rows. It waits at most `max_wait_ms` after its oldest request came."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._max_wait_s or self.draining:
            return False
        if sum(len(part.known) for part in self.ready) >= self._max_batch:
            return False
        left = min(part.request.came for part in self.ready) + self._max_wait_s - time.perf_counter()
        if left <= 0:
            return False
        assert self.loop is not None
        self._timer = self.loop.call_later(left, self._dispatch)
        return True

    def _take(self) -> list[Part]:
        """The next batch: parts in turn whose images have the size of the first one's."""
        batch: list[Part] = []
        rows = 0
        for part in self.ready:
            if part.request.answer.done():  # just cancelled
                continue
            if batch and (part.size != batch[0].size or rows + len(part.known) > self._max_batch):
                continue
            batch.append(part)
            rows += len(part.known)
            if rows >= self._max_batch:
                break
        for part in batch:
            self.ready.take(part.request.line, part)
        return batch

    def _ran(self, batch: list[Part], done: "Future[Ran]") -> None:
        self.running = []
        if (error := _error(done)) is not None:
            self.closed = True
            self._tell_failed(error)
            return
        ran = done.result()
        rows = sum(len(part.known) for part in batch)
        row_s = ran.seconds / rows
        self.row_s = 0.9 * self.row_s + 0.1 * row_s if self.row_s else row_s
        waited_s = [ran.began - request.came for request in dict.fromkeys(part.request for part in batch)]
        self._watch.ran(rows, len({one.key for part in batch for one in part.known}), ran.seconds, waited_s)
        answered: Counter[tuple[str, int | None]] = Counter()
        for part, found in zip(batch, ran.outcomes, strict=True):
            answered.update(
                (one.name, None if one.version is None else one.version.version)
                for number, one in zip(part.numbers, part.known, strict=True)
                if isinstance(found[number], Prediction)
            )
            part.request.settle(found)
        for (task, version), count in answered.items():
            self._watch.answered(task, version, count)
        self.pump()

    def _start(self, pool: ThreadPool, work: Callable[[A], R], on: A, done: "Callable[[A, Future[R]], None]") -> None:
        """Runs work in a pool, then calls `done` on the event loop."""
        pool.submit(work, on).add_done_callback(lambda future: self._post(done, on, future))

    def _post(self, call: Callable[..., None], *args: Any) -> None:
        """Calls a function on the event loop's thread, from any thread. Does nothing if the loop is closed."""
        assert self.loop is not None
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(call, *args)


def _error(done: "Future[Any]") -> BaseException | None:
    """The error of finished work. None if it has a result."""
    return asyncio.CancelledError() if done.cancelled() else done.exception()
