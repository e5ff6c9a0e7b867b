"""Why a request got no answer, besides what is wrong with its image or its task.

ServeError                 (a RouterError)
├── QueueFullError         as many images wait as may
├── DeadlineError          no answer within the time limit
├── DrainingError          the batcher is being closed
├── OutOfMemoryError       the memory does not suffice for this image and its tasks
└── DeviceFailedError      the device's thread ended; make a new process

FetchError                 (an ImageError) an image that is only named, and not to be had
"""

from router.errors import ImageError, RouterError


class ServeError(RouterError):
    pass


class QueueFullError(ServeError):
    def __init__(self, waiting: int, queue: int, retry_after_s: int) -> None:
        super().__init__(f"{waiting} images wait, the limit is {queue}: try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class DeadlineError(ServeError, TimeoutError):
    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"no answer within {timeout_s:g} s")
        self.timeout_s = timeout_s


class DrainingError(ServeError):
    def __init__(self) -> None:
        super().__init__("this server is shutting down: ask another one, or try again later")


class OutOfMemoryError(ServeError):
    def __init__(self, tasks: int) -> None:
        super().__init__(f"out of memory for one image and {tasks} tasks: send fewer tasks at once")


class DeviceFailedError(ServeError):
    def __init__(self, reason: BaseException) -> None:
        text = " ".join(str(reason).split()) or type(reason).__name__
        super().__init__(f"the device's thread ended: {text:.300}")
        self.reason = reason


class FetchError(ImageError):
    """An image that a request names by a path or URL, and that is not to be had.

    Args:
        status: the HTTP status that says so.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
