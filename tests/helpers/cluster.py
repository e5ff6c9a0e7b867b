"""A Ray cluster for tests: real, small, and gone when the test process is, however that ends."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_HEAD = """
import sys, ray
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
"""Ends when its input does, so when this process ends in whatever way."""


@dataclass(frozen=True)
class Cluster:
    address: str
    process: int
    environment: dict[str, str]
    """For who joins or uses it."""

    def workers(self, name: str) -> list[int]:
        """Its processes that do this work now, such as Worker."""
        parents, found = {}, []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if (folder / "cmdline").read_bytes().startswith(f"ray::{name}".encode()):
                    found.append(int(folder.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
        return [pid for pid in found if parents.get(parents.get(pid, 0)) == self.process]

    def kill(self, name: str) -> int:
        """Kills these processes at once; returns how many they were."""
        pids = self.workers(name)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return len(pids)


@contextmanager
def two_cores(cache: Path) -> Iterator[Cluster]:
    """A cluster of two cores of this machine.

    Args:
        cache: where its workers cache what they read of remotes.
    """
    environment = {
        **os.environ, "PEAR_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.urandom(32).hex(),
    }  # fmt: skip
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", _HEAD], text=True, env=environment, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield Cluster(process.stdout.readline().strip(), process.pid, environment)
        finally:
            process.stdin.close()
            process.wait(60)
