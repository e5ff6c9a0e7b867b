"""Options for data that is not recognised by itself."""

from dataclasses import dataclass

from pear_train.errors import ConfigError
from router.pictures import MAX_PIXELS

NO_SPLIT = "none"
"""Given as the name of a split: there is no such split, even if a folder has its name."""


@dataclass(frozen=True)
class DataOptions:
    """How a data set is read. A split that is None is recognised by its folder's name."""

    train_split: str | None = None
    val_split: str | None = None
    """A folder's name. "none": there is none, so it is taken from train."""
    test_split: str | None = None
    """A folder's name. "none": there is none."""
    no_splits: bool = False
    """Whether all folders are classes, even if they are called train or test."""
    skip_unreadable: bool = False
    """Whether pictures that cannot be read are left out. By default the data is refused."""
    max_pixels: int = MAX_PIXELS
    """Pictures with more pixels are refused before they are decoded."""

    def __post_init__(self) -> None:
        if self.max_pixels < 1:
            raise ConfigError(f"max pixels {self.max_pixels}: expected at least 1")
        if self.no_splits and any(self.named.values()):
            raise ConfigError("no splits: all folders are classes, so no folder can be named as a split")
        if self.train_split == NO_SPLIT:
            raise ConfigError("train split 'none': expected a folder; give no splits if the folders are classes")

    @property
    def named(self) -> dict[str, str | None]:
        """The given name of each split."""
        return {"train": self.train_split, "val": self.val_split, "test": self.test_split}

    @property
    def of_folders(self) -> bool:
        """Whether an option was given that only makes sense for an image folder."""
        return self.no_splits or any(self.named.values())
