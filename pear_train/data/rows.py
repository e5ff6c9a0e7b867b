"""Rows of labelled images, each with its split. Lists and tables are read into them."""

import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch

from pear_train.data.dataset import Split, listed, raise_all
from pear_train.data.labelled import WHOLE, Labelled
from pear_train.data.layout import split_of
from pear_train.errors import DataError
from router.pictures import ImageLike


@dataclass(frozen=True)
class Row:
    """A labelled image. `split` is the text of its split column, if there is one."""

    number: int
    image: str | bytes
    name: str
    label: str
    split: str | None


@dataclass
class Rows:
    """Rows that were read, and faults of the others.

    Args:
        with_splits: whether rows have a split column.
    """

    with_splits: bool
    faults: list[str] = field(default_factory=list)
    """A line for each row that was refused."""
    _taken: dict[str, list[Row]] = field(default_factory=dict)
    """Split -> its rows."""
    _first: dict[Hashable, Row] = field(default_factory=dict)
    _twice: list[str] = field(default_factory=list)
    _unlike: list[str] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Takes a row. It skips one that repeats an earlier row, and refuses one with another label for the picture."""
        role = str(split_of(row.split or "")) if self.with_splits else WHOLE
        content = content_of(row.image)
        first = self._first.setdefault(content, row)
        if isinstance(row.image, bytes):
            self._unlike += [row.name] if first.label != row.label else []
        elif first.label != row.label:
            self.faults.append(
                f"row {row.number}: {row.name!r} is {row.label[:40]!r}, but in row {first.number} it is "
                f"{first.label[:40]!r}: expected one label for a picture"
            )
            return
        elif self._first.setdefault((role, content), row) is not row:
            self._twice.append(row.name)
            return
        self._taken.setdefault(role, []).append(row)

    def labelled(self, described: str, classes: Sequence[str] | None, needs_train: bool) -> Labelled:
        """The rows by split.

        Args:
            classes: names of the classes in order. None: the sorted labels; whole numbers are sorted by size.
            needs_train: whether rows without a train split are refused.
        Raises:
            DataError: rows were refused, there are none, or the train split is missing.
        """
        raise_all([f"{described}: {fault}" for fault in self.faults])
        if not self._taken:
            raise DataError(f"{described}: has no rows: expected a row for each image")
        taken = {role: self._taken[role] for role in ("train", "val", "test", WHOLE) if role in self._taken}
        ordered = (
            tuple(classes) if classes is not None else in_order([row.label for rows in taken.values() for row in rows])
        )
        numbers = {name: i for i, name in enumerate(ordered)}
        if needs_train and not {"train", WHOLE} & taken.keys():
            raise DataError(f"{described}: no row is of split train: found {listed(sorted(taken))}")
        splits = {role: _split(rows, numbers) for role, rows in taken.items()}
        contents = {role: [content_of(row.image) for row in rows] for role, rows in taken.items()}
        cautions = in_two_splits(splits, contents)
        if self._unlike:
            cautions += (
                f"pictures that equal others with another label ({len(self._unlike):,}): {listed(self._unlike)}",
            )
        notes = (f"rows that repeat earlier rows ({len(self._twice):,}): {listed(self._twice)}",) if self._twice else ()
        return Labelled(described, ordered, splits, notes=notes, cautions=cautions)


def _split(rows: Sequence[Row], numbers: Mapping[str, int]) -> Split:
    images: list[ImageLike] = [row.image for row in rows]
    targets = torch.tensor([numbers[row.label] for row in rows], dtype=torch.long)
    return Split(images.__getitem__, targets, tuple(row.name for row in rows))


def content_of(image: str | bytes) -> Hashable:
    """A key that is equal for equal images: their path, URL or bytes."""
    return os.path.normpath(image) if isinstance(image, str) and "://" not in image else image


def in_order(labels: Sequence[str]) -> tuple[str, ...]:
    """Distinct labels, sorted: 2 before 10."""
    found = set(labels)
    if all(label.isascii() and label.isdecimal() for label in found):
        return tuple(sorted(found, key=_size))
    return tuple(sorted(found))


def _size(digits: str) -> tuple[int, str, str]:
    """A sort key that orders whole numbers of any length by size, and 1 before 01."""
    bare = digits.lstrip("0")
    return len(bare), bare, digits[::-1]


def in_two_splits(splits: Mapping[str, Split], contents: Mapping[str, Sequence[Hashable]]) -> tuple[str, ...]:
    """A warning for each two splits that share pictures. Such pictures say nothing about new ones.

    Args:
        contents: split -> a key for each picture, equal only for equal pictures.
    """
    told = []
    for one, other in combinations([name for name in ("train", "val", "test") if name in splits], 2):
        there = set(contents[one])
        names = [name for name, content in zip(splits[other].names, contents[other], strict=True) if content in there]
        if names:
            told.append(f"pictures of {other} that are in {one}, too ({len(names):,}): {listed(names)}")
    return tuple(told)
