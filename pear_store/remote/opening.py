"""Opens the place that a URL names."""

import os
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from pear_store.errors import PlaceError
from pear_store.local.directory import store_path
from pear_store.remote.directory import DirectoryPlace
from pear_store.remote.place import Place

_OBJECTS = ("s3", "s3a", "gs", "az", "abfs", "abfss")
SECRETS = ("secret", "password", "token", "key", "credential")
NO_SECRETS = ("key_file",)
_IN_URL = re.compile(r"[a-z0-9+.-]+://(?:[^/?#]*@|.*\?)", re.IGNORECASE)
"""A URL with a user and a password, or with a query, which may be signed"""


def open_place(url: str, options: Mapping[str, str] | None = None) -> Place:
    """The place at a URL or a directory's path.

    Raises:
        PlaceError: there is no such kind of place, it has no such option, or it needs a package that is not installed.
    """
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    if not separator or scheme in ("file", "http", "https"):
        for key in options or {}:
            kind = "a website" if scheme.startswith("http") and separator else "a directory"
            raise PlaceError(f"option {key!r}", f"{kind} has no options; leave it out")
    if not separator:
        return DirectoryPlace(store_path(url))
    if scheme == "file":
        return DirectoryPlace(store_path(rest))
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise PlaceError(scheme, f"the URL is malformed: expected {scheme}://HOST/PATH") from None
    if parts.password is not None:
        raise PlaceError(f"{scheme}://{parts.hostname}", "the URL holds a password: remove it, see docs/remotes.md")
    if scheme in ("http", "https"):
        from pear_store.remote.web import WebPlace  # here and below: each imports much that few commands need

        return WebPlace(url)
    if scheme == "sftp":
        from pear_store.remote.sftp import SftpPlace

        return SftpPlace(url, options or {})
    if scheme in _OBJECTS:
        from pear_store.remote.objects import ObjectPlace

        return ObjectPlace(url, options or {})
    raise PlaceError(url, "expected a directory, s3://, gs://, az://, sftp://, https:// or http://")


def checked_url(url: str) -> str:
    """A URL in the form in which it is kept. A directory's path is made absolute."""
    return url if "://" in url else os.path.abspath(store_path(url))


def check_options(options: Mapping[str, str]) -> None:
    """Raises a PlaceError if an option looks like a secret: options are written into the store's directory."""
    for key, value in options.items():
        named = key not in NO_SECRETS and any(word in key.lower() for word in SECRETS)
        if named or _IN_URL.match(value):
            raise PlaceError(f"option {key!r}", "secrets are not kept with a store: set them in the environment")
