"""Labelled images in three splits, from the layouts people have."""

from pear_train.data.augment import augment
from pear_train.data.dataset import Dataset, Split
from pear_train.data.open import open_dataset
from pear_train.data.options import DataOptions
from pear_train.data.pixels import Pixels, read_pictures
from pear_train.data.preprocess import preprocess_record

__all__ = [
    "DataOptions",
    "Dataset",
    "Pixels",
    "Split",
    "augment",
    "open_dataset",
    "preprocess_record",
    "read_pictures",
]
