"""Labelled images in three splits, from the layouts people have."""

from pear_train.data.augment import augment
from pear_train.data.dataset import Dataset, Pixels, Split, read_pictures
from pear_train.data.open import open_dataset
from pear_train.data.options import DataOptions

__all__ = ["DataOptions", "Dataset", "Pixels", "Split", "augment", "open_dataset", "read_pictures"]
