"""Every script of tools/ and benchmarks/ starts as the docs call it, and says what it does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.before_after import compared

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    file for folder in ("tools", "benchmarks") for file in (ROOT / folder).rglob("*.py") if file.name != "__init__.py"
)
OUTSIDE = {"atheris", "bentoml", "fastapi", "litserve"}
"""Packages that no extra installs."""
RUN_ALL = """
import contextlib, io, json, runpy, sys, traceback
root, *scripts = sys.argv[1:]
import pear_store, router, pear_train  # from this checkout
def run(script):
    # as `python tools/x.py` or `python -m benchmarks.x.y`; what is no program is imported
    runs = '__name__ == "__main__"' in open(script).read()
    module = script.removeprefix(root + "/").removesuffix(".py").replace("/", ".")
    as_module = not runs or module.startswith("benchmarks.")
    sys.path[:] = [root if as_module else script.rpartition("/")[0], *path]
    sys.argv = [script, "--help"]
    if as_module:
        runpy.run_module(module, run_name="__main__" if runs else None, alter_sys=True)
    else:
        runpy.run_path(script, run_name="__main__")
path = [entry for entry in sys.path if entry not in ("", root)]  # an installed Pear does not bring tools/ along
for script in scripts:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tools", "benchmarks")]:
        del sys.modules[name]
    said, problem = io.StringIO(), ""
    with contextlib.redirect_stdout(said):
        try:
            run(script)
        except SystemExit as stop:
            problem = f"exit code {stop.code}" if stop.code else ""
        except BaseException as error:
            problem = getattr(error, "name", None) or traceback.format_exc()
    print(json.dumps([script, problem, said.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def helps() -> dict[str, tuple[str, str]]:
    """What each script said when asked for help, and what went wrong."""
    command = [sys.executable, "-c", RUN_ALL, str(ROOT), *map(str, SCRIPTS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(SCRIPTS), done.stderr
    return {script: (problem, said) for script, problem, said in found}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.relative_to(ROOT)))
def test_a_script_starts(helps: dict[str, tuple[str, str]], script: Path) -> None:
    problem, said = helps[str(script)]
    if problem in OUTSIDE:
        pytest.skip(f"needs {problem}")
    assert not problem
    if '__name__ == "__main__"' in script.read_text():
        assert "Usage: " in said or "usage: " in said
        assert len(said.splitlines()) > 5


def test_a_comparison_s_interval_holds_the_ratio_and_tells_slower_from_noise() -> None:
    before = [1 + 0.01 * (i % 5) for i in range(16)]
    slower = compared(before, [1.1 * value for value in before])
    assert slower["ratio"] == pytest.approx(1.1, abs=0.001)
    assert 1.05 < slower["low"] <= slower["ratio"] <= slower["high"] < 1.15
    same = compared(before, before[::-1])
    assert same["low"] <= 1 <= same["high"]
    assert (same["best_ratio"], same["before_best_s"]) == (1, 1)
