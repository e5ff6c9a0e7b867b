"""The pear-store command: a thin twin of :class:`pear_store.Store`."""

from pear_store.cli import exchange, remotes, tasks, upkeep
from pear_store.cli.group import main

__all__ = ["exchange", "main", "remotes", "tasks", "upkeep"]
