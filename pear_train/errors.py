"""What can go wrong while training.

PearTrainError
├── ConfigError    options that contradict each other or the backbone
└── DataError      a data set that cannot be used: where, what was looked for, what was found
"""


class PearTrainError(Exception):
    """Base of all errors of pear_train; its text is one line for a person."""


class ConfigError(PearTrainError):
    pass


class DataError(PearTrainError):
    pass
