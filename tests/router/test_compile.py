"""torch.compile: the cases of compiled.py, in a process of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_compiled_cases() -> None:
    cases = Path(__file__).with_name("compiled.py")
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", str(cases)]
    done = subprocess.run(command, cwd=cases.parents[2], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "6 passed, 1 skipped" in done.stdout or "7 passed" in done.stdout
