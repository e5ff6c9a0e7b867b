"""Threads beside those that run forwards. Each computes with one thread only.

torch's OpenMP gives each thread that computes in parallel a team of its own. If all teams together have more threads
than there are processors, they sleep between operations instead of spinning. Then a forward of one image takes 1.5
times as long.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from threadpoolctl import ThreadpoolController

from pear_store.pools import ThreadPool
from router.device import check_process


def side_threads(count: int | None, name: str) -> ThreadPool:
    """A pool of threads for work beside forwards.

    Args:
        count: number of threads; None: the default of ThreadPool.
        name: prefix of the threads' names.
    """
    return ThreadPool(count, name, initializer=compute_alone)


def compute_alone() -> None:
    """Limits the calling thread to computing alone from now on."""
    _limit()


@contextmanager
def computing_alone() -> Iterator[None]:
    """Limits the calling thread to computing alone inside the block.

    Raises:
        ForkedError: this process was forked from one that has used a backbone.
    """
    check_process()  # first, because it asks how many threads torch would use
    with _limit():
        yield


def _limit() -> ThreadpoolController:
    torch.get_num_threads()  # torch sets up a thread at its first use there, and would then undo the limit
    return _openmp().limit(limits=1)


@cache
def _openmp() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="openmp")
