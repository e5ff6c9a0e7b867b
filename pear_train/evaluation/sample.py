"""The images to evaluate, and the names of their classes."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from pear_store import Task
from pear_store.counted import counted
from pear_train.data import WHOLE, Labelled, Split
from pear_train.data.dataset import listed
from pear_train.errors import DataError

SplitName = Literal["train", "val", "test", "all"]


@dataclass(frozen=True)
class Sample:
    """Labelled images to evaluate."""

    description: str
    """Where the data is, and which kind of data set it is."""
    split: SplitName
    classes: tuple[str, ...]
    images: Split
    notes: tuple[str, ...] = ()
    """Notes for a person, such as what was left out, and why."""

    def of_classes(self, known: Iterable[str]) -> "Sample":
        """The sample without images of classes that are not in `known`."""
        known = set(known)
        kept = torch.tensor([name in known for name in self.classes], dtype=torch.bool)
        rows = torch.nonzero(kept[self.images.targets]).flatten()
        left_out = len(self.images) - len(rows)
        if not left_out:
            return self
        odd = [name for name in self.classes if name not in known]
        note = f"{counted(left_out, 'image')} of classes that are not the task's: {listed(odd)}"
        return Sample(self.description, self.split, self.classes, self.images.subset(rows), (*self.notes, note))


def choose(labelled: Labelled, wanted: SplitName | None, tasks: Iterable[Task]) -> Sample:
    """The images of one split.

    By default that is the test split, if the data has one. Otherwise it is all images. If a task was trained with this
    very data, it is only the images that training held out.

    Args:
        wanted: the split; None: the default.
    Raises:
        DataError: there is no such split, or it is empty.
    """
    notes = (*(f"left out: {note}" for note in labelled.notes), *labelled.cautions)
    if wanted is None and "test" in labelled.splits:
        wanted = "test"
    elif wanted is None or wanted in ("all", "train"):
        trained = _trained_with(labelled, tasks)
        if wanted is None:
            wanted = "test" if trained and WHOLE in labelled.splits else "val" if trained else "all"
            if trained:
                notes += (f"{trained} was trained with this data: its {wanted} split, held out then, is evaluated",)
        elif trained:
            notes += (f"{trained} was trained with these images: the figures say nothing about new ones",)
    images = _images(labelled, wanted)
    if not len(images):
        raise DataError(f"{labelled.description}: the {wanted} split is empty: choose another --split")
    return Sample(labelled.description, wanted, labelled.classes, images, notes)


def _images(labelled: Labelled, wanted: SplitName) -> Split:
    if wanted == "all":
        return _joined([labelled.splits[name] for name in labelled.splits])
    if wanted in labelled.splits:
        return labelled.splits[wanted]
    if WHOLE not in labelled.splits and "train" not in labelled.splits:
        has = ", ".join(labelled.splits)
        raise DataError(f"{labelled.description}: --split {wanted}: expected one of {has}")
    splits = labelled.dataset().splits  # with what pear-train would hold out
    if wanted not in splits:
        has = ", ".join(splits)
        raise DataError(f"{labelled.description}: --split {wanted}: expected one of {has}")
    return splits[wanted]


def _joined(splits: list[Split]) -> Split:
    """Several splits as one."""
    if len(splits) == 1:
        return splits[0]
    places = [(split, i) for split in splits for i in range(len(split))]
    names = tuple(split.names[i] for split, i in places)
    return Split(
        lambda row: places[row][0].image(places[row][1]),
        torch.cat([split.targets for split in splits]),
        names,
    )


def _trained_with(labelled: Labelled, tasks: Iterable[Task]) -> str | None:
    """The first task that was trained with the same images in the same splits. None if there is none."""
    told = [(task, task.record.get("training", {}).get("data_fingerprint")) for task in tasks]
    if not any(fingerprint for _, fingerprint in told):
        return None
    try:
        found = labelled.dataset().fingerprint
    except DataError:  # the data cannot be used for training
        return None
    return next((task.name for task, fingerprint in told if fingerprint == found), None)
