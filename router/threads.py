"""Threads beside those that run forwards. They compute alone.

torch's OpenMP gives each thread that computes in parallel a team of its own. Once the teams have more threads than
there are processors, they sleep between operations in place of spinning. A forward of one image takes 1.5 times as
long then.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from threadpoolctl import ThreadpoolController

from pear_store.pools import ThreadPool
from router.device import check_process


def side_threads(count: int | None, name: str) -> ThreadPool:
    """A pool for what goes on beside forwards; None: as many threads as such a pool has by default."""
    return ThreadPool(count, name, initializer=compute_alone)


def compute_alone() -> None:
    """Has the calling thread compute with no other from now on."""
    _limit()


@contextmanager
def computing_alone() -> Iterator[None]:
    """Has the calling thread compute with no other meanwhile.

    Raises:
        ForkedError: this process was forked from one that has used a backbone.
    """
    check_process()  # first: it asks how many threads torch would use
    with _limit():
        yield


def _limit() -> ThreadpoolController:
    torch.get_num_threads()  # torch sets a thread up when it is first used there, and would undo the limit
    return _openmp().limit(limits=1)


@cache
def _openmp() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="openmp")
