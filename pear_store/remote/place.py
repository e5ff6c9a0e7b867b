"""What a remote needs of the place that it lies in: the contract, and the test of a place that is to be written."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence

from pear_store.errors import DamagedRemoteError, PlaceError
from pear_store.format.digest import fresh_name

OBJECT_NAME = re.compile(r"(?:[a-z0-9][a-z0-9.-]*/){0,3}[a-z0-9][a-z0-9.-]*")
_GAP_BYTES = 64 << 10
"""Ranges that lie closer are read in one request: a request costs more than so many bytes"""
_MOST_JOINED_BYTES = 16 << 20
MOST_NAMES = 4 << 20
"""A longer list is refused"""

Range = tuple[int, int]
"""Offset and length in bytes"""


class Place(ABC):
    """Named objects, each written whole. Methods may be called from several threads.

    Args of all methods:
        name: what OBJECT_NAME matches, so that no name leads out of the place.

    Raises, each of them:
        AbsentError: there is no such object (`get`, `get_ranges`).
        DamagedRemoteError: an object is larger than `at_most`, or shorter than a range.
        DiskFullError: the place is full, where it says so.
        AccessError: the place is a directory that may not be read or written.
        PlaceError: everything else. After one, a `create` or `put` may have happened or may yet happen.
    """

    url: str
    """For messages. It holds no secret"""
    can_write = True

    @abstractmethod
    def get(self, name: str, at_most: int) -> bytes:
        """An object's bytes, if they are at most so many. What `put` or `create` returned from is seen."""

    @abstractmethod
    def get_ranges(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        """Parts of an object, in the order asked for."""

    @abstractmethod
    def put(self, name: str, data: bytes) -> None:
        """Writes an object, whole or not at all. One of that name is replaced."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Writes an object, whole or not at all, if there is none of that name; says whether it did.

        Linearizable: of all that create one name, at any time and from anywhere, one at most is told True, and what
        that one wrote is what every later `get` gives.
        """

    @abstractmethod
    def list(self, prefix: str) -> Iterator[str]:
        """Names that begin with a prefix, which ends with a slash. It may miss new ones and have some that are gone.

        What lies there under other names than OBJECT_NAME allows is left out."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Deletes an object, if there is one."""

    def close(self) -> None:  # noqa: B027 (most places hold none)
        """Gives connections back."""


def checked_name(name: str) -> str:
    """The name, if it is one: an assertion, for names come from this package and never from a remote as they are."""
    assert is_name(name), name
    return name


def is_name(name: str) -> bool:
    return len(name) <= 200 and OBJECT_NAME.fullmatch(name) is not None and ".." not in name


def own_names(place: str, prefix: str, names: Iterable[str]) -> Iterator[str]:
    """Of names that a place lists, those that can be an object's.

    Raises:
        DamagedRemoteError: there are more than a remote can have.
    """
    for count, name in enumerate(names):
        if count >= MOST_NAMES:
            raise DamagedRemoteError(place, prefix, f"more than {MOST_NAMES} names")
        if name.startswith(prefix) and is_name(name):
            yield name


def joined(ranges: Sequence[Range]) -> list[tuple[Range, list[int]]]:
    """Ranges with their neighbours joined, and which of those asked for lie in each."""
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
    """What was asked for, of what was read by :func:`joined`."""
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
    """Writes one name twice: a place that does not refuse the second would lose what others push.

    Raises:
        PlaceError: it cannot be written by several.
    """
    if not place.can_write:
        raise PlaceError(place.url, "it can only be read")
    name = f"probe/{fresh_name()}"
    try:
        if not place.create(name, b"first"):
            raise PlaceError(place.url, "it says that a name is taken which nobody has used; it cannot be written")
        if place.create(name, b"second") or place.get(name, 100) != b"first":
            raise PlaceError(
                place.url,
                "it does not refuse to write a name that is there, so it would lose what others push at the same "
                "time; it can only be read, or written by one store alone ('remote init' with --single-writer)",
            )
    finally:
        place.delete(name)
