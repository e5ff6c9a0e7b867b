"""The tasks' answers for images, through the router. Each image is decoded once for all tasks."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pear_store import Task
from pear_store.counted import counted
from pear_train.data import Split
from pear_train.data.dataset import listed
from pear_train.errors import ConfigError, DataError
from router import ImageError, Predictions, Router
from router.pictures import ImageLike

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Subject:
    """A task to evaluate."""

    shown: str
    """Its name in messages and reports: ``dtd@2``, or its file."""
    name: str
    """Its name in the router."""
    task: Task
    version: int | None = None
    """Its version in the store. None for a file."""

    def numbers_of(self, classes: Sequence[str]) -> Ints:
        """The task's number of each class of the data, int64 [class]. -1 if the task does not have the class."""
        numbers = {label: i for i, label in enumerate(self.task.labels)}
        return np.array([numbers.get(name, -1) for name in classes], np.int64)


@dataclass(frozen=True, eq=False)
class Answers:
    """Answers for the images that all tasks could answer."""

    rows: Ints
    """Numbers of these images in the split."""
    probabilities: dict[str, Floats]
    """Name of the task in the router -> float32 [image, class]."""
    unreadable: dict[int, str]
    """Number of each other image -> why it has no answer."""


def check_subjects(subjects: Sequence[Subject]) -> None:
    """Raises a ConfigError for a task without classes."""
    for subject in subjects:
        if not subject.task.labels:
            raise ConfigError(f"{subject.shown}: expected a task with classes, found one without a head")


def check_classes(data: str, classes: Sequence[str], subjects: Sequence[Subject]) -> None:
    """Raises a DataError if the data has classes that a task does not have."""
    for subject in subjects:
        labels = subject.task.labels
        odd = [name for name in classes if name not in set(labels)]
        if not odd:
            continue
        near = {name: difflib.get_close_matches(name.casefold(), [x.casefold() for x in labels], 1) for name in odd}
        folded = {label.casefold(): label for label in labels}
        hints = [f"{name!r} is similar to {folded[found[0]]!r}" for name, found in near.items() if found]
        hint = f" ({'; '.join(hints[:3])})" if hints else ""
        what = "class" if len(odd) == 1 else "classes"
        remedy = "rename them" if len(odd) < len(classes) else "check that this is the task's data, or rename them"
        also = ", or leave their images out with --known-only" if len(odd) < len(classes) else ""
        raise DataError(
            f"{data}: {what} {listed(odd)} not known to task {subject.shown}, which has {listed(list(labels))}{hint}: "
            f"{remedy}{also}"
        )


def ask(
    router: Router, subjects: Sequence[Subject], images: Split, batch_size: int, tell: Callable[[int], Any]
) -> Answers:
    """Runs all images through all tasks.

    Args:
        batch_size: images per forward.
        tell: is called with the number of images after each batch.
    Raises:
        DataError: no image could be answered.
        RouterError, PearStoreError: a task cannot be run.
    """
    names = list(dict.fromkeys(subject.name for subject in subjects))
    unreadable: dict[int, str] = {}
    rows: list[int] = []
    found: dict[str, list[Floats]] = {name: [] for name in names}
    for start in range(0, len(images), batch_size):
        numbers = range(start, min(start + batch_size, len(images)))
        read = {number: _read(images, number) for number in numbers}
        unreadable |= {number: str(image) for number, image in read.items() if isinstance(image, ImageError)}
        opened = {number: image for number, image in read.items() if not isinstance(image, ImageError)}
        if opened:
            said = router.run_all(list(opened.values()), names, on_error="return")
            faults = _faults(said, [images.names[number] for number in opened], opened)
            unreadable |= {number: fault for number, fault in zip(opened, faults, strict=True) if fault is not None}
            answered = [row for row, fault in enumerate(faults) if fault is None]
            rows += [number for number, fault in zip(opened, faults, strict=True) if fault is None]
            for name in names if answered else ():
                found[name].append(torch.stack([said[name][row].probs for row in answered]).numpy())
        tell(len(numbers))
    if not rows:
        first = next(iter(unreadable.values()))
        raise DataError(f"none of {counted(len(images), 'image')} could be evaluated; the first: {first}")
    probabilities = {name: np.concatenate(parts) for name, parts in found.items()}
    return Answers(np.array(rows, np.int64), probabilities, dict(sorted(unreadable.items())))


def _read(images: Split, number: int) -> ImageLike | ImageError:
    """An image as the data gives it: a path, an array, or an image that timm decoded."""
    try:
        return images.image(number)
    except ImageError as error:
        return error
    except Exception as error:  # whatever a reader of timm, torchvision or datasets can raise
        reason = " ".join(str(error).split()) or type(error).__name__
        return ImageError(f"image {images.names[number]}: cannot be read: {reason}")


def _faults(said: Mapping[str, Predictions], names: Sequence[str], opened: Mapping[int, ImageLike]) -> list[str | None]:
    """For each image, why some task has no answer for it. None if all have one.

    Raises:
        RouterError, PearStoreError: a task failed, not an image.
    """
    faults: list[str | None] = [None] * len(names)
    for predictions in said.values():
        for error in predictions.failures.values():
            if not isinstance(error, ImageError):
                raise error
        for row, (name, image) in enumerate(zip(names, opened.values(), strict=True)):
            error_text = predictions.errors[row]
            if error_text is not None and faults[row] is None:
                faults[row] = error_text if isinstance(image, str) else f"image {name}: {error_text}"
    return faults
