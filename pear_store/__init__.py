"""A content-addressed store of tasks: each distinct tensor once, across tasks and versions."""

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
from pear_store.local.rebuild import Rebuilt, rebuild
from pear_store.local.references import Version
from pear_store.local.repair import Repaired, repair
from pear_store.local.sources import Access, read_source
from pear_store.local.stats import Stats
from pear_store.local.verify import Damage, Report, verify
from pear_store.store import Store

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
