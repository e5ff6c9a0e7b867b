"""Tries requests again if that may help. answers.py says after which errors it may."""

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import TypeVar

from pear_store.errors import PearStoreError, PlaceError
from pear_store.remote.place import Place, Range

T = TypeVar("T")
TRIES = 10
"""With the waits between them, the tries last about 15 seconds. A server restarts in less."""
_FIRST_TRIES = 4
"""Tries until a place has answered once: its name may be wrong"""
_LONGEST_WAIT_S = 8.0


def wait(attempt: int, ended: threading.Event | None = None) -> None:
    """Sleeps for a random time that grows with each try, so that refused clients do not all return at once."""
    (ended or threading.Event()).wait(random.random() * min(_LONGEST_WAIT_S, 0.1 * 2**attempt))


def retried(act: Callable[[], T], tries: Callable[[], int] = lambda: TRIES, ended: threading.Event | None = None) -> T:
    """What `act` returns. It is called again after errors for which another try may help."""
    for attempt in count(1):
        try:
            return act()
        except PlaceError as error:
            if not error.again or attempt >= tries() or (ended is not None and ended.is_set()):
                raise
        wait(attempt - 1, ended)
    raise AssertionError("unreachable")


class Persistent(Place):
    """A place whose requests are tried again, except `create`: after its errors, the caller must look what is there."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self.url, self.can_write = place.url, place.can_write
        self._has_answered = False
        self._ended = threading.Event()

    def _retried(self, act: Callable[[], T]) -> T:
        return retried(lambda: self._noted(act), lambda: TRIES if self._has_answered else _FIRST_TRIES, self._ended)

    def _noted(self, act: Callable[[], T]) -> T:
        try:
            found = act()
        except PearStoreError as error:
            self._has_answered = self._has_answered or not isinstance(error, PlaceError)
            raise
        self._has_answered = True
        return found

    def get(self, name: str, at_most: int) -> bytes:
        return self._retried(lambda: self._place.get(name, at_most))

    def get_ranges(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        return self._retried(lambda: self._place.get_ranges(name, ranges))

    def put(self, name: str, data: bytes) -> None:
        self._retried(lambda: self._place.put(name, data))

    def create(self, name: str, data: bytes) -> bool:
        return self._place.create(name, data)

    def list(self, prefix: str) -> Iterator[str]:
        return iter(self._retried(lambda: list(self._place.list(prefix))))

    def delete(self, name: str) -> None:
        self._retried(lambda: self._place.delete(name))

    def close(self) -> None:
        self._ended.set()
        self._place.close()
