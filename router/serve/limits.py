"""What one request may ask for."""

from dataclasses import dataclass, fields

from router.errors import RouterError


@dataclass(frozen=True)
class RequestLimits:
    """Limits of requests. The router's `max_pixels` limits pictures, the batcher's `queue` images that wait."""

    body_bytes: int = 32 * 1024**2
    """Of one request's body."""
    held_bytes: int = 1024**3
    """Of all bodies that are held at a time."""
    images: int = 64
    """Of one request."""
    tasks: int = 256
    """That one image goes through in one request."""
    timeout_s: float = 30.0
    """From the end of a request's body to its answer."""
    body_timeout_s: float = 30.0
    """Until a request's body has arrived."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise RouterError(f"{field.name} {getattr(self, field.name)}: expected more than 0")
