"""Makes a place's requests in a few threads that stay. A connection belongs to a thread, so it is used again."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from pear_store.errors import PlaceError
from pear_store.remote.place import Place, Range

_CLOSE_S = 1.0
"""Seconds that `close` waits for threads to end. One that waits for a stalled remote ends later."""
T = TypeVar("T")


class CrewedPlace(Place):
    """Another place, read by a crew of threads. The process may end without waiting for them.

    `close` raises an error in all calls that still wait.

    Args:
        most: how many threads at most. Each is started when it is needed.
    """

    can_write = False

    def __init__(self, place: Place, most: int) -> None:
        self._place, self.url = place, place.url
        self._most = most
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting: set[Future[Any]] = set()
        self._threads: list[threading.Thread] = []
        self._left = self._idle = 0
        self._closed = False

    def get(self, name: str, at_most: int) -> bytes:
        return self._do(partial(self._place.get, name, at_most))

    def get_ranges(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        return self._do(partial(self._place.get_ranges, name, ranges))

    def put(self, name: str, data: bytes) -> None:
        raise PlaceError(self.url, "it is only read")

    def create(self, name: str, data: bytes) -> bool:
        raise PlaceError(self.url, "it is only read")

    def list(self, prefix: str) -> Iterator[str]:
        raise PlaceError(self.url, "it is read without a listing")

    def delete(self, name: str) -> None:
        raise PlaceError(self.url, "it is only read")

    def close(self) -> None:
        """Ends the threads. The last one closes the place itself."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            waiting, threads = list(self._waiting), list(self._threads)
        for future in waiting:
            self._settle(future, error=self._ended())
        for _ in threads:
            self._tasks.put(None)
        if not threads:
            self._place.close()
        until = time.monotonic() + _CLOSE_S
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _do(self, act: Callable[[], T]) -> T:
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise self._ended()
            if self._idle:
                self._idle -= 1
            elif len(self._threads) < self._most:
                self._begin_thread()
            self._waiting.add(future)
            self._tasks.put((future, act))
        try:
            return future.result()
        finally:
            with self._lock:
                self._waiting.discard(future)
            del future  # else it and its error keep each other alive, and all that the error's frames hold

    def _begin_thread(self) -> None:
        thread = threading.Thread(target=self._work, name="pear-place", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system gives no more threads: the existing ones do the work
            if not self._threads:
                raise PlaceError(self.url, str(error), again=True) from None
        else:
            self._threads.append(thread)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, act = task
            try:
                result = act()
            except BaseException as error:  # the caller gets it
                self._settle(future, error=error)
            else:
                self._settle(future, result)
                del result
            del task, future, act
            with self._lock:
                self._idle += self._tasks.empty()
        with self._lock:
            self._left += 1
            is_last = self._left == len(self._threads)
        if is_last:
            self._place.close()

    def _settle(self, future: "Future[Any]", result: Any = None, error: BaseException | None = None) -> None:
        with self._lock:
            if future.done():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

    def _ended(self) -> PlaceError:
        return PlaceError(self.url, "this store was closed")
