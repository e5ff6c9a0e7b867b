"""Runs the commands and programs of a page of the docs, in one shell."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(console|python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SCRIPTS = {
    "pear-store": "pear_store.cli",
    "pear-train": "pear_train.cli",
    "pear-infer": "router.infer.__main__",
    "pear-eval": "pear_train.evaluation.__main__",
    "pear-serve": "router.serve.__main__",
}


def steps(page: str) -> list[tuple[str, str]]:
    """A page's commands and programs in their order, each with the output that the page shows."""
    found: list[tuple[str, str]] = []
    for kind, text in FENCE.findall(page):
        if kind == "python":
            found.append((f"python - <<'PROGRAM'\n{text}PROGRAM", ""))
        elif kind == "text":
            found[-1] = (found[-1][0], text)
        else:
            for command, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE):
                found.append((command, shown))
    return found


def matches(shown: str, printed: str) -> bool:
    """`...` stands for anything, and so do widths of columns."""
    parts = [re.sub(r"\s+", " ", part).strip() for part in shown.split("...")]
    pattern = ".*".join(re.escape(part) for part in parts)
    return re.fullmatch(f"\\s*{pattern}\\s*", re.sub(r"\s+", " ", printed), re.DOTALL) is not None


def run_steps(steps: list[tuple[str, str]], folder: Path) -> Iterator[tuple[str, str, str]]:
    """Of each step in turn, in one shell in folder/work: the command, what the page shows, and what was printed."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    programs, work = folder / "bin", folder / "work"
    programs.mkdir()
    work.mkdir(exist_ok=True)
    (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (programs / "python").chmod(0o755)
    for name, module in SCRIPTS.items():
        program = programs / name
        program.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'from {module} import main; main()' \"$@\"\n")
        program.chmod(0o755)
    lines = ["set -u", "trap 'kill $(jobs -p) 2>/dev/null' EXIT"]
    for number, (command, _) in enumerate(steps):
        lines += [command, f'code=$?; echo; echo "=== {number} $code"; echo "=== {number}" >&2']
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)], cwd=work, env=environment, capture_output=True, text=True, timeout=600
    )
    printed = re.split(r"^=== (\d+) (\d+)$", done.stdout, flags=re.MULTILINE)
    errors = re.split(r"^=== \d+$", done.stderr, flags=re.MULTILINE)
    assert len(printed) == 3 * len(steps) + 1, done.stdout + done.stderr
    for number, (command, shown) in enumerate(steps):
        output, code = printed[3 * number], printed[3 * number + 2]
        assert code == "0", f"{command}\nexit code {code}\n{output}\n{errors[number]}"
        yield command, shown, output
