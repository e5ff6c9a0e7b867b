"""Work that is done once for all who ask for it at the same time."""

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

from pear_store.errors import PearStoreError

T = TypeVar("T")


class Flights(Generic[T]):
    """Work under way by key, in threads of its own that no end of the process waits for. Askers wait as long as they
    like; the work goes on without them.

    Args:
        most: how many do their work at once; the others wait for their turn.
    """

    def __init__(self, most: int) -> None:
        self._turns = threading.Semaphore(most)
        self._lock = threading.Lock()
        self._under_way: dict[Hashable, tuple[Future[T], threading.Thread]] = {}

    def join(self, key: Hashable, work: Callable[["Future[T]"], None]) -> "Future[T]":
        """The result of the work of that key, which is begun if it is not under way.

        Args:
            work: is given the future, sets its result, and may have more to do then.

        Raises:
            PearStoreError: there can be no thread more.
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
            self._under_way[key] = future, thread  # it ends only after this, for it needs the lock
        return future

    def _fly(self, key: Hashable, work: Callable[["Future[T]"], None], future: "Future[T]") -> None:
        try:
            with self._turns:
                work(future)
        except BaseException as error:  # those who wait are told
            self._leave(key, future)  # first: who asks from now on is not told of what failed before
            if not future.done():
                future.set_exception(error)
        finally:
            self._leave(key, future)
            del future  # else it and its error hold each other, and what the error's frames hold

    def _leave(self, key: Hashable, future: "Future[T]") -> None:
        with self._lock:
            if key in self._under_way and self._under_way[key][0] is future:
                del self._under_way[key]

    def finish(self, limit_s: float) -> None:
        """Waits for the rest of work whose result is there already, for so long at most."""
        with self._lock:
            threads = [thread for future, thread in self._under_way.values() if future.done()]
        for thread in threads:
            thread.join(limit_s)
