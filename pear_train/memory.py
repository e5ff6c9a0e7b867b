"""Turns an out-of-memory error into a ResourceError."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pear_train.errors import ResourceError


@contextmanager
def memory_named(task: str) -> Iterator[None]:
    """Turns an out-of-memory error into a ResourceError that names the task and what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # for a CPU's memory, torch raises a RuntimeError with a text
        short = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not short:
            raise
        raise ResourceError(
            f"{task}: out of memory: lower --batch-size, --img-size or --rank, or train fewer tasks --together"
        ) from None
