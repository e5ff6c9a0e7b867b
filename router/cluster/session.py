"""The Ray cluster of a run: an existing one, or one on this machine alone that ends with the run."""

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError

from pear_store import PearStoreError
from router.errors import RouterError

HERE = "local"
"""The address that means: start a cluster on this machine for this run."""
CPUS_PER_WORKER = 4
"""Cores of a worker without a GPU, if its machine has as many."""


CONNECT_S = 10.0


class ClusterError(RouterError):
    """A cluster cannot be used, or failed."""


@contextmanager
def session(address: str) -> Iterator[None]:
    """Connects to a cluster, or starts one, and disconnects at the end. An existing connection is used and kept.

    Raises:
        ClusterError: the cluster cannot be reached, or Ray failed.
    """
    if ray.is_initialized():
        yield
        return
    _check_answers(address)
    here: dict[str, Any] = {"include_dashboard": False} if address == HERE else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **here)
    except (OSError, RuntimeError, ValueError, AssertionError, RayError) as error:
        ray.shutdown()
        raise ClusterError(f"Ray at {address}: cannot be used: {one_line(error)}") from None
    try:
        yield
    except RayError as error:
        raise ClusterError(f"Ray: {one_line(error)}") from None
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Checks that something listens at an address. Ray itself would wait for many minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:  # a word, such as auto
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ClusterError(f"Ray at {address}: cannot be reached: {reason}: check the address, or start Ray") from None


def one_line(error: BaseException) -> str:
    """The first line of an error, because Ray's errors hold whole traces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0]:.300}" if lines else type(error).__name__


def reason_of(error: Exception) -> str:
    """Why a worker failed, in one line: the text of Pear's own error, or the last line of a trace."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, RouterError | PearStoreError):
        return str(cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[-1]:.300}" if lines else type(error).__name__


def has_gpus() -> bool:
    return bool(ray.cluster_resources().get("GPU", 0) >= 1)


def cores() -> int:
    return int(ray.cluster_resources().get("CPU", 0))


def room(on_gpus: bool, cpus_per_worker: int | None) -> tuple[int, int]:
    """The number of workers that the cluster has room for, and the cores of each.

    Args:
        on_gpus: whether each worker needs a GPU.
        cpus_per_worker: cores of each; None: 1 with a GPU, else 4 or as many as the smallest machine has.
    Raises:
        ClusterError: the cluster has no room for a worker.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    counts = [int(node.get("CPU", 0)) for node in nodes]
    if on_gpus:
        count = sum(int(node.get("GPU", 0)) for node in nodes)
        if not count:
            raise ClusterError("the cluster has no GPU: give --device cpu")
        return count, cpus_per_worker or 1
    each = cpus_per_worker or min([CPUS_PER_WORKER, *(count for count in counts if count)])
    count = sum(found // each for found in counts)
    if not count:
        raise ClusterError(f"no machine of the cluster has {each} cores: give a smaller --cpus-per-worker")
    return count, each
