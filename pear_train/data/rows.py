"""Rows of labelled images, each with its split, as data: what lists and tables have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from pear_train.data.dataset import Split, listed, raise_all
from pear_train.data.labelled import WHOLE, Labelled
from pear_train.data.layout import split_of
from pear_train.errors import DataError
from router.pictures import ImageLike


@dataclass
class Rows:
    """Images, their names and labels, and the split that each is said to be of; None: nothing is said of splits."""

    images: list[ImageLike] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    splits: list[str] | None = None
    faults: list[str] = field(default_factory=list)
    """What is wrong with rows that are not here."""

    def labelled(self, described: str, classes: Sequence[str] | None, needs_train: bool) -> Labelled:
        """The rows by split.

        Args:
            classes: their names in order; None: the labels, sorted. Whole numbers are sorted by size.
            needs_train: refuse rows of which none is of train.
        Raises:
            DataError: rows are at fault, or train is missing.
        """
        raise_all([f"{described}: {fault}" for fault in self.faults])
        ordered = tuple(classes) if classes is not None else in_order(self.labels)
        numbers = {name: i for i, name in enumerate(ordered)}
        places: dict[str, list[int]] = {}
        for place in range(len(self.images)):
            places.setdefault(self._role(place), []).append(place)
        if needs_train and places and not {"train", WHOLE} & places.keys():
            found = listed(sorted(set(self.splits or ())))
            raise DataError(f"{described}: no row is of split train: found {found}")
        splits = {}
        for role in ("train", "val", "test", WHOLE):
            chosen = places.get(role, [])
            if chosen or (role == WHOLE and not places):
                images = [self.images[place] for place in chosen]
                targets = torch.tensor([numbers[self.labels[place]] for place in chosen], dtype=torch.long)
                splits[role] = Split(images.__getitem__, targets, tuple(self.names[place] for place in chosen))
        return Labelled(described, ordered, splits, notes=in_train_too(splits))

    def _role(self, place: int) -> str:
        return WHOLE if self.splits is None else str(split_of(self.splits[place]))


def in_order(labels: Sequence[str]) -> tuple[str, ...]:
    """Distinct labels, sorted: 2 before 10."""
    found = set(labels)
    if all(label.isascii() and label.isdecimal() for label in found):
        return tuple(sorted(found, key=int))
    return tuple(sorted(found))


def in_train_too(splits: Mapping[str, Split]) -> tuple[str, ...]:
    """A line for each split that names pictures of train: these say nothing about new pictures."""
    if "train" not in splits:
        return ()
    trained = set(splits["train"].names)
    shared = {name: trained.intersection(split.names) for name, split in splits.items() if name != "train"}
    return tuple(
        f"{len(names)} pictures of {split} are in train, too: {listed(sorted(names))}"
        for split, names in shared.items()
        if names
    )
