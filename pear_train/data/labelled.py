"""Labelled images in the splits that are on disk, before a missing split is taken from train."""

from collections.abc import Mapping
from dataclasses import dataclass

from pear_train.data.dataset import Dataset, Split, hold_out, labels_without_class, raise_all
from pear_train.errors import DataError

WHOLE = "all"
"""Name of the only split of data without splits."""


@dataclass(frozen=True)
class Labelled:
    """Classes, and the splits that the data has: some of train, val and test, or only `WHOLE`."""

    description: str
    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    all_in_train: bool = True
    """Whether training needs an image of each class. Some sets of VTAB-1k lack some."""
    notes: tuple[str, ...] = ()
    """What was left out, and why."""
    cautions: tuple[str, ...] = ()
    """Warnings about the pictures, such as that some are in two splits."""

    def __post_init__(self) -> None:
        raise_all([f"{self.description}: {fault}" for fault in labels_without_class(self.splits, len(self.classes))])

    def dataset(self) -> Dataset:
        """The data set to train on. A missing val split is a tenth of train. Of data without splits, test is one, too.

        Raises:
            DataError: there is no train split, or the data cannot be used for training.
        """
        splits, described = dict(self.splits), self.description
        if WHOLE in splits:
            whole = splits.pop(WHOLE)
            rest, test = hold_out(whole, 0.1, "test")
            kept = whole.subset(rest)
            left, val = hold_out(kept, 0.1, "val")
            splits = {"train": kept.subset(left), "val": kept.subset(val), "test": whole.subset(test)}
            described += " (about a tenth of each class held out for val, a tenth for test)"
        if "train" not in splits:
            raise DataError(f"{described}: expected a train split, found {', '.join(splits)}: add one")
        if "val" not in splits:
            rest, held = hold_out(splits["train"], 0.1, "val")
            splits["val"], splits["train"] = splits["train"].subset(held), splits["train"].subset(rest)
            described += " (about a tenth of train held out for val)"
        return Dataset(
            described, self.classes, splits["train"], splits["val"], splits.get("test"), self.all_in_train,
            self.notes, self.cautions,
        )  # fmt: skip
