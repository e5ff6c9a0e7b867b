"""What these tests start is gone when they are, however they end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.cluster import ROOT, descendants, wait_until
from tests.helpers.drivers import Driver, server

FOREVER = ["-n", "1", "-r", "1", "import time; time.sleep(3600)"]
_TESTS = f"""
import os, signal
from tests.helpers.drivers import Driver, server
with server(os.environ, []) as drivers:
    print(Driver(drivers, "timeit", {FOREVER}).pid, flush=True)
    signal.pause()
"""


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only waits for its parent to hear of it."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_no_command_outlives_tests_that_are_killed() -> None:
    command = [sys.executable, "-c", _TESTS]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as tests:
        assert tests.stdout is not None
        pid = int(tests.stdout.readline())
        assert not has_ended(pid)
        tests.kill()
    wait_until(lambda: has_ended(pid))


_WITH_RAY = """
import signal, sys
from pathlib import Path
from tests.helpers.cluster import machine, two_cores, wait_until
here = Path(sys.argv[1])
with two_cores(here / "cache") as ray, machine(ray.environment, here, f"--address={ray.address}", "--num-cpus=1"):
    wait_until(lambda: "Ray runtime started" in (here / "ray.log").read_text())
    print(ray.environment["RAY_TMPDIR"], flush=True)
    signal.pause()
"""


@pytest.mark.slow
@pytest.mark.skipif("PEAR_CLUSTER_DEATHS" not in os.environ, reason="starts Ray anew: PEAR_CLUSTER_DEATHS=1")
def test_no_ray_outlives_tests_that_are_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _WITH_RAY, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as tests:
        assert tests.stdout is not None
        folder = Path(tests.stdout.readline().strip())
        assert folder.is_dir()
        below = descendants(tests.pid)
        assert len(below) > 10
        tests.kill()
    wait_until(lambda: all(map(has_ended, below)))
    wait_until(lambda: not folder.exists())


def test_no_command_outlives_the_tests_that_it_is_for() -> None:
    with server(os.environ, []) as drivers:
        ended, killed = Driver(drivers, "timeit", ["pass"]), Driver(drivers, "timeit", FOREVER)
        assert ended.output()[0].endswith("per loop\n")
        killed.send_signal(signal.SIGKILL)
        assert killed.wait(60) == -signal.SIGKILL
        left = Driver(drivers, "timeit", FOREVER)
    wait_until(lambda: has_ended(left.pid))
