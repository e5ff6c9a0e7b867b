"""The docs as a site, and the tutorial as a new user runs it."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat

from tools.demo import digits, faces, write_folder

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(console|python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
VARIES = re.compile(r"\d+\.\d %|\d+ s$|\d+,\d+ bytes \(", re.MULTILINE)
"""What differs between machines: accuracies, seconds, and sizes of files"""

pytestmark = pytest.mark.slow


class Fetched(HTMLParser):
    """What a browser fetches to show a page: not what its links lead to."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "img", "iframe", "source"):
            self.urls.add(values.get("src") or "")
        if tag == "link" and values.get("rel") not in ("canonical", "prev", "next"):
            self.urls.add(values.get("href") or "")


def test_the_site_builds_without_a_warning_and_needs_no_other_host(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        fetched = Fetched()
        fetched.feed(page.read_text())
        assert not [url for url in fetched.urls if re.match(r"(https?:)?//", url)], page
    router = (tmp_path / "site/api/router.html").read_text()
    assert "run_all" in router and "on_error" in router
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", sheet.read_text()), sheet


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


def run_page(page: str, folder: Path) -> Iterator[tuple[str, str, str]]:
    """Of each step in turn, in one shell: the command, what the page shows, and what was printed."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    programs, work = folder / "bin", folder / "work"
    programs.mkdir()
    work.mkdir(exist_ok=True)
    (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (programs / "python").chmod(0o755)
    scripts = {"pear-store": "pear_store.cli", "pear-train": "pear_train.cli", "pear-infer": "router.infer.__main__"}
    scripts |= {"pear-eval": "pear_train.evaluation.__main__", "pear-serve": "router.serve.__main__"}
    for name, module in scripts.items():
        program = programs / name
        program.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'from {module} import main; main()' \"$@\"\n")
        program.chmod(0o755)
    lines = ["set -u"]
    for number, (command, _) in enumerate(steps(page)):
        lines += [command, f'code=$?; echo; echo "=== {number} $code"']
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)], cwd=work, env=environment, capture_output=True, text=True, timeout=600
    )
    printed = re.split(r"^=== (\d+) (\d+)$", done.stdout, flags=re.MULTILINE)
    assert len(printed) == 3 * len(steps(page)) + 1, done.stdout + done.stderr
    for number, (command, shown) in enumerate(steps(page)):
        output, code = printed[3 * number], printed[3 * number + 2]
        assert code == "0", f"{command}\n{output}\n{done.stderr}"
        yield command, shown, output


def test_the_tutorial_does_what_it_says(tmp_path: Path) -> None:
    for command, shown, printed in run_page((ROOT / "docs/tutorial.md").read_text(), tmp_path):
        assert matches(shown, printed), f"{command}\nshown:\n{shown}\nprinted:\n{printed}"
    for shown, made in (("tutorial_plot.png", "digits.png"), ("tutorial_preview.png", "preview.png")):
        assert (ROOT / "docs" / shown).stat().st_size < 150_000
        pictures = [Image.open(path).convert("L") for path in (ROOT / "docs" / shown, tmp_path / "work" / made)]
        assert pictures[0].size == pictures[1].size, shown
        moved = ImageStat.Stat(ImageChops.difference(*pictures)).mean[0]
        assert moved < 8, f"{shown} differs from {made} by {moved:.1f} levels: draw it anew"


def test_the_page_for_those_who_come_from_peft_does_what_it_says(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs peft: pip install 'pear-adapters[dev]'")
    write_folder(tmp_path / "work" / "digits", digits())
    for command, shown, printed in run_page((ROOT / "docs/peft.md").read_text(), tmp_path):
        assert matches(shown, printed), f"{command}\nshown:\n{shown}\nprinted:\n{printed}"


def test_the_first_screen_of_the_readme_does_what_it_says(tmp_path: Path) -> None:
    """On the demo's folders, which `make demo` leaves for a reader."""
    screen = (ROOT / "README.md").read_text().split("\n## ")[0]
    for name, labelled in (("digits", digits()), ("faces", faces())):
        write_folder(tmp_path / "work" / name, labelled)
    seen = ""
    for command, shown, printed in run_page(screen, tmp_path):
        seen += printed
        assert matches(VARIES.sub("N", shown), VARIES.sub("N", printed)), (
            f"{command}\nshown:\n{shown}\nprinted:\n{printed}"
        )
    assert "adapters 31,104" in seen and "['3', 'face']" in seen


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [("a ... b\n", "a 1 2\n3 b\n", True), ("a b\n", "a   b\n\n", True), ("a\n", "a b\n", False), ("", "x", False)],
)
def test_what_counts_as_the_same_output(shown: str, printed: str, same: bool) -> None:
    assert matches(shown, printed) is same
