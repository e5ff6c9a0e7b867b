"""Tasks as models that need no Pear. What writes them knows torch, so it is found by its entry point."""

from collections.abc import Callable
from typing import Any, Literal

from pear_store.errors import PearStoreError

EXPORTS = "pear_store.exports"
"""The group of entry points; each is a function (task, file, *, name, weights, force) -> what was written."""
Kind = Literal["timm", "onnx"]


def exporter(kind: Kind) -> Callable[..., dict[str, Any]]:
    """What writes a task as a model of some kind.

    Raises:
        PearStoreError: nothing that can is installed.
    """
    from importlib.metadata import entry_points  # as slow to import as all of pear_store

    for entry in entry_points(group=EXPORTS, name=kind):
        export: Callable[..., dict[str, Any]] = entry.load()
        return export
    raise PearStoreError(f"nothing installed here writes {kind} models: install pear-adapters anew")
