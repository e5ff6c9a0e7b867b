"""What can go wrong while training.

PearTrainError
├── ConfigError      options that contradict each other, the backbone, or what lies where a run is to write
├── DataError        a data set that cannot be used: where, what was looked for, what was found
├── DivergedError    weights, loss or logits that are no finite numbers any more
└── ResourceError    a disk or a memory that does not hold what the run needs
"""


class PearTrainError(Exception):
    """Base of all errors of pear_train; its text is one line for a person."""


class ConfigError(PearTrainError):
    pass


class DataError(PearTrainError):
    pass


class DivergedError(PearTrainError):
    def __init__(self, task: str, found: str, lr: float) -> None:
        super().__init__(f"{task}: training diverged: {found}; lower the learning rate, it is {lr:g}")


class ResourceError(PearTrainError):
    pass
