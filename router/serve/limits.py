"""Limits of requests."""

from dataclasses import dataclass, fields

from router.errors import RouterError


@dataclass(frozen=True)
class RequestLimits:
    """Limits of requests. The router's `max_pixels` limits pictures; the batcher's `queue` limits waiting images."""

    body_bytes: int = 32 * 1024**2
    """Most bytes of a request's body."""
    held_bytes: int = 1024**3
    """Most bytes of all bodies in memory."""
    images: int = 64
    """Most images in a request."""
    tasks: int = 256
    """Most tasks for one image."""
    timeout_s: float = 30.0
    """Most seconds from the end of a request's body to its answer."""
    body_timeout_s: float = 30.0
    """Most seconds for a request's body to arrive."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise RouterError(f"{field.name} {getattr(self, field.name)}: expected more than 0")
