"""A content-addressed store of tasks. It keeps each distinct tensor once, across tasks and versions."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pear_store.diff import Diff, PositionDiff
from pear_store.errors import (
    CheckpointError,
    DamagedError,
    DamagedIndexError,
    DiskFullError,
    FormatError,
    NameTakenError,
    NotFoundError,
    PearStoreError,
    SourceError,
    TaggedError,
)
from pear_store.format.checkpoint import Branch, Task, make_task, read_checkpoint, write_checkpoint
from pear_store.format.digest import Digest, RawTensor, tensor_digest
from pear_store.local.add import Added
from pear_store.local.gc import GcResult
from pear_store.local.loading import Refused
from pear_store.local.references import Version
from pear_store.local.sources import Access, read_source
from pear_store.local.stats import Stats
from pear_store.readable import ReadableStore
from pear_store.store import Store
from pear_store.version import __version__ as __version__

if TYPE_CHECKING:
    from pear_store.local.rebuild import Rebuilt, rebuild
    from pear_store.local.repair import Repaired, repair
    from pear_store.local.verify import Damage, Report, verify

__all__ = [
    "Access",
    "Added",
    "Branch",
    "CheckpointError",
    "Damage",
    "DamagedError",
    "DamagedIndexError",
    "Diff",
    "Digest",
    "DiskFullError",
    "FormatError",
    "GcResult",
    "NameTakenError",
    "NotFoundError",
    "PearStoreError",
    "PositionDiff",
    "RawTensor",
    "ReadableStore",
    "Rebuilt",
    "Refused",
    "Repaired",
    "Report",
    "SourceError",
    "Stats",
    "Store",
    "TaggedError",
    "Task",
    "Version",
    "make_task",
    "read_checkpoint",
    "read_source",
    "rebuild",
    "repair",
    "tensor_digest",
    "verify",
    "write_checkpoint",
]

_LATER = {
    "Rebuilt": "rebuild", "rebuild": "rebuild", "Repaired": "repair", "repair": "repair",
    "Damage": "verify", "Report": "verify", "verify": "verify",
}  # fmt: skip
"""Names, with their modules in pear_store.local, that are imported at first use: few programs need them"""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.local.{_LATER[name]}"), name)
