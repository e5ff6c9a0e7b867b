"""The docs as a site, and the tutorial as a new user runs it."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat

from tests.helpers.pages import matches, run_steps, steps
from tools.demo import digits, faces, write_folder

ROOT = Path(__file__).parents[1]
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


def test_the_tutorial_does_what_it_says(tmp_path: Path) -> None:
    for command, shown, printed in run_steps(steps((ROOT / "docs/tutorial.md").read_text()), tmp_path):
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
    for command, shown, printed in run_steps(steps((ROOT / "docs/peft.md").read_text()), tmp_path):
        assert matches(shown, printed), f"{command}\nshown:\n{shown}\nprinted:\n{printed}"


def test_the_first_screen_of_the_readme_does_what_it_says(tmp_path: Path) -> None:
    """On the demo's folders, which `make demo` leaves for a reader."""
    screen = (ROOT / "README.md").read_text().split("\n## ")[0]
    for name, labelled in (("digits", digits()), ("faces", faces())):
        write_folder(tmp_path / "work" / name, labelled)
    seen = ""
    for command, shown, printed in run_steps(steps(screen), tmp_path):
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
