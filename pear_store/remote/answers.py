"""What the refusal of a server means for a person, and whether another try may help. One table for all places."""

import re

from pear_store.errors import DiskFullError, PearStoreError, PlaceError

_DENIED = "access is denied; see which rights the credentials of the environment have there"
_UNKNOWN = "the server does not accept the credentials of the environment; set valid ones and run the same again"
_EXPIRED = "the credentials of the environment have expired; renew them and run the same again"
_CLOCK = "the clocks of this machine and of the server differ by more than it allows; set them right"
_BUSY = "the server is busy or fails for now"
_FULL = "full"
_REDIRECT = "the server redirects, which is not followed"

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
    "409": (_BUSY, True),  # of two conditional writes at once
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
"""By what S3 and Azure call it, by HTTP status, or by how the connection failed: what it means, and whether another
try may help"""

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
    """The error for a server's answer of an HTTP status; `code` is the word that S3 and Azure put in its body."""
    problem, again = MEANINGS.get(code or "") or MEANINGS.get(str(status)) or ("", (status or 0) >= 500)
    if problem == _FULL:
        return DiskFullError(url)
    told = ", ".join([*([f"status {status}"] if status else []), *([code] if code else [])])
    return PlaceError(url, f"{name}: {problem or 'the server refuses'} ({told})", again)


def failure(url: str, name: str, text: str) -> PearStoreError:
    """The error for what a library says of a failed request. Of its text, which may hold a signed URL or what the
    server sent, only known words are shown."""
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
    """The HTTP status in a library's text. (Any number may be in the URL that it shows.)"""
    found = _STATUS.search(text)
    return int(found[1]) if found else None


def plain(text: str) -> str:
    """A library's first line without URLs, whose queries may be signed."""
    line = _URL.sub("URL", text.strip().split("\n")[0])[:200]
    return "".join(c if c.isprintable() else "?" for c in line) or "an error without a text"
