"""How a report is made and written: what the reports of pear-train and pear-eval have in common. Needs Jinja2."""

import os
from pathlib import Path
from typing import Any, Literal

from pear_store import PearStoreError
from pear_store.files import open_regular_file
from pear_train.errors import ConfigError, ResourceError
from pear_train.html import drawing

Maker = Literal["pear-train", "pear-eval"]
"""The command that writes a report; its name stands in the file."""


def check_page(path: Path, maker: Maker) -> None:
    """Checks, before any work is done, that a report can be written there.

    Raises:
        ConfigError: something lies there that is no report of this command, there is no such folder, or Jinja2 is not
            installed.
    """
    try:
        import jinja2  # noqa: F401
    except ImportError:
        raise ConfigError("--html needs jinja2: pip install 'pear-adapters[eval]'") from None
    if not path.parent.is_dir():
        raise ConfigError(f"--html {path}: folder {path.parent} does not exist; make it first")
    if not os.path.lexists(path):
        return
    try:
        with open_regular_file(path) as file:
            start = file.read(256)
    except PearStoreError as error:
        raise ConfigError(f"--html {error}") from None
    if start and f"<!-- {maker} -->".encode() not in start:
        raise ConfigError(f"--html {path}: there is something that {maker} did not write, and it is not replaced")


def make_page(template: str, **values: Any) -> str:
    """A report's text. Whatever is put into the template is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    loader = PackageLoader("pear_train.html", "page")
    environment = Environment(autoescape=True, undefined=StrictUndefined, loader=loader)
    environment.globals["c"] = drawing
    style, _, _ = loader.get_source(environment, "report.css")
    style = Markup(style)  # ours, and the only text that is not escaped
    return environment.get_template(template).render(style=style, **values)


def write_page(path: Path, text: str) -> None:
    """Writes a report, whole or not at all.

    Raises:
        ResourceError: it cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            beside.write_text(text, encoding="utf-8")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written: {error.strerror or error}") from None
