"""A place in this process's memory, for tests."""

import threading
from collections.abc import Iterator, Sequence

from pear_store.errors import AbsentError
from pear_store.remote.place import Place, Range, check_size, check_whole, checked_name


class MemoryPlace(Place):
    def __init__(self, url: str = "memory://") -> None:
        self.url = url
        self.objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def get(self, name: str, at_most: int) -> bytes:
        data = self.objects.get(checked_name(name))
        if data is None:
            raise AbsentError(self.url, name)
        check_size(self.url, name, len(data), at_most)
        return data

    def get_ranges(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        data = self.get(name, 1 << 62)
        return [check_whole(self.url, name, data[start : start + length], length) for start, length in ranges]

    def put(self, name: str, data: bytes) -> None:
        self.objects[checked_name(name)] = bytes(data)

    def create(self, name: str, data: bytes) -> bool:
        with self._lock:
            return self.objects.setdefault(checked_name(name), mine := bytes(data)) is mine

    def list(self, prefix: str) -> Iterator[str]:
        return iter(sorted(name for name in self.objects if name.startswith(prefix)))

    def delete(self, name: str) -> None:
        self.objects.pop(checked_name(name), None)
