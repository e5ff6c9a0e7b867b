"""What a user may say of the data, where it is not to be recognised."""

from dataclasses import dataclass

from pear_train.errors import ConfigError
from router.pictures import MAX_PIXELS

NO_SPLIT = "none"
"""As the name of a split: there is none, whatever the folders are called."""


@dataclass(frozen=True)
class DataOptions:
    """How a data set is read. A split that is None is recognised by its folder's name."""

    train_split: str | None = None
    val_split: str | None = None
    """A folder's name; "none": there is none, so it is held out of train."""
    test_split: str | None = None
    """A folder's name; "none": there is none."""
    no_splits: bool = False
    """The folders are classes, whatever they are called."""
    skip_unreadable: bool = False
    """Train without pictures that cannot be read, rather than refuse."""
    max_pixels: int = MAX_PIXELS
    """Pictures with more are refused before they are decoded."""

    def __post_init__(self) -> None:
        if self.max_pixels < 1:
            raise ConfigError(f"max pixels {self.max_pixels}: expected at least 1")
        if self.no_splits and any(self.named.values()):
            raise ConfigError("no splits: all folders are classes, so no folder can be named as a split")
        if self.train_split == NO_SPLIT:
            raise ConfigError("train split 'none': expected a folder; say no splits if the folders are classes")

    @property
    def named(self) -> dict[str, str | None]:
        """What was said of each split."""
        return {"train": self.train_split, "val": self.val_split, "test": self.test_split}

    @property
    def of_folders(self) -> bool:
        """Whether anything was said that makes sense for an image folder only."""
        return self.no_splits or any(self.named.values())
