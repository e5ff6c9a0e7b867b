"""A Ray cluster for tests: real, small, and gone when the test process is, however that ends."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.helpers.drivers import PRELOADED, WAIT_S, Driver, end_with, server

ROOT = Path(__file__).parents[2]
DEADLY = ROOT / "tests" / "helpers" / "deadly"
_HEAD = """
import os, shutil, sys, ray
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
ray.shutdown(wait_for_processes=True)
shutil.rmtree(os.environ["RAY_TMPDIR"], ignore_errors=True)
"""
"""Ends when its input does, so when this process ends in whatever way. Its folder is removed then."""


@dataclass(frozen=True)
class Cluster:
    address: str
    process: int
    environment: dict[str, str]
    """For who joins or uses it."""
    _drivers: socket.socket
    _started: list[Driver] = field(default_factory=list)

    def start(self, module: str, *args: object) -> Driver:
        """Runs a command of Pear on it, in a process of its own."""
        self._started.append(driver := Driver(self._drivers, module, [str(arg) for arg in args]))
        return driver

    def end_commands(self) -> None:
        """Kills those commands that still run, such as those of a test that failed."""
        while self._started:
            if (driver := self._started.pop()).poll() is None:
                driver.send_signal(signal.SIGKILL)
                driver.wait(WAIT_S)

    def workers(self, name: str) -> list[int]:
        """Its processes that do this work now, such as Worker; not those of machines that joined it."""
        return workers_of(self.process, name)

    def kill(self, name: str) -> int:
        """Kills these processes at once; returns how many they were."""
        pids = self.workers(name)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return len(pids)


def descendants(process: int) -> list[int]:
    """A process, and all that it and its children started."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    found = [process]
    for pid in found:
        found += children.get(pid, [])
    return found


def workers_of(process: int, name: str) -> list[int]:
    """The processes of Ray's below one that do this work now: Ray gives them its name."""
    found = []
    for pid in descendants(process):
        with suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(f"ray::{name}".encode()):
                found.append(pid)
    return found


def kill_all(process: int) -> None:
    """Kills a process and its descendants, as a machine that loses its power does."""
    for pid in descendants(process):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def end(process: subprocess.Popen[Any]) -> None:
    """Waits for the end of a process that was told to end. Kills it, and its descendants, if it does not."""
    try:
        process.wait(WAIT_S)
    except subprocess.TimeoutExpired:
        kill_all(process.pid)
        raise


def wait_until(what: Callable[[], Any]) -> Any:
    """What it gives at last."""
    until = time.monotonic() + WAIT_S
    while not (found := what()):
        assert time.monotonic() < until
        time.sleep(0.05)
    return found


@contextmanager
def machine(environment: Mapping[str, str], folder: Path, *args: str) -> Iterator[subprocess.Popen[bytes]]:
    """A machine of a cluster: a `ray start` whose processes are its descendants.

    Args:
        folder: receives what it says, in ray.log.
        args: of `ray start`.
    """
    ray = Path(sys.executable).with_name("ray")
    memory = f"--object-store-memory={100 << 20}"
    with (folder / "ray.log").open("wb") as log:
        command = [str(ray), "start", *args, memory, "--block", "--disable-usage-stats"]
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env={**os.environ, **environment},
            preexec_fn=partial(end_with, os.getpid()),
        )
    try:
        yield process
    finally:
        kill_all(process.pid)
        process.wait(60)


@contextmanager
def cluster_environment(cache: Path) -> Iterator[dict[str, str]]:
    """For the processes of a cluster, and those that use it: a token and a folder of their own. At the end the folder
    is removed."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # pytest's are too long: Ray's sockets allow 107 bytes of path
    try:
        yield {
            **os.environ, "PEAR_CACHE_DIR": str(cache), "PYTHONPATH": f"{ROOT}{os.pathsep}{DEADLY}",
            "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.urandom(32).hex(),
            "RAY_TMPDIR": folder, "RAY_preload_python_modules": ",".join(PRELOADED),
        }  # fmt: skip
    finally:
        wait_until(lambda: _is_removed(folder))


def _is_removed(folder: str) -> bool:
    """Removes a folder, unless processes of Ray that end still write there."""
    shutil.rmtree(folder, ignore_errors=True)
    return not os.path.exists(folder)


@contextmanager
def two_cores(cache: Path) -> Iterator[Cluster]:
    """A cluster of two cores of this machine.

    Args:
        cache: where its workers cache what they read of remotes.
    """
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with (
        cluster_environment(cache) as environment,
        server(environment) as drivers,
        subprocess.Popen([sys.executable, "-c", _HEAD], text=True, env=environment, **pipes) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            folder = environment["RAY_TMPDIR"]
            assert list(Path(folder, "ray").glob("session_*")), f"Ray did not start, or does not use {folder}"
            yield Cluster(address, process.pid, environment, drivers)
        finally:
            process.stdin.close()
            end(process)
