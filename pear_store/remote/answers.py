"""Turns a server's refusal into a message, and says whether another try may help. One table for all kinds of places."""

import re

from pear_store.errors import DiskFullError, PearStoreError, PlaceError

_DENIED = "access is denied; check which rights the environment's credentials have there"
_UNKNOWN = "the server does not accept the environment's credentials; set valid ones and run the same again"
_EXPIRED = "the environment's credentials have expired; renew them and run the same again"
_CLOCK = "this machine's clock and the server's differ by more than the server allows; set them right"
_BUSY = "the server is busy or has a fault; run the same again later"
_FULL = "full"
_REDIRECT = "the server redirects, which is not followed; use the URL that it redirects to"

MEANINGS: dict[str, tuple[str, bool]] = {
    "NoSuchBucket": ("there is no such bucket", False),
    "ContainerNotFound": ("there is no such container", False),
    "AccessDenied": (_DENIED, False),
    "AuthorizationFailure": (_DENIED, False),
    "ExpiredToken": (_EXPIRED, False),
    "TokenRefreshRequired": (_EXPIRED, False),
    "AuthenticationFailed": (_UNKNOWN, False),
    "InvalidAccessKeyId": (_UNKNOWN, False),
    "InvalidSecurity": (_UNKNOWN, False),
    "InvalidToken": (_UNKNOWN, False),
    "SignatureDoesNotMatch": (_UNKNOWN, False),
    "RequestExpired": (_CLOCK, False),
    "RequestTimeTooSkewed": (_CLOCK, False),
    "InsufficientStorage": (_FULL, False),
    "QuotaExceeded": (_FULL, False),
    "XMinioStorageFull": (_FULL, False),
    "301": (_REDIRECT, False),
    "302": (_REDIRECT, False),
    "303": (_REDIRECT, False),
    "307": (_REDIRECT, False),
    "308": (_REDIRECT, False),
    "401": (_UNKNOWN, False),
    "403": (_DENIED, False),
    "408": (_BUSY, True),
    "409": (_BUSY, True),  # another conditional write was made at the same time
    "429": (_BUSY, True),
    "500": (_BUSY, True),
    "502": (_BUSY, True),
    "503": (_BUSY, True),
    "504": (_BUSY, True),
    "507": (_FULL, False),
    "none": ("no credentials are set in the environment, and the cloud gives none to this machine", False),
    "refused": ("the connection is refused; is the server running?", True),
    "cut": ("the connection was cut", True),
    "stalled": ("the server did not answer in time", True),
    "unknown host": ("there is no such host, or no network", True),
    "untrusted": ("the server's certificate is not trusted", False),
}
"""What an answer means, and whether another try may help. The key is S3's or Azure's name of the error, the HTTP
status, or the way in which the connection failed."""

_CODE = re.compile(r"<Code>([A-Za-z]{1,64})</Code>")
_STATUS = re.compile(r"status(?: code)?:? ([1-5][0-9][0-9])\b")
_OF_METADATA = re.compile(r"//(?:169\.254\.|\[fd00:ec2:|metadata\.)")
_SIGNS = (
    (re.compile(r"certificate|CERTIFICATE"), "untrusted"),
    (re.compile(r"timed ?out|Timed ?[Oo]ut|Timeout"), "stalled"),
    (re.compile(r"dns error|Name or service not known|No address associated|[Nn]ame resolution"), "unknown host"),
    (re.compile(r"refused"), "refused"),
    (
        re.compile(r"[Rr]eset|[Bb]roken ?[Pp]ipe|[Ii]ncomplete|closed|shut down|[Dd]isconnected|UnexpectedEof"),
        "cut",
    ),
)
_URL = re.compile(r"[a-z0-9+]+://\S+")


def refusal(url: str, name: str, status: int | None, code: str | None) -> PearStoreError:
    """The error for a server's answer.

    Args:
        name: the object that was asked for.
        status: the answer's HTTP status, if it is known.
        code: the error's name that S3 and Azure put in the body.
    """
    problem, again = MEANINGS.get(code or "") or MEANINGS.get(str(status)) or ("", (status or 0) >= 500)
    if problem == _FULL:
        return DiskFullError(url)
    told = ", ".join([*([f"status {status}"] if status else []), *([code] if code else [])])
    return PlaceError(url, f"{name}: {problem or 'the server refuses'} ({told})", again)


def failure(url: str, name: str, text: str) -> PearStoreError:
    """The error for a failed request, by a library's text.

    That text may hold a signed URL, or words that the server sent. So only known words of it are shown.
    """
    if _OF_METADATA.search(text.split("\n")[0]):
        return PlaceError(url, f"{name}: {MEANINGS['none'][0]}", MEANINGS["none"][1])
    code, status = _CODE.search(text), status_of(text)
    if code or status:
        return refusal(url, name, status, code[1] if code else None)
    for sign, kind in _SIGNS:
        if sign.search(text):
            return PlaceError(url, f"{name}: {MEANINGS[kind][0]}", MEANINGS[kind][1])
    return PlaceError(url, f"{name}: {plain(text)}", again=True)


def status_of(text: str) -> int | None:
    """The HTTP status in a library's text. Numbers elsewhere do not count: they may be part of a URL."""
    found = _STATUS.search(text)
    return int(found[1]) if found else None


def plain(text: str) -> str:
    """The first line of a library's text, without URLs: a URL's query may be signed."""
    line = _URL.sub("URL", text.strip().split("\n")[0])[:200]
    return "".join(c if c.isprintable() else "?" for c in line) or "an error without a text"
