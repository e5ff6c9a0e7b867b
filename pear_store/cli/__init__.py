"""The pear-store command: a thin twin of :class:`pear_store.Store`."""

from pear_store.cli import exchange, remote_upkeep, remotes, tasks, ui, upkeep
from pear_store.cli.group import main

__all__ = ["exchange", "main", "remote_upkeep", "remotes", "tasks", "ui", "upkeep"]
