"""Tokens: one to use tasks, and one to manage the server."""

import hashlib
import hmac
from dataclasses import dataclass

from router.errors import RouterError
from router.serve.problems import Problem

TOKEN_LENGTH = 16


@dataclass(frozen=True, repr=False)
class Tokens:
    """The tokens of a server. Without any, every client may do everything.

    Args:
        use: allows predictions and lists.
        manage: allows everything. If only `use` is given, nothing can be managed over HTTP.
    """

    use: str | None = None
    manage: str | None = None

    def check(self, authorization: str | None, *, manage: bool = False) -> None:
        """Raises a Problem unless a request's Authorization header allows what it asks for."""
        if self.use is None and self.manage is None:
            return
        kind, _, found = (authorization or "").partition(" ")
        is_bearer = kind.lower() == "bearer"
        # always compare both, so that the time does not reveal which one matched
        uses, manages = _same(found, self.use), _same(found, self.manage)
        if not is_bearer or not (uses or manages):
            said = "expected the header 'Authorization: Bearer TOKEN'" if not is_bearer else "this token is not known"
            raise Problem(401, said, headers={"WWW-Authenticate": "Bearer"})
        if manage and not manages:
            raise Problem(403, "this needs the token to manage the server")


def check_tokens(use: str | None, manage: str | None, names: tuple[str, str] = ("use_token", "manage_token")) -> None:
    """Checks the tokens of a server that other machines can reach. No message contains a token.

    Args:
        names: the source of each token, for messages.
    Raises:
        RouterError: a token is too short or cannot be sent in a header, or there is only the one to manage.
    """
    for token, name in zip((use, manage), names, strict=True):
        if token is not None and (len(token) < TOKEN_LENGTH or not token.isascii() or not token.isprintable()):
            raise RouterError(f"{name}: expected a token of at least {TOKEN_LENGTH} printable ASCII characters")
    if use is None and manage is not None:
        raise RouterError(f"{names[1]} is given without {names[0]}: give both")


def _same(found: str, token: str | None) -> bool:
    """Whether the tokens are equal. The time does not depend on whether or where they differ."""
    same = hmac.compare_digest(_hash(found), _hash(token or ""))
    return same and token is not None


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
