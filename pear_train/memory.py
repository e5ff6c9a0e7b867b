"""Turns an out-of-memory error into a ResourceError."""

import math
import os
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


def check_batch(what: str, images: int, size: tuple[int, int], device: torch.device) -> None:
    """Checks that a batch of images fits into the memory: what a forward makes of it takes many times as much.

    Without this, every image is decoded first, or the system ends the process without a word.

    Raises:
        ResourceError: it does not, so no step can be made.
    """
    needed = 4 * images * 3 * math.prod(size)  # float32
    there = memory_of(device)
    if needed > there:
        raise ResourceError(
            f"{what}: a batch of {images} images of {size[0]} x {size[1]} pixels takes {needed / 1e9:.1f} GB before "
            f"any step, and {device} has {there / 1e9:.1f} GB: lower --img-size or --batch-size"
        )


def memory_of(device: torch.device) -> int:
    """All bytes of a device; of a CPU, the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
