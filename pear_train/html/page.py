"""Makes and writes HTML reports, for pear-train and pear-eval. Needs Jinja2."""

from pathlib import Path
from typing import Any, Literal

from pear_train.errors import ConfigError, ResourceError
from pear_train.html import drawing
from pear_train.targets import beside_of, check_target

Maker = Literal["pear-train", "pear-eval"]
"""The command that writes a report. Its name is in the file."""


def check_page(path: Path, maker: Maker) -> None:
    """Checks, before any work, that a report can be written at `path`.

    Raises:
        ConfigError: `path` holds something else than a report of this command, its folder is missing, or Jinja2 is not
            installed.
    """
    try:
        import jinja2  # noqa: F401  (whether it is installed)
    except ImportError:
        raise ConfigError("--html needs jinja2: pip install 'pear-adapters[eval]'") from None
    check_target("--html", path, lambda start: f"<!-- {maker} -->".encode() in start[:256], maker)


def make_page(template: str, **values: Any) -> str:
    """A report's text. Every value in the template is escaped, except for our own style sheet."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("pear_train.html", "page")
    environment = Environment(autoescape=True, undefined=StrictUndefined, loader=loader)
    environment.globals["c"] = drawing
    style, _, _ = loader.get_source(environment, "report.css")
    return environment.get_template(template).render(style=style, **values)


def write_page(path: Path, text: str) -> None:
    """Writes a report, as a whole or not at all.

    Raises:
        ResourceError: the file cannot be written.
    """
    beside = beside_of(path)
    try:
        try:
            beside.write_text(text, encoding="utf-8", errors="backslashreplace")  # file names may not be valid text
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written: {error.strerror or error}") from None
