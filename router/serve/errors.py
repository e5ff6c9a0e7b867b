"""Errors of requests that come neither from the image nor from the task.

ServeError                 (a RouterError)
├── QueueFullError         the queue of images is full
├── DeadlineError          there was no answer within the time limit
├── DrainingError          the batcher is closing
├── OutOfMemoryError       the memory is too small for this image and its tasks
└── DeviceFailedError      the device's thread ended; start a new process

FetchError                 (an ImageError) an image's path or URL cannot be opened
"""

from pear_store.counted import counted
from router.errors import ImageError, RouterError


class ServeError(RouterError):
    """Base of the errors of requests that come neither from the image nor from the task."""


class QueueFullError(ServeError):
    """The queue of images is full. `retry_after_s` says when to try again."""

    def __init__(self, waiting: int, queue: int, retry_after_s: int) -> None:
        super().__init__(f"images that wait: {waiting}, the limit is {queue}: try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class DeadlineError(ServeError, TimeoutError):
    """There was no answer within the time limit."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"no answer within {timeout_s:g} s: try again later, or send fewer images at once")
        self.timeout_s = timeout_s


class DrainingError(ServeError):
    """The batcher is closing."""

    def __init__(self) -> None:
        super().__init__("this server is shutting down: ask another one, or try again later")


class OutOfMemoryError(ServeError):
    """The memory is too small for an image and its tasks."""

    def __init__(self, tasks: int) -> None:
        super().__init__(f"out of memory for one image and {counted(tasks, 'task')}: send fewer tasks at once")


class DeviceFailedError(ServeError):
    """The device's thread ended. Only a new process can go on."""

    def __init__(self, reason: BaseException) -> None:
        text = " ".join(str(reason).split()) or type(reason).__name__
        super().__init__(f"the device's thread ended: {text:.300}")
        self.reason = reason


class FetchError(ImageError):
    """A path or URL that a request names cannot be opened as an image.

    Args:
        status: HTTP status of the answer.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
