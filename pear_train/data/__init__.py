"""Labelled images in three splits, from the usual kinds of data sets."""

from pear_train.data.augment import augment
from pear_train.data.dataset import Dataset, Split
from pear_train.data.labelled import WHOLE, Labelled
from pear_train.data.open import open_dataset, open_labelled
from pear_train.data.options import DataOptions
from pear_train.data.pixels import Pixels, read_pictures
from pear_train.data.preprocess import preprocess_record

__all__ = [
    "WHOLE",
    "DataOptions",
    "Dataset",
    "Labelled",
    "Pixels",
    "Split",
    "augment",
    "open_dataset",
    "open_labelled",
    "preprocess_record",
    "read_pictures",
]
