"""What a data set is to the trainer."""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pear_store.format.checkpoint import CONTROL, shown_label
from pear_train.data.fingerprint import fingerprint
from pear_train.errors import DataError
from router import Limits
from router.pictures import LIMITS, ImageLike

LOOKED_FOR = (
    "a folder with one folder of images per class (or train/, val/ and test/ of such), a VTAB-1k folder with "
    "train800.txt, a folder of Hugging Face datasets, a list of images (.csv, .tsv, .jsonl, .parquet), a .npz file "
    "with x_train and y_train, or a name that timm.data.create_dataset knows, such as torch/cifar10 or hfds/ORG/NAME"
)

MOST_CLASSES = 100_000
MOST_FAULTS = 1_000
"""Faults that one message lists."""
MOST_SHOWN = 60
"""Classes that one line lists."""
UNEVEN = 10
"""A class with so many times the training images of another is worth a warning."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images by number, and their class indices: int64 [n]."""

    image: Callable[[int], ImageLike]
    targets: Tensor
    names: tuple[str, ...] = ()
    """Of the images within the data set, such as ``cat/1.jpg``; where a layout has no names, their numbers."""

    def __post_init__(self) -> None:
        if not self.names:
            object.__setattr__(self, "names", tuple(map(str, range(len(self.targets)))))

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, indices: Tensor) -> "Split":
        chosen = indices.tolist()
        return Split(
            lambda i: self.image(chosen[i]), self.targets[indices], tuple(self.names[index] for index in chosen)
        )


@dataclass(frozen=True)
class Dataset:
    """Three splits of labelled images; `test` may be absent. `description` says what the data was taken for."""

    description: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split | None
    all_in_train: bool = True
    """Refuse a class without a training image; VTAB-1k has such."""
    notes: tuple[str, ...] = ()
    """What was left out, and why."""
    cautions: tuple[str, ...] = ()
    """What a person should know of the pictures; `warnings` says it."""
    skip_unreadable: bool = False
    """Train without pictures that cannot be read, rather than refuse."""
    limits: Limits = LIMITS
    """What may be opened as a picture."""
    unreadable: tuple[str, ...] = ()
    """The images that it is without because they could not be read, with the reason."""
    opened: "Dataset | None" = None
    """The same with its unreadable images."""

    def __post_init__(self) -> None:
        raise_all([f"{self.description}: {fault}" for fault in self._faults()])

    def _faults(self) -> Iterator[str]:
        if len(self.classes) < 2:
            yield f"{f'only one class, {self.classes[0]!r}' if self.classes else 'no class'}: expected at least two"
        for name in self.classes:
            if CONTROL.search(name):
                yield f"class {name!r}: expected a name in UTF-8 without line breaks or other control characters"
        for name, count in Counter(self.classes).items():
            if count > 1:
                yield f"class {name!r} is named {count} times: expected different names"
        yield from (f"the {name} split is empty" for name, split in self.splits.items() if len(split) == 0)
        odd = labels_without_class(self.splits, len(self.classes))
        yield from odd
        if self.all_in_train and not odd:
            for name, count in zip(self.classes, self.counts["train"], strict=True):
                if count == 0:
                    yield f"class {name!r} has no training image"

    @cached_property
    def counts(self) -> dict[str, list[int]]:
        """For each split, how many images each class has."""
        return {
            name: torch.bincount(split.targets, minlength=len(self.classes)).tolist()
            for name, split in self.splits.items()
        }

    @property
    def unreadable_counts(self) -> dict[str, int]:
        """How many images each split is without because they could not be read; only splits that lack some."""
        whole = {} if self.opened is None else self.opened.splits
        missing = {name: len(split) - len(self.splits[name]) for name, split in whole.items()}
        return {name: count for name, count in missing.items() if count}

    def warnings(self) -> Iterator[str]:
        """What a person should know before training, a line each."""
        yield from self.cautions
        train = self.counts["train"]
        few = [name for name, count in zip(self.classes, train, strict=True) if count < 2]
        if few:
            yield f"fewer than 2 training images: {listed(few)}"
        alike: dict[str, list[str]] = {}
        for name in self.classes:
            alike.setdefault(_bare(name), []).append(name)
        for names in alike.values():
            if len(names) > 1:
                also = ", spaces or zeros" if len({name.casefold() for name in names}) > 1 else ""
                yield f"classes whose names differ only by case{also}: {listed(names)}"
        most, least = max(train), min(train)
        if most >= UNEVEN * max(1, least):
            of_most, of_least = (shown_label(self.classes[train.index(count)]) for count in (most, least))
            yield (
                f"uneven classes: {most} training images of {of_most!r}, {least} of {of_least!r}; top-1 hides how a "
                "rare class does: look at the recall of each class, and try --balance"
            )

    @property
    def splits(self) -> dict[str, Split]:
        """The splits that there are, by name: train, val and, where it is not absent, test."""
        named = {"train": self.train, "val": self.val, "test": self.test}
        return {name: split for name, split in named.items() if split is not None}

    @cached_property
    def fingerprint(self) -> str:
        """A sha256, in hex, of class names and of every picture: its split, name within the data set, class, content.

        It does not depend on where the data lies, on file times, or on the options of a run. The first look reads every
        file once (it does not decode them); later looks cost nothing. The content is a file's bytes, an array's values
        or, of a data set that timm opens, the decoded pixels. Images that turn out to be unreadable are part of it, so
        it is the same before and after they are left out.
        """
        if self.opened is not None:
            return self.opened.fingerprint
        return fingerprint(
            self.classes,
            [(name, split.names, split.targets.tolist(), split.image) for name, split in self.splits.items()],
        )

    def table(self) -> str:
        """Every class with its images in each split, several a line: ``cat 8/1/1``. Of very many, the first."""
        columns = zip(*self.counts.values(), strict=True)
        names = map(shown_label, self.classes)
        cells = [f"{name} {'/'.join(map(str, counts))}" for name, counts in zip(names, columns, strict=True)]
        more = [f"and {len(cells) - MOST_SHOWN} more"] if len(cells) > MOST_SHOWN else []
        return f"{'/'.join(self.splits)}: " + ", ".join([*cells[:MOST_SHOWN], *more])

    def balance(self) -> str:
        """How even the classes of train are, with the most and the least frequent one by name."""
        train = self.counts["train"]
        most, least = max(train), min(train)
        if most == least:
            return f"even: {most} training images of each class"
        names = [shown_label(self.classes[train.index(count)]) for count in (most, least)]
        ratio = f", {most / least:.1f} to 1" if least else ""
        return f"{most} training images of {names[0]!r}, {least} of {names[1]!r}{ratio}"

    def summary(self, name: str) -> str:
        """Lines for a person: what the data was taken for, its classes, and what to know of it."""
        lines = [
            f"data      {self.description}; {self.sizes()}",
            f"classes   {self.table()}",
            f"balance   {self.balance()}",
        ]
        lines += [f"skipped   {note}" for note in self.notes]
        return "\n".join([*lines, *(f"Warning: {name}: {warning}" for warning in self.warnings())])

    def sizes(self) -> str:
        test = "no" if self.test is None else len(self.test)
        return f"{len(self.classes)} classes; {len(self.train)} train, {len(self.val)} val, {test} test images"


