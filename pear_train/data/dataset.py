"""What a data set is to the trainer, and how images become batches."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pear_train.data.fingerprint import fingerprint
from pear_train.errors import DataError
from router import Preprocess
from router.preprocess import ImageLike

LOOKED_FOR = (
    "a folder with one folder of images per class (or train/, val/ and test/ of such), a VTAB-1k folder with "
    "train800.txt, a .npz file with x_train and y_train, or a name that timm.data.create_dataset knows, such as "
    "torch/cifar10 or hfds/ORG/NAME"
)

CACHE_BYTES = 4 * 1024**3
"""Pixels of a split are kept in memory up to this size, and decoded anew for every batch beyond it."""


@dataclass(frozen=True)
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

    def __post_init__(self) -> None:
        for name, split in self.splits.items():
            if len(split) == 0:
                raise DataError(f"{self.description}: the {name} split is empty")
            if int(split.targets.min()) < 0 or int(split.targets.max()) >= len(self.classes):
                found = f"{int(split.targets.min())}..{int(split.targets.max())}"
                raise DataError(f"{self.description}: {name} labels {found}, expected 0..{len(self.classes) - 1}")
        counts = torch.bincount(self.train.targets, minlength=len(self.classes))
        if self.all_in_train and (counts == 0).any():
            missing = self.classes[int((counts == 0).nonzero()[0])]
            raise DataError(f"{self.description}: class {missing!r} has no training image")

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
        or, of a data set that timm opens, the decoded pixels.
        """
        return fingerprint(
            self.classes,
            [(name, split.names, split.targets.tolist(), split.image) for name, split in self.splits.items()],
        )

    def sizes(self) -> str:
        test = "no" if self.test is None else len(self.test)
        return f"{len(self.classes)} classes; {len(self.train)} train, {len(self.val)} val, {test} test images"


class Pixels:
    """A split's images at the input size, decoded once if they fit into memory."""

    def __init__(self, split: Split, preprocess: Preprocess) -> None:
        self._split, self._preprocess = split, preprocess
        self.targets = split.targets
        self._cache: Tensor | None = None
        if len(split) * 3 * preprocess.size[0] * preprocess.size[1] <= CACHE_BYTES:
            self._cache = self._decode(range(len(split)))

    def __len__(self) -> int:
        return len(self.targets)

    def images(self, indices: Tensor) -> Tensor:
        """Normalised float32 [batch, 3, h, w]."""
        pixels = self._decode(indices.tolist()) if self._cache is None else self._cache[indices]
        return self._preprocess.normalise(pixels)

    def _decode(self, indices: "range | list[int]") -> Tensor:
        with ThreadPoolExecutor() as workers:  # Pillow decodes and resizes without the GIL
            return torch.stack(list(workers.map(lambda i: self._preprocess.pixels(self._split.image(i)), indices)))


def hold_out(targets: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Splits indices in two, class by class and always the same way: (rest, held out).

    Every class with at least two images gives at least one to each side.
    """
    generator = torch.Generator().manual_seed(0)
    rest, held = [], []
    for label in sorted(set(targets.tolist())):
        indices = (targets == label).nonzero().flatten()
        indices = indices[torch.randperm(len(indices), generator=generator)]
        count = min(max(1, round(share * len(indices))), len(indices) - 1)
        held.append(indices[:count])
        rest.append(indices[count:])
    return torch.cat(rest).sort().values, torch.cat(held).sort().values
