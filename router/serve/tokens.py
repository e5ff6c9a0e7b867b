"""Who may do what: a token to use tasks, and one to manage the server."""

import hashlib
import hmac
from dataclasses import dataclass

from router.errors import RouterError
from router.serve.problems import Problem

TOKEN_LENGTH = 16


@dataclass(frozen=True, repr=False)
class Tokens:
    """The tokens of a server; without any, everybody may do everything.

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
        # both are compared, whatever the first says: the time must not tell which one it was
        uses, manages = _same(found, self.use), _same(found, self.manage)
        if not is_bearer or not (uses or manages):
            said = "expected the header 'Authorization: Bearer TOKEN'" if not is_bearer else "this token is not known"
            raise Problem(401, said, headers={"WWW-Authenticate": "Bearer"})
        if manage and not manages:
            raise Problem(403, "the token to manage is needed")


def check_tokens(use: str | None, manage: str | None, names: tuple[str, str] = ("use_token", "manage_token")) -> None:
    """Checks the tokens of a server that other machines reach; a message never says what a token is.

    Args:
        names: where each comes from.

    Raises:
        RouterError: one is easily guessed, or cannot be sent in a header; or there is only the one to manage.
    """
    for token, name in zip((use, manage), names, strict=True):
        if token is not None and (len(token) < TOKEN_LENGTH or not token.isascii() or not token.isprintable()):
            raise RouterError(f"{name}: expected a token of at least {TOKEN_LENGTH} printable ASCII characters")
    if use is None and manage is not None:
        raise RouterError(f"{names[1]} is there, but no {names[0]}: both are needed")


def _same(found: str, token: str | None) -> bool:
    """In a time that does not depend on where, or whether, they differ."""
    same = hmac.compare_digest(_hash(found), _hash(token or ""))
    return same and token is not None


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
