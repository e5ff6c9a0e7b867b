"""A fair queue: lines take turns, and within a line the oldest item comes first."""

from collections.abc import Hashable, Iterator
from itertools import islice
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)


class Turns(Generic[Item]):
    """Items that wait in lines. After a line was served, it goes behind all others.

    So an item that is alone in its line waits for at most one item of each other line.
    """

    def __init__(self) -> None:
        self._lines: dict[str, dict[Item, None]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, line: str, item: Item) -> None:
        self._lines.setdefault(line, {})[item] = None
        self._count += 1

    def __iter__(self) -> Iterator[Item]:
        """All items, in the order in which they would be served. Do not take items during the iteration."""
        walks = [iter(line) for line in self._lines.values()]
        while walks:
            left = []
            for walk in walks:
                for item in walk:
                    yield item
                    left.append(walk)
                    break
            walks = left

    def first(self) -> Item | None:
        """The next item. None if there is none."""
        return next(iter(self), None)

    def length(self, line: str) -> int:
        """The number of items in a line."""
        return len(self._lines.get(line, ()))

    def longest(self) -> int:
        """The number of items in the longest line."""
        return max(map(len, self._lines.values()), default=0)

    def latecomers(self, count: int, least: int) -> list[Item]:
        """The newest `count` items of the longest line, if more than `least` items stay in it. Else an empty list."""
        longest = max(self._lines.values(), key=len, default={})
        return list(islice(reversed(longest), count)) if len(longest) - count > least else []

    def take(self, line: str, item: Item) -> None:
        """Removes an item that is served. Its line goes behind all others."""
        self.discard(line, item)
        if line in self._lines:
            self._lines[line] = self._lines.pop(line)

    def discard(self, line: str, item: Item) -> None:
        """Removes an item, if it is here."""
        items = self._lines.get(line, {})
        if item in items:
            del items[item]
            self._count -= 1
            if not items:
                del self._lines[line]
