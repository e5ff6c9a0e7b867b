"""A content-addressed store of tasks: each distinct tensor once, across tasks and versions."""

from pear_store.checkpoint import Branch, Task, make_task, read_checkpoint, write_checkpoint
from pear_store.digest import Digest, RawTensor, tensor_digest
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
from pear_store.gc import GcResult
from pear_store.integrity import Damage, Repaired, Report, repair, verify
from pear_store.loading import Refused
from pear_store.reading import Access, read_source
from pear_store.recovery import Rebuilt, rebuild
from pear_store.store import Added, Diff, PositionDiff, Stats, Store, Version

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
