"""Does work once for all callers that ask for it at the same time."""

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

from pear_store.errors import PearStoreError

T = TypeVar("T")


class Flights(Generic[T]):
    """Work under way, by key. Each runs in its own thread. The process may end without waiting for it.

    A caller may stop waiting at any time; the work goes on.

    Args:
        most: how many threads work at once. The others wait for their turn.
    """

    def __init__(self, most: int) -> None:
        self._turns = threading.Semaphore(most)
        self._lock = threading.Lock()
        self._under_way: dict[Hashable, tuple[Future[T], threading.Thread]] = {}

    def join(self, key: Hashable, work: Callable[["Future[T]"], None]) -> "Future[T]":
        """The result of the work of that key. The work is begun if it is not under way.

        Args:
            work: gets the future and sets its result. It may go on after that.

        Raises:
            PearStoreError: the system gives no more threads.
        """
        with self._lock:
            known = self._under_way.get(key)
            if known is not None:
                return known[0]
            future: Future[T] = Future()
            thread = threading.Thread(target=self._fly, args=(key, work, future), name="pear-remote", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                raise PearStoreError(f"the system gives no more threads: {error}") from None
            self._under_way[key] = future, thread  # the thread ends only after this, because it needs the lock
        return future

    def _fly(self, key: Hashable, work: Callable[["Future[T]"], None], future: "Future[T]") -> None:
        try:
            with self._turns:
                work(future)
        except BaseException as error:  # those who wait get it
            self._leave(key, future)  # first: who asks from now on must not get this error
            if not future.done():
                future.set_exception(error)
        finally:
            self._leave(key, future)
            del future  # else it and its error keep each other alive, and all that the error's frames hold

    def _leave(self, key: Hashable, future: "Future[T]") -> None:
        with self._lock:
            if key in self._under_way and self._under_way[key][0] is future:
                del self._under_way[key]

    def finish(self, limit_s: float) -> None:
        """Waits until work ends whose result is there already; for each at most `limit_s` seconds."""
        with self._lock:
            threads = [thread for future, thread in self._under_way.values() if future.done()]
        for thread in threads:
            thread.join(limit_s)