def labels_without_class(splits: Mapping[str, Split], classes: int) -> list[str]:
    """A line for each split whose labels are not all numbers of classes."""
    found = []
    for name, split in splits.items():
        low, high = (int(split.targets.min()), int(split.targets.max())) if len(split) else (0, 0)
        if len(split) and not 0 <= low <= high < classes:
            found.append(f"{name} labels {low}..{high}, expected 0..{classes - 1}")
    return found


def listed(names: list[str]) -> str:
    """The first of some names, for a message."""
    return ", ".join(repr(shown_label(name)) for name in names[:10]) + (
        f" and {len(names) - 10} more" if len(names) > 10 else ""
    )


def _bare(name: str) -> str:
    """What a name has in common with others that people may take for it: Cat for " cat", 1.0 for 01."""
    text = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
    number = _NUMBER.fullmatch(text)
    return text if number is None else number["whole"] + (number["part"] or "").rstrip("0").rstrip(".")


_NUMBER = re.compile(r"0*(?P<whole>\d+)(?P<part>\.\d*)?", re.ASCII)


def hold_out(split: Split, share: float, salt: str) -> tuple[Tensor, Tensor]:
    """Splits a split's indices in two, class by class and always the same way: (rest, held out).

    An image's own name decides: those are held out whose hash lies below `share`, and the one with the lowest hash of
    each class. So an image that comes or goes moves no other, unless it is the only one of its class that is held out.
    Every class with at least two images gives at least one to each side.

    Args:
        salt: makes choices independent of each other.
    """
    chance = [_hash(f"{salt}/{name}") for name in split.names]
    of_class: dict[int, list[int]] = {}
    for index, label in enumerate(split.targets.tolist()):
        of_class.setdefault(label, []).append(index)
    held = []
    for indices in of_class.values():
        indices.sort(key=lambda index: chance[index])
        count = max(1, sum(chance[index] < share for index in indices))
        held += indices[: min(count, len(indices) - 1)]
    rest = sorted(set(range(len(split))).difference(held))
    return torch.tensor(rest, dtype=torch.long), torch.tensor(sorted(held), dtype=torch.long)


def _hash(name: str) -> float:
    """A number in 0..1 that a name always has."""
    data = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(data[:8], "big") / 2**64


def raise_all(faults: list[str], told: str | None = None) -> None:
    """Raises a DataError with all faults, one a line, if there are any; after a line that says what they are."""
    if len(faults) == 1 and told is None:
        raise DataError(faults[0])
    if faults:
        named = [fault.replace("\n", "\\n") for fault in faults[:MOST_FAULTS]]  # of file names
        lines = [told or f"{len(faults)} faults in the data:", *named]
        lines += [f"and {len(faults) - MOST_FAULTS} more"] if len(faults) > MOST_FAULTS else []
        raise DataError("\n  ".join(lines))


def numbered(described: str, count: int) -> tuple[str, ...]:
    """Names of classes that have none: their numbers.

    Raises:
        DataError: more than `MOST_CLASSES`.
    """
    if count > MOST_CLASSES:
        raise DataError(f"{described}: class number {count - 1}: expected 0 to {MOST_CLASSES - 1}")
    return tuple(map(str, range(count)))
