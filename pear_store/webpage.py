"""The files of a web page that a package contains, and its Content-Security-Policy."""

from importlib import resources
from typing import NamedTuple

_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


class PageFile(NamedTuple):
    """A file's bytes and its media type."""

    data: bytes
    kind: str


def page_files(package: str) -> dict[str, PageFile]:
    """The files in a package's folder `page`, by name, and those that the pages of all packages share.

    Files of other kinds than `_KINDS` are left out."""
    return {
        file.name: PageFile(file.read_bytes(), _KINDS[ending])
        for folder in ("pear_store", package)
        for file in (resources.files(folder) / "page").iterdir()
        if (ending := file.name.rpartition(".")[2]) in _KINDS
    }


def page_policy(images: str = "'self'") -> str:
    """A page's Content-Security-Policy: nothing from other hosts, nothing inline, and no text is parsed as HTML."""
    return "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            f"img-src {images}",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )
