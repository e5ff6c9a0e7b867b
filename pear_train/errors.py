"""What can go wrong while training.

PearTrainError
├── ConfigError      options contradict each other, the backbone, or a file at the output's path
├── DataError        a data set cannot be used: where it is, what was expected, what was found
├── DivergedError    weights, loss or logits are no longer finite
└── ResourceError    the disk or the memory is too small for the run
"""


class PearTrainError(Exception):
    """Base of all errors of pear_train. Its text is one line for a person."""


class ConfigError(PearTrainError):
    """Options contradict each other, the backbone, or a file at the output's path."""


class DataError(PearTrainError):
    """A data set cannot be used. The text says where it is, what was expected and what was found."""


class DivergedError(PearTrainError):
    """Weights, loss or logits are no longer finite numbers."""

    def __init__(self, task: str, found: str, lr: float) -> None:
        super().__init__(f"{task}: training diverged: {found}; lower the learning rate, it is {lr:g}")


class ResourceError(PearTrainError):
    """The disk or the memory is too small for the run."""
