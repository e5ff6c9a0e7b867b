"""The Ray cluster of a run: an existing one, or one on this machine alone that ends with the run."""

import logging
import os
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
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"
"""How HTTP/2 begins, which Ray speaks: a server answers with its settings (RFC 9113, section 3.4)."""
_SETTINGS = 4
"""Type of such a frame, its fourth byte."""


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
    if address not in (HERE, "auto"):
        _check_answers(address)
    here: dict[str, Any] = {"include_dashboard": False} if address == HERE else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **here)
    except (OSError, RuntimeError, ValueError, AssertionError, RayError) as error:
        ray.shutdown()
        raise ClusterError(f"Ray at {address}: cannot be used: {_why(error)}") from None
    try:
        yield
    except RayError as error:
        raise ClusterError(f"Ray: {one_line(error)}") from None
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Checks that Ray may be at an address. Ray itself would wait for many minutes for one who does not answer."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise ClusterError(f"Ray at {address!r}: expected auto, or an address with a port, such as 10.0.0.1:6379")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_S) as peer:
            if os.environ.get("RAY_USE_TLS", "0") == "0":
                peer.sendall(_HELLO)
                if peer.recv(4, socket.MSG_WAITALL)[3:] != bytes([_SETTINGS]):
                    raise OSError("something else answers there")
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ClusterError(f"Ray at {address}: cannot be reached: {reason}: check the address, or start Ray") from None


def _why(error: Exception) -> str:
    """Why Ray refuses to be used. What Ray itself says of some reasons names options of its own commands."""
    told = " ".join(str(error).split()) or type(error).__name__
    if told.startswith("Could not find any running Ray"):
        return "this machine is part of no cluster: start Ray, or give an address with a port, such as 10.0.0.1:6379"
    if told.startswith("Failed to connect"):
        return "no cluster of Ray answers there, or it has another token: check the address and $RAY_AUTH_TOKEN"
    return f"{told:.500}"


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


def fitting(on_gpus: bool, cpus: int) -> int:
    """The number of workers that the machines of the cluster have room for now."""
    if on_gpus:
        return sum(int(machine.get("GPU", 0)) for machine in _machines())
    return sum(int(machine.get("CPU", 0)) // cpus for machine in _machines())


def room(on_gpus: bool, cpus_per_worker: int | None, workers: int | None = None) -> tuple[int, int]:
    """The number of workers, and the cores of each.

    Args:
        on_gpus: whether each worker needs a GPU.
        cpus_per_worker: cores of each; None: 1 with a GPU, else 4 or as many as the smallest machine has.
        workers: the number that is wanted; None: as many as the cluster has room for. If it is given, the cluster may
            be one whose machines come later.
    Raises:
        ClusterError: the cluster has no room for a worker.
    """
    counts = [count for machine in _machines() if (count := int(machine.get("CPU", 0)))]
    each = cpus_per_worker or (1 if on_gpus else min([CPUS_PER_WORKER, *counts]))
    count = fitting(on_gpus, each)
    if count or (workers and not counts):
        return workers or count, each
    if not counts:
        raise ClusterError("no machine of the cluster has cores: give --workers N if machines come later")
    if on_gpus:
        raise ClusterError("the cluster has no GPU: give --device cpu")
    raise ClusterError(f"no machine of the cluster has {each} cores: give a smaller --cpus-per-worker")


def _machines() -> list[dict[str, float]]:
    """The resources of each machine of the cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
