"""Trains tasks: adapter sets on a frozen backbone, pruned and shared."""

from pear_store.version import __version__ as __version__
from pear_train.config import TrainConfig
from pear_train.data import Dataset, Split, open_dataset
from pear_train.errors import ConfigError, DataError, DivergedError, PearTrainError, ResourceError
from pear_train.job import Job
from pear_train.loop import train, train_many
from pear_train.make_base import Base, train_base
from pear_train.make_bases import Bases, make_backbone_bases, make_bases
from pear_train.plot import plot_result
from pear_train.report import Failed, Result, Step
from pear_train.tasks import TaskEntry, read_tasks

__all__ = [
    "Base",
    "Bases",
    "ConfigError",
    "DataError",
    "Dataset",
    "DivergedError",
    "Failed",
    "Job",
    "PearTrainError",
    "ResourceError",
    "Result",
    "Split",
    "Step",
    "TaskEntry",
    "TrainConfig",
    "make_backbone_bases",
    "make_bases",
    "open_dataset",
    "plot_result",
    "read_tasks",
    "train",
    "train_base",
    "train_many",
]
