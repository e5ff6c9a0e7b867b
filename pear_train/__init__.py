"""Trains tasks: adapter sets on a frozen backbone, pruned and shared."""

from pear_train.config import TrainConfig
from pear_train.data import Dataset, Split, open_dataset
from pear_train.errors import ConfigError, DataError, PearTrainError
from pear_train.loop import Result, Step, train

__all__ = [
    "ConfigError",
    "DataError",
    "Dataset",
    "PearTrainError",
    "Result",
    "Split",
    "Step",
    "TrainConfig",
    "open_dataset",
    "train",
]
