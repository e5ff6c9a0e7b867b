"""The files of a page that a package brings along, and what a browser lets them do."""

from importlib import resources
from typing import NamedTuple

_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


class PageFile(NamedTuple):
    """A file, and its media type."""

    data: bytes
    kind: str


def page_files(package: str) -> dict[str, PageFile]:
    """The files in a package's folder `page`, by name, and those that the pages of all packages have in common."""
    return {
        file.name: PageFile(file.read_bytes(), _KINDS[ending])
        for folder in ("pear_store", package)
        for file in (resources.files(folder) / "page").iterdir()
        if (ending := file.name.rpartition(".")[2]) in _KINDS
    }


def page_policy(images: str = "'self'") -> str:
    """The Content-Security-Policy of a page: nothing from another host, nothing inline, no text that becomes HTML."""
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
