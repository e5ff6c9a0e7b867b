"""The HTML reports of pear-train and pear-eval, in a real Chromium."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from playwright import sync_api as playwright

from pear_train import cli as train
from pear_train.evaluation import cli as evaluation

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LONG = "a label that is longer than a narrow screen " * 3


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.html, and eval.html of two tasks with a comparison."""
    folder = tmp_path_factory.mktemp("reports")
    rng = np.random.default_rng(0)
    labels = ["dark", "light", LONG.strip(), "x" * 120]
    arrays: dict[str, Any] = {"classes": np.array(labels)}
    for split in ("train", "val", "test"):
        y = np.arange(24) % len(labels)
        arrays[f"x_{split}"] = np.clip(60 * y[:, None, None] + rng.normal(40, 60, (24, 24, 24)), 0, 255).astype(
            np.uint8
        )
        arrays[f"y_{split}"] = y
    np.savez(folder / "d.npz", **arrays)

    def run(command: Any, *args: object) -> None:
        done = CliRunner().invoke(command, [str(arg) for arg in args], catch_exceptions=False)
        assert done.exit_code == 0, done.stderr

    for name in "ab":
        run(
            train.main, name, "--data", folder / "d.npz", "--out", folder / f"{name}.safetensors", "--epochs", 3,
            "--img-size", 48, "--positions", "blocks", "--rank", 2, "--seed", ord(name), "--html",
            folder / ("train.html" if name == "a" else "other.html"),
        )  # fmt: skip
    tasks = [folder / f"{name}.safetensors" for name in "ab"]
    run(evaluation.main, *tasks, "--data", folder / "d.npz", "--html", folder / "eval.html", "--split", "test")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: chromium)")
@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("name", ["train", "eval"])
def test_reports_fit_their_screen_and_ask_no_host(reports: Path, name: str, width: int) -> None:
    address = (reports / f"{name}.html").as_uri()
    asked: list[str] = []
    wrong: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: wrong.append(line.text))
        page.goto(address)
        assert page.locator("svg, img").count() > 0 and "dark" in page.inner_text("body")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        browser.close()
    assert [url for url in asked if not url.startswith("data:")] == [address]
    assert not wrong
