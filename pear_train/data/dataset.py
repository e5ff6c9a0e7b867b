"""A data set, as the trainer sees it."""

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
"""The most faults in one message."""
MOST_SHOWN = 60
"""The most classes in one line."""
UNEVEN = 10
"""A warning is given if a class has this many times the training images of another."""


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled images of one split, by number from 0 to n - 1."""

    image: Callable[[int], ImageLike]
    """Gives the image of a number."""
    targets: Tensor
    """Class numbers, int64 [n]."""
    names: tuple[str, ...] = ()
    """Names of the images within the data set, such as ``cat/1.jpg``. By default their numbers."""

    def __post_init__(self) -> None:
        if not self.names:
            object.__setattr__(self, "names", tuple(map(str, range(len(self.targets)))))

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, indices: Tensor) -> "Split":
        """The images of these numbers, int64 [m], in this order."""
        chosen = indices.tolist()
        return Split(
            lambda i: self.image(chosen[i]), self.targets[indices], tuple(self.names[index] for index in chosen)
        )


@dataclass(frozen=True)
class Dataset:
    """Three splits of labelled images.

    Raises:
        DataError: fewer than two classes, bad or equal class names, labels without a class, an empty split, or a class
            without a training image. The message lists all faults.
    """

    description: str
    """Where the data is, and which kind of data set it is."""
    classes: tuple[str, ...]
    """Names of the classes, by class number."""
    train: Split
    val: Split
    test: Split | None
    """None if there is no test split."""
    all_in_train: bool = True
    """Whether a class without a training image is refused. VTAB-1k has such classes."""
    notes: tuple[str, ...] = ()
    """What was left out, and why."""
    cautions: tuple[str, ...] = ()
    """Warnings about the pictures. `warnings` gives them, too."""
    skip_unreadable: bool = False
    """Whether pictures that cannot be read are left out. By default the data is refused."""
    limits: Limits = LIMITS
    """Limits for opening pictures."""
    unreadable: tuple[str, ...] = ()
    """The images that were left out because they cannot be read, each with the reason."""
    opened: "Dataset | None" = None
    """The same data set with its unreadable images, if some were left out."""

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
        """Split -> number of images of each class, by class number."""
        return {
            name: torch.bincount(split.targets, minlength=len(self.classes)).tolist()
            for name, split in self.splits.items()
        }

    @property
    def unreadable_counts(self) -> dict[str, int]:
        """Split -> number of images that were left out because they cannot be read. Splits with none are missing."""
        whole = {} if self.opened is None else self.opened.splits
        missing = {name: len(split) - len(self.splits[name]) for name, split in whole.items()}
        return {name: count for name, count in missing.items() if count}

    def warnings(self) -> Iterator[str]:
        """Warnings for a person before training, a line each."""
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
                f"uneven classes: {most} training images of {of_most!r}, {least} of {of_least!r}. Top-1 hides the "
                "mistakes in rare classes: look at the recall of each class, and try --balance"
            )

    @property
    def splits(self) -> dict[str, Split]:
        """The splits by name: train, val and, if there is one, test."""
        named = {"train": self.train, "val": self.val, "test": self.test}
        return {name: split for name, split in named.items() if split is not None}

    @cached_property
    def fingerprint(self) -> str:
        """A sha256, in hex, of class names and of every picture: its split, name within the data set, class, content.

        It does not depend on the data's path, on file times, or on the options of a run. The first access reads every
        file once, without decoding it; later ones are free. The content is a file's bytes, an array's values or, for a
        data set that timm opens, the decoded pixels. It includes images that cannot be read, so it is the same before
        and after they are left out.
        """
        if self.opened is not None:
            return self.opened.fingerprint
        return fingerprint(
            self.classes,
            [(name, split.names, split.targets.tolist(), split.image) for name, split in self.splits.items()],
        )

    def table(self) -> str:
        """The number of images of each class in each split: ``cat 8/1/1``. At most MOST_SHOWN classes are listed."""
        columns = zip(*self.counts.values(), strict=True)
        names = map(shown_label, self.classes)
        cells = [f"{name} {'/'.join(map(str, counts))}" for name, counts in zip(names, columns, strict=True)]
        more = [f"and {len(cells) - MOST_SHOWN} more"] if len(cells) > MOST_SHOWN else []
        return f"{'/'.join(self.splits)}: " + ", ".join([*cells[:MOST_SHOWN], *more])

    def balance(self) -> str:
        """How even the classes of train are, with the names of the most and the least frequent one."""
        train = self.counts["train"]
        most, least = max(train), min(train)
        if most == least:
            return f"even: {most} training images of each class"
        names = [shown_label(self.classes[train.index(count)]) for count in (most, least)]
        ratio = f", {most / least:.1f} to 1" if least else ""
        return f"{most} training images of {names[0]!r}, {least} of {names[1]!r}{ratio}"

    def summary(self, name: str) -> str:
        """Lines for a person: the kind of data set, its classes, what was left out, and warnings.

        Args:
            name: the data's name in warnings.
        """
        lines = [
            f"data      {self.description}; {self.sizes()}",
            f"classes   {self.table()}",
            f"balance   {self.balance()}",
        ]
        lines += [f"skipped   {note}" for note in self.notes]
        return "\n".join([*lines, *(f"Warning: {name}: {warning}" for warning in self.warnings())])

    def sizes(self) -> str:
        """The number of classes, and of images in each split, for a person."""
        test = "no" if self.test is None else len(self.test)
        return f"{len(self.classes)} classes; {len(self.train)} train, {len(self.val)} val, {test} test images"


def labels_without_class(splits: Mapping[str, Split], classes: int) -> list[str]:
    """A line for each split that has labels outside of 0..classes - 1."""
    found = []
    for name, split in splits.items():
        low, high = (int(split.targets.min()), int(split.targets.max())) if len(split) else (0, 0)
        if len(split) and not 0 <= low <= high < classes:
            found.append(f"{name} labels {low}..{high}, expected 0..{classes - 1}")
    return found


def listed(names: list[str]) -> str:
    """The first 10 names, for a message."""
    return ", ".join(repr(shown_label(name)) for name in names[:10]) + (
        f" and {len(names) - 10} more" if len(names) > 10 else ""
    )


def _bare(name: str) -> str:
    """A form that is equal for names that people may confuse: " cat" and Cat, 01 and 1.0."""
    text = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
    number = _NUMBER.fullmatch(text)
    return text if number is None else number["whole"] + (number["part"] or "").rstrip("0").rstrip(".")


_NUMBER = re.compile(r"0*(?P<whole>\d+)(?P<part>\.\d*)?", re.ASCII)


def hold_out(split: Split, share: float, salt: str) -> tuple[Tensor, Tensor]:
    """Divides a split's numbers into (rest, held out), class by class and always in the same way.

    A hash of an image's name decides. Images with a hash below `share` are held out, and always the one with the lowest
    hash of its class. So an added or removed image moves no other image, except where a class has only one image held
    out. A class with at least two images has at least one on each side.

    Args:
        share: 0 to 1.
        salt: different salts give independent choices.
    Returns:
        Two tensors of numbers in order, int64.
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
    """A number in 0..1 that depends only on the name."""
    data = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(data[:8], "big") / 2**64


def raise_all(faults: list[str], told: str | None = None) -> None:
    """Raises a DataError with all faults, if there are any: a line `told`, then a line for each fault."""
    if len(faults) == 1 and told is None:
        raise DataError(faults[0])
    if faults:
        named = [fault.replace("\n", "\\n") for fault in faults[:MOST_FAULTS]]  # file names may hold line breaks
        lines = [told or f"{len(faults)} faults in the data:", *named]
        lines += [f"and {len(faults) - MOST_FAULTS} more"] if len(faults) > MOST_FAULTS else []
        raise DataError("\n  ".join(lines))


def numbered(described: str, count: int) -> tuple[str, ...]:
    """The numbers 0 to count - 1 as names, for classes without names.

    Raises:
        DataError: there are more than `MOST_CLASSES`.
    """
    if count > MOST_CLASSES:
        raise DataError(f"{described}: class number {count - 1}: expected 0 to {MOST_CLASSES - 1}")
    return tuple(map(str, range(count)))
