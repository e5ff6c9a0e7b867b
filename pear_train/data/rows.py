"""Rows of labelled images, each with its split, as data: what lists and tables have in common."""

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
    """A labelled image; `split` is what is said of its split."""

    number: int
    image: str | bytes
    name: str
    label: str
    split: str | None


@dataclass
class Rows:
    """Rows as they are read, and what is wrong with others.

    Args:
        with_splits: whether rows say of which split they are.
    """

    with_splits: bool
    faults: list[str] = field(default_factory=list)
    """What is wrong with rows that are not taken."""
    _taken: dict[str, list[Row]] = field(default_factory=dict)
    """By split."""
    _first: dict[Hashable, Row] = field(default_factory=dict)
    _twice: list[str] = field(default_factory=list)
    _unlike: list[str] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Takes a row, if no earlier one says of the same picture the same, or something else."""
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
            classes: their names in order; None: the labels, sorted. Whole numbers are sorted by size.
            needs_train: refuse rows of which none is of train.
        Raises:
            DataError: rows are at fault, or train is missing.
        """
        raise_all([f"{described}: {fault}" for fault in self.faults])
        if not self._taken:
            raise DataError(f"{described}: has no rows")
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
            cautions += (f"{len(self._unlike)} pictures equal others of another label: {listed(self._unlike)}",)
        notes = (
            (f"{len(self._twice)} rows that say what earlier rows say: {listed(self._twice)}",) if self._twice else ()
        )
        return Labelled(described, ordered, splits, notes=notes, cautions=cautions)


def _split(rows: Sequence[Row], numbers: Mapping[str, int]) -> Split:
    images: list[ImageLike] = [row.image for row in rows]
    targets = torch.tensor([numbers[row.label] for row in rows], dtype=torch.long)
    return Split(images.__getitem__, targets, tuple(row.name for row in rows))


def content_of(image: str | bytes) -> Hashable:
    """What images have in common that are the same: a place, or bytes."""
    return os.path.normpath(image) if isinstance(image, str) and "://" not in image else image


def in_order(labels: Sequence[str]) -> tuple[str, ...]:
    """Distinct labels, sorted: 2 before 10."""
    found = set(labels)
    if all(label.isascii() and label.isdecimal() for label in found):
        return tuple(sorted(found, key=_size))
    return tuple(sorted(found))


def _size(digits: str) -> tuple[int, str, str]:
    """Sorts whole numbers by size, however long; 1 before 01."""
    bare = digits.lstrip("0")
    return len(bare), bare, digits[::-1]


def in_two_splits(splits: Mapping[str, Split], contents: Mapping[str, Sequence[Hashable]]) -> tuple[str, ...]:
    """A line for each two splits that have pictures in common: these say nothing about new pictures.

    Args:
        contents: of each split's pictures, what only equal pictures have in common.
    """
    told = []
    for one, other in combinations([name for name in ("train", "val", "test") if name in splits], 2):
        there = set(contents[one])
        names = [name for name, content in zip(splits[other].names, contents[other], strict=True) if content in there]
        if names:
            told.append(f"{len(names)} pictures of {other} are in {one}, too: {listed(names)}")
    return tuple(told)
