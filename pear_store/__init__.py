"""A content-addressed store of tasks: each distinct tensor once, across tasks and versions."""

from pear_store.checkpoint import Branch, Task, make_task, read_checkpoint, write_checkpoint
from pear_store.digest import Digest, RawTensor, tensor_digest
from pear_store.errors import (
    CheckpointError,
    DamagedError,
    DiskFullError,
    FormatError,
    NameTakenError,
    NotFoundError,
    PearStoreError,
)
from pear_store.store import Added, GcResult, Refused, Stats, Store, Version

__all__ = [
    "Added",
    "Branch",
    "CheckpointError",
    "DamagedError",
    "Digest",
    "DiskFullError",
    "FormatError",
    "GcResult",
    "NameTakenError",
    "NotFoundError",
    "PearStoreError",
    "RawTensor",
    "Refused",
    "Stats",
    "Store",
    "Task",
    "Version",
    "make_task",
    "read_checkpoint",
    "tensor_digest",
    "write_checkpoint",
]
