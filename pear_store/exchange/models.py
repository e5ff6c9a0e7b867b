"""Finds what writes tasks as models that need no Pear. That code needs torch, so an entry point names it."""

from collections.abc import Callable
from typing import Any, Literal

from pear_store.errors import PearStoreError

EXPORTS = "pear_store.exports"
"""The group of entry points. Each is a function (task, file, *, name, weights, force) -> what was written."""
Kind = Literal["timm", "onnx"]


def exporter(kind: Kind) -> Callable[..., dict[str, Any]]:
    """The function that writes a task as a model of this kind.

    Raises:
        PearStoreError: no such function is installed.
    """
    from importlib.metadata import entry_points  # as slow to import as all of pear_store

    for entry in entry_points(group=EXPORTS, name=kind):
        export: Callable[..., dict[str, Any]] = entry.load()
        return export
    raise PearStoreError(f"nothing installed here writes {kind} models: reinstall pear-adapters")
