"""Tries again what may work the next time."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from pear_store.errors import PlaceError
from pear_store.remote.place import Place, Range

T = TypeVar("T")
TRIES = 6
_LONGEST_WAIT_S = 8.0


def wait(attempt: int) -> None:
    """Sleeps longer from try to try, each time by chance: of many that were refused at once, few come back at once."""
    time.sleep(random.random() * min(_LONGEST_WAIT_S, 0.1 * 2**attempt))


def retried(act: Callable[[], T]) -> T:
    """What `act` returns; it is called again after errors that another try may help."""
    for attempt in range(TRIES - 1):
        try:
            return act()
        except PlaceError as error:
            if not error.again:
                raise
            wait(attempt)
    return act()


class Persistent(Place):
    """A place whose requests are tried again, but for `create`: after an error of that one, who asked has to look."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self.url, self.can_write = place.url, place.can_write

    def get(self, name: str, at_most: int) -> bytes:
        return retried(lambda: self._place.get(name, at_most))

    def get_ranges(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        return retried(lambda: self._place.get_ranges(name, ranges))

    def put(self, name: str, data: bytes) -> None:
        retried(lambda: self._place.put(name, data))

    def create(self, name: str, data: bytes) -> bool:
        return self._place.create(name, data)

    def list(self, prefix: str) -> Iterator[str]:
        return iter(retried(lambda: list(self._place.list(prefix))))

    def delete(self, name: str) -> None:
        retried(lambda: self._place.delete(name))

    def close(self) -> None:
        self._place.close()
