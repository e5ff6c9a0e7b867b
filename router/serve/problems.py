"""Error answers to clients: problem details, RFC 9457, as `application/problem+json`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse

from pear_store import PearStoreError
from pear_store.errors import PlaceError
from router.errors import ImageError, RouterError, TooManyPixelsError, UnknownTaskError
from router.serve.errors import (
    DeadlineError,
    DeviceFailedError,
    DrainingError,
    FetchError,
    OutOfMemoryError,
    QueueFullError,
)

DEVICE_FAILED = "the device has failed: this server is about to end"
TITLES = {
    400: "The request cannot be read",
    401: "A token is needed",
    403: "This token does not allow it",
    404: "Not found",
    405: "This path does not take this method",
    408: "The body did not arrive in time",
    413: "Too large",
    415: "This content type is not supported",
    421: "Another server's name",
    422: "This request cannot be fulfilled",
    429: "Too many requests",
    500: "The server failed",
    502: "The remote store cannot be reached",
    503: "Not available now",
    504: "No answer in time",
}
"""Every status of an error."""


@dataclass
class Problem(Exception):
    """An error answer.

    Args:
        status: HTTP status.
        detail: one line for a person.
        more: further members, such as `near`.
        headers: HTTP headers of the answer.
    """

    status: int
    detail: str
    more: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)

    def members(self) -> dict[str, Any]:
        """The members of its JSON object."""
        found = {"type": "about:blank", "title": TITLES[self.status], "status": self.status, "detail": self.detail}
        return {**found, **self.more}

    def response(self) -> JSONResponse:
        return JSONResponse(
            self.members(), self.status, headers=dict(self.headers), media_type="application/problem+json"
        )


def problem_of(error: BaseException) -> Problem:
    """The error answer for an error. Texts that may contain a path of this machine are not sent."""
    match error:
        case Problem():
            return error
        case TooManyPixelsError():
            return Problem(
                413, f"an image of {error.width} x {error.height} pixels: the limit is {error.max_pixels} pixels"
            )
        case FetchError():
            return Problem(error.status, str(error))
        case ImageError():
            return Problem(400, str(error))
        case UnknownTaskError():
            return Problem(404, str(error))
        case QueueFullError():
            return Problem(429, str(error), headers={"Retry-After": str(error.retry_after_s)})
        case DrainingError() | OutOfMemoryError():
            return Problem(503, str(error), headers={"Retry-After": "5"})
        case MemoryError():
            return Problem(503, "out of memory", headers={"Retry-After": "5"})
        case DeadlineError():
            return Problem(504, str(error))
        case DeviceFailedError():
            return Problem(503, DEVICE_FAILED)
        case RouterError():
            return Problem(422, str(error))
        case PlaceError():
            # not 503, after which a proxy would try another replica: none of them can reach the remote
            return Problem(502, "the remote that has this task cannot be reached", headers={"Retry-After": "10"})
        case PearStoreError():
            return Problem(500, "the store cannot read this task; the server's log says why")
    return Problem(500, "an unexpected error; the server's log says more")
