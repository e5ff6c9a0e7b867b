"""The contract of a place that holds a remote, and a test whether several stores can write to it."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence

from pear_store.errors import DamagedRemoteError, PlaceError
from pear_store.format.digest import fresh_name

OBJECT_NAME = re.compile(r"(?:[a-z0-9][a-z0-9.-]*/){0,3}[a-z0-9][a-z0-9.-]*")
_GAP_BYTES = 64 << 10
"""Ranges with a smaller gap are read in one request, because a request costs more than so many bytes"""
_MOST_JOINED_BYTES = 16 << 20
MOST_NAMES = 4 << 20
"""A longer list is refused"""

Range = tuple[int, int]
"""Offset and length in bytes"""


class Place(ABC):
    """Named objects. Each is written whole. Methods may be called from several threads.

    A name must match OBJECT_NAME, so that no name leads out of the place. All methods may raise:

        AbsentError: there is no such object (`get`, `get_ranges`).
        DamagedRemoteError: an object is larger than `at_most`, or shorter than a range.
        DiskFullError: the place is full, and says so.
        AccessError: the place is a directory that may not be read or written.
        PlaceError: everything else. After it, a `create` or `put` may have happened, or may yet happen.
    """

    url: str
    """The place's URL, for messages. It holds no secret."""
    can_write = True

    @abstractmethod
    def get(self, name: str, at_most: int) -> bytes:
        """An object's bytes, if they are at most so many. It sees everything that `put` or `create` has finished."""

    @abstractmethod
    def get_ranges(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        """Parts of an object, in the order of `ranges`."""

    @abstractmethod
    def put(self, name: str, data: bytes) -> None:
        """Writes an object, whole or not at all. Replaces an object of that name."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Writes an object, whole or not at all, if there is none of that name. Returns whether it did.

        It is linearizable. Among all callers that create one name, at any time and from anywhere, at most one gets
        True. Every later `get` returns what that caller wrote.
        """

    @abstractmethod
    def list(self, prefix: str) -> Iterator[str]:
        """Names that begin with a prefix, which ends with a slash. New names may be missing, and deleted ones listed.

        Names that do not match OBJECT_NAME are left out.
        """

    @abstractmethod
    def delete(self, name: str) -> None:
        """Deletes an object, if there is one."""

    def close(self) -> None:  # noqa: B027 (most places hold none)
        """Closes connections."""


def checked_name(name: str) -> str:
    """Asserts that a name is valid, and returns it. Names are made by this package, never taken from a remote."""
    assert is_name(name), name
    return name


def is_name(name: str) -> bool:
    return len(name) <= 200 and OBJECT_NAME.fullmatch(name) is not None and ".." not in name


def own_names(place: str, prefix: str, names: Iterable[str]) -> Iterator[str]:
    """The valid object names among the names that a place lists.

    Raises:
        DamagedRemoteError: there are more names than a remote can have.
    """
    for count, name in enumerate(names):
        if count >= MOST_NAMES:
            raise DamagedRemoteError(place, prefix, f"more than {MOST_NAMES} names")
        if name.startswith(prefix) and is_name(name):
            yield name


def joined(ranges: Sequence[Range]) -> list[tuple[Range, list[int]]]:
    """Joins neighbouring ranges. Returns the joined ranges, each with the positions of the ranges inside it."""
    runs: list[tuple[Range, list[int]]] = []
    for number in sorted(range(len(ranges)), key=lambda number: ranges[number]):
        offset, length = ranges[number]
        if runs:
            (start, size), inside = runs[-1]
            end = max(start + size, offset + length)
            if offset <= start + size + _GAP_BYTES and end - start <= _MOST_JOINED_BYTES:
                runs[-1] = ((start, end - start), [*inside, number])
                continue
        runs.append(((offset, length), [number]))
    return runs


def cut(runs: Sequence[tuple[Range, list[int]]], read: Sequence[bytes], ranges: Sequence[Range]) -> list[bytes]:
    """Cuts the ranges that were asked for out of the ranges that :func:`joined` made."""
    found = [b""] * len(ranges)
    for ((start, _), inside), data in zip(runs, read, strict=True):
        for number in inside:
            offset, length = ranges[number]
            found[number] = data[offset - start : offset - start + length]
    return found


def check_size(place: str, name: str, size: int, at_most: int) -> None:
    if size > at_most:
        raise DamagedRemoteError(place, name, f"{size} bytes, at most {at_most} are read")


def check_whole(place: str, name: str, data: bytes, length: int) -> bytes:
    if len(data) != length:
        raise DamagedRemoteError(place, name, f"a range of {length} bytes has {len(data)}")
    return data


def probe(place: Place) -> None:
    """Writes one name twice. A place that does not refuse the second write would lose what others push.

    Raises:
        PlaceError: several stores cannot write to the place.
    """
    if not place.can_write:
        raise PlaceError(place.url, "it can only be read")
    name = f"probe/{fresh_name()}"
    try:
        if not place.create(name, b"first"):
            raise PlaceError(place.url, "it says that an unused name is taken, so it cannot be written; use another")
        if place.create(name, b"second") or place.get(name, 100) != b"first":
            raise PlaceError(
                place.url,
                "it replaces an object that exists, so it would lose what others push at the same time; it can only "
                "be read, or written by one store alone ('remote init' with --single-writer)",
            )
    finally:
        place.delete(name)
