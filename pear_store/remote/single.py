"""A place to which only one store writes."""

from collections.abc import Iterator, Sequence

from pear_store.errors import AbsentError, DamagedError
from pear_store.remote.place import Place, Range


class SingleWriter(Place):
    """A place that would replace an existing object: `create` looks first.

    If two stores wrote at the same time, one would lose what it pushed. So the user must say that there is only one.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self.url, self.can_write = place.url, place.can_write

    def get(self, name: str, at_most: int) -> bytes:
        return self._place.get(name, at_most)

    def get_ranges(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        return self._place.get_ranges(name, ranges)

    def put(self, name: str, data: bytes) -> None:
        self._place.put(name, data)

    def create(self, name: str, data: bytes) -> bool:
        try:
            self.get(name, 1)
        except AbsentError:
            self.put(name, data)
            return True
        except DamagedError:  # it is there, and larger
            pass
        return False

    def list(self, prefix: str) -> Iterator[str]:
        return self._place.list(prefix)

    def delete(self, name: str) -> None:
        self._place.delete(name)

    def close(self) -> None:
        self._place.close()
