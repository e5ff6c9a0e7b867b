"""Labelled images in three splits, from the layouts people have."""

from pear_train.data.augment import augment
from pear_train.data.dataset import Dataset, Pixels, Split
from pear_train.data.open import open_dataset

__all__ = ["Dataset", "Pixels", "Split", "augment", "open_dataset"]
