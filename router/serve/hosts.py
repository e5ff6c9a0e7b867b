"""By which names a server may be asked. The owner of a web page can point the page's name at any address, also at this
machine's. A browser here then lets that page ask the server, and says the page's name in the Host header."""

import ipaddress
import re
from collections.abc import Collection

from router.errors import RouterError
from router.serve.problems import Problem

_NAME = re.compile(r"[A-Za-z0-9._-]{1,253}")
_HOST = re.compile(rf"(?:\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>{_NAME.pattern}))(?::[0-9]{{0,5}})?")
ANY = "*"


class Hosts:
    """Names that requests may say. Any address may be said: no page elsewhere has an address as its name.

    Args:
        names: beside `localhost`; "*" for any; None: nothing is checked.

    Raises:
        RouterError: one is no name.
    """

    def __init__(self, names: Collection[str] | None) -> None:
        for name in names or ():
            if name != ANY and not _NAME.fullmatch(name):
                raise RouterError(f"allowed host {name!r:.100}: expected a name such as pear.example.com, or '{ANY}'")
        self._names = None if names is None or ANY in names else {"localhost", *(name.lower() for name in names)}

    @property
    def are_checked(self) -> bool:
        return self._names is not None

    def check(self, host: str) -> None:
        """Raises a Problem unless a request may have this Host header."""
        if self._names is not None and not ((name := _name(host)) in self._names or _is_address(name)):
            raise Problem(421, f"Host {host!r:.100}: expected localhost, an address, or a name of --allowed-host")


def _name(host: str) -> str:
    """A host in lower case, without port and brackets; empty if it is none."""
    found = _HOST.fullmatch(host)
    return "" if found is None else (found["address"] or found["name"]).lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
