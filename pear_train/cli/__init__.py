"""The pear-train command: a thin twin of :func:`pear_train.train` and :func:`pear_train.train_many`."""

from pear_train.cli.command import main

__all__ = ["main"]
