"""The examples run, each from a folder of its own, and print what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRINTED = {
    "train_and_route": [
        r"shapes: (\d+) % right on test, 31,104 bytes of adapters",
        r"grounds: (\d+) % right on test, 31,104 bytes of adapters",
        r"a circle on a dark ground: shapes says circle",
        r"a square on a light ground: grounds says light",
    ],
    "common_bases": [
        r"flat: (\d+) % right on test\n"
        r"its own: 1,452 bytes; bases, once for all: 221,184\n"
        r"1,452 new bytes in the store",
        r"60 degrees",
    ],
}


def test_every_example_is_here() -> None:
    assert {file.stem for file in (ROOT / "examples").glob("*.py")} == set(PRINTED)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRINTED)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    file = ROOT / "examples" / f"{name}.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, file], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for pattern in PRINTED[name]:
        found = re.search(pattern, done.stdout)
        assert found, done.stdout
        assert all(int(share) >= 85 for share in found.groups()), done.stdout
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"
